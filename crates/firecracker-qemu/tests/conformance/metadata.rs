//! The metadata service: its store over the API, its token rules in the guest.

use serde_json::{Value, json};

use crate::host::Host;
use crate::host::guest::Guest;
use crate::host::vm::Vm;

fn configured(host: &Host) -> Vm {
    let mut vm = host.vm();
    vm.configure();
    vm.api.put("/mmds/config", json!({ "version": "V2", "network_interfaces": ["eth0"] }));
    vm.api.put("/mmds", json!({ "instanceID": "i-1", "nested": { "key": "value", "deep": { "n": 1 } }, "n": 5 }));
    vm.boot();
    vm
}

/// The status and the body of one request in the guest.
fn request(guest: &mut Guest, command: &str) -> (u16, String) {
    let answer = guest.run(&format!("http {command}"));
    let (status, body) = answer.split_once(' ').unwrap_or((&answer, ""));
    (status.parse().unwrap(), body.to_owned())
}

#[test]
fn the_store_is_put_patched_and_read() {
    let host = Host::new();
    let vm = host.vm();
    assert_eq!(vm.api.get("/mmds"), json!({}));
    vm.api.refused("PATCH", "/mmds", json!({ "a": 1 }));
    vm.api.put("/mmds", json!({ "a": 1, "b": { "c": 2, "d": 3 } }));
    vm.api.patch("/mmds", json!({ "b": { "c": null, "e": 4 } }));
    assert_eq!(vm.api.get("/mmds"), json!({ "a": 1, "b": { "d": 3, "e": 4 } }));
    vm.api.refused("PUT", "/mmds/config", json!({ "network_interfaces": ["none"] }));
    vm.api.refused("PUT", "/mmds/config", json!({ "network_interfaces": [] }));
    let large = json!({ "a": "x".repeat(51_150) });
    vm.api.put("/mmds", large);
    let larger = vm.api.request("PATCH", "/mmds", &json!({ "b": "x".repeat(1000) }));
    assert_eq!(larger.status, 413, "{larger:?}");
}

#[test]
fn the_guest_needs_a_token() {
    let host = Host::new();
    let vm = configured(&host);
    let mut guest = vm.guest();
    assert_eq!(request(&mut guest, "GET /instanceID").0, 401);
    assert_eq!(request(&mut guest, "GET /instanceID X-metadata-token:nonsense").0, 401);
    for refused in [
        "PUT /latest/api/token",
        "PUT /latest/api/token X-metadata-token-ttl-seconds:0",
        "PUT /latest/api/token X-metadata-token-ttl-seconds:21601",
        "PUT /latest/api/token X-metadata-token-ttl-seconds:60 X-Forwarded-For:10.0.0.1",
    ] {
        assert_eq!(request(&mut guest, refused).0, 400, "{refused}");
    }
    assert_eq!(request(&mut guest, "PUT /other X-metadata-token-ttl-seconds:600").0, 404);
    // A method that versions before 1.16 know nowhere.
    let unknown = if vm.is_since(16) { 405 } else { 501 };
    assert_eq!(request(&mut guest, "DELETE /instanceID").0, unknown);

    let (status, token) = request(&mut guest, "PUT /latest/api/token X-metadata-token-ttl-seconds:600");
    assert_eq!((status, token.len()), (200, 48), "{token}");
    let mut read = |path: &str, header: &str| request(&mut guest, &format!("GET {path} {header}:{token}"));
    assert_eq!(read("/instanceID", "X-metadata-token"), (200, "i-1".to_owned()));
    // The other name of the header came with 1.13.
    let (status, _) = read("/instanceID", "X-aws-ec2-metadata-token");
    assert_eq!(status, if vm.is_since(13) { 200 } else { 401 });
    assert_eq!(read("/nested/", "X-metadata-token"), (200, "deep/\\nkey".to_owned()));
    assert_eq!(read("/none", "X-metadata-token").0, 404);
    assert_eq!(read("/n", "X-metadata-token").0, 501, "a number has no plain text form");
    let json = read("/", "Accept:application/json X-metadata-token");
    let body: Value = serde_json::from_str(&json.1).unwrap();
    assert_eq!((json.0, &body["nested"]["deep"]["n"]), (200, &json!(1)));
}

#[test]
fn the_guest_sees_changes_at_once() {
    let host = Host::new();
    let vm = configured(&host);
    let mut guest = vm.guest();
    let (_, token) = request(&mut guest, "PUT /latest/api/token X-metadata-token-ttl-seconds:600");
    vm.api.patch("/mmds", json!({ "instanceID": "i-2" }));
    let read = format!("GET /instanceID X-metadata-token:{token}");
    assert_eq!(request(&mut guest, &read), (200, "i-2".to_owned()));
}

#[test]
fn a_restored_guest_keeps_the_service_but_not_the_data() {
    let host = Host::new();
    let vm = configured(&host);
    let (_, old) = request(&mut vm.guest(), "PUT /latest/api/token X-metadata-token-ttl-seconds:600");
    vm.pause();
    let snapshot = vm.snapshot(&host, "base", "Full");
    drop(vm);

    let vm = host.vm();
    vm.load(&snapshot, json!({ "resume_vm": true }));
    vm.api.put("/mmds", json!({ "instanceID": "i-3" }));
    let mut guest = vm.guest();
    let read = |token: &str| format!("GET /instanceID X-metadata-token:{token}");
    assert_eq!(request(&mut guest, &read(&old)).0, 401, "the old token is gone");
    let (_, token) = request(&mut guest, "PUT /latest/api/token X-metadata-token-ttl-seconds:600");
    assert_eq!(request(&mut guest, &read(&token)), (200, "i-3".to_owned()));
}
