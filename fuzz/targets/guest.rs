//! What reaches envd: the kernel's file events, messages and the bodies of plain requests, the host's metadata, paths as
//! callers write them, and the user database, which belongs to the guest.
#![no_main]

use buffa::Message;
use bytes::BytesMut;
use connectrpc::envelope::Envelope;
use envd::filesystem::{entry, watch::event};
use envd::{mmds, user};
use guest_api::{filesystem, process};
use libfuzzer_sys::fuzz_target;

/// A message that is understood says the same when it is written again.
fn message<M: Message + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(message) = M::decode_from_slice(bytes) {
        assert_eq!(M::decode_from_slice(&message.encode_to_vec()).as_ref(), Ok(&message));
    }
}

fuzz_target!(|bytes: &[u8]| {
    let _ = event::parse(bytes);
    let _ = serde_json::from_slice::<guest_api::Init>(bytes);
    let _ = serde_json::from_slice::<guest_api::Compose>(bytes);

    let mut stream = BytesMut::from(bytes);
    while let Ok(Some(envelope)) = Envelope::decode_with_limit(&mut stream, 1 << 20) {
        message::<process::StartRequest>(&envelope.data);
        message::<process::StreamInputRequest>(&envelope.data);
        message::<process::UpdateRequest>(&envelope.data);
        message::<filesystem::WatchDirRequest>(&envelope.data);
        let _ = serde_json::from_slice::<process::StartRequest>(&envelope.data);
        let _ = serde_json::from_slice::<process::StreamInputRequest>(&envelope.data);
    }

    // An answer that is whole stays what it is, whatever comes after it.
    let half = &bytes[..bytes.len() / 2];
    if let (Ok(Some(early)), late) = (mmds::body(half, false), mmds::body(bytes, false)) {
        assert_eq!(late.expect("the head is the same"), Some(early));
    }
    if let Ok(Some(body)) = mmds::body(bytes, true) {
        let _ = serde_json::from_str::<mmds::Metadata>(&body);
    }

    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(path) = envd::path::resolve(text, Some("/work"), "/home/user") {
        assert!(path.is_absolute());
    }
    let (passwd, group) = text.split_once("\n\n").unwrap_or((text, text));
    let name = passwd.split([':', '\n']).next().unwrap_or_default();
    if let Some(user) = user::find(passwd, group, name) {
        assert_eq!((user.name.as_str(), user.groups.first()), (name, Some(&user.gid)));
        assert!(!user.home.is_empty() && !user.shell.is_empty());
        assert!(user.groups.iter().enumerate().all(|(index, group)| !user.groups[..index].contains(group)));
        assert!(entry::names(passwd).contains_key(&user.uid) || name == "root");
    }
});
