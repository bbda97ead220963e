//! What templates show of builds, stages and times: words, icons, links.
//!
//! Pure: no IO. Everything here is plain text, or an address that was put together from checked parts; templates escape it.

use crate::builds::{
    Build, BuildKind, Cause, Millis, Outcome, Stage, StageRow, StageStatus, Status, human_duration,
    is_commit_id, short,
};
use crate::config::Config;
use crate::release::{Change, Planned};

/// A moment, three ways.
pub struct Moment {
    pub millis: Millis,
    /// For machines: RFC 3339.
    pub iso: String,
    /// `2026-11-23 21:29:50 UTC`.
    pub absolute: String,
    /// `3 min ago`, seen from `now`; scripts keep it true.
    pub relative: String,
}

impl Moment {
    pub fn new(millis: Millis, now: Millis) -> Self {
        let stamp = jiff::Timestamp::from_millisecond(millis).unwrap_or_default();
        Self {
            millis,
            iso: stamp.to_string(),
            absolute: stamp.strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
            relative: ago(now - millis),
        }
    }
}

/// How long something took, or takes since.
pub struct Span {
    pub text: String,
    /// It goes on: scripts count from here.
    pub since: Option<Millis>,
}

impl Span {
    fn new(
        begun: Option<Millis>,
        done: Option<Millis>,
        goes_on: bool,
        now: Millis,
    ) -> Option<Self> {
        let begun = begun?;
        let since = (done.is_none() && goes_on).then_some(begun);
        let end = done.or(since.map(|_| now))?;
        Some(Self {
            text: human_duration(end - begun),
            since,
        })
    }
}

/// A commit, and where GitHub shows it.
pub struct CommitView {
    pub short: String,
    pub full: String,
    pub url: Option<String>,
}

/// One of the stages of a build.
pub struct Step {
    pub stage: Stage,
    pub title: &'static str,
    /// The name of class and icon.
    pub status: &'static str,
    pub word: &'static str,
    pub span: Option<Span>,
}

/// A build in the list and on top of its page.
pub struct BuildView {
    pub id: i64,
    pub title: String,
    pub environment: String,
    pub branch: String,
    pub by: String,
    pub kind: &'static str,
    pub commit: Option<CommitView>,
    pub status: Status,
    pub word: &'static str,
    /// What became of the environment, where that is worth a word.
    pub outcome: Option<&'static str>,
    /// Its release is what serves now.
    pub serves: bool,
    pub outcome_name: &'static str,
    pub cause: Option<Cause>,
    /// The stage that runs, or ran last.
    pub stage: Option<&'static str>,
    /// Six names of classes: how far it came, as far as the build's own row says.
    pub progress: Vec<&'static str>,
    pub image: Option<String>,
    pub release_id: Option<i64>,
    /// What its rollback put back.
    pub restored_release: Option<i64>,
    pub attempt: i64,
    pub superseded_by: Option<i64>,
    pub queued: Moment,
    pub finished: Option<Moment>,
    pub took: Option<Span>,
    pub is_over: bool,
    /// Why it does not begin, where that is known.
    pub waits: Option<Waits>,
}

/// What a queued build waits for.
pub enum Waits {
    /// Another build of its environment.
    Build(i64),
    /// An agent that knows its environment: this one does not.
    Agent,
    /// Bytes free and bytes wanted (`min_free_bytes`), as people read them.
    Disk { free: String, wanted: String },
}

