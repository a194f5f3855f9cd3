//! What many routes have in common in the description: their errors and the capsule in their path.

use std::collections::BTreeMap;

use api::ErrorBody;
use utoipa::openapi::path::{Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{ContentBuilder, Ref, RefOr, Required, Response, ResponseBuilder};
use utoipa::{IntoParams, IntoResponses, ToSchema};

type Responses = BTreeMap<String, RefOr<Response>>;

fn errors(list: &[(u16, &str)]) -> Responses {
    let error = |text: &str| {
        let body = ContentBuilder::new().schema(Some(Ref::from_schema_name(ErrorBody::name()))).build();
        ResponseBuilder::new().description(text).content("application/json", body).build()
    };
    list.iter().map(|(status, text)| (status.to_string(), error(text).into())).collect()
}

/// What can go wrong with every request that needs a key.
pub struct OfTeam;

impl IntoResponses for OfTeam {
    fn responses() -> Responses {
        errors(&[
            (401, "`unauthorized`: the key is missing or not known"),
            (503, "`unavailable`: the platform's database does not answer"),
        ])
    }
}

/// What can go wrong with every request about a capsule.
pub struct OfCapsule;

impl IntoResponses for OfCapsule {
    fn responses() -> Responses {
        let mut all = OfTeam::responses();
        all.extend(errors(&[
            (400, "`invalid_request`: the id is not one, or a field is outside its bounds"),
            (404, "`not_found`: the team has no such capsule"),
        ]));
        all
    }
}

/// What can go wrong with every request that goes into a capsule.
pub struct OfGuest;

impl IntoResponses for OfGuest {
    fn responses() -> Responses {
        let mut all = OfCapsule::responses();
        all.extend(errors(&[
            (409, "`invalid_state`: the capsule does not run"),
            (502, "`agent_error`: the capsule went away meanwhile"),
            (503, "`host_unavailable`: its host does not answer; `unavailable`: the platform's database does not, or the capsule has too many calls open"),
        ]));
        all
    }
}

/// What a socket can be refused with before it is one. Later there are only messages.
pub struct OfSocket;

impl IntoResponses for OfSocket {
    fn responses() -> Responses {
        let mut all = OfCapsule::responses();
        let upgraded = ResponseBuilder::new().description("From here on, messages").build();
        all.insert("101".into(), upgraded.into());
        all.extend(errors(&[
            (400, "`invalid_request`: the id is not one, or this is not the beginning of a WebSocket"),
            (401, "`unauthorized`: the key in the header is not known"),
        ]));
        all
    }
}

/// The capsule in the path.
pub struct InCapsule;

impl IntoParams for InCapsule {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        vec![in_path("id", "The capsule")]
    }
}

/// The capsule and the process in the path.
pub struct InProcess;

impl IntoParams for InProcess {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        vec![in_path("id", "The capsule"), in_path("selector", "Digits are a pid, anything else a tag")]
    }
}

fn in_path(name: &str, text: &str) -> Parameter {
    let schema = ObjectBuilder::new().schema_type(Type::String).build();
    let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Path).description(Some(text));
    parameter.required(Required::True).schema(Some(schema)).build()
}
