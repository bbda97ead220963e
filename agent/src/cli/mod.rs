//! The command line: one file a command, and what they share.
//!
//! The line: words → `Command` → the command's `run` → an exit code (design section 7). Data goes to stdout, talk to
//! stderr.

/// As help shows them.
macro_rules! exit_codes {
    () => {
        "Exit codes:\n  0 ok, also superseded or skipped; 1 build failed; 2 usage or configuration; 3 failed and rolled back;\n  \
         4 rollback failed; 5 Docker, cluster or agent out of reach; 124 time-out; 130 canceled"
    };
}

pub mod backup;
pub mod build;
pub mod cancel;
pub mod deploy;
pub mod doctor;
pub mod doctor_cluster;
pub mod doctor_registry;
pub mod findings;
pub mod follow;
pub mod history;
pub mod logs;
pub mod pin;
pub mod plan;
pub mod rerun;
pub mod schema;
pub mod serve;
pub mod standalone;
pub mod status;
pub mod systemd;
pub mod terminal;
pub mod undo;
pub mod validate;
pub mod verify;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::client::{self, Client, Place, Problem};
use crate::config::{self, Access};
use terminal::say;

/// The agent's own words: `info` where it serves, else only what is wrong.
const LOG_SERVE: &str = "info";
/// What the API server refuses is told in our own words.
const LOG_ELSE: &str = "error,kube_client=off";

/// What a command ended with (design section 7).
pub mod exit {
    pub const USAGE: u8 = 2;
    pub const UNREACHABLE: u8 = 5;
    pub const TIME_OUT: u8 = 124;
    pub const INTERRUPTED: u8 = 130;
    /// As a program that the signal SIGPIPE ends.
    pub const PIPE_CLOSED: u8 = 141;
}

/// Push to the branch: Landfall builds it, tests it, puts it on Kubernetes and proves that it works.
#[derive(Debug, Parser)]
#[command(name = "landfall", version, disable_help_subcommand = true, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  landfall doctor                    what is missing here, and how to mend it
  landfall serve                     run the agent with ./agent.yaml
  landfall validate                  check pipeline.yaml and the manifests before a push
  landfall build main                build the head of a branch and follow it to its end
  landfall logs -f 42                follow build #42
  landfall status                    what was built, and what became of it
  landfall history hello             what served in an environment, and why it ended
  landfall undo hello                back to the release before, verified
  landfall plan                      what a push of this working tree would change
  landfall verify deployment/web     in the place of `kubectl rollout status`: says why it fails

The agent is found by --server, LANDFALL_SERVER or ./agent.yaml; its token by LANDFALL_TOKEN, LANDFALL_TOKEN_FILE
or data_dir/admin-token.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent: page, API, webhook, queue and builds
    #[command(
        after_help = "Examples:\n  landfall serve\n  LANDFALL_LOG=debug landfall serve --config /etc/landfall/agent.yaml"
    )]
    Serve {
        /// The operator's file
        #[arg(long, value_name = "FILE", default_value = config::AGENT_YAML)]
        config: PathBuf,
    },
    Build(build::Arguments),
    Status(status::Arguments),
    Logs(logs::Arguments),
    Rerun(rerun::Arguments),
    Cancel(cancel::Arguments),
    History(history::Arguments),
    Undo(undo::Arguments),
    Redo(undo::RedoArguments),
    Pin(pin::Arguments),
    Unpin(pin::UnpinArguments),
    Plan(plan::Arguments),
    Verify(verify::Arguments),
    Deploy(deploy::Arguments),
    Backup(backup::Arguments),
    Restore(backup::RestoreArguments),
    Db(backup::DbArguments),
    Doctor(doctor::Arguments),
    Validate(validate::Arguments),
    /// Print the JSON schema of pipeline.yaml (draft-07), for editors
    #[command(
        after_help = "Examples:\n  landfall schema > pipeline.schema.json\n  # then, as the first line of pipeline.yaml:\n  # yaml-language-server: $schema=pipeline.schema.json"
    )]
    Schema,
    /// Print the version
    Version {
        #[command(flatten)]
        output: OutputArgument,
    },
}