impl Waits {
    /// `running` is the build that runs in the same environment, `free` what the disk has, in bytes. What brings a release
    /// back waits for no disk.
    pub fn new(config: &Config, build: &Build, running: Option<i64>, free: u64) -> Option<Self> {
        if build.status != Status::Queued {
            return None;
        }
        if let Some(running) = running {
            return Some(Self::Build(running));
        }
        if config.environment(&build.environment).is_none() {
            return Some(Self::Agent);
        }
        let wanted = config.min_free_bytes;
        (free < wanted && !build.kind.brings_back()).then(|| Self::Disk {
            free: mebibytes(free),
            wanted: mebibytes(wanted),
        })
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

impl BuildView {
    /// `serving` is the release that is live in the build's environment now.
    pub fn new(config: &Config, build: &Build, serving: Option<i64>, now: Millis) -> Self {
        let serves = build.release_id.is_some() && build.release_id == serving;
        let is_over = build.status.is_terminal();
        let kind = match build.kind {
            BuildKind::Push => "Push",
            BuildKind::Manual => "Manual build",
            BuildKind::Rerun => "Rerun",
            BuildKind::Undo => "Undo",
            BuildKind::Redo => "Redo",
        };
        let title = match build.title.trim() {
            "" => format!("{kind} of {}", build.branch),
            title => title.to_owned(),
        };
        Self {
            id: build.id,
            title,
            environment: build.environment.clone(),
            branch: build.branch.clone(),
            by: build.by.clone(),
            kind,
            commit: commit(config, &build.environment, &build.repository, &build.commit),
            status: build.status,
            word: status_word(build),
            outcome: is_over.then(|| outcome_word(build, serves)).flatten(),
            serves,
            outcome_name: build.outcome.as_str(),
            cause: build.cause.clone(),
            stage: build.stage.map(Stage::title),
            progress: progress(build),
            image: build.image.clone(),
            release_id: build.release_id,
            restored_release: build.restored_release,
            attempt: build.attempt,
            // One that a backup brought back has given way to nobody.
            superseded_by: build.superseded_by.filter(|by| *by != build.id),
            queued: Moment::new(build.queued_at, now),
            finished: build.finished_at.map(|at| Moment::new(at, now)),
            took: Span::new(build.started_at, build.finished_at, !is_over, now),
            is_over,
            waits: None,
        }
    }

    /// With what it waits for.
    #[must_use]
    pub fn waiting(self, waits: Option<Waits>) -> Self {
        Self { waits, ..self }
    }

    /// In the list only what serves now is called live: it would be said of every build that passed.
    pub fn outcome_in_list(&self) -> Option<&'static str> {
        self.outcome
            .filter(|_| self.serves || self.outcome_name != Outcome::Live.as_str())
    }

    /// The stage in a few words, for the list.
    pub fn stage_word(&self) -> &str {
        match (self.status, self.stage) {
            (Status::Queued, _) => "Waiting",
            (Status::Passed, _) | (_, None) => "",
            (_, Some(stage)) => stage,
        }
    }
}

/// The six stages, begun or not, and the rollback where there was one.
pub fn steps(build: &Build, rows: &[StageRow], now: Millis) -> Vec<Step> {
    let has_rollback = rows.iter().any(|row| row.stage == Stage::Rollback);
    let rollback = has_rollback.then_some(Stage::Rollback);
    Stage::LINE
        .into_iter()
        .chain(rollback)
        .map(|stage| {
            let row = rows.iter().find(|row| row.stage == stage);
            let (status, word) = match row.map(|row| row.status) {
                Some(StageStatus::Running) if build.status.is_terminal() => {
                    ("skipped", "Not finished")
                }
                Some(StageStatus::Running) => ("running", "Running"),
                Some(StageStatus::Passed) => ("passed", "Passed"),
                Some(StageStatus::Failed) => ("failed", "Failed"),
                Some(StageStatus::Errored) => ("errored", "Errored"),
                Some(StageStatus::Canceled) => ("canceled", "Canceled"),
                None if build.status.is_terminal() => ("skipped", "Not run"),
                None => ("queued", "Pending"),
            };
            let goes_on = !build.status.is_terminal();
            Step {
                stage,
                title: stage.title(),
                status,
                word,
                span: row.and_then(|row| Span::new(Some(row.begun_at), row.done_at, goes_on, now)),
            }
        })
        .collect()
}

/// `1 created, 2 changed, 4 unchanged`.
pub fn plan_words(plan: &[Planned]) -> String {
    let words: Vec<String> = Change::ALL
        .iter()
        .filter_map(|change| {
            let count = plan.iter().filter(|one| one.change == *change).count();
            (count > 0).then(|| format!("{count} {change}"))
        })
        .collect();
    words.join(", ")
}

pub fn status_title(status: Status) -> &'static str {
    match status {
        Status::Queued => "Queued",
        Status::Running => "Running",
        Status::Passed => "Passed",
        Status::Failed => "Failed",
        Status::Errored => "Errored",
        Status::Canceled => "Canceled",
        Status::Superseded => "Superseded",
        Status::Skipped => "Skipped",
    }
}

