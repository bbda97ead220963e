//! Checkout: the mirror is brought up to date, the commit is judged, its tree is written, pipeline.yaml is read.
//!
//! The line: reuse what an earlier attempt finished → ask the git process, patiently while the server is away → keep the
//! tree with a marker → parse. What git does is in `git/`; this file names no git library and runs no program.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::{CheckedOut, Scope, StageError, StageResult, limited};
use crate::builds::{Cause, is_commit_id, short};
use crate::config::Environment;
use crate::fail_point;
use crate::git::process::{self, Answer, Job, TreeFacts, Trouble};
use crate::git::tree;
use crate::pipeline::{self, Pipeline};

/// Between two tries while the server is away: doubled from the first to the last.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// Where Linux says which of its starts this is: files written before a power cut may be empty after it.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What became of it.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub enum Checkout {
    Ready(CheckedOut),
    /// A newer commit is deployed or was pushed, and the branch's head is another: building this one would go backwards.
    Stale {
        head: String,
    },
}

/// Kept beside a finished tree.
#[derive(Serialize, Deserialize)]
struct Marker {
    boot: String,
    facts: TreeFacts,
}

/// Checks out the build's commit. `exe` is our own binary (`process::own_exe`), `newer` commits from which there is no way back
/// to an ancestor: the one that is deployed, and others that were pushed.
pub async fn run(scope: &Scope<'_>, exe: &Path, newer: &[String]) -> StageResult<Checkout> {
    let limit = Duration::from_secs(scope.environment.limits.clone_timeout_seconds);
    limited(scope, "checkout", limit, check_out(scope, exe, newer)).await
}

/// Whether a finished checkout can be used by the next stage of a resumed build.
pub fn still_there(baton: &CheckedOut) -> bool {
    finished(&baton.tree, &baton.commit).is_some()
}

/// The branch's head by the server's word alone, nothing fetched; None where there is no such branch.
pub async fn branch_head(
    environment: &Environment,
    exe: &Path,
    mirrors: &Path,
) -> anyhow::Result<Option<String>> {
    match outside_a_build(environment, exe, mirrors, Job::Head).await? {
        Answer::Head(head) => Ok(head),
        other => anyhow::bail!("the git process answered {other:?} when asked for a head"),
    }
}

/// The commit that a build by hand is of: the head of its branch now.
pub async fn head(scope: &Scope<'_>, exe: &Path) -> StageResult<String> {
    let limit = Duration::from_secs(scope.environment.limits.clone_timeout_seconds);
    let asked = ask(scope, exe, || Job::Head);
    let (url, branch) = (&scope.environment.clone_url, &scope.build.branch);
    match limited(scope, "the look at the branch", limit, asked).await? {
        Answer::Head(Some(commit)) => Ok(commit),
        Answer::Head(None) => Err(StageError::Failed(
            Cause::new("branch_missing", format!("{url} has no branch {branch:?}"))
                .hint("push it, or name another branch in agent.yaml"),
        )),
        other => Err(anyhow::anyhow!("the git process answered {other:?}").into()),
    }
}

/// One try: whoever asks comes again.
async fn outside_a_build(
    environment: &Environment,
    exe: &Path,
    mirrors: &Path,
    job: Job,
) -> anyhow::Result<Answer> {
    let limit = Duration::from_secs(environment.limits.clone_timeout_seconds);
    let silence = Duration::from_secs(environment.limits.unreachable_seconds);
    let branch = &environment.branch;
    let asked = process::ask(exe, environment, mirrors, branch, job, silence, &|_| {});
    let answer = tokio::time::timeout(limit, asked).await.with_context(|| {
        format!(
            "{} took longer than {} s",
            environment.clone_url,
            limit.as_secs()
        )
    })?;
    answer.map_err(|trouble| match trouble {
        Trouble::Network(text) => {
            anyhow::anyhow!("cannot reach {}: {text}", environment.clone_url)
        }
        Trouble::Setup(text) | Trouble::Agent(text) => anyhow::anyhow!(text),
        Trouble::Cause(cause) => anyhow::anyhow!(cause.sentence),
    })
}

async fn check_out(scope: &Scope<'_>, exe: &Path, newer: &[String]) -> StageResult<Checkout> {
    let commit = &scope.build.commit;
    if !is_commit_id(commit) {
        return Err(anyhow::anyhow!("{commit:?} is not the id of a commit").into());
    }
    let tree = scope.work.join("tree");
    let facts = if let Some(facts) = finished(&tree, commit) {
        scope
            .log
            .line(format!("commit {} is checked out already", short(commit)));
        facts
    } else {
        let half = make_room(scope.work, &tree)?;
        let answer = fetch(scope, exe, newer, &half).await;
        fail_point::at("checkout: fetched");
        if answer.is_err() {
            // A refused tree may be large, and the build's folder may be kept for a while.
            let _ = remove(&half);
        }
        match answer? {
            Answer::Tree(facts) => {
                keep(&half, &tree, &facts)?;
                fail_point::at("checkout: tree kept");
                facts
            }
            Answer::Stale { head } => {
                scope.log.line(format!(
                    "commit {} is older than what is deployed or was pushed, and the branch's head is {}: not built",
                    short(commit),
                    short(&head)
                ));
                return Ok(Checkout::Stale { head });
            }
            other => return Err(anyhow::anyhow!("the git process answered {other:?}").into()),
        }
    };
    scope.log.line(format!(
        "checked out {} files, {} bytes",
        facts.files, facts.bytes
    ));
    let pipeline = read_pipeline(scope, &tree)?;
    Ok(Checkout::Ready(CheckedOut {
        commit: facts.commit,
        commit_time: facts.commit_time,
        title: facts.title,
        author: facts.author,
        tree,
        pipeline,
    }))
}

