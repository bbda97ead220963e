//! Waiting for who is away: the engine, or a registry.
//!
//! The line: ask → away? say so in the log → a growing pause → ask again, up to `unreachable_seconds`, then our error and
//! never the commit's. Listens to `Scope::cancel`.

use std::time::{Duration, Instant};

use anyhow::anyhow;
use bollard::Docker;
use bollard::errors::Error;

use super::{Scope, StageError, StageResult};
use crate::cluster::words;
use crate::docker;

/// Pauses between two attempts grow from the first to the second.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_LAST: Duration = Duration::from_secs(5);
/// How often the author of the push is told that we wait.
const WAITING_LINE_EVERY: Duration = Duration::from_secs(5);

/// Why something that Docker was asked did not come about.
#[derive(Debug)]
pub enum Trouble {
    /// The engine, or a registry, is not there now: worth asking again.
    Away(anyhow::Error),
    /// The answer.
    Final(StageError),
}

impl From<StageError> for Trouble {
    fn from(error: StageError) -> Self {
        Self::Final(error)
    }
}

impl Trouble {
    /// `Away` where the connection is at fault; else our error, with what we wanted ("cannot …").
    pub fn of(error: Error, wanted: impl Into<String>) -> Self {
        let away = docker::is_away(&error);
        let error = anyhow::Error::new(error);
        match away {
            true => Self::Away(words::of_the_network(error).context(wanted.into())),
            false => Self::Final(StageError::Agent(error.context(wanted.into()))),
        }
    }
}

/// The engine of this agent, waited for where it is away.
pub async fn engine(scope: &Scope<'_>) -> StageResult<Docker> {
    patiently(scope, "Docker", || async {
        docker::connect(scope.docker).await.map_err(|error| {
            if docker::is_forbidden(&error) {
                let advice =
                    "this agent may not use Docker's socket: add its user to the group `docker`";
                return Trouble::Final(anyhow!(error).context(advice).into());
            }
            Trouble::of(error, "cannot reach Docker")
        })
    })
    .await
}

/// Asks until there is an answer; while somebody is away it waits, says so in the log, and gives up after
/// `unreachable_seconds` with our error. `what` is who is waited for: "Docker", "registry ghcr.io".
pub async fn patiently<T, Asking>(
    scope: &Scope<'_>,
    what: &str,
    mut ask: impl FnMut() -> Asking,
) -> StageResult<T>
where
    Asking: Future<Output = Result<T, Trouble>>,
{
    let limit = Duration::from_secs(scope.environment.limits.unreachable_seconds);
    let mut away_since: Option<Instant> = None;
    let mut said: Option<Instant> = None;
    let mut pause = PAUSE_FIRST;
    loop {
        let error = match ask().await {
            Ok(answer) => {
                if let (Some(since), Some(_)) = (away_since, said) {
                    scope.log.line(format!(
                        "{what} is back after {} s",
                        since.elapsed().as_secs()
                    ));
                }
                return Ok(answer);
            }
            Err(Trouble::Final(error)) => return Err(error),
            Err(Trouble::Away(error)) => error,
        };
        let since = *away_since.get_or_insert_with(Instant::now);
        if since.elapsed() + pause > limit {
            let context = format!("{what} was away for {} s", limit.as_secs());
            return Err(StageError::Agent(error.context(context)));
        }
        if said.is_none_or(|said| said.elapsed() >= WAITING_LINE_EVERY) {
            said = Some(Instant::now());
            scope.log.line(format!(
                "waiting for {what}, since {} s: {error:#}",
                since.elapsed().as_secs()
            ));
        }
        tokio::select! {
            () = scope.cancel.cancelled() => return Err(StageError::Canceled),
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(PAUSE_LAST);
    }
}
