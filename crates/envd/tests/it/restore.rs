//! What the agent asks of a guest around a snapshot, and what the metadata service says to it. Needs root, as `init` does.

use crate::harness::*;
use crate::http::{json, request_to};
use crate::init::Guest;
use connectrpc::client::CallOptions;
use serde_json::{Value, json};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{SystemTime, UNIX_EPOCH};

const ENVD: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), guest_api::PORT);

fn post(path: &str, headers: &[&str], body: &str) -> (u16, Value) {
    let (status, _, body) = request_to(ENVD, "POST", path, headers, body);
    (status, if body.is_empty() { Value::Null } else { json(&body) })
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

fn restore(kind: &str, more: Value) -> String {
    use base64::Engine;
    let mut restore = json!({"kind": kind, "entropy": base64::engine::general_purpose::STANDARD.encode([5; 32])});
    restore.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!({"timestamp": now(), "accessToken": "new", "restore": restore}).to_string()
}

async fn out(client: &Client, token: &str, script: &str) -> String {
    let options = CallOptions::default().with_header("x-access-token", token);
    run_with(client, sh(script), options).await.unwrap().out()
}

#[tokio::test]
async fn a_fork_is_a_machine_of_its_own() {
    let guest = Guest::boot().await;
    guest.inside(async |client| {
        let script = "mkdir -p /etc/ssh; cd /etc/ssh; touch ssh_host_odd_key ssh_config; \
            echo old | tee ssh_host_ed25519_key >ssh_host_rsa_key; cat /etc/machine-id";
        let first = run(&client, sh(script)).await.out();
        assert_eq!(first.trim().len(), 32, "a machine has an id from the start: {first}");
        assert_eq!(post("/init", &[], r#"{"accessToken":"old"}"#).0, 204);
        assert_eq!(post("/init", &[], &restore("fork", json!({}))).0, 401);
        assert_eq!(post("/init", &["X-Access-Token: old"], &restore("fork", json!({"hostname": "a b"}))).0, 400);

        // What has been here before the fork, with the name of an sshd.
        let sshd = "ln -s /usr/bin/python3 /tmp/sshd; exec /tmp/sshd -uc 'if True:
            import os, signal
            key = lambda: open(\"/etc/ssh/ssh_host_ed25519_key\").readline()
            signal.signal(signal.SIGHUP, lambda *_: print(key(), os.listdir(\"/etc/ssh\")))
            open(\"/run/sshd.pid\", \"w\").write(str(os.getpid()))
            print(\"ready\")
            while True: signal.pause()'";
        let options = CallOptions::default().with_header("x-access-token", "old");
        let mut sshd = start(&client, sh(sshd), options).await.unwrap();
        sshd.started().await;
        sshd.until("ready\n").await;

        let (status, done) = post("/init", &["X-Access-Token: old"], &restore("fork", json!({"hostname": "fork-1"})));
        assert_eq!((status, &done["rngReseeded"]), (200, &json!(true)), "{done}");
        assert_eq!((&done["hostname"], &done["sshHostKeysRemoved"]), (&json!("fork-1"), &json!(true)));
        assert!(done["clockOffset"].as_f64().unwrap().abs() < 1.0);
        let id = done["machineId"].as_str().unwrap();
        assert_ne!(id, first.trim());
        assert_eq!(post("/init", &["X-Access-Token: old"], "{}").0, 401, "the old token is the twin's");
        let seen = out(&client, "new", "cat /etc/machine-id; hostname; getent hosts fork-1; ls /etc/ssh").await;
        assert!(seen.starts_with(&format!("{id}\nfork-1\n127.0.1.1")), "{seen}");
        assert!(seen.contains("ssh_config") && !seen.contains("ssh_host_odd_key"), "{seen}");
        // There is a key at once, those of other kinds are not the old ones, and sshd takes them up.
        let print = "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key";
        let key = out(&client, "new", print).await;
        assert!(key.contains("fork-1 (ED25519)"), "{key}");
        sshd.until("-----BEGIN OPENSSH PRIVATE KEY-----\n").await;
        sshd.until("'ssh_host_rsa_key'").await;
        let left = out(&client, "new", "cd /etc/ssh; grep -lx old ssh_host_*; ls | grep envd").await;
        assert_eq!(left, "");

        // The same again, as after an answer that was lost: done again, and no harm.
        let given = json!({"machineId": "0123456789ABCDEF0123456789abcdef"});
        let (status, done) = post("/init", &["X-Access-Token: new"], &restore("fork", given));
        assert_eq!((status, &done["machineId"]), (200, &json!("0123456789abcdef0123456789abcdef")), "{done}");
        assert_ne!(out(&client, "new", print).await, key);
        let (status, done) = post("/init", &["X-Access-Token: new"], &restore("resume", json!({})));
        assert_eq!((status, &done["machineId"], &done["hostname"]), (200, &Value::Null, &Value::Null));
        assert!(out(&client, "new", "cat /etc/machine-id; hostname").await.starts_with("0123456789abcdef"));
    });
}

#[tokio::test]
async fn connections_of_the_past_end_and_those_within_the_guest_stay() {
    let guest = Guest::boot().await;
    guest.inside(async |client| {
        assert_eq!(post("/init", &[], r#"{"accessToken":"new"}"#).0, 204);
        // Two addresses stand for two machines.
        let script = "ip addr add 10.9.0.1/32 dev lo; ip addr add 10.9.0.2/32 dev lo; exec python3 -uc '
import socket
def pair(server, client):
    listener = socket.create_server((server, 0))
    dialled = socket.create_connection(listener.getsockname(), source_address=(client, 0))
    return listener, dialled, listener.accept()[0]
past, within = pair(\"10.9.0.1\", \"10.9.0.2\"), pair(\"127.0.0.1\", \"127.0.0.1\")
print(\"ready\")
for end in past[1:]:
    try: print(\"past:\", end.recv(1))
    except OSError as error: print(\"past:\", type(error).__name__)
within[1].send(b\"w\"); print(\"within:\", within[2].recv(1))
again = socket.create_connection(past[0].getsockname()); again.send(b\"l\")
print(\"listener:\", past[0].accept()[0].recv(1))'";
        let options = CallOptions::default().with_header("x-access-token", "new");
        let mut stream = start(&client, sh(script), options).await.unwrap();
        stream.started().await;
        stream.until("ready\n").await;
        let (status, done) = post("/init", &["X-Access-Token: new"], &restore("resume", json!({})));
        // Ending the one resets the other, which is in the same guest here.
        assert_eq!((status, &done["connectionsClosed"]), (200, &json!(1)), "{done}");
        let rest = stream.rest().await.unwrap();
        let out = rest.out();
        let (past, rest_of_it) = out.split_once("within: ").expect("both ends of the past have ended");
        let mut past: Vec<_> = past.lines().collect();
        past.sort_unstable();
        assert_eq!(past, ["past: ConnectionAbortedError", "past: ConnectionResetError"]);
        assert_eq!(rest_of_it, "b'w'\nlistener: b'l'\n", "{}", String::from_utf8_lossy(&rest.stderr));
    });
}

#[tokio::test]
async fn users_processes_hold_still_until_told_or_initialised() {
    let guest = Guest::boot().await;
    let events = guest.cgroup.join("work/cgroup.events");
    guest.inside(async move |client| {
        let is_frozen = || std::fs::read_to_string(&events).unwrap().contains("frozen 1");
        let mut stream =
            start(&client, sh("while :; do echo on; sleep 0.01; done"), CallOptions::default()).await.unwrap();
        stream.started().await;
        for thaw in ["/unfreeze", "/init"] {
            stream.until("on\n").await;
            assert_eq!(post("/freeze?maxWaitMs=20000&mode=x", &[], "").0, 204);
            assert!(is_frozen());
            // envd itself goes on.
            assert_eq!(post("/snapshot/prepare", &[], "").0, 204);
            assert_eq!(post(thaw, &[], "").0, 204);
            assert!(!is_frozen());
        }
        stream.until("on\n").await;
        assert_eq!(post("/freeze?maxWaitMs=20000", &[], "").0, 204);
        let (status, _) = post("/init", &[], &restore("resume", json!({})));
        assert_eq!(status, 200);
        assert!(!is_frozen());
        assert_eq!(post("/freeze?maxWaitMs=soon", &["X-Access-Token: new"], "").0, 400);
        assert_eq!(post("/collapse", &["X-Access-Token: new"], "").0, 204);
    });
}

#[tokio::test]
async fn processes_of_the_platform_are_in_envds_own_group() {
    let guest = Guest::boot().await;
    guest.inside(async |client| {
        let group = async |tag: Option<&str>| {
            let mut request = sh("grep ^0:: /proc/self/cgroup");
            request.tag = tag.map(str::to_owned);
            run(&client, request).await.out()
        };
        assert_eq!(group(Some("_system")).await, "0::/\n");
        assert!(group(None).await.starts_with("0::/work/user/"));
        assert!(group(Some("job")).await.starts_with("0::/work/user/"));
    });
}

#[tokio::test]
async fn the_metadata_service_names_the_guest_and_vouches_for_a_token() {
    let guest = Guest::boot().await;
    guest.inside(async |client| {
        // The SHA-512 of "vouched".
        let script = "ip addr add 169.254.169.254/32 dev lo; exec python3 -uc '
import hashlib, json, http.server
class Service(http.server.BaseHTTPRequestHandler):
    protocol_version = \"HTTP/1.1\"
    def answer(self, text):
        self.send_response(200); self.send_header(\"Content-Length\", str(len(text))); self.end_headers()
        self.wfile.write(text.encode())
    def do_PUT(self): self.answer(\"t0ken\" if self.headers[\"X-metadata-token-ttl-seconds\"] == \"60\" else \"no\")
    def do_GET(self):
        good = self.headers[\"X-metadata-token\"] == \"t0ken\" and self.headers[\"Accept\"] == \"application/json\"
        known = {\"instanceID\": \"cl-x\", \"envID\": \"minimal\", \"accessTokenHash\": hashlib.sha512(b\"vouched\").hexdigest()}
        self.answer(json.dumps(known if good else {}))
http.server.ThreadingHTTPServer((\"169.254.169.254\", 80), Service).serve_forever()'";
        let mut service = start(&client, sh(script), CallOptions::default()).await.unwrap();
        service.started().await;
        let names = "printenv WRENN_SANDBOX_ID WRENN_TEMPLATE_ID WRENN_SANDBOX E2B_SANDBOX_ID E2B_TEMPLATE_ID E2B_SANDBOX; \
            cd /run/wrenn; cat .WRENN_SANDBOX_ID .WRENN_TEMPLATE_ID .WRENN_SANDBOX";
        let expected = "cl-x\nminimal\ntrue\ncl-x\nminimal\ntrue\ncl-xminimaltrue";
        // Until it has asked again a process is only told that it is in a capsule.
        let mut seen = String::new();
        while seen != expected {
            seen = run(&client, sh(names)).await.out();
        }
        assert_eq!(post("/init", &[], r#"{"accessToken":"any"}"#).0, 401, "the host says which token");
        assert_eq!(post("/init", &[], r#"{"accessToken":"vouched"}"#).0, 204);
        assert_eq!(post("/init", &[], r#"{"accessToken":"any"}"#).0, 401);
        assert_eq!(post("/init", &[], r#"{"accessToken":"vouched"}"#).0, 204);
    });
}
