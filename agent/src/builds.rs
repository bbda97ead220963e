//! The words of a build: status, outcome, stage, cause, push.
//!
//! Pure: no IO, no async, nothing of ours. Everything that stores, shows or judges a build speaks with these types.

use serde::{Deserialize, Serialize};

/// Milliseconds since 1970 (UTC), as every table and every JSON answer holds them.
pub type Millis = i64;

/// Defines an enum whose variants have one stable name in the store, in JSON and on pages.
macro_rules! named {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$vmeta])* $variant),+ }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { f.pad(self.as_str()) }
        }

        impl std::str::FromStr for $name {
            type Err = anyhow::Error;

            fn from_str(text: &str) -> anyhow::Result<Self> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(anyhow::anyhow!("unknown {} {text:?}", stringify!($name))),
                }
            }
        }
    };
}
pub(crate) use named;

named! {
    /// Where a build is in its life. Everything after `Running` is terminal and never changes again.
    Status {
        Queued = "queued",
        Running = "running",
        Passed = "passed",
        Failed = "failed",
        /// We could not do our work: Docker, the cluster or our own agent was at fault, not the commit.
        Errored = "errored",
        Canceled = "canceled",
        /// A newer push took its place before anything was deployed.
        Superseded = "superseded",
        Skipped = "skipped",
    }
}

impl Status {
    pub fn is_terminal(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }

    /// The exit code of a command that waited for such a build (design section 7).
    pub fn exit_code(self, outcome: Outcome) -> u8 {
        match (self, outcome) {
            (Self::Failed, Outcome::RolledBack) => 3,
            (_, Outcome::RollbackFailed) => 4,
            (Self::Failed, _) => 1,
            (Self::Errored, _) => 5,
            (Self::Canceled, _) => 130,
            _ => 0,
        }
    }
}

named! {
    /// What became of the environment.
    Outcome {
        Live = "live",
        /// Nothing changed there; also: the build ended before its first mutation.
        Unchanged = "unchanged",
        RolledBack = "rolled_back",
        RollbackFailed = "rollback_failed",
        /// Something was applied and stands, although the build failed.
        LeftFailed = "left_failed",
        Removed = "removed",
        /// We lost sight of the cluster after the first mutation.
        Unknown = "unknown",
    }
}

named! {
    /// The stages in the order in which they run; `Rollback` only where needed.
    Stage {
        Checkout = "checkout",
        Image = "image",
        Test = "test",
        Deploy = "deploy",
        Verify = "verify",
        SmokeTest = "smoke_test",
        Rollback = "rollback",
    }
}

impl Stage {
    /// The six stages that every build shows, begun or not.
    pub const LINE: [Self; 6] = [
        Self::Checkout,
        Self::Image,
        Self::Test,
        Self::Deploy,
        Self::Verify,
        Self::SmokeTest,
    ];

    /// The title on pages, in logs and in the Jenkinsfile.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Checkout => "Checkout Code",
            Self::Image => "Build Docker Image",
            Self::Test => "Test",
            Self::Deploy => "Deploy to Kubernetes",
            Self::Verify => "Verify Deployment",
            Self::SmokeTest => "Smoke Test",
            Self::Rollback => "Rollback",
        }
    }
}

named! {
    /// How far one stage of one build is.
    StageStatus {
        Running = "running",
        Passed = "passed",
        Failed = "failed",
        Errored = "errored",
        Canceled = "canceled",
    }
}

named! {
    /// What made a build.
    BuildKind {
        Push = "push",
        Manual = "manual",
        Rerun = "rerun",
        /// A person goes back to an earlier release.
        Undo = "undo",
        /// A person goes forward again.
        Redo = "redo",
    }
}

impl BuildKind {
    /// A release that served before is brought back: nothing is built.
    pub fn brings_back(self) -> bool {
        matches!(self, Self::Undo | Self::Redo)
    }
}

