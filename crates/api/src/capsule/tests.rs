use proptest::prelude::*;

use super::*;

fn from_json(json: &str) -> Result<CapsuleSpec, Invalid> {
    serde_json::from_str::<CreateCapsule>(json).unwrap().validate(None)
}

#[test]
fn an_empty_request_means_the_defaults() {
    let spec = from_json("{}").unwrap();
    assert_eq!(
        (spec.template.as_str(), spec.vcpus, spec.memory_mb, spec.disk_size_mb, spec.timeout_sec),
        ("minimal", 1, 512, 5120, 0)
    );
    assert_eq!(from_json(r#"{"template":null,"vcpus":null,"metadata":null,"of_next_year":[1]}"#).unwrap(), spec);
    assert_eq!(from_json(r#"{"template":"minimal-ubuntu"}"#).unwrap(), spec);
}

#[test]
fn bounds_are_named() {
    for (json, message) in [
        (r#"{"vcpus":0}"#, "vcpus must be between 1 and 32"),
        (r#"{"vcpus":1000000000}"#, "vcpus must be between 1 and 32"),
        (r#"{"vcpus":-1}"#, "vcpus must be between 1 and 32"),
        (r#"{"memory_mb":127}"#, "memory_mb must be between 128 and 65536"),
        (r#"{"disk_size_mb":1}"#, "disk_size_mb must be between 5120 and 102400"),
        (r#"{"timeout_sec":-1}"#, "timeout_sec must be between 0 and 2592000"),
        (r#"{"timeout_sec":2592001}"#, "timeout_sec must be between 0 and 2592000"),
        (r#"{"metadata":{"envd_version":"1"}}"#, "metadata.envd_version is reserved: the platform sets it"),
        (r#"{"metadata":{"a":"\u0000"}}"#, "metadata.a must not contain a NUL character"),
    ] {
        assert_eq!(from_json(json).unwrap_err().to_string(), message, "{json}");
    }
    assert_eq!(from_json(r#"{"metadata":{"a b":"1"}}"#).unwrap_err().field, "metadata");
    assert_eq!(from_json(r#"{"template":"a/b"}"#).unwrap_err().field, "template");
    let many: BTreeMap<_, _> = (0..21).map(|n| (n.to_string(), String::new())).collect();
    assert_eq!(
        CreateCapsule { metadata: Some(many), ..Default::default() }.validate(None).unwrap_err().field,
        "metadata"
    );
    // Sixty-four characters, not bytes.
    let value = |length: usize| CreateCapsule {
        metadata: Some([("k".into(), "ü".repeat(length))].into()),
        ..Default::default()
    };
    assert!(value(64).validate(None).is_ok());
    assert_eq!(value(65).validate(None).unwrap_err().field, "metadata.k");
}

#[test]
fn short_timeouts_are_raised_and_zero_is_never() {
    for (given, kept) in [(0, 0), (1, 60), (59, 60), (60, 60), (61, 61), (2_592_000, 2_592_000)] {
        assert_eq!(from_json(&format!(r#"{{"timeout_sec":{given}}}"#)).unwrap().timeout_sec, kept);
    }
}

#[test]
fn built_in_sizes_are_not_argued_with() {
    let baked = Sizes { vcpus: 2, memory_mb: 96, disk_size_mb: 6000 };
    let ask = |json: &str| serde_json::from_str::<CreateCapsule>(json).unwrap().validate(Some(baked));
    for json in [r#"{"template":"mine"}"#, r#"{"template":"mine","vcpus":2,"memory_mb":96,"disk_size_mb":6000}"#] {
        let spec = ask(json).unwrap();
        // Even outside today's bounds: it exists.
        assert_eq!((spec.vcpus, spec.memory_mb, spec.disk_size_mb, spec.template.as_str()), (2, 96, 6000, "mine"));
    }
    for (json, message) in [
        (r#"{"template":"mine","vcpus":1}"#, "vcpus must be 2 or absent: the template `mine` has it built in"),
        (
            r#"{"template":"mine","memory_mb":512}"#,
            "memory_mb must be 96 or absent: the template `mine` has it built in",
        ),
        (
            r#"{"template":"mine","disk_size_mb":-1}"#,
            "disk_size_mb must be 6000 or absent: the template `mine` has it built in",
        ),
        (r#"{"template":"mine","timeout_sec":-1}"#, "timeout_sec must be between 0 and 2592000"),
    ] {
        assert_eq!(ask(json).unwrap_err().to_string(), message, "{json}");
    }
}

#[test]
fn forks_are_counted() {
    let ask = |json: &str| serde_json::from_str::<ForkCapsule>(json).unwrap().validate();
    assert_eq!(ask("{}").unwrap(), (1, None));
    assert_eq!(ask(r#"{"count":100,"metadata":{}}"#).unwrap(), (100, Some(BTreeMap::new())));
    for count in [0, -1, 101] {
        let error = ask(&format!(r#"{{"count":{count}}}"#)).unwrap_err();
        assert_eq!(error.to_string(), "count must be between 1 and 100");
    }
    assert_eq!(ask(r#"{"metadata":{"envd_version":"1"}}"#).unwrap_err().field, "metadata.envd_version");
}

#[test]
fn the_twelve_words_of_the_wire() {
    use Status::*;
    let all = [
        Pending,
        Starting,
        Running,
        Pausing,
        Paused,
        Snapshotting,
        Resuming,
        Stopping,
        Hibernated,
        Stopped,
        Missing,
        Error,
    ];
    let words: Vec<_> = all.iter().map(|status| serde_json::to_value(status).unwrap()).collect();
    assert_eq!(
        words,
        [
            "pending",
            "starting",
            "running",
            "pausing",
            "paused",
            "snapshotting",
            "resuming",
            "stopping",
            "hibernated",
            "stopped",
            "missing",
            "error"
        ]
    );
}

proptest! {
    #[test]
    fn what_passes_is_within_the_bounds(vcpus: Option<i64>, memory_mb: Option<i64>, timeout_sec: Option<i64>) {
        if let Ok(spec) = (CreateCapsule { vcpus, memory_mb, timeout_sec, ..Default::default() }).validate(None) {
            prop_assert!(limits::VCPUS.contains(&spec.vcpus.into()));
            prop_assert!(limits::MEMORY_MB.contains(&spec.memory_mb.into()));
            prop_assert!(spec.timeout_sec == 0 || spec.timeout_sec >= 60);
        }
    }
}
