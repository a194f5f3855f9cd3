//! Who may transfer files: whoever has the token, or an address that somebody who has it has signed.

use crate::settings::Settings;
use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use sha2::{Digest, Sha256};
use std::time::{SystemTime, UNIX_EPOCH};
use subtle::ConstantTimeEq;

/// Why a caller may not; E2B's clients know these texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("access token present in header but does not match")]
    Token,
    #[error("missing signature query parameter")]
    Missing,
    #[error("invalid signature")]
    Invalid,
    #[error("signature is already expired")]
    Expired,
}

/// What a signature allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
}

/// What of a request is signed, as the caller wrote it, and what the signature is said to be.
#[derive(Clone, Copy, Debug)]
pub struct Signed<'a> {
    pub path: &'a str,
    pub username: &'a str,
    pub signature: Option<&'a str>,
    /// Seconds since the epoch; the signature holds until this second is over.
    pub expiration: Option<i64>,
}

/// Whether the request may go on. A token in the header decides alone, wrong or right.
pub fn check(
    settings: &Settings,
    header: Option<&[u8]>,
    operation: Operation,
    signed: Signed<'_>,
) -> Result<(), Error> {
    let Some(token) = settings.token() else { return Ok(()) };
    if let Some(header) = header.filter(|header| !header.is_empty()) {
        return if settings.admits(Some(header)) { Ok(()) } else { Err(Error::Token) };
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    verify(&token, operation, signed, i64::try_from(now).unwrap_or(i64::MAX))
}

fn verify(token: &str, operation: Operation, signed: Signed<'_>, now: i64) -> Result<(), Error> {
    let given = signed.signature.ok_or(Error::Missing)?;
    if !bool::from(sign(token, operation, signed).as_bytes().ct_eq(given.as_bytes())) {
        return Err(Error::Invalid);
    }
    match signed.expiration {
        Some(expiration) if expiration < now => Err(Error::Expired),
        _ => Ok(()),
    }
}

fn sign(token: &str, operation: Operation, signed: Signed<'_>) -> String {
    let operation = match operation {
        Operation::Read => "read",
        Operation::Write => "write",
    };
    let mut text = format!("{}:{operation}:{}:{token}", signed.path, signed.username);
    if let Some(expiration) = signed.expiration {
        text.push_str(&format!(":{expiration}"));
    }
    format!("v1_{}", STANDARD_NO_PAD.encode(Sha256::digest(text)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIGNED: Signed = Signed { path: "/a", username: "", signature: None, expiration: None };

    #[test]
    fn signatures_are_those_of_the_clients() {
        // printf '%s' '/a:read::secret' | openssl dgst -sha256 -binary | base64 | tr -d =
        assert_eq!(sign("secret", Operation::Read, SIGNED), "v1_bNssEQcbuFJJw2F7K9OxiSepIOzBtQw23DPP43+Yhzs");
        // The same of '~/ü b:write:user:secret:1700000000'.
        let signed = Signed { path: "~/ü b", username: "user", signature: None, expiration: Some(1_700_000_000) };
        assert_eq!(sign("secret", Operation::Write, signed), "v1_65HhqTrXfEERmbs0pp3k5kSBTiLhGVPLClTrAr4YCAE");
    }

    #[test]
    fn everything_signed_counts_and_time_runs_out() {
        let of = |signed: Signed, operation| sign("secret", operation, signed);
        let until = |expiration| Signed { expiration, ..SIGNED };
        for expiration in [None, Some(10)] {
            let signature = of(until(expiration), Operation::Read);
            let right = Signed { signature: Some(&signature), ..until(expiration) };
            let check = |signed, operation| verify("secret", operation, signed, 10);
            assert_eq!(check(right, Operation::Read), Ok(()));
            assert_eq!(check(right, Operation::Write), Err(Error::Invalid));
            assert_eq!(check(Signed { path: "/b", ..right }, Operation::Read), Err(Error::Invalid));
            assert_eq!(check(Signed { username: "u", ..right }, Operation::Read), Err(Error::Invalid));
            assert_eq!(check(Signed { expiration: Some(11), ..right }, Operation::Read), Err(Error::Invalid));
            assert_eq!(check(Signed { signature: Some("v1_"), ..right }, Operation::Read), Err(Error::Invalid));
            assert_eq!(check(Signed { signature: None, ..right }, Operation::Read), Err(Error::Missing));
            assert_eq!(verify("other", Operation::Read, right, 10), Err(Error::Invalid));
            let late = verify("secret", Operation::Read, right, 11);
            assert_eq!(late, if expiration.is_some() { Err(Error::Expired) } else { Ok(()) });
        }
    }
}
