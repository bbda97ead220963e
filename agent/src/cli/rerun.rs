//! `landfall rerun`: the same push once more, as a new build.

use std::process::ExitCode;

use clap::Args;

use super::{OutputArgument, ServerArguments, WaitArguments, build};

/// Build the same commit anew, and follow it to its end
#[derive(Debug, Args)]
#[command(after_help = concat!("Examples:\n  landfall rerun 42\n  landfall rerun 42 --no-wait\n\n", exit_codes!()))]
pub struct Arguments {
    /// Number of a build that has ended
    #[arg(value_name = "BUILD", value_parser = super::build_number)]
    build: i64,
    #[command(flatten)]
    pub wait: WaitArguments,
    #[command(flatten)]
    output: OutputArgument,
    #[command(flatten)]
    server: ServerArguments,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let client = arguments.server.client()?;
    let started = client.rerun(arguments.build).await?;
    build::finish(&client, vec![started], &arguments.wait, &arguments.output).await
}
