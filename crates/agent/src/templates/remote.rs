//! Templates in the object store: each is uploaded once, and a host that is asked for one that it has not takes it from there,
//! whole.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use objects::{Manifest, Objects};
use tracing::{info, warn};

use crate::Agent;
use crate::capsule::files;
use crate::capsule::remote::{self, Error};
use crate::host::{Host, blocking};
use crate::images;
use crate::point::{self, Meta, Point};

/// In the directory of a template that an object store has: which one.
pub const UPLOADED: &str = "uploaded";
/// After an upload that failed, the next try comes this much later.
const PAUSE: Duration = Duration::from_secs(60);

/// What a template's upload is called.
pub fn name(template: &str) -> String {
    format!("templates/{template}")
}

impl Agent {
    /// Uploads every template that the object store has not.
    pub(crate) fn upload_templates(&self) {
        for (name, point) in self.templates.all() {
            self.upload_template(name, point);
        }
    }

    /// Uploads a template in the background, unless that was done or is not wanted.
    pub(crate) fn upload_template(&self, name: String, point: Arc<Point>) {
        let Some(objects) = self.host.objects.clone() else { return };
        self.host.drop_note(&self::name(&name));
        if fs::read(point.dir.join(UPLOADED)).ok() == self.host.store().map(String::into_bytes) {
            return;
        }
        let host = self.host.clone();
        self.templates.spawn(async move {
            loop {
                let done = match upload(&host, &objects, &name, &point).await {
                    // It may have come after it was forgotten, even if that was not seen.
                    _ if point.is_doomed() => host.forget_upload(&self::name(&name)).await.map_err(Error::Keep),
                    uploaded => uploaded,
                };
                let Err(error) = done else { return };
                warn!(template = name, error = crate::chain(&error), "the upload failed; it is tried again");
                tokio::time::sleep(PAUSE).await;
            }
        });
    }

    /// The template of that name, from the object store if it is only there.
    pub(crate) async fn find_template(&self, name: &str) -> Result<Option<Arc<Point>>, Error> {
        if let Some(point) = self.template(name) {
            return Ok(Some(point));
        }
        if self.host.objects.is_none() || self.has_image(name) {
            return Ok(None);
        }
        let (agent, name) = (self.clone(), name.to_owned());
        let found = tokio::spawn(async move {
            // Who comes second finds what the first has brought.
            let _one_at_a_time = agent.templates.fetching.lock().await;
            if let Some(point) = agent.template(&name) {
                return Ok(Some(point));
            }
            let Some(point) = adopt(&agent.host, &name).await? else { return Ok(None) };
            agent.templates.settle(&name, Some(point.clone()));
            Ok(Some(point))
        });
        found.await.expect("the work does not panic, and nobody aborts it")
    }
}

async fn upload(host: &Host, objects: &Objects, template: &str, point: &Point) -> Result<(), Error> {
    let _turn = host.uploads.acquire().await;
    let header = point.dir.join(files::MEMORY);
    let held = host.memory.hold(&header).map_err(Error::Store)?;
    let sources = remote::sources(host, &point.dir, header, files::STATE, point.meta.image.as_deref()).await?;
    let description = serde_json::to_vec(&point.meta).expect("a point's data has only JSON types");
    let name = name(template);
    let sent = objects.upload(&name, description, sources).await.map_err(Error::Objects)?;
    drop(held);
    if let Some(image) = &point.meta.image {
        images::upload(host, objects, image).await?;
    }
    info!(template, chunks = sent.chunks, bytes = sent.bytes, "uploaded");
    fs::write(point.dir.join(UPLOADED), host.store().unwrap_or_default()).map_err(Error::Keep)
}

/// The file name of the image under the disk of an upload, if that is a template's.
pub fn image(manifest: &Manifest) -> Option<String> {
    serde_json::from_slice::<Meta>(&manifest.description).ok()?.image
}

/// Makes a template of the object store one of this host; `None` where there is none.
async fn adopt(host: &Arc<Host>, template: &str) -> Result<Option<Arc<Point>>, Error> {
    let objects = host.objects.clone().ok_or(Error::NoObjects)?;
    let name = name(template);
    let manifest = match objects.manifest(&name).await {
        // It is in nobody's store.
        Err(objects::Error::Name(_)) => None,
        manifest => manifest.map_err(Error::Objects)?,
    };
    let Some(manifest) = manifest else { return Ok(None) };
    let meta: Meta =
        serde_json::from_slice(&manifest.description).map_err(|_| Error::Damaged("its data cannot be read"))?;
    let dir = host.template_dir(template);
    fs::create_dir(&dir).map_err(Error::Keep)?;
    let adopted = async {
        let remote = dir.join(files::REMOTE);
        let missing =
            remote::place(host, &objects, &dir, files::STATE, &meta.state, meta.image.as_deref(), &manifest).await?;
        for entry in &missing {
            let path = remote.join(&entry.name);
            let file = fs::File::options().read(true).write(true).create_new(true).open(path).map_err(Error::Keep)?;
            objects.download(entry, file).await.map_err(Error::Objects)?;
        }
        let (memory, header) = (host.memory.clone(), dir.join(files::MEMORY));
        let from = remote.clone();
        let take = move || memory.adopt(&from.join(files::MEMORY), &from, &header);
        blocking(take).await.map_err(Error::Store)?;
        fs::remove_dir_all(&remote).map_err(Error::Keep)?;
        fs::write(dir.join(UPLOADED), host.store().unwrap_or_default()).map_err(Error::Keep)?;
        let point = Point::made(&host.memory, dir.clone(), meta);
        point.keep().await.map_err(Error::Keep)?;
        Ok(point)
    };
    match adopted.await {
        Ok(point) => {
            info!(template, "took a template from the object store");
            Ok(Some(point))
        }
        Err(error) => {
            point::discard(&host.memory, &dir);
            Err(error)
        }
    }
}
