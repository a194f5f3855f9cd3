//! Ids: a newtype per kind over 128 bits, written as a prefix and exactly 25 characters of lower-case base36.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

/// Characters of the base36 part: the fewest that hold any 128-bit number.
const DIGITS: usize = 25;

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The text does not begin with the kind's prefix.
    #[error("an id of this kind begins with `{0}`")]
    Prefix(&'static str),
    /// The part after the prefix is not 25 characters long.
    #[error("an id has {DIGITS} characters after `{0}`")]
    Length(&'static str),
    /// A character is not one of `0-9a-z`.
    #[error("an id has only the characters 0-9 and a-z after `{0}`")]
    Character(&'static str),
    /// 25 digits reach past 2^128; such a number is nobody's id.
    #[error("the number after `{0}` is larger than any id")]
    TooLarge(&'static str),
}

fn parse(text: &str, prefix: &'static str) -> Result<Uuid, Error> {
    let digits = text.strip_prefix(prefix).ok_or(Error::Prefix(prefix))?;
    if digits.len() != DIGITS {
        return Err(Error::Length(prefix));
    }
    digits
        .bytes()
        .try_fold(0u128, |sum, byte| {
            let digit = match byte {
                b'0'..=b'9' => byte - b'0',
                b'a'..=b'z' => byte - b'a' + 10,
                _ => return Err(Error::Character(prefix)),
            };
            sum.checked_mul(36).and_then(|sum| sum.checked_add(digit.into())).ok_or(Error::TooLarge(prefix))
        })
        .map(Uuid::from_u128)
}

fn format(id: Uuid, prefix: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let mut digits = [b'0'; DIGITS];
    let mut rest = id.as_u128();
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdefghijklmnopqrstuvwxyz"[(rest % 36) as usize];
        rest /= 36;
    }
    f.write_str(prefix)?;
    digits.iter().try_for_each(|&digit| fmt::Write::write_char(f, digit.into()))
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde_with::SerializeDisplay, serde_with::DeserializeFromStr)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new random id.
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                format(self.0, $prefix, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                format(self.0, $prefix, f)
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(text: &str) -> Result<Self, Error> {
                parse(text, $prefix).map(Self)
            }
        }
    };
}

id!(
    /// A capsule: one microVM.
    CapsuleId, "cl-"
);
id!(
    /// A team: who owns capsules and keys.
    TeamId, "team-"
);
id!(
    /// An API key.
    KeyId, "key-"
);
id!(
    /// A template.
    TemplateId, "tpl-"
);
id!(
    /// A host that runs capsules.
    HostId, "host-"
);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_id_survives_its_text_form(number: u128) {
            let id = CapsuleId(Uuid::from_u128(number));
            let text = id.to_string();
            prop_assert_eq!(text.len(), "cl-".len() + DIGITS);
            prop_assert_eq!(text.parse::<CapsuleId>(), Ok(id));
        }

        #[test]
        fn no_text_makes_it_panic(text: String) {
            let _ = text.parse::<CapsuleId>();
        }
    }

    #[test]
    fn wrong_texts_say_what_is_wrong() {
        let parse = |text: &str| text.parse::<CapsuleId>().unwrap_err();
        assert_eq!(parse("usr-0000000000000000000000000"), Error::Prefix("cl-"));
        assert_eq!(parse("cl-000000000000000000000000"), Error::Length("cl-"));
        assert_eq!(parse("cl-00000000000000000000000000"), Error::Length("cl-"));
        assert_eq!(parse("cl-00000000000000000000000A0"), Error::Character("cl-"));
        assert_eq!(parse("cl-zzzzzzzzzzzzzzzzzzzzzzzzz"), Error::TooLarge("cl-"));
        // 2^128 itself, the first number past the last id.
        assert_eq!(parse("cl-f5lxx1zz5pnorynqglhzmsp34"), Error::TooLarge("cl-"));
        assert!("cl-f5lxx1zz5pnorynqglhzmsp33".parse::<CapsuleId>().is_ok());
    }
}
