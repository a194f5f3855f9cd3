//! A client of Wrenn's REST API, as far as the commands need it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use api::{
    Capsule, CapsuleId, CapsuleMetrics, CreateCapsule, CreateSnapshot, Depth, DirectoryEntries, Egress, ErrorBody,
    ErrorCode, ErrorDetail, Exec, ExecResult, ExecStarted, FilePath, ForkCapsule, Forked, MetricsRange, ProcessList,
    SetEgress, Signal, Template,
};
use clap::Args;
use percent_encoding::{NON_ALPHANUMERIC, PercentEncode};
use reqwest::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use reqwest::multipart::{Form, Part};
use reqwest::{Body, Certificate, Method, RequestBuilder, Response, StatusCode, Upgraded};
use serde::de::DeserializeOwned;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::Role;

use crate::current::{self, Current};

/// Where `wrenn up` listens when it is not told.
const DEFAULT_URL: &str = "http://127.0.0.1:9725";
/// For reaching the server.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// For everything that does not run a command; a create may hold its answer until the guest has booted.
const CALL_LIMIT: Duration = Duration::from_secs(120);
/// For copying a capsule, which takes as long as there is to write.
const COPY_LIMIT: Duration = Duration::from_secs(660);
/// What a foreground command gets on top of its own time, for its answer to arrive.
const EXEC_MARGIN: Duration = Duration::from_secs(10);

/// Which server, and as whom.
#[derive(Debug, Clone, Args)]
pub struct Server {
    /// Address of the API [default: the `wrenn up` that runs here, else http://127.0.0.1:9725].
    #[arg(long, global = true, env = "WRENN_BASE_URL", value_name = "URL", help_heading = "Server")]
    url: Option<String>,
    /// API key [default: that of the `wrenn up` that runs here].
    #[arg(
        long,
        global = true,
        env = "WRENN_API_KEY",
        hide_env_values = true,
        value_name = "KEY",
        help_heading = "Server"
    )]
    api_key: Option<String>,
}

impl Server {
    /// A client of it.
    pub fn client(&self) -> Result<Client> {
        let current = current::read();
        let (url, api_key) = resolve(self.url.as_deref(), self.api_key.as_deref(), current.clone())?;
        let ca = current.filter(|current| current.url == url).and_then(|current| current.ca);
        let ca = ca.map(|ca| Certificate::from_pem(ca.as_bytes())).transpose().context("reading whom to trust")?;
        let http = reqwest::Client::builder().connect_timeout(CONNECT_LIMIT).tls_certs_merge(ca);
        Ok(Client { http: http.build().context("starting the HTTP client")?, url, api_key })
    }
}

/// Chooses address and key. A key is never sent to a server it was not meant for.
fn resolve(url: Option<&str>, api_key: Option<&str>, current: Option<Current>) -> Result<(String, String)> {
    let given = |value: Option<&str>| value.filter(|value| !value.is_empty()).map(str::to_owned);
    let (url, api_key) = (given(url).map(|url| url.trim_end_matches('/').to_owned()), given(api_key));
    let here = current.filter(|current| url.as_ref().is_none_or(|url| *url == current.url));
    let (here_url, here_key) = here.map(|current| (current.url, current.api_key)).unzip();
    let Some(api_key) = api_key.or(here_key) else {
        bail!(
            "no API key: no `wrenn up` of this user runs here; start one with `sudo wrenn up`, or set WRENN_API_KEY \
             and WRENN_BASE_URL to what it printed"
        );
    };
    Ok((url.or(here_url).unwrap_or_else(|| DEFAULT_URL.to_owned()), api_key))
}

/// A WebSocket to the server.
pub type Socket = WebSocketStream<Upgraded>;

/// The server's refusal, in its own words.
#[derive(Debug)]
pub struct Refused {
    pub code: ErrorCode,
    message: String,
}

impl From<ErrorDetail> for Refused {
    fn from(ErrorDetail { code, message }: ErrorDetail) -> Self {
        Self { code, message }
    }
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Refused {}

/// One server and one key.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    api_key: String,
}

impl Client {
    pub async fn create(&self, request: &CreateCapsule) -> Result<Capsule> {
        self.read(self.request(Method::POST, "/v1/capsules").json(request).timeout(CALL_LIMIT)).await
    }

    pub async fn list(&self) -> Result<Vec<Capsule>> {
        self.read(self.request(Method::GET, "/v1/capsules").timeout(CALL_LIMIT)).await
    }

    pub async fn get(&self, id: CapsuleId) -> Result<Capsule> {
        self.read(self.request(Method::GET, &format!("/v1/capsules/{id}")).timeout(CALL_LIMIT)).await
    }

    pub async fn set_network(&self, id: CapsuleId, network: &SetEgress) -> Result<Egress> {
        let request = self.request(Method::PUT, &format!("/v1/capsules/{id}/network"));
        self.read(request.json(network).timeout(CALL_LIMIT)).await
    }

