//! What guests send to the filter of names: first bytes of connections, questions, and in the name of resolvers answers.
#![no_main]

use api::egress::Policy;
use egress::dns::{self, Verdict};
use egress::head;
use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RecordType};
use libfuzzer_sys::fuzz_target;

/// What is an allowed name.
fn policy() -> Policy {
    let domains = ["allowed.example", "*.wide.example"].map(|name| name.parse().expect("a name"));
    Policy { domains: domains.into(), ..Policy::default() }
}

fuzz_target!(|bytes: &[u8]| {
    // What is found does not change with what comes later, and nothing is found in less.
    let found = head::name(bytes);
    if let Ok(Some(name)) = &found {
        assert_eq!(api::egress::name(name).as_ref(), Some(name));
        assert_eq!(head::name(&[bytes, b"\r\n\r\nmore"].concat()), found);
    }
    for end in [bytes.len() / 2, bytes.len().saturating_sub(1)] {
        match (head::name(&bytes[..end]), &found) {
            (Ok(Some(early)), late) => assert_eq!(late.as_ref().ok(), Some(&Some(early))),
            (Err(_), late) => assert!(late.is_err(), "what was refused is let through later"),
            (Ok(None), _) => {}
        }
    }

    let policy = policy();
    match dns::judge(bytes, &policy) {
        Verdict::Ask(question) => {
            let sent = Message::from_vec(&question.upstream(7)).expect("what we write can be read");
            let [query] = &sent.queries[..] else { panic!("one question") };
            let name = api::egress::name(&query.name().to_ascii()).expect("a host's name");
            assert!(policy.allows_name(&name));
            assert!(sent.answers.is_empty() && sent.additionals.is_empty() && sent.authorities.is_empty());
        }
        Verdict::Answer(answer) => {
            let answer = Message::from_vec(&answer).expect("what we write can be read");
            assert!(answer.answers.is_empty());
        }
        Verdict::Ignore => {}
    }

    // The same bytes as what a resolver, or somebody in its place, says.
    let mut asked = Message::query();
    asked.add_query(Query::query(Name::from_ascii("allowed.example.").expect("a name"), RecordType::A));
    let Verdict::Ask(question) = dns::judge(&asked.to_vec().expect("a question"), &policy) else { panic!("it is allowed") };
    let id = bytes.first_chunk().map_or(0, |id| u16::from_be_bytes(*id));
    if let Ok(answer) = question.answer(bytes, id, true) {
        assert!(answer.bytes.len() <= 1232);
        let told = Message::from_vec(&answer.bytes).expect("what we write can be read");
        assert!(answer.addresses.len() <= told.answers.len() || told.metadata.truncation);
    }
});
