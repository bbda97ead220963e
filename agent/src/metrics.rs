//! `/metrics`: what the agent counts, for Prometheus. Read from the store, so that a restart loses nothing.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::app::App;
use crate::builds::Status;

pub async fn render(State(app): State<App>) -> Response {
    let counts = match app.store.count_by_status().await {
        Ok(counts) => counts,
        Err(error) => {
            tracing::error!(
                error = format!("{error:#}"),
                "cannot read the store for /metrics"
            );
            return StatusCode::SERVICE_UNAVAILABLE.into_response();
        }
    };
    let mut text =
        String::from("# HELP landfall_builds Builds by status.\n# TYPE landfall_builds gauge\n");
    for status in Status::ALL {
        let count = counts
            .iter()
            .find(|(one, _)| one == status)
            .map_or(0, |(_, count)| *count);
        text.push_str(&format!("landfall_builds{{status=\"{status}\"}} {count}\n"));
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}
