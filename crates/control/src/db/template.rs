//! Templates: what capsules are made from.

use std::collections::BTreeMap;

use api::{SafeName, TeamId, TemplateKind};
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::OnConflict;
use sea_orm::{ActiveValue::Set, DatabaseConnection, FromJsonQueryResult, QueryOrder};
use serde::{Deserialize, Serialize};

use super::{Error, now, team};

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
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

impl Model {
    /// What the template holds.
    pub fn kind(&self) -> Result<TemplateKind, Error> {
        match self.kind.as_str() {
            "base" => Ok(TemplateKind::Base),
            "snapshot" => Ok(TemplateKind::Snapshot),
            other => Err(Error::Corrupt { column: "templates.kind", value: other.into() }),
        }
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
        kind: Set("base".into()),
        vcpus: Set(api::limits::DEFAULT_VCPUS as i32),
        memory_mb: Set(api::limits::DEFAULT_MEMORY_MB as i32),
        size_bytes: Set(0),
        image: Set(SafeName::default().to_string()),
        protected: Set(true),
        default_env: Set(Pairs::default()),
        metadata: Set(Pairs::default()),
        created_at: Set(now()),
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

/// Every template the team may use, newest first.
pub async fn list(db: &DatabaseConnection, team: TeamId) -> Result<Vec<Model>, Error> {
    let query = Entity::find().filter(Column::TeamId.is_in([team.0, team::PLATFORM.0]));
    Ok(query.order_by_desc(Column::CreatedAt).order_by_desc(Column::Id).all(db).await?)
}
