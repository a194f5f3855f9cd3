//! A throw-away PostgreSQL: our own cluster in a temporary directory, reachable by a socket file only.
//!
//! A guardian shell owns it. It ends the server and removes the directory when our end of its standard input closes, which
//! happens when the value is dropped and also when the process is killed.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// Initialises and runs a cluster until its standard input ends. `$1`: PostgreSQL's programs; `$2`: the directory.
const GUARDIAN: &str = r#"
set -e
cd "$2"
trap 'cd /; rm -rf "$2"' EXIT
trap : INT TERM HUP
"$1/initdb" --pgdata="$2/data" --username=wrenn --auth=trust --encoding=UTF8 --locale=C --no-sync >"$2/log" 2>&1 ||
    { cat "$2/log" >&2; exit 1; }
"$1/postgres" -D "$2/data" -k "$2" -c listen_addresses= -c fsync=off -c full_page_writes=off -c synchronous_commit=off \
    -c max_connections=500 -c shared_buffers=16MB </dev/null >>"$2/log" 2>&1 &
until "$1/pg_isready" -q -h "$2"; do
    kill -0 $! || { cat "$2/log" >&2; exit 1; }
    sleep 0.05
done
echo ready
exec >/dev/null 2>&1
read -r _ || true
kill -INT $!
wait $! || true
"#;

/// A running cluster.
pub struct Postgres {
    guardian: Child,
    bin: PathBuf,
    dir: PathBuf,
    databases: AtomicU32,
}

impl Postgres {
    /// Starts a cluster of its own.
    pub fn start() -> Self {
        let bin = programs();
        let dir = tempfile::Builder::new().prefix("wrenn-postgres-").tempdir().expect("a temporary directory").keep();
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", GUARDIAN, "guardian"]).arg(&bin).arg(&dir).stdin(Stdio::piped()).stdout(Stdio::piped());
        // A ctrl-C is meant for us; the guardian sees our end.
        shell.process_group(0);
        if let Some((uid, gid)) = someone_else() {
            chown(&dir, Some(uid), Some(gid)).expect("root may give a directory away");
            shell.uid(uid).gid(gid);
        }
        let mut guardian = shell.spawn().expect("a shell");
        let mut line = String::new();
        BufReader::new(guardian.stdout.as_mut().expect("it is piped"))
            .read_line(&mut line)
            .expect("a pipe can be read");
        assert_eq!(line.trim(), "ready", "PostgreSQL did not start; see above");
        Self { guardian, bin, dir, databases: AtomicU32::new(0) }
    }

    /// The cluster all tests of this process share.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Postgres> = OnceLock::new();
        SHARED.get_or_init(Self::start)
    }

    /// The address of a new, empty database.
    pub fn database(&self) -> String {
        let name = format!("test{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let created = Command::new(self.bin.join("createdb"))
            .args(["--username=wrenn", "--host"])
            .arg(&self.dir)
            .arg(&name)
            .status();
        assert!(created.expect("createdb runs").success(), "createdb failed");
        format!("postgres://wrenn@localhost/{name}?host={}", self.dir.display())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        drop(self.guardian.stdin.take());
        // Nothing is to be done about a guardian that failed to end.
        let _ = self.guardian.wait();
    }
}

/// Where Debian keeps the programs of the newest PostgreSQL that is installed.
fn programs() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let version = |path: &Path| path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok());
    let newest = versions
        .map(|entry| entry.path())
        .filter(|path| path.join("bin/initdb").exists())
        .max_by_key(|path| version(path));
    newest.expect("PostgreSQL is installed: apt-get install postgresql").join("bin")
}

/// Whom to be instead of root, whom PostgreSQL refuses.
fn someone_else() -> Option<(u32, u32)> {
    let of = |path: &str| std::fs::metadata(path).ok().map(|meta| std::os::unix::fs::MetadataExt::uid(&meta));
    if of("/proc/self") != Some(0) {
        return None;
    }
    let users = std::fs::read_to_string("/etc/passwd").expect("a list of users");
    let ids = |name: &str| {
        let mut fields = users.lines().find(|line| line.split(':').next() == Some(name))?.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    Some(ids("postgres").or_else(|| ids("nobody")).expect("a user without rights"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_of_a_cluster() {
        let postgres = Postgres::start();
        let dir = postgres.dir.clone();
        let pid: i32 =
            std::fs::read_to_string(dir.join("data/postmaster.pid")).unwrap().lines().next().unwrap().parse().unwrap();
        assert!(postgres.database().starts_with("postgres://"));
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        drop(postgres);
        assert!(!dir.exists());
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }
}
