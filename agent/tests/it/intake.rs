//! The way in, without builds: what is answered with 202 is on disk, whatever happens to the agent.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::landfall::{ZERO, all_builds, free_port, push_payload, secret, try_deliver};
use crate::soak::{keep, number};
use crate::support::eventually;

/// Of an agent whose one environment leads nowhere: only the way in is of interest.
pub fn agent_yaml(port: u16) -> String {
    format!(
        "listen: 127.0.0.1:{port}\ndata_dir: data\nreconcile_seconds: 0\nenvironments:\n  - name: hello\n    repository: acme/hello\n    \
         branch: main\n    clone_url: http://127.0.0.1:1/x.git\n    webhook_secrets: [{}]\n    namespace: hello\n    image_prefix: localhost:1/x\n",
        secret()
    )
}

const ANSWER: &str = "HTTP/1.1 202";

struct Agent {
    folder: tempfile::TempDir,
    port: u16,
    process: Child,
}

impl Agent {
    /// `before` are words of the command line before ours.
    async fn start(before: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        fs::write(folder.path().join("agent.yaml"), agent_yaml(port)).unwrap();
        let process = run(folder.path(), before);
        let agent = Self {
            folder,
            port,
            process,
        };
        agent.ready().await;
        agent
    }

    fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    async fn ready(&self) {
        let asked = async || reqwest::get(self.url("/readyz")).await.ok().map(drop);
        eventually("the agent is ready", Duration::from_secs(20), asked).await;
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Who is traced outlives the tracer.
        let pid = self.process.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        for child in children.unwrap_or_default().split_whitespace() {
            let _ = Command::new("kill").args(["-9", child]).status();
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn run(folder: &Path, before: &[&str]) -> Child {
    // Figures are of a release build, where there is one.
    let exe = std::env::var("LANDFALL_TEST_EXE");
    let exe = exe.as_deref().unwrap_or(env!("CARGO_BIN_EXE_landfall"));
    let words = [before, &[exe, "serve"]].concat();
    let log = crate::support::log_file(&folder.join("log"));
    Command::new(words[0])
        .args(&words[1..])
        .current_dir(folder)
        .env("RUST_LOG", "warn")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}

async fn deliver(http: &reqwest::Client, url: &str, after: &str) -> Option<(u16, Value)> {
    let payload = push_payload("acme/hello", "refs/heads/main", ZERO, after);
    try_deliver(http, url, &payload).await
}

#[tokio::test]
async fn p1_the_answer_comes_after_the_sync() {
    let calls = ["strace", "-f", "-qq", "-s", "16", "-o", "calls"];
    let traced = ["-e", "trace=fsync,fdatasync,write,writev,sendto"];
    let agent = Agent::start(&[&calls[..], &traced[..]].concat()).await;
    let http = reqwest::Client::new();
    let url = agent.url("/webhook");
    let read = || fs::read_to_string(agent.folder.path().join("calls")).unwrap();
    let is_sync = |line: &str| line.contains("fsync(") || line.contains("fdatasync(");
    let after = "1".repeat(40);
    let before = read().lines().count();
    let (status, answer) = deliver(&http, &url, &after).await.unwrap();
    assert_eq!(status, 202, "{answer}");
    let traced = async || Some(read()).filter(|calls| calls.contains(ANSWER));
    let calls = eventually("the answer is traced", Duration::from_secs(10), traced).await;
    let new: Vec<&str> = calls.lines().skip(before).collect();
    let at = new.iter().position(|line| line.contains(ANSWER)).unwrap();
    assert!(new[..at].iter().any(|line| is_sync(line)), "{new:#?}");
}

/// DELIVERY_SECONDS of signed deliveries on 50 connections, as many as are answered or DELIVERY_RATE a second, and a kill every
/// three seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p1_no_answered_delivery_is_lost_under_kills() {
    let mut agent = Agent::start(&[]).await;
    let (url, end) = (agent.url("/webhook"), Arc::new(AtomicBool::new(false)));
    let accepted = Arc::new(Mutex::new(HashMap::<i64, String>::new()));
    let took = Arc::new(Mutex::new(Vec::new()));
    let mut senders = tokio::task::JoinSet::new();
    let every = Duration::from_secs_f64(50.0 / number("DELIVERY_RATE", 1_000_000) as f64);
    for connection in 1..=50_u32 {
        let (url, end, accepted, took) = (url.clone(), end.clone(), accepted.clone(), took.clone());
        senders.spawn(async move {
            let http = reqwest::Client::builder().no_proxy().build().unwrap();
            let mut number = 0_u32;
            let mut turn = tokio::time::interval(every);
            while !end.load(Ordering::Relaxed) {
                turn.tick().await;
                let after = format!("{connection:08x}{number:032x}");
                let begun = Instant::now();
                match deliver(&http, &url, &after).await {
                    Some((202, answer)) => {
                        took.lock()
                            .unwrap()
                            .push(begun.elapsed().as_secs_f64() * 1000.0);
                        let build = answer["builds"][0]["build"].as_i64().unwrap();
                        let twice = accepted.lock().unwrap().insert(build, after.clone());
                        assert!(
                            twice.is_none_or(|other| other == after),
                            "#{build} was answered to two pushes"
                        );
                        number += 1;
                    }
                    // The same again: it may have been stored, and is a repetition then.
                    Some((503, _)) | None => tokio::time::sleep(Duration::from_millis(5)).await,
                    Some(other) => panic!("{other:?}"),
                }
            }
        });
    }
    let seconds = number("DELIVERY_SECONDS", 12);
    let (begun, mut kills, mut slowest) = (Instant::now(), 0, Duration::ZERO);
    while begun.elapsed().as_secs() < seconds as u64 {
        tokio::time::sleep(Duration::from_secs(3)).await;
        agent.process.kill().unwrap();
        agent.process.wait().unwrap();
        kills += 1;
        let restarted = Instant::now();
        agent.process = run(agent.folder.path(), &[]);
        agent.ready().await;
        slowest = slowest.max(restarted.elapsed());
    }
    end.store(true, Ordering::Relaxed);
    while senders.join_next().await.is_some_and(|sender| {
        sender.unwrap();
        true
    }) {}
    let lasted = begun.elapsed().as_secs_f64();

    let stored = all_builds(&agent.url("")).await.into_iter().map(|build| {
        let commit = build["commit"].as_str().unwrap().to_owned();
        (build["id"].as_i64().unwrap(), commit)
    });
    let stored: HashMap<i64, String> = stored.collect();
    let accepted = accepted.lock().unwrap();
    let lost: Vec<_> = accepted
        .iter()
        .filter(|(build, after)| stored.get(build) != Some(after))
        .collect();
    assert!(
        lost.is_empty(),
        "{} of {} are lost: {lost:?}",
        lost.len(),
        accepted.len()
    );
    let mut commits: Vec<&String> = stored.values().collect();
    commits.sort();
    let of_all = commits.len();
    commits.dedup();
    // Stored, killed before the answer, and sent again behind others: such a push is stored anew, to be skipped in checkout
    // unless it is the head. At most what was on its way at each kill.
    let again = of_all - commits.len();
    assert!(again <= kills * 50, "{again} of {of_all} were stored again");
    let mut took = std::mem::take(&mut *took.lock().unwrap());
    took.sort_by(f64::total_cmp);
    let quantile = |percent: usize| took.get(took.len() * percent / 100).map(|ms| ms.round());
    keep(
        "deliveries_under_kills",
        &json!({"per_second": (accepted.len() as f64 / lasted).round(), "seconds": lasted.round(), "answered": accepted.len(), "kills": kills, "lost": 0, "stored_again": again,
        "p50_ms": quantile(50), "p99_ms": quantile(99), "slowest_start_ms": u64::try_from(slowest.as_millis()).unwrap()}),
    );
    assert!(
        accepted.len() > 100,
        "hardly anything was answered: {}",
        accepted.len()
    );
}
