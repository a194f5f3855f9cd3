//! Capsules: what is wanted of them, and what their hosts say. Rows are never deleted.

use std::collections::BTreeMap;

use api::egress::Policy;
use api::{CapsuleId, CapsuleSpec, HostId, TeamId};
use chrono::{DateTime, Utc};
use lifecycle::{Desired, Observed, Origin, State};
use sea_orm::entity::prelude::*;
use sea_orm::{ActiveValue::Set, DatabaseConnection, FromJsonQueryResult, QueryOrder};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::template::Pairs;
use super::{Error, now};

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "capsules")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub team_id: Uuid,
    pub host_id: Uuid,
    pub template: String,
    pub vcpus: i32,
    pub memory_mb: i32,
    pub disk_size_mb: i32,
    pub timeout_sec: i32,
    pub desired: String,
    pub observed: String,
    pub generation: i64,
    pub reason: Option<String>,
    #[sea_orm(column_type = "JsonBinary")]
    pub metadata: Pairs,
    #[sea_orm(column_type = "JsonBinary")]
    pub versions: Pairs,
    pub created_at: DateTimeUtc,
    pub started_at: Option<DateTimeUtc>,
    pub last_active_at: Option<DateTimeUtc>,
    pub last_updated: DateTimeUtc,
    pub parent_id: Option<Uuid>,
    pub auto_resume: bool,
    pub traffic_token_hash: Option<String>,
    #[sea_orm(column_type = "JsonBinary", nullable)]
    pub egress: Option<Limits>,
}

/// What a capsule may reach outside, as a column holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, FromJsonQueryResult)]
pub struct Limits(pub Policy);

impl Limits {
    /// Nothing where everything may be reached.
    fn of(policy: &Policy) -> Option<Self> {
        (!policy.is_open()).then(|| Self(policy.clone()))
    }
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

/// A capsule's row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capsule {
    pub id: CapsuleId,
    pub team: TeamId,
    pub host: HostId,
    pub spec: CapsuleSpec,
    pub created_at: DateTime<Utc>,
    /// The capsule it is a fork of.
    pub parent: Option<CapsuleId>,
    /// What its URLs want; nothing when knowing them is enough.
    pub traffic_token: Option<TokenHash>,
    pub life: Life,
}

impl Capsule {
    /// A capsule that is about to be asked for.
    pub fn new(team: TeamId, host: HostId, spec: CapsuleSpec, parent: Option<CapsuleId>) -> Self {
        let created_at = now();
        let life = Life {
            state: State::NEW,
            reason: None,
            versions: BTreeMap::new(),
            started_at: None,
            last_active_at: None,
            last_updated: created_at,
        };
        Self { id: CapsuleId::random(), team, host, spec, created_at, parent, traffic_token: None, life }
    }

    /// Has its URLs want a token, which is only ever seen here.
    pub fn restrict(&mut self) -> String {
        let (token, hash) = TokenHash::random();
        self.traffic_token = Some(hash);
        token
    }

    /// Where it begins.
    pub fn origin(&self) -> Origin {
        match self.parent {
            Some(_) => Origin::Fork,
            None => Origin::Template,
        }
    }
}

/// What is kept of a token: SHA-256, in hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenHash(String);

impl TokenHash {
    /// A new token, and what is kept of it.
    pub fn random() -> (String, Self) {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
        let token = hex::encode(bytes);
        let hash = Self::of(&token);
        (token, hash)
    }

    /// Whether it is of that token. How long this takes tells nothing: who could choose the hash of what they try could do
    /// better things.
    pub fn is_of(&self, token: &str) -> bool {
        *self == Self::of(token)
    }

    fn of(token: &str) -> Self {
        Self(hex::encode(Sha256::digest(token.as_bytes())))
    }
}

/// The part of a capsule's row that changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Life {
    pub state: State,
    /// Why it ended, is missing or was paused, for a person to read.
    pub reason: Option<String>,
    /// Of the programs that run it, as its host reports them.
    pub versions: BTreeMap<String, String>,
    pub started_at: Option<DateTime<Utc>>,
    pub last_active_at: Option<DateTime<Utc>>,
    pub last_updated: DateTime<Utc>,
}

fn desired_word(desired: Desired) -> &'static str {
    match desired {
        Desired::Running => "running",
        Desired::Paused => "paused",
        Desired::Stopped => "stopped",
    }
}

