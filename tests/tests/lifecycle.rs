//! Capsules come and go, and the machine is as it was.

use end_to_end::{Machine, Options, Up};
use futures::{StreamExt, stream};
use reqwest::Method;

/// Capsules of the long run, and how many of them are there at once.
const MANY: usize = 200;
const AT_ONCE: usize = 8;

#[tokio::test]
async fn python_runs_in_a_microvm_and_nothing_is_left() {
    let before = Machine::now();
    let mut up = Up::start();
    let id = up.create().await;
    assert_eq!(up.output(&id, "python3 -c 'print(6*7)'").await, "42");
    assert_eq!(up.output(&id, "id -un; pwd; hostname; uname -r").await.lines().count(), 4);
    assert_eq!(up.output(&id, "sudo -u user sudo id -un").await, "root");
    let (status, capsule) = up.call(Method::GET, &format!("/v1/capsules/{id}"), None).await;
    assert_eq!((status.as_u16(), capsule["status"].as_str()), (200, Some("running")));
    up.destroy(&id).await;
    up.destroy(&id).await;
    assert!(up.stop());
    before.is_back().await;
}

#[tokio::test]
async fn a_guest_learns_its_id_from_the_metadata_service() {
    let up = Up::start();
    let id = up.create().await;
    let ask = "url=http://169.254.169.254
        token=$(curl -sf -X PUT -H 'X-metadata-token-ttl-seconds: 60' $url/latest/api/token)
        curl -sf -H \"X-metadata-token: $token\" -H 'Accept: application/json' $url/";
    let metadata: serde_json::Value = serde_json::from_str(&up.output(&id, ask).await).unwrap();
    assert_eq!(metadata["instanceID"].as_str(), Some(id.as_str()));
}

#[tokio::test]
async fn both_names_of_the_default_template_work() {
    let up = Up::start();
    for template in ["minimal", "minimal-ubuntu"] {
        let body = serde_json::json!({ "template": template });
        let (status, capsule) = up.call(Method::POST, "/v1/capsules", Some(body)).await;
        assert_eq!(status, 201, "{capsule}");
    }
}

#[tokio::test]
async fn postgresql_in_place_of_sqlite() {
    let postgres = testkit::Postgres::start();
    let mut up = Up::with(Options { database_url: Some(postgres.database()), ..Options::default() });
    let id = up.create().await;
    up.kill();
    up.restart();
    assert_eq!(up.output(&id, "echo still here").await, "still here");
    assert!(!up.dir().join("wrenn.db").exists());
    assert!(up.stop());
}

#[tokio::test]
async fn two_hundred_capsules_leave_the_machine_as_it_was() {
    let before = Machine::now();
    let mut up = Up::start();
    // What the agent itself holds is there after its first capsule.
    up.destroy(&up.create().await).await;
    up.has_booted().await;
    let idle = Machine::at_rest().await;
    let up_ref = &up;
    stream::iter(0..MANY)
        .for_each_concurrent(AT_ONCE, |_| async move {
            let id = up_ref.create().await;
            up_ref.destroy(&id).await;
        })
        .await;
    idle.is_back().await;
    assert_eq!(up.directories(), 0);
    assert!(up.stop());
    before.is_back().await;
}

#[tokio::test]
async fn several_on_one_machine_do_not_collide() {
    let before = Machine::now();
    let (mut one, mut two) = (Up::start(), Up::start());
    let (first, second) = tokio::join!(one.create(), two.create());
    let (a, b) = tokio::join!(
        one.output(&first, "cat /proc/sys/kernel/random/boot_id"),
        two.output(&second, "cat /proc/sys/kernel/random/boot_id")
    );
    assert_ne!(a, b);
    assert!(one.stop());
    // What the first gave back, the second still has.
    two.output(&second, "true").await;
    assert!(two.stop());
    before.is_back().await;
}

#[tokio::test]
async fn a_guest_that_dies_is_reported_with_a_reason() {
    let up = Up::start();
    let id = up.create().await;
    // The guest's init cannot be killed; rebooting it ends the VMM.
    let body =
        serde_json::json!({"cmd": "/bin/sh", "args": ["-c", "echo b > /proc/sysrq-trigger"], "background": true});
    up.call(Method::POST, &format!("/v1/capsules/{id}/exec"), Some(body)).await;
    let status = loop {
        let (_, capsule) = up.call(Method::GET, &format!("/v1/capsules/{id}"), None).await;
        match capsule["status"].as_str() {
            Some("running") => tokio::time::sleep(std::time::Duration::from_millis(100)).await,
            status => break status.map(str::to_owned),
        }
    };
    assert_eq!(status.as_deref(), Some("error"));
}
