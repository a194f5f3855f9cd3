//! The control plane as one value: opened from a configuration, served on a listener.

use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use agent_api::Endpoint;
use api::{SafeName, TeamId};
use axum::Router;
use proxy::Listener;

use crate::op::Context;
use crate::{db, http, tasks};

/// How long a shutdown waits for requests and starts that are under way.
const GRACE: Duration = Duration::from_secs(10);

/// All a control plane needs to know before it opens anything.
#[derive(Debug, Clone)]
pub struct Config {
    /// [`sqlite_url`] of a file, or `postgres://user@host/database`.
    pub database_url: String,
    /// The agent of the one host this control plane steers.
    pub agent: Endpoint,
    /// What `GET /health` calls this program.
    pub version: String,
}

/// The address of a SQLite database in a file, whatever characters its path has.
pub fn sqlite_url(path: &Path) -> String {
    // These would end the path, or begin an escape.
    let path = path.to_string_lossy().replace('%', "%25").replace('?', "%3F").replace('#', "%23");
    format!("sqlite://{path}")
}

/// Why a control plane does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot use the database")]
    Store(#[from] db::Error),
    #[error("cannot serve HTTP")]
    Serve(#[source] io::Error),
}

/// A control plane. Clones are the same one.
#[derive(Clone)]
pub struct Control {
    ctx: Arc<Context>,
    version: Arc<str>,
}

impl Control {
    /// Opens the database, brings its tables up to date, and makes sure of what always exists: the platform's team, the
    /// default template, and the configured host. Does not yet talk to the host.
    pub async fn open(config: Config) -> Result<Self, Error> {
        let db = db::open(&config.database_url).await?;
        db::team::ensure(&db, db::team::PLATFORM, "platform", "Platform").await?;
        db::template::ensure_default(&db).await?;
        db::host::ensure(&db, db::host::CONFIGURED, &config.agent).await?;
        Ok(Self { ctx: Arc::new(Context::new(db, config.agent)), version: config.version.into() })
    }

    /// The team of that short name, made if it is not there.
    pub async fn ensure_team(&self, slug: &SafeName) -> Result<TeamId, Error> {
        Ok(db::team::ensure(&self.ctx.db, TeamId::random(), slug.as_str(), slug.as_str()).await?)
    }

    /// A new API key that speaks for `team`. This is the only time it can be seen.
    pub async fn issue_key(&self, team: TeamId, name: &str) -> Result<String, Error> {
        let key = db::key::Key::random();
        db::key::insert(&self.ctx.db, team, name, &key).await?;
        Ok(key.reveal())
    }

    /// Whether `key` speaks for anyone.
    pub async fn knows_key(&self, key: &str) -> Result<bool, Error> {
        let Some(key) = db::key::Key::parse(key) else { return Ok(false) };
        Ok(db::key::find_any_team(&self.ctx.db, &key).await?.is_some())
    }

    #[cfg(test)]
    pub(crate) fn context(&self) -> Arc<Context> {
        self.ctx.clone()
    }

    /// Every route.
    pub fn router(&self) -> Router {
        http::router(http::App { ctx: self.ctx.clone(), version: self.version.clone() })
    }

    /// Serves until `shutdown`, then gives what is under way a moment to end. Background tasks run for as long.
    pub async fn run(
        &self,
        listener: impl Listener + 'static,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), Error> {
        let stop = self.ctx.stop.clone();
        // Whoever drops this future means the same.
        let _stop = stop.clone().drop_guard();
        let background = tokio::spawn(tasks::reconcile::run(self.ctx.clone(), stop.clone()));
        let mut serving = tokio::spawn(proxy::serve(listener, self.router(), stop.clone().cancelled_owned()));
        let served = tokio::select! {
            served = &mut serving => Some(served),
            () = shutdown => None,
        };
        stop.cancel();
        self.ctx.tasks.close();
        let wind_down = async {
            self.ctx.tasks.wait().await;
            match served {
                Some(served) => served,
                None => (&mut serving).await,
            }
        };
        let served = tokio::time::timeout(GRACE, wind_down).await;
        serving.abort();
        // It ends at its next pause; a panic in it is reported where it happened.
        let _ = background.await;
        match served {
            Ok(Ok(())) => Ok(()),
            Ok(Err(panic)) => Err(Error::Serve(io::Error::other(panic))),
            // Streams and commands that outlast the grace are cut; their processes live on in their capsules.
            Err(_) => Ok(()),
        }
    }
}
