//! The proxies, each as a process group whose processor time is counted.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::servers::{self, Process};

/// How long a proxy may take to listen.
const START: Duration = Duration::from_secs(20);

/// One proxy that listens.
pub struct Proxy {
    pub name: &'static str,
    pub address: SocketAddr,
    process: Option<Process>,
}

impl Proxy {
    /// Ours.
    pub fn ours(upstream: SocketAddr) -> Result<Self> {
        let (process, address) = servers::spawn(&["ours", &upstream.to_string()])?;
        Ok(Self { name: "ours", address, process: Some(process) })
    }

    /// Nobody between client and server.
    pub fn none(upstream: SocketAddr) -> Self {
        Self { name: "none", address: upstream, process: None }
    }

    pub fn nginx(dir: &Path, upstream: SocketAddr) -> Result<Self> {
        let address = free_address()?;
        let place = dir.display();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {place}/nginx-{kind};\n"))
            .concat();
        let config = format!(
            "daemon off;\nworker_processes {};\npid {place}/nginx.pid;\nerror_log {place}/nginx.log;\n\
             events {{ worker_connections 4096; }}\n\
             http {{\naccess_log off;\n{temporary}\
             map $http_upgrade $connection_upgrade {{ default upgrade; '' ''; }}\n\
             upstream app {{ server {upstream}; keepalive 64; keepalive_requests 1000000000; }}\n\
             server {{\nlisten {address};\nkeepalive_requests 1000000000;\ntcp_nodelay on;\n\
             location / {{\nproxy_pass http://app;\nproxy_http_version 1.1;\nproxy_buffering off;\nproxy_buffer_size 64k;\nproxy_buffers 8 64k;\n\
             proxy_request_buffering off;\nproxy_set_header Host $http_host;\nproxy_set_header Upgrade $http_upgrade;\n\
             proxy_set_header Connection $connection_upgrade;\nproxy_set_header X-Forwarded-For $remote_addr;\n\
             proxy_set_header X-Forwarded-Host $http_host;\nproxy_set_header X-Forwarded-Proto $scheme;\n}}\n}}\n}}\n",
            threads()
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, config)?;
        let mut command = Command::new("/usr/sbin/nginx");
        command.arg("-c").arg(file).arg("-e").arg(dir.join("nginx.log"));
        Self::start("nginx", address, &mut command)
    }

    pub fn haproxy(dir: &Path, upstream: SocketAddr) -> Result<Self> {
        let address = free_address()?;
        let config = format!(
            "global\n nbthread {}\n maxconn 4096\n\
             defaults\n mode http\n option http-keep-alive\n option forwardfor\n http-reuse always\n timeout connect 5s\n \
             timeout client 620s\n timeout server 620s\n timeout tunnel 620s\n\
             frontend front\n bind {address}\n http-request set-header X-Forwarded-Host %[req.hdr(Host)]\n \
             http-request set-header X-Forwarded-Proto http\n default_backend back\n\
             backend back\n server app {upstream}\n",
            threads()
        );
        let file = dir.join("haproxy.cfg");
        fs::write(&file, config)?;
        Self::start("haproxy", address, Command::new("/usr/sbin/haproxy").args(["-db", "-f"]).arg(file))
    }

    pub fn caddy(dir: &Path, upstream: SocketAddr) -> Result<Self> {
        let address = free_address()?;
        let config = format!(
            "{{\n\tadmin off\n\tauto_https off\n}}\nhttp://:{} {{\n\tbind 127.0.0.1\n\
             \treverse_proxy {upstream} {{\n\t\tflush_interval -1\n\t\ttransport http {{\n\t\t\tcompression off\n\
             \t\t\tkeepalive_idle_conns_per_host 64\n\t\t}}\n\t}}\n}}\n",
            address.port()
        );
        let file = dir.join("Caddyfile");
        fs::write(&file, config)?;
        let mut command = Command::new("caddy");
        command.args(["run", "--adapter", "caddyfile", "--config"]).arg(file);
        command.env("HOME", dir).env("XDG_DATA_HOME", dir).env("XDG_CONFIG_HOME", dir);
        Self::start("Caddy", address, command.env("GOMAXPROCS", threads().to_string()))
    }

    fn start(name: &'static str, address: SocketAddr, command: &mut Command) -> Result<Self> {
        let process = Process::start(command.stdout(Stdio::null()).stderr(Stdio::null()))?;
        let begun = Instant::now();
        while TcpStream::connect(address).is_err() {
            if begun.elapsed() > START {
                bail!("{name} does not listen");
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
        Ok(Self { name, address, process: Some(process) })
    }

    /// The processor time it has used so far.
    pub fn cpu(&self) -> Result<Duration> {
        let Some(process) = &self.process else { return Ok(Duration::ZERO) };
        let group = process.0.id().to_string();
        let mut ticks = 0;
        for entry in fs::read_dir("/proc")?.flatten() {
            // One that ends meanwhile is none of ours, which all live on.
            let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
            // What follows the name, which may have anything in it: state, parent, group, …
            let fields: Vec<&str> = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split(' ').collect();
            if fields.get(2) == Some(&group.as_str()) {
                let time = |index: usize| fields.get(index).and_then(|text| text.parse::<u64>().ok());
                ticks += time(11).zip(time(12)).map(|(user, system)| user + system).context("a stat without times")?;
            }
        }
        Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
    }
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
