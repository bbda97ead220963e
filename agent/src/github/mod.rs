//! The store's truth to GitHub: commit statuses by octocrab. The only folder that names it.
//!
//! The line: builds of which not everything was said → what is to be said (`word`) → one POST → what the answer means
//! (`judge`) → the store. Waiting, order and retries follow from the store alone, so a restart forgets none of them.
//! Never blocks a build, never shows the token. `deliveries.rs` asks for what GitHub could not deliver.

pub mod deliveries;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use http_body_util::{BodyExt, Limited};
use hyper::HeaderMap;
use octocrab::Octocrab;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio_util::sync::CancellationToken;

use crate::build_log::Masker;
use crate::builds::{Build, Millis, Outcome, Status, human_duration, is_commit_id, now};
use crate::config::{Config, Github, Secret, client_to};
use crate::fail_point;
use crate::store::{About, Siblings, Store, Untold, UntoldPage};

const API_URL: &str = "https://api.github.com";
/// GitHub refuses longer ones.
pub const DESCRIPTION_CHARS_MAX: usize = 140;
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
const ANSWER_BYTES_MAX: usize = 256 * 1024;
/// The store wakes us; this is for what it cannot know: that a wait is over.
const POLL_EVERY: Duration = Duration::from_secs(5);
/// A build's first rows come in a flurry.
const SETTLE: Duration = Duration::from_millis(200);
/// Builds looked at in one pass.
const OPEN_MAX: i64 = 500;
/// How often builds are looked at anew of which everything was said.
const REWIND_EVERY: Duration = Duration::from_mins(5);
const PENDING: &str = "pending";
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_mins(1);
/// Where a secondary limit names no time, GitHub asks for a minute.
const LIMIT_UNNAMED: Duration = Duration::from_mins(1);
/// No honest limit is longer.
const LIMIT_MAX: Duration = Duration::from_hours(24);
/// Tries of one status that all others wait for.
const ALONE_AFTER: i64 = 3;
/// After so many refusals of one status it is not tried again.
const REFUSALS_MAX: i64 = 5;
/// Nobody waits for the status of an older build: a token that comes late does not tell a year of them.
const AGE_MAX: Duration = Duration::from_hours(7 * 24);
/// GitHub's limit is 80 writes a minute: so many at once, then one a `PACE_EVERY`.
const PACE_BURST: u32 = 20;
const PACE_EVERY: Duration = Duration::from_secs(1);

/// What GitHub shall show of a build.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Word {
    /// `pending`, `success`, `failure` or `error`.
    state: &'static str,
    description: String,
}

/// What there is to do for a build.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Next {
    Say(Word),
    /// Nothing will ever be said of it.
    Silence,
    /// Nothing now.
    Wait,
}

/// What an answer means.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Sent {
    Told,
    /// Again at `at`; until then nobody of `whom` is tried.
    Later {
        whom: Whom,
        at: Millis,
        problem: String,
    },
    /// Never again.
    Refused(String),
}

/// Who waits with a build that could not be told. Stored as the first word of its problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whom {
    /// GitHub is away, limits us, or does not know the token.
    Everyone,
    /// The token has no right to this repository, or it is gone.
    Repository,
    /// The builds of this commit in this environment, so that they stay in order.
    Commit,
}

impl Whom {
    const ALL: [Self; 3] = [Self::Everyone, Self::Repository, Self::Commit];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Everyone => "everyone",
            Self::Repository => "repository",
            Self::Commit => "commit",
        }
    }

    fn of(problem: &str) -> Self {
        let word = problem.split_once(": ").map_or("", |(word, _)| word);
        Self::ALL
            .into_iter()
            .find(|whom| whom.as_str() == word)
            .unwrap_or(Self::Commit)
    }
}

