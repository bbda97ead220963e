//! The queue's worker: claims builds, one at a time per environment and several environments at once, and tells a
//! running build when it is to end.
//!
//! Order and supersession are the store's (`store/intake.rs`, `store/builds.rs`); this file only wakes, claims and
//! watches. It wakes by notice and by the clock, so that a lost notice is only a delay.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::builds::{Build, Cause, Outcome, Status};
use crate::runner::{self, Agent};
use crate::store::{LEASE, RENEW_EVERY};

/// After a word of a change, for others to come.
const SETTLE: Duration = Duration::from_millis(10);
const POLL_EVERY: Duration = Duration::from_secs(1);
/// An agent whose last word is as old as this stops what it runs: another may begin to take it over.
const SILENCE_MAX: Duration = Duration::from_secs(LEASE.as_secs() * 2 / 3);
/// A store that does not answer must not keep the queue from hearing that the agent stops, or that it is silent.
const TURN_MAX: Duration = Duration::from_secs(10);
/// Between an end that could not be written and the next try.
const RESUME_PAUSE: Duration = Duration::from_secs(5);
/// How long the builds may take to reach a place from which the next agent can go on.
const STOP_LIMIT: Duration = Duration::from_secs(25);

/// Runs builds until `shutdown` fires; what is running then is left to be resumed.
pub async fn run(agent: Arc<Agent>, shutdown: CancellationToken) {
    let mut working = Working {
        agent,
        builds: HashMap::new(),
        resting: HashMap::new(),
        renewed: None,
        tasks: JoinSet::new(),
        has_room: true,
    };
    let mut changes = working.agent.store.watch();
    while !shutdown.is_cancelled() {
        let turn = tokio::select! {
            () = shutdown.cancelled() => break,
            // What is claimed and not begun is ours all the same, and resumed.
            turn = tokio::time::timeout(TURN_MAX, working.turn()) => turn,
        };
        let turn = turn.unwrap_or_else(|_| Err(anyhow::anyhow!("the store does not answer")));
        if let Err(error) = turn {
            tracing::error!(error = format!("{error:#}"), "the queue cannot work");
        }
        working.stop_if_silent();
        tokio::select! {
            () = shutdown.cancelled() => {}
            // Deliveries come in hundreds, each with a word.
            _ = changes.changed() => tokio::time::sleep(SETTLE).await,
            Some(ended) = working.tasks.join_next() => working.ended(ended),
            () = tokio::time::sleep(POLL_EVERY) => {}
        }
    }
    working.stop().await;
}

struct Working {
    agent: Arc<Agent>,
    builds: HashMap<i64, CancellationToken>,
    /// When our task of a build ended; where its row still says running, it is tried again after a pause.
    resting: HashMap<i64, Instant>,
    /// When the store heard last that we are alive.
    renewed: Option<Instant>,
    tasks: JoinSet<i64>,
    has_room: bool,
}

impl Working {
    /// Says that we are alive. Who cannot say so works no longer: its builds are another agent's before long.
    async fn renew(&mut self) -> anyhow::Result<()> {
        if self.renewed.is_none_or(|at| at.elapsed() >= RENEW_EVERY) {
            let (begun, agent) = (Instant::now(), &self.agent);
            let tells_github = agent.config.github.token.is_some();
            let renewed = agent.store.renew(&agent.holder, tells_github);
            tokio::time::timeout(RENEW_EVERY, renewed).await??;
            self.renewed = Some(begun);
        }
        Ok(())
    }

    fn stop_if_silent(&self) {
        let is_silent = !self.agent.store.is_alone()
            && self.renewed.is_none_or(|at| at.elapsed() > SILENCE_MAX);
        if is_silent && !self.builds.is_empty() {
            tracing::error!(
                "the store has not heard of us in time: builds are left to another agent"
            );
            for lost in self.builds.values() {
                lost.cancel();
            }
        }
    }

