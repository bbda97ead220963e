//! `landfall history`: what served in an environment, for how long, and why it ended.

use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::terminal::{self, plain, say};
use super::{EnvironmentArguments, status::ago};
use crate::builds::{Millis, human_duration, now, short};
use crate::client::{self, Served};

/// Show which releases served in an environment, for how long, and why each ended
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  landfall history hello\n  landfall history hello --output json\n\nThe column `revision` is the number of `kubectl rollout history`."
)]
pub struct Arguments {
    #[command(flatten)]
    environment: EnvironmentArguments,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (client, environment) = arguments.environment.find().await?;
    let answer = client.releases(&environment).await?;
    if arguments.environment.output.is_json() {
        terminal::print_json(&answer)?;
        return Ok(ExitCode::SUCCESS);
    }
    let served: Vec<Served> = client::read_list(&answer, "releases")?;
    if served.is_empty() {
        say!("nothing has served in {environment} yet");
        return Ok(ExitCode::SUCCESS);
    }
    terminal::print(&table(&served, now()))?;
    if let Some(reason) = answer.pointer("/pinned/reason").and_then(Value::as_str) {
        let by = answer
            .pointer("/pinned/by")
            .and_then(Value::as_str)
            .unwrap_or_default();
        say!(
            "pinned by {}: {}; `landfall unpin {environment}` lets it go",
            plain(by),
            plain(reason)
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn table(served: &[Served], at: Millis) -> String {
    let headings = [
        "RELEASE", "STATE", "BUILD", "COMMIT", "DIGEST", "REVISION", "BY", "WHEN", "SERVED",
        "ENDED",
    ];
    let rows: Vec<Vec<String>> = served.iter().map(|row| cells(row, at)).collect();
    let mut table = String::new();
    for line in crate::cluster::tables::aligned(&headings, &rows) {
        table.push_str(line.trim_end());
        table.push('\n');
    }
    table
}

fn cells(row: &Served, at: Millis) -> Vec<String> {
    let digest = row
        .image
        .rsplit_once("sha256:")
        .map_or("", |(_, hex)| short(hex));
    let revision = row
        .revisions
        .values()
        .next()
        .and_then(Value::as_str)
        .unwrap_or("-");
    let serves = row.ended_at.is_none() && row.state != "adopted";
    let state = match row.state.as_str() {
        "live" if serves => "serving",
        "live" => "served",
        "adopted" => "found there",
        other => other,
    };
    let time = match row.state.as_str() {
        "failed" | "adopted" => "-".to_owned(),
        _ => human_duration(row.ended_at.unwrap_or(at) - row.began_at),
    };
    let dash = |text: &str| {
        if text.is_empty() {
            "-".to_owned()
        } else {
            plain(text)
        }
    };
    vec![
        row.release.to_string(),
        plain(state),
        format!("#{}", row.build),
        dash(short(&row.commit)),
        dash(digest),
        plain(revision),
        plain(&row.by),
        ago(at - row.began_at),
        time,
        row.ended_why.as_deref().map(plain).unwrap_or_default(),
    ]
}
