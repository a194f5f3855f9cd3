//! The server name of a TLS hello, however it is cut into records.

use std::cmp::Ordering;

use super::{LIMIT, Refused};

/// The content type of the records that a connection begins with.
pub(super) const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
/// Bytes before the content of a record, and before that of a handshake message.
const RECORD_HEADER: usize = 5;
const MESSAGE_HEADER: usize = 4;
/// Bytes of a record's content.
const RECORD_LIMIT: usize = 1 << 14;

/// Extensions that say whom the connection is for: in clear, and in the two ways that were encrypted.
const SERVER_NAME: u16 = 0;
const ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;
const ENCRYPTED_SERVER_NAME: u16 = 0xffce;

/// The server name, `None` while the hello is not all there.
pub(super) fn server_name(bytes: &[u8]) -> Result<Option<Vec<u8>>, Refused> {
    hello(bytes)?.map(|hello| find(&hello).map(<[u8]>::to_vec)).transpose()
}

/// The content of the hello.
fn hello(bytes: &[u8]) -> Result<Option<Vec<u8>>, Refused> {
    let mut message = Vec::new();
    let mut rest = bytes;
    loop {
        if let Some([kind, length @ ..]) = message.first_chunk::<MESSAGE_HEADER>() {
            let length = length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
            if *kind != CLIENT_HELLO {
                return Err(Refused::Malformed("it does not begin with a hello"));
            }
            if length > LIMIT {
                return Err(Refused::TooLong);
            }
            match message.len().cmp(&(MESSAGE_HEADER + length)) {
                Ordering::Less => {}
                Ordering::Equal => return Ok(Some(message.split_off(MESSAGE_HEADER))),
                Ordering::Greater => return Err(Refused::Malformed("something follows the hello in its record")),
            }
        }
        let Some([kind, major, _, high, low]) = rest.first_chunk::<RECORD_HEADER>() else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if *kind != HANDSHAKE || *major != 3 || !(1..=RECORD_LIMIT).contains(&length) {
            return Err(Refused::Malformed("a record"));
        }
        let Some(content) = rest.get(RECORD_HEADER..RECORD_HEADER + length) else { return Ok(None) };
        rest = &rest[RECORD_HEADER + length..];
        message.extend_from_slice(content);
    }
}

/// The one server name of a hello.
fn find(hello: &[u8]) -> Result<&[u8], Refused> {
    let mut extensions = extensions(hello).ok_or(Refused::Malformed("a hello that cannot be read"))?;
    let mut name = None;
    while !extensions.is_empty() {
        let (kind, content, rest) = extension(extensions).ok_or(Refused::Malformed("an extension"))?;
        extensions = rest;
        match kind {
            SERVER_NAME if name.is_some() => return Err(Refused::Malformed("two server names")),
            SERVER_NAME => name = Some(host_name(content).ok_or(Refused::Malformed("its server name"))?),
            ENCRYPTED_CLIENT_HELLO | ENCRYPTED_SERVER_NAME => return Err(Refused::Encrypted),
            _ => {}
        }
    }
    name.ok_or(Refused::NoName)
}

/// What follows the fields of a hello that every version has: version and random, session, ciphers and compressions. To the
/// byte, unlike ready-made readers, which are there to show what is in a capture and pass over what they cannot read.
fn extensions(hello: &[u8]) -> Option<&[u8]> {
    const VERSION_AND_RANDOM: usize = 34;
    let (_session, hello) = short_vector(hello.get(VERSION_AND_RANDOM..)?)?;
    let (_ciphers, hello) = vector(hello)?;
    let (_compressions, hello) = short_vector(hello)?;
    if hello.is_empty() {
        return Some(hello);
    }
    let (extensions, after) = vector(hello)?;
    after.is_empty().then_some(extensions)
}

/// The kind and content of the first extension, and what follows it.
fn extension(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let (kind, bytes) = bytes.split_first_chunk()?;
    let (content, rest) = vector(bytes)?;
    Some((u16::from_be_bytes(*kind), content, rest))
}

/// The only name of a list that has nothing else in it.
fn host_name(content: &[u8]) -> Option<&[u8]> {
    const HOST_NAME: u8 = 0;
    let (list, after) = vector(content)?;
    let (kind, list) = list.split_first()?;
    let (name, others) = vector(list)?;
    (after.is_empty() && *kind == HOST_NAME && others.is_empty()).then_some(name)
}

/// What has its length in two bytes before it, and what follows.
fn vector(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, bytes) = bytes.split_first_chunk()?;
    bytes.split_at_checked(u16::from_be_bytes(*length).into())
}

/// What has its length in one byte before it, and what follows.
fn short_vector(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, bytes) = bytes.split_first()?;
    bytes.split_at_checked((*length).into())
}
