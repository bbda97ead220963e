//! What commands without a server share: a person's cluster, stages whose log is the terminal, and exit codes.
//!
//! For people who keep their Jenkins or Actions. The stages are those of the agent; there is no store, so what serves is
//! what is found.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio_util::sync::CancellationToken;

use super::exit;
use super::terminal::{self, say};
use crate::build_log::{BuildLog, Masker, StageLog};
use crate::builds::{Build, BuildKind, Outcome, Stage, Status, now};
use crate::config::{Docker, Environment};
use crate::pipeline::Verify;
use crate::release::Release;
use crate::stages::{Scope, StageError};

const LOG_BYTES_MAX: u64 = 64 << 20;

/// Which cluster and namespace are meant, in kubectl's words.
#[derive(Debug, Args)]
pub struct ClusterArguments {
    /// Namespace [default: that of the kubeconfig's context]
    #[arg(short, long, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
    /// Kubeconfig [default: KUBECONFIG, else ~/.kube/config]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Context of the kubeconfig
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
}

impl ClusterArguments {
    pub fn environment(&self) -> Environment {
        Environment::of_person(
            "by-hand",
            self.kubeconfig.clone(),
            self.context.clone(),
            self.namespace.clone().unwrap_or_default(),
        )
    }
}

/// `90`, `90s`, `2m`, `1h`; 0 is "no limit" to kubectl, and a day here.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits
        .parse()
        .map_err(|_| "a time is like 90s, 2m or 1h".to_owned())?;
    let seconds = match text.get(digits.len()..).unwrap_or_default() {
        "" | "s" => number,
        "m" => number.saturating_mul(60),
        "h" => number.saturating_mul(3600),
        other => return Err(format!("{other:?} is no unit of time: use s, m or h")),
    };
    let day = 24 * 3600;
    Ok(Duration::from_secs(if seconds == 0 {
        day
    } else {
        seconds.min(day)
    }))
}

/// A build that is none: nobody stores it.
pub fn build(fence: i64) -> Build {
    Build {
        id: 0,
        environment: String::new(),
        repository: String::new(),
        branch: String::new(),
        commit: String::new(),
        title: String::new(),
        by: String::new(),
        kind: BuildKind::Manual,
        status: Status::Running,
        outcome: Outcome::Unchanged,
        cause: None,
        stage: None,
        attempt: 1,
        fence,
        image: None,
        release_id: None,
        queued_at: now(),
        started_at: Some(now()),
        finished_at: None,
        cancel_requested: false,
        superseded_by: None,
        restored_release: None,
    }
}

/// A release of these objects, which nothing was built for.
pub fn release(environment: &Environment, verify: Verify) -> Release {
    Release {
        environment: environment.name.clone(),
        namespace: environment.namespace.clone(),
        verify,
        ..Release::default()
    }
}

/// Runs stages whose log goes to stdout as it grows. None: Ctrl-C has ended the watching.
pub async fn with_log<T>(
    stage: Stage,
    work: impl AsyncFnOnce(&StageLog, &CancellationToken) -> T,
) -> anyhow::Result<Option<T>> {
    let log = BuildLog::new(Masker::default(), LOG_BYTES_MAX, 0);
    let stage_log = log.stage(stage);
    let cancel = CancellationToken::new();
    let mut cleaner = terminal::Cleaner::new(false);
    let printing = async {
        while let Some(lines) = log.drain().await {
            for line in lines {
                let text = String::from_utf8_lossy(&line.bytes).into_owned();
                let text = cleaner.clean(text.trim_end_matches('\n'));
                terminal::print(&format!("{text}\n"))?;
            }
        }
        anyhow::Ok(())
    };
    let working = async {
        let done = tokio::select! {
            done = work(&stage_log, &cancel) => Some(done),
            _ = tokio::signal::ctrl_c() => None,
        };
        log.close();
        done
    };
    let (printed, done) = tokio::join!(printing, working);
    printed?;
    Ok(done)
}

pub fn interrupted() -> ExitCode {
    say!("interrupted; what was begun in the cluster goes on there");
    ExitCode::from(exit::INTERRUPTED)
}

pub fn scope<'a>(
    build: &'a Build,
    environment: &'a Environment,
    docker: &'a Docker,
    log: &'a StageLog,
    cancel: &'a CancellationToken,
) -> Scope<'a> {
    let here = std::path::Path::new(".");
    Scope {
        build,
        environment,
        docker,
        mirrors: here,
        work: here,
        log,
        cancel,
    }
}

/// Says why something failed, and finds its exit code.
pub fn report(error: &StageError) -> ExitCode {
    match error {
        StageError::Failed(cause) | StageError::TimedOut(cause) => {
            say!("failed: {}", terminal::plain(&cause.sentence));
            if let Some(hint) = &cause.hint {
                say!("  next: {}", terminal::plain(hint));
            }
        }
        StageError::Canceled => say!("interrupted"),
        StageError::Agent(error) => say!("landfall: {error:#}"),
    }
    ExitCode::from(match error {
        StageError::Failed(_) => 1,
        StageError::TimedOut(_) => exit::TIME_OUT,
        StageError::Canceled => exit::INTERRUPTED,
        StageError::Agent(_) => exit::UNREACHABLE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_kubectl_reads_them() {
        for (text, seconds) in [
            ("90", 90),
            ("90s", 90),
            ("2m", 120),
            ("1h", 3600),
            ("0s", 86_400),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert!(duration("soon").is_err() && duration("5d").is_err());
    }
}
