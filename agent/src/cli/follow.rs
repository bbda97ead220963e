//! A build's log as it grows, to its end: no line twice, none missing, whatever happens to the connection.
//!
//! The line: live log → cleaned lines on stdout → `end` → how it ended on stderr → its exit code. Ctrl-C ends the
//! watching and never the build.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};

use super::exit;
use super::terminal::{self, Cleaner, painted, plain, say};
use crate::builds::{Build, Outcome, Stage, Status, human_duration, short};
use crate::client::{self, Client, Detail, Event, Problem};

/// How long an agent may be away while we watch: it may be restarting.
const AWAY_MAX: Duration = Duration::from_mins(5);
const POLL_EVERY: Duration = Duration::from_secs(1);
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Follows builds to their end, one after the other. The exit code is that of the first that did not end well.
pub async fn follow(client: &Client, ids: &[i64]) -> anyhow::Result<ExitCode> {
    let all = async {
        let mut worst = 0;
        for id in ids {
            let code = watch(client, *id).await?;
            worst = if worst == 0 { code } else { worst };
        }
        anyhow::Ok(ExitCode::from(worst))
    };
    tokio::select! {
        code = all => code,
        () = interrupted() => Ok(say_interrupted(ids)),
    }
}

fn say_interrupted(ids: &[i64]) -> ExitCode {
    for id in ids {
        say!(
            "build #{id} goes on: `landfall logs -f {id}` follows it, `landfall cancel {id}` ends it"
        );
    }
    ExitCode::from(exit::INTERRUPTED)
}

/// As `follow`, but in silence and for programs: how the builds ended, as the API answers.
pub async fn wait(client: &Client, ids: &[i64]) -> anyhow::Result<ExitCode> {
    let ended = tokio::select! {
        ended = wait_for_all(client, ids) => ended,
        () = interrupted() => return Ok(say_interrupted(ids)),
    };
    let (builds, code) = ended?;
    terminal::print_json(&json!({ "builds": builds }))?;
    Ok(code)
}

async fn wait_for_all(client: &Client, ids: &[i64]) -> anyhow::Result<(Vec<Value>, ExitCode)> {
    let mut worst = 0;
    let mut ended = Vec::new();
    for id in ids {
        let mut away_since: Option<Instant> = None;
        let answer = loop {
            match client.build(*id).await {
                Ok(answer) if client::read::<Detail>(&answer)?.build.status.is_terminal() => {
                    break answer;
                }
                Ok(_) => away_since = None,
                Err(problem) => {
                    let since = *away_since.get_or_insert_with(Instant::now);
                    if is_final(&problem) || since.elapsed() > AWAY_MAX {
                        return Err(problem.into());
                    }
                }
            }
            tokio::time::sleep(POLL_EVERY).await;
        };
        let code = code(&client::read::<Detail>(&answer)?.build);
        worst = if worst == 0 { code } else { worst };
        ended.push(answer);
    }
    Ok((ended, ExitCode::from(worst)))
}

