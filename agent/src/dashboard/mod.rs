//! Pages for people: what runs, what is live, why something failed, and the log while it is written.
//!
//! The line: `store → views → template`. Rendered here and readable without JavaScript; scripts only keep pages fresh.
//! Never starts work and never writes: buttons would need the token, so pages show the commands instead.

pub mod assets;
mod log;
mod pages;
mod views;

use axum::Router;
use axum::routing::get;

use crate::app::App;

pub use pages::not_found;

/// What a page may load and do: files of its own address, nothing inline, no frame around it.
pub const CONTENT_SECURITY_POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; \
     connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

pub fn router() -> Router<App> {
    Router::new()
        .route("/", get(pages::builds))
        .route("/builds/{id}", get(pages::build))
        .route("/favicon.svg", get(assets::favicon))
        .route("/static/{version}/{name}", get(assets::file))
        .fallback(not_found)
}

#[cfg(test)]
mod tests;
