//! People who use the app while it is released, well and badly: a steady load, each request on a new connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::landfall::Landfall;
use crate::soak::{keep, number, quantile};
use crate::support::kubectl;

const PER_SECOND: u64 = 200;
/// Of each step of a request. A first packet that found the server's queue full is sent again after 1, 3, 7 and 15 s: a machine
/// that stands still makes a request late, not lost.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// Of the node, for this test alone; the demo's and the sample's is another.
const NODE_PORT: u16 = 30090;

/// Asks until it is told to stop; how many requests were sent, and why some were not answered well.
struct Load {
    stop: Arc<AtomicBool>,
    task: JoinHandle<(u64, Vec<String>)>,
}

impl Load {
    fn start(address: String) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let task = tokio::spawn({
            let stop = Arc::clone(&stop);
            async move {
                let (mut asked, mut requests) = (0, tokio::task::JoinSet::new());
                let mut failed = Vec::new();
                let mut tick =
                    interval(Duration::from_secs(1) / u32::try_from(PER_SECOND).unwrap());
                // What could not be sent while this machine stood still is not sent in one burst afterwards.
                tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
                let began = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    tick.tick().await;
                    asked += 1;
                    let address = address.clone();
                    let at = began.elapsed();
                    requests.spawn(async move {
                        let answer = ask(&address).await;
                        answer.map_err(|why| format!("after {:.1} s: {why}", at.as_secs_f64()))
                    });
                    while let Some(answered) = requests.try_join_next() {
                        failed.extend(answered.unwrap().err());
                    }
                }
                failed.extend(
                    requests
                        .join_all()
                        .await
                        .into_iter()
                        .filter_map(Result::err),
                );
                (asked, failed)
            }
        });
        Self { stop, task }
    }

    async fn stop(self) -> (u64, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

async fn ask(address: &str) -> Result<(), String> {
    let mut stream = in_time("connection", TcpStream::connect(address)).await?;
    let request = b"GET /index.html HTTP/1.0\r\n\r\n";
    in_time("room for a request", stream.write_all(request)).await?;
    let mut answer = Vec::new();
    in_time("answer", stream.read_to_end(&mut answer)).await?;
    match answer.starts_with(b"HTTP/1.0 200") || answer.starts_with(b"HTTP/1.1 200") {
        true => Ok(()),
        false => Err(format!(
            "answered {:?}",
            String::from_utf8_lossy(&answer).lines().next()
        )),
    }
}

async fn in_time<T>(
    what: &str,
    step: impl Future<Output = std::io::Result<T>>,
) -> Result<T, String> {
    match timeout(ANSWER_LIMIT, step).await {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no {what} in time")),
    }
}

/// What fails: while the old pods still serve, or in the smoke test, when all pods are new.
const DIES: &str = "echo fatal: broken >&2; exit 1";
const SAYS_ANOTHER_COMMIT: &str = "echo '{}' > /www/version; exec httpd -f -p 5000 -h /www";

/// From the verdict until what served before is back, verified and smoke-tested; with the time in which the evidence is kept.
fn seconds_back(build: &Value) -> f64 {
    let stages = build["stages"].as_array().unwrap();
    let rollback = stages
        .iter()
        .find(|row| row["stage"] == "rollback")
        .unwrap();
    let at = |key: &str| rollback[key].as_i64().unwrap();
    let millis = u32::try_from(at("done_at") - at("begun_at")).unwrap();
    f64::from(millis) / 1000.0
}

/// SOAK_RELEASES good and as many bad ones, of either kind in turns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_is_lost_over_good_and_bad_releases() {
    let rounds = number("SOAK_RELEASES", 5);
    let mut landfall = Landfall::start("traffic").await;
    let read = |landfall: &Landfall, name: &str| {
        std::fs::read_to_string(landfall.path(&format!("work/kubernetes/{name}"))).unwrap()
    };
    let deployment = read(&landfall, "deployment.yaml")
        .replace("  replicas: 1\n", "  replicas: 2\n  strategy:\n    rollingUpdate:\n      maxSurge: 1\n      maxUnavailable: 0\n")
        .replace("cpu: 50m\n", "cpu: 200m\n")
        .replace("terminationGracePeriodSeconds: 1\n", "terminationGracePeriodSeconds: 20\n")
        .replace("          readinessProbe:\n", "          lifecycle:\n            preStop:\n              sleep:\n                seconds: 10\n          readinessProbe:\n");
    let service = read(&landfall, "service.yaml")
        .replace("spec:\n", "spec:\n  type: NodePort\n")
        .replace(
            "targetPort: http\n",
            &format!("targetPort: http\n      nodePort: {NODE_PORT}\n"),
        );
    let good = "exec httpd -f -p 5000 -h /www";
    let id = landfall
        .push(&[
            ("kubernetes/deployment.yaml", &deployment),
            ("kubernetes/service.yaml", &service),
        ])
        .await;
    landfall.goes_live(id).await;
    let address = kubectl(&[
        "get",
        "nodes",
        "-o",
        "jsonpath={.items[0].status.addresses[?(@.type==\"InternalIP\")].address}",
    ]);
    let address = format!("{address}:{NODE_PORT}");
    crate::support::eventually(
        "the node's port answers",
        Duration::from_secs(20),
        async || ask(&address).await.ok(),
    )
    .await;

    let load = Load::start(address);
    let (mut back_beside_old, mut back_from_complete) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let page = format!("Hello {round}");
        let id = landfall
            .push(&[("start.sh", good), ("www/index.html", &page)])
            .await;
        let build = landfall.end(id).await;
        assert_eq!(
            build["outcome"],
            "live",
            "{build:#}\n{}",
            landfall.log(id).await
        );
        let (bad, cause, back) = match round % 2 {
            0 => (DIES, "crash_loop", &mut back_beside_old),
            _ => (
                SAYS_ANOTHER_COMMIT,
                "smoke_wrong_version",
                &mut back_from_complete,
            ),
        };
        let id = landfall.push(&[("start.sh", bad)]).await;
        let build = landfall.end(id).await;
        assert_eq!(
            build["outcome"],
            "rolled_back",
            "{build:#}\n{}",
            landfall.log(id).await
        );
        assert_eq!(build["cause"]["id"], cause, "{build:#}");
        back.push(seconds_back(&build));
    }
    let (asked, failed) = load.stop().await;
    println!(
        "{asked} requests over {rounds} good and {rounds} bad releases, {} failed",
        failed.len()
    );
    assert!(asked > PER_SECOND * 20, "only {asked} requests");
    assert!(
        failed.is_empty(),
        "{} of {asked} requests failed: {:#?}",
        failed.len(),
        &failed[..failed.len().min(10)]
    );
    let figure = |seconds: &mut [f64]| json!({"samples": seconds.len(), "median": quantile(seconds, 50), "max": quantile(seconds, 100)});
    keep(
        "seconds_back_after_the_verdict",
        &json!({"old_pods_served": figure(&mut back_beside_old), "all_pods_were_new": figure(&mut back_from_complete)}),
    );
    keep(
        "requests_over_releases",
        &json!({"good": rounds, "bad": rounds, "requests": asked, "failed": 0}),
    );
}