/// Tells GitHub until `shutdown` fires. Without a token it says so once and ends. Of several agents one speaks for all.
pub async fn run(config: Arc<Config>, store: Store, holder: String, shutdown: CancellationToken) {
    let Some(token) = &config.github.token else {
        tracing::info!("no `github.token`: commits get no status");
        return;
    };
    let octocrab = match connect(&config.github, token) {
        Ok(octocrab) => octocrab,
        Err(error) => return tracing::error!("commits get no status: {error:#}"),
    };
    let mut changed = store.watch();
    let masker = Masker::new([token.expose()]);
    let mut teller = Teller {
        base_url: config.base_url(),
        store,
        holder,
        octocrab,
        masker,
        from: 0,
        rewound: Instant::now(),
        pace: Pace::new(),
    };
    loop {
        changed.mark_unchanged();
        let pass = tokio::select! {
            () = shutdown.cancelled() => return,
            pass = teller.pass() => pass,
        };
        let pause = pass.unwrap_or_else(|error| {
            tracing::warn!("cannot read what GitHub is to be told: {error:#}");
            POLL_EVERY
        });
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(pause.min(POLL_EVERY)) => {}
            woken = changed.changed() => {
                let settle = if woken.is_ok() { SETTLE } else { POLL_EVERY };
                tokio::time::sleep(settle).await;
            }
        }
    }
}

/// Whether the token can see a repository: what `landfall doctor` asks. The error says what to do.
pub async fn check(github: &Github, repository: &str) -> anyhow::Result<()> {
    let token = github.token.as_ref().context("there is no token")?;
    let octocrab = connect(github, token)?;
    let path = repository_path(repository)
        .with_context(|| format!("{repository:?} is not like owner/name"))?;
    let answer = octocrab._get(path).await.map_err(unreached)?;
    match answer.status().as_u16() {
        200 => Ok(()),
        401 => anyhow::bail!("GitHub does not know this token: it has expired or was revoked"),
        403 | 404 => anyhow::bail!("the token may not see {repository}"),
        code => anyhow::bail!("GitHub answers {code} for {repository}"),
    }
}

fn connect(github: &Github, token: &Secret) -> anyhow::Result<Octocrab> {
    let url = github.api_url.as_deref().unwrap_or(API_URL);
    let http = client_to(url).timeout(REQUEST_TIMEOUT).build()?;
    Octocrab::builder()
        .base_uri(url.trim_end_matches('/'))
        .with_context(|| format!("github.api_url {url:?} is not an address"))?
        .personal_token(token.expose().to_owned())
        .build_with_reqwest(http)
        .context("cannot make a client of GitHub")
}

/// `/repos/OWNER/NAME`; None where it is not of this form.
fn repository_path(repository: &str) -> Option<String> {
    let (owner, name) = repository.split_once('/')?;
    let is_one = |part: &str| !part.is_empty() && !part.contains('/');
    let encode = |part| utf8_percent_encode(part, NON_ALPHANUMERIC);
    (is_one(owner) && is_one(name)).then(|| format!("/repos/{}/{}", encode(owner), encode(name)))
}

struct Teller {
    base_url: String,
    store: Store,
    /// Who we are among the agents of the store.
    holder: String,
    octocrab: Octocrab,
    masker: Masker,
    /// Everything is said of builds with smaller numbers.
    from: i64,
    /// When `from` last began anew.
    rewound: Instant,
    pace: Pace,
}

/// Who waits now.
#[derive(Default)]
struct Waiting {
    /// When the first of these waits ends.
    first_end: Option<Millis>,
    everyone: bool,
    repositories: HashSet<String>,
    commits: HashSet<(String, String)>,
}

impl Waiting {
    fn add(&mut self, whom: Whom, about: About, until: Millis) {
        self.first_end = Some(self.first_end.map_or(until, |first| first.min(until)));
        match whom {
            Whom::Everyone => self.everyone = true,
            Whom::Repository => drop(self.repositories.insert(about.repository)),
            Whom::Commit => drop(self.commits.insert(about.commit)),
        }
    }

    fn holds(&self, about: &About) -> bool {
        self.everyone
            || self.repositories.contains(&about.repository)
            || self.commits.contains(&about.commit)
    }
}

