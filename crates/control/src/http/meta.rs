//! What the API says about itself: `/health` and `/openapi.yaml`.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::security::{ApiKey, ApiKeyValue, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Components, InfoBuilder, OpenApi, OpenApiBuilder, Paths, ServerBuilder};

use super::App;

/// The document every route adds itself to.
pub fn document() -> OpenApi {
    let mut components = Components::new();
    let key = ApiKey::Header(ApiKeyValue::with_description("X-API-Key", "`wrn_` and 32 hexadecimal digits"));
    components.add_security_scheme("apiKey", SecurityScheme::ApiKey(key));
    let info = InfoBuilder::new()
        .title("Wrenn")
        .version("1")
        .description(Some(
            "MicroVM capsules for untrusted code. Every error is `{\"error\":{\"code\",\"message\"}}`; choose by the code. Every path is also under `/api`.",
        ))
        .build();
    OpenApiBuilder::new()
        .info(info)
        .servers(Some([ServerBuilder::new().url("/").build()]))
        .components(Some(components))
        .security(Some([SecurityRequirement::new("apiKey", std::iter::empty::<String>())]))
        .paths(Paths::new())
        .build()
}

/// The program's health.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// `ok`.
    pub status: String,
    pub version: String,
}

/// Ask whether the API answers
///
/// Without a key.
#[utoipa::path(
    get, path = "/health", tag = "meta", operation_id = "health", security(()),
    responses((status = 200, description = "It does", body = Health))
)]
pub async fn health(State(app): State<App>) -> Json<Health> {
    Json(Health { status: "ok".into(), version: app.version.to_string() })
}

/// Get this document
///
/// Without a key.
#[utoipa::path(
    get, path = "/openapi.yaml", tag = "meta", operation_id = "openapi", security(()),
    responses((status = 200, description = "This document", body = String, content_type = "application/yaml"))
)]
pub async fn openapi() -> impl IntoResponse {
    static TEXT: LazyLock<String> = LazyLock::new(yaml);
    ([(CONTENT_TYPE, "application/yaml")], TEXT.as_str())
}

/// The document as text.
pub fn yaml() -> String {
    super::description().to_yaml().expect("the document is plain data")
}
