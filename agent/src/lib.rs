//! Landfall: push to the branch, and it is built, tested, put on Kubernetes and proved to work.
//!
//! The line: `webhook → queue → runner → stages → cluster`. `ARCHITECTURE.md` is the map; `tests/it/tidy.rs` checks
//! the directions between these modules.

pub mod ansi;
pub mod api;
pub mod build_log;
pub mod builds;
pub mod cluster;
pub mod config;
pub mod dashboard;
pub mod diagnostic;
pub mod manifests;
pub mod pipeline;
pub mod release;
pub mod server;
pub mod stages;
pub mod store;
