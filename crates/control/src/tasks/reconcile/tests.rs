//! Rounds, one at a time, against a fake host.

use std::sync::Arc;

use agent_api::CapsuleState;
use api::{CreateCapsule, TeamId};
use chrono::TimeDelta;
use lifecycle::{Observed, State};
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter};
use testkit::FakeAgent;

use super::*;
use crate::db::capsule::Life;
use crate::{Config, Control};

struct World {
    ctx: Arc<Context>,
    agent: FakeAgent,
    team: TeamId,
    strangers: HashSet<CapsuleId>,
    _dir: tempfile::TempDir,
}

impl World {
    /// Nothing runs but what a test does.
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let agent = FakeAgent::start().await;
        let database_url = crate::sqlite_url(&dir.path().join("control.db"));
        let control =
            Control::open(Config { database_url, agent: agent.endpoint(), version: "test".into() }).await.unwrap();
        let team = control.ensure_team(&"first".parse().unwrap()).await.unwrap();
        Self { ctx: control.context(), agent, team, strangers: HashSet::new(), _dir: dir }
    }

    async fn round(&mut self) {
        round(&self.ctx, &mut self.strangers).await.unwrap();
    }

    /// A row, as a control plane leaves it that dies before it asks its host.
    async fn row(&self) -> Capsule {
        let spec = CreateCapsule::default().validate(None).unwrap();
        let capsule = Capsule::new(self.team, db::host::CONFIGURED, spec, None);
        db::capsule::insert(&self.ctx.db, std::slice::from_ref(&capsule)).await.unwrap();
        capsule
    }

    async fn state(&self, capsule: &Capsule) -> State {
        db::capsule::get(&self.ctx.db, self.team, capsule.id).await.unwrap().unwrap().life.state
    }
}

#[tokio::test]
async fn a_lost_create_is_made_again_after_a_while() {
    let mut world = World::new().await;
    let capsule = world.row().await;
    world.round().await;
    assert_eq!(world.state(&capsule).await, State::NEW, "it may be on its way");
    assert_eq!(*world.agent.creates().borrow(), 0);

    let long_ago = db::now() - TimeDelta::from_std(lifecycle::GRACE).unwrap();
    let query = db::capsule::Entity::update_many()
        .col_expr(db::capsule::Column::LastUpdated, sea_orm::sea_query::Expr::value(long_ago));
    query.filter(db::capsule::Column::Id.eq(capsule.id.0)).exec(&world.ctx.db).await.unwrap();
    let mut changes = world.ctx.changes.subscribe();
    world.round().await;
    assert_eq!(changes.recv().await.unwrap(), capsule.id);
    assert_eq!(world.state(&capsule).await.observed, Observed::Running);
    assert_eq!(world.agent.alive(), [capsule.id.to_string()]);
}

#[tokio::test]
async fn a_wish_that_its_host_never_heard_is_carried_out() {
    let mut world = World::new().await;
    let mut capsule = world.row().await;
    world.agent.put(capsule.id, CapsuleState::CAPSULE_STATE_RUNNING, 2);
    let state = State { desired: lifecycle::Desired::Stopped, ..State::NEW };
    let life = Life { state, ..capsule.life.clone() };
    assert!(db::capsule::advance(&world.ctx.db, &capsule, &life).await.unwrap());
    capsule.life = life;
    world.round().await;
    assert!(world.agent.alive().is_empty());
    assert_eq!(world.state(&capsule).await.observed, Observed::Stopped);
}

#[tokio::test]
async fn a_listing_that_is_older_than_the_row_does_not_make_it_missing() {
    let world = World::new().await;
    let capsule = world.row().await;
    // The row was read before the listing; the create's answer came in between.
    let running = State { observed: Observed::Running, generation: 2, ..State::NEW };
    let life = Life { state: running, ..capsule.life.clone() };
    assert!(db::capsule::advance(&world.ctx.db, &capsule, &life).await.unwrap());
    settle(&world.ctx, capsule.clone(), None).await.unwrap();
    let now = db::capsule::get(&world.ctx.db, world.team, capsule.id).await.unwrap().unwrap();
    record(&world.ctx, now, Fact::Absent { seen: State { observed: Observed::Starting, ..running } }).await.unwrap();
    assert_eq!(world.state(&capsule).await, running);
}

#[tokio::test]
async fn a_quiet_round_writes_nothing() {
    let mut world = World::new().await;
    let capsule = world.row().await;
    world.agent.put(capsule.id, CapsuleState::CAPSULE_STATE_RUNNING, 2);
    world.round().await;
    let before = db::capsule::get(&world.ctx.db, world.team, capsule.id).await.unwrap();
    let mut changes = world.ctx.changes.subscribe();
    world.round().await;
    world.round().await;
    assert_eq!(db::capsule::get(&world.ctx.db, world.team, capsule.id).await.unwrap(), before);
    assert!(changes.try_recv().is_err());
}

/// Makes the row look as if nothing had happened to it for that long.
async fn age(world: &World, capsule: &Capsule, by: std::time::Duration) {
    let long_ago = db::now() - TimeDelta::from_std(by).unwrap();
    let query = db::capsule::Entity::update_many()
        .col_expr(db::capsule::Column::LastUpdated, sea_orm::sea_query::Expr::value(long_ago));
    query.filter(db::capsule::Column::Id.eq(capsule.id.0)).exec(&world.ctx.db).await.unwrap();
}

