//! The path under which a host serves a port of a capsule, `/proxy/{capsule}/{port}/…`, and the addresses in answers that
//! have to follow it. Nothing is decoded on the way: what a guest is sent is, byte for byte, what was asked for.

use http::Uri;
use http::header::{CONTENT_LOCATION, HOST, HeaderName, LOCATION};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue};

const ROOT: &str = "/proxy/";
/// Headers of an answer that are addresses.
const ADDRESSES: [HeaderName; 2] = [LOCATION, CONTENT_LOCATION];

/// The path of a port, without a slash at its end.
pub fn prefix(capsule: &str, port: u16) -> String {
    format!("{ROOT}{capsule}/{port}")
}

/// What stands behind the prefix of a port: for whom, which port, and what is asked of it. `None` when it is no such path.
pub fn split(uri: &Uri) -> Option<(&str, u16, PathAndQuery)> {
    let rest = uri.path_and_query()?.as_str().strip_prefix(ROOT)?;
    let (capsule, rest) = rest.split_once('/')?;
    let (digits, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    // One way to write a port, so that nobody can take one for another.
    let port: u16 = digits.parse().ok().filter(|port: &u16| *port > 0 && digits == port.to_string())?;
    let path = if path.starts_with('/') { path.parse() } else { format!("/{path}").parse() };
    Some((capsule, port, path.ok()?))
}

/// `asked` under `prefix`. `None` for what is no path, such as the asterisk of OPTIONS.
pub fn join(prefix: &str, asked: &Uri) -> Option<Uri> {
    let path = asked.path_and_query().map_or("/", PathAndQuery::as_str);
    if path.starts_with('/') { format!("{prefix}{path}").parse().ok() } else { None }
}

/// Has the addresses in an answer that name the guest itself begin with `prefix`: those without a host, those with the host
/// the client used, and those with one of `own`, as programs name themselves that know nothing of the way to them.
pub fn add(headers: &mut HeaderMap, prefix: &str, asked: &HeaderMap, port: u16, own: &[&str]) {
    let host = asked.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default().to_owned();
    rewrite(headers, |address| Some(format!("{prefix}{}", path_of(address, &host, port, own)?)));
}

/// Takes the prefix off the addresses in an answer.
pub fn remove(headers: &mut HeaderMap, prefix: &str) {
    rewrite(headers, |address| {
        let rest = address.strip_prefix(prefix)?;
        match rest.chars().next() {
            None => Some("/".to_owned()),
            // Two slashes at the beginning would make a host of what follows.
            Some('/') if rest[1..].starts_with(['/', '\\']) => Some(format!("/.{rest}")),
            Some('/') => Some(rest.to_owned()),
            Some('?' | '#') => Some(format!("/{rest}")),
            Some(_) => None,
        }
    });
}

fn rewrite(headers: &mut HeaderMap, new: impl Fn(&str) -> Option<String>) {
    for name in ADDRESSES {
        let Some(address) = headers.get(&name).and_then(|value| value.to_str().ok()) else { continue };
        if let Some(value) = new(address).and_then(|address| HeaderValue::try_from(address).ok()) {
            headers.insert(name, value);
        }
    }
}

/// The part behind the host of an address that names the guest, which begins with a slash.
fn path_of(address: &str, host: &str, port: u16, own: &[&str]) -> Option<String> {
    let lower = address.to_ascii_lowercase();
    let scheme = ["http://", "https://", "//"].into_iter().find(|scheme| lower.starts_with(scheme));
    let Some(scheme) = scheme else {
        return address.starts_with('/').then(|| address.to_owned());
    };
    let rest = &address[scheme.len()..];
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let is_own = own.iter().any(|name| authority.eq_ignore_ascii_case(&format!("{name}:{port}")))
        || port == 80 && own.iter().any(|name| authority.eq_ignore_ascii_case(name));
    if !is_own && (host.is_empty() || !authority.eq_ignore_ascii_case(host)) {
        return None;
    }
    Some(if path.starts_with('/') { path.to_owned() } else { format!("/{path}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_cut_and_joined_without_being_decoded() {
        for path in ["/", "/a%2Fb//c/?x=%20", "//", "/?", "/../..%2f", "/caf%C3%A9/"] {
            let joined = join(&prefix("cl-1", 80), &path.parse().unwrap()).unwrap();
            let (capsule, port, rest) = split(&joined).unwrap();
            assert_eq!((capsule, port, rest.as_str()), ("cl-1", 80, path));
        }
        let whole = |path: &'static str| split(&Uri::from_static(path)).map(|(_, port, rest)| (port, rest.to_string()));
        assert_eq!(whole("/proxy/cl-1/80"), Some((80, "/".into())));
        assert_eq!(whole("/proxy/cl-1/80?x"), Some((80, "/?x".into())));
        for bad in [
            "/proxy/cl-1",
            "/proxy/cl-1/",
            "/proxy/cl-1/0/",
            "/proxy/cl-1/080/",
            "/proxy/cl-1/65536/",
            "/proxy/cl-1/+80/",
            "/proxy/cl-1/8%30/",
            "/proxy",
            "/guest/cl-1/80/",
            "//proxy/cl-1/80/",
        ] {
            assert_eq!(whole(bad), None, "{bad}");
        }
        assert_eq!(join("/proxy/cl-1/80", &Uri::from_static("*")), None);
    }

    #[test]
    fn addresses_that_name_the_guest_follow_it_there_and_back() {
        let own = ["10.11.0.1", "localhost", "[::1]"];
        for (address, inside, outside) in [
            ("/dir/", "/p/dir/", "/dir/"),
            ("/", "/p/", "/"),
            ("dir/?q", "dir/?q", "dir/?q"),
            ("?q", "?q", "?q"),
            ("http://localhost:80/x?y#z", "/p/x?y#z", "/x?y#z"),
            ("HTTP://LOCALHOST/x", "/p/x", "/x"),
            ("http://10.11.0.1:80", "/p/", "/"),
            ("http://[::1]:80?q", "/p/?q", "/?q"),
            ("https://80-cl-1.example:444/x", "/p/x", "/x"),
            ("//80-cl-1.example:444//x", "/p//x", "/.//x"),
            ("http://localhost:80/\\x", "/p/\\x", "/./\\x"),
            ("http://localhost:8080/x", "http://localhost:8080/x", "http://localhost:8080/x"),
            ("https://elsewhere/p/x", "https://elsewhere/p/x", "https://elsewhere/p/x"),
            ("https://localhost.elsewhere/", "https://localhost.elsewhere/", "https://localhost.elsewhere/"),
            ("/p/x", "/p/p/x", "/p/x"),
        ] {
            let mut asked = HeaderMap::new();
            asked.insert(HOST, "80-cl-1.example:444".parse().unwrap());
            let mut headers = HeaderMap::new();
            headers.insert(LOCATION, address.parse().unwrap());
            headers.insert(CONTENT_LOCATION, address.parse().unwrap());
            add(&mut headers, "/p", &asked, 80, &own);
            assert_eq!(headers[LOCATION], inside, "{address}");
            assert_eq!(headers[CONTENT_LOCATION], inside, "{address}");
            remove(&mut headers, "/p");
            assert_eq!(headers[LOCATION], outside, "{address}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(LOCATION, "/proxy/cl-1/80800/".parse().unwrap());
        remove(&mut headers, "/proxy/cl-1/80");
        assert_eq!(headers[LOCATION], "/proxy/cl-1/80800/");
    }
}