impl Teller {
    /// Says what can be said now; how long until something more can.
    async fn pass(&mut self) -> anyhow::Result<Duration> {
        if !self.store.leads(&self.holder).await? {
            self.from = 0;
            return Ok(POLL_EVERY);
        }
        if !self.store.is_alone() && self.rewound.elapsed() >= REWIND_EVERY {
            // Another that led for a while may have said something late of a build that is behind us.
            (self.from, self.rewound) = (0, Instant::now());
        }
        let at = now();
        let mut waiting = Waiting::default();
        // A wait that no honest limit is as long as was counted by a wrong clock.
        for (build, until, problem) in self.store.waiting(at, at + millis(LIMIT_MAX)).await? {
            if let Ok(Some(build)) = self.store.build(build).await {
                waiting.add(Whom::of(&problem), About::of(&build), until);
            }
        }
        let mut page = self.page(self.from, &waiting).await?;
        self.from = page.first.unwrap_or(self.from);
        loop {
            let is_to_look_anew = self.say_of(&page.untold, &mut waiting).await?;
            match page.more {
                // Who waited when this pass began may wait no longer.
                Some(_) if is_to_look_anew => return Ok(Duration::ZERO),
                // Behind many that wait there may be some that do not.
                Some(from) if !waiting.everyone => page = self.page(from, &waiting).await?,
                _ => break,
            }
        }
        let pause = waiting.first_end.map_or(POLL_EVERY, |end| {
            Duration::from_millis(u64::try_from(end - now()).unwrap_or(0))
        });
        Ok(pause)
    }

    async fn page(&self, from: i64, waiting: &Waiting) -> anyhow::Result<UntoldPage> {
        let is_free = |about: &About| !waiting.holds(about);
        self.store.untold(from, OPEN_MAX, is_free).await
    }

    /// Whether it is time to look anew: something was said, or another speaks to GitHub now.
    async fn say_of(&mut self, open: &[Untold], waiting: &mut Waiting) -> anyhow::Result<bool> {
        let mut is_to_look_anew = false;
        for one in open {
            if waiting.holds(&About::of(&one.build)) {
                continue;
            }
            // A pass may take minutes: who leads now, and what the build has come to, is asked before each word.
            if !self.store.leads(&self.holder).await? {
                return Ok(true);
            }
            let Some(build) = self.store.build(one.build.id).await? else {
                continue;
            };
            let one = &Untold {
                build,
                ..one.clone()
            };
            let word = match self.next(one).await? {
                Next::Wait => continue,
                Next::Silence => {
                    self.store.told(one.build.id, "silent").await?;
                    continue;
                }
                Next::Say(word) => word,
            };
            is_to_look_anew = true;
            if word.state != PENDING {
                self.store.about_to_end(one.build.id).await?;
            }
            match self.say(one, &word).await {
                Sent::Told => self.store.told(one.build.id, word.state).await?,
                Sent::Refused(problem) => {
                    tracing::warn!(build = one.build.id, repository = %one.build.repository, "GitHub refuses a status for good: {problem}");
                    // Its end is told all the same: GitHub may not have known the commit yet.
                    let told = if word.state == PENDING {
                        PENDING
                    } else {
                        "silent"
                    };
                    self.store.told(one.build.id, told).await?;
                }
                Sent::Later { whom, at, problem } => {
                    let wait = human_duration(at - now());
                    tracing::warn!(build = one.build.id, repository = %one.build.repository, "GitHub was not told, next try in {wait}: {problem}");
                    let problem = format!("{}: {problem}", whom.as_str());
                    self.store.not_told(one.build.id, at, &problem).await?;
                    waiting.add(whom, About::of(&one.build), at);
                }
            }
        }
        Ok(is_to_look_anew)
    }

    async fn next(&self, one: &Untold) -> anyhow::Result<Next> {
        let siblings = self.store.siblings(&one.build).await?;
        Ok(next(&one.build, one.told.is_some(), siblings, now()))
    }

