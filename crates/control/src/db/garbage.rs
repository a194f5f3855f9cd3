//! What hosts still have to forget: templates that are being made, until they are, and those that were deleted, until their hosts
//! have heard of it. Whatever dies in between, nothing is left on a host that no row knows.

use api::HostId;
use chrono::{DateTime, Utc};
use sea_orm::entity::prelude::*;
use sea_orm::{ActiveValue::Set, ConnectionTrait, DatabaseConnection};

use super::{Error, now};

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "template_garbage")]
pub struct Model {
    /// The template's.
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub host_id: Uuid,
    /// The host's name for it.
    pub image: String,
    /// Until then it is still being made.
    pub due_at: DateTimeUtc,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

/// Has the host forget the template from `due_at` on.
pub async fn insert(
    db: &impl ConnectionTrait,
    id: Uuid,
    host: HostId,
    image: &str,
    due_at: DateTime<Utc>,
) -> Result<(), Error> {
    let row = ActiveModel { id: Set(id), host_id: Set(host.0), image: Set(image.into()), due_at: Set(due_at) };
    Entity::insert(row).exec_without_returning(db).await?;
    Ok(())
}

/// The host has forgotten it, or need not.
pub async fn remove(db: &impl ConnectionTrait, id: Uuid) -> Result<(), Error> {
    Entity::delete_by_id(id).exec(db).await?;
    Ok(())
}

/// What is being made will not be.
pub async fn hasten(db: &DatabaseConnection, id: Uuid) -> Result<(), Error> {
    let query = Entity::update_many().set(ActiveModel { due_at: Set(now()), ..Default::default() });
    query.filter(Column::Id.eq(id)).exec(db).await?;
    Ok(())
}

/// What the host is to forget by now.
pub async fn due(db: &DatabaseConnection, host: HostId) -> Result<Vec<Model>, Error> {
    Ok(Entity::find().filter(Column::HostId.eq(host.0)).filter(Column::DueAt.lte(now())).all(db).await?)
}
