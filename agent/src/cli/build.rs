//! `landfall build`: a build that a person asks for, of a branch's head or of one commit.

use std::process::ExitCode;

use anyhow::{bail, ensure};
use clap::Args;
use serde_json::{Value, json};

use super::{OutputArgument, ServerArguments, WaitArguments, follow, terminal};
use crate::builds::{Build, is_commit_id};
use crate::client::{self, Client, Place, Wanted};

/// Fewer digits name too many commits.
const DIGITS_MIN: usize = 7;

/// Build a branch's head or a commit, and follow it to its end
#[derive(Debug, Args)]
#[command(after_help = concat!(
    "Examples:\n  landfall build main\n  landfall build 3f1c9e2a --environment staging\n  landfall build main --no-wait --output json\n\n",
    exit_codes!()
))]
pub struct Arguments {
    /// A branch, or a commit: all 40 digits, or 7 or more of one that was built before
    #[arg(value_name = "BRANCH|COMMIT")]
    what: String,
    /// Only in this environment; else in every one of the branch
    #[arg(long, value_name = "NAME")]
    environment: Option<String>,
    #[command(flatten)]
    pub wait: WaitArguments,
    #[command(flatten)]
    output: OutputArgument,
    #[command(flatten)]
    server: ServerArguments,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let client = arguments.server.client()?;
    let places: Vec<Place> = client::read_list(&client.environments().await?, "environments")?;
    let (places, commit) = choose(&client, arguments, places).await?;
    let mut started = Vec::new();
    for place in &places {
        started.push(client.start(place, commit.as_deref()).await?);
    }
    finish(&client, started, &arguments.wait, &arguments.output).await
}

/// Where it is to be built; and the commit, unless it is the branch's head.
async fn choose(
    client: &Client,
    arguments: &Arguments,
    mut places: Vec<Place>,
) -> anyhow::Result<(Vec<Place>, Option<String>)> {
    let (what, all) = (&arguments.what, names(&places));
    if let Some(name) = &arguments.environment {
        places.retain(|place| place.name == *name);
        ensure!(
            !places.is_empty(),
            "the agent has no environment {name:?}; it has {all}"
        );
    }
    if places.iter().any(|place| place.branch == *what) {
        places.retain(|place| place.branch == *what);
        return Ok((places, None));
    }
    let is_digits = (DIGITS_MIN..=40).contains(&what.len())
        && what.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_digits {
        bail!(
            "{what:?} is no branch of an environment, and not {DIGITS_MIN} to 40 digits of a commit; the agent has {all}"
        );
    }
    let commit = whole(client, &what.to_ascii_lowercase()).await?;
    ensure!(
        places.len() == 1,
        "say where, with --environment: the agent has {all}"
    );
    Ok((places, Some(commit)))
}

fn names(places: &[Place]) -> String {
    let names: Vec<String> = places
        .iter()
        .map(|place| format!("{} (branch {})", place.name, place.branch))
        .collect();
    match names.as_slice() {
        [] => "none".to_owned(),
        names => names.join(", "),
    }
}

/// The commit that these digits begin, by what the agent has built.
async fn whole(client: &Client, digits: &str) -> anyhow::Result<String> {
    if is_commit_id(digits) {
        return Ok(digits.to_owned());
    }
    let wanted = Wanted {
        limit: Some(200),
        ..Wanted::default()
    };
    let builds: Vec<Build> = client::read_list(&client.builds(&wanted).await?, "builds")?;
    let mut commits: Vec<String> = builds
        .into_iter()
        .map(|build| build.commit)
        .filter(|commit| commit.starts_with(digits))
        .collect();
    commits.sort_unstable();
    commits.dedup();
    match commits.as_slice() {
        [commit] => Ok(commit.clone()),
        [] => bail!(
            "no commit that was built of late begins with {digits}: give all 40 digits (`git rev-parse {digits}` prints them)"
        ),
        several => bail!(
            "{} commits begin with {digits}: give more digits",
            several.len()
        ),
    }
}

/// What `build` and `rerun` do with builds that were queued.
pub async fn finish(
    client: &Client,
    started: Vec<Value>,
    wait: &WaitArguments,
    output: &OutputArgument,
) -> anyhow::Result<ExitCode> {
    let builds: Vec<Build> = started.iter().map(client::read).collect::<Result<_, _>>()?;
    let ids: Vec<i64> = builds.iter().map(|build| build.id).collect();
    for build in &builds {
        follow::say_queued(client, build);
    }
    match (wait.waits(), output.is_json()) {
        (true, false) => follow::follow(client, &ids).await,
        (true, true) => follow::wait(client, &ids).await,
        (false, is_json) => {
            if is_json {
                terminal::print_json(&json!({ "builds": started }))?;
            } else {
                let lines: String = ids.iter().map(|id| format!("{id}\n")).collect();
                terminal::print(&lines)?;
            }
            for id in ids {
                terminal::say!("`landfall logs -f {id}` follows it");
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}
