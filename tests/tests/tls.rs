//! `wrenn up --tls`: the published SDKs, curl and the command over https, with an authority of the directory's own.

use std::process::Command;

use end_to_end::{Options, Sdk, Up};
use serde_json::Value;

const APP: &str = include_str!("../src/app.py");

fn up() -> Up {
    Up::with(Options { args: vec!["--tls".into()], ..Options::default() })
}

/// The token of a capsule's envd, which only its host has.
fn envd_token(up: &Up, id: &str) -> String {
    let record = std::fs::read(up.capsules().join(id).join("record.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    record["token"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn everything_speaks_https() {
    let mut up = up();
    let id = up.create().await;
    let start = format!(
        "cat >/srv/app.py <<'END'\n{APP}\nEND\nsetsid python3 /srv/app.py 127.0.0.1 8000 >/tmp/log 2>&1 </dev/null & \
         while ! grep -q listening /tmp/log 2>/dev/null; do sleep 0.05; done"
    );
    up.output(&id, &start).await;

    let token = envd_token(&up, &id);
    let env = [
        ("WRENN_BASE_URL", up.url()),
        ("WRENN_API_KEY", up.api_key()),
        ("DOMAIN", up.domain()),
        ("CA_PEM", up.ca().unwrap()),
        ("CAPSULE", &id),
        ("ENVD_TOKEN", &token),
    ];
    Sdk::Python.test("test_tls.py", &env);

    // As it is told to people: curl, and the command, which knows of the authority by itself.
    let ca = up.dir().join("tls/ca.pem");
    let host = format!("8000-{id}.{}", up.domain());
    let (name, port) = host.rsplit_once(':').unwrap();
    let curl = |more: &[&str]| {
        let resolve = format!("{name}:{port}:127.0.0.1");
        let out = Command::new("curl")
            .args(["-sS", "--resolve", &resolve, &format!("https://{host}/dir/")])
            .args(more)
            .output()
            .unwrap();
        (out.status.code(), String::from_utf8(out.stdout).unwrap())
    };
    assert_eq!(curl(&["--cacert", ca.to_str().unwrap()]), (Some(0), "index".into()));
    assert_eq!(curl(&[]).0, Some(60));
    // A connection to one name is of no use for another.
    let other = format!("Host: {}", up.domain());
    let asked = curl(&["--cacert", ca.to_str().unwrap(), "-H", &other, "-o", "/dev/null", "-w", "%{http_code}"]);
    assert_eq!(asked, (Some(0), "421".into()));
    let url = up.wrenn().args(["capsule", "url", &id, "8000"]).output().unwrap();
    assert_eq!(String::from_utf8(url.stdout).unwrap().trim(), format!("https://{host}"));
    let mut exec = Command::new(up.wrenn().get_program());
    exec.env_remove("WRENN_BASE_URL").env_remove("WRENN_API_KEY").args([
        "capsule",
        "exec",
        &id,
        "--",
        "echo",
        "by itself",
    ]);
    assert_eq!(String::from_utf8(exec.output().unwrap().stdout).unwrap(), "by itself\n");

    // The next one is trusted by whoever trusts this one.
    let before = up.ca().unwrap().to_owned();
    assert!(up.stop());
    // Its files are known to whoever looks for what nobody needs.
    let mut doctor = up.wrenn();
    let audit = doctor.args(["doctor", "--storage", "--dir"]).arg(up.dir()).output().unwrap();
    let audit = String::from_utf8(audit.stdout).unwrap();
    assert!(audit.contains("used") && !audit.contains("/tls"), "{audit}");
    up.restart();
    assert_eq!(up.ca(), Some(before.as_str()));
}
