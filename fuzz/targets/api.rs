//! What clients of the REST API send: ids, selectors, and the bodies with limits.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(id) = text.parse::<api::CapsuleId>() {
        assert_eq!(id.to_string(), text);
    }
    let _ = api::Selector::parse(text);
    let _ = text.parse::<api::MetricsRange>();
    if let Ok(set) = serde_json::from_str::<api::SetEgress>(text)
        && let Ok(policy) = set.validate("")
    {
        assert_eq!(api::SetEgress::from(api::Egress::from(&policy)).validate(""), Ok(policy));
    }
    if let Ok(exec) = serde_json::from_str::<api::Exec>(text) {
        let _ = exec.validate();
    }
    if let Ok(api::pty::Request::Start(start)) = serde_json::from_str(text) {
        let _ = start.validate();
    }
    if let Ok(api::stream::Request::Start(start)) = serde_json::from_str(text) {
        let _ = start.validate();
    }
});
