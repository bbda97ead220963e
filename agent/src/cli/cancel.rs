//! `landfall cancel`: ends a build that waits, or one that runs at its next safe point.

use std::process::ExitCode;

use clap::Args;

use super::terminal::{self, say};
use super::{OutputArgument, ServerArguments};
use crate::builds::{Build, Status};
use crate::client;

/// End a build: at once where it waits, at its next safe point where it runs
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  landfall cancel 42\n\nA build that has begun to change the cluster is let through to its end, or to its rollback."
)]
pub struct Arguments {
    /// Number of a build
    #[arg(value_name = "BUILD", value_parser = super::build_number)]
    build: i64,
    #[command(flatten)]
    output: OutputArgument,
    #[command(flatten)]
    server: ServerArguments,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let client = arguments.server.client()?;
    let answer = client.cancel(arguments.build).await?;
    if arguments.output.is_json() {
        terminal::print_json(&answer)?;
        return Ok(ExitCode::SUCCESS);
    }
    let build: Build = client::read(&answer)?;
    match build.status {
        Status::Running | Status::Queued => {
            say!(
                "build #{0} will end at its next safe point: `landfall logs -f {0}` shows when",
                build.id
            );
        }
        status => say!("build #{} is {status}", build.id),
    }
    Ok(ExitCode::SUCCESS)
}
