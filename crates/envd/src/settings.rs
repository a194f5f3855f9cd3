//! What `/init` told envd: the token, and the defaults of every process.

use guest_api::Init;
use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};
use subtle::ConstantTimeEq;

/// The defaults of every process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defaults {
    pub user: String,
    /// `None`: the user's home.
    pub workdir: Option<String>,
    pub env: HashMap<String, String>,
}

/// The token is set, and the caller does not have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("access token already set")]
pub struct Refused;

/// What became of an `/init`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// Its contents hold now.
    Yes,
    /// A newer one was here before; nothing changed.
    Stale,
}

/// Shared by every request.
pub struct Settings {
    inner: RwLock<Inner>,
}

struct Inner {
    token: Option<String>,
    defaults: Defaults,
    /// The newest timestamp seen.
    newest: f64,
}

impl Default for Settings {
    fn default() -> Settings {
        let defaults = Defaults { user: "root".to_owned(), workdir: None, env: HashMap::new() };
        Settings { inner: RwLock::new(Inner { token: None, defaults, newest: f64::NEG_INFINITY }) }
    }
}

impl Settings {
    pub fn defaults(&self) -> Defaults {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).defaults.clone()
    }

    /// Whether a request that carries `token` may pass: all may until a token is set.
    pub fn admits(&self, token: Option<&[u8]>) -> bool {
        match &self.inner.read().unwrap_or_else(PoisonError::into_inner).token {
            None => true,
            Some(expected) => token.is_some_and(|token| expected.as_bytes().ct_eq(token).into()),
        }
    }

    /// The token that requests must carry, if one is set.
    pub fn token(&self) -> Option<String> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner).token.clone()
    }

    /// Takes over what `init` says, as a whole or not at all.
    pub fn apply(&self, init: Init) -> Result<Applied, Refused> {
        let mut inner = self.inner.write().unwrap_or_else(PoisonError::into_inner);
        let offered = init.access_token.filter(|token| !token.is_empty());
        if let Some(expected) = &inner.token {
            let same = offered.as_ref().is_some_and(|token| expected.as_bytes().ct_eq(token.as_bytes()).into());
            if !same {
                return Err(Refused);
            }
        }
        if let Some(timestamp) = init.timestamp {
            if timestamp < inner.newest {
                return Ok(Applied::Stale);
            }
            inner.newest = timestamp;
        }
        if offered.is_some() {
            inner.token = offered;
        }
        if let Some(user) = init.default_user.filter(|user| !user.is_empty()) {
            inner.defaults.user = user;
        }
        if let Some(workdir) = init.default_workdir {
            inner.defaults.workdir = Some(workdir).filter(|workdir| !workdir.is_empty());
        }
        if let Some(env) = init.env_vars {
            inner.defaults.env = env;
        }
        Ok(Applied::Yes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(token: &str) -> Init {
        Init { access_token: Some(token.to_owned()), ..Init::default() }
    }

    #[test]
    fn the_first_token_stays() {
        let settings = Settings::default();
        assert!(settings.admits(None));
        assert_eq!(settings.apply(Init::default()), Ok(Applied::Yes));
        assert_eq!(settings.apply(token("")), Ok(Applied::Yes));
        assert!(settings.admits(None));
        assert_eq!(settings.apply(token("secret")), Ok(Applied::Yes));
        for wrong in [token("other"), token(""), Init::default()] {
            assert_eq!(settings.apply(wrong), Err(Refused));
        }
        assert_eq!(settings.apply(token("secret")), Ok(Applied::Yes));
        assert!(settings.admits(Some(b"secret")));
        assert!(!settings.admits(None) && !settings.admits(Some(b"secre")) && !settings.admits(Some(b"secret2")));
    }

    #[test]
    fn a_refused_or_stale_call_changes_nothing() {
        let settings = Settings::default();
        let env = |value: &str| Some([("A".to_owned(), value.to_owned())].into());
        let first = Init { timestamp: Some(10.0), env_vars: env("1"), ..token("t") };
        assert_eq!(settings.apply(first), Ok(Applied::Yes));
        let before = settings.defaults();
        assert_eq!(settings.apply(Init { env_vars: env("2"), ..token("wrong") }), Err(Refused));
        assert_eq!(settings.apply(Init { timestamp: Some(9.0), env_vars: env("2"), ..token("t") }), Ok(Applied::Stale));
        assert_eq!(settings.defaults(), before);
        let user = Some("user".to_owned());
        assert_eq!(settings.apply(Init { timestamp: Some(10.0), default_user: user, ..token("t") }), Ok(Applied::Yes));
        assert_eq!(settings.defaults(), Defaults { user: "user".to_owned(), ..before });
    }
}
