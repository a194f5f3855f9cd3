//! `wrenn up`: control plane and agent in one process, on one machine, with a file for a database and a folder for the rest.

pub mod tls;

use std::fs::{self, File, Permissions, TryLockError};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use ::agent::Agent;
use ::control::Control;
use agent_api::Endpoint;
use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use proxy::Tls;
use serde::Serialize;
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;

use self::tls::{Authority, Names};
use crate::current::Current;
use crate::host::HostArgs;
use crate::terminal::{Interrupts, Progress};
use crate::{images, terminal, vmm_choice};

/// Where everything is kept unless told otherwise.
pub const DIR: &str = "/var/lib/wrenn";

/// Starts Wrenn on this machine: API, host agent, database and disks, all below one directory.
#[derive(Debug, Args)]
pub struct Up {
    /// Where everything is kept.
    #[arg(long, env = "WRENN_DIR", default_value = DIR)]
    dir: PathBuf,
    /// Address of the API; port 0 takes a free one.
    #[arg(long, env = "WRENN_LISTEN", default_value = "127.0.0.1:9725")]
    listen: String,
    /// Speak HTTPS, with certificates of an authority of this directory's own (DIR/tls/ca.pem, for clients to trust).
    #[arg(long, env = "WRENN_TLS")]
    tls: bool,
    /// Domain of capsules' hosts, which has to lead to this machine with all that is below it.
    #[arg(long, env = "WRENN_DOMAIN", default_value = "localhost", value_parser = domain)]
    domain: String,
    #[command(flatten)]
    host: HostArgs,
    /// Database to use in place of a file in the directory.
    #[arg(long, env = "DATABASE_URL", hide_env_values = true)]
    database_url: Option<String>,
    /// Print one line of JSON when ready: {"url","api_key","domain","ca","pid"}; `ca` is null without --tls.
    #[arg(long)]
    json: bool,
}

/// How long a directory may be in use before that is an error, and the pause between two looks.
const LOCK_LIMIT: Duration = Duration::from_secs(2);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// The line that says that all is ready.
#[derive(Serialize)]
struct Ready {
    url: String,
    api_key: String,
    domain: String,
    /// What has to be trusted.
    ca: Option<PathBuf>,
    pid: u32,
}