    async fn say(&mut self, one: &Untold, word: &Word) -> Sent {
        let build = &one.build;
        let Some(path) = repository_path(&build.repository) else {
            return Sent::Refused("the repository is not like owner/name".to_owned());
        };
        let status = serde_json::json!({
            "state": word.state,
            "target_url": format!("{}/builds/{}", self.base_url, build.id),
            "description": word.description,
            "context": format!("landfall/{}", build.environment),
        });
        self.pace.wait().await;
        let route = format!("{path}/statuses/{}", build.commit);
        let sent = async {
            let answer = self
                .octocrab
                ._post(route, Some(&status))
                .await
                .map_err(|error| format!("{:#}", unreached(error)))?;
            let (parts, body) = answer.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX)
                .collect()
                .await
                .map_err(|error| error.to_string())?;
            Ok((parts.status.as_u16(), parts.headers, body.to_bytes()))
        };
        let answer = tokio::time::timeout(REQUEST_TIMEOUT, sent)
            .await
            .unwrap_or_else(|_| Err(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs())));
        fail_point::at("github: told");
        match answer {
            Ok((code, headers, body)) => {
                let message = self.masker.mask_text(&message(&body));
                judge(code, &headers, &message, one.tries, now())
            }
            Err(problem) => later(
                Whom::Everyone,
                one.tries,
                now(),
                self.masker.mask_text(&problem),
            ),
        }
    }
}

/// What is to be said of a build. `pending` is said once, and never where GitHub shows a final state of the commit.
fn next(build: &Build, is_pending: bool, siblings: Siblings, at: Millis) -> Next {
    let age = at - build.finished_at.unwrap_or(at);
    // What GitHub shows as pending is brought to its end however old it is; another may have judged the commit since.
    let is_too_old = build.status.is_terminal() && age > millis(AGE_MAX);
    let is_nobodys = build.status.is_terminal() && !is_commit_id(&build.commit);
    if is_nobodys || (is_too_old && (!is_pending || siblings.shown > 0)) {
        return Next::Silence;
    }
    if is_too_old && siblings.finished > 0 {
        let description = "too old to be told: see its page".to_owned();
        return Next::Say(Word {
            state: "error",
            description,
        });
    }
    let (state, description) = match build.status {
        Status::Queued | Status::Running => {
            // A manual build learns its commit in checkout.
            let may_be_over = siblings.shown > 0 || siblings.attempted > 0;
            if is_pending || may_be_over || !is_commit_id(&build.commit) {
                return Next::Wait;
            }
            (PENDING, "in progress".to_owned())
        }
        Status::Passed => ("success", passed(build)),
        Status::Failed | Status::Canceled => ("failure", failed(build)),
        Status::Errored => ("error", failed(build)),
        Status::Superseded | Status::Skipped => {
            let was_judged = siblings.finished > 0;
            if siblings.live > 0 || siblings.shown > 0 || (was_judged && !is_pending) {
                return Next::Silence;
            }
            if siblings.coming > 0 {
                return Next::Wait;
            }
            // A judgement that was never shown, and may have been a bad one, does not turn green.
            let state = if was_judged { "error" } else { "success" };
            (state, format!("not built: {}", not_built(build)))
        }
    };
    let description = shorten(&description);
    Next::Say(Word { state, description })
}

fn passed(build: &Build) -> String {
    let took = build
        .finished_at
        .zip(build.started_at)
        .map_or(0, |(end, begin)| end - begin);
    let what = match build.outcome {
        Outcome::Unchanged => "nothing to change",
        _ => "live",
    };
    format!("{what}, after {}", human_duration(took))
}

fn failed(build: &Build) -> String {
    let why = match &build.cause {
        Some(cause) => cause.sentence.clone(),
        None => build.status.to_string(),
    };
    match build.outcome {
        Outcome::RolledBack => match build.restored_release {
            Some(release) => format!("rolled back to release {release}: {why}"),
            None => format!("rolled back: {why}"),
        },
        Outcome::RollbackFailed => format!("rollback failed: {why}"),
        _ => why,
    }
}

fn not_built(build: &Build) -> String {
    match (&build.cause, build.superseded_by) {
        (Some(cause), _) => cause.sentence.clone(),
        (None, Some(newer)) => format!("superseded by build #{newer}"),
        (None, None) => build.status.to_string(),
    }
}

/// One line of at most 140 characters, of those that GitHub takes: none beyond the basic plane.
fn shorten(text: &str) -> String {
    let mut chars = text.split_whitespace().collect::<Vec<_>>().join(" ");
    chars.retain(|c| !c.is_control());
    let mut plain = chars
        .chars()
        .map(|c| if c > '\u{ffff}' { '\u{fffd}' } else { c });
    let mut short: String = plain.by_ref().take(DESCRIPTION_CHARS_MAX).collect();
    if plain.next().is_some() {
        short.pop();
        short.push('…');
    }
    short
}

