//! Host name, hosts and resolver. Files that the image has prepared are left alone.

use std::io;
use std::path::Path;

const HOST: &str = "capsule";
const RESOLVERS: &str = "nameserver 8.8.8.8\nnameserver 8.8.4.4\n";

pub fn set() -> io::Result<()> {
    rename(HOST)?;
    fill_resolver(Path::new("/etc/resolv.conf"))
}

/// Gives the host a name, which it also finds itself by.
pub fn rename(name: &str) -> io::Result<()> {
    let before = rustix::system::uname().nodename().to_string_lossy().into_owned();
    rustix::system::sethostname(name.as_bytes())?;
    if before != name {
        unname_in_hosts(Path::new("/etc/hosts"), &before)?;
    }
    name_in_hosts(Path::new("/etc/hosts"), name)
}

/// Takes away the line that we or the image wrote for a former name.
fn unname_in_hosts(path: &Path, host: &str) -> io::Result<()> {
    let text = read(path)?;
    let ours = format!("127.0.1.1 {host}");
    if !text.lines().any(|line| line == ours) {
        return Ok(());
    }
    let rest: String = text.lines().filter(|line| *line != ours).map(|line| format!("{line}\n")).collect();
    std::fs::write(path, rest)
}

/// The host must know its own name, or `sudo` asks a name server for it.
fn name_in_hosts(path: &Path, host: &str) -> io::Result<()> {
    let text = read(path)?;
    let named =
        |line: &str| line.split('#').next().unwrap_or_default().split_whitespace().skip(1).any(|name| name == host);
    if text.lines().any(named) {
        return Ok(());
    }
    let mut text = if text.is_empty() { "127.0.0.1 localhost\n::1 localhost\n".to_owned() } else { text };
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(&format!("127.0.1.1 {host}\n"));
    std::fs::write(path, text)
}

fn fill_resolver(path: &Path) -> io::Result<()> {
    if !read(path)?.trim().is_empty() {
        return Ok(());
    }
    // It may be a link to a file that only another init would have made.
    if std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink()) {
        std::fs::remove_file(path)?;
    }
    std::fs::write(path, RESOLVERS)
}

fn read(path: &Path) -> io::Result<String> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_gains_the_name_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        std::fs::write(&path, "127.0.0.1 localhost # capsule\n10.0.0.1 other").unwrap();
        name_in_hosts(&path, HOST).unwrap();
        name_in_hosts(&path, HOST).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "127.0.0.1 localhost # capsule\n10.0.0.1 other\n127.0.1.1 capsule\n");
        name_in_hosts(&path, "fork-1").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{text}127.0.1.1 fork-1\n"));
        unname_in_hosts(&path, "fork-1").unwrap();
        unname_in_hosts(&path, "other").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn a_missing_hosts_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hosts");
        name_in_hosts(&path, HOST).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 capsule\n");
    }

    #[test]
    fn the_resolver_is_filled_only_if_empty() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("resolv.conf");
        std::os::unix::fs::symlink("/nonexistent/stub", &path).unwrap();
        fill_resolver(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), RESOLVERS);
        std::fs::write(&path, "nameserver 1.1.1.1\n").unwrap();
        fill_resolver(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "nameserver 1.1.1.1\n");
    }
}
