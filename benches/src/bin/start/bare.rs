//! The peer: the VMM by hand, in a network namespace that has a tap and nothing else.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use api::CapsuleId;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::sync::CancellationToken;

use super::ours::Ours;

/// The guest's envd, from inside the namespace.
const GUEST: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(169, 254, 0, 21)), 49983);
/// Both as in the agent: a packet lost before the guest is up is repeated only after a second, so dial anew.
const DIAL: Duration = Duration::from_millis(50);
const REFUSED: Duration = Duration::from_millis(2);
/// From the exec to the first answer; a start that takes longer is a failure.
const LIMIT: Duration = Duration::from_secs(90);

/// What is started by hand.
pub struct Command {
    program: PathBuf,
    /// Arguments, among them the root disk of the capsule they were taken from.
    args: Vec<String>,
    /// Firecracker's configuration; its file is the last argument.
    config: Option<Value>,
    /// That root disk as it stands in the arguments.
    disk: String,
    /// The image that the disk begins as.
    image: PathBuf,
}

impl Command {
    /// What runs the guest of a running capsule, without what only a managed VMM has: the control socket and waiting for
    /// it, the memory that another process owns, dirty page tracking and its plugin, the sandbox.
    pub async fn of(ours: &Ours, id: &CapsuleId) -> Result<Self> {
        let disk = Path::new(vmm::CAPSULE_DIR).join("rootfs.ext4").display().to_string();
        let kernel = ours.kernel().display().to_string();
        let image = std::fs::read_dir(ours.root().join("images"))?.next().context("the agent has no image")??.path();
        if ours.vmm().ends_with("firecracker") {
            // In its jail it is the only process.
            let pid = ours.pids(id)?.first().copied().context("the capsule has no VMM")?;
            let scratch = Path::new(vmm::CAPSULE_DIR).join(vmm::SCRATCH_DIR).join(vmm::API_SOCKET);
            let socket = PathBuf::from(format!("/proc/{pid}/root{}", scratch.display()));
            let mut config = vm_config(&socket).await?;
            config["boot-source"]["kernel_image_path"] = json!(kernel);
            config["machine-config"]["track_dirty_pages"] = json!(false);
            let args = ["--no-api", "--config-file"].map(str::to_owned).into();
            return Ok(Self { program: ours.vmm().to_owned(), args, config: Some(config), disk, image });
        }
        for pid in ours.pids(id)? {
            let line = std::fs::read(format!("/proc/{pid}/cmdline"))?;
            let line: Vec<String> =
                line.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
            if line[0].ends_with("qemu-system-x86_64") {
                let args = unmanaged(&line[1..line.len() - 1])?;
                let args = args.iter().map(|word| word.replace(vmm::KERNEL, &kernel)).collect();
                return Ok(Self { program: line[0].clone().into(), args, config: None, disk, image });
            }
        }
        bail!("the capsule has no QEMU")
    }
}

/// QEMU's arguments without the management of `firecracker-qemu`.
fn unmanaged(args: &[String]) -> Result<Vec<String>> {
    let mut kept = Vec::new();
    let mut args = args.iter();
    while let Some(flag) = args.next() {
        if ["-nodefaults", "-no-user-config", "-no-reboot"].contains(&flag.as_str()) {
            kept.push(flag.clone());
            continue;
        }
        if flag == "-S" {
            continue;
        }
        let value = args.next().with_context(|| format!("{flag} has no value"))?;
        let managed = ["-mon", "-plugin", "-sandbox"].contains(&flag.as_str()) || value.contains("id=monitor");
        if managed {
            continue;
        }
        let mut value = value.clone();
        if flag == "-object" && value.contains("memory-backend-file") {
            let mut object: Value = serde_json::from_str(&value)?;
            object["qom-type"] = json!("memory-backend-memfd");
            object.as_object_mut().context("an object is JSON's")?.remove("mem-path");
            value = object.to_string();
        }
        kept.extend([flag.clone(), value]);
    }
    Ok(kept)
}

/// `GET /vm/config`, which is also what `--config-file` takes.
async fn vm_config(socket: &Path) -> Result<Value> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(b"GET /vm/config HTTP/1.1\r\nHost: localhost\r\n\r\n").await?;
    let mut answer = Vec::new();
    loop {
        if stream.read_buf(&mut answer).await? == 0 {
            bail!("the VMM closed the connection in its answer");
        }
        let text = String::from_utf8_lossy(&answer);
        if let Some((_, body)) = text.split_once("\r\n\r\n")
            && let Ok(config) = serde_json::from_str(body)
        {
            return Ok(config);
        }
    }
}

