//! From a request to what the kernel needs: who, where, with which environment, which files to try. It starts nothing.

use crate::path;
use crate::settings::Defaults;
use crate::user::{self, User};
use guest_api::process::{ProcessConfig, StartRequest};
use rustix::termios::Winsize;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::path::PathBuf;

/// The search path of processes when envd was given none: what a Debian login offers.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/games:/usr/games";

/// Why a request cannot become a process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("invalid username: '{0}'")]
    UnknownUser(String),
    #[error("cannot read the user database")]
    UserDatabase(#[source] io::Error),
    #[error("cwd '{0}' does not exist")]
    NoDirectory(String),
    #[error("cwd '{0}' is not a directory")]
    NotDirectory(String),
    #[error("cwd: {0}")]
    Directory(path::Error),
    #[error("{0} holds a NUL byte")]
    Nul(&'static str),
    #[error("cmd is empty")]
    NoCommand,
    #[error("environment variable name '{0}' is empty or holds '='")]
    VariableName(String),
    #[error("terminal size {cols}x{rows} is out of range (0 to 65535)")]
    TerminalSize { cols: u32, rows: u32 },
}

/// Everything about a process before it exists.
pub struct Plan {
    /// As the caller gave it, for listings.
    pub config: ProcessConfig,
    pub tag: Option<String>,
    pub user: User,
    pub cwd: CString,
    pub argv: Vec<CString>,
    pub env: Vec<CString>,
    /// The paths to try for the program, in order.
    pub candidates: Vec<CString>,
    pub streams: Streams,
}

/// What a process has for input and output.
#[derive(Clone, Copy, Debug)]
pub enum Streams {
    /// Three pipes; without `stdin`, standard input is `/dev/null`.
    Pipes { stdin: bool },
    /// A terminal.
    Terminal(Winsize),
}

impl Plan {
    /// `username`: who the caller asked for, if anyone.
    pub fn new(request: StartRequest, username: Option<String>, defaults: Defaults) -> Result<Plan, Error> {
        let config = request.process.into_option().unwrap_or_default();
        if config.cmd.is_empty() {
            return Err(Error::NoCommand);
        }
        let streams = match request.pty.into_option() {
            None => Streams::Pipes { stdin: request.stdin.unwrap_or(true) },
            Some(pty) => {
                let size = pty.size.into_option().unwrap_or_default();
                Streams::Terminal(window(size.cols, size.rows)?)
            }
        };
        let name = username.unwrap_or(defaults.user);
        let user = match user::lookup(&name) {
            Ok(Some(user)) => user,
            Ok(None) => return Err(Error::UnknownUser(name)),
            Err(error) => return Err(Error::UserDatabase(error)),
        };
        let cwd = directory(config.cwd.as_deref(), defaults.workdir.as_deref(), &user.home)?;
        let env = environment(&user, &defaults.env, &config, matches!(streams, Streams::Terminal(_)));
        let candidates = candidates(&config.cmd, env.get("PATH").map_or(PATH, String::as_str))?;
        let argv = [&config.cmd].into_iter().chain(&config.args).map(|arg| c_string(arg.as_str(), "an argument"));
        Ok(Plan {
            argv: argv.collect::<Result<_, _>>()?,
            cwd: c_string(cwd.into_os_string().into_encoded_bytes(), "cwd")?,
            env: encode(&env)?,
            candidates,
            tag: request.tag,
            user,
            streams,
            config,
        })
    }
}

/// A terminal's size; 0 means the usual one.
pub fn window(cols: u32, rows: u32) -> Result<Winsize, Error> {
    let bounded = |value: u32, usual: u16| match value {
        0 => Ok(usual),
        value => u16::try_from(value).map_err(|_| Error::TerminalSize { cols, rows }),
    };
    Ok(Winsize { ws_col: bounded(cols, 80)?, ws_row: bounded(rows, 24)?, ws_xpixel: 0, ws_ypixel: 0 })
}

fn c_string(text: impl Into<Vec<u8>>, what: &'static str) -> Result<CString, Error> {
    CString::new(text).map_err(|_| Error::Nul(what))
}

/// Where the process starts, which must be there.
fn directory(asked: Option<&str>, default: Option<&str>, home: &str) -> Result<PathBuf, Error> {
    let path = path::resolve(asked.unwrap_or_default(), default, home).map_err(Error::Directory)?;
    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.is_dir() => Ok(path),
        Ok(_) => Err(Error::NotDirectory(path.display().to_string())),
        Err(_) => Err(Error::NoDirectory(path.display().to_string())),
    }
}

