//! Ours: envd, and a client with pooled connections.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use connectrpc::client::{ClientConfig, HttpClient};
use futures::stream::{self, StreamExt, TryStreamExt};
use guest_api::filesystem::{FilesystemClient, WatchDirRequest, watch_dir_response};
use guest_api::process::process_event::{Event, data_event::Output};
use guest_api::process::{
    PTY, ProcessClient, ProcessConfig, ProcessInput, ProcessSelector, SendInputRequest, SendSignalRequest, Signal,
    StartRequest, process_input, process_selector, pty,
};
use reqwest::Body;
use tokio::fs::File;
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;

use super::Data;

const URL: &str = "http://127.0.0.1:49983";
/// Uploads under way at once, where there are many: as many as a browser has connections.
const AT_ONCE: usize = 6;
/// Bytes read from a file at once.
const PIECE: usize = 256 * 1024;

/// A server and a client of it. Dropping it ends the server.
pub struct Ours {
    server: Child,
    dir: PathBuf,
    http: reqwest::Client,
    processes: ProcessClient<HttpClient>,
}

impl Ours {
    pub async fn start(dir: &Path) -> Result<Ours> {
        std::fs::create_dir_all(dir)?;
        let binary = std::env::current_exe()?.with_file_name("envd");
        ensure!(binary.exists(), "{} is not there; `make build` makes it", binary.display());
        let server = Command::new(binary).arg("--isnotfc").stdin(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let http = reqwest::Client::builder().no_proxy().build()?;
        let ours = Ours { server, dir: dir.to_owned(), http, processes: processes()? };
        for _ in 0..200 {
            if ours.http.get(format!("{URL}/health")).send().await.is_ok() {
                return Ok(ours);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        bail!("envd does not serve")
    }

    pub async fn commands(&self, repeats: u32) -> Result<Vec<Duration>> {
        let mut times = Vec::new();
        for _ in 0..repeats {
            let before = Instant::now();
            command(&self.processes).await?;
            times.push(before.elapsed());
        }
        Ok(times)
    }

    /// Each over a connection of its own.
    pub async fn cold_commands(&self, repeats: u32) -> Result<Vec<Duration>> {
        let mut times = Vec::new();
        for _ in 0..repeats {
            let before = Instant::now();
            command(&processes()?).await?;
            times.push(before.elapsed());
        }
        Ok(times)
    }

    /// A key's way to a raw terminal and back.
    pub async fn echo(&self, repeats: u32) -> Result<Vec<Duration>> {
        let process = ProcessConfig {
            cmd: "/bin/sh".into(),
            args: vec!["-c".into(), "stty raw -echo; echo ready; exec cat".into()],
            ..Default::default()
        };
        let size = pty::Size { cols: 80, rows: 24, ..Default::default() };
        let pty = PTY { size: size.into(), ..Default::default() };
        let request = StartRequest { process: process.into(), pty: pty.into(), ..Default::default() };
        let mut stream = self.processes.start(request).await?;
        let (mut pid, mut seen) = (0, Vec::new());
        let mut times = Vec::new();
        let mut before = None::<Instant>;
        while times.len() < repeats as usize {
            let message = stream.message().await?.context("the terminal ended")?.to_owned_message();
            match message.event.into_option().and_then(|event| event.event) {
                Some(Event::Start(start)) => pid = start.pid,
                Some(Event::Data(data)) => {
                    let Some(Output::Pty(bytes)) = data.output else { bail!("output that is not the terminal's") };
                    seen.extend(bytes);
                    match before {
                        None if !seen.ends_with(b"ready\n") && !seen.ends_with(b"ready\r\n") => continue,
                        None => {}
                        Some(before) => times.push(before.elapsed()),
                    }
                    before = Some(Instant::now());
                    let input =
                        ProcessInput { input: Some(process_input::Input::Pty(b"k".to_vec())), ..Default::default() };
                    let request =
                        SendInputRequest { process: by(pid).into(), input: input.into(), ..Default::default() };
                    self.processes.send_input(request).await?;
                }
                Some(Event::Keepalive(_)) => {}
                Some(Event::End(_)) | None => bail!("the terminal ended"),
            }
        }
        let signal = Signal::SIGNAL_SIGKILL.into();
        let kill = SendSignalRequest { process: by(pid).into(), signal, ..Default::default() };
        self.processes.send_signal(kill).await?;
        Ok(times)
    }

    pub async fn upload_many(&self, data: &Data) -> Result<Vec<Duration>> {
        let target = self.dir.join("many");
        let _ = std::fs::remove_dir_all(&target);
        let before = Instant::now();
        stream::iter(&data.names)
            .map(|name| (data.small.join(name), target.join(name)))
            .map(|(source, target)| async move {
                let contents = tokio::fs::read(source).await?;
                self.post(&target, contents.into()).await
            })
            .buffer_unordered(AT_ONCE)
            .try_collect::<()>()
            .await?;
        let time = before.elapsed();
        ensure!(std::fs::read_dir(&target)?.count() == data.names.len(), "envd lost files");
        Ok(vec![time])
    }

    /// To a new name, as the peer. An old file would make it another comparison: ours stays until the new one is whole, the peer
    /// writes over it.
    pub async fn upload(&self, large: &Path) -> Result<Vec<Duration>> {
        let _ = std::fs::remove_file(self.dir.join("large"));
        let before = Instant::now();
        let pieces = ReaderStream::with_capacity(File::open(large).await?, PIECE);
        self.post(&self.dir.join("large"), Body::wrap_stream(pieces)).await?;
        Ok(vec![before.elapsed()])
    }

    pub async fn download(&self, target: &Path) -> Result<Vec<Duration>> {
        let before = Instant::now();
        let path = self.dir.join("large");
        let query = [("path", path.to_str().context("the path is text")?)];
        let mut answer = self.http.get(format!("{URL}/files")).query(&query).send().await?.error_for_status()?;
        let mut file = File::create(target).await?;
        while let Some(piece) = answer.chunk().await? {
            file.write_all(&piece).await?;
        }
        file.flush().await?;
        Ok(vec![before.elapsed()])
    }

    /// From a file's appearance to the event that tells of it.
    pub async fn watch(&self, repeats: u32) -> Result<Vec<Duration>> {
        let dir = self.dir.join("watched");
        std::fs::create_dir_all(&dir)?;
        let client = FilesystemClient::new(HttpClient::plaintext(), ClientConfig::new(URL.parse()?));
        let path = dir.to_str().context("the path is text")?.to_owned();
        let mut events = client.watch_dir(WatchDirRequest { path, ..Default::default() }).await?;
        let mut times = Vec::new();
        let mut before = None::<Instant>;
        while times.len() < repeats as usize {
            let message = events.message().await?.context("the watch ended")?.to_owned_message();
            match (message.event, before) {
                (Some(watch_dir_response::Event::Start(_)), _) => {}
                (Some(watch_dir_response::Event::Filesystem(_)), Some(before)) => times.push(before.elapsed()),
                _ => continue,
            }
            before = Some(Instant::now());
            std::fs::create_dir(dir.join(times.len().to_string()))?;
        }
        std::fs::remove_dir_all(&dir)?;
        Ok(times)
    }

    async fn post(&self, path: &Path, body: Body) -> Result<()> {
        let query = [("path", path.to_str().context("the path is text")?)];
        let request = self.http.post(format!("{URL}/files")).query(&query);
        request.header("content-type", "application/octet-stream").body(body).send().await?.error_for_status()?;
        Ok(())
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn processes() -> Result<ProcessClient<HttpClient>> {
    Ok(ProcessClient::new(HttpClient::plaintext(), ClientConfig::new(URL.parse()?)))
}

async fn command(processes: &ProcessClient<HttpClient>) -> Result<()> {
    let process = ProcessConfig { cmd: "/bin/true".into(), ..Default::default() };
    let mut stream = processes.start(StartRequest { process: process.into(), ..Default::default() }).await?;
    while let Some(message) = stream.message().await? {
        let message = message.to_owned_message();
        if let Some(Event::End(end)) = message.event.into_option().and_then(|event| event.event) {
            ensure!(end.exit_code == 0, "the command failed");
            return Ok(());
        }
    }
    bail!("the command did not end")
}

fn by(pid: u32) -> ProcessSelector {
    ProcessSelector { selector: Some(process_selector::Selector::Pid(pid)), ..Default::default() }
}