fn status_word(build: &Build) -> &'static str {
    if build.status == Status::Running && build.cancel_requested {
        return "Canceling";
    }
    status_title(build.status)
}

fn outcome_word(build: &Build, serves: bool) -> Option<&'static str> {
    match build.outcome {
        Outcome::Live if serves => Some("Live"),
        Outcome::Live => Some("Went live"),
        Outcome::Unchanged if build.status == Status::Passed => Some("Unchanged"),
        Outcome::Unchanged => None,
        Outcome::RolledBack => Some("Rolled back"),
        Outcome::RollbackFailed => Some("Rollback failed"),
        Outcome::LeftFailed => Some("Left failed"),
        Outcome::Removed => Some("Removed"),
        Outcome::Unknown => Some("Unknown"),
    }
}

fn progress(build: &Build) -> Vec<&'static str> {
    let reached = build.stage.map(|stage| {
        let in_line = Stage::LINE.iter().position(|one| *one == stage);
        // A rollback says only that deploying had begun.
        in_line.unwrap_or(4)
    });
    let all_passed = build.status == Status::Passed;
    (0..Stage::LINE.len())
        .map(|at| match reached {
            _ if all_passed => "passed",
            Some(reached) if at < reached => "passed",
            Some(reached) if at == reached => build.status.as_str(),
            _ => "pending",
        })
        .collect()
}

/// Links only where the operator's own clone URL says that this repository is on github.com.
pub fn commit(
    config: &Config,
    environment: &str,
    repository: &str,
    commit: &str,
) -> Option<CommitView> {
    if commit.is_empty() {
        return None;
    }
    let is_on_github = config
        .environment(environment)
        .is_some_and(|one| one.clone_url.starts_with("https://github.com/"));
    let url = (is_on_github && is_repository(repository) && is_commit_id(commit))
        .then(|| format!("https://github.com/{repository}/commit/{commit}"));
    Some(CommitView {
        short: short(commit).to_owned(),
        full: commit.to_owned(),
        url,
    })
}

fn is_repository(text: &str) -> bool {
    let is_name = |name: &str| {
        !name.is_empty()
            && !name.starts_with('.')
            && name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
    };
    text.split_once('/')
        .is_some_and(|(owner, name)| is_name(owner) && is_name(name))
}

/// `just now`, `12 s ago`, `3 min ago`, `5 h ago`, `9 d ago`. static/page.js says it in the same words.
fn ago(millis: Millis) -> String {
    match millis / 1_000 {
        ..5 => "just now".to_owned(),
        seconds @ 5..60 => format!("{seconds} s ago"),
        seconds @ 60..3_600 => format!("{} min ago", seconds / 60),
        seconds @ 3_600..172_800 => format!("{} h ago", seconds / 3_600),
        seconds => format!("{} d ago", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_in_few_words() {
        for (millis, text) in [
            (-5_000, "just now"),
            (4_999, "just now"),
            (59_000, "59 s ago"),
            (3_599_000, "59 min ago"),
            (7_200_000, "2 h ago"),
            (864_000_000, "10 d ago"),
        ] {
            assert_eq!(ago(millis), text);
        }
    }

    #[test]
    fn a_moment_is_exact_for_machines_and_people() {
        let moment = Moment::new(1_795_469_390_123, 1_795_469_400_123);
        assert_eq!(moment.iso, "2026-11-23T21:29:50.123Z");
        assert_eq!(moment.absolute, "2026-11-23 21:29:50 UTC");
        assert_eq!(moment.relative, "10 s ago");
    }

    #[test]
    fn only_names_of_repositories_become_links() {
        assert!(is_repository("acme/hello-axum") && is_repository("a/b.c_d"));
        for odd in [
            "", "/", "a/", "/b", "a/b/c", "a/..", "a/b?x", "a/b\"", "../b", "a b/c",
        ] {
            assert!(!is_repository(odd), "{odd:?}");
        }
    }
}
