//! What a download is sent as: which encoding, which part, or nothing because the client has it already. Pure.

use headers::{
    ETag, HeaderMap, HeaderMapExt, IfMatch, IfModifiedSince, IfNoneMatch, IfRange, IfUnmodifiedSince, LastModified,
};
use http::header::{ACCEPT_ENCODING, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, RANGE};
use std::time::SystemTime;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Identity,
    Gzip,
}

/// What a request gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Whole,
    /// This many bytes from there on.
    Range {
        start: u64,
        length: u64,
    },
    /// No byte of the range is in the file.
    Unsatisfiable,
    NotModified,
    PreconditionFailed,
}

/// Which encoding the client would rather have, `None` if neither will do. Requests for a part or with a condition are about
/// the file as it is, and what is packed already gains nothing: they get identity if they allow it at all.
pub fn encoding(headers: &HeaderMap, is_packed: bool) -> Option<Encoding> {
    let conditions = [RANGE, IF_RANGE, IF_MATCH, IF_NONE_MATCH, IF_MODIFIED_SINCE, IF_UNMODIFIED_SINCE];
    let plainly = is_packed || conditions.iter().any(|name| headers.contains_key(name));
    let (mut gzip, mut identity, mut any) = (None, None, None);
    let values = headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    for element in values.flat_map(|value| value.split(',')) {
        let (coding, parameters) = element.split_once(';').unwrap_or((element, ""));
        let weight = weight(parameters);
        match coding.trim().to_ascii_lowercase().as_str() {
            "gzip" | "x-gzip" => gzip = Some(weight),
            "identity" => identity = Some(weight),
            "*" => any = Some(weight),
            _ => {}
        }
    }
    let gzip = gzip.or(any).unwrap_or(0.0);
    // Identity will do unless refused, but what is asked for by name goes before it.
    let allows_identity = identity.or(any) != Some(0.0);
    let identity = identity.or(any).unwrap_or(0.0);
    match (gzip > 0.0, allows_identity) {
        (true, true) if plainly || identity >= gzip => Some(Encoding::Identity),
        (true, _) => Some(Encoding::Gzip),
        (false, true) => Some(Encoding::Identity),
        (false, false) => None,
    }
}

/// The `q` among parameters; 1 when there is none, 0 when it makes no sense.
fn weight(parameters: &str) -> f32 {
    let mut pairs = parameters.split(';').filter_map(|pair| pair.split_once('='));
    let weight = pairs.find(|(name, _)| name.trim().eq_ignore_ascii_case("q"));
    weight.map_or(1.0, |(_, value)| value.trim().parse().ok().filter(|q| (0.0..=1.0).contains(q)).unwrap_or(0.0))
}

/// What part of a file of `length` bytes is asked for, in the order of RFC 9110, 13.2.2.
pub fn part(headers: &HeaderMap, etag: &ETag, modified: SystemTime, length: u64) -> Part {
    if let Some(condition) = headers.typed_get::<IfMatch>() {
        if !condition.precondition_passes(etag) {
            return Part::PreconditionFailed;
        }
    } else if let Some(condition) = headers.typed_get::<IfUnmodifiedSince>()
        && !condition.precondition_passes(modified)
    {
        return Part::PreconditionFailed;
    }
    if let Some(condition) = headers.typed_get::<IfNoneMatch>() {
        if !condition.precondition_passes(etag) {
            return Part::NotModified;
        }
    } else if let Some(condition) = headers.typed_get::<IfModifiedSince>()
        && !condition.is_modified(modified)
    {
        return Part::NotModified;
    }
    let changed = |condition: IfRange| condition.is_modified(Some(etag), Some(&LastModified::from(modified)));
    if headers.contains_key(IF_RANGE) && headers.typed_get::<IfRange>().is_none_or(changed) {
        return Part::Whole;
    }
    headers.get(RANGE).and_then(|value| range(value.to_str().ok()?, length)).unwrap_or(Part::Whole)
}

