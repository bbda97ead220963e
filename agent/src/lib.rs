//! Landfall: push to the branch, and it is built, tested, put on Kubernetes and proved to work.
//!
//! The line: `webhook → queue → runner → stages → cluster`. `ARCHITECTURE.md` is the map; `tests/it/tidy.rs` checks
//! the directions between these modules.

pub mod ansi;
pub mod api;
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
pub mod git_child;
pub mod git_process;
pub mod git_tree;
pub mod github;
pub mod manifest_files;
pub mod manifests;
pub mod metrics;
pub mod pipeline;
pub mod queue;
pub mod release;
pub mod render;
pub mod runner;
pub mod server;
pub mod stages;
pub mod store;
pub mod webhook;
pub mod yaml;
pub mod yaml_scalar;
