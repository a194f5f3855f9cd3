//! A fake capsule's guest: a real envd, started when it is first asked for something, in a process namespace of its own, so that
//! whatever was started in it ends with it.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::OnceLock;

use agent_api::CapsuleSpec;
use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use guest_api::{ACCESS_TOKEN_HEADER, Init};
use proxy::{Upstream, boxed};
use tokio::sync::OnceCell;

/// Ends when its standard input does, as it does when this process ends, however that comes about. It is the first process
/// of its namespace: with it all others end.
const KEEPER: &str = r#""$0" --port 0 --isnotfc </dev/null & read -r _"#;

/// One guest. Dropping it ends everything in it.
pub struct Guest {
    spec: CapsuleSpec,
    envd: OnceCell<Envd>,
}

struct Envd {
    keeper: Child,
    upstream: Upstream,
    token: String,
}

/// envd, where `make` puts it: beside the test's directory.
fn program() -> PathBuf {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    let find = || {
        let test = std::env::current_exe().expect("this process has a program");
        let path = test.parent().and_then(Path::parent).expect("tests are two levels down").join("envd");
        assert!(path.exists(), "{} is not built; `make test` or `cargo build -p envd` does", path.display());
        path
    };
    PATH.get_or_init(find).clone()
}

impl Guest {
    /// The guest of a capsule with that specification. Nothing is started yet.
    pub fn new(spec: CapsuleSpec) -> Self {
        Self { spec, envd: OnceCell::new() }
    }

    /// What the agent does with guest traffic: pass it on undecoded, with the guest's token.
    pub async fn forward(&self, mut request: Request) -> Result<Response, proxy::Error> {
        let envd = self.envd.get_or_init(|| Envd::start(&self.spec)).await;
        request.headers_mut().insert(ACCESS_TOKEN_HEADER, envd.token.parse().expect("a token is an id"));
        Ok(envd.upstream.forward(request.map(boxed)).await?.map(Body::new))
    }
}

impl Envd {
    async fn start(spec: &CapsuleSpec) -> Self {
        let mut keeper = Command::new("unshare");
        keeper.args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", KEEPER]).arg(program());
        let mut keeper = keeper.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("unshare starts");
        let mut log = BufReader::new(keeper.stderr.take().expect("it is piped"));
        let listening = tokio::task::spawn_blocking(move || {
            let port = port(&mut log);
            // It must not block on what it has to say.
            std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::stderr()));
            port
        });
        let port = listening.await.expect("envd says where it listens");
        let upstream = Upstream::new(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let envd = Self { keeper, upstream, token: spec.id.clone() };
        let init = Init {
            access_token: Some(envd.token.clone()),
            default_user: Some("root".into()),
            env_vars: Some(spec.default_env.clone().into_iter().collect()),
            ..Init::default()
        };
        let body = Body::from(serde_json::to_vec(&init).expect("an Init has only JSON types"));
        let request = Request::post("/init").body(boxed(body)).expect("the parts are constants");
        let answer = envd.upstream.forward(request).await.expect("envd answers");
        assert!(answer.status().is_success(), "envd answers {} to /init", answer.status());
        envd
    }
}

/// The port envd logs.
fn port(log: &mut BufReader<ChildStderr>) -> u16 {
    loop {
        let mut line = String::new();
        assert_ne!(log.read_line(&mut line).expect("it is text"), 0, "envd ended before it served");
        if let Some((_, port)) = line.trim().split_once("address=0.0.0.0:") {
            return port.parse().expect("a port");
        }
    }
}

impl Drop for Envd {
    fn drop(&mut self) {
        // It has ended if it was ended from the inside; either way nothing is left once it is waited for.
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}
