//! What a capsule may reach outside, as the contract writes it.

use api::egress::{Cidr, Domain, Policy};

use crate::Egress;

/// An entry that is none, or entries that do not go together.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The entry, and what it should be.
    #[error("egress: `{0}` {1}")]
    Entry(String, &'static str),
    /// Names say nothing where everything is allowed.
    #[error("egress: domains need 0.0.0.0/0 in deny")]
    Names,
}

impl From<&Policy> for Egress {
    fn from(policy: &Policy) -> Self {
        Self {
            allow: policy.allow.iter().map(ToString::to_string).collect(),
            deny: policy.deny.iter().map(ToString::to_string).collect(),
            domains: policy.domains.iter().map(ToString::to_string).collect(),
            ..Self::default()
        }
    }
}

impl TryFrom<Egress> for Policy {
    type Error = Error;

    fn try_from(egress: Egress) -> Result<Self, Error> {
        fn parse<T: std::str::FromStr<Err = &'static str>>(entries: Vec<String>) -> Result<Vec<T>, Error> {
            entries.into_iter().map(|entry| entry.parse().map_err(|problem| Error::Entry(entry, problem))).collect()
        }
        let (allow, deny): (Vec<Cidr>, Vec<Cidr>) = (parse(egress.allow)?, parse(egress.deny)?);
        let domains: Vec<Domain> = parse(egress.domains)?;
        if !domains.is_empty() && !deny.contains(&Cidr::EVERYTHING) {
            return Err(Error::Names);
        }
        Ok(Self { allow, deny, domains })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_what_is_read() {
        let policy = Policy {
            allow: vec!["192.0.2.0/24".parse().unwrap()],
            deny: vec![Cidr::EVERYTHING],
            domains: vec!["*.example.com".parse().unwrap()],
        };
        assert_eq!(Policy::try_from(Egress::from(&policy)).unwrap(), policy);
        assert!(Policy::try_from(Egress::default()).unwrap().is_open());
        let open = Egress { deny: Vec::new(), ..Egress::from(&policy) };
        assert!(matches!(Policy::try_from(open), Err(Error::Names)));
        let wrong = Egress { deny: vec!["::/0".into()], ..Egress::default() };
        assert!(matches!(Policy::try_from(wrong), Err(Error::Entry(..))));
    }
}
