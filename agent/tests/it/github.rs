//! What GitHub is shown of builds, by the real loop and a GitHub that keeps state.

use std::sync::Arc;
use std::time::Duration;

use landfall::builds::{Build, BuildKind, Cause, Outcome, Push, Status};
use landfall::config::Config;
use landfall::github;
use landfall::store::Store;
use tokio_util::sync::CancellationToken;

use crate::fake_github::{FakeGithub, Mood, TOKEN};
use crate::support::eventually;

const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const B: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";
const HELLO: &str = "landfall/hello";
const LIMIT: Duration = Duration::from_secs(30);

/// A store with environments, and the loop over it.
struct Agent {
    folder: tempfile::TempDir,
    store: Store,
    github: FakeGithub,
    running: CancellationToken,
}

impl Agent {
    async fn new(github: FakeGithub) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("data"), None)
            .await
            .unwrap();
        let mut agent = Self {
            folder,
            store,
            github,
            running: CancellationToken::new(),
        };
        let config = agent.config();
        agent
            .store
            .ensure_environments(&config.environments)
            .await
            .unwrap();
        agent.start();
        agent
    }

    fn config(&self) -> Config {
        let one = |name: &str, repository: &str| {
            format!(
                "  - name: {name}\n    repository: {repository}\n    branch: main\n    clone_url: https://github.com/x/y\n    \
                 webhook_secrets: [0123456789abcdef0123456789abcdef]\n    namespace: {name}\n    image_prefix: localhost:5001\n"
            )
        };
        let text = format!(
            "public_url: https://ci.example.org/\ngithub:\n  api_url: {}/\n  token: {TOKEN}\nenvironments:\n{}{}",
            self.github.url(),
            one("hello", "acme/hello"),
            one("other", "acme/other")
        );
        let path = self.folder.path().join("agent.yaml");
        std::fs::write(&path, text).unwrap();
        Config::load_with(&path, &|_| None).unwrap()
    }

    fn start(&mut self) {
        self.running = CancellationToken::new();
        let config = Arc::new(self.config());
        tokio::spawn(github::run(
            config,
            self.store.clone(),
            "me.1".to_owned(),
            self.running.clone(),
        ));
    }

    async fn queue(&self, environment: &str, branch: &str, commit: &str) -> i64 {
        let push = Push {
            repository_id: None,
            repository: format!("acme/{environment}"),
            branch: branch.to_owned(),
            before: "0".repeat(40),
            after: commit.to_owned(),
            pusher: "ann".to_owned(),
            title: String::new(),
            pushed_at: None,
        };
        let kind = BuildKind::Push;
        self.store.enqueue(environment, &push, kind).await.unwrap()
    }

    async fn claim(&self) -> Build {
        self.store.claim("test", false).await.unwrap().unwrap()
    }

    async fn end(&self, build: &Build, status: Status, sentence: &str) {
        let cause = Cause::new("tests_failed", sentence);
        let ended = self
            .store
            .finish(build, status, Outcome::Unchanged, Some(&cause));
        assert!(ended.await.unwrap());
    }

    async fn states(&self, commit: &str, context: &str, wanted: &[&str]) {
        let what = format!("{context} of {commit} shows {wanted:?}");
        eventually(&what, LIMIT, async || {
            (self.github.states(commit, context) == wanted).then_some(())
        })
        .await;
    }

    async fn told(&self, id: i64) -> bool {
        let page = self.store.untold(0, 1000, |_| true).await.unwrap();
        page.untold.iter().all(|one| one.build.id != id)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.running.cancel();
    }
}

#[tokio::test]
async fn a_commit_shows_pending_and_then_how_it_ended_with_a_link() {
    let agent = Agent::new(FakeGithub::start().await).await;
    let id = agent.queue("hello", "main", A).await;
    agent.states(A, HELLO, &["pending"]).await;
    let build = agent.claim().await;
    agent
        .end(&build, Status::Failed, &"Prüfung zerbrach 🚀 ".repeat(20))
        .await;
    agent.states(A, HELLO, &["pending", "failure"]).await;
    let shown = agent.github.shown(A, HELLO).pop().unwrap();
    assert_eq!(
        shown.target_url,
        format!("https://ci.example.org/builds/{id}")
    );
    assert_eq!(shown.description.chars().count(), 140);
    assert!(
        shown
            .description
            .starts_with("Prüfung zerbrach \u{fffd} Prüfung")
    );
}

#[tokio::test]
async fn everything_is_told_in_order_after_an_outage_and_a_restart() {
    let mut agent = Agent::new(FakeGithub::start().await).await;
    agent.github.be(Mood::Down);
    agent.queue("hello", "main", A).await;
    let first = agent.claim().await;
    agent.end(&first, Status::Failed, "first").await;
    agent.queue("hello", "main", A).await;
    let second = agent.claim().await;
    agent.end(&second, Status::Passed, "second").await;
    agent.queue("other", "main", B).await;
    eventually("GitHub was asked in vain", LIMIT, async || {
        (agent.github.requests().len() >= 2).then_some(())
    })
    .await;
    agent.running.cancel();
    agent.start();
    agent.github.be(Mood::Well);
    agent.states(A, HELLO, &["failure", "success"]).await;
    agent.states(B, "landfall/other", &["pending"]).await;
}