/// The one range in a header. Several, and what is none, may be answered with everything.
fn range(header: &str, length: u64) -> Option<Part> {
    let (unit, spec) = header.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (first, last) = spec.trim().split_once('-')?;
    let number = |text: &str| {
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        // Beyond what a number holds is beyond any file.
        is_number.then(|| text.parse::<u64>().unwrap_or(u64::MAX))
    };
    let (start, end) = match (first, last) {
        ("", last) => (length.saturating_sub(number(last)?), length),
        (first, "") => (number(first)?, length),
        (first, last) => {
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                return None;
            }
            (first, last.saturating_add(1).min(length))
        }
    };
    Some(if start < end { Part::Range { start, length: end - start } } else { Part::Unsatisfiable })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderName, HeaderValue};
    use std::time::Duration;

    fn map(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn encodings() {
        let of = |accept: &str| encoding(&map(&[(ACCEPT_ENCODING, accept)]), false);
        assert_eq!(encoding(&map(&[]), false), Some(Encoding::Identity));
        for accept in
            ["gzip", "GZIP", "x-gzip", "gzip, deflate, br, zstd", "br;q=1.0, gzip;q=0.1", "gzip;q=1, identity;q=0.5"]
        {
            assert_eq!(of(accept), Some(Encoding::Gzip), "{accept}");
        }
        for accept in ["gzip;q=0.5,*;q=0", "identity;q=0, *", "identity;q=0, gzip", " gzip ; Q=0.3 "] {
            assert_eq!(of(accept), Some(Encoding::Gzip), "{accept}");
        }
        for accept in [
            "",
            "br",
            "identity",
            "*",
            "gzip;q=0",
            "identity, gzip",
            "gzip;q=0.5, identity",
            "gzip;q=x",
            "*;q=0, identity",
        ] {
            assert_eq!(of(accept), Some(Encoding::Identity), "{accept}");
        }
        for accept in ["*;q=0", "identity;q=0", "br, identity;q=0.0", "gzip;q=0, *;q=0"] {
            assert_eq!(of(accept), None, "{accept}");
        }
    }

    #[test]
    fn parts_and_packed_files_are_sent_as_they_are() {
        let accept = (ACCEPT_ENCODING, "gzip");
        for name in [RANGE, IF_RANGE, IF_MATCH, IF_NONE_MATCH, IF_MODIFIED_SINCE, IF_UNMODIFIED_SINCE] {
            assert_eq!(encoding(&map(&[accept.clone(), (name, "x")]), false), Some(Encoding::Identity));
        }
        assert_eq!(encoding(&map(&[accept]), true), Some(Encoding::Identity));
        let only = (ACCEPT_ENCODING, "gzip, identity;q=0");
        assert_eq!(encoding(&map(&[only, (RANGE, "bytes=0-1")]), true), Some(Encoding::Gzip));
    }

    #[test]
    fn ranges() {
        let part = |start, length| Some(Part::Range { start, length });
        let of = |header| range(header, 10);
        assert_eq!([of("bytes=0-0"), of("bytes=2-4"), of("bytes=8-99")], [part(0, 1), part(2, 3), part(8, 2)]);
        assert_eq!(
            [of("bytes=3-"), of("bytes=-3"), of("bytes=-11"), of("Bytes= 9-")],
            [part(3, 7), part(7, 3), part(0, 10), part(9, 1)]
        );
        assert_eq!(of("bytes=0-99999999999999999999999"), part(0, 10));
        for nothing in ["bytes=10-", "bytes=10-11", "bytes=-0", "bytes=99999999999999999999999-"] {
            assert_eq!(of(nothing), Some(Part::Unsatisfiable), "{nothing}");
        }
        for ignored in [
            "bytes=",
            "bytes=-",
            "bytes=4-2",
            "bytes=+1-2",
            "bytes=0-1,3-4",
            "lines=0-1",
            "0-1",
            "bytes=a-b",
            "bytes=1",
        ] {
            assert_eq!(of(ignored), None, "{ignored}");
        }
        assert_eq!([range("bytes=0-", 0), range("bytes=-5", 0)], [Some(Part::Unsatisfiable); 2]);
    }

    #[test]
    fn conditions() {
        let etag: ETag = "\"a\"".parse().unwrap();
        let modified = SystemTime::UNIX_EPOCH + Duration::from_millis(784_111_777_900);
        let (same, older, newer) =
            ("Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:36 GMT", "Sun, 06 Nov 1994 08:49:38 GMT");
        let of = |pairs: &[(HeaderName, &str)]| part(&map(pairs), &etag, modified, 10);
        for (name, value, expected) in [
            (IF_NONE_MATCH, "\"a\"", Part::NotModified),
            (IF_NONE_MATCH, "W/\"a\"", Part::NotModified),
            (IF_NONE_MATCH, "\"b\", \"a\"", Part::NotModified),
            (IF_NONE_MATCH, "*", Part::NotModified),
            (IF_NONE_MATCH, "\"b\"", Part::Whole),
            (IF_MODIFIED_SINCE, same, Part::NotModified),
            (IF_MODIFIED_SINCE, newer, Part::NotModified),
            (IF_MODIFIED_SINCE, older, Part::Whole),
            (IF_MODIFIED_SINCE, "nonsense", Part::Whole),
            (IF_MATCH, "\"a\"", Part::Whole),
            (IF_MATCH, "W/\"a\"", Part::PreconditionFailed),
            (IF_MATCH, "\"b\"", Part::PreconditionFailed),
            (IF_UNMODIFIED_SINCE, same, Part::Whole),
            (IF_UNMODIFIED_SINCE, older, Part::PreconditionFailed),
        ] {
            assert_eq!(of(&[(name.clone(), value)]), expected, "{name}: {value}");
        }
        // The tag decides, not the date.
        assert_eq!(of(&[(IF_NONE_MATCH, "\"b\""), (IF_MODIFIED_SINCE, same)]), Part::Whole);
        let range = Part::Range { start: 0, length: 2 };
        for (condition, expected) in [
            ("\"a\"", range),
            ("\"b\"", Part::Whole),
            ("W/\"a\"", Part::Whole),
            (same, range),
            (older, Part::Whole),
            ("nonsense", Part::Whole),
        ] {
            assert_eq!(of(&[(RANGE, "bytes=0-1"), (IF_RANGE, condition)]), expected, "{condition}");
        }
    }
}
