//! Where an agent listens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use http::Uri;
use http::uri::Authority;

/// The address of a host agent: `unix:/path/to/socket` or `http://host:port`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A socket file, by its absolute path.
    Unix(PathBuf),
    /// Plain HTTP over TCP; the authority has a port.
    Http(Authority),
}

/// Why a text is not an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("an agent's address is `unix:/path` or `http://host:port`")]
    Form,
    #[error("the path after `unix:` must be absolute")]
    Path,
    #[error("the address after `http://` must be a host and a port, and nothing else")]
    Authority,
}

impl Endpoint {
    /// The base of request URIs. A socket file has no name on the wire, so any host stands for it.
    pub(crate) fn base(&self, path: &str) -> Uri {
        let authority = match self {
            Self::Unix(_) => Authority::from_static("agent"),
            Self::Http(authority) => authority.clone(),
        };
        Uri::builder()
            .scheme("http")
            .authority(authority)
            .path_and_query(path)
            .build()
            .expect("callers pass an absolute path of plain characters")
    }
}

impl FromStr for Endpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return if path.is_absolute() { Ok(Self::Unix(path)) } else { Err(Error::Path) };
        }
        let authority = text.strip_prefix("http://").ok_or(Error::Form)?.trim_end_matches('/');
        let authority: Authority = authority.parse().map_err(|_| Error::Authority)?;
        let complete =
            authority.port_u16().is_some() && !authority.host().is_empty() && !authority.as_str().contains('@');
        if complete { Ok(Self::Http(authority)) } else { Err(Error::Authority) }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Http(authority) => write!(f, "http://{authority}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_survive_their_text() {
        for text in ["unix:/run/wrenn/agent.sock", "http://10.0.0.1:50051", "http://[::1]:1", "http://host-a:80"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        assert_eq!("http://h:1/".parse::<Endpoint>().unwrap().to_string(), "http://h:1");
    }

    #[test]
    fn other_texts_say_what_is_wrong() {
        for (text, error) in [
            ("", Error::Form),
            ("/run/agent.sock", Error::Form),
            ("https://h:1", Error::Form),
            ("unix:agent.sock", Error::Path),
            ("unix:", Error::Path),
            ("http://", Error::Authority),
            ("http://host", Error::Authority),
            ("http://host:70000", Error::Authority),
            ("http://user@host:1", Error::Authority),
            ("http://host:1/path", Error::Authority),
        ] {
            assert_eq!(text.parse::<Endpoint>(), Err(error), "{text}");
        }
    }
}
