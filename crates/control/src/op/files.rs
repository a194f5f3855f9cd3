//! Files in a capsule, as its root sees them: what they are goes over envd's RPCs, what is in them over its plain HTTP.
//!
//! Contents pass through as they come, in either direction: nothing here holds a file.

use agent_api::GuestFiles;
use api::{FileEntry, FileKind};
use connectrpc::client::{CallOptions, ClientBody, full_body};
use connectrpc::{ConnectError, ErrorCode as Code};
use guest_api::filesystem::{EntryInfo, FileType, ListDirRequest, MakeDirRequest, RemoveRequest, StatRequest};
use hyper::body::Incoming;
use hyper::{Request, Response};

use super::Error;
use super::guest::Guest;

/// Bytes of one listing on its way here, and as it lies in memory.
const LISTING_BYTES: usize = 256 << 20;

/// For what a guest may have many of: envd's own limit counts.
pub fn large(options: CallOptions) -> CallOptions {
    options.with_max_message_size(LISTING_BYTES).with_element_memory_limit(LISTING_BYTES)
}

/// What is in a directory, `depth` levels deep. Anything else than a directory is not there.
pub async fn list(guest: &Guest, path: String, depth: u32) -> Result<Vec<FileEntry>, Error> {
    let files = guest.files();
    let request = ListDirRequest { path: path.clone(), depth, ..Default::default() };
    let options = large(CallOptions::default());
    match files.list_dir_with_options(request, options).await {
        Ok(listed) => Ok(listed.into_owned().entries.into_iter().map(entry).collect()),
        Err(error) if error.code == Code::InvalidArgument && is_something(&files, &path).await => {
            Err(Error::NoDirectory(path))
        }
        Err(error) => Err(failed(guest, error, &path)),
    }
}

/// Whether there is anything at the path.
async fn is_something(files: &GuestFiles, path: &str) -> bool {
    files.stat(StatRequest { path: path.into(), ..Default::default() }).await.is_ok()
}

/// Makes a directory and its parents.
pub async fn make_directory(guest: &Guest, path: String) -> Result<FileEntry, Error> {
    let request = MakeDirRequest { path: path.clone(), ..Default::default() };
    let made = guest.files().make_dir(request).await.map_err(|error| failed(guest, error, &path))?.into_owned();
    made.entry.into_option().map(entry).ok_or(Error::GuestAnswer("no entry of the directory it made"))
}

/// Removes what is at the path, with everything inside.
pub async fn remove(guest: &Guest, path: String) -> Result<(), Error> {
    let request = RemoveRequest { path: path.clone(), must_exist: true, ..Default::default() };
    let removed = guest.files().remove(request).await;
    removed.map(drop).map_err(|error| failed(guest, error, &path))
}

/// What is in a file: an answer whose body comes as the guest reads it.
pub async fn read(guest: &Guest, path: &str) -> Result<Response<Incoming>, Error> {
    let request = Request::get(target(path)).body(full_body(Default::default())).expect("the path is encoded");
    guest.send(request).await.map_err(|error| meant(error, path))
}

/// Puts what the body carries into a file, in place of what was there. Parents are made. A body that breaks off leaves
/// nothing under the file's name.
pub async fn write(guest: &Guest, path: &str, body: ClientBody) -> Result<(), Error> {
    let request = Request::post(target(path)).header("content-type", "application/octet-stream").body(body);
    let written = guest.send(request.expect("the path is encoded")).await;
    written.map(drop).map_err(|error| meant(error, path))
}

fn target(path: &str) -> String {
    let query = form_urlencoded::Serializer::new(String::new()).append_pair("path", path).finish();
    format!("/files?{query}")
}

/// Why the guest did not do what an RPC asked.
fn failed(guest: &Guest, error: ConnectError, path: &str) -> Error {
    meant(guest.failed(error), path)
}

/// What an error of the guest's means for a file.
fn meant(error: Error, path: &str) -> Error {
    let Error::Guest(error) = error else { return error };
    match error.code {
        Code::NotFound => Error::NoFile(path.into()),
        Code::AlreadyExists => Error::Occupied(path.into()),
        Code::InvalidArgument | Code::FailedPrecondition | Code::PermissionDenied => {
            Error::Refused(format!("path `{path}`: {}", error.message.as_deref().unwrap_or("the guest refuses it")))
        }
        // Limits of the guest's own have the same code.
        Code::ResourceExhausted if error.message.as_deref().is_some_and(|text| text.contains("space left")) => {
            Error::DiskFull
        }
        Code::ResourceExhausted => Error::LongListing,
        _ => Error::Guest(error),
    }
}

fn entry(info: EntryInfo) -> FileEntry {
    let kind = match info.r#type.as_known() {
        Some(FileType::FILE_TYPE_DIRECTORY) => FileKind::Directory,
        Some(FileType::FILE_TYPE_SYMLINK) => FileKind::Symlink,
        Some(FileType::FILE_TYPE_FILE) => FileKind::File,
        // A link to nowhere, or one of the things that clients have no word for.
        Some(FileType::FILE_TYPE_UNSPECIFIED) | None if info.symlink_target.is_some() => FileKind::Symlink,
        Some(FileType::FILE_TYPE_UNSPECIFIED) | None => FileKind::File,
    };
    FileEntry {
        name: info.name,
        path: info.path,
        kind,
        size: info.size,
        mode: info.mode,
        permissions: info.permissions,
        owner: info.owner,
        group: info.group,
        modified_at: info.modified_time.into_option().map_or(0, |time| time.seconds),
        symlink_target: info.symlink_target,
    }
}
