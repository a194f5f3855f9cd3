//! Hosts: where capsules run.

use agent_api::Endpoint;
use api::HostId;
use sea_orm::entity::prelude::*;
use sea_orm::sea_query::OnConflict;
use sea_orm::{ActiveValue::Set, DatabaseConnection};

use super::{Error, now};

#[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
#[sea_orm(table_name = "hosts")]
pub struct Model {
    #[sea_orm(primary_key, auto_increment = false)]
    pub id: Uuid,
    pub address: String,
    pub created_at: DateTimeUtc,
}

#[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
pub enum Relation {}

impl ActiveModelBehavior for ActiveModel {}

/// The one host of a control plane that is configured with an agent's address.
pub const CONFIGURED: HostId = HostId(Uuid::nil());

/// Records where that host is now; its capsules stay its own when its address changes.
pub async fn ensure(db: &DatabaseConnection, id: HostId, address: &Endpoint) -> Result<(), Error> {
    let host = ActiveModel { id: Set(id.0), address: Set(address.to_string()), created_at: Set(now()) };
    let update = OnConflict::column(Column::Id).update_column(Column::Address).to_owned();
    Entity::insert(host).on_conflict(update).exec_without_returning(db).await?;
    Ok(())
}
