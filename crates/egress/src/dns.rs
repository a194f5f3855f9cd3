//! DNS questions of guests, and what is answered. Pure.
//!
//! Nothing of a guest's message goes on but the name, in lower case, and one of a few types: a question is written anew, so
//! that whoever may ask for `example.com` cannot say anything else to its servers, nor to anybody in between. Addresses are
//! answered for the name that was asked for, along its chain of aliases, and whatever else an upstream says is left out.

use std::net::Ipv4Addr;

use api::egress::Policy;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

/// Aliases from a name to its addresses.
const ALIASES: usize = 16;
/// Addresses, or other records, of one answer.
const RECORDS: usize = 64;
/// Bytes of an answer over UDP that pass every network on the way.
const UDP_BYTES: u16 = 1232;
/// The header, with which every message begins.
const HEADER_BYTES: usize = 12;

/// What is to be done with a guest's message.
#[derive(Debug)]
pub enum Verdict {
    /// It is no question, and nobody waits for an answer.
    Ignore,
    /// It is answered with this, and goes nowhere.
    Answer(Vec<u8>),
    /// It may be asked.
    Ask(Box<Question>),
}

/// A question that may be asked.
#[derive(Debug)]
pub struct Question {
    /// As [`api::egress::name`] writes it.
    name: String,
    kind: RecordType,
    /// What the guest sent, for the answer to repeat.
    asked: Message,
}

/// What comes of a question.
#[derive(Debug)]
pub struct Answer {
    /// For the guest.
    pub bytes: Vec<u8>,
    /// The name that was asked for.
    pub name: String,
    /// Its addresses, each with the seconds for which it is one.
    pub addresses: Vec<(Ipv4Addr, u32)>,
}

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the resolver's answer is not one to the question")]
pub struct NoAnswer;

/// Judges a guest's message.
pub fn judge(bytes: &[u8], policy: &Policy) -> Verdict {
    let Ok(asked) = Message::from_vec(bytes) else {
        // What has a header gets an answer, so that its sender does not wait.
        return match bytes.first_chunk::<HEADER_BYTES>() {
            Some([high, low, flags, ..]) if flags & 0x80 == 0 => {
                let id = u16::from_be_bytes([*high, *low]);
                let answer = Message::error_msg(id, OpCode::Query, ResponseCode::FormErr);
                answer.to_vec().map_or(Verdict::Ignore, Verdict::Answer)
            }
            _ => Verdict::Ignore,
        };
    };
    if asked.metadata.message_type != MessageType::Query {
        return Verdict::Ignore;
    }
    let refuse = |code| reply(&asked, code, Vec::new(), u16::MAX).map_or(Verdict::Ignore, Verdict::Answer);
    if asked.metadata.op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    let [query] = &asked.queries[..] else { return refuse(ResponseCode::FormErr) };
    let name = plain(query.name()).filter(|name| policy.allows_name(name));
    let (Some(name), DNSClass::IN) = (name, query.query_class()) else { return refuse(ResponseCode::Refused) };
    let kind = query.query_type();
    match kind {
        RecordType::A
        | RecordType::CNAME
        | RecordType::CAA
        | RecordType::MX
        | RecordType::NS
        | RecordType::SRV
        | RecordType::TXT => Verdict::Ask(Box::new(Question { name, kind, asked })),
        // There is no IPv6 in capsules, and what services say of themselves has keys to hide names with.
        RecordType::AAAA | RecordType::HTTPS | RecordType::SVCB => refuse(ResponseCode::NoError),
        _ => refuse(ResponseCode::Refused),
    }
}

impl Question {
    /// What an upstream is asked, under that number.
    pub fn upstream(&self, id: u16) -> Vec<u8> {
        let mut message = Message::new(id, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        let name = wire(&self.name);
        message.add_query(Query::query(name, self.kind));
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_BYTES);
        message.set_edns(edns);
        message.to_vec().expect("a question with a valid name fits into a message")
    }

    /// Whether those bytes answer what was asked under that number, as far as to be looked at; whoever only guesses the
    /// number is not heard.
    pub fn is_answered_by(&self, bytes: &[u8], id: u16) -> bool {
        self.answered(bytes, id).is_some()
    }

