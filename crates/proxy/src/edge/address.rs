//! Whom a request is for, told by the host it names.

use std::net::IpAddr;

use api::CapsuleId;
use http::Request;
use http::header::HOST;

/// E2B's way to name a capsule and a port where host names cannot.
const SANDBOX_ID: &str = "e2b-sandbox-id";
const SANDBOX_PORT: &str = "e2b-sandbox-port";

/// A port of a capsule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    pub capsule: CapsuleId,
    pub port: u16,
}

impl Address {
    /// Where the request is to go; `None` for what is for the API. A host that looks like a capsule's never is.
    pub fn of<B>(request: &Request<B>) -> Option<Result<Self, &'static str>> {
        let host = request.headers().get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let name = name(host);
        if let Some(address) = in_name(&name) {
            return Some(address);
        }
        let headers = [SANDBOX_ID, SANDBOX_PORT].map(|header| request.headers().get_all(header));
        let is_ours = name == "localhost"
            || name.starts_with("sandbox.")
            || name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
        if !is_ours || headers.iter().all(|values| values.iter().next().is_none()) {
            return None;
        }
        let texts = headers.map(|values| {
            let mut values = values.iter();
            // Two of them would be two addresses.
            values.next().filter(|_| values.next().is_none()).and_then(|value| value.to_str().ok())
        });
        let [Some(capsule), Some(port)] = texts else {
            return Some(Err("E2b-Sandbox-Id and E2b-Sandbox-Port come together, and once"));
        };
        Some(parse(capsule, port))
    }
}

/// The host without its port, in the one spelling that names are compared in.
fn name(host: &str) -> String {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    };
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// `{port}-{capsule}.{anything}`. What only looks like it is an error, so that it never becomes something else.
fn in_name(name: &str) -> Option<Result<Address, &'static str>> {
    let label = name.split('.').next().unwrap_or_default();
    let (port, capsule) = label.split_once("-cl-")?;
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some(parse(&format!("cl-{capsule}"), port))
}

fn parse(capsule: &str, port: &str) -> Result<Address, &'static str> {
    let port = port.parse().ok().filter(|number: &u16| *number > 0 && port == number.to_string());
    let port = port.ok_or("the port is a number from 1 to 65535")?;
    let capsule = capsule.parse().map_err(|_| "this is not a capsule's id")?;
    Ok(Address { capsule, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "cl-0000000000000000000000001";

    fn of(host: &str, headers: &[(&str, &str)]) -> Option<Result<Address, &'static str>> {
        let mut request = Request::builder().header(HOST, host);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Address::of(&request.body(()).unwrap())
    }

    fn port(number: u16) -> Option<Result<Address, &'static str>> {
        Some(Ok(Address { capsule: ID.parse().unwrap(), port: number }))
    }

    #[test]
    fn a_host_names_a_port_of_a_capsule_in_any_spelling() {
        for host in [
            format!("8000-{ID}.localhost"),
            format!("8000-{ID}.localhost:9725"),
            format!("8000-{ID}.wrenn.dev."),
            format!("8000-{ID}.wrenn.dev.:443"),
            format!("8000-{}.WRENN.dev", ID.to_uppercase()),
            format!("8000-{ID}.127.0.0.1:9725"),
            format!("8000-{ID}"),
        ] {
            assert_eq!(of(&host, &[]), port(8000), "{host}");
        }
    }

    #[test]
    fn what_looks_like_a_capsules_host_is_never_the_apis() {
        for label in [
            format!("0-{ID}"),
            format!("65536-{ID}"),
            format!("080-{ID}"),
            format!("-{ID}"),
            "80-cl-".into(),
            "80-cl-1".into(),
            format!("80-{ID}0"),
            format!("80-{ID}-x"),
            format!("80-{ID}_"),
        ] {
            for suffix in [".localhost", "", ".localhost:1"] {
                assert!(matches!(of(&format!("{label}{suffix}"), &[]), Some(Err(_))), "{label}{suffix}");
            }
        }
    }

    #[test]
    fn the_apis_hosts_are_never_a_capsules() {
        for host in [
            "",
            "localhost",
            "api.wrenn.dev",
            "127.0.0.1:9725",
            "[::1]:9725",
            "x-cl-1.dev",
            "a.80-cl-1.dev",
            "cl-1.dev",
        ] {
            assert_eq!(of(host, &[]), None, "{host}");
        }
    }

    #[test]
    fn headers_route_where_names_cannot() {
        let both = [("E2b-Sandbox-Id", ID), ("E2b-Sandbox-Port", "80")];
        for host in
            ["localhost", "localhost:3", "127.0.0.1:3", "[::1]:3", "::1", "sandbox.wrenn.dev", "Sandbox.wrenn.dev:3"]
        {
            assert_eq!(of(host, &both), port(80), "{host}");
            assert!(matches!(of(host, &both[..1]), Some(Err(_))), "{host}");
            assert!(matches!(of(host, &both[1..]), Some(Err(_))), "{host}");
            assert!(matches!(of(host, &[both[0], both[1], both[1]]), Some(Err(_))), "{host}");
            assert_eq!(of(host, &[]), None, "{host}");
        }
        for host in ["api.wrenn.dev", "sandbox", "localhost.wrenn.dev"] {
            assert_eq!(of(host, &both), None, "{host}");
        }
        // The name is stronger.
        assert_eq!(of(&format!("81-{ID}.sandbox.dev"), &both), port(81));
    }
}