/// What GitHub says of a refusal, bounded.
fn message(body: &[u8]) -> String {
    let value: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let text = value
        .get("message")
        .and_then(serde_json::Value::as_str)
        .unwrap_or_default();
    let details = value
        .get("errors")
        .map(ToString::to_string)
        .unwrap_or_default();
    format!("{text} {details}")
        .trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(300)
        .collect()
}

fn judge(code: u16, headers: &HeaderMap, message: &str, tries: i64, at: Millis) -> Sent {
    let problem = format!("{code} {message}");
    let is_limit = code == 429
        || code == 403
            && (headers.contains_key("retry-after")
                || number(headers, "x-ratelimit-remaining") == Some(0)
                || message.to_lowercase().contains("rate limit"));
    match code {
        201 => Sent::Told,
        _ if is_limit => {
            let wait = limit(headers, at).max(backoff(tries));
            Sent::Later {
                whom: Whom::Everyone,
                at: at + millis(wait),
                problem,
            }
        }
        401 => later(Whom::Everyone, tries, at, problem),
        // GitHub is away; where one word alone is answered so again and again, the others need not wait for it.
        408 | 500.. if tries < ALONE_AFTER => later(Whom::Everyone, tries, at, problem),
        408 | 500.. => later(Whom::Repository, tries, at, problem),
        // Renamed, gone, or not the token's to write to: the operator can mend it.
        200 | 300..=399 | 403 | 404 | 410 | 451 => later(Whom::Repository, tries, at, problem),
        // The commit may not be everywhere at GitHub yet; then it is a refusal.
        _ if tries + 1 < REFUSALS_MAX => later(Whom::Commit, tries, at, problem),
        _ => Sent::Refused(problem),
    }
}

fn later(whom: Whom, tries: i64, at: Millis, problem: String) -> Sent {
    Sent::Later {
        whom,
        at: at + millis(backoff(tries)),
        problem,
    }
}

/// How long GitHub asks us to be silent.
fn limit(headers: &HeaderMap, at: Millis) -> Duration {
    let named = number(headers, "retry-after").or_else(|| {
        let is_used_up = number(headers, "x-ratelimit-remaining") == Some(0);
        let reset = number(headers, "x-ratelimit-reset").filter(|_| is_used_up)?;
        // A second more: both clocks are cut off to seconds.
        Some(reset.saturating_sub(u64::try_from(at / 1000).unwrap_or(0)) + 1)
    });
    named
        .map_or(LIMIT_UNNAMED, Duration::from_secs)
        .min(LIMIT_MAX)
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// Doubled with each try up to the limit; between the half and the whole of it, so that agents do not come in step.
fn backoff(tries: i64) -> Duration {
    let exponent = u32::try_from(tries.clamp(0, 16)).unwrap_or(0);
    let whole = BACKOFF_FIRST
        .saturating_mul(2u32.saturating_pow(exponent))
        .min(BACKOFF_MAX);
    let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), tries);
    let share = 500 + u32::try_from(random % 500).unwrap_or(0);
    whole * share / 1000
}

fn millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_millis()).unwrap_or(Millis::MAX)
}

fn unreached(error: octocrab::Error) -> anyhow::Error {
    let error = anyhow::Error::new(error);
    anyhow::anyhow!("cannot reach GitHub: {}", error.root_cause())
}

/// Tokens that come one a `PACE_EVERY`, at most `PACE_BURST` of them.
struct Pace {
    full_at: Instant,
}

impl Pace {
    fn new() -> Self {
        Self {
            full_at: Instant::now(),
        }
    }

    async fn wait(&mut self) {
        let at = Instant::now();
        let ahead = self.full_at.saturating_duration_since(at);
        let burst = PACE_EVERY * PACE_BURST;
        tokio::time::sleep(ahead.saturating_sub(burst)).await;
        self.full_at = self.full_at.max(Instant::now()) + PACE_EVERY;
    }
}

#[cfg(test)]
mod tests;
