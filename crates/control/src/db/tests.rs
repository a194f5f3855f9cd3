//! The store, on both databases.

use std::collections::BTreeMap;

use api::{CapsuleId, CreateCapsule, SafeName, TeamId};
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
        .validate()
        .unwrap();
    capsule::insert(db, team, host::CONFIGURED, spec).await.unwrap()
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
            Observed::Stopping,
            Observed::Missing,
            Observed::Stopped,
            Observed::Failed,
        ] {
            let capsule = a_capsule(&db, team).await;
            let life = Life { state: State { observed, ..State::NEW }, ..capsule.life.clone() };
            assert!(capsule::advance(&db, &capsule, &life).await.unwrap());
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
        let spec = CreateCapsule::default().validate().unwrap();
        let nobody = capsule::insert(&db, TeamId::random(), host::CONFIGURED, spec).await;
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
