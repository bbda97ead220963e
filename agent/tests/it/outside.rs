//! Each system outside away in each way: git, Docker, the registry, the cluster, GitHub and PostgreSQL, each behind Shopify's
//! toxiproxy, slow, reset, silent, or silent in one direction, from the moment on in which a stage needs it.
//!
//! OUTSIDE_CELLS of the table are run, spread over it; `make soak` runs it whole and keeps it. The commit is good, so that a
//! cell is right where it goes live, or ends as errored with what served before: never as the commit's failure.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::fake_github::{FakeGithub, TOKEN};
use crate::landfall::{BUILD_LIMIT, Landfall, free_port, is_terminal};
use crate::postgres::Postgres;
use crate::soak::{keep, number};
use crate::support::{eventually, kubectl_apply, registry};

const TOXIPROXY: &str = "github.com/Shopify/toxiproxy/v2/cmd/server@v2.12.0";
/// Longer than a build takes where nothing is away, shorter than `unreachable_seconds`.
const AWAY: Duration = Duration::from_secs(15);

/// System, the stage that meets it away, and the stage from whose begin on it is: the same where that one takes its time, else
/// the one before, which needs another.
const PLACES: [(&str, &str, Option<&str>); 11] = [
    ("cluster", "verify", Some("verify")),
    ("git", "checkout", None),
    ("docker", "image", Some("checkout")),
    ("docker", "test", Some("test")),
    ("registry", "image", Some("checkout")),
    ("postgres", "test", Some("test")),
    ("cluster", "deploy", Some("test")),
    ("cluster", "smoke_test", Some("smoke_test")),
    ("postgres", "verify", Some("verify")),
    ("postgres", "smoke_test", Some("smoke_test")),
    ("github", "checkout", None),
];

/// Name, type and attributes of toxiproxy, and the streams that it is put on.
fn faults() -> [(&'static str, &'static str, Value, &'static [&'static str]); 4] {
    [
        ("slow", "latency", json!({"latency": 2000}), &["downstream"]),
        (
            "reset",
            "reset_peer",
            json!({"timeout": 0}),
            &["upstream", "downstream"],
        ),
        (
            "silent",
            "timeout",
            json!({"timeout": 0}),
            &["upstream", "downstream"],
        ),
        (
            "half-open",
            "timeout",
            json!({"timeout": 0}),
            &["downstream"],
        ),
    ]
}

struct Toxiproxy {
    server: Child,
    url: String,
    http: reqwest::Client,
}