impl Up {
    /// Runs until ctrl-C or SIGTERM, then pauses every capsule and gives back everything but the data.
    pub async fn run(self) -> Result<ExitCode> {
        let progress = Progress::new(self.json);
        let dir = prepare_dir(&self.dir)?;
        let _lock = lock(&dir).await?;

        let choice = vmm_choice::choose(self.host.vmm.as_deref()).await?;
        progress.say(&choice.sentence);
        let images = images::prepare(&images::cache()?, &progress).await?;

        progress.say("opening networks and disks");
        let config = self.host.config(dir.clone(), choice.binary, images)?;
        let agent = Agent::open(config).await.context("starting the agent")?;
        let mut interrupts = Interrupts::listen()?;
        let socket = agent.socket();
        let agent_listener = bind(&socket)?;

        let listener =
            TcpListener::bind(&self.listen).await.with_context(|| format!("listening on {}", self.listen))?;
        let address = listener.local_addr()?;
        let database_url = match self.database_url {
            Some(url) => url,
            None => ::control::sqlite_url(&dir.join("wrenn.db")),
        };
        let authority = match self.tls {
            true => Some(Arc::new(Authority::open(&dir, names(&self.domain, address))?)),
            false => None,
        };
        let domain = format!("{}:{}", self.domain, address.port());
        let control = Control::open(::control::Config {
            database_url,
            agent: Endpoint::Unix(socket.clone()),
            version: env!("CARGO_PKG_VERSION").into(),
        })
        .await
        .context("starting the control plane")?;
        let api_key = api_key(&dir, &control).await?;

        let shutdown = CancellationToken::new();
        let agent_server =
            tokio::spawn(proxy::serve(agent_listener, agent.router(), shutdown.clone().cancelled_owned()));
        let forget = tokio::spawn(agent.clone().forget_ended(shutdown.clone().cancelled_owned()));
        let watch = tokio::spawn(agent.clone().watch_capsules(shutdown.clone().cancelled_owned()));
        let stop = shutdown.clone().cancelled_owned();
        let secure = authority.clone().map(Authority::config).transpose()?;
        let control_server = tokio::spawn(async move {
            match secure {
                Some(config) => control.run(Tls::new(listener, config), stop).await,
                None => control.run(listener, stop).await,
            }
        });

        let scheme = if self.tls { "https" } else { "http" };
        let url = format!("{scheme}://{}", reached_at(address));
        let ca = authority.is_some().then(|| tls::certificate_path(&dir));
        let ready = Ready { url, api_key, domain, ca, pid: std::process::id() };
        let current = Current::new(&dir, &ready.url, &ready.api_key, authority.as_ref().map(|ca| ca.certificate()));
        crate::current::write(&current)?;
        progress.ready(
            &ready,
            &ready.url,
            &ready.api_key,
            authority.is_some().then(|| tls::bundle_path(&dir)).as_deref(),
        )?;

        interrupts.next().await;
        progress.say("pausing all capsules (press ctrl-C again to leave at once)");
        let next = format!("the next `wrenn up --dir {}` takes over what still runs", dir.display());
        let unpaused = tokio::select! {
            unpaused = agent.pause_all() => unpaused,
            () = interrupts.next() => {
                // What is being written would be waited for otherwise. It is as if the machine had lost power.
                terminal::error(&anyhow!("left at once; {next}"));
                std::process::exit(1)
            }
        };
        shutdown.cancel();
        control_server.await?.context("the control plane")?;
        agent_server.await.context("the agent's listener")?;
        forget.await?;
        watch.await?;
        fs::remove_file(&socket)?;
        crate::current::remove(&dir)?;
        if let Some((id, reason)) = unpaused.first() {
            bail!("{} capsules could not be paused, {id} because of: {reason}; {next}", unpaused.len());
        }
        agent.close().await.context("closing the agent")?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A host name without a port.
fn domain(text: &str) -> Result<String, &'static str> {
    let is_label = |label: &str| {
        (1..64).contains(&label.len()) && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    let is_name = text.len() < 200 && text.split('.').all(is_label) && text.parse::<std::net::IpAddr>().is_err();
    if is_name { Ok(text.to_ascii_lowercase()) } else { Err("it is a host name, without a port") }
}

fn names(domain: &str, address: SocketAddr) -> Names {
    let addresses = Some(address.ip()).filter(|address| !address.is_unspecified() && !address.is_loopback());
    Names { domain: domain.to_owned(), addresses: addresses.into_iter().collect() }
}

/// An address that can be dialled on this machine.
fn reached_at(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => (std::net::Ipv4Addr::LOCALHOST, v4.port()).into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => (std::net::Ipv6Addr::LOCALHOST, v6.port()).into(),
        address => address,
    }
}

/// The data directory, made if need be, for this user alone, in its one true spelling.
pub fn prepare_dir(dir: &Path) -> Result<PathBuf> {
    let missing = crate::doctor::NEEDED.difference(rustix::thread::capabilities(None)?.effective);
    if !missing.is_empty() {
        bail!(
            "this needs root: it makes network namespaces, mounts and control groups; `wrenn doctor` says what it lacks"
        );
    }
    fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    Ok(dir.canonicalize()?)
}

/// Holds the directory for this process alone. The kernel lets go when it ends, however it ends; of one that was killed
/// while it started a VMM, a child may hold it for a moment longer.
pub async fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path)?;
    let locked = async {
        loop {
            match file.try_lock() {
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_PAUSE).await,
                Err(TryLockError::Error(error)) => return Err(error),
                Ok(()) => return Ok(()),
            }
        }
    };
    match tokio::time::timeout(LOCK_LIMIT, locked).await {
        Ok(locked) => locked.with_context(|| format!("locking {}", path.display()))?,
        Err(_) => bail!("another wrenn uses {}; give this one its own --dir", dir.display()),
    }
    Ok(file)
}

/// A socket that only root reaches, whatever an earlier run left in its place.
fn bind(path: &Path) -> Result<UnixListener> {
    let dir = path.parent().context("a socket has a directory")?;
    fs::create_dir_all(dir)?;
    fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))
}

/// The key that this directory's first start issued, or a new one if it is lost.
async fn api_key(dir: &Path, control: &Control) -> Result<String> {
    let path = dir.join("api-key");
    if let Ok(key) = fs::read_to_string(&path)
        && control.knows_key(key.trim()).await?
    {
        return Ok(key.trim().to_owned());
    }
    let team = control.ensure_team(&"default".parse()?).await?;
    let key = control.issue_key(team, "wrenn up").await?;
    let new = path.with_extension("new");
    fs::write(&new, &key)?;
    fs::set_permissions(&new, Permissions::from_mode(0o600))?;
    fs::rename(new, path)?;
    Ok(key)
}