    /// Builds that no task of ours runs: their agent died, or could not write how they ended.
    async fn resume(&mut self) -> anyhow::Result<()> {
        for build in self.agent.store.abandoned(&self.agent.holder).await? {
            // What may stand half applied goes on at once, however much there is to do.
            let is_full = self.builds.len() >= self.agent.config.builds_at_once;
            if self.builds.contains_key(&build.id)
                || is_full && build.release_id.is_none()
                || self
                    .resting
                    .get(&build.id)
                    .is_some_and(|since| since.elapsed() < RESUME_PAUSE)
            {
                continue;
            }
            if let Some(build) = self.agent.store.reclaim(&build, &self.agent.holder).await? {
                tracing::info!(build = build.id, attempt = build.attempt, "build resumed");
                self.start(build);
            }
        }
        Ok(())
    }

    async fn turn(&mut self) -> anyhow::Result<()> {
        self.renew().await?;
        self.resume().await?;
        for (id, token) in &self.builds {
            let Some(build) = self.agent.store.build(*id).await? else {
                continue;
            };
            if build.cancel_requested || build.superseded_by.is_some() {
                token.cancel();
            }
        }
        // Without room nothing is built; a release that served before is brought back all the same.
        let has_room = self.has_room();
        let at_once = self.agent.config.builds_at_once;
        loop {
            let only_back = !has_room || self.builds.len() >= at_once;
            let (store, holder) = (&self.agent.store, &self.agent.holder);
            let Some(build) = store.claim(holder, only_back).await? else {
                return Ok(());
            };
            tracing::info!(
                build = build.id,
                environment = build.environment,
                commit = build.commit,
                "build claimed"
            );
            self.start(build);
        }
    }

    /// Whether the disk has room for another build; said once each time that this changes.
    fn has_room(&mut self) -> bool {
        let config = &self.agent.config;
        let free = config.free_bytes();
        let has_room = free >= config.min_free_bytes;
        if has_room != self.has_room {
            let (free_mib, path) = (free >> 20, config.data_dir.display());
            match has_room {
                true => tracing::info!(free_mib, "{path} has room again: builds go on"),
                false => tracing::error!(
                    free_mib,
                    min_free_mib = config.min_free_bytes >> 20,
                    "no build begins: {path} is nearly full (`min_free_bytes`)"
                ),
            }
            self.has_room = has_room;
        }
        has_room
    }

    fn start(&mut self, build: Build) {
        let (agent, token, id) = (Arc::clone(&self.agent), CancellationToken::new(), build.id);
        self.builds.insert(id, token.clone());
        self.tasks.spawn(async move {
            // On a thread of its own: a panic ends this build and nothing else, and a stage that computes for long holds
            // up no page.
            let running = tokio::task::spawn_blocking({
                let (agent, build) = (Arc::clone(&agent), build.clone());
                move || Handle::current().block_on(Box::pin(runner::run(&agent, build, token)))
            });
            if running.await.is_err() {
                let cause = Cause::new(
                    "agent_panicked",
                    "Landfall itself failed while it ran this build",
                )
                .hint("please report it, with the agent's own log");
                let known = agent.store.build(id).await.ok().flatten();
                let outcome = match known.is_none_or(|build| build.release_id.is_some()) {
                    true => Outcome::Unknown,
                    false => Outcome::Unchanged,
                };
                let ended = async {
                    let store = &agent.store;
                    if outcome == Outcome::Unknown {
                        store.set_unsettled(&build, true).await?;
                    }
                    store
                        .finish(&build, Status::Errored, outcome, Some(&cause))
                        .await
                };
                if let Err(error) = ended.await {
                    tracing::error!(
                        build = id,
                        error = format!("{error:#}"),
                        "cannot end a build"
                    );
                }
            }
            id
        });
    }

    fn ended(&mut self, ended: Result<i64, tokio::task::JoinError>) {
        match ended {
            Ok(id) => {
                self.builds.remove(&id);
                self.resting
                    .retain(|_, since| since.elapsed() < RESUME_PAUSE);
                self.resting.insert(id, Instant::now());
            }
            Err(error) => tracing::error!(%error, "a build's task ended badly"),
        }
    }

    /// The agent stops: each build leaves its stage, and the next agent goes on with it.
    async fn stop(&mut self) {
        self.agent.stopping.cancel();
        for token in self.builds.values() {
            token.cancel();
        }
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(STOP_LIMIT, all).await.is_err() {
            tracing::warn!(
                "builds did not reach a safe place in time; the next start resumes them"
            );
        }
        if let Err(error) = self.agent.store.leave(&self.agent.holder).await {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot tell the store that we leave"
            );
        }
    }
}
