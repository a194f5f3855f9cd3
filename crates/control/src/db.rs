//! The store: tables, and the queries over them, on PostgreSQL and SQLite alike.
//!
//! Every query is of one team, by taking its id, or says `any_team` in its name. "Not there" is an `Option`. Raw UUIDs stop
//! here: everything above uses the ids of `api`.

pub mod capsule;
pub mod garbage;
pub mod host;
pub mod key;
mod migration;
pub mod team;
pub mod template;

use std::time::Duration;

use chrono::{DateTime, SubsecRound, Utc};
use sea_orm::sqlx::sqlite::SqliteJournalMode;
use sea_orm::{ConnectOptions, Database, DatabaseConnection, DbErr};
use sea_orm_migration::MigratorTrait;

/// What can go wrong with the store. Whatever it is, the client can do nothing about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open the database")]
    Open(#[source] DbErr),
    #[error("cannot bring the database's tables up to date")]
    Migrate(#[source] DbErr),
    #[error("the database did not answer a query")]
    Query(#[from] DbErr),
    #[error("the database holds `{value}` in {column}, which is not a value it can have")]
    Corrupt { column: &'static str, value: String },
}

/// Connections at once. SQLite lets one write and the others read.
const CONNECTIONS: u32 = 16;
/// How long to wait for a free connection, or for another writer of a SQLite file.
const PATIENCE: Duration = Duration::from_secs(10);

/// Opens the database and brings its tables up to date.
pub async fn open(url: &str) -> Result<DatabaseConnection, Error> {
    let mut options = ConnectOptions::new(url);
    options.max_connections(CONNECTIONS).acquire_timeout(PATIENCE).sqlx_logging(false).map_sqlx_sqlite_opts(|sqlite| {
        sqlite.create_if_missing(true).journal_mode(SqliteJournalMode::Wal).busy_timeout(PATIENCE).foreign_keys(true)
    });
    let db = Database::connect(options).await.map_err(Error::Open)?;
    migration::Migrator::up(&db, None).await.map_err(Error::Migrate)?;
    Ok(db)
}

/// The present, as precisely as both databases keep it, so that what is written is what is read.
pub fn now() -> DateTime<Utc> {
    Utc::now().trunc_subsecs(6)
}

#[cfg(test)]
mod tests;
