//! Session tokens of MMDS V2.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Sessions kept; a guest that asks for more loses the one that ends first.
const SESSIONS: usize = 1024;

/// The tokens that are valid, and until when.
#[derive(Default)]
pub struct Tokens(HashMap<String, Instant>);

impl Tokens {
    /// A new token of 48 characters.
    pub fn issue(&mut self, lifetime: Duration, now: Instant) -> Result<String, getrandom::Error> {
        self.0.retain(|_, until| *until > now);
        if self.0.len() >= SESSIONS
            && let Some(first) = self.0.iter().min_by_key(|(_, until)| **until).map(|(token, _)| token.clone())
        {
            self.0.remove(&first);
        }
        let mut secret = [0; 24];
        getrandom::fill(&mut secret)?;
        let token = hex::encode(secret);
        self.0.insert(token.clone(), now + lifetime);
        Ok(token)
    }

    pub fn valid(&self, token: &str, now: Instant) -> bool {
        self.0.get(token).is_some_and(|until| *until > now)
    }
}
