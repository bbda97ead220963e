//! The files that pages need: style, scripts, icon; in the binary, by address of their content.
//!
//! The line: `/static/{version}/{name} → bytes`. An address with the version of today is kept for a year by browsers;
//! any other is answered too, and asked again. Nothing outside of `static/` can be named.

use std::fmt::Write;
use std::sync::LazyLock;

use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use rust_embed::{EmbeddedFile, RustEmbed};
use sha2::{Digest, Sha256};

use super::pages;
use crate::builds::Status;

#[derive(RustEmbed)]
#[folder = "static/"]
struct Files;

/// Changes with any of the files, so that modules may name each other without a version.
pub static VERSION: LazyLock<String> = LazyLock::new(|| {
    let mut hash = Sha256::new();
    let mut names: Vec<_> = Files::iter().collect();
    names.sort_unstable();
    for name in names {
        if let Some(file) = Files::get(&name) {
            hash.update(name.as_bytes());
            hash.update(file.metadata.sha256_hash());
        }
    }
    short_hash(&hash.finalize())
});

const FOREVER: &str = "public, max-age=31536000, immutable";
const ASK_AGAIN: &str = "no-cache";

/// `GET /static/{version}/{name}`.
pub async fn file(
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
) -> Response {
    let Ok(Path((version, name))) = path else {
        return pages::not_found().await;
    };
    let Some((file, content_type)) = find(&name) else {
        return pages::not_found().await;
    };
    let caching = if version == *VERSION {
        FOREVER
    } else {
        ASK_AGAIN
    };
    let tag = format!("\"{}\"", short_hash(&file.metadata.sha256_hash()));
    let body = file.data.into_owned();
    respond(&headers, content_type, caching, &tag, body)
}

fn find(name: &str) -> Option<(EmbeddedFile, &'static str)> {
    let (_, extension) = name.rsplit_once('.')?;
    let content_type = match extension {
        "css" => "text/css; charset=utf-8",
        "js" => "text/javascript; charset=utf-8",
        "svg" => "image/svg+xml",
        _ => return None,
    };
    let is_plain = name
        .bytes()
        .all(|b| b.is_ascii_lowercase() || b == b'.' || b == b'-');
    let file = is_plain.then(|| Files::get(name)).flatten()?;
    Some((file, content_type))
}

/// `GET /favicon.svg?status=failed`: the mark, coloured by a build's status.
pub async fn favicon(query: axum::extract::RawQuery, headers: HeaderMap) -> Response {
    let status = query
        .0
        .as_deref()
        .and_then(|query| query.strip_prefix("status="))
        .and_then(|status| status.parse().ok());
    let body = favicon_svg(status);
    let tag = format!("\"{}\"", short_hash(&Sha256::digest(&body)));
    respond(
        &headers,
        "image/svg+xml",
        ASK_AGAIN,
        &tag,
        body.into_bytes(),
    )
}

fn favicon_svg(status: Option<Status>) -> String {
    let colour = match status {
        None => "#3b5bdb",
        Some(Status::Queued | Status::Superseded | Status::Skipped | Status::Canceled) => "#6b7280",
        Some(Status::Running) => "#1d6fd8",
        Some(Status::Passed) => "#1a7f45",
        Some(Status::Failed) => "#c8323c",
        Some(Status::Errored) => "#a85f00",
    };
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 32 32\"><rect width=\"32\" height=\"32\" rx=\"8\" fill=\"{colour}\"/>\
         <path d=\"M16 6v13m-6-6 6 6 6-6M7 25h18\" fill=\"none\" stroke=\"#fff\" stroke-width=\"3\" stroke-linecap=\"round\" stroke-linejoin=\"round\"/></svg>"
    )
}

fn respond(
    headers: &HeaderMap,
    content_type: &str,
    caching: &str,
    tag: &str,
    body: Vec<u8>,
) -> Response {
    let has_it = headers
        .get(header::IF_NONE_MATCH)
        .and_then(|tags| tags.to_str().ok())
        .is_some_and(|tags| tags.split(',').any(|one| one.trim() == tag));
    let answer = [
        (header::CACHE_CONTROL, caching),
        (header::ETAG, tag),
        (header::CONTENT_TYPE, content_type),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    if has_it {
        return (StatusCode::NOT_MODIFIED, answer).into_response();
    }
    (answer, body).into_response()
}

fn short_hash(hash: &[u8]) -> String {
    hash.iter().take(8).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
