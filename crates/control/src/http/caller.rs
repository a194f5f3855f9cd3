//! Who asks, and the row they ask about: a handler that names these in its arguments cannot forget the check.

use api::{CapsuleId, ErrorCode, TeamId};
use axum::extract::{FromRequestParts, Path};
use axum::http::request::Parts;

use super::App;
use super::error::Error;
use crate::db;
use crate::db::key::Key;

/// The team whose key came with the request, as `X-API-Key`.
#[derive(Debug, Clone, Copy)]
pub struct Team(pub TeamId);

impl FromRequestParts<App> for Team {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let refuse = |message| Error::new(ErrorCode::Unauthorized, message);
        let header = parts.headers.get("x-api-key").ok_or_else(|| refuse("the header X-API-Key is missing"))?;
        let key = header.to_str().ok().and_then(Key::parse).ok_or_else(|| refuse("the API key is not one"))?;
        let team = db::key::team_of_any_team(&app.ctx.db, &key).await?;
        team.map(Self).ok_or_else(|| refuse("the API key is not known"))
    }
}

/// The capsule the path names, which is the caller's.
pub struct Capsule(pub db::capsule::Capsule);

impl FromRequestParts<App> for Capsule {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let Team(team) = Team::from_request_parts(parts, app).await?;
        let invalid = |message| Error::new(ErrorCode::InvalidRequest, message);
        let Path(text) =
            Path::<String>::from_request_parts(parts, app).await.map_err(|_| invalid("id is not text".into()))?;
        let id: CapsuleId =
            text.parse().map_err(|error| invalid(format!("id `{text}` is not a capsule's: {error}")))?;
        let capsule = db::capsule::get(&app.ctx.db, team, id).await?;
        capsule.map(Self).ok_or_else(|| Error::new(ErrorCode::NotFound, format!("there is no capsule {id}")))
    }
}
