//! The agent dies without warning, or is interrupted, and comes back.

use std::time::Duration;

use end_to_end::{Machine, Up};
use reqwest::Method;
use serde_json::{Value, json};

#[tokio::test]
async fn running_capsules_survive_a_killed_agent() {
    let before = Machine::now();
    let mut up = Up::start();
    let mut capsules = Vec::new();
    for _ in 0..3 {
        let id = up.create().await;
        let boot = up.output(&id, "echo kept > /root/file; cat /proc/sys/kernel/random/boot_id").await;
        capsules.push((id, boot));
    }
    up.kill();
    up.restart();
    for (id, boot) in &capsules {
        assert_eq!(&up.output(id, "cat /proc/sys/kernel/random/boot_id").await, boot, "{id} was rebooted");
        assert_eq!(up.output(id, "cat /root/file").await, "kept");
    }
    let (_, list) = up.call(Method::GET, "/v1/capsules", None).await;
    assert_eq!(list.as_array().unwrap().iter().filter(|capsule| capsule["status"] == "running").count(), 3);
    assert!(up.stop());
    before.is_back().await;
}

#[tokio::test]
async fn an_agent_killed_in_the_middle_of_a_create_leaves_nothing() {
    let before = Machine::now();
    let mut up = Up::start();
    up.destroy(&up.create().await).await;
    up.has_booted().await;
    let idle = Machine::at_rest().await;
    // A create from a boot snapshot takes half a second here: the kills fall before, between and after all its steps.
    for millis in [0, 3, 6, 10, 15, 20, 30, 45, 70, 110, 200, 400, 700, 1000, 1300] {
        let create = {
            let (url, key) = (format!("{}/v1/capsules", up.url()), up.api_key().to_owned());
            tokio::spawn(async move {
                reqwest::Client::new().post(url).header("X-API-Key", key).json(&json!({})).send().await
            })
        };
        tokio::time::sleep(Duration::from_millis(millis)).await;
        up.kill();
        // The answer is lost with the process, whatever it was.
        let _ = create.await;
        up.restart();
        let (_, list) = up.call(Method::GET, "/v1/capsules", None).await;
        for capsule in list.as_array().unwrap() {
            // What was running in time goes on; it is destroyed like any other.
            up.destroy(capsule["id"].as_str().unwrap()).await;
        }
        idle.is_back().await;
        assert_eq!(up.directories(), 0, "killed after {millis} ms");
    }
    assert!(up.stop());
    before.is_back().await;
}

#[tokio::test]
async fn a_capsule_whose_vmm_died_with_the_agent_is_not_running() {
    let mut up = Up::start();
    let id = up.create().await;
    up.kill();
    let vmm = std::fs::read(up.capsules().join(&id).join("record.json")).unwrap();
    let vmm: Value = serde_json::from_slice(&vmm).unwrap();
    let pid = rustix::process::Pid::from_raw(vmm["vmm"]["pid"].as_i64().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    up.restart();
    let status = loop {
        let (_, capsule) = up.call(Method::GET, &format!("/v1/capsules/{id}"), None).await;
        match capsule["status"].as_str().unwrap() {
            "running" => tokio::time::sleep(Duration::from_millis(100)).await,
            status => break status.to_owned(),
        }
    };
    assert!(["error", "stopped", "missing"].contains(&status.as_str()), "{status}");
}

#[tokio::test]
async fn who_says_that_it_is_ready_can_be_interrupted() {
    let before = Machine::now();
    let mut up = Up::start();
    for _ in 0..5 {
        assert!(up.stop(), "a ctrl-C that followed the line that it is ready was not heeded");
        up.restart();
    }
    assert!(up.stop());
    before.is_back().await;
}

/// Capsules with something in their memory, of which the second is woken by whoever visits it.
async fn with_memory(up: &Up) -> Vec<(String, String)> {
    let mut capsules = Vec::new();
    for auto_resume in [false, true] {
        let id = up.create_as(json!({ "auto_resume": auto_resume })).await;
        let sum = up.output(&id, "head -c 64M /dev/urandom > /dev/shm/m; md5sum < /dev/shm/m").await;
        capsules.push((id, sum));
    }
    capsules
}

async fn are_paused_with_all_their_memory(up: &Up, capsules: &[(String, String)]) {
    for (id, sum) in capsules {
        up.until(id, "paused").await;
        let (status, capsule) = up.call(Method::POST, &format!("/v1/capsules/{id}/resume"), None).await;
        assert_eq!(status, 200, "{capsule}");
        up.until(id, "running").await;
        assert_eq!(&up.output(id, "md5sum < /dev/shm/m").await, sum);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_pauses_all_whoever_visits_meanwhile() {
    let before = Machine::now();
    let mut up = Up::start();
    let capsules = with_memory(&up).await;
    let (url, host) = (up.url().to_owned(), format!("8000-{}.localhost", capsules[1].0));
    let visits = tokio::spawn(async move {
        loop {
            let _ = reqwest::Client::new().get(&url).header("Host", &host).send().await;
        }
    });
    assert!(up.stop(), "{}", up.log());
    visits.abort();
    before.is_back().await;
    up.restart();
    are_paused_with_all_their_memory(&up, &capsules).await;
    assert!(up.stop());
    before.is_back().await;
}

#[tokio::test]
async fn a_second_interrupt_leaves_at_once_and_loses_nothing() {
    let before = Machine::now();
    let mut up = Up::start();
    let capsules = with_memory(&up).await;
    up.interrupt();
    while !up.log().contains("again to leave at once") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!up.stop());
    assert!(up.log().contains("left at once"), "{}", up.log());
    up.restart();
    for (id, sum) in &capsules {
        let (_, capsule) = up.call(Method::GET, &format!("/v1/capsules/{id}"), None).await;
        match capsule["status"].as_str() {
            Some("running") => assert_eq!(&up.output(id, "md5sum < /dev/shm/m").await, sum),
            _ => are_paused_with_all_their_memory(&up, &[(id.clone(), sum.clone())]).await,
        }
    }
    assert!(up.stop());
    before.is_back().await;
}
