//! Who may use a capsule's URLs.

use super::{Context, Error};
use crate::db;
use crate::db::capsule::{Capsule, TokenHash};

/// Has the capsule's URLs want a new token, and answers it. One that they wanted before is worth nothing any more.
pub async fn restrict(ctx: &Context, capsule: &Capsule) -> Result<String, Error> {
    let (token, hash) = TokenHash::random();
    set(ctx, capsule, Some(hash)).await?;
    Ok(token)
}

/// Lets everyone use the capsule's URLs who knows them.
pub async fn open(ctx: &Context, capsule: &Capsule) -> Result<(), Error> {
    set(ctx, capsule, None).await
}

async fn set(ctx: &Context, capsule: &Capsule, token: Option<TokenHash>) -> Result<(), Error> {
    db::capsule::set_traffic_token(&ctx.db, capsule.team, capsule.id, token).await?;
    ctx.reachable.forget(capsule.id);
    Ok(())
}