async fn interrupted() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn watch(client: &Client, id: i64) -> anyhow::Result<u8> {
    let build: Detail = client::read(&client.build(id).await?)?;
    let mut screen = Screen::new(&build.build);
    let mut away_since: Option<Instant> = None;
    let mut pause = PAUSE_FIRST;
    loop {
        let before = screen.last;
        match show(client, id, &mut screen).await? {
            Shown::All => break,
            Shown::Part if screen.last > before => (away_since, pause) = (None, PAUSE_FIRST),
            Shown::Part => {}
            Shown::Lost(problem) => {
                if screen.last > before {
                    (away_since, pause) = (None, PAUSE_FIRST);
                }
                let since = *away_since.get_or_insert_with(Instant::now);
                if is_final(&problem) || since.elapsed() > AWAY_MAX {
                    return Err(problem).context(format!("build #{id} can no longer be watched"));
                }
                if pause == PAUSE_FIRST {
                    screen.say(&format!(
                        "the connection was lost and is tried again: {problem}"
                    ));
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
    screen.end()?;
    let build: Detail = client::read(&client.build(id).await?)?;
    say_end(client, &build.build);
    Ok(code(&build.build))
}

/// How one connection ended.
enum Shown {
    All,
    /// Closed without a word: the agent stops, or a proxy has had enough.
    Part,
    Lost(Problem),
}

/// Shows the lines that come over one connection. The error is our own stdout's.
async fn show(client: &Client, id: i64, screen: &mut Screen) -> anyhow::Result<Shown> {
    let mut live = match client.live(id, screen.last).await {
        Ok(live) => live,
        Err(problem) => return Ok(Shown::Lost(problem)),
    };
    loop {
        match live.next().await {
            Ok(Some(Event::Line {
                number,
                stage,
                text,
            })) => screen.line(number, stage, &text)?,
            Ok(Some(Event::End)) => return Ok(Shown::All),
            Ok(None) => return Ok(Shown::Part),
            Err(problem) => return Ok(Shown::Lost(problem)),
        }
    }
}

/// Whether asking again cannot help.
fn is_final(problem: &Problem) -> bool {
    match problem {
        Problem::Away { .. } => false,
        Problem::Refused { status, .. } => status.is_client_error(),
        Problem::Odd(_) => true,
    }
}

/// What the person sees of one build.
struct Screen {
    /// The last line that was shown.
    last: i64,
    stage: Option<Stage>,
    cleaner: Cleaner,
    /// Where there is a terminal: turns until the first line comes.
    waiting: ProgressBar,
}

impl Screen {
    fn new(build: &Build) -> Self {
        let waiting = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            waiting.set_style(style);
        }
        let name = format!("build #{} of {}", build.id, plain(&build.environment));
        if build.status == Status::Queued {
            waiting.set_message(format!("{name} waits for its turn"));
            waiting.enable_steady_tick(Duration::from_millis(120));
        }
        Self {
            last: 0,
            stage: None,
            cleaner: Cleaner::new(terminal::colors()),
            waiting,
        }
    }

    fn line(&mut self, number: i64, stage: Option<Stage>, text: &str) -> anyhow::Result<()> {
        if number <= self.last {
            return Ok(());
        }
        self.waiting.finish_and_clear();
        self.last = number;
        if stage != self.stage {
            self.stage = stage;
            if let Some(stage) = stage {
                say!("==> {}", stage.title());
            }
        }
        Ok(terminal::print(&self.cleaner.clean(text))?)
    }

    fn say(&self, text: &str) {
        self.waiting.suspend(|| say!("{text}"));
    }

    fn end(&mut self) -> anyhow::Result<()> {
        self.waiting.finish_and_clear();
        Ok(terminal::print(self.cleaner.end())?)
    }
}

fn say_end(client: &Client, build: &Build) {
    let took = build
        .finished_at
        .zip(build.started_at)
        .map(|(end, begin)| human_duration(end - begin));
    let took = took
        .map(|took| format!(" after {took}"))
        .unwrap_or_default();
    let id = build.id;
    say!("\nbuild #{id} {}{took}: {}", build.status, outcome(build));
    if let Some(cause) = &build.cause {
        say!("  {}", plain(&cause.sentence));
        if let Some(hint) = &cause.hint {
            say!("  {}", plain(hint));
        }
    }
    match build.status {
        Status::Failed | Status::Errored | Status::Canceled => {
            say!(
                "  `landfall rerun {id}` builds it again; {}",
                client.page(id)
            )
        }
        Status::Superseded => {
            if let Some(newer) = build.superseded_by {
                say!("  `landfall logs -f {newer}` follows the one that took its place");
            }
        }
        _ => say!("  {}", client.page(id)),
    }
}

fn outcome(build: &Build) -> String {
    let environment = plain(&build.environment);
    match build.outcome {
        Outcome::Live => format!("{} is live in {environment}", short(&plain(&build.commit))),
        Outcome::Unchanged => format!("{environment} is as it was"),
        Outcome::RolledBack => format!("{environment} is back at what worked"),
        Outcome::RollbackFailed => format!("the rollback of {environment} failed too"),
        Outcome::LeftFailed => format!("what was applied to {environment} stands there"),
        Outcome::Removed => format!("what was applied to {environment} was removed"),
        Outcome::Unknown => format!("what {environment} holds is not known"),
    }
}

/// The exit code of a command that waited for this build.
fn code(build: &Build) -> u8 {
    let is_time_out = build
        .cause
        .as_ref()
        .is_some_and(|cause| cause.id == "time_out");
    match build.status.exit_code(build.outcome) {
        1 if is_time_out => exit::TIME_OUT,
        code => code,
    }
}

/// One line about a build that was just queued.
pub fn say_queued(client: &Client, build: &Build) {
    let (id, environment) = (build.id, plain(&build.environment));
    say!(
        "build #{id} of {environment} is {}: {}",
        painted(build.status, 0),
        client.page(id)
    );
}
