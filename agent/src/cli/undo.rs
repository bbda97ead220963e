//! `landfall undo` and `landfall redo`: back to a release that served before, and forward again, verified like any other.

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::{EnvironmentArguments, WaitArguments, build};

/// Go back to an earlier release, verify it, and pin the environment to it
#[derive(Debug, Args)]
#[command(after_help = concat!(
    "Examples:\n  landfall undo hello\n  landfall undo hello --to 41 --reason \"checkout is broken\"\n  landfall undo hello --to-revision 7\n\n\
     Nothing is built: the release's whole set is applied again. New pushes are skipped until `landfall unpin`.\n\n",
    exit_codes!()
))]
pub struct Arguments {
    #[command(flatten)]
    environment: EnvironmentArguments,
    /// The number of a release, as `landfall history` shows; else the one before
    #[arg(long, value_name = "RELEASE")]
    to: Option<i64>,
    /// The number of a revision, as `kubectl rollout history` shows
    #[arg(long, value_name = "REVISION", conflicts_with = "to")]
    to_revision: Option<i64>,
    /// Why; whoever finds the pin will ask
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    wait: WaitArguments,
}

/// Go forward again to the release that served before an undo, and let the environment go
#[derive(Debug, Args)]
#[command(after_help = concat!("Examples:\n  landfall redo hello\n\n", exit_codes!()))]
pub struct RedoArguments {
    #[command(flatten)]
    environment: EnvironmentArguments,
    #[command(flatten)]
    wait: WaitArguments,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (client, environment) = arguments.environment.find().await?;
    let body = json!({
        "release": arguments.to, "revision": arguments.to_revision, "reason": arguments.reason,
    });
    let started = client.change(&environment, "undo", &body).await?;
    build::finish(
        &client,
        vec![started],
        &arguments.wait,
        &arguments.environment.output,
    )
    .await
}

pub async fn redo(arguments: &RedoArguments) -> anyhow::Result<ExitCode> {
    let (client, environment) = arguments.environment.find().await?;
    let started = client.change(&environment, "redo", &json!({})).await?;
    build::finish(
        &client,
        vec![started],
        &arguments.wait,
        &arguments.environment.output,
    )
    .await
}