    pub async fn destroy(&self, id: CapsuleId) -> Result<()> {
        self.send(self.request(Method::DELETE, &format!("/v1/capsules/{id}")).timeout(CALL_LIMIT)).await.map(drop)
    }

    pub async fn pause(&self, id: CapsuleId) -> Result<Capsule> {
        self.read(self.request(Method::POST, &format!("/v1/capsules/{id}/pause")).timeout(CALL_LIMIT)).await
    }

    pub async fn hibernate(&self, id: CapsuleId) -> Result<Capsule> {
        self.read(self.request(Method::POST, &format!("/v1/capsules/{id}/hibernate")).timeout(CALL_LIMIT)).await
    }

    pub async fn resume(&self, id: CapsuleId) -> Result<Capsule> {
        self.read(self.request(Method::POST, &format!("/v1/capsules/{id}/resume")).timeout(CALL_LIMIT)).await
    }

    pub async fn fork(&self, id: CapsuleId, request: &ForkCapsule) -> Result<Vec<Capsule>> {
        let request = self.request(Method::POST, &format!("/v1/capsules/{id}/fork")).json(request);
        Ok(self.read::<Forked>(request.timeout(COPY_LIMIT)).await?.capsules)
    }

    pub async fn snapshot(&self, request: &CreateSnapshot, overwrite: bool) -> Result<Template> {
        let path = if overwrite { "/v1/snapshots?overwrite=true" } else { "/v1/snapshots" };
        self.read(self.request(Method::POST, path).json(request).timeout(COPY_LIMIT)).await
    }

    pub async fn templates(&self) -> Result<Vec<Template>> {
        self.read(self.request(Method::GET, "/v1/snapshots").timeout(CALL_LIMIT)).await
    }

    pub async fn delete_template(&self, name: &str) -> Result<()> {
        let path = format!("/v1/snapshots/{}", escaped(name));
        self.send(self.request(Method::DELETE, &path).timeout(CALL_LIMIT)).await.map(drop)
    }

    /// Runs a command to its end. `limit` is the command's own.
    pub async fn exec(&self, id: CapsuleId, exec: &Exec, limit: Duration) -> Result<ExecResult> {
        let request = self.request(Method::POST, &format!("/v1/capsules/{id}/exec")).json(exec);
        self.read(request.timeout(limit + EXEC_MARGIN)).await
    }

    /// Starts a command and leaves it running.
    pub async fn start(&self, id: CapsuleId, exec: &Exec) -> Result<ExecStarted> {
        self.read(self.request(Method::POST, &format!("/v1/capsules/{id}/exec")).json(exec).timeout(CALL_LIMIT)).await
    }

    /// What runs in the capsule.
    pub async fn processes(&self, id: CapsuleId) -> Result<ProcessList> {
        self.read(self.request(Method::GET, &format!("/v1/capsules/{id}/processes")).timeout(CALL_LIMIT)).await
    }

    /// What a capsule used, as far back as `range`.
    pub async fn metrics(&self, id: CapsuleId, range: MetricsRange) -> Result<CapsuleMetrics> {
        let request = self.request(Method::GET, &format!("/v1/capsules/{id}/metrics")).query(&[("range", range)]);
        self.read(request.timeout(CALL_LIMIT)).await
    }

    /// Ends a process, named by its pid or tag.
    pub async fn kill(&self, id: CapsuleId, process: &str, signal: Signal) -> Result<()> {
        let request = self.request(Method::DELETE, &format!("/v1/capsules/{id}/processes/{}", escaped(process)));
        self.send(request.query(&[("signal", signal)]).timeout(CALL_LIMIT)).await.map(drop)
    }

    /// What is in a directory, one level deep.
    pub async fn list_directory(&self, id: CapsuleId, path: &str) -> Result<DirectoryEntries> {
        let body = Depth { path: path.to_owned(), depth: None };
        let request = self.request(Method::POST, &format!("/v1/capsules/{id}/files/list")).json(&body);
        self.read(request.timeout(CALL_LIMIT)).await
    }

    /// Makes or replaces a file, from a body of any length, at the pace of whoever is slowest.
    pub async fn upload(&self, id: CapsuleId, path: &str, body: Body) -> Result<()> {
        // The path must come first: the server writes what follows as it comes.
        let form = Form::new().text("path", path.to_owned()).part("file", Part::stream(body).file_name("upload"));
        let request = self.request(Method::POST, &format!("/v1/capsules/{id}/files/stream/write"));
        self.send(request.multipart(form)).await.map(drop)
    }

    /// A file's content as it comes.
    pub async fn download(&self, id: CapsuleId, path: &str) -> Result<Response> {
        let body = FilePath { path: path.to_owned() };
        self.send(self.request(Method::POST, &format!("/v1/capsules/{id}/files/stream/read")).json(&body)).await
    }

