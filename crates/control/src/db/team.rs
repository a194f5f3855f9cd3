//! Teams: who owns things.

use api::TeamId;
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::OnConflict;
use sea_orm::{ActiveValue::Set, DatabaseConnection};

use super::{Error, now};

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "teams")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub name: String,
    #[sea_orm(unique)]
    pub slug: String,
    pub created_at: DateTimeUtc,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

/// The platform itself, which owns what every team may use.
pub const PLATFORM: TeamId = TeamId(Uuid::nil());

/// The team of that short name, made if it is not there; `id` is for a new one.
pub async fn ensure(db: &DatabaseConnection, id: TeamId, slug: &str, name: &str) -> Result<TeamId, Error> {
    let team = ActiveModel { id: Set(id.0), name: Set(name.into()), slug: Set(slug.into()), created_at: Set(now()) };
    let nothing = OnConflict::column(Column::Slug).do_nothing().to_owned();
    Entity::insert(team).on_conflict(nothing).exec_without_returning(db).await?;
    let team = Entity::find().filter(Column::Slug.eq(slug)).one(db).await?;
    Ok(team.map_or(id, |team| TeamId(team.id)))
}
