//! A Job of a release: it is waited for before what comes after it in the order of the apply.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use super::{Scope, StageError, StageResult};
use crate::builds::Cause;
use crate::cluster::Cluster;
use crate::cluster::observe::{BLIND_RETRY, Observer, Sight};
use crate::cluster::rollout::{self, History, Verdict};
use crate::cluster::snapshot::{Snapshot, Target};
use crate::release::{AppliedObject, Release};

const POLL: Duration = Duration::from_millis(250);
/// How late an event may be.
const EVENT_LIMIT: Duration = Duration::from_secs(10);
/// More than its own deadline, after which its controller ends it.
const DEADLINE_SLACK_SECONDS: u64 = 30;

/// Waits until the Job is complete, as long as its own deadline says, else as long as a rollout may take. Fails where the Job has.
pub async fn completed(
    scope: &Scope<'_>,
    cluster: &Cluster,
    release: &Release,
    job: &AppliedObject,
) -> StageResult<()> {
    let Some(target) = Target::applied(release, std::slice::from_ref(job)).pop() else {
        return Ok(());
    };
    let mut objects = release.objects.iter();
    let own = objects
        .find(|object| job.is_named_by(object))
        .and_then(|object| object.pointer("/spec/activeDeadlineSeconds"))
        .and_then(Value::as_u64)
        .map(|seconds| seconds.saturating_add(DEADLINE_SLACK_SECONDS));
    let limit = Duration::from_secs(own.unwrap_or(release.verify.timeout_seconds));
    tokio::select! {
        biased;
        () = scope.cancel.cancelled() => Err(StageError::Canceled),
        watched = watch(scope, cluster, &target, limit) => watched,
    }
}

async fn watch(
    scope: &Scope<'_>,
    cluster: &Cluster,
    target: &Target,
    limit: Duration,
) -> StageResult<()> {
    let log = scope.log;
    let shown = target.display_name();
    let mut observer = Observer::new(cluster);
    let mut history = History::default();
    let mut sight = Sight::new(cluster.unreachable);
    let mut deadline = Instant::now() + limit;
    let mut told = String::new();
    let mut gone = None;
    loop {
        let looked = match observer.snapshot(target).await {
            Ok(Some(snapshot)) => Ok(Look::There(Box::new(snapshot))),
            Ok(None) => observer.has_completed(target).await.map(Look::Gone),
            Err(unseen) => Err(unseen),
        };
        let look = match looked {
            Ok(look) => look,
            Err(unseen) => {
                sight.unseen(unseen)?;
                tokio::time::sleep(BLIND_RETRY).await;
                continue;
            }
        };
        // Time in which nothing could be seen is not the Job's.
        deadline += sight.seen().unwrap_or_default();
        match look {
            Look::Gone(true) => {
                // Its own `ttlSecondsAfterFinished` was quicker than we.
                log.line(format!("{shown} is complete, and gone already"));
                return Ok(());
            }
            // The event may come a moment after the Job has gone.
            Look::Gone(false) => {
                if gone.get_or_insert_with(Instant::now).elapsed() >= EVENT_LIMIT {
                    let sentence = format!("{shown} was deleted before it was complete");
                    return Err(StageError::Failed(
                        Cause::new("job_failed", sentence).object(shown),
                    ));
                }
            }
            Look::There(snapshot) => match rollout::judge(target, &snapshot, false, &mut history) {
                Verdict::Complete => {
                    log.line(format!("{shown} is complete"));
                    return Ok(());
                }
                Verdict::Failed(cause) => {
                    let again = format!(
                        "to run the same Job again: kubectl -n {} delete {shown}",
                        cluster.namespace
                    );
                    let hint = cause
                        .hint
                        .as_ref()
                        .map_or(again.clone(), |hint| format!("{hint}; {again}"));
                    return Err(StageError::Failed(cause.hint(hint)));
                }
                Verdict::NotYet { progress } if progress != told => {
                    log.line(&progress);
                    told = progress;
                }
                Verdict::NotYet { .. } => {}
            },
        }
        for (who, words) in observer.take_new_words() {
            log.line(format!("Last words of {who}:"));
            words
                .lines()
                .for_each(|line| log.line(format!("  | {line}")));
        }
        if Instant::now() >= deadline {
            return Err(StageError::timed_out(&shown, limit));
        }
        tokio::time::sleep(POLL).await;
    }
}

enum Look {
    There(Box<Snapshot>),
    /// Whether the events say that it had run to its end.
    Gone(bool),
}
