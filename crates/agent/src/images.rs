//! Images in the object store. What is uploaded is without what the image under its disk has, so that image goes there too,
//! once, and who takes what was uploaded takes the image first, if it has another.
//!
//! An image is uploaded after what needs it, and only then is that uploaded: whoever removes images that nothing needs
//! ([`objects::Objects::collect_unneeded`]) sees first what needs this one.

use std::fs::{self, File};
use std::io;

use objects::{Chunk, Manifest, Objects, Source};
use tracing::info;

use crate::audit;
use crate::capsule::files;
use crate::capsule::remote::{self, Error};
use crate::host::{Host, blocking};
use crate::templates;

/// The directory of images' uploads.
pub const DIRECTORY: &str = "images";
/// What an image is called in its own upload.
const IMAGE: &str = "image";

/// What an image's upload is called.
fn name(file: &str) -> String {
    format!("{DIRECTORY}/{file}")
}

/// The uploads that an upload needs: that of its image. `None` where it needs one and does not say which.
pub fn needed(manifest: &Manifest) -> Option<Vec<String>> {
    if is_over_image(manifest) { under(manifest).map(|file| vec![name(&file)]) } else { Some(Vec::new()) }
}

/// The file name of the image under a disk of the upload, if that is needed.
pub fn under(manifest: &Manifest) -> Option<String> {
    let image = remote::image(manifest).or_else(|| templates::remote::image(manifest));
    image.filter(|_| is_over_image(manifest))
}

fn is_over_image(manifest: &Manifest) -> bool {
    manifest.files.iter().any(|file| file.chunks.contains(&Chunk::Base))
}

/// Sees to it that the object store has the image of that file name. False where neither it nor this host has it.
pub async fn upload(host: &Host, objects: &Objects, file: &str) -> Result<bool, Error> {
    // Many may need the same at the same time.
    let _one_at_a_time = host.image_turn.lock().await;
    if find(objects, file).await?.is_some() {
        return Ok(true);
    }
    let source = match File::open(host.image_file(file)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        source => source.map_err(Error::Read)?,
    };
    let source = Source { name: IMAGE.into(), file: source, base: None, is_named_by_content: true };
    let sent = objects.upload(&name(file), Vec::new(), vec![source]).await.map_err(Error::Objects)?;
    info!(image = file, chunks = sent.chunks, bytes = sent.bytes, "uploaded");
    Ok(true)
}

/// Sees to it that the image of that file name is here. It is durable, and what its name says, or it is not there.
pub async fn fetch(host: &Host, objects: &Objects, file: &str) -> Result<(), Error> {
    let _one_at_a_time = host.image_turn.lock().await;
    let unacceptable = || Error::Damaged("its image has a name that is not acceptable");
    // It comes from elsewhere, and becomes a path.
    let (image, digest) = audit::image_name(file).ok_or_else(unacceptable)?;
    if host.image_file(file).exists() {
        return Ok(());
    }
    let manifest = find(objects, file).await?.ok_or_else(|| Error::NoImage(file.to_owned()))?;
    let entry = manifest.file(IMAGE).ok_or(Error::Damaged("a file is not in it"))?;
    let passing = host.passing();
    fs::create_dir(&passing).map_err(Error::Keep)?;
    let fetched = async {
        let path = passing.join(files::DISK);
        let new = File::options().read(true).write(true).create_new(true).open(&path).map_err(Error::Keep)?;
        objects.download(entry, new).await.map_err(Error::Objects)?;
        let (disks, image) = (host.disks.clone(), image.parse().map_err(|_| unacceptable())?);
        let digest = digest.to_owned();
        blocking(move || disks.import_known_image(&path, &image, &digest)).await.map_err(Error::Disk)
    };
    let fetched = fetched.await;
    if let Err(left) = fs::remove_dir_all(&passing) {
        tracing::warn!(dir = %passing.display(), error = %left, "left behind by an image that was fetched");
    }
    info!(image = %fetched?.display(), "took an image from the object store");
    Ok(())
}

/// The image's manifest. One that cannot be read is none: an upload replaces it.
async fn find(objects: &Objects, file: &str) -> Result<Option<Manifest>, Error> {
    match objects.manifest(&name(file)).await {
        Err(objects::Error::Manifest { .. }) => Ok(None),
        manifest => manifest.map_err(Error::Objects),
    }
}
