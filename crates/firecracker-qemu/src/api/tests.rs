use http::Method;
use proptest::prelude::*;

use super::*;

fn parse(method: Method, path: &str, body: &str) -> Result<Action, Error> {
    super::parse(&method, path, body.as_bytes())
}

#[test]
fn every_endpoint_is_an_action() {
    for path in ["/", "/version", "/vm/config", "/machine-config", "/mmds", "/balloon", "/balloon/statistics"] {
        assert!(parse(Method::GET, path, "").is_ok(), "GET {path}");
    }
    let bucket = r#"{"bandwidth":{"size":1,"refill_time":2,"one_time_burst":3},"ops":null}"#;
    let drive = format!(
        r#"{{"drive_id":"a","path_on_host":"/d","is_root_device":true,"is_read_only":null,"rate_limiter":{bucket}}}"#
    );
    let interface =
        format!(r#"{{"iface_id":"e","host_dev_name":"t","guest_mac":"02:fc:00:00:00:05","tx_rate_limiter":{bucket}}}"#);
    for (path, body) in [
        ("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":128,"huge_pages":"None","cpu_template":"None"}"#),
        ("/boot-source", r#"{"kernel_image_path":"/k","initrd_path":null,"boot_args":"a"}"#),
        ("/drives/a", &drive),
        ("/network-interfaces/e", &interface),
        ("/mmds", r#"{"a":1}"#),
        ("/mmds/config", r#"{"version":"V2","network_interfaces":["e"],"ipv4_address":"169.254.169.254"}"#),
        ("/balloon", r#"{"amount_mib":1,"deflate_on_oom":true,"stats_polling_interval_s":1}"#),
        ("/entropy", "{}"),
        ("/serial", r#"{"serial_out_path":"/s"}"#),
        ("/logger", r#"{"log_path":"/l","level":"Warning","show_level":true,"show_log_origin":false}"#),
        ("/metrics", r#"{"metrics_path":"/m","something":"else"}"#),
        ("/actions", r#"{"action_type":"InstanceStart"}"#),
        ("/snapshot/create", r#"{"snapshot_path":"/s","mem_file_path":"/m"}"#),
        ("/snapshot/load", r#"{"snapshot_path":"/s","mem_backend":{"backend_type":"Uffd","backend_path":"/u"}}"#),
    ] {
        parse(Method::PUT, path, body).unwrap_or_else(|error| panic!("PUT {path}: {error}"));
    }
    for (path, body) in [
        ("/machine-config", r#"{"mem_size_mib":128}"#),
        ("/drives/a", r#"{"drive_id":"a","path_on_host":"/d"}"#),
        ("/network-interfaces/e", r#"{"iface_id":"e"}"#),
        ("/mmds", "{}"),
        ("/balloon", r#"{"amount_mib":1}"#),
        ("/balloon/statistics", r#"{"stats_polling_interval_s":1}"#),
        ("/vm", r#"{"state":"Resumed"}"#),
    ] {
        parse(Method::PATCH, path, body).unwrap_or_else(|error| panic!("PATCH {path}: {error}"));
    }
}

#[test]
fn defaults_are_firecrackers() {
    let create = parse(Method::PUT, "/snapshot/create", r#"{"snapshot_path":"/s","mem_file_path":"/m"}"#).unwrap();
    let Action::CreateSnapshot(create) = create else { panic!("{create:?}") };
    assert_eq!(create.snapshot_type, SnapshotType::Full);
    let config = parse(Method::PUT, "/mmds/config", r#"{"network_interfaces":["e"],"ipv4_address":null}"#).unwrap();
    let Action::PutMmdsConfig(config) = config else { panic!("{config:?}") };
    assert_eq!((config.version, config.address().octets()), (MmdsVersion::V1, [169, 254, 169, 254]));
    let drive = r#"{"drive_id":"a","path_on_host":"/d","is_root_device":false}"#;
    let Action::PutDrive(drive) = parse(Method::PUT, "/drives/a", drive).unwrap() else { panic!("not a drive") };
    assert_eq!((drive.cache_type, drive.io_engine, drive.is_read_only), (CacheType::Unsafe, IoEngine::Sync, false));
}

#[test]
fn the_faults_are_told_apart() {
    let refused = |method: Method, path: &str, body: &str| parse(method, path, body).unwrap_err();
    assert_eq!(
        refused(Method::PUT, "/nonsense", "{}").to_string(),
        "Invalid request method and/or path: PUT nonsense."
    );
    assert!(matches!(refused(Method::POST, "/actions", "{}"), Error::NoSuchEndpoint { .. }));
    assert!(matches!(refused(Method::GET, "/vm", ""), Error::NoSuchEndpoint { .. }));
    assert!(matches!(refused(Method::PUT, "/drives/a/b", "{}"), Error::NoSuchEndpoint { .. }));
    assert!(matches!(refused(Method::GET, "/", "{}"), Error::UnexpectedBody));
    assert!(matches!(refused(Method::PUT, "/actions", ""), Error::EmptyBody { .. }));
    assert!(matches!(refused(Method::PUT, "/actions", r#"{"action_type":"Start"}"#), Error::Body(_)));
    assert!(matches!(refused(Method::PATCH, "/vm", r#"{"state":"Paused","x":1}"#), Error::Body(_)));
    assert!(matches!(refused(Method::PUT, "/mmds", "3"), Error::Body(_)));
    let drive = |id: &str| format!(r#"{{"drive_id":"{id}","path_on_host":"/d","is_root_device":false}}"#);
    assert!(matches!(refused(Method::PUT, "/drives/a", &drive("b")), Error::MismatchedId { .. }));
    assert!(matches!(refused(Method::PUT, "/drives/a-b", &drive("a-b")), Error::BadId));
    let nowhere = r#"{"drive_id":"a","is_root_device":false}"#;
    assert!(matches!(refused(Method::PUT, "/drives/a", nowhere), Error::Invalid(_)));
}

#[test]
fn what_cannot_be_done_here_is_refused_by_name() {
    let limited = r#"{"rate_limiter":{"ops":{"size":1,"refill_time":1}}}"#;
    let hinting = r#"{"amount_mib":1,"deflate_on_oom":true,"free_page_hinting":true}"#;
    let socket = r#"{"drive_id":"a","socket":"/s","is_root_device":false}"#;
    for (path, body) in [
        ("/vsock", r#"{"guest_cid":3,"uds_path":"/v"}"#),
        ("/pmem/a", "{}"),
        ("/hotplug/memory", "{}"),
        ("/cpu-config", "{}"),
        ("/entropy", limited),
        ("/serial", limited),
        ("/balloon", hinting),
        ("/drives/a", socket),
    ] {
        let refused = parse(Method::PUT, path, body).unwrap_err();
        assert!(matches!(refused, Error::Unsupported(_)), "{path}: {refused}");
    }
}

#[test]
fn mac_addresses_are_six_octets() {
    for good in ["02:fc:00:00:00:05", "02:FC:00:00:00:05"] {
        assert_eq!(String::from(MacAddress::try_from(good.to_owned()).unwrap()), "02:fc:00:00:00:05");
    }
    for bad in ["", "02:fc:00:00:00", "02:fc:00:00:00:0", "02:fc:00:00:00:0g", "02-fc-00-00-00-05", "2:fc:0:0:0:5:1"] {
        assert!(MacAddress::try_from(bad.to_owned()).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn nothing_a_client_sends_is_a_panic(method in "GET|PUT|PATCH|DELETE", path in "/[a-z/_-]{0,20}", body in ".{0,60}") {
        let method = Method::from_bytes(method.as_bytes()).unwrap();
        let _ = parse(method, &path, &body);
    }
}