fn desired_of(word: &str) -> Option<Desired> {
    [Desired::Running, Desired::Paused, Desired::Stopped].into_iter().find(|&desired| desired_word(desired) == word)
}

const OBSERVED: [Observed; 12] = [
    Observed::Unreported,
    Observed::Starting,
    Observed::Running,
    Observed::Pausing,
    Observed::Paused,
    Observed::Uploaded,
    Observed::Hibernated,
    Observed::Resuming,
    Observed::Stopping,
    Observed::Missing,
    Observed::Stopped,
    Observed::Failed,
];

fn observed_word(observed: Observed) -> &'static str {
    match observed {
        Observed::Unreported => "unreported",
        Observed::Starting => "starting",
        Observed::Running => "running",
        Observed::Pausing => "pausing",
        Observed::Paused => "paused",
        Observed::Uploaded => "uploaded",
        Observed::Hibernated => "hibernated",
        Observed::Resuming => "resuming",
        Observed::Stopping => "stopping",
        Observed::Missing => "missing",
        Observed::Stopped => "stopped",
        Observed::Failed => "failed",
    }
}

fn observed_of(word: &str) -> Option<Observed> {
    OBSERVED.into_iter().find(|&observed| observed_word(observed) == word)
}

/// The words of the states in which a capsule's life is over.
fn ended_words() -> impl Iterator<Item = &'static str> {
    OBSERVED.into_iter().filter(|observed| observed.ended()).map(observed_word)
}

impl TryFrom<Model> for Capsule {
    type Error = Error;

    fn try_from(row: Model) -> Result<Self, Error> {
        fn number<T: TryFrom<i64>>(column: &'static str, value: i64) -> Result<T, Error> {
            T::try_from(value).map_err(|_| Error::Corrupt { column, value: value.to_string() })
        }
        let corrupt = |column, value: &str| Error::Corrupt { column, value: value.into() };
        Ok(Self {
            id: CapsuleId(row.id),
            team: TeamId(row.team_id),
            host: HostId(row.host_id),
            spec: CapsuleSpec {
                template: row.template.parse().map_err(|_| corrupt("capsules.template", &row.template))?,
                vcpus: number("capsules.vcpus", row.vcpus.into())?,
                memory_mb: number("capsules.memory_mb", row.memory_mb.into())?,
                disk_size_mb: number("capsules.disk_size_mb", row.disk_size_mb.into())?,
                timeout_sec: number("capsules.timeout_sec", row.timeout_sec.into())?,
                metadata: row.metadata.0,
                auto_resume: row.auto_resume,
                egress: row.egress.map(|limits| limits.0).unwrap_or_default(),
            },
            created_at: row.created_at,
            parent: row.parent_id.map(CapsuleId),
            traffic_token: row.traffic_token_hash.map(TokenHash),
            life: Life {
                state: State {
                    desired: desired_of(&row.desired).ok_or_else(|| corrupt("capsules.desired", &row.desired))?,
                    observed: observed_of(&row.observed).ok_or_else(|| corrupt("capsules.observed", &row.observed))?,
                    generation: number("capsules.generation", row.generation)?,
                },
                reason: row.reason,
                versions: row.versions.0,
                started_at: row.started_at,
                last_active_at: row.last_active_at,
                last_updated: row.last_updated,
            },
        })
    }
}

/// A number of ours as a column holds it. Everything we store is far below the column's end; a host's generation may claim
/// not to be.
fn column<T: TryFrom<u64>>(value: impl Into<u64>, end: T) -> T {
    T::try_from(value.into()).unwrap_or(end)
}

/// Writes down capsules that are about to be asked for: all or none.
pub async fn insert(db: &DatabaseConnection, capsules: &[Capsule]) -> Result<(), Error> {
    let rows = capsules.iter().map(|capsule| ActiveModel {
        id: Set(capsule.id.0),
        team_id: Set(capsule.team.0),
        host_id: Set(capsule.host.0),
        template: Set(capsule.spec.template.to_string()),
        vcpus: Set(column(capsule.spec.vcpus, i32::MAX)),
        memory_mb: Set(column(capsule.spec.memory_mb, i32::MAX)),
        disk_size_mb: Set(column(capsule.spec.disk_size_mb, i32::MAX)),
        timeout_sec: Set(column(capsule.spec.timeout_sec, i32::MAX)),
        metadata: Set(Pairs(capsule.spec.metadata.clone())),
        created_at: Set(capsule.created_at),
        parent_id: Set(capsule.parent.map(|parent| parent.0)),
        auto_resume: Set(capsule.spec.auto_resume),
        egress: Set(Limits::of(&capsule.spec.egress)),
        traffic_token_hash: Set(capsule.traffic_token.clone().map(|hash| hash.0)),
        ..changing(&capsule.life)
    });
    Entity::insert_many(rows).exec_without_returning(db).await?;
    Ok(())
}