/// Which agent is meant.
#[derive(Debug, Args)]
pub struct ServerArguments {
    /// Address of the agent [default: LANDFALL_SERVER, else `listen` of agent.yaml, else http://127.0.0.1:8080]
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    /// agent.yaml of an agent on this machine: its address and its token [default: ./agent.yaml, where there is one]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl ServerArguments {
    pub fn client(&self) -> anyhow::Result<Client> {
        let access = Access::find(self.server.as_deref(), self.config.as_deref())?;
        Client::new(access)
    }
}

/// Which environment of which agent is meant, and how the answer is printed.
#[derive(Debug, Args)]
pub struct EnvironmentArguments {
    /// An environment of agent.yaml; may be left out where there is one only
    #[arg(value_name = "ENVIRONMENT")]
    environment: Option<String>,
    #[command(flatten)]
    pub output: OutputArgument,
    #[command(flatten)]
    server: ServerArguments,
}

impl EnvironmentArguments {
    /// The agent, and the environment that is meant there.
    pub async fn find(&self) -> anyhow::Result<(Client, String)> {
        let client = self.server.client()?;
        if let Some(name) = &self.environment {
            return Ok((client, name.clone()));
        }
        let places: Vec<Place> = client::read_list(&client.environments().await?, "environments")?;
        match places.as_slice() {
            [only] => Ok((client, only.name.clone())),
            [] => anyhow::bail!("the agent has no environment"),
            several => {
                let names: Vec<&str> = several.iter().map(|place| place.name.as_str()).collect();
                anyhow::bail!("say which environment: the agent has {}", names.join(", "))
            }
        }
    }
}

#[derive(Debug, Args)]
pub struct OutputArgument {
    /// How data is printed
    #[arg(long, value_enum, value_name = "FORM", default_value_t)]
    output: Output,
}

impl OutputArgument {
    pub fn is_json(&self) -> bool {
        self.output == Output::Json
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    #[default]
    Text,
    /// For programs: stable, as the API answers
    Json,
}

/// Whether a command that starts a build waits for it.
#[derive(Debug, Args)]
pub struct WaitArguments {
    /// Follow the log until the build has ended, and end with its exit code (the default)
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Only queue it
    #[arg(long)]
    no_wait: bool,
}

impl WaitArguments {
    pub fn waits(&self) -> bool {
        self.wait || !self.no_wait
    }
}

/// Runs a command to its exit code; whatever went wrong has been said.
pub async fn run(cli: Cli) -> ExitCode {
    begin_log(&cli.command);
    match dispatch(cli.command).await {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}

async fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve { config } => serve::run(&config).await,
        Command::Build(arguments) => build::run(&arguments).await,
        Command::Status(arguments) => status::run(&arguments).await,
        Command::Logs(arguments) => logs::run(&arguments).await,
        Command::Rerun(arguments) => rerun::run(&arguments).await,
        Command::Cancel(arguments) => cancel::run(&arguments).await,
        Command::History(arguments) => history::run(&arguments).await,
        Command::Undo(arguments) => undo::run(&arguments).await,
        Command::Redo(arguments) => undo::redo(&arguments).await,
        Command::Pin(arguments) => pin::run(&arguments).await,
        Command::Unpin(arguments) => pin::unpin(&arguments).await,
        Command::Plan(arguments) => plan::run(&arguments).await,
        Command::Verify(arguments) => verify::run(&arguments).await,
        Command::Deploy(arguments) => deploy::run(&arguments).await,
        Command::Backup(arguments) => backup::run(&arguments).await,
        Command::Restore(arguments) => backup::restore(&arguments).await,
        Command::Db(arguments) => backup::db(&arguments).await,
        Command::Doctor(arguments) => doctor::run(&arguments).await,
        Command::Validate(arguments) => validate::run(&arguments).await,
        Command::Schema => schema::run(),
        Command::Version { output } => version(&output),
    }
}

