//! `GET /files`: one file, or a part of it, on its way out.

use super::Error;
use super::encoding::Pack;
use super::negotiate::{self, Encoding, Part};
use super::place::open;
use axum::body::Body;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use headers::{AcceptRanges, ContentLength, ContentRange, ETag, HeaderMap, HeaderMapExt, LastModified};
use http::header::{CONTENT_DISPOSITION, CONTENT_ENCODING, CONTENT_TYPE, VARY};
use http::{HeaderValue, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::SystemTime;

/// How much is read at once.
const CHUNK: usize = 256 << 10;

/// What RFC 8187 lets stand as it is.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'!')
    .remove(b'#')
    .remove(b'$')
    .remove(b'&')
    .remove(b'+')
    .remove(b'-')
    .remove(b'.')
    .remove(b'^')
    .remove(b'_')
    .remove(b'`')
    .remove(b'|')
    .remove(b'~');

/// Types whose files are packed already, and some whose subtypes all are.
const PACKED: &[&str] = &[
    "application/gzip",
    "application/x-gzip",
    "application/zip",
    "application/x-7z-compressed",
    "application/x-bzip2",
    "application/x-xz",
    "application/zstd",
    "application/java-archive",
    "font/woff2",
    "image/jpeg",
    "image/png",
    "image/webp",
    "image/gif",
];

/// Answers with the file at `path`, or with its head alone. Reads the disk: what fits into one chunk is then in memory.
pub fn answer(path: &Path, request: &HeaderMap, head_only: bool) -> Result<Response, Error> {
    let (file, found) = open(path)?;
    let reading = || Error::io("reading", path);
    let kind = mime_guess::from_path(path).first_raw().unwrap_or("application/octet-stream");
    let packed = kind.starts_with("video/") || kind.starts_with("audio/") || PACKED.contains(&kind);
    let encoding = negotiate::encoding(request, packed).ok_or(Error::NotAcceptable)?;
    let modified = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    let etag = etag(&found, encoding);
    let part = match encoding {
        Encoding::Identity => negotiate::part(request, &etag, modified, found.len()),
        Encoding::Gzip => Part::Whole,
    };
    let (start, length) = match part {
        Part::Whole | Part::NotModified => (0, found.len()),
        Part::Range { start, length } => (start, length),
        Part::Unsatisfiable => return Err(Error::Range(found.len())),
        Part::PreconditionFailed => return Err(Error::Precondition),
    };

    let mut response = Response::default();
    let headers = response.headers_mut();
    headers.typed_insert(etag);
    headers.typed_insert(LastModified::from(modified));
    headers.insert(VARY, HeaderValue::from_static("accept-encoding"));
    if part == Part::NotModified {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        return Ok(response);
    }
    headers.typed_insert(AcceptRanges::bytes());
    // Most text is UTF-8, and a browser would think otherwise.
    let charset = if kind.starts_with("text/") { "; charset=utf-8" } else { "" };
    headers.insert(CONTENT_TYPE, value(format!("{kind}{charset}")));
    headers.insert(CONTENT_DISPOSITION, disposition(path));
    if encoding == Encoding::Gzip {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    }
    if let Part::Range { .. } = part {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let headers = response.headers_mut();
        headers.typed_insert(
            ContentRange::bytes(start..start + length, found.len()).map_err(|_| Error::Range(found.len()))?,
        );
    }
    if head_only {
        if encoding == Encoding::Identity {
            response.headers_mut().typed_insert(ContentLength(length));
        }
        return Ok(response);
    }

    // Files of /proc have no length until they are read.
    let left = (found.len() > 0).then_some(length);
    let mut source = Source::new(file, start, left, encoding);
    let first = source.next().map_err(reading())?.unwrap_or_default();
    if source.is_finished() {
        *response.body_mut() = Body::from(first);
    } else {
        if encoding == Encoding::Identity && left.is_some() {
            response.headers_mut().typed_insert(ContentLength(length));
        }
        *response.body_mut() = stream(first, source);
    }
    Ok(response)
}

/// Changes whenever the file may have. Weak for what we pack: that is the same file, not the same bytes.
fn etag(found: &Metadata, encoding: Encoding) -> ETag {
    let weak = if encoding == Encoding::Gzip { "W/" } else { "" };
    let (inode, size, seconds, nanos) = (found.ino(), found.size(), found.ctime(), found.ctime_nsec());
    let tag = format!("{weak}\"{inode:x}-{size:x}-{seconds:x}.{nanos:x}\"");
    tag.parse().expect("digits, points and hyphens in quotes are a tag")
}

/// `inline`, with the name for who wants to keep it: in ASCII, and whole (RFC 6266).
fn disposition(path: &Path) -> HeaderValue {
    let name = path.file_name().unwrap_or_default();
    let ascii: String = name.to_string_lossy().chars().map(|c| if is_quotable(c) { c } else { '_' }).collect();
    let mut text = format!("inline; filename=\"{ascii}\"");
    if ascii.as_bytes() != name.as_bytes() {
        text.push_str(&format!("; filename*=UTF-8''{}", percent_encode(name.as_bytes(), PLAIN)));
    }
    value(text)
}

fn is_quotable(character: char) -> bool {
    matches!(character, ' '..='~') && !matches!(character, '"' | '\\' | '%')
}

fn value(text: String) -> HeaderValue {
    HeaderValue::try_from(text).expect("printable ASCII is a header value")
}

/// `first`, then what the source still has. While a chunk is on its way out the next one is read.
fn stream(first: Bytes, source: Source) -> Body {
    let step = |mut source: Source| tokio::task::spawn_blocking(move || (source.next(), source));
    let rest = futures::stream::try_unfold(step(source), move |reading| async move {
        let (next, source) = match reading.await {
            Ok(done) => done,
            Err(failure) => std::panic::resume_unwind(failure.into_panic()),
        };
        let next: Option<Bytes> = next?;
        Ok::<_, io::Error>(next.map(|bytes| (bytes, step(source))))
    });
    let first = futures::stream::once(std::future::ready(Ok(first)));
    Body::from_stream(futures::StreamExt::chain(first, rest))
}

/// The bytes of a response, chunk by chunk.
struct Source {
    reader: Reader,
    /// Taken once everything is packed.
    pack: Option<Pack>,
    encoding: Encoding,
}

impl Source {
    fn new(file: File, offset: u64, left: Option<u64>, encoding: Encoding) -> Source {
        let reader = Reader { file, offset, left, ended: left == Some(0), buffers: Default::default() };
        Source { reader, pack: (encoding == Encoding::Gzip).then(Pack::new), encoding }
    }

    fn is_finished(&self) -> bool {
        self.reader.ended && self.pack.is_none()
    }

    fn next(&mut self) -> io::Result<Option<Bytes>> {
        if self.encoding == Encoding::Identity {
            return self.reader.next();
        }
        while let Some(mut pack) = self.pack.take() {
            match self.reader.next()? {
                None => return pack.finish().map(Some),
                Some(bytes) => {
                    pack.write(&bytes)?;
                    let packed = pack.take();
                    self.pack = Some(pack);
                    if packed.is_some() {
                        return Ok(packed);
                    }
                }
            }
        }
        Ok(None)
    }
}

/// Reads a file from `offset` on.
struct Reader {
    file: File,
    offset: u64,
    /// How many bytes there must still be; `None`: however many there are.
    left: Option<u64>,
    ended: bool,
    /// Used in turn: one is on its way out while the next is filled, and then free again.
    buffers: [BytesMut; 3],
}

impl Reader {
    fn next(&mut self) -> io::Result<Option<Bytes>> {
        if self.ended {
            return Ok(None);
        }
        let wanted = self.left.map_or(CHUNK, |left| usize::try_from(left).unwrap_or(CHUNK).min(CHUNK));
        self.buffers.rotate_left(1);
        let [buffer, ..] = &mut self.buffers;
        buffer.resize(wanted, 0);
        let count = read_full_at(&self.file, buffer, self.offset)?;
        let bytes = buffer.split_to(count).freeze();
        buffer.clear();
        self.offset += count as u64;
        match &mut self.left {
            Some(_) if count < wanted => {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter while it was sent"));
            }
            Some(left) => {
                *left -= count as u64;
                self.ended = *left == 0;
            }
            None => self.ended = count < wanted,
        }
        Ok(Some(bytes).filter(|bytes| !bytes.is_empty()))
    }
}

/// Reads until the buffer is full or the file ends.
pub fn read_full_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn names_are_quoted() {
        let of = |name: &[u8]| disposition(Path::new(OsStr::from_bytes(name))).to_str().unwrap().to_owned();
        assert_eq!(of(b"/a/b c.txt"), "inline; filename=\"b c.txt\"");
        assert_eq!(of("/ü.txt".as_bytes()), "inline; filename=\"_.txt\"; filename*=UTF-8''%C3%BC.txt");
        assert_eq!(of(b"/a\"\\%\n"), "inline; filename=\"a____\"; filename*=UTF-8''a%22%5C%25%0A");
        assert_eq!(of(b"/\xff'*"), "inline; filename=\"_'*\"; filename*=UTF-8''%FF%27%2A");
    }

    #[test]
    fn a_file_is_read_to_its_end_and_no_further() {
        let file = tempfile::tempfile().unwrap();
        let contents: Vec<u8> = (0..CHUNK * 4 + 7).map(|number| (number % 251) as u8).collect();
        file.write_all_at(&contents, 0).unwrap();
        let all = |offset: u64, left: Option<u64>| {
            let source = Source::new(file.try_clone().unwrap(), offset, left, Encoding::Identity);
            let mut reader = source.reader;
            let mut all = Vec::new();
            while let Some(bytes) = reader.next()? {
                all.extend_from_slice(&bytes);
            }
            Ok::<_, io::Error>(all)
        };
        assert!(all(0, None).unwrap() == contents);
        assert!(all(3, Some(CHUNK as u64 * 4)).unwrap() == contents[3..CHUNK * 4 + 3]);
        assert!(all(0, Some(0)).unwrap().is_empty());
        assert_eq!(all(8, Some(CHUNK as u64 * 4)).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
