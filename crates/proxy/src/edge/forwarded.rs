//! What a guest's program learns of the request's way: as from a single proxy in front of it.

use std::net::IpAddr;

use http::header::{HOST, HeaderName, HeaderValue};
use http::{HeaderMap, Request};

use crate::{Peer, Secure};

const FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");

/// Replaces what the request says of its way by what we know of it. A proxy on this machine, such as the one that terminates
/// TLS, is believed what it says of its client; nobody else is.
pub fn say<B>(request: &mut Request<B>) {
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0);
    let is_secure = request.extensions().get::<Secure>().is_some();
    let headers = request.headers_mut();
    let believed = peer.is_none_or(|peer| peer.is_loopback());
    let told = |name: &HeaderName| headers.get(name).filter(|_| believed).and_then(|value| value.to_str().ok());
    let came_for = told(&FOR).filter(|chain| is_chain(chain)).map(str::to_owned).or(peer.map(|peer| peer.to_string()));
    let proto = if is_secure || told(&PROTO) == Some("https") { "https" } else { "http" };
    let host = headers.get(HOST).cloned();
    forget(headers);
    if let Some(chain) = came_for
        && let (Ok(whole), Ok(first)) = (chain.parse(), chain.split(',').next().unwrap_or_default().trim().parse())
    {
        headers.insert(FOR, whole);
        headers.insert(REAL_IP, first);
    }
    headers.insert(PROTO, HeaderValue::from_static(proto));
    if let Some(host) = host {
        let digits = host.to_str().ok().and_then(|host| host.rsplit_once(':')).map(|(_, port)| port.to_owned());
        let port = digits.filter(|port| port.parse::<u16>().is_ok());
        let port = port.unwrap_or_else(|| if proto == "https" { "443".into() } else { "80".into() });
        headers.insert(PORT, port.parse().expect("digits are a value"));
        headers.insert(FORWARDED_HOST, host);
    }
}

fn is_chain(chain: &str) -> bool {
    chain.split(',').all(|address| address.trim().parse::<IpAddr>().is_ok())
}

/// Removes every spelling of such headers: to many programs an underscore is a dash.
fn forget(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers.keys().filter(|name| is_of_the_way(name)).cloned().collect();
    for name in named {
        headers.remove(name);
    }
}

fn is_of_the_way(name: &HeaderName) -> bool {
    let name = name.as_str().replace('_', "-");
    name.starts_with("x-forwarded-") || ["forwarded", "x-real-ip"].contains(&name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(peer: &str, headers: &[(&str, &str)]) -> Vec<(String, String)> {
        of(peer, headers, false)
    }

    fn of(peer: &str, headers: &[(&str, &str)], is_secure: bool) -> Vec<(String, String)> {
        let mut request = Request::builder().header("host", "80-cl-1.dev:8443");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(()).unwrap();
        request.extensions_mut().insert(Peer(peer.parse().unwrap()));
        if is_secure {
            request.extensions_mut().insert(Secure::default());
        }
        say(&mut request);
        let mut said: Vec<_> = request
            .headers()
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()))
            .collect();
        said.sort();
        said
    }

    fn expect(pairs: [(&str, &str); 6]) -> Vec<(String, String)> {
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec()
    }

    const LIES: [(&str, &str); 8] = [
        ("x-forwarded-for", "1.1.1.1"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "evil"),
        ("x_forwarded_host", "evil"),
        ("x-forwarded_prefix", "/evil"),
        ("x-forwarded-port", "1"),
        ("forwarded", "for=1.1.1.1"),
        ("x_real_ip", "1.1.1.1"),
    ];

    #[test]
    fn nobody_says_who_they_are_but_a_proxy_of_this_machine() {
        let common = |ip, proto| {
            expect([
                ("host", "80-cl-1.dev:8443"),
                ("x-forwarded-for", ip),
                ("x-forwarded-host", "80-cl-1.dev:8443"),
                ("x-forwarded-port", "8443"),
                ("x-forwarded-proto", proto),
                ("x-real-ip", ip),
            ])
        };
        assert_eq!(said("9.9.9.9", &LIES), common("9.9.9.9", "http"));
        assert_eq!(said("127.0.0.1", &LIES), common("1.1.1.1", "https"));
        assert_eq!(said("::1", &[("x-forwarded-for", "<script>")]), common("::1", "http"));
        assert_eq!(of("9.9.9.9", &LIES[..1], true), common("9.9.9.9", "https"));
    }
}
