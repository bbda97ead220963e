//! `landfall pin` and `landfall unpin`: hold an environment at its release, and let it go.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::terminal::{self, say};
use super::{EnvironmentArguments, WaitArguments, build};

/// Hold an environment at its release: new pushes are skipped
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  landfall pin hello --reason \"sale until Monday\"")]
pub struct Arguments {
    #[command(flatten)]
    environment: EnvironmentArguments,
    /// Why; whoever finds the pin will ask
    #[arg(long, value_name = "TEXT")]
    reason: String,
}

/// Let an environment go; where something else was pushed meanwhile, the branch's head is built
#[derive(Debug, Args)]
#[command(after_help = concat!("Examples:\n  landfall unpin hello\n\n", exit_codes!()))]
pub struct UnpinArguments {
    #[command(flatten)]
    environment: EnvironmentArguments,
    #[command(flatten)]
    wait: WaitArguments,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (client, environment) = arguments.environment.find().await?;
    let answer = client
        .change(&environment, "pin", &json!({"reason": arguments.reason}))
        .await?;
    if arguments.environment.output.is_json() {
        terminal::print_json(&answer)?;
    } else {
        say!(
            "{environment} is pinned: new pushes are skipped; `landfall unpin {environment}` lets it go"
        );
    }
    Ok(ExitCode::SUCCESS)
}

pub async fn unpin(arguments: &UnpinArguments) -> anyhow::Result<ExitCode> {
    let (client, environment) = arguments.environment.find().await?;
    let answer = client.change(&environment, "unpin", &json!({})).await?;
    if answer.get("id").is_some_and(Value::is_number) {
        return build::finish(
            &client,
            vec![answer],
            &arguments.wait,
            &arguments.environment.output,
        )
        .await;
    }
    if arguments.environment.output.is_json() {
        terminal::print_json(&answer)?;
    } else {
        say!(
            "{environment} is no longer pinned; what serves is the newest push, so nothing is built"
        );
    }
    Ok(ExitCode::SUCCESS)
}