/// Why a build ended as it did: one sentence of a closed list, and what to do next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// Stable identifier, `snake_case`, for scripts: `tests_failed`, `image_build_failed`, `time_out`, …
    pub id: String,
    /// One sentence without a final dot, for the author of the push.
    pub sentence: String,
    /// The object it is about, such as `deployment/hello-axum` or `pipeline.yaml:4`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Cause {
    pub fn new(id: &str, sentence: impl Into<String>) -> Self {
        Self {
            id: id.to_owned(),
            sentence: sentence.into(),
            object: None,
            hint: None,
        }
    }

    #[must_use]
    pub fn object(mut self, object: impl Into<String>) -> Self {
        self.object = Some(object.into());
        self
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// A build as the store has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    pub id: i64,
    pub environment: String,
    pub repository: String,
    pub branch: String,
    /// The 40 hex digits of the commit to build.
    pub commit: String,
    /// First line of the commit's message; empty until it is known.
    pub title: String,
    /// Who pushed, or who asked for the build.
    pub by: String,
    pub kind: BuildKind,
    pub status: Status,
    pub outcome: Outcome,
    pub cause: Option<Cause>,
    /// The stage that runs now, or ran last.
    pub stage: Option<Stage>,
    /// How often it was claimed.
    pub attempt: i64,
    /// The number that grows with each new holder of the environment.
    pub fence: i64,
    /// `NAME@sha256:…` once it was pushed.
    pub image: Option<String>,
    pub release_id: Option<i64>,
    pub queued_at: Millis,
    pub started_at: Option<Millis>,
    pub finished_at: Option<Millis>,
    /// Somebody asked for its end; it ends at its next safe point.
    pub cancel_requested: bool,
    /// The newer build that takes its place.
    pub superseded_by: Option<i64>,
    /// The release that its rollback put back.
    #[serde(default)]
    pub restored_release: Option<i64>,
}

/// One stage of one build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StageRow {
    pub stage: Stage,
    pub title: &'static str,
    /// The build's attempt that began it last.
    pub attempt: i64,
    pub status: StageStatus,
    pub begun_at: Millis,
    pub done_at: Option<Millis>,
    /// What it handed to the next, as JSON text; only when passed.
    #[serde(skip)]
    pub baton: Option<String>,
}

/// What a delivery means to us: somebody moved a branch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Push {
    /// GitHub's numeric id of the repository: stays when it is renamed.
    pub repository_id: Option<i64>,
    /// `owner/name`.
    pub repository: String,
    pub branch: String,
    /// 40 hex digits, all zero where the branch is new.
    pub before: String,
    /// 40 hex digits.
    pub after: String,
    pub pusher: String,
    pub title: String,
    /// When GitHub took the push, where it says so.
    pub pushed_at: Option<Millis>,
}

/// The id of a commit: 40 lower-case hex digits (SHA-1 repositories, the only ones that GitHub serves).
pub fn is_commit_id(text: &str) -> bool {
    text.len() == 40
        && text
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The first twelve digits, as pages and logs show a commit.
pub fn short(commit: &str) -> &str {
    commit.get(..12).unwrap_or(commit)
}

/// Now, in milliseconds.
pub fn now() -> Millis {
    jiff::Timestamp::now().as_millisecond()
}

/// `95 ms`, `4.2 s`, `3 min 7 s`: for people.
pub fn human_duration(millis: Millis) -> String {
    match millis {
        ..1_000 => format!("{} ms", millis.max(0)),
        1_000..60_000 => format!("{}.{} s", millis / 1_000, millis % 1_000 / 100),
        60_000..3_600_000 => format!("{} min {} s", millis / 60_000, millis % 60_000 / 1_000),
        _ => format!(
            "{} h {} min",
            millis / 3_600_000,
            millis % 3_600_000 / 60_000
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_reads_back_as_itself() {
        for status in Status::ALL {
            assert_eq!(status.as_str().parse::<Status>().unwrap(), *status);
        }
        for stage in Stage::ALL {
            assert_eq!(stage.as_str().parse::<Stage>().unwrap(), *stage);
        }
    }

    #[test]
    fn durations_are_short_and_exact_enough() {
        assert_eq!(human_duration(95), "95 ms");
        assert_eq!(human_duration(4_250), "4.2 s");
        assert_eq!(human_duration(187_000), "3 min 7 s");
    }

    #[test]
    fn exit_codes_are_those_of_the_contract() {
        assert_eq!(Status::Passed.exit_code(Outcome::Live), 0);
        assert_eq!(Status::Superseded.exit_code(Outcome::Unchanged), 0);
        assert_eq!(Status::Failed.exit_code(Outcome::LeftFailed), 1);
        assert_eq!(Status::Failed.exit_code(Outcome::RolledBack), 3);
        assert_eq!(Status::Failed.exit_code(Outcome::RollbackFailed), 4);
        assert_eq!(Status::Errored.exit_code(Outcome::Unknown), 5);
        assert_eq!(Status::Canceled.exit_code(Outcome::Unchanged), 130);
    }
}