fn version(output: &OutputArgument) -> anyhow::Result<ExitCode> {
    let version = env!("CARGO_PKG_VERSION");
    if output.is_json() {
        terminal::print_json(&serde_json::json!({ "name": "landfall", "version": version }))?;
    } else {
        terminal::print(&format!("landfall {version}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The operator's log, to stderr. Not the build log, which is for the author of a push.
fn begin_log(command: &Command) {
    let default = match command {
        Command::Serve { .. } => LOG_SERVE,
        _ => LOG_ELSE,
    };
    let filter = config::log_filter().unwrap_or_else(|| default.to_owned());
    let filter = tracing_subscriber::EnvFilter::try_new(&filter).unwrap_or_else(|error| {
        say!("landfall: LANDFALL_LOG={filter:?} is not understood, `{default}` is taken: {error}");
        tracing_subscriber::EnvFilter::new(default)
    });
    let is_colored = io::IsTerminal::is_terminal(&io::stderr()) && !config::no_color();
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(is_colored)
        .try_init();
}

/// Says what went wrong and what to do, and finds its exit code.
fn report(error: &anyhow::Error) -> ExitCode {
    let is_closed_pipe = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    if error
        .chain()
        .any(|cause| cause.downcast_ref().is_some_and(is_closed_pipe))
    {
        return ExitCode::from(exit::PIPE_CLOSED);
    }
    say!("landfall: {error:#}");
    let Some(problem) = error.downcast_ref::<Problem>() else {
        return ExitCode::from(exit::USAGE);
    };
    if let Some(hint) = hint(problem) {
        say!("  {hint}");
    }
    match problem {
        Problem::Refused { status, .. } if status.is_client_error() => ExitCode::from(exit::USAGE),
        _ => ExitCode::from(exit::UNREACHABLE),
    }
}

fn hint(problem: &Problem) -> Option<&'static str> {
    match problem {
        Problem::Away { .. } => Some(
            "start it with `landfall serve`, or name another with --server URL or LANDFALL_SERVER; `landfall doctor` looks further",
        ),
        Problem::Odd(_) => Some(
            "is something else listening there? Name the agent with --server URL or LANDFALL_SERVER",
        ),
        Problem::Refused { status, .. } if status.as_u16() == 401 => Some(
            "set LANDFALL_TOKEN or LANDFALL_TOKEN_FILE, or name the agent's file with --config agent.yaml",
        ),
        Problem::Refused { .. } => None,
    }
}

/// `42`, or `#42` as pages show it.
fn build_number(text: &str) -> Result<i64, String> {
    let digits = text.strip_prefix('#').unwrap_or(text);
    let number = digits.parse().ok().filter(|number| *number > 0);
    number.ok_or_else(|| "the number of a build is like 42".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples_in_its_help() {
        for command in Cli::command()
            .get_subcommands()
            .filter(|one| one.get_name() != "version")
        {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(
                help.contains(&format!("landfall {}", command.get_name())),
                "{}",
                command.get_name()
            );
        }
    }

    /// Words as a shell would part them: quotes hold one together, a comment ends the line. What may be left out is there.
    fn words(line: &str) -> Vec<String> {
        let line = line.split(" #").next().unwrap().replace(['[', ']'], "");
        let mut words = Vec::new();
        for (index, part) in line.split('"').enumerate() {
            match index % 2 {
                0 => words.extend(part.split_whitespace().map(str::to_owned)),
                _ => words.push(part.to_owned()),
            }
        }
        words
    }

    #[test]
    fn every_command_that_the_readme_names_is_one() {
        let readme = include_str!("../../../README.md");
        let lines = readme.lines().filter(|line| line.starts_with("landfall "));
        let inline = readme
            .lines()
            .flat_map(|line| line.split('`').skip(1).step_by(2));
        let named: Vec<&str> = lines
            .chain(inline.filter(|code| code.starts_with("landfall ")))
            .collect();
        assert!(named.len() > 20, "{named:#?}");
        for line in named {
            if let Err(error) = Cli::try_parse_from(words(line)) {
                let is_short_for_more = error.kind()
                    == clap::error::ErrorKind::MissingRequiredArgument
                    && words(line).len() == 2;
                assert!(is_short_for_more, "{line}: {error}");
            }
        }
    }

    #[test]
    fn waiting_is_the_default_and_the_last_word_counts() {
        for (words, waits) in [
            (&[][..], true),
            (&["--no-wait"][..], false),
            (&["--no-wait", "--wait"][..], true),
        ] {
            let words = ["landfall", "rerun", "42"].iter().chain(words);
            let Command::Rerun(arguments) = Cli::try_parse_from(words).unwrap().command else {
                panic!()
            };
            assert_eq!(arguments.wait.waits(), waits);
        }
    }
}
