//! API keys: who may speak for a team.

use api::{KeyId, TeamId};
use sea_orm::entity::prelude::*;
use sea_orm::{ActiveValue::Set, DatabaseConnection};
use sha2::{Digest, Sha256};

use super::{Error, now};

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "api_keys")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub team_id: Uuid,
    pub name: String,
    #[sea_orm(unique)]
    pub key_hash: String,
    pub key_prefix: String,
    pub created_at: DateTimeUtc,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

const PREFIX: &str = "wrn_";
/// Hexadecimal digits after the prefix: 128 random bits.
const DIGITS: usize = 32;
/// Characters that may be shown to tell keys apart.
const SHOWN: usize = 10;

/// A whole key, as its owner holds it. Only its hash is ever stored.
pub struct Key(String);

impl Key {
    /// A new random key.
    pub fn random() -> Self {
        let mut bytes = [0; DIGITS / 2];
        getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
        Self(format!("{PREFIX}{}", hex::encode(bytes)))
    }

    /// The key a client sent, if it has a key's form; what has not is not worth a query.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(PREFIX)?;
        let lower_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        (digits.len() == DIGITS && digits.bytes().all(lower_hex)).then(|| Self(text.into()))
    }

    /// The whole key, to be shown once.
    pub fn reveal(self) -> String {
        self.0
    }

    fn hash(&self) -> String {
        hex::encode(Sha256::digest(self.0.as_bytes()))
    }
}

/// Lets `key` speak for `team`.
pub async fn insert(db: &DatabaseConnection, team: TeamId, name: &str, key: &Key) -> Result<(), Error> {
    let row = ActiveModel {
        id: Set(KeyId::random().0),
        team_id: Set(team.0),
        name: Set(name.into()),
        key_hash: Set(key.hash()),
        key_prefix: Set(key.0[..SHOWN].into()),
        created_at: Set(now()),
    };
    Entity::insert(row).exec_without_returning(db).await?;
    Ok(())
}

/// What is known of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    pub id: KeyId,
    pub team: TeamId,
    pub name: String,
}

/// The key, and the team for which it speaks.
pub async fn find_any_team(db: &DatabaseConnection, key: &Key) -> Result<Option<Known>, Error> {
    let row = Entity::find().filter(Column::KeyHash.eq(key.hash())).one(db).await?;
    Ok(row.map(|row| Known { id: KeyId(row.id), team: TeamId(row.team_id), name: row.name }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_keys_have_a_keys_form() {
        let key = Key::random().reveal();
        assert_eq!(key.len(), 36);
        assert!(Key::parse(&key).is_some());
        for bad in ["", "wrn_", &key[..35], &format!("{key}0"), &key.to_uppercase(), &key.replace("wrn_", "wrm_")] {
            assert!(Key::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn the_hash_is_that_of_the_whole_key() {
        // printf wrn_00000000000000000000000000000000 | sha256sum
        let key = Key::parse("wrn_00000000000000000000000000000000").unwrap();
        assert_eq!(key.hash(), "f25ce65e5b82763a211eafeb7b64dc971d9312fc95bd2496ad5b16a86b5411cf");
    }
}