#[tokio::test]
async fn a_lost_pause_is_asked_again_after_a_while() {
    let mut world = World::new().await;
    let capsule = world.row().await;
    world.agent.put(capsule.id, CapsuleState::CAPSULE_STATE_RUNNING, 2);
    world.round().await;
    let capsule = db::capsule::get(&world.ctx.db, world.team, capsule.id).await.unwrap().unwrap();
    let state = State { desired: lifecycle::Desired::Paused, ..capsule.life.state };
    let life = Life { state, last_updated: db::now(), ..capsule.life.clone() };
    assert!(db::capsule::advance(&world.ctx.db, &capsule, &life).await.unwrap());
    world.round().await;
    assert_eq!(*world.agent.pauses().borrow(), 0, "it may be on its way");
    age(&world, &capsule, lifecycle::GRACE).await;
    let mut changes = world.ctx.changes.subscribe();
    world.round().await;
    assert_eq!(changes.recv().await.unwrap(), capsule.id);
    assert_eq!(world.state(&capsule).await.observed, Observed::Paused);

    // One that fails is not asked for for ever.
    let mut pauses = world.agent.pauses();
    pauses.mark_unchanged();
    world.agent.fail_changes(Some(connectrpc::ErrorCode::Internal));
    world.agent.put(capsule.id, CapsuleState::CAPSULE_STATE_RUNNING, 9);
    world.round().await;
    age(&world, &capsule, lifecycle::GRACE).await;
    world.round().await;
    world.ctx.tasks.close();
    world.ctx.tasks.wait().await;
    assert_eq!(*pauses.borrow_and_update(), 2);
    assert_eq!(world.state(&capsule).await.desired, lifecycle::Desired::Running);
}

#[tokio::test]
async fn a_fork_that_was_lost_is_given_up() {
    let mut world = World::new().await;
    let parent = world.row().await;
    let fork = Capsule::new(world.team, parent.host, parent.spec.clone(), Some(parent.id));
    db::capsule::insert(&world.ctx.db, std::slice::from_ref(&fork)).await.unwrap();
    age(&world, &fork, lifecycle::GRACE).await;
    world.round().await;
    assert_eq!(world.state(&fork).await.observed, Observed::Unreported);
    age(&world, &fork, lifecycle::FORK_GRACE).await;
    world.round().await;
    assert_eq!(world.state(&fork).await.observed, Observed::Failed);
    assert_eq!(*world.agent.creates().borrow(), 0, "it is not made from its template");
}

#[tokio::test]
async fn a_template_that_was_never_finished_is_garbage_in_due_time() {
    let mut world = World::new().await;
    for (name, due) in [("tpl-due", db::now()), ("tpl-making", db::now() + TimeDelta::hours(1))] {
        let capsule = world.row().await;
        world.agent.put(capsule.id, CapsuleState::CAPSULE_STATE_RUNNING, 2);
        world.ctx.host.snapshot(capsule.id, name).await.unwrap();
        db::garbage::insert(&world.ctx.db, capsule.id.0, db::host::CONFIGURED, name, due).await.unwrap();
    }
    world.round().await;
    assert_eq!(world.agent.templates(), ["tpl-making"]);
    assert!(db::garbage::due(&world.ctx.db, db::host::CONFIGURED).await.unwrap().is_empty());
}

#[tokio::test]
async fn what_hibernated_while_nobody_looked_is_known_and_what_went_on_elsewhere_is_not_confused() {
    let mut world = World::new().await;
    let capsule = world.row().await;
    // It was paused when it was last heard of, and then its host was asked to let go of it and nobody heard the answer.
    for (state, generation, then) in [
        (CapsuleState::CAPSULE_STATE_PAUSED, 4, Observed::Paused),
        (CapsuleState::CAPSULE_STATE_HIBERNATED, 6, Observed::Hibernated),
        (CapsuleState::CAPSULE_STATE_RUNNING, 9, Observed::Running),
        // It runs elsewhere, and this host says what it said before.
        (CapsuleState::CAPSULE_STATE_HIBERNATED, 6, Observed::Missing),
        (CapsuleState::CAPSULE_STATE_RUNNING, 9, Observed::Running),
    ] {
        world.agent.put(capsule.id, state, generation);
        world.round().await;
        assert_eq!(world.state(&capsule).await.observed, then, "{state:?}");
    }
}

#[tokio::test]
async fn what_is_not_wanted_is_forgotten_where_it_hibernated() {
    let mut world = World::new().await;
    let capsule = world.row().await;
    let state = State { desired: lifecycle::Desired::Stopped, observed: Observed::Stopped, generation: 9 };
    let life = Life { state, ..capsule.life.clone() };
    assert!(db::capsule::advance(&world.ctx.db, &capsule, &life).await.unwrap());
    world.agent.put(capsule.id, CapsuleState::CAPSULE_STATE_HIBERNATED, 6);
    world.round().await;
    assert_eq!(*world.agent.destroys().borrow(), 1);
    assert_eq!(world.state(&capsule).await, state);
}
