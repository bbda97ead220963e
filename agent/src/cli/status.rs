//! `landfall status`: what was built, or one build with its stages.

use std::fmt::Write;
use std::process::ExitCode;

use clap::Args;

use super::terminal::{self, painted, plain, say};
use super::{OutputArgument, ServerArguments};
use crate::builds::{Build, Millis, Status, human_duration, now, short};
use crate::client::{self, Client, Detail, Wanted};

const TITLE_CHARS_MAX: usize = 50;

/// List builds, newest first; or show one with its stages
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  landfall status\n  landfall status 42\n  landfall status --environment hello --status failed --output json"
)]
pub struct Arguments {
    /// Number of a build
    #[arg(value_name = "BUILD", value_parser = super::build_number)]
    build: Option<i64>,
    /// Only builds of this environment
    #[arg(long, value_name = "NAME", conflicts_with = "build")]
    environment: Option<String>,
    /// Only builds of this branch
    #[arg(long, value_name = "NAME", conflicts_with = "build")]
    branch: Option<String>,
    /// Only builds that are queued, running, passed, failed, errored, canceled, superseded or skipped
    #[arg(long, value_name = "STATUS", conflicts_with = "build")]
    status: Option<Status>,
    /// How many
    #[arg(long, value_name = "NUMBER", default_value_t = 20, value_parser = clap::value_parser!(i64).range(1..=200))]
    limit: i64,
    /// Only builds with a smaller number: the next page
    #[arg(long, value_name = "BUILD", conflicts_with = "build", value_parser = super::build_number)]
    before: Option<i64>,
    #[command(flatten)]
    output: OutputArgument,
    #[command(flatten)]
    server: ServerArguments,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let client = arguments.server.client()?;
    match arguments.build {
        Some(id) => one(&client, id, &arguments.output).await?,
        None => list(&client, arguments).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(client: &Client, arguments: &Arguments) -> anyhow::Result<()> {
    let wanted = Wanted {
        environment: arguments.environment.clone(),
        branch: arguments.branch.clone(),
        status: arguments.status,
        limit: Some(arguments.limit),
        before: arguments.before,
    };
    let answer = client.builds(&wanted).await?;
    if arguments.output.is_json() {
        return terminal::print_json(&answer);
    }
    let builds: Vec<Build> = client::read_list(&answer, "builds")?;
    let Some(newest) = builds.first() else {
        say!("no builds yet: push to a branch that agent.yaml names, or `landfall build BRANCH`");
        return Ok(());
    };
    terminal::print(&table(&builds, now()))?;
    if let Some(next) = answer.get("next").and_then(serde_json::Value::as_i64) {
        say!("`landfall status --before {next}` shows older ones");
    }
    match newest.status {
        Status::Queued | Status::Running => {
            say!("`landfall logs -f {}` follows the newest", newest.id)
        }
        _ => say!(
            "`landfall status {}` shows the newest, `landfall logs {0}` its log",
            newest.id
        ),
    }
    Ok(())
}

fn table(builds: &[Build], at: Millis) -> String {
    let rows: Vec<[String; 8]> = builds.iter().map(|build| row(build, at)).collect();
    let mut widths = [0; 8];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut table = String::new();
    for (row, build) in rows.iter().zip(builds) {
        let mut line = String::new();
        for (index, (cell, width)) in row.iter().zip(widths).enumerate() {
            let _ = match index {
                1 => write!(line, "{}  ", painted(build.status, width)),
                _ => write!(line, "{cell:width$}  "),
            };
        }
        table.push_str(line.trim_end());
        table.push('\n');
    }
    table
}

fn row(build: &Build, at: Millis) -> [String; 8] {
    let title: String = plain(&build.title).chars().take(TITLE_CHARS_MAX).collect();
    let state = match (build.status, build.stage) {
        (Status::Running, Some(stage)) => stage.title().to_owned(),
        _ => build.outcome.to_string(),
    };
    [
        format!("#{}", build.id),
        build.status.to_string(),
        state,
        plain(&build.environment),
        format!("{} {}", plain(&build.branch), short(&plain(&build.commit))),
        ago(at - build.queued_at),
        plain(&build.by),
        title,
    ]
}

/// `3 min ago`: the largest unit alone.
pub fn ago(millis: Millis) -> String {
    let seconds = millis.max(0) / 1000;
    match seconds {
        0..60 => format!("{seconds} s ago"),
        60..3_600 => format!("{} min ago", seconds / 60),
        3_600..86_400 => format!("{} h ago", seconds / 3_600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

async fn one(client: &Client, id: i64, output: &OutputArgument) -> anyhow::Result<()> {
    let answer = client.build(id).await?;
    if output.is_json() {
        return terminal::print_json(&answer);
    }
    let detail: Detail = client::read(&answer)?;
    terminal::print(&page(&detail, now()))?;
    match detail.build.status {
        Status::Queued | Status::Running => {
            say!("`landfall logs -f {id}` follows it, `landfall cancel {id}` ends it")
        }
        Status::Failed | Status::Errored => {
            say!("`landfall logs {id}` shows its log, `landfall rerun {id}` builds it again")
        }
        _ => say!("`landfall logs {id}` shows its log"),
    }
    Ok(())
}

fn page(detail: &Detail, at: Millis) -> String {
    let build = &detail.build;
    let mut page = format!(
        "build #{} {}, {}\n",
        build.id,
        painted(build.status, 0),
        build.outcome
    );
    let mut line = |name: &str, value: String| {
        if !value.is_empty() {
            let _ = writeln!(page, "  {name:12} {value}");
        }
    };
    line("environment", plain(&build.environment));
    line("branch", plain(&build.branch));
    line("commit", plain(&build.commit));
    line("title", plain(&build.title));
    line(
        "by",
        format!(
            "{} ({}), {}",
            plain(&build.by),
            build.kind,
            ago(at - build.queued_at)
        ),
    );
    line("image", plain(build.image.as_deref().unwrap_or_default()));
    if let Some(release) = build.restored_release {
        line(
            "serves",
            format!("release {release}, put back and verified"),
        );
    }
    if let Some(newer) = build.superseded_by.filter(|newer| *newer != build.id) {
        line("newer", format!("#{newer}"));
    }
    if let Some(cause) = &build.cause {
        line("cause", plain(&cause.sentence));
        line("object", plain(cause.object.as_deref().unwrap_or_default()));
        line("hint", plain(cause.hint.as_deref().unwrap_or_default()));
    }
    for stage in &detail.stages {
        let took = human_duration(stage.done_at.unwrap_or(at) - stage.begun_at);
        let _ = writeln!(
            page,
            "  {:22} {:8} {took}",
            stage.stage.title(),
            stage.status.as_str()
        );
    }
    page
}
