//! Who asks, and what they ask about: a handler that names one of these in its arguments cannot forget the check.
//!
//! ```text
//! Caller ─► Capsule (the row is the caller's) ─► Guest (and can be used)
//!        ─► Template (the row is the caller's, or the platform's)
//! ```

use api::{Actor, ActorKind, CapsuleId, ErrorCode, SafeName, TeamId};
use axum::extract::{FromRequestParts, RawPathParams};
use axum::http::request::Parts;

use super::App;
use super::error::Error;
use crate::db::key::Key;
use crate::op::usable::patience;
use crate::{db, op};

/// The header that carries a key.
const HEADER: &str = "x-api-key";

/// The holder of the key that came with the request.
#[derive(Debug, Clone)]
pub struct Caller {
    pub team: TeamId,
    pub actor: Actor,
}

impl Caller {
    /// The holder of that key, which is what clients send as one.
    pub async fn of_key(app: &App, key: &str) -> Result<Self, Error> {
        let refuse = |message| Error::new(ErrorCode::Unauthorized, message);
        let key = Key::parse(key).ok_or_else(|| refuse("the API key is not one"))?;
        let known =
            db::key::find_any_team(&app.ctx.db, &key).await?.ok_or_else(|| refuse("the API key is not known"))?;
        let actor = Actor { kind: ActorKind::ApiKey, id: Some(known.id.to_string()), name: Some(known.name) };
        Ok(Self { team: known.team, actor })
    }

    /// The holder of the key in the headers, if there is one.
    pub async fn of_headers(app: &App, parts: &Parts) -> Result<Option<Self>, Error> {
        let Some(header) = parts.headers.get(HEADER) else { return Ok(None) };
        // What is not text is no key either.
        Self::of_key(app, header.to_str().unwrap_or_default()).await.map(Some)
    }

    /// The capsule of that id, which is the caller's.
    pub async fn capsule(&self, app: &App, id: CapsuleId) -> Result<db::capsule::Capsule, Error> {
        let capsule = db::capsule::get(&app.ctx.db, self.team, id).await?;
        capsule.ok_or_else(|| Error::new(ErrorCode::NotFound, format!("there is no capsule {id}")))
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let missing = || Error::new(ErrorCode::Unauthorized, "the header X-API-Key is missing");
        Self::of_headers(app, parts).await?.ok_or_else(missing)
    }
}

/// The capsule the path names, which is the caller's.
pub struct Capsule {
    pub caller: Caller,
    pub row: db::capsule::Capsule,
}

impl FromRequestParts<App> for Capsule {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let caller = Caller::from_request_parts(parts, app).await?;
        let id = id(parts, app).await?;
        let row = caller.capsule(app, id).await?;
        Ok(Self { caller, row })
    }
}

/// The template the path names, which the caller may use.
pub struct Template {
    pub caller: Caller,
    pub row: db::template::Model,
}

impl FromRequestParts<App> for Template {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let caller = Caller::from_request_parts(parts, app).await?;
        let name = parameter(parts, app, "name").await?;
        // What is no name is nobody's.
        let row = match name.parse::<SafeName>() {
            Ok(name) => db::template::find(&app.ctx.db, caller.team, &name.canonical_template()).await?,
            Err(_) => None,
        };
        let row = row.ok_or_else(|| Error::new(ErrorCode::NotFound, format!("there is no template `{name}`")))?;
        Ok(Self { caller, row })
    }
}

/// The inside of the capsule the path names, which is the caller's and can be used. One that is starting is waited for.
pub struct Guest(pub op::guest::Guest);

impl FromRequestParts<App> for Guest {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let Capsule { row, .. } = Capsule::from_request_parts(parts, app).await?;
        Ok(Self(op::guest::enter(&app.ctx, row, patience()).await?))
    }
}

/// The capsule's id in the path. Whose it is has yet to be asked.
pub async fn id(parts: &mut Parts, app: &App) -> Result<CapsuleId, Error> {
    let text = parameter(parts, app, "id").await?;
    text.parse()
        .map_err(|error| Error::new(ErrorCode::InvalidRequest, format!("id `{text}` is not a capsule's: {error}")))
}

/// A part of the path, decoded.
pub async fn parameter(parts: &mut Parts, app: &App, name: &str) -> Result<String, Error> {
    let invalid = || Error::new(ErrorCode::InvalidRequest, format!("{name} is not text"));
    let all = RawPathParams::from_request_parts(parts, app).await.map_err(|_| invalid())?;
    let found = all.iter().find_map(|(key, value)| (key == name).then(|| value.to_owned()));
    found.ok_or_else(invalid)
}

/// The process the path names.
pub struct Selector(pub api::Selector);

impl FromRequestParts<App> for Selector {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        Ok(Self(api::Selector::parse(&parameter(parts, app, "selector").await?)?))
    }
}

/// A value of the query, or its default when it is absent: the types that have a default and are read from text.
pub fn query<T>(parts: &Parts, name: &str) -> Result<T, Error>
where
    T: Default + std::str::FromStr<Err = api::Invalid>,
{
    let pairs = form_urlencoded::parse(parts.uri.query().unwrap_or_default().as_bytes());
    // The last of several counts.
    match pairs.filter(|(key, _)| key == name).last() {
        Some((_, value)) => Ok(value.parse()?),
        None => Ok(T::default()),
    }
}
