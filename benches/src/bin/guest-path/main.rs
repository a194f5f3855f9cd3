//! Benchmark `guest-path`: envd beside OpenSSH, for what a person does in a guest.
//!
//! Both are ordinary processes of this machine, in a network namespace of their own with nothing but its loopback, and
//! their clients are there too:
//!
//! - *ours*: this process, over pooled HTTP connections, as the agent reaches envd;
//! - *ssh*: OpenSSH's own clients over one connection that stands already (`ControlMaster`), which spares it every
//!   handshake; `cold` is without.
//!
//! In turn, in every round: a command's round trip; a key's echo on a terminal; a thousand small files and one large one up,
//! and the large one down. Directories are on a tmpfs at both ends, so that no disk is measured. Only ours has watch events,
//! and their delay is printed without a peer.
//!
//! Needs root, Debian's openssh-server and `make build`. Leaves nothing on the machine.

mod ours;
mod ssh;
mod table;

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Parser;

use ours::Ours;
use ssh::Ssh;
use table::Figures;

/// Compares envd with OpenSSH.
#[derive(Debug, Parser)]
struct Args {
    /// Rounds that are counted, after one that is not.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Commands and key strokes of a round.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// Files of a round.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    files: u32,
    /// The large file, MiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    large_mib: u32,
    /// Print JSON in place of a Markdown table.
    #[arg(long)]
    json: bool,
    /// Set by the program itself, once it is in its namespaces.
    #[arg(long, hide = true)]
    inside: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    if !rustix::process::geteuid().is_root() {
        bail!("this needs root: it makes namespaces");
    }
    if !args.inside {
        // The mount namespace is for the tmpfs: it goes with the last process in it.
        let script = "ip link set lo up && mount -t tmpfs -o size=8g bench /mnt && exec \"$0\" --inside \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--", "sh", "-c", script]);
        return Err(command.arg(std::env::current_exe()?).args(std::env::args_os().skip(1)).exec().into());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let figures = runtime.block_on(measure(&args))?;
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", figures.json())?;
    } else {
        write!(out, "{}", figures.markdown(&args))?;
    }
    Ok(())
}

/// What is sent.
struct Data {
    dir: PathBuf,
    large: PathBuf,
    small: PathBuf,
    names: Vec<String>,
}

impl Data {
    fn create(args: &Args) -> Result<Data> {
        let dir = Path::new("/mnt/data").to_owned();
        let (large, small) = (dir.join("large"), dir.join("small"));
        std::fs::create_dir_all(&small)?;
        let mut file = std::io::BufWriter::new(std::fs::File::create(&large)?);
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        // Nothing that a transport could compress.
        for _ in 0..args.large_mib * (1 << 20) / 8 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            file.write_all(&state.to_le_bytes())?;
        }
        file.flush()?;
        let names: Vec<String> = (0..args.files).map(|i| format!("file{i}")).collect();
        for name in &names {
            std::fs::write(small.join(name), vec![b'x'; 1024])?;
        }
        Ok(Data { dir, large, small, names })
    }
}

async fn measure(args: &Args) -> Result<Figures> {
    let data = Data::create(args).context("making the files")?;
    let ours = Ours::start(Path::new("/mnt/ours")).await.context("starting envd")?;
    let ssh = Ssh::start(Path::new("/mnt/ssh")).context("starting sshd")?;
    let mut figures = Figures::default();
    for round in 0..=args.rounds {
        let mut measured = Figures::default();
        measured.add("command", "ours", ours.commands(args.repeats).await?);
        measured.add("command", "ssh", ssh.commands(args.repeats)?);
        measured.add("command, cold", "ours", ours.cold_commands(args.repeats / 10 + 1).await?);
        measured.add("command, cold", "ssh", ssh.cold_commands(args.repeats / 10 + 1)?);
        measured.add("key echo", "ours", ours.echo(args.repeats).await?);
        measured.add("key echo", "ssh", ssh.echo(args.repeats)?);
        measured.add("small files up", "ours", ours.upload_many(&data).await?);
        measured.add("small files up", "ssh", ssh.upload_many(&data)?);
        measured.add("large file up", "ours", ours.upload(&data.large).await?);
        measured.add("large file up", "ssh", ssh.upload(&data.large)?);
        measured.add("large file down", "ours", ours.download(&data.dir.join("back")).await?);
        measured.add("large file down", "ssh", ssh.download(&data.dir.join("back"))?);
        measured.add("watch event", "ours", ours.watch(args.repeats).await?);
        if round > 0 {
            figures.extend(measured);
        }
    }
    Ok(figures)
}
