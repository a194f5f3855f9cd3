//! The peer: OpenSSH's server on a port of its own, with keys of its own, and its clients.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Data;

const PORT: &str = "2222";

/// A server, and the connection that its clients share. Dropping it ends the server.
pub struct Ssh {
    server: Child,
    dir: PathBuf,
}

impl Ssh {
    pub fn start(dir: &Path) -> Result<Ssh> {
        std::fs::create_dir_all(dir)?;
        for key in ["host", "user"] {
            run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.join(key)))?;
        }
        let path = |name: &str| dir.join(name).display().to_string();
        let config = format!(
            "Port {PORT}\nListenAddress 127.0.0.1\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\n\
             PermitRootLogin yes\nPasswordAuthentication no\nSubsystem sftp internal-sftp\nMaxStartups 100\nPrintMotd no\n",
            path("host"),
            path("user.pub")
        );
        std::fs::write(dir.join("sshd_config"), config)?;
        let client = format!(
            "Host bench\nHostName 127.0.0.1\nPort {PORT}\nUser root\nIdentityFile {}\nIdentitiesOnly yes\n\
             StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\nCompression no\nConnectionAttempts 20\n\
             ControlPath {}\nControlPersist 600\n",
            path("user"),
            path("control")
        );
        std::fs::write(dir.join("ssh_config"), client)?;
        // Where it separates privileges; of this mount namespace alone.
        run(Command::new("mount").args(["-t", "tmpfs", "bench", "/run"]))?;
        std::fs::create_dir_all("/run/sshd")?;
        let server = Command::new("/usr/sbin/sshd")
            .args(["-D", "-e", "-f"])
            .arg(dir.join("sshd_config"))
            .stderr(std::fs::File::create(dir.join("log"))?)
            .spawn()
            .context("running /usr/sbin/sshd; Debian's openssh-server has it")?;
        let ssh = Ssh { server, dir: dir.to_owned() };
        // The client tries again, once a second, until the server listens.
        let ready = ssh.client("ssh", true).arg("true").status()?;
        ensure!(ready.success(), "sshd does not let us in: {}", std::fs::read_to_string(dir.join("log"))?);
        Ok(ssh)
    }

    pub fn commands(&self, repeats: u32) -> Result<Vec<Duration>> {
        (0..repeats).map(|_| timed(self.client("ssh", true).arg("/bin/true"))).collect()
    }

    pub fn cold_commands(&self, repeats: u32) -> Result<Vec<Duration>> {
        (0..repeats).map(|_| timed(self.client("ssh", false).arg("/bin/true"))).collect()
    }

    /// A key's way to a raw terminal and back.
    pub fn echo(&self, repeats: u32) -> Result<Vec<Duration>> {
        let mut command = self.client("ssh", true);
        command.args(["-tt", "stty raw -echo; echo ready; exec cat"]);
        // Our end is not a terminal, so that nothing of this machine's echoes.
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (mut keys, mut shown) = (child.stdin.take().context("a pipe")?, child.stdout.take().context("a pipe")?);
        let mut seen = Vec::new();
        let mut byte = [0];
        while !seen.ends_with(b"ready\r\n") && !seen.ends_with(b"ready\n") {
            shown.read_exact(&mut byte)?;
            seen.push(byte[0]);
        }
        let times = (0..repeats).map(|_| {
            let before = Instant::now();
            keys.write_all(b"k")?;
            keys.flush()?;
            shown.read_exact(&mut byte)?;
            Ok(before.elapsed())
        });
        let times = times.collect();
        child.kill()?;
        child.wait()?;
        times
    }

    pub fn upload_many(&self, data: &Data) -> Result<Vec<Duration>> {
        let target = self.dir.join("many");
        let _ = std::fs::remove_dir_all(&target);
        let batch = self.dir.join("batch");
        std::fs::write(&batch, format!("put -r {} {}\n", data.small.display(), target.display()))?;
        let mut command = self.client("sftp", true);
        command.stdout(Stdio::null());
        // A batch must come before the host's name.
        let mut words: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        let host = words.pop().context("the host's name is last")?;
        let mut command = Command::new("sftp");
        command.args(words).arg("-b").arg(&batch).arg(host).stdout(Stdio::null());
        let time = timed(&mut command)?;
        if std::fs::read_dir(&target)?.count() != data.names.len() {
            bail!("sftp lost files");
        }
        Ok(vec![time])
    }

    pub fn upload(&self, large: &Path) -> Result<Vec<Duration>> {
        let _ = std::fs::remove_file(self.dir.join("large"));
        let target = format!("bench:{}", self.dir.join("large").display());
        Ok(vec![timed(self.copy().arg(large).arg(target))?])
    }

    pub fn download(&self, target: &Path) -> Result<Vec<Duration>> {
        let source = format!("bench:{}", self.dir.join("large").display());
        Ok(vec![timed(self.copy().arg(source).arg(target))?])
    }

    fn copy(&self) -> Command {
        let mut command = Command::new("scp");
        command.arg("-q").arg("-F").arg(self.dir.join("ssh_config")).args(["-o", "ControlMaster=auto"]);
        command
    }

    fn client(&self, program: &str, shared: bool) -> Command {
        let mut command = Command::new(program);
        command.arg("-F").arg(self.dir.join("ssh_config"));
        command.args(["-o", if shared { "ControlMaster=auto" } else { "ControlPath=none" }]);
        command.arg("bench").stdin(Stdio::null());
        command
    }
}

impl Drop for Ssh {
    fn drop(&mut self) {
        let _ = self.client("ssh", true).args(["-O", "exit"]).status();
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn timed(command: &mut Command) -> Result<Duration> {
    let before = Instant::now();
    run(command)?;
    Ok(before.elapsed())
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("running {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{command:?} failed: {status}");
    }
    Ok(())
}
