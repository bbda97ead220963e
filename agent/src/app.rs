//! What every web handler is given: configuration, store, token, and the end of the agent.
//!
//! `server.rs` hands it to `webhook`, `api`, `dashboard` and `metrics`; it starts nothing.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::store::Store;

/// What every handler may use. Cheap to clone.
#[derive(Clone)]
pub struct App {
    pub config: Arc<Config>,
    pub store: Store,
    /// The token that every write but `/webhook` needs.
    pub admin_token: Arc<str>,
    /// Fires when the agent stops: live streams end.
    pub shutdown: CancellationToken,
}
