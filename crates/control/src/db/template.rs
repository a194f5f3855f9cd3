//! Templates: what capsules are made from.

use std::collections::BTreeMap;

use api::{HostId, SafeName, Sizes, TeamId, TemplateId, TemplateKind};
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::OnConflict;
use sea_orm::{
    ActiveValue::Set, DatabaseConnection, FromJsonQueryResult, IntoActiveModel, QueryOrder, SqlErr, TransactionTrait,
};
use serde::{Deserialize, Serialize};

use super::{Error, garbage, now, team};

/// Names and values kept in one column.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, FromJsonQueryResult)]
pub struct Pairs(pub BTreeMap<String, String>);

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "templates")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub team_id: Uuid,
    pub name: String,
    pub kind: String,
    pub vcpus: i32,
    pub memory_mb: i32,
    pub size_bytes: i64,
    pub image: String,
    pub protected: bool,
    #[sea_orm(column_type = "JsonBinary")]
    pub default_env: Pairs,
    #[sea_orm(column_type = "JsonBinary")]
    pub metadata: Pairs,
    pub created_at: DateTimeUtc,
    pub disk_size_mb: i32,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

impl Model {
    /// What the template holds.
    pub fn kind(&self) -> Result<TemplateKind, Error> {
        let known = [TemplateKind::Base, TemplateKind::Snapshot].into_iter().find(|&kind| kind_word(kind) == self.kind);
        known.ok_or_else(|| Error::Corrupt { column: "templates.kind", value: self.kind.clone() })
    }

    /// The sizes that are built into it.
    pub fn baked(&self) -> Result<Option<Sizes>, Error> {
        let sizes = || Sizes {
            // Never negative: we wrote them.
            vcpus: self.vcpus.unsigned_abs(),
            memory_mb: self.memory_mb.unsigned_abs(),
            disk_size_mb: self.disk_size_mb.unsigned_abs(),
        };
        Ok(match self.kind()? {
            TemplateKind::Base => None,
            TemplateKind::Snapshot => Some(sizes()),
        })
    }

    /// Whether every team may use it.
    pub fn platform(&self) -> bool {
        self.team_id == team::PLATFORM.0
    }
}

/// Makes sure that the default template is there.
pub async fn ensure_default(db: &DatabaseConnection) -> Result<(), Error> {
    let default = ActiveModel {
        id: Set(Uuid::nil()),
        team_id: Set(team::PLATFORM.0),
        name: Set(SafeName::default().to_string()),
        kind: Set(kind_word(TemplateKind::Base).into()),
        vcpus: Set(api::limits::DEFAULT_VCPUS as i32),
        memory_mb: Set(api::limits::DEFAULT_MEMORY_MB as i32),
        size_bytes: Set(0),
        image: Set(SafeName::default().to_string()),
        protected: Set(true),
        default_env: Set(Pairs::default()),
        metadata: Set(Pairs::default()),
        created_at: Set(now()),
        disk_size_mb: Set(api::limits::DEFAULT_DISK_SIZE_MB as i32),
    };
    let nothing = OnConflict::column(Column::Id).do_nothing().to_owned();
    Entity::insert(default).on_conflict(nothing).exec_without_returning(db).await?;
    Ok(())
}

/// The template of that name which the team may use: its own, or the platform's.
pub async fn find(db: &DatabaseConnection, team: TeamId, name: &SafeName) -> Result<Option<Model>, Error> {
    let query =
        Entity::find().filter(Column::TeamId.is_in([team.0, team::PLATFORM.0])).filter(Column::Name.eq(name.as_str()));
    let rows = query.all(db).await?;
    // The platform's names are not to be taken over.
    Ok(rows.into_iter().max_by_key(Model::platform))
}

/// Every template the team may use, or those of one kind, newest first.
pub async fn list(db: &DatabaseConnection, team: TeamId, kind: Option<TemplateKind>) -> Result<Vec<Model>, Error> {
    let mut query = Entity::find().filter(Column::TeamId.is_in([team.0, team::PLATFORM.0]));
    if let Some(kind) = kind {
        query = query.filter(Column::Kind.eq(kind_word(kind)));
    }
    Ok(query.order_by_desc(Column::CreatedAt).order_by_desc(Column::Id).all(db).await?)
}

/// A template that came of a capsule.
#[derive(Debug, Clone)]
pub struct Snapshot {
    pub id: TemplateId,
    pub team: TeamId,
    pub name: SafeName,
    pub sizes: Sizes,
    pub size_bytes: u64,
    pub default_env: BTreeMap<String, String>,
    pub metadata: BTreeMap<String, String>,
}

/// Turns what was garbage while it was being made into a template, in place of the team's template of that name if it may
/// `overwrite` one, which is garbage then. `None` when the name is taken.
pub async fn publish(
    db: &DatabaseConnection,
    host: HostId,
    snapshot: Snapshot,
    overwrite: bool,
) -> Result<Option<Model>, Error> {
    let number = |value: u32| i32::try_from(value).unwrap_or(i32::MAX);
    let template = Model {
        id: snapshot.id.0,
        team_id: snapshot.team.0,
        name: snapshot.name.to_string(),
        kind: kind_word(TemplateKind::Snapshot).into(),
        vcpus: number(snapshot.sizes.vcpus),
        memory_mb: number(snapshot.sizes.memory_mb),
        size_bytes: i64::try_from(snapshot.size_bytes).unwrap_or(i64::MAX),
        image: snapshot.id.to_string(),
        protected: false,
        default_env: Pairs(snapshot.default_env),
        metadata: Pairs(snapshot.metadata),
        created_at: now(),
        disk_size_mb: number(snapshot.sizes.disk_size_mb),
    };
    let tx = db.begin().await?;
    // A write comes first: SQLite then has this transaction wait for others, where one that began with a read would fail.
    garbage::remove(&tx, template.id).await?;
    let of_name = Entity::find().filter(Column::TeamId.eq(template.team_id)).filter(Column::Name.eq(&*template.name));
    match of_name.one(&tx).await? {
        Some(_) if !overwrite => return Ok(None),
        Some(old) => {
            garbage::insert(&tx, old.id, host, &old.image, now()).await?;
            Entity::delete_by_id(old.id).exec(&tx).await?;
        }
        None => {}
    }
    match Entity::insert(template.clone().into_active_model()).exec_without_returning(&tx).await {
        Ok(_) => {}
        // Another was faster since we looked.
        Err(error) if matches!(error.sql_err(), Some(SqlErr::UniqueConstraintViolation(_))) => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    }
    tx.commit().await?;
    Ok(Some(template))
}

/// Makes garbage of a template; `false` when another was faster.
pub async fn remove(db: &DatabaseConnection, host: HostId, template: &Model) -> Result<bool, Error> {
    let tx = db.begin().await?;
    if Entity::delete_by_id(template.id).exec(&tx).await?.rows_affected == 0 {
        return Ok(false);
    }
    garbage::insert(&tx, template.id, host, &template.image, now()).await?;
    tx.commit().await?;
    Ok(true)
}

fn kind_word(kind: TemplateKind) -> &'static str {
    match kind {
        TemplateKind::Base => "base",
        TemplateKind::Snapshot => "snapshot",
    }
}
