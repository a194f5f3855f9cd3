//! `/v1/capsules/{id}/files`

use api::{Depth, DirectoryEntries, ErrorBody, FileForm, FilePath, MadeDirectory, limits};
use axum::Json;
use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};

use super::answers::{InCapsule, OfGuest};
use super::caller::Guest;
use super::error::Error;
use super::{body, upload};
use crate::op::{self, files};

/// List a directory
///
/// Parents come before their children, by name. Links are not followed.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/list", tag = "files", operation_id = "listFiles", params(InCapsule),
    request_body = Depth,
    responses(
        (status = 200, description = "What is in it", body = DirectoryEntries),
        OfGuest,
        (status = 404, description = "`not_found`: the team has no such capsule, or the path is no directory", body = ErrorBody),
        (status = 413, description = "`too_large`: the body, or a listing of more than 500,000 entries", body = ErrorBody),
    )
)]
pub async fn list(
    Guest(guest): Guest,
    body::Json(request): body::Json<Depth>,
) -> Result<Json<DirectoryEntries>, Error> {
    let (path, depth) = request.validate()?;
    Ok(Json(DirectoryEntries { entries: files::list(&guest, path, depth).await? }))
}

/// Make a directory
///
/// With its parents.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/mkdir", tag = "files", operation_id = "makeDirectory", params(InCapsule),
    request_body = FilePath,
    responses(
        (status = 200, description = "The directory", body = MadeDirectory),
        OfGuest,
        (status = 409, description = "`conflict`: it is there; `invalid_state`: the capsule does not run", body = ErrorBody),
        (status = 507, description = "`disk_full`", body = ErrorBody),
    )
)]
pub async fn mkdir(
    Guest(guest): Guest,
    body::Json(request): body::Json<FilePath>,
) -> Result<Json<MadeDirectory>, Error> {
    Ok(Json(MadeDirectory { entry: files::make_directory(&guest, request.validate()?).await? }))
}

/// Remove a file or directory
///
/// With everything inside.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/remove", tag = "files", operation_id = "removeFile", params(InCapsule),
    request_body = FilePath,
    responses(
        (status = 204, description = "It is gone"),
        OfGuest,
        (status = 404, description = "`not_found`: the team has no such capsule, or there is nothing at the path", body = ErrorBody),
    )
)]
pub async fn remove(Guest(guest): Guest, body::Json(request): body::Json<FilePath>) -> Result<StatusCode, Error> {
    files::remove(&guest, request.validate()?).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Read a file
///
/// Its bytes come as they are read, with their number in front. An answer that is shorter broke off.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/read", tag = "files", operation_id = "readFile", params(InCapsule),
    request_body = FilePath,
    responses(
        (status = 200, description = "What is in it", body = [u8], content_type = "application/octet-stream"),
        OfGuest,
        (status = 404, description = "`not_found`: the team has no such capsule, or there is no such file", body = ErrorBody),
    )
)]
pub async fn read(Guest(guest): Guest, body::Json(request): body::Json<FilePath>) -> Result<Response, Error> {
    contents(&guest, request).await
}

/// Read a file as a stream
///
/// The same as `files/read`.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/stream/read", tag = "files", operation_id = "streamReadFile", params(InCapsule),
    request_body = FilePath,
    responses(
        (status = 200, description = "What is in it", body = [u8], content_type = "application/octet-stream"),
        OfGuest,
        (status = 404, description = "`not_found`: the team has no such capsule, or there is no such file", body = ErrorBody),
    )
)]
pub async fn stream_read(Guest(guest): Guest, body::Json(request): body::Json<FilePath>) -> Result<Response, Error> {
    contents(&guest, request).await
}

async fn contents(guest: &op::guest::Guest, request: FilePath) -> Result<Response, Error> {
    let (parts, body) = files::read(guest, &request.validate()?).await?.into_parts();
    let mut response = ([(CONTENT_TYPE, "application/octet-stream")], Body::new(body)).into_response();
    if let Some(length) = parts.headers.get(CONTENT_LENGTH) {
        response.headers_mut().insert(CONTENT_LENGTH, length.clone());
    }
    Ok(response)
}

/// Write a file
///
/// In place of what was there; parents are made. At most 100 MiB. A client that breaks off leaves nothing new.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/write", tag = "files", operation_id = "writeFile", params(InCapsule),
    request_body(content = FileForm, content_type = "multipart/form-data"),
    responses(
        (status = 204, description = "It is written"),
        OfGuest,
        (status = 413, description = "`too_large`: more than 100 MiB", body = ErrorBody),
        (status = 507, description = "`disk_full`", body = ErrorBody),
    )
)]
pub async fn write(Guest(guest): Guest, request: Request) -> Result<StatusCode, Error> {
    store(&guest, request, Some(limits::FILE_WRITE_BYTES)).await
}

/// Write a file of any size
///
/// In place of what was there; parents are made. A client that breaks off leaves nothing new.
#[utoipa::path(
    post, path = "/v1/capsules/{id}/files/stream/write", tag = "files", operation_id = "streamWriteFile",
    params(InCapsule),
    request_body(content = FileForm, content_type = "multipart/form-data"),
    responses(
        (status = 204, description = "It is written"),
        OfGuest,
        (status = 507, description = "`disk_full`", body = ErrorBody),
    )
)]
pub async fn stream_write(Guest(guest): Guest, request: Request) -> Result<StatusCode, Error> {
    store(&guest, request, None).await
}

async fn store(guest: &op::guest::Guest, request: Request, limit: Option<u64>) -> Result<StatusCode, Error> {
    let upload = upload::open(request, limit).await?;
    files::write(guest, &upload.path, upload.body).await.map_err(|error| upload.broken.or(error))?;
    Ok(StatusCode::NO_CONTENT)
}
