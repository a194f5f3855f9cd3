//! The store, on both databases.

use std::collections::BTreeMap;

use api::{CapsuleId, CreateCapsule, SafeName, TeamId, TemplateId};
use lifecycle::{Desired, Observed, State};
use sea_orm::{ConnectionTrait, DbBackend};
use testkit::Postgres;

use super::capsule::{Capsule, Life};
use super::*;

/// An open, seeded database of each kind, by its address.
async fn both() -> (Vec<(String, DatabaseConnection)>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let sqlite = crate::sqlite_url(&dir.path().join("what? 100%25 #1.db"));
    let postgres = tokio::task::spawn_blocking(|| Postgres::shared().database()).await.unwrap();
    let mut opened = Vec::new();
    for url in [sqlite, postgres] {
        let db = open(&url).await.unwrap();
        seed(&db).await;
        opened.push((url, db));
    }
    (opened, dir)
}

async fn seed(db: &DatabaseConnection) {
    team::ensure(db, team::PLATFORM, "platform", "Platform").await.unwrap();
    template::ensure_default(db).await.unwrap();
    host::ensure(db, host::CONFIGURED, &"unix:/a".parse().unwrap()).await.unwrap();
}

async fn a_team(db: &DatabaseConnection, slug: &str) -> TeamId {
    team::ensure(db, TeamId::random(), slug, slug).await.unwrap()
}

async fn a_capsule(db: &DatabaseConnection, team: TeamId) -> Capsule {
    let spec = CreateCapsule { metadata: Some([("k".into(), "ü\"'".into())].into()), ..Default::default() }
        .validate(None)
        .unwrap();
    let capsule = Capsule::new(team, host::CONFIGURED, spec, None);
    capsule::insert(db, std::slice::from_ref(&capsule)).await.unwrap();
    capsule
}

#[tokio::test]
async fn opening_again_changes_nothing() {
    let (stores, dir) = both().await;
    assert!(dir.path().join("what? 100%25 #1.db").exists(), "whatever its path");
    for (url, db) in stores {
        let team = a_team(&db, "one").await;
        let capsule = a_capsule(&db, team).await;
        let again = open(&url).await.unwrap();
        seed(&again).await;
        assert_eq!(a_team(&again, "one").await, team);
        assert_eq!(capsule::get(&again, team, capsule.id).await.unwrap(), Some(capsule));
    }
}