/// A network namespace with the tap that a slot has; removed when dropped.
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes it, with the guest's permanent neighbour entry.
    pub fn create() -> Result<Self> {
        let name = format!("wrenn-bench-{}", std::process::id());
        ip(&["netns", "add", &name])?;
        let netns = Self { name };
        for line in [
            "link set lo up",
            "tuntap add tap0 mode tap vnet_hdr",
            "addr add 169.254.0.22/30 dev tap0",
            "link set tap0 up txqueuelen 5000",
            "neigh replace 169.254.0.21 lladdr 02:fc:00:00:00:05 dev tap0 nud permanent",
        ] {
            let mut words = vec!["-n", &netns.name];
            words.extend(line.split(' '));
            ip(&words)?;
        }
        Ok(netns)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _ = ip(&["netns", "del", &self.name]);
    }
}

fn ip(words: &[&str]) -> Result<()> {
    let status = std::process::Command::new("ip").args(words).status().context("running ip (package iproute2)")?;
    if !status.success() {
        bail!("ip {}: {status}", words.join(" "));
    }
    Ok(())
}

/// The peer, ready to be started again and again.
pub struct Bare {
    pub command: Command,
    /// Where its root disk goes, on the file system of the image.
    pub disk: PathBuf,
    pub netns: Netns,
}

impl Bare {
    /// Starts it on a fresh disk, waits for envd's first answer and ends it. The time from the exec to the answer.
    pub async fn start(&self, stop: &CancellationToken) -> Result<Duration> {
        clone(&self.command.image, &self.disk)?;
        let config = self.disk.with_extension("json");
        let mut command = tokio::process::Command::new(&self.command.program);
        let path = self.disk.display().to_string();
        command.args(self.command.args.iter().map(|word| word.replace(&self.command.disk, &path)));
        if let Some(value) = &self.command.config {
            std::fs::write(&config, value.to_string().replace(&self.command.disk, &path))?;
            command.arg(&config);
        }
        command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        let netns = std::fs::File::open(format!("/run/netns/{}", self.netns.name))?;
        let stop = stop.clone();
        // A thread of its own is in the namespace, and so are the process and the sockets that it makes.
        let taken = tokio::task::spawn_blocking(move || {
            std::thread::spawn(move || {
                move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(run(command, stop))
            })
            .join()
        });
        let taken = taken.await?;
        std::fs::remove_file(&self.disk)?;
        if self.command.config.is_some() {
            std::fs::remove_file(&config)?;
        }
        taken.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// From exec to answer, and then to the process's end.
async fn run(mut command: tokio::process::Command, stop: CancellationToken) -> Result<Duration> {
    let begin = Instant::now();
    let mut child = command.spawn().context("starting the bare VMM")?;
    let answered = tokio::select! {
        answered = first_answer() => answered.map(|()| begin.elapsed()),
        status = child.wait() => Err(anyhow::anyhow!("the bare VMM ended: {}", status?)),
        () = tokio::time::sleep(LIMIT) => Err(anyhow::anyhow!("the bare guest did not answer within {} s", LIMIT.as_secs())),
        () = stop.cancelled() => Err(anyhow::anyhow!("interrupted")),
    };
    child.kill().await.ok();
    answered
}

/// `GET /health`, asked until there is somebody to ask.
async fn first_answer() -> Result<()> {
    let mut stream = loop {
        match tokio::time::timeout(DIAL, TcpStream::connect(GUEST)).await {
            Ok(Ok(stream)) => break stream,
            Ok(Err(_)) => tokio::time::sleep(REFUSED).await,
            Err(_) => {}
        }
    };
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n").await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    if !answer.starts_with("HTTP/1.1 2") {
        bail!("envd answered {}", answer.lines().next().unwrap_or("nothing"));
    }
    Ok(())
}

/// A disk that begins as `image` and shares its blocks, like a capsule's.
fn clone(image: &Path, disk: &Path) -> Result<()> {
    let (from, to) = (std::fs::File::open(image)?, std::fs::File::create(disk)?);
    rustix::fs::ioctl_ficlone(&to, &from).context("sharing the image's blocks; is the disk back end `reflink`?")
}
