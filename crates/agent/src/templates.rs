//! Templates that came of capsules: points with a name, kept until they are deleted.

pub mod remote;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use disk::ImageName;
use tokio::task::JoinSet;

use crate::Agent;
use crate::capsule::{Handle, Refused};
use crate::host::Host;
use crate::point::{self, Meta, Point};

/// The templates of a host.
pub struct Templates {
    /// `None` while one of that name is being made.
    points: Mutex<BTreeMap<String, Option<Arc<Point>>>>,
    /// Held by who takes one from the object store.
    fetching: tokio::sync::Mutex<()>,
    /// What puts them there.
    uploads: Mutex<JoinSet<()>>,
}

/// Why there is no point of a capsule.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// A directory for it could not be made.
    #[error("making a directory for the snapshot")]
    Dir(#[source] io::Error),
    /// The capsule could not be captured.
    #[error("taking the snapshot")]
    Refused(#[source] Refused),
}

/// Why a template was not made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a name.
    #[error("name: {0}")]
    Name(#[source] disk::InvalidName),
    /// There is one.
    #[error("there is an image or template `{0}` on this host")]
    Exists(String),
    /// The capsule could not be captured.
    #[error("capturing the capsule")]
    Capture(#[source] CaptureError),
    /// It could not be made durable.
    #[error("keeping the template")]
    Keep(#[source] io::Error),
}

impl Templates {
    /// Those of an earlier run.
    pub fn open(host: &Host) -> io::Result<Self> {
        let points = point::open_all(&host.memory, &host.templates())?;
        let name = |dir: String| dir.split_once('@').map_or(dir.clone(), |(name, _)| name.to_owned());
        let points = points.into_iter().map(|(dir, point)| (name(dir), Some(point))).collect();
        Ok(Self { points: Mutex::new(points), fetching: tokio::sync::Mutex::default(), uploads: Mutex::default() })
    }

    /// The template of that name.
    pub fn get(&self, name: &str) -> Option<Arc<Point>> {
        self.lock().get(name).cloned().flatten()
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<(String, Meta)> {
        let points = self.lock();
        points.iter().filter_map(|(name, point)| Some((name.clone(), point.as_ref()?.meta.clone()))).collect()
    }

    fn all(&self) -> Vec<(String, Arc<Point>)> {
        self.lock().iter().filter_map(|(name, point)| Some((name.clone(), point.clone()?))).collect()
    }

    fn spawn(&self, upload: impl Future<Output = ()> + Send + 'static) {
        self.uploads.lock().unwrap_or_else(PoisonError::into_inner).spawn(upload);
    }

    /// Breaks off what is being uploaded; the next agent does it.
    pub async fn stop(&self) {
        let mut uploads = std::mem::take(&mut *self.uploads.lock().unwrap_or_else(PoisonError::into_inner));
        uploads.shutdown().await;
    }

    /// Forgets a template. What is beginning from it goes on to do so.
    pub fn delete(&self, name: &str) {
        let mut points = self.lock();
        if let Some(Some(point)) = points.get(name) {
            point.doom();
            points.remove(name);
        }
    }

    /// Takes a name, unless it is taken.
    fn claim(&self, name: &str) -> bool {
        let mut points = self.lock();
        if points.contains_key(name) {
            return false;
        }
        points.insert(name.to_owned(), None);
        true
    }

    fn settle(&self, name: &str, point: Option<Arc<Point>>) {
        let mut points = self.lock();
        match point {
            Some(point) => drop(points.insert(name.to_owned(), Some(point))),
            None => drop(points.remove(name)),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Option<Arc<Point>>>> {
        self.points.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    /// The template of that name.
    pub(crate) fn template(&self, name: &str) -> Option<Arc<Point>> {
        self.templates.get(name)
    }

    /// All templates, by name.
    pub(crate) fn templates(&self) -> Vec<(String, Meta)> {
        self.templates.list()
    }

    /// Forgets a template.
    pub(crate) fn forget_template(&self, name: &str) {
        self.templates.delete(name);
    }

    /// Keeps what `capsule` is now as the template `name`. The work goes on if the caller leaves.
    pub(crate) async fn make_template(&self, capsule: Handle, name: String) -> Result<Meta, Error> {
        let _: ImageName = name.parse().map_err(Error::Name)?;
        if self.has_image(&name) || !self.templates.claim(&name) {
            return Err(Error::Exists(name));
        }
        let agent = self.clone();
        let made = tokio::spawn(async move {
            let dir = agent.host.template_dir(&name);
            let made = agent.capture(&capsule, dir).await.map_err(Error::Capture);
            let kept = match made {
                Ok(point) => point.keep().await.map(|()| point).map_err(Error::Keep),
                Err(error) => Err(error),
            };
            agent.templates.settle(&name, kept.as_ref().ok().cloned());
            if let Ok(point) = &kept {
                agent.upload_template(name, point.clone());
            }
            kept.map(|point| point.meta.clone())
        });
        made.await.expect("the work does not panic, and nobody aborts it")
    }

    /// Writes what `capsule` is now into `dir`, which is made for it, as a point that nobody keeps yet.
    pub(crate) async fn capture(&self, capsule: &Handle, dir: PathBuf) -> Result<Arc<Point>, CaptureError> {
        std::fs::create_dir(&dir).map_err(CaptureError::Dir)?;
        match capsule.capture(dir.clone()).await {
            Ok((state, record)) => Ok(Point::made(&self.host.memory, dir, Meta::of(&record, state))),
            Err(refused) => {
                point::discard(&self.host.memory, &dir);
                Err(CaptureError::Refused(refused))
            }
        }
    }
}
