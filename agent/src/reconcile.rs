//! Reconcile: each branch's head against the last push that its environment accepted, so that a delivery that never came is
//! only a delay.
//!
//! GitHub does not send a failed delivery again by itself, and may send one minutes late: a head that nobody told us is
//! built when two looks in a row have seen it. What comes afterwards for the same commit is a repetition.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::builds::{Millis, Push, now, short};
use crate::config::Environment;
use crate::git::process::{self, Answer, Job, Trouble};
use crate::runner::Agent;

/// Of one look at a git server.
const SILENCE_MAX: Duration = Duration::from_secs(20);
const LOOK_MAX: Duration = Duration::from_secs(60);
/// A server that does not answer is asked less and less often, down to this.
const BACKOFF_MAX: Duration = Duration::from_secs(15 * 60);
/// Looks of many agents, and of many environments, do not come at once: each is up to so much of its interval early.
const JITTER_PERCENT: u32 = 20;

/// Looks at every environment's branch until `shutdown` fires; not at all where agent.yaml says `reconcile_seconds: 0`.
pub async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    let every = Duration::from_secs(agent.config.reconcile_seconds);
    if every.is_zero() {
        return;
    }
    let mut looks = tokio::task::JoinSet::new();
    for (index, environment) in agent.config.environments.iter().enumerate() {
        let (agent, environment) = (Arc::clone(&agent), environment.clone());
        let first = every.mul_f64(f64::from(u32::try_from(index % 10).unwrap_or(0)) / 10.0);
        looks.spawn(async move { watch(&agent, &environment, every, first).await });
    }
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = async {
            while let Some(ended) = looks.join_next().await {
                // No branch goes unwatched in silence.
                ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
            }
        } => {}
    }
}

/// What is remembered of one branch between two looks.
#[derive(Debug, Default)]
struct Seen {
    /// Its head at the last look, where nobody had told us of it, and when it was seen first.
    untold: Option<(String, Millis)>,
    /// Its head at the first look, where no push was ever accepted: that one is nobody's push.
    found: Option<String>,
    failures: u32,
}

async fn watch(agent: &Agent, environment: &Environment, every: Duration, first: Duration) {
    let mut seen = Seen::default();
    tokio::time::sleep(first).await;
    loop {
        let began = Instant::now();
        match tokio::time::timeout(LOOK_MAX, look(agent, environment, &mut seen)).await {
            Ok(Ok(())) => {
                if std::mem::take(&mut seen.failures) > 0 {
                    tracing::info!(environment = environment.name, "the branch is seen again");
                }
            }
            Ok(Err(error)) => seen.failed(environment, &format!("{error:#}")),
            Err(_) => seen.failed(environment, "no answer in time"),
        }
        let wait = every
            .saturating_mul(1 << seen.failures.min(8))
            .min(BACKOFF_MAX.max(every));
        tokio::time::sleep_until(began + earlier(wait)).await;
    }
}

impl Seen {
    fn failed(&mut self, environment: &Environment, error: &str) {
        self.failures += 1;
        if self.failures == 1 {
            let environment = &environment.name;
            tracing::warn!(
                environment,
                error,
                "cannot look at the branch: a delivery that is lost now is not noticed"
            );
        }
    }

    /// Since when this head is there without a word from anybody; None unless two looks in a row have seen it so.
    fn is_missed(&mut self, head: &str, accepted: Option<&str>, at: Millis) -> Option<Millis> {
        let known = match accepted {
            Some(accepted) => accepted,
            None => self.found.get_or_insert_with(|| head.to_owned()),
        };
        let before = self.untold.take();
        if known == head {
            return None;
        }
        match before.filter(|(untold, _)| untold == head) {
            Some((_, since)) => {
                self.untold = Some((head.to_owned(), since));
                Some(since)
            }
            None => {
                self.untold = Some((head.to_owned(), at));
                None
            }
        }
    }
}

async fn look(agent: &Agent, environment: &Environment, seen: &mut Seen) -> anyhow::Result<()> {
    let (store, at) = (&agent.store, now());
    let held_back = store.build_what_was_held_back(&environment.name, &environment.branch);
    if let Some(build) = held_back.await? {
        tracing::info!(
            environment = environment.name,
            build,
            "nothing holds the environment any more: building the head of its branch"
        );
    }
    // Before git is asked: a push that is accepted in between is newer than what git answers.
    let accepted = store
        .newest_push(&environment.name, &environment.branch)
        .await?;
    let Some(head) = head(agent, environment).await? else {
        // A branch that was deleted deploys nothing.
        seen.untold = None;
        return Ok(());
    };
    let Some(since) = seen.is_missed(&head, accepted.as_deref(), at) else {
        return Ok(());
    };
    let push = Push {
        repository_id: None,
        repository: environment.repository.clone(),
        branch: environment.branch.clone(),
        before: accepted.clone().unwrap_or_default(),
        after: head.clone(),
        pusher: "a look at the branch".to_owned(),
        title: String::new(),
        // Whatever GitHub took after it was seen first is newer.
        pushed_at: Some(since),
    };
    let build = store
        .enqueue_missed(&environment.name, &push, accepted.as_deref())
        .await?;
    if let Some(build) = build {
        tracing::warn!(
            environment = environment.name,
            build,
            commit = short(&head),
            "no delivery told of this commit: building it"
        );
    }
    Ok(())
}

async fn head(agent: &Agent, environment: &Environment) -> anyhow::Result<Option<String>> {
    // A repository of its own: a look neither waits for a clone nor holds one up.
    let mirrors = agent.config.data_dir.join("looks");
    let quiet = |_: &str| {};
    let asked = process::ask(
        &agent.exe,
        environment,
        &mirrors,
        &environment.branch,
        Job::Head,
        SILENCE_MAX,
        &quiet,
    );
    match asked.await {
        Ok(Answer::Head(head)) => Ok(head),
        Ok(other) => anyhow::bail!("git answered {other:?} to the question for a head"),
        Err(Trouble::Network(why) | Trouble::Setup(why) | Trouble::Agent(why)) => {
            anyhow::bail!("{why}")
        }
        Err(Trouble::Cause(cause)) => anyhow::bail!("{}", cause.sentence),
    }
}

fn earlier(wait: Duration) -> Duration {
    let millis = u64::try_from(now()).unwrap_or_default() % 1000;
    let part = f64::from(JITTER_PERCENT) / 100.0
        * f64::from(u32::try_from(millis).unwrap_or_default())
        / 1000.0;
    wait.mul_f64(1.0 - part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_missed_when_two_looks_have_seen_it_and_nobody_told() {
        let (mut seen, mut at) = (Seen::default(), 0);
        let mut look = |head: &str, accepted: Option<&str>| {
            at += 1;
            seen.is_missed(head, accepted, at)
        };
        assert_eq!(look("a", Some("a")), None);
        assert_eq!(look("b", Some("a")), None, "its delivery may be on its way");
        assert_eq!(look("b", Some("a")), Some(2));
        assert_eq!(
            look("b", Some("b")),
            None,
            "the delivery came, or we built it"
        );
        assert_eq!(look("b", Some("c")), None, "c came after git was asked");
        assert_eq!(look("d", Some("c")), None);
        assert_eq!(look("e", Some("c")), None, "it has moved on");
        assert_eq!(look("e", Some("c")), Some(7));
    }

    #[test]
    fn what_stood_there_before_the_first_push_is_nobodys() {
        let mut seen = Seen::default();
        let mut look = |head: &str| seen.is_missed(head, None, 1);
        assert_eq!(
            [look("a"), look("a"), look("b"), look("b")],
            [None, None, None, Some(1)]
        );
    }
}