/// The layers, later ones first in force: envd's search path, the user, the platform's defaults, the request.
fn environment(
    user: &User,
    defaults: &std::collections::HashMap<String, String>,
    config: &ProcessConfig,
    terminal: bool,
) -> BTreeMap<String, String> {
    let path = std::env::var("PATH").ok().filter(|path| !path.is_empty()).unwrap_or_else(|| PATH.to_owned());
    let mut env = BTreeMap::from([
        ("PATH".to_owned(), path),
        ("HOME".to_owned(), user.home.clone()),
        ("USER".to_owned(), user.name.clone()),
        ("LOGNAME".to_owned(), user.name.clone()),
        ("SHELL".to_owned(), user.shell.clone()),
    ]);
    if terminal {
        env.insert("TERM".to_owned(), "xterm-256color".to_owned());
    }
    let layers = defaults.iter().chain(config.envs.iter());
    env.extend(layers.map(|(name, value)| (name.clone(), value.clone())));
    env
}

fn encode(env: &BTreeMap<String, String>) -> Result<Vec<CString>, Error> {
    env.iter()
        .map(|(name, value)| {
            if name.is_empty() || name.contains('=') {
                return Err(Error::VariableName(name.clone()));
            }
            c_string(format!("{name}={value}"), "an environment variable")
        })
        .collect()
}

/// Where to look for the program: as given if it has a slash, else in each directory of the process's own `PATH`.
fn candidates(command: &str, path: &str) -> Result<Vec<CString>, Error> {
    if command.contains('/') {
        return Ok(vec![c_string(command, "cmd")?]);
    }
    path.split(':')
        .map(|directory| match directory {
            "" => c_string(format!("./{command}"), "cmd"),
            directory => c_string(format!("{directory}/{command}"), "cmd"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn directories() {
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join("sub")).unwrap();
        std::fs::write(home.path().join("file"), "").unwrap();
        let base = home.path().to_str().unwrap();
        let of = |asked, default| directory(asked, default, base);
        assert_eq!(of(None, None).unwrap(), home.path());
        assert_eq!(of(Some(""), None).unwrap(), home.path());
        assert_eq!(of(None, Some("/tmp")).unwrap(), Path::new("/tmp"));
        assert_eq!(of(Some("/"), Some("/tmp")).unwrap(), Path::new("/"));
        for sub in ["sub", "~/sub", "~//sub", "./sub"] {
            assert!(of(Some(sub), None).unwrap().ends_with("sub"), "{sub}");
        }
        assert_eq!(of(Some("~"), Some("/tmp")).unwrap(), home.path());
        assert!(matches!(of(Some("nope"), None), Err(Error::NoDirectory(path)) if path.ends_with("/nope")));
        assert!(matches!(of(Some("file"), None), Err(Error::NotDirectory(_))));
        assert!(matches!(of(Some("~root"), None), Err(Error::Directory(_))));
    }

    #[test]
    fn programs_are_searched_in_the_given_path() {
        let of =
            |command, path| candidates(command, path).unwrap().iter().map(|c| c.to_str().unwrap().to_owned()).collect();
        let found: Vec<String> = of("ls", "/a:/b::/c");
        assert_eq!(found, ["/a/ls", "/b/ls", "./ls", "/c/ls"]);
        let found: Vec<String> = of("./ls", "/a");
        assert_eq!(found, ["./ls"]);
    }

    #[test]
    fn sizes() {
        assert_eq!(window(0, 0).unwrap(), Winsize { ws_col: 80, ws_row: 24, ws_xpixel: 0, ws_ypixel: 0 });
        assert!(window(65_535, 1).is_ok());
        assert!(matches!(window(65_536, 1), Err(Error::TerminalSize { cols: 65_536, rows: 1 })));
    }

    #[test]
    fn variable_names() {
        for bad in ["", "A=B"] {
            let env = BTreeMap::from([(bad.to_owned(), "x".to_owned())]);
            assert!(matches!(encode(&env), Err(Error::VariableName(_))));
        }
        assert!(encode(&BTreeMap::from([("A".to_owned(), "x=y".to_owned())])).is_ok());
    }
}
