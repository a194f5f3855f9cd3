//! Names people give to templates.

use std::fmt;
use std::str::FromStr;

use crate::limits::Invalid;

/// The template used when none is named.
pub const DEFAULT_TEMPLATE: &str = "minimal";

/// Other names of the default template; the SDK's documents use both.
const DEFAULT_TEMPLATE_ALIASES: [&str; 1] = ["minimal-ubuntu"];

/// Names of templates that are, or will be, the platform's own.
const RESERVED_TEMPLATES: [&str; 5] =
    [DEFAULT_TEMPLATE, "minimal-ubuntu", "minimal-alpine", "minimal-arch", "minimal-fedora"];

/// What a safe name is, for the person who wrote one that is not.
pub(crate) const RULE: &str =
    "must be 1 to 64 characters of a-z, A-Z, 0-9, '.', '_' and '-', and begin with a letter or digit";

/// 1 to 64 of `a-z A-Z 0-9 . _ -`, beginning with a letter or digit: safe in paths, URLs and file names.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SafeName(String);

impl SafeName {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether no team may call a template of its own so.
    pub fn is_reserved(&self) -> bool {
        RESERVED_TEMPLATES.contains(&self.as_str())
    }

    /// The name under which a template of this name is stored.
    pub fn canonical_template(self) -> Self {
        if DEFAULT_TEMPLATE_ALIASES.contains(&self.as_str()) { Self(DEFAULT_TEMPLATE.into()) } else { self }
    }
}

impl Default for SafeName {
    fn default() -> Self {
        Self(DEFAULT_TEMPLATE.into())
    }
}

impl fmt::Display for SafeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SafeName {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if is_safe(text) { Ok(Self(text.into())) } else { Err(Invalid::new("name", RULE)) }
    }
}

/// Whether `text` follows the rule of [`SafeName`], which metadata keys share.
pub(crate) fn is_safe(text: &str) -> bool {
    (1..=64).contains(&text.len())
        && text.as_bytes()[0].is_ascii_alphanumeric()
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_the_rule() {
        for good in ["a", "9", "minimal-ubuntu", "A.b_c-d", &"x".repeat(64)] {
            assert!(good.parse::<SafeName>().is_ok(), "{good}");
        }
        for bad in ["", ".a", "-a", "_a", "a/b", "a b", "ä", "a\0", &"x".repeat(65)] {
            assert!(bad.parse::<SafeName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn both_documented_names_are_the_default_template() {
        for name in ["minimal", "minimal-ubuntu"] {
            let name: SafeName = name.parse().unwrap();
            assert!(name.is_reserved());
            assert_eq!(name.canonical_template(), SafeName::default());
        }
        let other: SafeName = "code-runner-beta".parse().unwrap();
        assert!(!other.is_reserved());
        assert_eq!(other.clone().canonical_template(), other);
    }
}