    fn answered(&self, bytes: &[u8], id: u16) -> Option<Message> {
        let message = Message::from_vec(bytes).ok()?;
        let is_ours = message.metadata.id == id
            && message.metadata.message_type == MessageType::Response
            && matches!(&message.queries[..], [query] if query.query_type() == self.kind
                && query.query_class() == DNSClass::IN
                && plain(query.name()).as_deref() == Some(&self.name));
        is_ours.then_some(message)
    }

    /// Makes the guest's answer of the upstream's. Over UDP it is at most as long as the guest says it may be.
    pub fn answer(&self, bytes: &[u8], id: u16, over_udp: bool) -> Result<Answer, NoAnswer> {
        let found = self.answered(bytes, id).ok_or(NoAnswer)?;
        let code = match found.metadata.response_code {
            code @ (ResponseCode::NoError | ResponseCode::NXDomain) => code,
            _ => ResponseCode::ServFail,
        };
        let records = if code == ResponseCode::NoError { self.chain(found.answers) } else { Vec::new() };
        let ttl = records.iter().map(|record| record.ttl).min().unwrap_or(0);
        let addresses = records.iter().filter_map(|record| match &record.data {
            RData::A(address) => Some((address.0, ttl)),
            _ => None,
        });
        let addresses = addresses.collect();
        let limit = if over_udp { self.asked.max_payload().min(UDP_BYTES) } else { u16::MAX };
        let bytes = reply(&self.asked, code, records, limit).ok_or(NoAnswer)?;
        Ok(Answer { bytes, name: self.name.clone(), addresses })
    }

    /// What the guest gets when nothing came of it.
    pub fn failed(&self) -> Option<Vec<u8>> {
        reply(&self.asked, ResponseCode::ServFail, Vec::new(), u16::MAX)
    }

    /// The records of the name that was asked for: its aliases in their order, and what the last of them has.
    fn chain(&self, records: Vec<Record>) -> Vec<Record> {
        let mut owner = self.name.clone();
        let is_owned = |record: &Record, owner: &str| {
            record.dns_class == DNSClass::IN && plain(&record.name).as_deref() == Some(owner)
        };
        let mut chain: Vec<Record> = Vec::new();
        for _ in 0..ALIASES {
            if self.kind == RecordType::CNAME {
                break;
            }
            let alias = records.iter().find_map(|record| match &record.data {
                RData::CNAME(target) if is_owned(record, &owner) => Some((record, plain(&target.0)?)),
                _ => None,
            });
            let Some((record, target)) = alias else { break };
            chain.push(record.clone());
            owner = target;
        }
        let last = records.into_iter().filter(|record| record.record_type() == self.kind && is_owned(record, &owner));
        chain.extend(last.take(RECORDS));
        chain
    }
}

/// The name in the spelling in which names are compared, if it is one that hosts have.
fn plain(name: &Name) -> Option<String> {
    // Label by label: what is written as text escapes what would be another name.
    let labels: Option<Vec<&str>> = name.iter().map(|label| std::str::from_utf8(label).ok()).collect();
    let labels = labels?;
    (!labels.iter().any(|label| label.contains('.'))).then(|| api::egress::name(&labels.join("."))).flatten()
}

fn wire(name: &str) -> Name {
    let mut wire = Name::from_labels(name.split('.').map(str::as_bytes)).expect("the name has the form of names");
    wire.set_fqdn(true);
    wire
}

/// An answer to that message, cut to nothing but its header and question where it would be longer than `limit`.
fn reply(asked: &Message, code: ResponseCode, records: Vec<Record>, limit: u16) -> Option<Vec<u8>> {
    let mut answer = Message::response(asked.metadata.id, asked.metadata.op_code);
    answer.metadata.recursion_desired = asked.metadata.recursion_desired;
    answer.metadata.recursion_available = true;
    answer.metadata.response_code = code;
    // Those with several are malformed, and have them not repeated.
    if let [query] = &asked.queries[..] {
        answer.add_query(query.clone());
    }
    if asked.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_BYTES);
        answer.set_edns(edns);
    }
    answer.add_answers(records);
    let bytes = answer.to_vec().ok()?;
    if bytes.len() <= usize::from(limit) {
        return Some(bytes);
    }
    answer.answers.clear();
    answer.metadata.truncation = true;
    answer.to_vec().ok()
}

#[cfg(test)]
mod tests;
