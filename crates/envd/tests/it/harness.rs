//! One envd as an ordinary process on a port of its own, and a client that checks the shape of every stream.

use connectrpc::client::{CallOptions, ClientConfig, ClientTransport, HttpClient, ServerStream};
use connectrpc::{CodecFormat, ConnectError};
use guest_api::process::{
    ConnectRequest, ConnectResponseView, ProcessClient, ProcessConfig, ProcessEvent, ProcessSelector, StartRequest,
    StartResponseView, process_event::EndEvent, process_event::Event, process_event::data_event::Output,
    process_selector::Selector,
};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

pub type Client = ProcessClient<HttpClient>;
type Body = <HttpClient as ClientTransport>::ResponseBody;

/// Patience for what should happen at once; a machine under load may need some of it.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Envd {
    child: Child,
    pub address: SocketAddr,
}

impl Envd {
    pub fn start() -> Envd {
        Envd::start_with(&[])
    }

    pub fn start_with(environment: &[(&str, &str)]) -> Envd {
        let mut command = Command::new(env!("CARGO_BIN_EXE_envd"));
        command.args(["--port", "0", "--isnotfc"]).envs(environment.iter().copied());
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let port = loop {
            let mut line = String::new();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "envd ended before it served");
            if let Some((_, port)) = line.trim().split_once("address=0.0.0.0:") {
                break port.parse().unwrap();
            }
        };
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::stderr()));
        Envd { child, address: (Ipv4Addr::LOCALHOST, port).into() }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn client(&self) -> Client {
        self.client_in(CodecFormat::Proto)
    }

    pub fn client_in(&self, codec: CodecFormat) -> Client {
        let config = ClientConfig::new(format!("http://{}", self.address).parse().unwrap()).with_codec_format(codec);
        ProcessClient::new(HttpClient::plaintext(), config)
    }

    /// Descriptors open in envd.
    pub fn open_files(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Whether envd has a file open below `directory`, be it unlinked.
    pub fn holds(&self, directory: &str) -> bool {
        let files = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().flatten();
        files.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|target| target.starts_with(directory))
    }

    /// Processes whose parent is envd, zombies included.
    pub fn children(&self) -> usize {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let children = tasks.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
        children.map(|children| children.split_whitespace().count()).sum()
    }

    /// Resident memory in bytes.
    pub fn resident(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.pid())).unwrap();
        statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }
}

impl Drop for Envd {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A stream of either kind.
pub enum Stream {
    Start(ServerStream<Body, StartResponseView<'static>>),
    Connect(ServerStream<Body, ConnectResponseView<'static>>),
}

impl Stream {
    pub async fn next(&mut self) -> Result<Option<Event>, ConnectError> {
        let event: Option<ProcessEvent> = match self {
            Stream::Start(stream) => {
                stream.message().await?.and_then(|message| message.to_owned_message().event.into_option())
            }
            Stream::Connect(stream) => {
                stream.message().await?.and_then(|message| message.to_owned_message().event.into_option())
            }
        };
        Ok(event.map(|event| event.event.expect("an event says which")))
    }

    /// The pid of the first event, which must be `start`.
    pub async fn started(&mut self) -> u32 {
        match self.next().await {
            Ok(Some(Event::Start(start))) => start.pid,
            other => panic!("a stream begins with start, not {other:?}"),
        }
    }

    /// Reads on to the end, which must be the last event.
    pub async fn rest(mut self) -> Result<Run, ConnectError> {
        let mut run = Run::default();
        loop {
            match self.next().await? {
                Some(Event::Data(data)) => match data.output.expect("data says from where") {
                    Output::Stdout(bytes) => run.stdout.extend(bytes),
                    Output::Stderr(bytes) => run.stderr.extend(bytes),
                    Output::Pty(bytes) => run.pty.extend(bytes),
                },
                Some(Event::End(end)) => {
                    run.end = *end;
                    assert!(self.next().await?.is_none(), "nothing follows the end");
                    return Ok(run);
                }
                Some(Event::Keepalive(_)) => run.keepalives += 1,
                other => panic!("not expected before the end: {other:?}"),
            }
        }
    }

    /// Reads until the output so far contains `text`.
    pub async fn until(&mut self, text: &str) -> Vec<u8> {
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(text) {
            match self.next().await.unwrap() {
                Some(Event::Data(data)) => match data.output.unwrap() {
                    Output::Stdout(bytes) | Output::Stderr(bytes) | Output::Pty(bytes) => seen.extend(bytes),
                },
                other => panic!("{other:?} while waiting for {text:?} after {:?}", String::from_utf8_lossy(&seen)),
            }
        }
        seen
    }
}

/// What a whole stream said.
#[derive(Debug, Default)]
pub struct Run {
    pub pid: u32,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub pty: Vec<u8>,
    pub keepalives: usize,
    pub end: EndEvent,
}

impl Run {
    pub fn out(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }
}

/// A request for `sh -c script`.
pub fn sh(script: &str) -> StartRequest {
    command("/bin/sh", &["-c", script])
}

pub fn command(cmd: &str, args: &[&str]) -> StartRequest {
    let args = args.iter().map(|arg| (*arg).to_owned()).collect();
    let process = ProcessConfig { cmd: cmd.to_owned(), args, ..Default::default() };
    StartRequest { process: process.into(), ..Default::default() }
}

pub async fn start(client: &Client, request: StartRequest, options: CallOptions) -> Result<Stream, ConnectError> {
    Ok(Stream::Start(client.start_with_options(request, options).await?))
}

/// Starts and reads to the end.
pub async fn run(client: &Client, request: StartRequest) -> Run {
    run_with(client, request, CallOptions::default()).await.unwrap()
}

pub async fn run_with(client: &Client, request: StartRequest, options: CallOptions) -> Result<Run, ConnectError> {
    let mut stream = start(client, request, options).await?;
    let pid = stream.started().await;
    Ok(Run { pid, ..stream.rest().await? })
}

pub async fn connect(client: &Client, selector: impl Into<Selector>) -> Result<Stream, ConnectError> {
    let request = ConnectRequest { process: process(selector).into(), ..Default::default() };
    Ok(Stream::Connect(client.connect(request).await?))
}

pub fn process(selector: impl Into<Selector>) -> ProcessSelector {
    ProcessSelector { selector: Some(selector.into()), ..Default::default() }
}

pub fn pid(pid: u32) -> Selector {
    Selector::Pid(pid)
}

pub fn tag(tag: &str) -> Selector {
    Selector::Tag(tag.to_owned())
}

pub fn basic(user: &str) -> CallOptions {
    use base64::Engine;
    let encoded = base64::engine::general_purpose::STANDARD.encode(format!("{user}:"));
    CallOptions::default().with_header("authorization", format!("Basic {encoded}"))
}

/// Whether a process exists and is not a zombie.
pub fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap().trim_start().starts_with('Z'))
}

/// Waits for something to become so.
pub async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "{what} did not come about");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
