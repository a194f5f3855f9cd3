//! `POST /files`: files of a form, or one file as it is, to their places.

use super::form::{Contents, Form};
use super::incoming::Incoming;
use super::place::{Owner, Target};
use super::write::{Batch, Replacement, whole};
use super::{Error, blocking, encoding};
use futures::StreamExt;
use guest_api::{FileType, WrittenFile};
use http::HeaderMap;
use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const METADATA_HEADER: &str = "x-metadata-";
/// The longest key and all keys and values together; bytes. What ext4 keeps beside a file of ours.
const METADATA_KEY: usize = 246;
const METADATA_TOTAL: usize = 4096;

/// Takes in the whole body, and says what was written.
pub(super) async fn receive(
    headers: &HeaderMap,
    owner: &Owner,
    path: Option<&str>,
    incoming: &mut Incoming,
) -> Result<Vec<WrittenFile>, Error> {
    let metadata = metadata(headers)?;
    let contents: Contents<'_> = match header(headers, CONTENT_ENCODING).unwrap_or("identity") {
        plain if plain.eq_ignore_ascii_case("identity") => Box::pin(incoming),
        gzip if gzip.eq_ignore_ascii_case("gzip") => Box::pin(encoding::unpacked(incoming)),
        other => return Err(Error::ContentEncoding(other.to_owned())),
    };
    let content_type = header(headers, CONTENT_TYPE).unwrap_or_default();
    let essence = content_type.split(';').next().unwrap_or_default().trim();
    let mut files = Files { owner, metadata, written: Vec::new(), taken: Vec::new() };
    if essence.eq_ignore_ascii_case("application/octet-stream") {
        files.take(path.ok_or(Error::NoPath)?, contents).await?;
    } else if essence.eq_ignore_ascii_case("multipart/form-data") {
        let mut form = Form::new(content_type, contents)?;
        while let Some(file) = form.next().await? {
            files.take(path.or(file.name.as_deref()).ok_or(Error::NoFileName)?, file.contents).await?;
        }
        if files.written.is_empty() {
            return Err(Error::NoFile);
        }
    } else {
        return Err(Error::ContentType);
    }
    Ok(files.written)
}

fn header(headers: &HeaderMap, name: http::HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok()).map(str::trim)
}

/// The files of one request.
struct Files<'a> {
    owner: &'a Owner,
    metadata: BTreeMap<String, String>,
    written: Vec<WrittenFile>,
    /// Where they are.
    taken: Vec<PathBuf>,
}

impl Files<'_> {
    /// Takes in one file.
    async fn take(&mut self, given: &str, mut contents: Contents<'_>) -> Result<(), Error> {
        let path = self.owner.path(given)?;
        let ids = self.owner.ids();
        let target = {
            let path = path.clone();
            blocking(move || Target::find(&path, ids)).await?
        };
        if self.taken.contains(&target.path) {
            return Err(Error::Duplicate(path));
        }
        let place = target.path.clone();
        let batch = next(&mut contents, Batch::default()).await?;
        let metadata = self.metadata.clone();
        if batch.is_full() {
            let mut file = blocking(move || Replacement::open(&target)).await?;
            let (mut batch, mut written) = (batch, Batch::default());
            loop {
                let is_last = !batch.is_full();
                let writing = tokio::task::spawn_blocking(move || file.write(&batch).map(|()| (file, batch)));
                // The next batch comes in while this one goes to the disk.
                let following = if is_last { Ok(Batch::default()) } else { next(&mut contents, written).await };
                (file, written) = match writing.await {
                    Ok(written) => written?,
                    Err(failure) => std::panic::resume_unwind(failure.into_panic()),
                };
                batch = following?;
                if is_last {
                    break;
                }
            }
            blocking(move || file.commit(&metadata)).await?;
        } else {
            blocking(move || whole(&target, &batch, &metadata)).await?;
        }
        self.taken.push(place);
        self.written.push(written(&path, Some(self.metadata.clone())));
        Ok(())
    }
}

/// What comes next, in place of what is in `batch`; full unless it is the last.
async fn next(contents: &mut Contents<'_>, mut batch: Batch) -> Result<Batch, Error> {
    batch.clear();
    while !batch.is_full() {
        match contents.next().await {
            Some(bytes) => batch.push(&bytes?),
            None => break,
        }
    }
    Ok(batch)
}

/// What a client is told of a file that was written.
pub fn written(path: &Path, metadata: Option<BTreeMap<String, String>>) -> WrittenFile {
    WrittenFile {
        path: path.to_string_lossy().into_owned(),
        name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        kind: FileType::File,
        metadata: metadata.filter(|metadata| !metadata.is_empty()),
    }
}

/// What the headers say about the files.
pub fn metadata(headers: &HeaderMap) -> Result<BTreeMap<String, String>, Error> {
    let mut metadata = BTreeMap::new();
    let mut total = 0;
    for (name, value) in headers {
        // Names come in lower case whatever the client wrote.
        let Some(key) = name.as_str().strip_prefix(METADATA_HEADER) else { continue };
        let refuse = |why| Err(Error::Metadata(name.to_string(), why));
        if key.is_empty() || key.len() > METADATA_KEY {
            return refuse("a key has 1 to 246 bytes");
        }
        let Some(value) = value.to_str().ok().filter(|value| value.bytes().all(|byte| matches!(byte, b' '..=b'~')))
        else {
            return refuse("a value is printable ASCII");
        };
        total += key.len() + value.len();
        if total > METADATA_TOTAL {
            return refuse("keys and values together have at most 4096 bytes");
        }
        if metadata.insert(key.to_owned(), value.to_owned()).is_some() {
            return refuse("a key is given once");
        }
    }
    Ok(metadata)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderName, HeaderValue};

    fn of(pairs: &[(&str, &[u8])]) -> Result<BTreeMap<String, String>, String> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name.parse::<HeaderName>().unwrap(), HeaderValue::from_bytes(value).unwrap());
        }
        metadata(&headers).map_err(|error| error.to_string())
    }

    #[test]
    fn metadata_has_limits() {
        let two = of(&[("X-Metadata-Author", b"me"), ("x-metadata-empty", b""), ("x-other", b"x")]).unwrap();
        assert_eq!(two, [("author".to_owned(), "me".to_owned()), ("empty".to_owned(), String::new())].into());
        let key = |length: usize| format!("x-metadata-{}", "k".repeat(length));
        assert_eq!(of(&[(&key(246), &[b'v'; 4096 - 246])]).unwrap().len(), 1);
        for bad in [
            (key(0).as_str(), &b"v"[..]),
            (&key(247), b"v"),
            (&key(1), &[b'v'; 4096]),
            (&key(1), "ü".as_bytes()),
            (&key(1), b"a\tb"),
        ] {
            assert!(of(&[bad]).is_err(), "{bad:?}");
        }
        assert!(of(&[(&key(1), &[b'v'; 3000]), (&key(2), &[b'v'; 3000])]).is_err());
        assert!(of(&[(&key(1), b"1"), (&key(1), b"2")]).is_err());
    }
}
