//! Several agents on one PostgreSQL: each build is one agent's, and what a dead or frozen one leaves, another takes.

use std::collections::HashSet;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use landfall::build_log::LogLine;
use landfall::builds::{BuildKind, Cause, Outcome, Push, Stage, StageStatus, Status};
use landfall::config::Environment;
use landfall::release::{AppliedObject, Change, Evidence, Release};
use landfall::store::{Filter, Store};
use serde_json::Value;

use crate::landfall::{BUILD_LIMIT, Landfall, free_port, is_terminal};
use crate::postgres::Postgres;
use crate::support::eventually;

/// Takes long to be ready, so that there is time to do something to its agent.
const SLOW: &str = "sleep 8\nexec httpd -f -p 5000 -h /www\n";

/// A second agent beside the first, on a folder and a port of its own.
struct Second {
    agent: Child,
    port: u16,
}

impl Second {
    async fn start(landfall: &Landfall) -> Self {
        let port = free_port();
        let first = fs::read_to_string(landfall.path("agent.yaml")).unwrap();
        let listen = first
            .lines()
            .find(|line| line.starts_with("listen:"))
            .unwrap();
        let second = first
            .replace(listen, &format!("listen: 127.0.0.1:{port}"))
            .replace("data_dir: data\n", "data_dir: data-two\n");
        fs::write(landfall.path("agent-two.yaml"), second).unwrap();
        let log = fs::File::create(landfall.path("agent-two.log")).unwrap();
        let agent = landfall
            .command(&["serve", "--config", "agent-two.yaml"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let second = Self { agent, port };
        let ready = async || second.get("/readyz").await.map(drop);
        eventually("the second agent is ready", Duration::from_secs(20), ready).await;
        second
    }

    async fn get(&self, path: &str) -> Option<String> {
        let url = format!("http://127.0.0.1:{}{path}", self.port);
        let answer = reqwest::get(url).await.ok()?;
        answer.error_for_status().ok()?.text().await.ok()
    }

    async fn build(&self, id: i64) -> Option<Value> {
        serde_json::from_str(&self.get(&format!("/api/builds/{id}")).await?).ok()
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

fn signal(name: &str, pid: u32) {
    let sent = Command::new("kill").args([name, &pid.to_string()]).status();
    assert!(sent.unwrap().success());
}

async fn on_postgres(name: &str) -> (Postgres, Landfall) {
    let postgres = Postgres::start().await;
    let mut landfall = Landfall::start(name).await;
    let database = format!("database: \"{}\"\nenvironments:", postgres.url());
    landfall.restart("environments:", &database, &[]).await;
    (postgres, landfall)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p5_a_frozen_agent_is_taken_over_and_writes_nothing_when_it_wakes() {
    let (_postgres, mut landfall) = on_postgres("frozen").await;
    let second = Second::start(&landfall).await;
    let first_release = landfall.push(&[]).await;
    assert_eq!(landfall.end(first_release).await["outcome"], "live");

    let id = landfall.push(&[("start.sh", SLOW)]).await;
    // Either may have claimed it; the one that did is frozen.
    landfall.reach(id, "verify").await;
    let own_log = fs::read_to_string(landfall.path("agent.log")).unwrap();
    let is_ours = own_log.contains(&format!("build={id} environment"));
    let frozen = if is_ours {
        landfall.pid()
    } else {
        second.agent.id()
    };
    signal("-STOP", frozen);
    let begun = Instant::now();
    let build = async || match is_ours {
        true => second.build(id).await,
        false => Some(landfall.build(id).await),
    };
    let taken = async || build().await.filter(|build| build["attempt"] == 2);
    eventually(
        "another agent takes the build",
        Duration::from_secs(30),
        taken,
    )
    .await;
    println!("taken over after {:.1} s", begun.elapsed().as_secs_f64());
    let ended = async || build().await.filter(is_terminal);
    let ended = eventually("the build ends", BUILD_LIMIT, ended).await;
    assert_eq!(
        (&ended["status"], &ended["outcome"]),
        (&"passed".into(), &"live".into()),
        "{ended}"
    );

    let log_of_frozen = landfall.path(if is_ours {
        "agent.log"
    } else {
        "agent-two.log"
    });
    signal("-CONT", frozen);
    let refused = format!("build #{id} is no longer ours");
    let said = async || {
        fs::read_to_string(&log_of_frozen)
            .unwrap()
            .contains(&refused)
            .then_some(())
    };
    eventually(
        "the agent that wakes is refused",
        Duration::from_secs(60),
        said,
    )
    .await;
    assert_eq!(
        build().await.unwrap(),
        ended,
        "a terminal status never changes"
    );

    // Both go on.
    let next = landfall
        .push(&[("start.sh", "exec httpd -f -p 5000 -h /www\n")])
        .await;
    let build = landfall.end(next).await;
    assert_eq!(
        (&build["status"], &build["outcome"]),
        (&"passed".into(), &"live".into()),
        "{build}"
    );
    let log = landfall.log(next).await;
    assert!(
        !log.contains("applied again first"),
        "it left the environment unsettled:\n{log}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_of_a_build_is_live_on_the_other_agents_page() {
    let (_postgres, mut landfall) = on_postgres("seen").await;
    let id = landfall.push(&[("start.sh", SLOW)]).await;
    landfall.reach(id, "verify").await;
    let second = Second::start(&landfall).await;
    let url = format!("http://127.0.0.1:{}/api/builds/{id}/log/live", second.port);
    let mut live = reqwest::get(url).await.unwrap();
    let mut events = String::new();
    while let Some(bytes) = live.chunk().await.unwrap() {
        events.push_str(&String::from_utf8_lossy(&bytes));
    }
    let lines = landfall.log(id).await.lines().count();
    let sent = events
        .lines()
        .filter(|line| line.starts_with("id:"))
        .count();
    assert_eq!(sent, lines, "{events}");
    assert!(
        events.contains("event: end") || events.contains("event:end"),
        "{events}"
    );
    assert_eq!(landfall.end(id).await["status"], "passed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_crashes_is_waited_for() {
    let (mut postgres, mut landfall) = on_postgres("db-crash").await;
    let id = landfall.push(&[("start.sh", SLOW)]).await;
    landfall.reach(id, "verify").await;
    postgres.crash(Duration::from_secs(3)).await;
    let ended = async || {
        let answer = landfall.request(reqwest::Method::GET, &format!("/api/builds/{id}"));
        let build: Value = answer.send().await.ok()?.json().await.ok()?;
        (build["status"].is_string() && is_terminal(&build)).then_some(build)
    };
    let build = eventually("the build ends", BUILD_LIMIT, ended).await;
    assert_eq!(
        (&build["status"], &build["outcome"]),
        (&"passed".into(), &"live".into()),
        "{build}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sqlite_store_moves_to_postgresql_and_goes_on_there() {
    let postgres = Postgres::start().await;
    let mut landfall = Landfall::start("move").await;
    let first = landfall.push(&[]).await;
    assert_eq!(landfall.end(first).await["outcome"], "live");
    let shown = async |landfall: &Landfall| {
        let paths = ["/api/builds", "/api/environments/hello/releases"];
        let builds = landfall.get(paths[0]).await;
        let releases = landfall.get(paths[1]).await;
        (builds, releases, landfall.log(first).await)
    };
    let before = shown(&landfall).await;
    landfall.terminate();
    let (code, said) = landfall.run_command(&["db", "move"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("names no PostgreSQL"), "{said}");

    let config = fs::read_to_string(landfall.path("agent.yaml")).unwrap();
    let database = format!("database: \"{}\"\nenvironments:", postgres.url());
    let config = config.replace("environments:", &database);
    fs::write(landfall.path("agent.yaml"), config).unwrap();
    let (code, said) = landfall.run_command(&["db", "move"]);
    assert_eq!(code, Some(0), "{said}");
    landfall.run().await;
    assert_eq!(shown(&landfall).await, before);
    let next = landfall.push(&[("www/index.html", "Hello again\n")]).await;
    assert_eq!(next, first + 1);
    assert_eq!(landfall.end(next).await["outcome"], "live");

    landfall.terminate();
    let (code, said) = landfall.run_command(&["db", "move"]);
    assert!(
        code != Some(0) && said.contains("2 builds already"),
        "{said}"
    );
}

fn push(branch: &str) -> Push {
    Push {
        repository_id: None,
        repository: "acme/hello".to_owned(),
        branch: branch.to_owned(),
        before: String::new(),
        after: "a".to_owned(),
        pusher: String::new(),
        title: String::new(),
        pushed_at: None,
    }
}

/// CLAIM_BUILDS builds, default 400, of ten environments.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn eight_agents_run_each_build_once_and_one_at_a_time_in_an_environment() {
    const AGENTS: usize = 8;
    let postgres = Postgres::start().await;
    let builds = crate::soak::number("CLAIM_BUILDS", 400);
    let folder = tempfile::tempdir().unwrap();
    // All at once, on an empty database: each finds or makes the tables.
    let mut opening = tokio::task::JoinSet::new();
    for agent in 0..AGENTS {
        let (data, url) = (folder.path().join(agent.to_string()), postgres.url());
        opening.spawn(async move { Store::open(&data, Some(&url)).await.unwrap() });
    }
    let stores = opening.join_all().await;
    let names: Vec<String> = (0..10).map(|number| format!("e{number}")).collect();
    let environment = |name: &String| Environment::of_person(name, None, None, name.clone());
    let environments: Vec<_> = names.iter().map(environment).collect();
    stores[0].ensure_environments(&environments).await.unwrap();
    for number in 0..builds {
        // A branch each, so that none takes the place of another.
        let push = push(&format!("b{number}"));
        stores[0]
            .enqueue(&names[number % names.len()], &push, BuildKind::Manual)
            .await
            .unwrap();
    }
    let mut agents = tokio::task::JoinSet::new();
    for (number, store) in stores.iter().cloned().enumerate() {
        agents.spawn(async move {
            let (holder, mut ran, mut took) = (format!("{number}.x"), Vec::new(), Duration::ZERO);
            store.renew(&holder, false).await.unwrap();
            loop {
                let begun = Instant::now();
                let claimed = store.claim(&holder, false).await.unwrap();
                took = took.max(begun.elapsed());
                let Some(build) = claimed else {
                    let counts = store.count_by_status().await.unwrap();
                    if !counts.iter().any(|(status, _)| *status == Status::Queued) {
                        return ran;
                    }
                    continue;
                };
                let running = store.running().await.unwrap();
                let here = running
                    .iter()
                    .filter(|one| one.environment == build.environment);
                assert_eq!(here.count(), 1, "{}", build.environment);
                assert!(
                    store
                        .finish(&build, Status::Passed, Outcome::Live, None)
                        .await
                        .unwrap()
                );
                ran.push(build.id);
            }
        });
    }
    let ran: Vec<i64> = agents.join_all().await.into_iter().flatten().collect();
    let once: HashSet<i64> = ran.iter().copied().collect();
    assert_eq!((ran.len(), once.len()), (builds, builds));
    let all = stores[0]
        .builds(&Filter {
            limit: Some(200),
            ..Filter::default()
        })
        .await
        .unwrap();
    assert!(
        all.iter()
            .all(|build| build.attempt == 1 && build.status == Status::Passed)
    );
}

/// CLAIM_ROWS builds that have ended, default 20,000, and one that waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_is_quick_behind_many_builds_that_ended() {
    let postgres = Postgres::start().await;
    let rows = crate::soak::number("CLAIM_ROWS", 20_000);
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), Some(&postgres.url()))
        .await
        .unwrap();
    let names: Vec<String> = (0..10).map(|number| format!("e{number}")).collect();
    let environment = |name: &String| Environment::of_person(name, None, None, name.clone());
    let environments: Vec<_> = names.iter().map(environment).collect();
    store.ensure_environments(&environments).await.unwrap();
    store.renew("1.x", false).await.unwrap();
    let run_one = async |number: usize| {
        let name = &names[number % names.len()];
        let push = push(&format!("b{number}"));
        store.enqueue(name, &push, BuildKind::Manual).await.unwrap();
        let begun = Instant::now();
        let build = store.claim("1.x", false).await.unwrap().unwrap();
        let took = begun.elapsed().as_secs_f64();
        store
            .finish(&build, Status::Passed, Outcome::Live, None)
            .await
            .unwrap();
        took
    };
    run_one(0).await;
    postgres.sql(&format!(
        "INSERT INTO builds SELECT (jsonb_populate_record(b, jsonb_build_object('id', b.id + n, 'environment', 'e' || n % 10, \
         'commit_id', md5(n::text)))).* FROM builds b, generate_series(1, {rows}) n; \
         UPDATE counters SET value = (SELECT max(id) FROM builds) WHERE name = 'build'; ANALYZE"
    ));
    let mut took = Vec::new();
    for number in 0..100 {
        took.push(run_one(number).await);
    }
    let (median, p99) = (
        crate::soak::quantile(&mut took, 50),
        crate::soak::quantile(&mut took, 99),
    );
    crate::soak::keep(
        "claim_behind_ended_builds",
        &serde_json::json!({"rows": rows, "median_seconds": median, "p99_seconds": p99}),
    );
    // The goal is 5 ms: make soak shows whether it holds. Here it is only not to grow with the rows.
    assert!(median < Some(0.1), "the median is {median:?}");
}

/// Every write of a build's holder, by one that another has taken it over from: STALE_WRITES, default 40.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p5_the_store_refuses_every_write_of_a_holder_that_was_outdone() {
    let postgres = Postgres::start().await;
    for database in [None, Some(postgres.url())] {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), database.as_deref())
            .await
            .unwrap();
        let environment = Environment::of_person("e0", None, None, "e0".to_owned());
        store.ensure_environments(&[environment]).await.unwrap();
        store.renew("1.x", false).await.unwrap();
        store.renew("2.y", false).await.unwrap();
        store
            .enqueue("e0", &push("main"), BuildKind::Manual)
            .await
            .unwrap();
        let outdone = store.claim("1.x", false).await.unwrap().unwrap();
        let release: Release = serde_json::from_value(serde_json::json!({
            "environment": "e0", "build_id": outdone.id, "commit": "a", "image": "", "namespace": "e0", "objects": [], "smoke_tests": [],
            "verify": {"timeout_seconds": 1, "soak_seconds": 0}, "rollback": "automatic", "first_release": "leave", "set_hash": "",
        }))
        .unwrap();
        store.begin_stage(&outdone, Stage::Deploy).await.unwrap();
        let id = store.plan_release(&outdone, &release).await.unwrap();
        let release = Release { id, ..release };
        let holder = store.reclaim(&outdone, "2.y").await.unwrap().unwrap();
        let stands = async || {
            let build = store.build(outdone.id).await.unwrap().unwrap();
            let environment = (
                store.deployed("e0").await.unwrap(),
                store.is_unsettled("e0").await.unwrap(),
                store.adopted("e0").await.unwrap(),
                store.quarantined("e0", "a").await.unwrap(),
            );
            let release = (
                store.release(id).await.unwrap(),
                store.created("e0").await.unwrap(),
                store.touched(outdone.id).await.unwrap(),
                store.evidence(outdone.id).await.unwrap(),
                store.history("e0", 9).await.unwrap(),
            );
            format!(
                "{build:?} {:?} {environment:?} {release:?}",
                store.stages(outdone.id).await.unwrap()
            )
        };
        let before = stands().await;
        let object = AppliedObject {
            api_version: "v1".to_owned(),
            kind: "ConfigMap".to_owned(),
            namespace: "e0".to_owned(),
            name: "settings".to_owned(),
            uid: "u".to_owned(),
            generation: 1,
            change: Change::Created,
        };
        let evidence = Evidence {
            title: "t".to_owned(),
            body: "b".to_owned(),
        };
        let cause = Cause::new("agent", "late");
        let (mut writes, wanted) = (0, crate::soak::number("STALE_WRITES", 40));
        while writes < wanted {
            // Those that end with an error would go on with something; the others are told by what stands.
            let errors = [
                store.begin_stage(&outdone, Stage::Verify).await.is_err(),
                store
                    .keep_baton(&outdone, Stage::Deploy, "{}")
                    .await
                    .is_err(),
                store
                    .end_stage(&outdone, Stage::Deploy, StageStatus::Passed, Some("{}"))
                    .await
                    .is_err(),
                store.plan_release(&outdone, &release).await.is_err(),
                store.adopt(&outdone, &release).await.is_err(),
                store
                    .record_applied(&outdone, id, 0, &object)
                    .await
                    .is_err(),
                store.record_touched(&outdone, 0, &object).await.is_err(),
                store
                    .keep_evidence(&outdone, std::slice::from_ref(&evidence))
                    .await
                    .is_err(),
                store
                    .release_is_live(&outdone, &release, &[])
                    .await
                    .is_err(),
                store.set_unsettled(&outdone, true).await.is_err(),
                !store.begin_deploying(&outdone).await.unwrap(),
                !store
                    .finish(&outdone, Status::Passed, Outcome::Live, None)
                    .await
                    .unwrap(),
            ];
            assert!(errors.iter().all(|refused| *refused), "{errors:?}");
            store.describe(&outdone, "b", "late").await.unwrap();
            store.set_image(&outdone, "late").await.unwrap();
            store.set_cause(&outdone, &cause).await.unwrap();
            store.set_restored(&outdone, 9).await.unwrap();
            store
                .release_failed(&outdone, &release, "late", true)
                .await
                .unwrap();
            writes += errors.len() + 5;
            if database.is_some() {
                let line = LogLine {
                    stage: Stage::Deploy,
                    at: 1,
                    bytes: b"late".to_vec(),
                };
                let next = store.append_log(&outdone, 1, &[line]).await.unwrap();
                assert_eq!((next, store.log_end(outdone.id).await.unwrap().0), (1, 1));
                writes += 1;
            }
            assert_eq!(stands().await, before, "after {writes} writes");
        }
        let kind = database.map_or("sqlite", |_| "postgresql");
        crate::soak::keep(
            &format!("stale_writes_refused_by_{kind}"),
            &serde_json::json!({"writes": writes, "refused": writes}),
        );
        assert!(
            store
                .finish(&holder, Status::Passed, Outcome::Live, None)
                .await
                .unwrap()
        );
    }
}

#[tokio::test]
async fn an_agent_that_begins_anew_in_its_folder_leads_at_once_and_another_waits_for_its_lease() {
    let postgres = Postgres::start().await;
    let folder = tempfile::tempdir().unwrap();
    let url = postgres.url();
    let store = Store::open(folder.path(), Some(&url)).await.unwrap();
    store.renew("a.1", true).await.unwrap();
    store.renew("b.1", true).await.unwrap();
    assert!(store.leads("a.1").await.unwrap());
    // It was killed: the other does not know yet.
    assert!(!store.leads("b.1").await.unwrap());
    store.renew("a.2", true).await.unwrap();
    assert!(store.leads("b.1").await.unwrap(), "a.1 is known to be dead");
    assert!(!store.leads("a.2").await.unwrap(), "it joined last");
    store.leave("b.1").await.unwrap();
    assert!(store.leads("a.2").await.unwrap());
}
