//! What `/init` told envd: the token, and the defaults of every process.

use guest_api::Init;
use std::collections::{BTreeMap, HashMap};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use subtle::ConstantTimeEq;

/// The defaults of every process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defaults {
    pub user: String,
    /// `None`: the user's home.
    pub workdir: Option<String>,
    pub env: HashMap<String, String>,
}

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
    /// What every process is told about where it is; `/init` may say otherwise.
    identity: BTreeMap<String, String>,
    /// The newest timestamp seen.
    newest: f64,
}

impl Default for Settings {
    fn default() -> Settings {
        let defaults = Defaults { user: "root".to_owned(), workdir: None, env: HashMap::new() };
        Settings {
            inner: RwLock::new(Inner { token: None, defaults, identity: BTreeMap::new(), newest: f64::NEG_INFINITY }),
        }
    }
}

impl Settings {
    pub fn defaults(&self) -> Defaults {
        let inner = self.read();
        let mut defaults = inner.defaults.clone();
        for (name, value) in &inner.identity {
            defaults.env.entry(name.clone()).or_insert_with(|| value.clone());
        }
        defaults
    }

    /// Replaces what every process is told about where it is, and returns what it was told before.
    pub fn identify(&self, identity: BTreeMap<String, String>) -> BTreeMap<String, String> {
        std::mem::replace(&mut self.write().identity, identity)
    }

    pub fn has_token(&self) -> bool {
        self.read().token.is_some()
    }

    /// Whether a request that carries `token` may pass: all may until a token is set.
    pub fn admits(&self, token: Option<&[u8]>) -> bool {
        match &self.read().token {
            None => true,
            Some(expected) => token.is_some_and(|token| expected.as_bytes().ct_eq(token).into()),
        }
    }

    /// The token that requests must carry, if one is set.
    pub fn token(&self) -> Option<String> {
        self.read().token.clone()
    }

    /// Takes over what `init` says, as a whole or not at all. That its caller may say it was asked before.
    pub fn apply(&self, init: Init) -> Applied {
        let mut inner = self.write();
        if init.timestamp.is_some_and(|timestamp| timestamp < inner.newest) {
            return Applied::Stale;
        }
        inner.take(init);
        Applied::Yes
    }

    /// The same for a guest that wakes from a snapshot, whose idea of what is new may be another host's.
    pub fn apply_anew(&self, init: Init) {
        self.write().take(init);
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn take(&mut self, init: Init) {
        if let Some(timestamp) = init.timestamp {
            self.newest = timestamp;
        }
        if let Some(token) = init.access_token.filter(|token| !token.is_empty()) {
            self.token = Some(token);
        }
        if let Some(user) = init.default_user.filter(|user| !user.is_empty()) {
            self.defaults.user = user;
        }
        if let Some(workdir) = init.default_workdir {
            self.defaults.workdir = Some(workdir).filter(|workdir| !workdir.is_empty());
        }
        if let Some(env) = init.env_vars {
            self.defaults.env = env;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(token: &str) -> Init {
        Init { access_token: Some(token.to_owned()), ..Init::default() }
    }

    #[test]
    fn once_there_is_a_token_it_is_asked_for() {
        let settings = Settings::default();
        assert!(settings.admits(None) && !settings.has_token());
        settings.apply(Init::default());
        settings.apply(token(""));
        assert!(settings.admits(None) && !settings.has_token());
        settings.apply(token("secret"));
        settings.apply(token(""));
        assert!(settings.admits(Some(b"secret")) && settings.has_token());
        assert!(!settings.admits(None) && !settings.admits(Some(b"secre")) && !settings.admits(Some(b"secret2")));
        settings.apply(token("other"));
        assert!(settings.admits(Some(b"other")) && !settings.admits(Some(b"secret")));
    }

    #[test]
    fn a_stale_call_changes_nothing() {
        let settings = Settings::default();
        let env = |value: &str| Some([("A".to_owned(), value.to_owned())].into());
        let first = Init { timestamp: Some(10.0), env_vars: env("1"), ..token("t") };
        assert_eq!(settings.apply(first), Applied::Yes);
        let before = settings.defaults();
        assert_eq!(settings.apply(Init { timestamp: Some(9.0), env_vars: env("2"), ..token("x") }), Applied::Stale);
        assert_eq!(settings.defaults(), before);
        assert!(settings.admits(Some(b"t")));
        let user = Some("user".to_owned());
        assert_eq!(settings.apply(Init { timestamp: Some(10.0), default_user: user, ..token("t") }), Applied::Yes);
        assert_eq!(settings.defaults(), Defaults { user: "user".to_owned(), ..before });
        settings.apply_anew(Init { timestamp: Some(5.0), env_vars: env("3"), ..Init::default() });
        assert_eq!(settings.apply(Init { timestamp: Some(6.0), ..Init::default() }), Applied::Yes);
        assert_eq!(settings.defaults().env["A"], "3");
    }

    #[test]
    fn who_a_guest_is_yields_to_what_init_says() {
        let settings = Settings::default();
        settings.identify([("A", "id"), ("B", "id")].map(|(name, value)| (name.to_owned(), value.to_owned())).into());
        let env = Some([("A".to_owned(), "init".to_owned())].into());
        settings.apply(Init { env_vars: env, ..Init::default() });
        let env = settings.defaults().env;
        assert_eq!((env["A"].as_str(), env["B"].as_str()), ("init", "id"));
    }
}
