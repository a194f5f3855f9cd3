//! What is the platform's and not a guest's: keys and tokens on the way in, cookies on the way out.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};
use http::HeaderMap;
use http::header::{AUTHORIZATION, COOKIE, HeaderName, HeaderValue, SET_COOKIE};

/// Headers that are ours whatever is in them, and how others begin.
const OURS: [&str; 3] = ["x-api-key", "e2b-traffic-access-token", "x-team-id"];
const OURS_BEGIN: [&str; 2] = ["x-wrenn-", "e2b-sandbox-"];
/// How keys of the platform begin.
const KEYS: [&str; 2] = ["wrn_", "e2b_"];
/// How names of the platform's cookies begin.
const COOKIES: [&str; 3] = ["wrenn", "__host-wrenn", "__secure-wrenn"];

/// Takes from a request what its guest shall not have. What is an application's own stays: an `Authorization` or cookie that
/// is not ours, and envd's token, which is the guest's.
pub fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers.keys().filter(|name| is_ours(name)).cloned().collect();
    for name in named {
        headers.remove(name);
    }
    if headers.get_all(AUTHORIZATION).iter().any(holds_key) {
        headers.remove(AUTHORIZATION);
    }
    let cookies: Vec<HeaderValue> = headers.get_all(COOKIE).iter().filter_map(foreign_cookies).collect();
    headers.remove(COOKIE);
    for cookies in cookies {
        headers.append(COOKIE, cookies);
    }
}

/// To many programs an underscore is a dash.
fn is_ours(name: &HeaderName) -> bool {
    let name = name.as_str().replace('_', "-");
    OURS.contains(&name.as_str()) || OURS_BEGIN.iter().any(|begin| name.starts_with(begin))
}

/// Whether a key is in it, as it stands or in base64.
fn holds_key(value: &HeaderValue) -> bool {
    let has = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes).to_ascii_lowercase();
        KEYS.iter().any(|key| text.contains(key))
    };
    let text = String::from_utf8_lossy(value.as_bytes());
    has(value.as_bytes())
        || text.split_ascii_whitespace().any(|word| {
            [&STANDARD, &STANDARD_NO_PAD, &URL_SAFE, &URL_SAFE_NO_PAD]
                .iter()
                .any(|way| way.decode(word).is_ok_and(|bytes| has(&bytes)))
        })
}

fn is_our_cookie(pair: &[u8]) -> bool {
    let pair = String::from_utf8_lossy(pair).trim().to_ascii_lowercase();
    COOKIES.iter().any(|prefix| pair.starts_with(prefix))
}

/// A `Cookie` without ours; untouched when there is none of them in it.
fn foreign_cookies(value: &HeaderValue) -> Option<HeaderValue> {
    let pairs: Vec<&[u8]> = value.as_bytes().split(|byte| *byte == b';').collect();
    if !pairs.iter().any(|pair| is_our_cookie(pair)) {
        return Some(value.clone());
    }
    let left: Vec<&[u8]> = pairs.into_iter().filter(|pair| !is_our_cookie(pair)).map(<[u8]>::trim_ascii).collect();
    HeaderValue::from_bytes(&left.join(&b"; "[..])).ok().filter(|value| !value.is_empty())
}

/// Has the cookies of an answer be of its own host only, and none of them pass for one of ours: other capsules, and perhaps
/// the platform, have names in the same domain.
pub fn keep_cookies_home(headers: &mut HeaderMap) {
    let cookies: Vec<HeaderValue> = headers.get_all(SET_COOKIE).iter().filter_map(home).collect();
    headers.remove(SET_COOKIE);
    for cookie in cookies {
        headers.append(SET_COOKIE, cookie);
    }
}

fn home(cookie: &HeaderValue) -> Option<HeaderValue> {
    if is_our_cookie(cookie.as_bytes()) {
        return None;
    }
    let is_domain = |part: &[u8]| {
        part.split(|byte| *byte == b'=').next().is_some_and(|name| name.trim_ascii().eq_ignore_ascii_case(b"domain"))
    };
    let mut parts = cookie.as_bytes().split(|byte| *byte == b';');
    let first = parts.next().unwrap_or_default();
    let kept: Vec<&[u8]> = std::iter::once(first).chain(parts.filter(|part| !is_domain(part))).collect();
    HeaderValue::from_bytes(&kept.join(&b';')).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    #[test]
    fn the_platforms_goes_and_the_applications_stays() {
        let key = "wrn_00000000000000000000000000000000";
        let basic = format!("Basic {}", STANDARD.encode(format!("user:{key}")));
        for authorization in
            [format!("Bearer {key}"), format!("bearer  {}", key.to_uppercase()), basic, "token e2b_00".into()]
        {
            let mut given = headers(&[("authorization", &authorization), ("accept", "*/*")]);
            strip(&mut given);
            assert_eq!(given, headers(&[("accept", "*/*")]), "{authorization}");
        }
        for authorization in ["Bearer eyJhbGciOi.abc", "Basic dXNlcjpwYXNz", "token jupyter"] {
            let mut given = headers(&[("authorization", authorization)]);
            strip(&mut given);
            assert_eq!(given, headers(&[("authorization", authorization)]));
        }
        let mut given = headers(&[
            ("x-api-key", key),
            ("x_api_key", key),
            ("e2b-traffic-access-token", "t"),
            ("e2b-sandbox-id", "i"),
            ("e2b-sandbox-port", "1"),
            ("e2b_sandbox-i_", "i"),
            ("x-wrenn-refusal", "agent"),
            ("x-access-token", "envd's"),
            ("cookie", "a=1; wrenn_session=s;b=2; __Host-Wrenn=x"),
        ]);
        strip(&mut given);
        assert_eq!(given, headers(&[("x-access-token", "envd's"), ("cookie", "a=1; b=2")]));
        let mut given = headers(&[("cookie", "wrenn=1")]);
        strip(&mut given);
        assert!(given.is_empty());
        let mut given = headers(&[("cookie", "odd ;;  cookies=\"a b\"")]);
        strip(&mut given);
        assert_eq!(given["cookie"], "odd ;;  cookies=\"a b\"");
    }

    #[test]
    fn cookies_stay_at_home() {
        let mut given = HeaderMap::new();
        for cookie in [
            "a=1; Domain=.wrenn.dev; Path=/",
            "wrenn_session=x; Path=/",
            "b=domain=2; HttpOnly",
            "c=3;DOMAIN = wrenn.dev;Secure",
        ] {
            given.append(SET_COOKIE, cookie.parse().unwrap());
        }
        keep_cookies_home(&mut given);
        let kept: Vec<_> = given.get_all(SET_COOKIE).iter().collect();
        assert_eq!(kept, ["a=1; Path=/", "b=domain=2; HttpOnly", "c=3;Secure"]);
    }
}
