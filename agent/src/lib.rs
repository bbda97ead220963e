//! Landfall: push to the branch, and it is built, tested, put on Kubernetes and proved to work.
//!
//! The line: `webhook → queue → runner → stages → cluster`. `ARCHITECTURE.md` is the map; `tests/it/tidy.rs` checks
//! the directions between these modules.

pub mod ansi;
pub mod api;
pub mod app;
pub mod build_log;
pub mod builds;
pub mod cli;
pub mod client;
pub mod cluster;
pub mod config;
pub mod dashboard;
pub mod diagnostic;
pub mod docker;
pub mod dockerignore;
mod fail_point;
pub mod git;
pub mod github;
pub mod manifests;
pub mod metrics;
mod own_secret;
pub mod pipeline;
pub mod queue;
mod reconcile;
pub mod release;
pub mod runner;
pub mod server;
pub mod stages;
pub mod store;
mod sweep;
pub mod webhook;