    /// Opens a WebSocket to a terminal.
    pub async fn pty(&self, id: CapsuleId) -> Result<Socket> {
        self.socket(&format!("/v1/capsules/{id}/pty")).await
    }

    /// Opens a WebSocket to a command that is to be run.
    pub async fn exec_stream(&self, id: CapsuleId) -> Result<Socket> {
        self.socket(&format!("/v1/capsules/{id}/exec/stream")).await
    }

    /// Opens a WebSocket to what a process writes, byte for byte.
    pub async fn process_stream(&self, id: CapsuleId, process: &str) -> Result<Socket> {
        self.socket(&format!("/v1/capsules/{id}/processes/{}/stream?encoding=base64", escaped(process))).await
    }

    /// Opens a WebSocket. It goes through the same HTTP client as all else, so that it trusts the same certificates,
    /// takes the same proxies, and is refused in the same words.
    async fn socket(&self, path: &str) -> Result<Socket> {
        let key = generate_key();
        let request = self
            .request(Method::GET, path)
            .header(CONNECTION, "Upgrade")
            .header(UPGRADE, "websocket")
            .header(SEC_WEBSOCKET_VERSION, "13")
            .header(SEC_WEBSOCKET_KEY, &key);
        let answer = tokio::time::timeout(CALL_LIMIT, self.send(request))
            .await
            .with_context(|| format!("{} does not answer", self.url))??;
        let accepted = answer.headers().get(SEC_WEBSOCKET_ACCEPT);
        let accepted = accepted.is_some_and(|accepted| accepted == derive_accept_key(key.as_bytes()).as_str());
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS || !accepted {
            bail!("{} does not answer as a Wrenn server does: no WebSocket", self.url);
        }
        let socket = answer.upgrade().await.with_context(|| format!("cannot reach {}", self.url))?;
        Ok(WebSocketStream::from_raw_socket(socket, Role::Client, None).await)
    }

    /// Opens a connection to a port of the capsule.
    pub async fn tcp(&self, id: CapsuleId, port: u16) -> Result<Upgraded> {
        let path = format!("/v1/capsules/{id}/ports/{port}/tcp");
        let request = self.request(Method::GET, &path).header(CONNECTION, "Upgrade").header(UPGRADE, "tcp");
        let answer = tokio::time::timeout(CALL_LIMIT, self.send(request))
            .await
            .with_context(|| format!("{} does not answer", self.url))??;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            bail!("{} does not answer as a Wrenn server does: no connection", self.url);
        }
        answer.upgrade().await.with_context(|| format!("cannot reach {}", self.url))
    }

    /// Where the API is.
    pub fn url(&self) -> &str {
        &self.url
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url)).header("X-API-Key", &self.api_key)
    }

    async fn read<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T> {
        let answer = self.send(request).await?;
        answer.json().await.with_context(|| format!("{} does not answer as a Wrenn server does", self.url))
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response> {
        let answer =
            request.send().await.with_context(|| format!("cannot reach {}; does `wrenn up` run?", self.url))?;
        let status = answer.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(answer);
        }
        let body = answer.bytes().await.unwrap_or_default();
        match serde_json::from_slice::<ErrorBody>(&body) {
            Ok(ErrorBody { error }) => Err(Refused::from(error).into()),
            Err(_) => bail!("{} answered {status}, and not as a Wrenn server does", self.url),
        }
    }
}

/// `text` as one segment of a path.
fn escaped(text: &str) -> PercentEncode<'_> {
    percent_encoding::utf8_percent_encode(text, NON_ALPHANUMERIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here() -> Option<Current> {
        serde_json::from_str(r#"{"url":"http://127.0.0.1:4711","api_key":"wrn_here","dir":"/data"}"#).unwrap()
    }

    #[test]
    fn what_is_said_wins_over_what_runs_here() {
        let resolve = |url, key, current| resolve(url, key, current).map_err(|error| error.to_string());
        let pair = |url: &str, key: &str| Ok((url.to_owned(), key.to_owned()));
        assert_eq!(resolve(None, None, here()), pair("http://127.0.0.1:4711", "wrn_here"));
        assert_eq!(resolve(Some(""), Some(""), here()), pair("http://127.0.0.1:4711", "wrn_here"));
        assert_eq!(resolve(Some("https://w/api/"), Some("wrn_1"), here()), pair("https://w/api", "wrn_1"));
        assert_eq!(resolve(None, Some("wrn_1"), here()), pair("http://127.0.0.1:4711", "wrn_1"));
        assert_eq!(resolve(None, Some("wrn_1"), None), pair(DEFAULT_URL, "wrn_1"));
        assert!(resolve(None, None, None).unwrap_err().contains("wrenn up"));
    }

    #[test]
    fn the_key_of_here_goes_nowhere_else() {
        assert!(resolve(Some("https://elsewhere"), None, here()).is_err());
        assert!(resolve(Some("http://127.0.0.1:4711/"), None, here()).is_ok());
    }
}
