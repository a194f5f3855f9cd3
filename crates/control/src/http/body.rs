//! JSON bodies: bounded, and refused with the name of the field that is wrong.

use api::{ErrorCode, limits};
use axum::extract::{FromRequest, Request};
use axum::http::header::CONTENT_LENGTH;
use futures::StreamExt;
use serde::de::DeserializeOwned;

use super::error::Error;

/// A JSON body of at most [`limits::JSON_BODY_BYTES`], whatever content type it claims.
pub struct Json<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Error;

    async fn from_request(request: Request, _: &S) -> Result<Self, Error> {
        let bytes = read(request).await?;
        // Serde would also take a list, as the fields in their order.
        if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
            return Err(Error::new(ErrorCode::InvalidRequest, "the body must be a JSON object"));
        }
        let mut json = serde_json::Deserializer::from_slice(&bytes);
        let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let path = error.path().to_string();
            let problem = error.into_inner();
            let message =
                if path == "." { format!("the body is not right: {problem}") } else { format!("{path}: {problem}") };
            Error::new(ErrorCode::InvalidRequest, message)
        })?;
        json.end().map_err(|error| Error::new(ErrorCode::InvalidRequest, format!("the body is not right: {error}")))?;
        Ok(Self(value))
    }
}

async fn read(request: Request) -> Result<Vec<u8>, Error> {
    let claimed = request.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    let mut stream = request.into_body().into_data_stream();
    let mut bytes = Vec::with_capacity(claimed.unwrap_or(0).min(limits::JSON_BODY_BYTES));
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|_| Error::new(ErrorCode::InvalidRequest, "the body ended before its end"))?;
        if bytes.len() + chunk.len() > limits::JSON_BODY_BYTES {
            let message = format!("a JSON body must be at most {} bytes long", limits::JSON_BODY_BYTES);
            return Err(Error::new(ErrorCode::TooLarge, message));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}