#[tokio::test]
async fn a_limit_is_kept_by_everyone_and_over_a_restart() {
    let mut agent = Agent::new(FakeGithub::start().await).await;
    agent.github.be(Mood::Limited(3));
    agent.queue("hello", "main", A).await;
    eventually("GitHub was asked", LIMIT, async || {
        (!agent.github.requests().is_empty()).then_some(())
    })
    .await;
    agent.github.be(Mood::Well);
    agent.queue("other", "main", B).await;
    agent.running.cancel();
    agent.start();
    agent.states(A, HELLO, &["pending"]).await;
    agent.states(B, "landfall/other", &["pending"]).await;
    let requests = agent.github.requests();
    let silence = requests[1].0 - requests[0].0;
    assert!(silence >= Duration::from_secs(3), "{silence:?}");
    assert!(
        requests[1..].iter().all(|(_, code)| *code == 201),
        "{requests:?}"
    );
}

#[tokio::test]
async fn a_commit_never_returns_to_pending_nor_turns_green_by_being_skipped() {
    let agent = Agent::new(FakeGithub::start().await).await;
    agent.queue("hello", "main", A).await;
    agent.states(A, HELLO, &["pending"]).await;
    let build = agent.claim().await;
    agent.end(&build, Status::Failed, "red").await;
    agent.states(A, HELLO, &["pending", "failure"]).await;
    let again = agent.queue("hello", "main", A).await;
    let build = agent.claim().await;
    agent.end(&build, Status::Skipped, "pinned").await;
    eventually("the skipped one is settled", LIMIT, async || {
        agent.told(again).await.then_some(())
    })
    .await;
    let third = agent.queue("hello", "main", A).await;
    let build = agent.claim().await;
    agent.end(&build, Status::Passed, "").await;
    agent
        .states(A, HELLO, &["pending", "failure", "success"])
        .await;
    let shown = agent.github.shown(A, HELLO).pop().unwrap();
    assert!(shown.target_url.ends_with(&format!("/{third}")));
}

#[tokio::test]
async fn a_superseded_commit_says_that_it_was_not_built() {
    let agent = Agent::new(FakeGithub::start().await).await;
    agent.queue("hello", "main", A).await;
    agent.states(A, HELLO, &["pending"]).await;
    let newer = agent.queue("hello", "main", B).await;
    agent.states(A, HELLO, &["pending", "success"]).await;
    let shown = agent.github.shown(A, HELLO).pop().unwrap();
    assert_eq!(
        shown.description,
        format!("not built: superseded by build #{newer}")
    );
    agent.states(B, HELLO, &["pending"]).await;
}

#[tokio::test]
async fn a_repository_that_is_gone_does_not_stop_the_others() {
    let agent = Agent::new(FakeGithub::start().await).await;
    agent.github.remove("acme/hello");
    agent.queue("hello", "main", A).await;
    agent.queue("other", "main", B).await;
    agent.states(B, "landfall/other", &["pending"]).await;
    assert!(agent.github.states(A, HELLO).is_empty());
    // Nor does it with more builds than are looked at together.
    for number in 0..600 {
        agent
            .queue("hello", "main", &format!("{number:040x}"))
            .await;
    }
    agent.queue("other", "main", A).await;
    agent.states(A, "landfall/other", &["pending"]).await;
}

#[tokio::test]
async fn a_status_that_github_refuses_is_given_up_and_a_token_is_waited_for() {
    let agent = Agent::new(FakeGithub::start().await).await;
    agent.github.be(Mood::UnknownToken);
    agent.queue("hello", "main", A).await;
    eventually("the token was refused", LIMIT, async || {
        (!agent.github.requests().is_empty()).then_some(())
    })
    .await;
    agent.github.be(Mood::Well);
    agent.states(A, HELLO, &["pending"]).await;
    agent.github.be(Mood::Unprocessable);
    let build = agent.claim().await;
    agent.end(&build, Status::Errored, "away").await;
    eventually("it is given up", Duration::from_secs(60), async || {
        agent.told(build.id).await.then_some(())
    })
    .await;
    let refused = agent.github.requests();
    let refused = refused.iter().filter(|(_, code)| *code == 422).count();
    assert_eq!(refused, 5);
}

#[tokio::test]
async fn a_manual_build_is_shown_once_its_commit_is_known() {
    let agent = Agent::new(FakeGithub::start().await).await;
    agent.queue("hello", "main", "").await;
    let build = agent.claim().await;
    agent.store.describe(&build, A, "title").await.unwrap();
    agent.states(A, HELLO, &["pending"]).await;
    assert_eq!(agent.github.requests().len(), 1);
}

#[tokio::test]
async fn doctor_learns_what_a_token_may_see() {
    let agent = Agent::new(FakeGithub::start().await).await;
    let config = agent.config();
    github::check(&config.github, "acme/hello").await.unwrap();
    agent.github.remove("acme/other");
    let error = github::check(&config.github, "acme/other").await;
    assert!(error.unwrap_err().to_string().contains("may not see"));
}

#[tokio::test]
async fn a_delivery_that_failed_is_asked_for_again() {
    let of_public_url = "https://ci.example.org/webhook";
    let by_a_relay = "https://relay.example.org/of/ci";
    for (url, named) in [(of_public_url, None), (by_a_relay, Some(by_a_relay))] {
        let agent = Agent::new(FakeGithub::start().await).await;
        agent.github.has_sent(url, "arrived", 202);
        agent.github.has_sent(url, "failed", 502);
        let mut config = agent.config();
        config.github.webhook_url = named.map(str::to_owned);
        let (store, running) = (agent.store.clone(), agent.running.clone());
        tokio::spawn(github::deliveries::run(
            Arc::new(config),
            store,
            "me.1".to_owned(),
            running,
        ));
        let arrived = async || {
            let sent = agent.github.sent();
            (sent.len() > 2).then_some(sent)
        };
        let sent = eventually("it is sent again", LIMIT, arrived).await;
        assert_eq!(sent.last().unwrap(), &("failed".to_owned(), 202));
    }
}
