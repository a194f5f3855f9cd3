//! What the transfer of a file is asked for with: an address, lines of headers, and after an empty line a body.
#![no_main]

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use envd::files::form::Form;
use envd::files::http::Params;
use envd::files::negotiate::{self, Part};
use envd::files::signature::Operation;
use envd::files::upload;
use envd::settings::Settings;
use futures::{FutureExt, StreamExt};
use headers::{HeaderMap, HeaderName, HeaderValue};
use libfuzzer_sys::fuzz_target;

/// The files of a form that comes in pieces of this size, or `None` if it is none.
fn files(content_type: &str, body: &[u8], piece: usize) -> Option<Vec<(Option<String>, Vec<u8>)>> {
    let pieces: Vec<_> = body.chunks(piece).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    let read = async {
        let mut form = Form::new(content_type, futures::stream::iter(pieces).boxed()).ok()?;
        let mut files = Vec::new();
        while let Some(mut file) = form.next().await.ok()? {
            let mut contents = Vec::new();
            while let Some(bytes) = file.contents.next().await {
                contents.extend(bytes.ok()?);
            }
            files.push((file.name, contents));
        }
        Some(files)
    };
    read.now_or_never().expect("all pieces are there")
}

/// The first line, the headers of those up to an empty one, and the rest.
fn request(bytes: &[u8]) -> (&[u8], HeaderMap, &[u8]) {
    let mut lines = bytes.split_inclusive(|byte| *byte == b'\n');
    let address = lines.next().unwrap_or_default();
    let (mut headers, mut rest) = (HeaderMap::new(), address.len());
    for line in lines {
        rest += line.len();
        let line = line.trim_ascii_end();
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { break };
        let name = HeaderName::from_bytes(&line[..colon]);
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(line[colon + 1..].trim_ascii_start())) {
            headers.append(name, value);
        }
    }
    (address.trim_ascii_end(), headers, &bytes[rest..])
}

fuzz_target!(|bytes: &[u8]| {
    let (address, headers, body) = request(bytes);
    let size = body.len() as u64;

    for packed in [false, true] {
        let _ = negotiate::encoding(&headers, packed);
    }
    let etag = "\"1-2-3.4\"".parse().expect("a tag");
    let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
    if let Part::Range { start, length } = negotiate::part(&headers, &etag, modified, size) {
        assert!(length > 0 && start.checked_add(length).is_some_and(|end| end <= size));
    }
    if let Ok(metadata) = upload::metadata(&headers) {
        assert!(metadata.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>() <= 4096);
        assert!(metadata.iter().all(|(key, value)| !key.is_empty() && value.is_ascii()));
    }

    let settings = Settings::default();
    settings.apply(guest_api::Init { access_token: Some("secret".to_owned()), ..Default::default() });
    if let Ok(address) = address.try_into() {
        for operation in [Operation::Read, Operation::Write] {
            if let Ok(params) = Params::of(&address, &headers, &settings, operation) {
                let token = headers.get(guest_api::ACCESS_TOKEN_HEADER).is_some_and(|token| token == "secret");
                assert!(token || params.signature.is_some_and(|signature| signature.starts_with("v1_")));
            }
        }
    }

    let piece = address.len().max(1);
    let content_type = headers.get("content-type").and_then(|value| value.to_str().ok()).unwrap_or_default();
    assert_eq!(files(content_type, body, piece), files(content_type, body, usize::MAX));
    // Whatever a file holds comes out as it went in, but for what would end it.
    if !body.windows(5).any(|bytes| bytes == b"\r\n--b") {
        let head = b"--b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"n\"\r\n\r\n";
        let form = [head, body, b"\r\n--b--\r\n"].concat();
        let file = (Some("n".to_owned()), body.to_owned());
        assert_eq!(files("multipart/form-data; boundary=b", &form, piece), Some(vec![file]));
    }
});