/// Asks the git process for the build's commit.
async fn fetch(
    scope: &Scope<'_>,
    exe: &Path,
    newer: &[String],
    half: &Path,
) -> StageResult<Answer> {
    let (url, branch) = (&scope.environment.clone_url, &scope.build.branch);
    scope
        .log
        .line(format!("fetching branch {branch:?} of {url}"));
    let job = || {
        let _ = remove(half);
        Job::Checkout {
            commit: scope.build.commit.clone(),
            newer: newer.to_owned(),
            tree: half.to_owned(),
        }
    };
    ask(scope, exe, job).await
}

/// Asks the git process, again while the server is away, for `limits.unreachable_seconds` at most.
async fn ask(scope: &Scope<'_>, exe: &Path, job: impl Fn() -> Job) -> StageResult<Answer> {
    let environment = scope.environment;
    let (url, branch) = (&environment.clone_url, &scope.build.branch);
    let patience = Duration::from_secs(environment.limits.unreachable_seconds);
    let note = |text: &str| scope.log.line(text);
    let mut away_since: Option<Instant> = None;
    let (mut pause, pause_max) = BACKOFF;
    loop {
        let begun = Instant::now();
        let asked = process::ask(
            exe,
            environment,
            scope.mirrors,
            branch,
            job(),
            patience,
            &note,
        );
        let problem = match asked.await {
            Ok(answer) => return Ok(answer),
            Err(Trouble::Cause(cause)) => return Err(StageError::Failed(cause)),
            Err(Trouble::Setup(text) | Trouble::Agent(text)) => {
                return Err(anyhow::anyhow!(text)
                    .context("cannot check out the commit")
                    .into());
            }
            Err(Trouble::Network(problem)) => problem,
        };
        let away = away_since.get_or_insert(begun).elapsed();
        if away + pause >= patience {
            return Err(anyhow::anyhow!(problem)
                .context(format!("cannot reach {url} for {} s", away.as_secs()))
                .into());
        }
        scope.log.line(format!(
            "waiting for {url} since {} s: {problem}",
            away.as_secs()
        ));
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(pause_max);
    }
}

/// An empty place for the tree, and what an earlier attempt left is gone.
fn make_room(work: &Path, tree: &Path) -> anyhow::Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    let half = work.join("tree.half");
    let mut folder = std::fs::DirBuilder::new();
    folder.recursive(true).mode(0o700).create(work)?;
    remove(&marker_of(tree))
        .and_then(|()| remove(tree))
        .and_then(|()| remove(&half))
        .with_context(|| format!("cannot clear {}", work.display()))?;
    Ok(half)
}

fn remove(path: &Path) -> std::io::Result<()> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(kind) if kind.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn keep(half: &Path, tree: &Path, facts: &TreeFacts) -> anyhow::Result<()> {
    let marker = Marker {
        boot: boot(),
        facts: facts.clone(),
    };
    std::fs::rename(half, tree)
        .and_then(|()| std::fs::write(marker_of(tree), serde_json::to_vec(&marker)?))
        .with_context(|| format!("cannot keep the checkout {}", tree.display()))
}

/// The facts of a tree that is whole, of this commit, and written since the machine's last start.
fn finished(tree: &Path, commit: &str) -> Option<TreeFacts> {
    let marker: Marker = serde_json::from_slice(&std::fs::read(marker_of(tree)).ok()?).ok()?;
    let whole = marker.facts.commit == commit && marker.boot == boot() && tree.is_dir();
    whole.then_some(marker.facts)
}

fn marker_of(tree: &Path) -> PathBuf {
    tree.with_extension("json")
}

fn boot() -> String {
    std::fs::read_to_string(BOOT_ID)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn read_pipeline(scope: &Scope<'_>, tree: &Path) -> StageResult<Pipeline> {
    let path = &scope.environment.pipeline;
    let invalid = |problem: String| {
        scope.log.line(format!("{path}: {problem}"));
        StageError::Failed(
            Cause::new("pipeline_invalid", format!("{path} {problem}"))
                .object(path.clone())
                .hint("it must be a regular file in UTF-8, of at most 256 KiB"),
        )
    };
    let bytes = match tree::read_beneath(tree, path, pipeline::BYTES_MAX as u64) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(StageError::Failed(
                Cause::new("pipeline_missing", format!("the repository has no {path}"))
                    .object(path.clone())
                    .hint("write one (README.md shows how; `landfall validate` checks it), or set `pipeline` in agent.yaml"),
            ));
        }
        Err(error) => return Err(invalid(format!("cannot be read: {error}"))),
    };
    let Ok(text) = String::from_utf8(bytes) else {
        return Err(invalid("is not UTF-8".to_owned()));
    };
    pipeline::parse(path, &text).map_err(|diagnostic| {
        scope.log.line(diagnostic.to_string());
        let place = match diagnostic.position {
            Some((line, _)) => format!("{path}:{line}"),
            None => path.clone(),
        };
        StageError::Failed(
            Cause::new(
                "pipeline_invalid",
                format!("{place}: {}", diagnostic.problem),
            )
            .object(place)
            .hint("the log shows the line; `landfall validate` checks the file before you push"),
        )
    })
}