#[tokio::test]
async fn what_is_written_is_what_is_read() {
    let (stores, _dir) = both().await;
    for (_, db) in stores {
        let team = a_team(&db, "one").await;
        let mut capsule = a_capsule(&db, team).await;
        assert_eq!(capsule::get(&db, team, capsule.id).await.unwrap().as_ref(), Some(&capsule));
        let life = Life {
            state: State { desired: Desired::Stopped, observed: Observed::Failed, generation: i64::MAX as u64 },
            reason: Some("it broke".into()),
            versions: BTreeMap::from([("envd_version".into(), "1".into())]),
            started_at: Some(now()),
            last_active_at: Some(now()),
            last_updated: now(),
        };
        assert!(capsule::advance(&db, &capsule, &life).await.unwrap());
        capsule.life = life;
        assert_eq!(capsule::get(&db, team, capsule.id).await.unwrap(), Some(capsule));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_who_advance_a_capsule_one_does() {
    let (stores, _dir) = both().await;
    for (_, db) in stores {
        let team = a_team(&db, "one").await;
        let seen = a_capsule(&db, team).await;
        let attempts = (1..=32u64).map(|generation| {
            let (db, seen) = (db.clone(), seen.clone());
            let state = State { observed: Observed::Running, generation, ..seen.life.state };
            let life = Life { state, ..seen.life.clone() };
            tokio::spawn(async move { capsule::advance(&db, &seen, &life).await.unwrap().then_some(generation) })
        });
        let won: Vec<_> = futures::future::join_all(attempts).await.into_iter().filter_map(Result::unwrap).collect();
        let row = capsule::get(&db, team, seen.id).await.unwrap().unwrap();
        assert_eq!(won, [row.life.state.generation]);
    }
}

#[tokio::test]
async fn teams_see_only_their_own() {
    let (stores, _dir) = both().await;
    for (_, db) in stores {
        let (one, two) = (a_team(&db, "one").await, a_team(&db, "two").await);
        let mut capsule = a_capsule(&db, one).await;
        assert_eq!(capsule::get(&db, two, capsule.id).await.unwrap(), None);
        assert_eq!(capsule::list(&db, two).await.unwrap(), []);
        assert_eq!(capsule::list(&db, one).await.unwrap(), [capsule.clone()]);
        let life = capsule.life.clone();
        capsule.team = two;
        assert!(!capsule::advance(&db, &capsule, &life).await.unwrap(), "not even a row of another team is written");
        let everyone = capsule::these_any_team(&db, [capsule.id, CapsuleId::random()].into_iter()).await.unwrap();
        assert_eq!(everyone.len(), 1);

        let key = key::Key::random();
        key::insert(&db, one, "k", &key).await.unwrap();
        assert_eq!(key::find_any_team(&db, &key).await.unwrap().map(|known| known.team), Some(one));
        assert_eq!(key::find_any_team(&db, &key::Key::random()).await.unwrap(), None);

        assert!(template::find(&db, two, &SafeName::default()).await.unwrap().unwrap().platform());
        assert_eq!(template::find(&db, two, &"other".parse().unwrap()).await.unwrap(), None);
    }
}

#[tokio::test]
async fn what_ended_is_not_alive() {
    let (stores, _dir) = both().await;
    for (_, db) in stores {
        let team = a_team(&db, "one").await;
        let mut alive = Vec::new();
        for observed in [
            Observed::Unreported,
            Observed::Starting,
            Observed::Running,
            Observed::Pausing,
            Observed::Paused,
            Observed::Uploaded,
            Observed::Hibernated,
            Observed::Resuming,
            Observed::Stopping,
            Observed::Missing,
            Observed::Stopped,
            Observed::Failed,
        ] {
            let capsule = a_capsule(&db, team).await;
            // Paused is a wish too.
            let state = State { desired: Desired::Paused, observed, ..State::NEW };
            let life = Life { state, ..capsule.life.clone() };
            assert!(capsule::advance(&db, &capsule, &life).await.unwrap());
            assert_eq!(capsule::get(&db, team, capsule.id).await.unwrap().unwrap().life.state, state);
            if !observed.ended() {
                alive.push(capsule.id);
            }
        }
        alive.sort();
        let mut found: Vec<_> =
            capsule::alive_on_any_team(&db, host::CONFIGURED).await.unwrap().into_iter().map(|row| row.id).collect();
        found.sort();
        assert_eq!(found, alive);
    }
}

#[tokio::test]
async fn a_word_nobody_wrote_is_an_error() {
    let (stores, _dir) = both().await;
    for (_, db) in stores {
        let team = a_team(&db, "one").await;
        let capsule = a_capsule(&db, team).await;
        db.execute_unprepared("UPDATE capsules SET observed = 'dancing'").await.unwrap();
        let error = capsule::get(&db, team, capsule.id).await.unwrap_err();
        assert!(matches!(error, Error::Corrupt { column: "capsules.observed", .. }), "{error}");
    }
}

#[tokio::test]
async fn rows_belong_to_rows() {
    let (stores, _dir) = both().await;
    for (_, db) in stores {
        let spec = CreateCapsule::default().validate(None).unwrap();
        let nobody = capsule::insert(&db, &[Capsule::new(TeamId::random(), host::CONFIGURED, spec, None)]).await;
        assert!(matches!(nobody, Err(Error::Query(_))));
        if db.get_database_backend() == DbBackend::Sqlite {
            let row = db
                .query_one_raw(sea_orm::Statement::from_string(DbBackend::Sqlite, "PRAGMA journal_mode"))
                .await
                .unwrap();
            assert_eq!(row.unwrap().try_get_by_index::<String>(0).unwrap(), "wal");
        }
    }
}

#[tokio::test]
async fn forks_know_their_parent() {
    let (stores, _dir) = both().await;
    for (_, db) in stores {
        let team = a_team(&db, "one").await;
        let parent = a_capsule(&db, team).await;
        let fork = || Capsule::new(team, host::CONFIGURED, parent.spec.clone(), Some(parent.id));
        let forks: Vec<_> = (0..100).map(|_| fork()).collect();
        capsule::insert(&db, &forks).await.unwrap();
        assert_eq!(capsule::get(&db, team, forks[99].id).await.unwrap().as_ref(), Some(&forks[99]));
        assert_eq!(capsule::list(&db, team).await.unwrap().len(), 101);
        // One that cannot be written leaves none.
        let twice = [fork(), forks[0].clone()];
        assert!(capsule::insert(&db, &twice).await.is_err());
        assert_eq!(capsule::get(&db, team, twice[0].id).await.unwrap(), None);
    }
}

fn a_snapshot(team: TeamId, name: &str) -> template::Snapshot {
    template::Snapshot {
        id: TemplateId::random(),
        team,
        name: name.parse().unwrap(),
        sizes: api::Sizes { vcpus: 2, memory_mb: 1024, disk_size_mb: 6000 },
        size_bytes: u64::MAX,
        default_env: BTreeMap::from([("A".into(), "b".into())]),
        metadata: BTreeMap::new(),
    }
}

/// Publishes, as if it had just been made.
async fn publish(db: &DatabaseConnection, snapshot: template::Snapshot, overwrite: bool) -> Option<template::Model> {
    let due = now() + chrono::TimeDelta::hours(1);
    garbage::insert(db, snapshot.id.0, host::CONFIGURED, &snapshot.id.to_string(), due).await.unwrap();
    template::publish(db, host::CONFIGURED, snapshot, overwrite).await.unwrap()
}

#[tokio::test]
async fn a_template_is_garbage_before_and_after() {
    let (stores, _dir) = both().await;
    for (_, db) in stores {
        let team = a_team(&db, "one").await;
        let due = async || {
            garbage::due(&db, host::CONFIGURED).await.unwrap().into_iter().map(|row| row.id).collect::<Vec<_>>()
        };
        let one = a_snapshot(team, "mine");
        let published = publish(&db, one.clone(), false).await;
        assert!(due().await.is_empty());
        let row = template::find(&db, team, &one.name).await.unwrap().unwrap();
        assert_eq!(published.as_ref(), Some(&row));
        assert_eq!((row.image.as_str(), row.baked().unwrap()), (one.id.to_string().as_str(), Some(one.sizes)));

        let two = a_snapshot(team, "mine");
        assert_eq!(publish(&db, two.clone(), false).await, None);
        garbage::hasten(&db, two.id.0).await.unwrap();
        assert_eq!(due().await, [two.id.0], "what could not be published is garbage still");
        garbage::remove(&db, two.id.0).await.unwrap();

        let three = a_snapshot(team, "mine");
        assert_eq!(publish(&db, three.clone(), true).await.unwrap().id, three.id.0);
        assert_eq!(due().await, [one.id.0]);
        let names = async |kind| -> Vec<_> {
            template::list(&db, team, kind).await.unwrap().into_iter().map(|row| row.name).collect()
        };
        assert_eq!(names(None).await, ["mine", "minimal"]);
        assert_eq!(names(Some(api::TemplateKind::Snapshot)).await, ["mine"]);
        assert_eq!(names(Some(api::TemplateKind::Base)).await, ["minimal"]);

        let row = template::find(&db, team, &one.name).await.unwrap().unwrap();
        assert!(template::remove(&db, host::CONFIGURED, &row).await.unwrap());
        assert!(!template::remove(&db, host::CONFIGURED, &row).await.unwrap(), "once");
        assert_eq!(due().await.len(), 2);
        assert_eq!(template::find(&db, team, &one.name).await.unwrap(), None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_who_take_a_name_one_gets_it() {
    let (stores, _dir) = both().await;
    for (_, db) in stores {
        let team = a_team(&db, "one").await;
        let attempts = (0..16).map(|_| {
            let db = db.clone();
            tokio::spawn(async move { publish(&db, a_snapshot(team, "mine"), false).await })
        });
        let done = futures::future::join_all(attempts).await.into_iter().filter_map(Result::unwrap);
        assert_eq!(done.count(), 1);
    }
}