impl Toxiproxy {
    async fn start() -> Self {
        let port = free_port();
        let server = Command::new(built())
            .args(["-host", "127.0.0.1", "-port", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (url, http) = (format!("http://127.0.0.1:{port}"), reqwest::Client::new());
        let toxiproxy = Self { server, url, http };
        let answers = async || {
            toxiproxy
                .http
                .get(format!("{}/version", toxiproxy.url))
                .send()
                .await
                .ok()
        };
        eventually("toxiproxy answers", Duration::from_secs(10), answers).await;
        toxiproxy
    }

    async fn post(&self, path: &str, body: Value) {
        let sent = self
            .http
            .post(format!("{}{path}", self.url))
            .body(body.to_string())
            .send();
        let answer = sent.await.unwrap();
        assert!(answer.status().is_success(), "{path} {body}: {answer:?}");
    }

    /// The port that leads to this address.
    async fn before(&self, system: &str, upstream: &str) -> u16 {
        let port = free_port();
        let body = json!({"name": system, "listen": format!("127.0.0.1:{port}"), "upstream": upstream, "enabled": true});
        self.post("/proxies", body).await;
        port
    }

    async fn break_off(&self, system: &str, kind: &str, attributes: &Value, streams: &[&str]) {
        for stream in streams {
            let toxic =
                json!({"name": stream, "type": kind, "stream": stream, "attributes": attributes});
            self.post(&format!("/proxies/{system}/toxics"), toxic).await;
        }
    }

    async fn mend(&self) {
        self.post("/reset", json!({})).await;
    }
}

impl Drop for Toxiproxy {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Built once, from its public module.
fn built() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("toxiproxy-2.12.0");
    let program = folder.join("server");
    if !program.exists() {
        let mut go = Command::new("go");
        go.args(["install", TOXIPROXY])
            .env("GOBIN", &folder)
            .env("GOFLAGS", "-mod=mod");
        let output = go.output().expect("this test needs Go: https://go.dev/dl");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    program
}

/// The engine's socket on a port.
struct DockerPort(Child, u16);

impl DockerPort {
    fn open() -> Self {
        let port = free_port();
        let socat = Command::new("socat")
            .args([
                &format!("TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr"),
                "UNIX-CONNECT:/var/run/docker.sock",
            ])
            .spawn();
        Self(socat.expect("socat is needed"), port)
    }
}

impl Drop for DockerPort {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn port_of(url: &str) -> &str {
    let host = url.split("://").last().unwrap().split('/').next().unwrap();
    host.rsplit(':').next().unwrap()
}

/// An agent that reaches nothing but through the proxies.
async fn behind(
    toxiproxy: &Toxiproxy,
    docker: &DockerPort,
    github: &FakeGithub,
    postgres: &Postgres,
) -> Landfall {
    let mut landfall = Landfall::start("outside").await;
    let local = |port: &str| format!("127.0.0.1:{port}");
    let git = toxiproxy
        .before("git", &local(port_of(&landfall.git_url())))
        .await;
    let docker = toxiproxy
        .before("docker", &local(&docker.1.to_string()))
        .await;
    let own_registry = toxiproxy
        .before("registry", &local(port_of(&registry())))
        .await;
    let api = toxiproxy
        .before("github", &local(port_of(&github.url())))
        .await;
    let api = github
        .url()
        .replace(port_of(&github.url()), &api.to_string());
    let database = toxiproxy
        .before("postgres", &local(port_of(&postgres.url())))
        .await;
    let kubeconfig = std::fs::read_to_string(landfall.path("agent.kubeconfig")).unwrap();
    let server = kubeconfig
        .lines()
        .find_map(|line| line.trim().strip_prefix("server: "))
        .unwrap();
    let cluster = toxiproxy.before("cluster", &local(port_of(server))).await;
    let proxied = kubeconfig.replace(server, &format!("https://127.0.0.1:{cluster}"));
    std::fs::write(landfall.path("agent.kubeconfig"), proxied).unwrap();

    let config = std::fs::read_to_string(landfall.path("agent.yaml")).unwrap();
    let config = config
        .replace(
            &landfall.git_url(),
            &format!("http://127.0.0.1:{git}/hello.git"),
        )
        .replace(
            &format!("image_prefix: {}", registry()),
            &format!("image_prefix: 127.0.0.1:{own_registry}"),
        );
    std::fs::write(landfall.path("agent.yaml"), config).unwrap();
    // The node pulls by the name under which we pushed: there, that port leads to its registry.
    let node = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{ name: registry }}\nspec:\n  hostNetwork: true\n  terminationGracePeriodSeconds: 0\n  \
         containers:\n    - name: registry\n      image: {}\n      command: [nc, -ll, -p, \"{own_registry}\", -e, nc, 127.0.0.1, \"{}\"]\n",
        crate::support::busybox(),
        port_of(&registry()),
    );
    kubectl_apply(&landfall.namespace.0, &node);
    let more = format!(
        "docker: {{ host: \"tcp://127.0.0.1:{docker}\" }}\ngithub: {{ api_url: \"{api}\", token: {TOKEN} }}\n\
         database: \"postgres://landfall@127.0.0.1:{database}/postgres\"\nenvironments:"
    );
    landfall.restart("environments:", &more, &[]).await;
    landfall
}

/// As the API shows it; None while the store is away.
async fn shown(landfall: &Landfall, id: i64) -> Option<Value> {
    let asked = reqwest::get(landfall.url(&format!("/api/builds/{id}")))
        .await
        .ok()?;
    asked.error_for_status().ok()?.json().await.ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_is_away_in_whatever_way_the_build_ends_and_tells_the_truth() {
    let (toxiproxy, docker) = (Toxiproxy::start().await, DockerPort::open());
    let (github, postgres) = (FakeGithub::start().await, Postgres::start().await);
    let mut landfall = behind(&toxiproxy, &docker, &github, &postgres).await;
    let first = landfall.push(&[]).await;
    let first = landfall.end(first).await;
    assert_eq!(first["outcome"], "live", "{first:#}");

    let places = PLACES
        .iter()
        .flat_map(|place| faults().map(|fault| (*place, fault)));
    let cells: Vec<_> = places.collect();
    let wanted = number("OUTSIDE_CELLS", 4).min(cells.len());
    let (mut table, mut wrong) = (Vec::new(), Vec::new());
    let pipeline = std::fs::read_to_string(landfall.path("work/pipeline.yaml")).unwrap();
    let soaked = pipeline.replace("soak_seconds: 0", "soak_seconds: 4");
    for turn in 0..wanted {
        let ((system, stage, from), (fault, kind, attributes, streams)) =
            &cells[turn * cells.len() / wanted];
        let served = landfall.served("/version");
        let page = format!("Hello {turn}");
        let files = [
            ("pipeline.yaml", soaked.as_str()),
            ("www/index.html", &page),
            ("test.sh", "sleep 2\n"),
            ("start.sh", "sleep 2; exec httpd -f -p 5000 -h /www\n"),
        ];
        let id = if let Some(from) = from {
            let id = landfall.push(&files).await;
            landfall.reach(id, from).await;
            toxiproxy.break_off(system, kind, attributes, streams).await;
            id
        } else {
            toxiproxy.break_off(system, kind, attributes, streams).await;
            landfall.push(&files).await
        };
        let begun = Instant::now();
        tokio::time::sleep(AWAY).await;
        toxiproxy.mend().await;
        let seen = async || shown(&landfall, id).await;
        let seen = eventually("the agent shows the build", BUILD_LIMIT, seen).await;
        // No build waits for GitHub, and one goes on slowly.
        let is_held_up = *system != "github" && *fault != "slow";
        if is_held_up && is_terminal(&seen) {
            wrong.push(format!(
                "{system} {fault} in {stage}: was not met: {seen:#}"
            ));
        }
        let ended = async || shown(&landfall, id).await.filter(is_terminal);
        let build = eventually(
            &format!("{system} {fault} in {stage}: the build ends"),
            BUILD_LIMIT,
            ended,
        )
        .await;
        let seconds = begun.elapsed().as_secs();
        let (status, now) = (
            build["status"].as_str().unwrap(),
            landfall.served("/version"),
        );
        let commit = build["commit"].as_str().unwrap();
        let is_true = match status {
            "passed" => now.contains(commit),
            "errored" => now == served || build["outcome"] == "unknown",
            _ => false,
        };
        if !is_true {
            wrong.push(format!(
                "{system} {fault} in {stage}: {build:#}\nserves {now}"
            ));
        }
        let told = async || {
            let states = github.states(commit, "landfall/hello");
            let expected = if status == "passed" {
                "success"
            } else {
                "error"
            };
            (states.last().map(String::as_str) == Some(expected)).then_some(())
        };
        eventually("GitHub knows how it ended", BUILD_LIMIT, told).await;
        println!(
            "{system} {fault} in {stage}: {status} {} after {seconds} s",
            build["outcome"]
        );
        table.push(json!({"system": system, "fault": fault, "stage": stage, "status": status, "outcome": build["outcome"], "seconds": seconds}));
    }
    keep("outside_away", &Value::from(table));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
