use hickory_proto::rr::rdata::{A, CNAME, TXT};
use proptest::prelude::*;

use super::*;

const ID: u16 = 0x4711;

fn policy() -> Policy {
    Policy { domains: vec!["allowed.example".parse().unwrap(), "*.wide.example".parse().unwrap()], ..Policy::default() }
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(7, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn asks(message: &Message) -> Box<Question> {
    match judge(&message.to_vec().unwrap(), &policy()) {
        Verdict::Ask(question) => question,
        other => panic!("{other:?}"),
    }
}

fn code(message: &Message) -> ResponseCode {
    match judge(&message.to_vec().unwrap(), &policy()) {
        Verdict::Answer(bytes) => {
            let answer = Message::from_vec(&bytes).unwrap();
            assert_eq!((answer.metadata.id, answer.answers.len()), (7, 0));
            answer.metadata.response_code
        }
        other => panic!("{other:?}"),
    }
}

fn record(owner: &str, ttl: u32, data: RData) -> Record {
    Record::from_rdata(Name::from_ascii(owner).unwrap(), ttl, data)
}

fn a(owner: &str, last: u8, ttl: u32) -> Record {
    record(owner, ttl, RData::A(A(Ipv4Addr::new(192, 0, 2, last))))
}

fn alias(owner: &str, target: &str, ttl: u32) -> Record {
    record(owner, ttl, RData::CNAME(CNAME(Name::from_ascii(target).unwrap())))
}

/// What an upstream says to `question`.
fn upstream(question: &Question, records: Vec<Record>) -> Vec<u8> {
    let asked = Message::from_vec(&question.upstream(ID)).unwrap();
    let mut answer = asked.clone().into_response();
    answer.add_answers(records);
    answer.to_vec().unwrap()
}

fn addresses(question: &Question, records: Vec<Record>) -> Vec<(u8, u32)> {
    let answer = question.answer(&upstream(question, records), ID, false).unwrap();
    let told = Message::from_vec(&answer.bytes).unwrap();
    let shown = told.answers.iter().filter(|record| matches!(record.data, RData::A(_))).count();
    assert_eq!(shown, answer.addresses.len(), "what counts is what is told");
    answer.addresses.iter().map(|(address, ttl)| (address.octets()[3], *ttl)).collect()
}

#[test]
fn only_allowed_names_are_asked_for_and_nothing_is_added_to_them() {
    let mut asked = query("aLLowed.Example.", RecordType::A);
    let mut edns = Edns::new();
    edns.options_mut().insert(hickory_proto::rr::rdata::opt::EdnsOption::Unknown(65001, b"secret".to_vec()));
    asked.set_edns(edns);
    asked.add_additional(record("allowed.example.", 1, RData::TXT(TXT::new(vec!["secret".into()]))));
    let sent = asks(&asked).upstream(ID);
    assert!(!sent.windows(6).any(|part| part == b"secret"));
    assert!(sent.windows(8).any(|part| part == b"\x07allowed"), "in one spelling: letters' cases are bits too");
    let mut plain = asks(&query("allowed.example.", RecordType::A)).upstream(ID);
    assert_eq!(sent, plain);
    plain = asks(&query("x.wide.example.", RecordType::TXT)).upstream(ID);
    assert_eq!(Message::from_vec(&plain).unwrap().queries[0].query_type(), RecordType::TXT);

    for name in ["evil.example.", "wide.example.", "allowed.example.evil.example.", ".", "xallowed.example."] {
        assert_eq!(code(&query(name, RecordType::A)), ResponseCode::Refused, "{name}");
    }
    for kind in [RecordType::AAAA, RecordType::HTTPS, RecordType::SVCB] {
        assert_eq!(code(&query("allowed.example.", kind)), ResponseCode::NoError, "{kind}");
    }
    for kind in [RecordType::ANY, RecordType::AXFR, RecordType::NULL, RecordType::PTR, RecordType::Unknown(65280)] {
        assert_eq!(code(&query("allowed.example.", kind)), ResponseCode::Refused, "{kind}");
    }
}

#[test]
fn labels_are_not_what_their_text_looks_like() {
    // One label with a dot in it, which would be written like two.
    let mut message = query("allowed.example.", RecordType::A);
    for labels in [
        &[&b"x.wide"[..], b"example"][..],
        &[b"allowed\0", b"example"],
        &[b"allowed.example"],
        &[b"\xff", b"wide", b"example"],
    ] {
        let mut name = Name::from_labels(labels.iter().copied()).unwrap();
        name.set_fqdn(true);
        message.queries[0].set_name(name);
        assert_eq!(code(&message), ResponseCode::Refused, "{labels:?}");
    }
}

#[test]
fn what_is_no_question_is_not_asked() {
    for bytes in [&b""[..], b"\0", &[0; 11]] {
        assert!(matches!(judge(bytes, &policy()), Verdict::Ignore));
    }
    // Answered, so that who sent it does not wait, but not to what is an answer: two could go on for ever.
    assert!(matches!(judge(&[&[0; 12][..], b"rest"].concat(), &policy()), Verdict::Answer(_)));
    let mut torn = query("allowed.example.", RecordType::A).to_vec().unwrap();
    torn.truncate(20);
    assert!(matches!(judge(&torn, &policy()), Verdict::Answer(_)));
    torn[2] |= 0x80;
    assert!(matches!(judge(&torn, &policy()), Verdict::Ignore));
    let answer = query("allowed.example.", RecordType::A).into_response().to_vec().unwrap();
    assert!(matches!(judge(&answer, &policy()), Verdict::Ignore));

    let mut two = query("allowed.example.", RecordType::A);
    two.add_query(Query::query(Name::from_ascii("evil.example.").unwrap(), RecordType::A));
    assert_eq!(code(&two), ResponseCode::FormErr);
    let mut update = query("allowed.example.", RecordType::A);
    update.metadata.op_code = OpCode::Update;
    assert!(!matches!(judge(&update.to_vec().unwrap(), &policy()), Verdict::Ask(_)));
    let mut chaos = query("allowed.example.", RecordType::A);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(code(&chaos), ResponseCode::Refused);
}

#[test]
fn addresses_are_those_of_the_name_that_was_asked_for() {
    let question = asks(&query("allowed.example.", RecordType::A));
    assert_eq!(
        addresses(&question, vec![a("Allowed.example.", 1, 300), a("allowed.example.", 2, 60)]),
        [(1, 60), (2, 60)]
    );
    // Through aliases in any order, and with the shortest time of the way.
    let way = vec![
        a("b.cdn.example.", 3, 500),
        alias("a.cdn.example.", "b.cdn.example.", 20),
        alias("allowed.example.", "a.cdn.example.", 90),
    ];
    assert_eq!(addresses(&question, way), [(3, 20)]);
    // What an upstream, or who speaks in its name, adds for others.
    let added =
        vec![a("evil.example.", 9, 300), a("allowed.example.", 1, 300), alias("evil.example.", "allowed.example.", 1)];
    assert_eq!(addresses(&question, added), [(1, 300)]);
    assert_eq!(addresses(&question, vec![alias("allowed.example.", "allowed.example.", 1), a("x.example.", 1, 1)]), []);
    let mut other_class = a("allowed.example.", 1, 300);
    other_class.dns_class = DNSClass::CH;
    assert_eq!(addresses(&question, vec![other_class]), []);
    assert_eq!(addresses(&question, (0..200).map(|last| a("allowed.example.", last, 9)).collect()).len(), RECORDS);
}

#[test]
fn an_answer_to_something_else_is_none() {
    let question = asks(&query("allowed.example.", RecordType::A));
    let good = upstream(&question, vec![a("allowed.example.", 1, 300)]);
    assert!(question.is_answered_by(&good, ID) && !question.is_answered_by(&good, ID + 1));
    assert!(!question.is_answered_by(&question.upstream(ID), ID), "an echo");
    let other = asks(&query("x.wide.example.", RecordType::A));
    assert!(!other.is_answered_by(&good, ID));
    assert_eq!(other.answer(&good, ID, false).unwrap_err(), NoAnswer);
    assert!(question.answer(b"", ID, false).is_err());
}

#[test]
fn a_guest_gets_its_question_back_and_no_more_than_it_can_take() {
    let mut asked = query("aLLowed.Example.", RecordType::A);
    let question = asks(&asked);
    let many = upstream(&question, (0..60).map(|last| a("allowed.example.", last, 9)).collect());
    let answer = question.answer(&many, ID, true).unwrap();
    let told = Message::from_vec(&answer.bytes).unwrap();
    assert!(answer.bytes.len() <= 512 && told.metadata.truncation && told.answers.is_empty());
    assert_eq!((told.metadata.id, told.queries[0].name().to_ascii()), (7, "aLLowed.Example.".into()));
    assert_eq!(Message::from_vec(&question.answer(&many, ID, false).unwrap().bytes).unwrap().answers.len(), 60);
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    asked.set_edns(edns);
    assert_eq!(Message::from_vec(&asks(&asked).answer(&many, ID, true).unwrap().bytes).unwrap().answers.len(), 60);

    let mut nowhere = Message::from_vec(&upstream(&question, vec![a("allowed.example.", 1, 9)])).unwrap();
    for (theirs, ours) in [
        (ResponseCode::NXDomain, ResponseCode::NXDomain),
        (ResponseCode::Refused, ResponseCode::ServFail),
        (ResponseCode::ServFail, ResponseCode::ServFail),
    ] {
        nowhere.metadata.response_code = theirs;
        let answer = question.answer(&nowhere.to_vec().unwrap(), ID, true).unwrap();
        assert_eq!(Message::from_vec(&answer.bytes).unwrap().metadata.response_code, ours);
        assert!(answer.addresses.is_empty());
    }
    assert_eq!(Message::from_vec(&question.failed().unwrap()).unwrap().metadata.response_code, ResponseCode::ServFail);
}

proptest! {
    #[test]
    fn any_bytes_are_judged(bytes: Vec<u8>) {
        if let Verdict::Answer(answer) = judge(&bytes, &policy()) {
            prop_assert!(Message::from_vec(&answer).is_ok());
        }
        let question = asks(&query("allowed.example.", RecordType::A));
        let _ = question.answer(&[&upstream(&question, Vec::new())[..], &bytes].concat(), ID, true);
    }
}
