//! `wrenn capsule url`.

use std::net::IpAddr;
use std::process::ExitCode;

use anyhow::{Context, Result};
use api::CapsuleId;
use clap::Args;
use serde_json::json;

use crate::rest::Client;
use crate::terminal;

/// Prints the address under which a browser reaches a port of a capsule.
#[derive(Debug, Args)]
pub(super) struct Url {
    /// The capsule.
    id: CapsuleId,
    /// The port that something in it listens on.
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// Domain of capsules, with a port if it has one [default: the host of the API, `localhost` for an address].
    #[arg(long, env = "WRENN_PROXY_DOMAIN")]
    domain: Option<String>,
}

impl Url {
    pub(super) fn run(self, client: &Client, json: bool) -> Result<ExitCode> {
        let url =
            address(client.url(), self.domain.as_deref().filter(|domain| !domain.is_empty()), self.id, self.port)?;
        if json {
            terminal::print_json(&json!({ "url": url }))?;
        } else {
            terminal::print(&url)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// As the `wrenn` SDK has it, but for addresses: no name can stand before one.
fn address(api: &str, domain: Option<&str>, id: CapsuleId, port: u16) -> Result<String> {
    let api = reqwest::Url::parse(api).with_context(|| format!("{api} is not a URL"))?;
    let host = api.host_str().unwrap_or_default();
    let name = match host.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(_) => "localhost",
        Err(_) if host == "app.wrenn.dev" => "wrenn.dev",
        Err(_) => host,
    };
    let own = api.port().map_or_else(|| name.to_owned(), |port| format!("{name}:{port}"));
    Ok(format!("{}://{port}-{id}.{}", api.scheme(), domain.unwrap_or(&own)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capsules_host_is_in_the_domain_of_its_api() {
        let id: CapsuleId = "cl-0000000000000000000000000".parse().unwrap();
        for (api, domain, url) in [
            ("http://127.0.0.1:9725", None, "http://80-ID.localhost:9725"),
            ("http://[::1]:9725", None, "http://80-ID.localhost:9725"),
            ("https://cp.example.com:8443/api", None, "https://80-ID.cp.example.com:8443"),
            ("https://app.wrenn.dev/api", None, "https://80-ID.wrenn.dev"),
            ("https://cp.example.com", Some("caps.example.net:1"), "https://80-ID.caps.example.net:1"),
        ] {
            assert_eq!(address(api, domain, id, 80).unwrap(), url.replace("ID", &id.to_string()));
        }
        assert!(address("not a url", None, id, 80).is_err());
    }
}
