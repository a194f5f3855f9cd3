//! What the host says about this guest: Firecracker's metadata service, version 2, at its usual address.
//!
//! Asked in the background from the start of init, and again after a restore; one answer ends the asking. Nothing waits for
//! it but the first `/init`, and that not for long: a guest without the service is a guest without a name.

use crate::rewrite::rewrite;
use crate::settings::Settings;
use guest_api::Metadata;
use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;

const ADDRESS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(169, 254, 169, 254), 80);
/// How long one question may take, dialling included.
const QUESTION: Duration = Duration::from_secs(1);
/// The pause after a failure, which doubles up to the second; after the third nobody asks any more.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
const GIVE_UP: Duration = Duration::from_secs(60);
/// Answers are small; a longer one is not ours.
const ANSWER: u64 = 64 * 1024;
/// Where programs find the same without an environment.
const DIRECTORY: &str = "/run/wrenn";

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no answer in time")]
    Time,
    #[error("talking to the metadata service")]
    Talk(#[source] io::Error),
    #[error("the metadata service answered '{0}'")]
    Refused(String),
    #[error("the metadata service's answer is not understood")]
    Malformed(#[source] serde_json::Error),
}

/// What is known so far.
pub struct Mmds {
    address: Option<SocketAddrV4>,
    known: watch::Sender<Option<Metadata>>,
}

impl Mmds {
    /// Where envd is not init nobody is asked.
    pub fn new(is_init: bool) -> Mmds {
        Mmds { address: is_init.then_some(ADDRESS), known: watch::Sender::new(None) }
    }

    /// Asks until there is an answer, and puts it into the environment of processes.
    pub async fn learn(&self, settings: &Settings) {
        let Some(address) = self.address else {
            settings.identify(variables(false, &Metadata::default()));
            return;
        };
        tell(settings, &Metadata::default());
        let mut pause = PAUSE;
        let asking = async {
            loop {
                match ask(address).await {
                    Ok(metadata) => break metadata,
                    Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "no metadata yet"),
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        };
        let Ok(metadata) = tokio::time::timeout(GIVE_UP, asking).await else {
            tracing::warn!("no metadata service");
            return;
        };
        self.know(settings, metadata);
    }

    /// Takes what the service says from the host itself.
    pub fn know(&self, settings: &Settings, metadata: Metadata) {
        tell(settings, &metadata);
        self.known.send_replace(Some(metadata));
    }

    /// Forgets what a twin was told; [`Mmds::learn`] is to follow.
    pub fn forget(&self) {
        self.known.send_replace(None);
    }

    /// What is known, waiting at most `limit` for it.
    pub async fn wait(&self, limit: Duration) -> Option<Metadata> {
        self.address?;
        let mut known = self.known.subscribe();
        match tokio::time::timeout(limit, known.wait_for(Option::is_some)).await {
            Ok(Ok(metadata)) => metadata.clone(),
            _ => None,
        }
    }

    /// The hash of the token that may be set now, asked anew. `None`: the host has put none there, or cannot be asked.
    pub async fn token_hash(&self) -> Option<String> {
        ask(self.address?).await.ok()?.access_token_hash.filter(|hash| !hash.is_empty())
    }
}

/// Puts what is known where processes find it.
fn tell(settings: &Settings, metadata: &Metadata) {
    let told = variables(true, metadata);
    let before = settings.identify(told.clone());
    let directory = Path::new(DIRECTORY);
    // Who runs as root may have removed what was there.
    let written = write_files(directory, &before, &told).or_else(|_| write_files(directory, &BTreeMap::new(), &told));
    if let Err(error) = written {
        tracing::warn!(%error, "cannot write what the metadata says below {DIRECTORY}");
    }
}

/// Both names of each: ours and the one E2B's users know.
fn variables(in_capsule: bool, metadata: &Metadata) -> BTreeMap<String, String> {
    let mut variables = BTreeMap::new();
    for prefix in ["WRENN", "E2B"] {
        variables.insert(format!("{prefix}_SANDBOX"), in_capsule.to_string());
        for (name, value) in [("SANDBOX_ID", &metadata.instance_id), ("TEMPLATE_ID", &metadata.env_id)] {
            if !value.is_empty() {
                variables.insert(format!("{prefix}_{name}"), value.clone());
            }
        }
    }
    variables
}

/// A file for each variable that is not what it was.
fn write_files(
    directory: &Path,
    before: &BTreeMap<String, String>,
    variables: &BTreeMap<String, String>,
) -> io::Result<()> {
    if before.is_empty() {
        std::fs::create_dir_all(directory)?;
    }
    for name in ["WRENN_SANDBOX", "WRENN_SANDBOX_ID", "WRENN_TEMPLATE_ID"] {
        let path = directory.join(format!(".{name}"));
        match variables.get(name) {
            value if value == before.get(name) => {}
            Some(value) => rewrite(&path, value)?,
            // What a twin was told is not true of this guest.
            None => match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            },
        }
    }
    Ok(())
}

/// A token, then the data with it.
async fn ask(address: SocketAddrV4) -> Result<Metadata, Error> {
    let asking = async {
        let token = "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n";
        let token = exchange(address, token).await?;
        let data = format!("GET / HTTP/1.1\r\nX-metadata-token: {}\r\nAccept: application/json\r\n", token.trim());
        serde_json::from_str(&exchange(address, &data).await?).map_err(Error::Malformed)
    };
    tokio::time::timeout(QUESTION, asking).await.unwrap_or(Err(Error::Time))
}

/// One question on a connection of its own, and the body of its answer.
async fn exchange(address: SocketAddrV4, head: &str) -> Result<String, Error> {
    let mut stream = TcpStream::connect(address).await.map_err(Error::Talk)?;
    let request = format!("{head}Host: {}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", address.ip());
    stream.write_all(request.as_bytes()).await.map_err(Error::Talk)?;
    let mut stream = stream.take(ANSWER);
    let mut answer = Vec::new();
    // The service may leave the connection open: the length says when all is here.
    loop {
        let read = stream.read_buf(&mut answer).await.map_err(Error::Talk)?;
        if let Some(body) = body(&answer, read == 0)? {
            return Ok(body);
        }
        if read == 0 {
            return Err(Error::Talk(io::ErrorKind::UnexpectedEof.into()));
        }
    }
}

/// The body of an answer, once all of it is there.
pub fn body(answer: &[u8], at_end: bool) -> Result<Option<String>, Error> {
    let Some(end) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") else { return Ok(None) };
    let (head, body) = (String::from_utf8_lossy(&answer[..end]), &answer[end + 4..]);
    let mut lines = head.lines();
    let status = lines.next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("200") {
        return Err(Error::Refused(status.to_owned()));
    }
    let length =
        lines.filter_map(|line| line.split_once(':')).find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let body = match length.and_then(|(_, length)| length.trim().parse::<usize>().ok()) {
        Some(length) => body.get(..length),
        None => at_end.then_some(body),
    };
    Ok(body.map(|body| String::from_utf8_lossy(body).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[test]
    fn answers_are_read_by_their_length() {
        let of = |text: &str, end| body(text.as_bytes(), end).unwrap();
        assert_eq!(of("HTTP/1.1 200 \r\nContent-length: 3\r\n\r\nabcd", false), Some("abc".to_owned()));
        assert_eq!(of("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabcd", false), None);
        assert_eq!(of("HTTP/1.1 200 OK\r\n\r\nabcd", false), None);
        assert_eq!(of("HTTP/1.1 200 OK\r\n\r\nabcd", true), Some("abcd".to_owned()));
        assert_eq!(of("HTTP/1.1 200 OK\r\nContent", true), None);
        // A character that has come in half is not all of it.
        let answer = "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\na\u{fc}b".as_bytes();
        assert_eq!(body(&answer[..answer.len() - 2], false).unwrap(), None);
        assert_eq!(body(answer, false).unwrap(), Some("a\u{fc}b".to_owned()));
        assert!(matches!(body(b"HTTP/1.1 401 Unauthorized\r\n\r\n", false), Err(Error::Refused(_))));
    }

    #[test]
    fn variables_and_files() {
        let metadata = Metadata { instance_id: "cl-1".to_owned(), env_id: "t".to_owned(), access_token_hash: None };
        let all = variables(true, &metadata);
        let text: Vec<_> = all.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let expected = ["E2B_SANDBOX=true", "E2B_SANDBOX_ID=cl-1", "E2B_TEMPLATE_ID=t", "WRENN_SANDBOX=true"];
        assert_eq!(text[..4], expected);
        assert_eq!(text[4..], ["WRENN_SANDBOX_ID=cl-1", "WRENN_TEMPLATE_ID=t"]);
        assert_eq!(variables(false, &Metadata::default())["WRENN_SANDBOX"], "false");
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("wrenn");
        write_files(&below, &BTreeMap::new(), &all).unwrap();
        assert_eq!(std::fs::read_to_string(below.join(".WRENN_SANDBOX_ID")).unwrap(), "cl-1");
        assert_eq!(std::fs::read_dir(&below).unwrap().count(), 3);
        let other = variables(true, &Metadata { instance_id: "i".to_owned(), ..metadata });
        write_files(&below, &all, &other).unwrap();
        assert_eq!(std::fs::read_to_string(below.join(".WRENN_SANDBOX_ID")).unwrap(), "i");
        assert_eq!(std::fs::read_to_string(below.join(".WRENN_TEMPLATE_ID")).unwrap(), "t");
        write_files(&below, &other, &variables(true, &Metadata::default())).unwrap();
        assert_eq!(std::fs::read_dir(&below).unwrap().count(), 1, "only that it is a capsule is known");
    }

    /// A service that is not there at first, then lacks its data, then has it; it keeps connections open.
    #[tokio::test]
    async fn asks_until_it_is_told() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let std::net::SocketAddr::V4(address) = listener.local_addr().unwrap() else { unreachable!() };
        let service = tokio::spawn(async move {
            let mut open = Vec::new();
            let mut heads = Vec::new();
            for answer in ["503 Busy", "200 token-1", "404 no", "200 token-2", r#"200 {"instanceID":"cl-7","more":1}"#]
            {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = vec![0; 1024];
                let length = stream.read(&mut head).await.unwrap();
                heads.push(String::from_utf8_lossy(&head[..length]).into_owned());
                let (status, body) = answer.split_once(' ').unwrap();
                let answer = format!("HTTP/1.1 {status} \r\nContent-Length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).await.unwrap();
                open.push(stream);
            }
            heads
        });
        let mmds = Mmds { address: Some(address), known: watch::Sender::new(None) };
        let Metadata { instance_id, .. } = loop {
            if let Ok(metadata) = ask(address).await {
                break metadata;
            }
        };
        assert_eq!(instance_id, "cl-7");
        let heads = service.await.unwrap();
        assert!(heads[3].starts_with("PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\n"));
        assert!(heads[4].starts_with("GET / HTTP/1.1\r\nX-metadata-token: token-2\r\nAccept: application/json\r\n"));
        assert_eq!(mmds.token_hash().await, None, "nobody listens any more");
    }
}