/// The columns that change.
fn changing(life: &Life) -> ActiveModel {
    ActiveModel {
        desired: Set(desired_word(life.state.desired).into()),
        observed: Set(observed_word(life.state.observed).into()),
        generation: Set(column(life.state.generation, i64::MAX)),
        reason: Set(life.reason.clone()),
        versions: Set(Pairs(life.versions.clone())),
        started_at: Set(life.started_at),
        last_active_at: Set(life.last_active_at),
        last_updated: Set(life.last_updated),
        ..Default::default()
    }
}

/// Writes `life` over the row if its state is still what `seen` read; `false` means that someone was faster.
pub async fn advance(db: &DatabaseConnection, seen: &Capsule, life: &Life) -> Result<bool, Error> {
    let state = seen.life.state;
    let query = Entity::update_many()
        .set(changing(life))
        .filter(Column::Id.eq(seen.id.0))
        .filter(Column::TeamId.eq(seen.team.0))
        .filter(Column::Desired.eq(desired_word(state.desired)))
        .filter(Column::Observed.eq(observed_word(state.observed)))
        .filter(Column::Generation.eq(column(state.generation, i64::MAX)));
    Ok(query.exec(db).await?.rows_affected == 1)
}

/// The team's capsule of that id.
pub async fn get(db: &DatabaseConnection, team: TeamId, id: CapsuleId) -> Result<Option<Capsule>, Error> {
    let row = Entity::find_by_id(id.0).filter(Column::TeamId.eq(team.0)).one(db).await?;
    row.map(Capsule::try_from).transpose()
}

/// The capsule of that id, for whoever knows a URL of it.
pub async fn get_any_team(db: &DatabaseConnection, id: CapsuleId) -> Result<Option<Capsule>, Error> {
    Entity::find_by_id(id.0).one(db).await?.map(Capsule::try_from).transpose()
}

/// Has the URLs of the team's capsule want another token, or none.
pub async fn set_traffic_token(
    db: &DatabaseConnection,
    team: TeamId,
    id: CapsuleId,
    token: Option<TokenHash>,
) -> Result<(), Error> {
    let new = ActiveModel { traffic_token_hash: Set(token.map(|hash| hash.0)), ..Default::default() };
    let query = Entity::update_many().set(new).filter(Column::Id.eq(id.0)).filter(Column::TeamId.eq(team.0));
    query.exec(db).await?;
    Ok(())
}

/// Has the team's capsule reach that outside.
pub async fn set_egress(db: &DatabaseConnection, team: TeamId, id: CapsuleId, policy: &Policy) -> Result<(), Error> {
    let new = ActiveModel { egress: Set(Limits::of(policy)), last_updated: Set(now()), ..Default::default() };
    let query = Entity::update_many().set(new).filter(Column::Id.eq(id.0)).filter(Column::TeamId.eq(team.0));
    query.exec(db).await?;
    Ok(())
}

/// The team's capsules that have not ended, newest first.
pub async fn list(db: &DatabaseConnection, team: TeamId) -> Result<Vec<Capsule>, Error> {
    let query = Entity::find().filter(Column::TeamId.eq(team.0)).filter(Column::Observed.is_not_in(ended_words()));
    let rows = query.order_by_desc(Column::CreatedAt).order_by_desc(Column::Id).all(db).await?;
    rows.into_iter().map(Capsule::try_from).collect()
}

/// A host's capsules that have not ended.
pub async fn alive_on_any_team(db: &DatabaseConnection, host: HostId) -> Result<Vec<Capsule>, Error> {
    let query = Entity::find().filter(Column::HostId.eq(host.0)).filter(Column::Observed.is_not_in(ended_words()));
    query.all(db).await?.into_iter().map(Capsule::try_from).collect()
}

/// Those of these capsules that exist.
pub async fn these_any_team(
    db: &DatabaseConnection,
    ids: impl Iterator<Item = CapsuleId>,
) -> Result<Vec<Capsule>, Error> {
    let query = Entity::find().filter(Column::Id.is_in(ids.map(|id| id.0)));
    query.all(db).await?.into_iter().map(Capsule::try_from).collect()
}
