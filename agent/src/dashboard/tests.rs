//! Pages and API over a real store and the real routes, with odd input.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Request, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use crate::app::App;
use crate::build_log::LogLine;
use crate::builds::{Build, BuildKind, Cause, Outcome, Push, Stage, StageStatus, Status, now};
use crate::config::Config;
use crate::release::Release;
use crate::server;
use crate::store::{Filter, Store};

const TOKEN: &str = "the admin's token";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
const CONFIG: &str = "environments:
  - { name: hello, repository: acme/hello, branch: main, clone_url: 'https://github.com/acme/hello', namespace: hello-ns,
      image_prefix: 'localhost:5001', webhook_secrets: [0123456789abcdef0123456789abcdef] }
  - { name: shop, repository: acme/shop, branch: release/1, clone_url: 'https://git.example.org/acme/shop', namespace: shop,
      image_prefix: 'localhost:5001', webhook_secrets: [0123456789abcdef0123456789abcdef] }
";

struct Site {
    app: App,
    routes: Router,
    _folder: tempfile::TempDir,
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }

    fn header(&self, name: &str) -> &str {
        self.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
    }
}

impl Site {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.yaml");
        std::fs::write(&path, CONFIG).unwrap();
        let config = Config::load_with(&path, &|_| None).unwrap();
        let store = Store::open(&folder.path().join("data"), None)
            .await
            .unwrap();
        store
            .ensure_environments(&config.environments)
            .await
            .unwrap();
        let app = App {
            config: Arc::new(config),
            store,
            admin_token: Arc::from(TOKEN),
            shutdown: CancellationToken::new(),
        };
        Self {
            routes: server::routes(app.clone()),
            app,
            _folder: folder,
        }
    }

    async fn send(&self, request: axum::http::request::Builder, body: &str) -> Answer {
        let request = request
            .header(header::HOST, "localhost")
            .body(Body::from(body.to_owned()))
            .unwrap();
        let response = self.routes.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = timeout(ANSWER_LIMIT, body.collect())
            .await
            .unwrap()
            .unwrap()
            .to_bytes()
            .to_vec();
        Answer {
            status: parts.status,
            headers: parts.headers,
            body,
        }
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path), "").await
    }

    async fn post(&self, path: &str, body: &Value) -> Answer {
        let request = Request::post(path).header(header::AUTHORIZATION, format!("Bearer {TOKEN}"));
        self.send(request, &body.to_string()).await
    }

    async fn page(&self, path: &str) -> String {
        let answer = self.get(path).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.text());
        assert_eq!(answer.header("content-type"), "text/html; charset=utf-8");
        assert_eq!(
            answer.header("content-security-policy"),
            super::CONTENT_SECURITY_POLICY
        );
        answer.text().to_owned()
    }

    async fn queue(&self, environment: &str, push: &Push) -> i64 {
        self.app
            .store
            .enqueue(environment, push, BuildKind::Push)
            .await
            .unwrap()
    }

    /// A build that runs.
    async fn start(&self, environment: &str, push: &Push) -> Build {
        let id = self.queue(environment, push).await;
        let build = self.app.store.claim("test", false).await.unwrap().unwrap();
        assert_eq!(build.id, id);
        build
    }

    async fn write(&self, build: &Build, next: i64, lines: &[&[u8]]) -> i64 {
        let lines: Vec<LogLine> = lines
            .iter()
            .map(|bytes| LogLine {
                stage: Stage::Test,
                at: now(),
                bytes: bytes.to_vec(),
            })
            .collect();
        self.app
            .store
            .append_log(build, next, &lines)
            .await
            .unwrap()
    }

    async fn fail(&self, build: &Build, cause: &Cause) {
        assert!(
            self.app
                .store
                .finish(build, Status::Failed, Outcome::Unchanged, Some(cause))
                .await
                .unwrap()
        );
    }
}

fn push(branch: &str, title: &str, by: &str) -> Push {
    Push {
        repository_id: None,
        repository: "acme/hello".to_owned(),
        branch: branch.to_owned(),
        before: "0".repeat(40),
        after: COMMIT.to_owned(),
        pusher: by.to_owned(),
        title: title.to_owned(),
        pushed_at: None,
    }
}

/// Every tag of a page with its attributes; panics where one is not written as our templates write them.
fn tags(html: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut tags = Vec::new();
    let mut rest = html;
    while let Some(begin) = rest.find('<') {
        rest = &rest[begin + 1..];
        let name_end = rest
            .find(|c: char| !(c.is_ascii_alphanumeric() || "/!".contains(c)))
            .unwrap();
        let name = rest[..name_end].to_owned();
        rest = &rest[name_end..];
        let mut attributes = Vec::new();
        loop {
            rest = rest.trim_start();
            if let Some(after) = rest.strip_prefix("/>").or_else(|| rest.strip_prefix('>')) {
                rest = after;
                break;
            }
            let key_end = rest
                .find(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
                .unwrap();
            assert!(
                key_end > 0,
                "in <{name}: {}",
                rest.chars().take(40).collect::<String>()
            );
            let key = rest[..key_end].to_owned();
            rest = &rest[key_end..];
            let mut value = String::new();
            if let Some(quoted) = rest.strip_prefix("=\"") {
                let end = quoted.find('"').unwrap();
                value = quoted[..end].to_owned();
                rest = &quoted[end + 1..];
            }
            attributes.push((key, value));
        }
        tags.push((name, attributes));
    }
    tags
}

/// Nothing in a page may come from outside but text.
fn assert_is_ours(html: &str) {
    let mut scripts = 0;
    for (name, attributes) in tags(html) {
        let name = name.trim_start_matches('/');
        assert!(
            [
                "!doctype", "html", "head", "meta", "title", "link", "script", "body", "svg",
                "symbol", "rect", "path", "circle", "use", "a", "header", "main", "h1", "h2", "h3",
                "form", "label", "select", "option", "input", "button", "div", "section",
                "article", "p", "span", "time", "ol", "ul", "li", "dl", "dt", "dd", "nav", "code",
                "pre", "i", "b",
            ]
            .contains(&name),
            "<{name}>"
        );
        scripts += usize::from(name == "script" && !attributes.is_empty());
        for (key, value) in attributes {
            assert!(
                !key.starts_with("on") && key != "style" && key != "srcdoc",
                "<{name} {key}>"
            );
            if ["href", "src", "action"].contains(&key.as_str()) {
                let is_ours =
                    value.starts_with('#') || (value.starts_with('/') && !value.starts_with("//"));
                assert!(
                    is_ours || value.starts_with("https://github.com/acme/hello/commit/"),
                    "{key}={value}"
                );
            }
        }
    }
    assert!(scripts <= 1, "{scripts} scripts");
}

const ODD_TEXTS: [&str; 17] = [
    "<script>alert(1)</script>",
    "\"><script>alert(1)</script>",
    "'><img src=x onerror=alert(1)>",
    "\" onmouseover=\"alert(1)",
    "</title><script>alert(1)</script>",
    "</textarea><svg/onload=alert(1)>",
    "javascript:alert(1)",
    "<a href=\"javascript:alert(1)\">x</a>",
    "{{ 7 * 7 }}{% raw %}${7*7}",
    "<!--<script>",
    "]]><script>",
    "&lt;script&gt;&amp;&#60;",
    "<svg><style>*{background:url(//evil.example)}",
    "\u{202e}evil\u{2066}<b>",
    "\0<iframe srcdoc='<script>'>",
    "--upload-pack=$(reboot);`id`|<x>",
    "\x1b]8;;javascript:alert(1)\x07<b>link\x1b]8;;\x07\x1b[31\"><script>m",
];

#[tokio::test]
async fn a_build_that_waits_says_for_what() {
    let mut site = Site::new().await;
    let first = site.start("hello", &push("main", "First", "mona")).await;
    let second = site.queue("hello", &push("main", "Second", "mona")).await;
    let running = format!("Waits for the end of <a href=\"/builds/{}\">", first.id);
    for path in ["/", &format!("/builds/{second}")] {
        let html = site.page(path).await;
        assert_eq!(html.matches(&running).count(), 1, "{path}: {html}");
    }

    let other = site
        .queue("shop", &push("release/1", "Third", "mona"))
        .await;
    assert!(
        !site
            .page(&format!("/builds/{other}"))
            .await
            .contains("Waits for")
    );
    let of_another = site.queue("gone", &push("main", "Fourth", "mona")).await;
    let html = site.page(&format!("/builds/{of_another}")).await;
    assert!(
        html.contains("Waits for an agent whose agent.yaml has this environment"),
        "{html}"
    );
    let mut config = (*site.app.config).clone();
    config.min_free_bytes = u64::MAX;
    site.app.config = Arc::new(config);
    site.routes = server::routes(site.app.clone());
    let html = site.page(&format!("/builds/{other}")).await;
    assert!(
        html.contains("Waits for room on the agent’s disk"),
        "{html}"
    );
}

#[tokio::test]
async fn what_comes_from_outside_is_only_ever_text() {
    let site = Site::new().await;
    for odd in ODD_TEXTS {
        let build = site
            .start(
                "hello",
                &Push {
                    repository: odd.to_owned(),
                    after: odd.to_owned(),
                    ..push(odd, odd, odd)
                },
            )
            .await;
        site.write(&build, 1, &[odd.as_bytes(), b"\n", odd.as_bytes()])
            .await;
        site.app.store.set_image(&build, odd).await.unwrap();
        site.fail(&build, &Cause::new("odd", odd).object(odd).hint(odd))
            .await;
        site.queue(odd, &push(odd, odd, odd)).await;
        let name: String = url::form_urlencoded::byte_serialize(odd.as_bytes()).collect();
        for path in [
            "/".to_owned(),
            format!("/?branch={name}&environment={name}"),
            format!("/?branch={name}&limit=1"),
            format!("/builds/{}", build.id),
            format!("/builds/{}?part=summary", build.id),
            format!("/builds/{}", build.id + 1),
        ] {
            let html = site.page(&path).await;
            assert_is_ours(&html);
            if odd.contains('<') {
                assert!(!html.contains(odd), "{path} shows {odd:?} as it is");
            }
        }
        // The queue would take it next.
        site.app.store.cancel(build.id + 1, "test").await.unwrap();
        let answer = site.get(&format!("/?status={name}")).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert_is_ours(answer.text());
    }
    let html = site.page("/builds/1").await;
    assert!(
        html.contains("&#60;script&#62;alert(1)&#60;/script&#62;"),
        "{html}"
    );
}

#[tokio::test]
async fn no_template_switches_escaping_off() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    for file in std::fs::read_dir(folder.join("templates")).unwrap() {
        let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
        for forbidden in [
            "|safe",
            "| safe",
            "escape none",
            "style=",
            "javascript:",
            " onclick",
        ] {
            assert!(!text.contains(forbidden), "{forbidden}");
        }
    }
    for name in ["page.js", "list.js", "live.js"] {
        let text = std::fs::read_to_string(folder.join("static").join(name)).unwrap();
        for forbidden in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "http://",
            "https://",
        ] {
            assert!(!text.contains(forbidden), "{name}: {forbidden}");
        }
        assert!(text.lines().count() < 250, "{name}");
    }
}

#[tokio::test]
async fn commits_are_links_only_where_the_operator_clones_from_github() {
    let site = Site::new().await;
    let on_github = site.queue("hello", &push("main", "a", "Ada")).await;
    let elsewhere = site
        .queue(
            "shop",
            &Push {
                repository: "acme/shop".to_owned(),
                ..push("release/1", "b", "Ada")
            },
        )
        .await;
    let odd = site
        .queue(
            "hello",
            &Push {
                repository: "acme/hello/../../evil".to_owned(),
                ..push("main", "c", "Ada")
            },
        )
        .await;
    let link = format!("https://github.com/acme/hello/commit/{COMMIT}");
    assert!(
        site.page(&format!("/builds/{on_github}"))
            .await
            .contains(&link)
    );
    assert!(
        !site
            .page(&format!("/builds/{elsewhere}"))
            .await
            .contains("github.com")
    );
    assert!(
        !site
            .page(&format!("/builds/{odd}"))
            .await
            .contains("github.com")
    );
}

#[tokio::test]
async fn an_empty_list_teaches_how_to_begin() {
    let site = Site::new().await;
    let html = site.page("/").await;
    for taught in [
        "http://127.0.0.1:8080/webhook",
        "git push origin main",
        "git push origin release/1",
        "landfall build main",
    ] {
        assert!(html.contains(taught), "{taught}");
    }
    let html = site.page("/?status=failed").await;
    assert!(html.contains("No build matches") && !html.contains("git push"));
}

#[tokio::test]
async fn the_list_filters_and_pages() {
    let site = Site::new().await;
    for number in 1..=12 {
        site.queue("hello", &push("main", &format!("change {number}"), "Ada"))
            .await;
        site.queue("shop", &push("release/1", "shop", "Bob")).await;
    }
    let mut ids = Vec::new();
    let mut path = "/api/builds?environment=hello&limit=5".to_owned();
    loop {
        let page = site.get(&path).await.json();
        ids.extend(
            page["builds"]
                .as_array()
                .unwrap()
                .iter()
                .map(|build| build["id"].as_i64().unwrap()),
        );
        let Some(next) = page["next"].as_i64() else {
            break;
        };
        path = format!("/api/builds?environment=hello&limit=5&before={next}");
    }
    assert_eq!(ids, (1..=12).rev().map(|n| n * 2 - 1).collect::<Vec<_>>());
    let exact = site
        .get("/api/builds?environment=shop&limit=12")
        .await
        .json();
    assert_eq!(
        (exact["builds"].as_array().unwrap().len(), &exact["next"]),
        (12, &Value::Null)
    );
    let queued = site
        .get("/api/builds?status=queued&branch=release%2F1")
        .await
        .json();
    assert_eq!(queued["builds"][0]["id"], 24);
    assert_eq!(queued["builds"].as_array().unwrap().len(), 1);
    assert_eq!(
        queued["builds"][0]["page"],
        "http://127.0.0.1:8080/builds/24"
    );

    let html = site.page("/?environment=hello&limit=5").await;
    assert!(html.contains("change 12") && html.contains("change 8") && !html.contains("change 7<"));
    assert!(
        html.contains("/?environment=hello&#38;limit=5&#38;before=15"),
        "{html}"
    );
    let html = site.page("/?environment=hello&limit=5&before=5").await;
    assert!(html.contains("change 1<") && !html.contains("Older") && html.contains("Newest"));
}

#[tokio::test]
async fn unknown_queries_are_named() {
    let site = Site::new().await;
    for (query, named) in [
        ("environment=helo", "helo"),
        ("status=green", "green"),
        ("stauts=failed", "stauts"),
        ("limit=1000", "limit"),
        ("before=%00", "before"),
    ] {
        let answer = site.get(&format!("/api/builds?{query}")).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{query}");
        assert!(
            answer.json()["error"].as_str().unwrap().contains(named),
            "{}",
            answer.text()
        );
    }
    assert!(
        site.get("/api/builds?environment=helo").await.json()["hint"]
            .as_str()
            .unwrap()
            .contains("hello, shop")
    );
}

#[tokio::test]
async fn what_is_not_there_is_404_in_the_tongue_of_who_asks() {
    let site = Site::new().await;
    site.queue("hello", &push("main", "a", "Ada")).await;
    for id in [
        "2",
        "0",
        "01",
        "-1",
        "+1",
        "1.0",
        "x",
        "%00",
        "%ff",
        "99999999999999999999999",
        "..%2f1",
        "1;2",
        "1%20",
    ] {
        for path in [
            format!("/api/builds/{id}"),
            format!("/api/builds/{id}/log"),
            format!("/api/builds/{id}/log/live"),
        ] {
            let answer = site.get(&path).await;
            assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}");
            assert!(answer.json()["error"].is_string());
        }
        let answer = site.get(&format!("/builds/{id}")).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{id}");
        assert!(answer.text().contains("There is nothing here"));
        for path in [
            format!("/api/builds/{id}/cancel"),
            format!("/api/builds/{id}/rerun"),
        ] {
            assert_eq!(
                site.post(&path, &json!({})).await.status,
                StatusCode::NOT_FOUND,
                "{path}"
            );
        }
    }
    assert!(site.get("/api/nothing").await.json()["error"].is_string());
    assert_eq!(site.get("/nothing").await.status, StatusCode::NOT_FOUND);
    assert_eq!(
        site.get("/static/x/..%2fCargo.toml").await.status,
        StatusCode::NOT_FOUND
    );
    assert_eq!(
        site.get("/static/x/%2e%2e").await.status,
        StatusCode::NOT_FOUND
    );
    let answer = site.post("/api/builds/1", &json!({})).await;
    assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED);
    assert!(answer.json()["error"].is_string());
}

#[tokio::test]
async fn a_build_is_told_whole() {
    let site = Site::new().await;
    let build = site
        .start("hello", &push("main", "Greet better", "Ada"))
        .await;
    let store = &site.app.store;
    store.begin_stage(&build, Stage::Checkout).await.unwrap();
    store
        .end_stage(
            &build,
            Stage::Checkout,
            StageStatus::Passed,
            Some("{\"secret\":\"baton\"}"),
        )
        .await
        .unwrap();
    store.begin_stage(&build, Stage::Image).await.unwrap();
    store
        .end_stage(&build, Stage::Image, StageStatus::Failed, None)
        .await
        .unwrap();
    site.fail(
        &build,
        &Cause::new(
            "image_build_failed",
            "RUN cargo build failed in the Dockerfile, line 7",
        )
        .hint("Read on"),
    )
    .await;
    let answer = site.get("/api/builds/1").await;
    let told = answer.json();
    assert_eq!(told["status"], "failed");
    assert_eq!(told["outcome"], "unchanged");
    assert_eq!(
        told["cause"],
        json!({"id": "image_build_failed", "sentence": "RUN cargo build failed in the Dockerfile, line 7", "object": null, "hint": "Read on"})
    );
    assert_eq!(told["commit"], COMMIT);
    assert_eq!(told["stages"][1]["title"], "Build Docker Image");
    assert_eq!(told["stages"][1]["status"], "failed");
    assert!(told["stages"][0]["done_at"].as_i64().unwrap() > 1_600_000_000_000);
    assert!(!answer.text().contains("baton"));

    let html = site.page("/builds/1").await;
    let sentence = html.find("RUN cargo build failed").unwrap();
    assert!(sentence < html.find("<dl").unwrap() && sentence < html.find("id=\"log\"").unwrap());
    for stage in Stage::LINE {
        assert!(html.contains(stage.title()));
    }
    assert!(!html.contains("Rollback") && !html.contains("landfall cancel"));
    assert_eq!(html.matches("Not run").count(), 4);
    assert!(html.contains("<title>Failed · #1 Greet better"));
}

#[tokio::test]
async fn environments_say_what_is_live_and_what_runs() {
    let site = Site::new().await;
    let running = site.start("hello", &push("main", "a", "Ada")).await;
    site.queue("hello", &push("other", "b", "Ada")).await;
    let told = site.get("/api/environments").await.json();
    let hello = &told["environments"][0];
    assert_eq!(hello["name"], "hello");
    assert_eq!(hello["namespace"], "hello-ns");
    assert_eq!(hello["deployed"], json!({"commit": null, "release": null}));
    assert_eq!(hello["build"]["id"], running.id);
    assert_eq!(told["environments"][1]["build"], Value::Null);
    assert!(site.page("/").await.contains("Nothing deployed yet"));
}

#[tokio::test]
async fn a_person_can_ask_for_a_build() {
    let site = Site::new().await;
    let answer = site
        .post(
            "/api/builds",
            &json!({"environment": "hello", "branch": "main"}),
        )
        .await;
    assert_eq!(answer.status, StatusCode::ACCEPTED, "{}", answer.text());
    let build = answer.json();
    assert_eq!(
        (&build["kind"], &build["status"], &build["commit"]),
        (&json!("manual"), &json!("queued"), &json!(""))
    );
    let answer = site
        .post(
            "/api/builds",
            &json!({"environment": "hello", "commit": COMMIT.to_uppercase()}),
        )
        .await;
    assert_eq!(answer.json()["commit"], COMMIT);
    for (body, status, named) in [
        (
            json!({"environment": "helo", "branch": "main"}),
            StatusCode::NOT_FOUND,
            "helo",
        ),
        (
            json!({"environment": "hello", "branch": "other"}),
            StatusCode::BAD_REQUEST,
            "other",
        ),
        (
            json!({"environment": "hello", "commit": "abc"}),
            StatusCode::BAD_REQUEST,
            "40",
        ),
        (
            json!({"environment": "hello", "commit": ""}),
            StatusCode::BAD_REQUEST,
            "40",
        ),
        (
            json!({"environment": "hello", "commit": "--upload-pack=x"}),
            StatusCode::BAD_REQUEST,
            "40",
        ),
        (
            json!({"environment": "hello"}),
            StatusCode::BAD_REQUEST,
            "neither",
        ),
        (
            json!({"environment": "hello", "brunch": "main"}),
            StatusCode::BAD_REQUEST,
            "brunch",
        ),
        (json!([1, 2]), StatusCode::BAD_REQUEST, "body"),
        (
            json!({"environment": "x".repeat(20_000)}),
            StatusCode::PAYLOAD_TOO_LARGE,
            "body",
        ),
    ] {
        let answer = site.post("/api/builds", &body).await;
        assert_eq!(answer.status, status, "{body}");
        assert!(
            answer.json()["error"].as_str().unwrap().contains(named),
            "{}",
            answer.text()
        );
    }
    assert_eq!(
        site.app
            .store
            .builds(&Filter::default())
            .await
            .unwrap()
            .len(),
        2
    );
    let unasked = site
        .send(
            Request::post("/api/builds"),
            "{\"environment\":\"hello\",\"branch\":\"main\"}",
        )
        .await;
    assert_eq!(unasked.status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_build_is_canceled_and_run_again() {
    let site = Site::new().await;
    let build = site.start("hello", &push("main", "a", "Ada")).await;
    assert_eq!(
        site.post("/api/builds/1/rerun", &json!({})).await.status,
        StatusCode::CONFLICT
    );
    let answer = site.post("/api/builds/1/cancel", &json!({})).await;
    assert_eq!(
        (answer.status, &answer.json()["cancel_requested"]),
        (StatusCode::ACCEPTED, &json!(true))
    );
    assert!(site.page("/builds/1").await.contains("Canceling"));
    assert!(
        site.app
            .store
            .finish(&build, Status::Canceled, Outcome::Unchanged, None)
            .await
            .unwrap()
    );
    let answer = site.post("/api/builds/1/cancel", &json!({})).await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert!(
        answer.json()["error"]
            .as_str()
            .unwrap()
            .contains("canceled")
    );
    let answer = site.post("/api/builds/1/rerun", &json!({})).await;
    assert_eq!(answer.status, StatusCode::ACCEPTED);
    assert_eq!(
        (&answer.json()["kind"], &answer.json()["commit"]),
        (&json!("rerun"), &json!(COMMIT))
    );
    assert_eq!(
        site.post("/api/builds/2/cancel", &json!({})).await.json()["status"],
        "canceled"
    );
}

#[tokio::test]
async fn the_raw_log_is_exact_to_the_byte() {
    let site = Site::new().await;
    let build = site.start("hello", &push("main", "a", "Ada")).await;
    let mut expected = Vec::new();
    let mut next = 1;
    for round in 0..30_u8 {
        let long = vec![round; 16 * 1024];
        let lines: [&[u8]; 5] = [
            b"1%\r50%\r100%\n",
            b"\0\xff\xfe\xc3\x28\n",
            b"\r\n",
            &long,
            b"no newline at the end",
        ];
        lines
            .iter()
            .for_each(|line| expected.extend_from_slice(line));
        next = site.write(&build, next, &lines).await;
    }
    let answer = site.get("/api/builds/1/log").await;
    assert!(
        answer.body == expected,
        "{} bytes, not {}",
        answer.body.len(),
        expected.len()
    );
    assert_eq!(answer.header("content-type"), "text/plain; charset=utf-8");
    assert_eq!(answer.header("x-content-type-options"), "nosniff");
}

#[tokio::test]
async fn a_page_shows_the_end_of_a_long_log_and_links_to_all_of_it() {
    let site = Site::new().await;
    let build = site.start("hello", &push("main", "a", "Ada")).await;
    let lines: Vec<String> = (1..=5_100).map(|n| format!("line {n} of many\n")).collect();
    let lines: Vec<&[u8]> = lines.iter().map(String::as_bytes).collect();
    let next = site.write(&build, 1, &lines).await;
    let html = site.page("/builds/1").await;
    assert!(
        html.contains("id=\"L5100\"")
            && html.contains("id=\"L101\"")
            && !html.contains("id=\"L100\"")
    );
    assert!(html.contains("The first 100 lines are not shown here"));
    assert!(html.contains("data-after=\"5100\""));
    let long = vec![b'x'; 16 * 1024];
    site.write(&build, next, &vec![long.as_slice(); 200]).await;
    let html = site.page("/builds/1").await;
    assert!(html.len() < 2 << 20, "{} bytes", html.len());
    assert!(html.contains("id=\"L5300\""));
}

#[tokio::test]
async fn colours_become_classes_and_progress_its_last_state() {
    let site = Site::new().await;
    let build = site.start("hello", &push("main", "a", "Ada")).await;
    site.write(
        &build,
        1,
        &[b"\x1b[1;32mok\x1b[0m <b>\n", b"10%\r99%\r100%\n"],
    )
    .await;
    let html = site.page("/builds/1").await;
    assert!(
        html.contains("<i class=\"f2 b\">ok</i> &#60;b&#62;</span>"),
        "{html}"
    );
    assert!(html.contains("<span>100%</span>"));
    assert_is_ours(&html);
}

/// Reads a live log until `enough` lines came or it ends: the lines, the names of other events, and whether it ended.
async fn watch(
    site: &Site,
    header_after: Option<i64>,
    enough: usize,
) -> (Vec<Value>, BTreeSet<String>, bool) {
    let mut request =
        Request::get("/api/builds/1/log/live?after=0").header(header::HOST, "localhost");
    if let Some(after) = header_after {
        request = request.header("last-event-id", after.to_string());
    }
    let response = site
        .routes
        .clone()
        .oneshot(request.body(Body::empty()).unwrap())
        .await
        .unwrap();
    assert_eq!(
        response.headers()[header::CONTENT_TYPE],
        "text/event-stream"
    );
    let mut body = response.into_body();
    let (mut text, mut lines, mut names) = (String::new(), Vec::new(), BTreeSet::new());
    while let Some(frame) = timeout(ANSWER_LIMIT, body.frame())
        .await
        .expect("an event in time")
    {
        text.push_str(std::str::from_utf8(&frame.unwrap().into_data().unwrap()).unwrap());
        assert!(!text.contains('\r'), "{text:?}");
        while let Some((event, rest)) = text
            .split_once("\n\n")
            .map(|(event, rest)| (event.to_owned(), rest.to_owned()))
        {
            text = rest;
            let field = |name: &str| {
                event
                    .lines()
                    .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
            };
            match field("event") {
                Some("end") => return (lines, names, true),
                Some(name) => drop(names.insert(name.to_owned())),
                None => {
                    if let Some(data) = field("data") {
                        let line: Value = serde_json::from_str(data).unwrap();
                        assert_eq!(field("id").unwrap(), line["n"].to_string());
                        lines.push(line);
                    }
                }
            }
            if lines.len() >= enough {
                return (lines, names, false);
            }
        }
    }
    (lines, names, false)
}

#[tokio::test]
async fn a_live_log_resumes_without_gap_or_double_while_lines_are_written() {
    const LINES: i64 = 3_000;
    let site = Site::new().await;
    let build = site.start("hello", &push("main", "a", "Ada")).await;
    let writer = async {
        let mut next = 1;
        while next <= LINES {
            let text: Vec<String> = (next..next + 50)
                .map(|n| format!("{n}: 10%\r100%\0\n"))
                .collect();
            let lines: Vec<&[u8]> = text.iter().map(String::as_bytes).collect();
            next = site.write(&build, next, &lines).await;
            tokio::task::yield_now().await;
        }
        site.app
            .store
            .begin_stage(&build, Stage::Test)
            .await
            .unwrap();
        site.app
            .store
            .finish(&build, Status::Passed, Outcome::Live, None)
            .await
            .unwrap();
    };
    let reader = async {
        let mut seen: Vec<Value> = Vec::new();
        for enough in (1..).map(|turn| turn * 37) {
            let after = seen.last().map(|line| line["n"].as_i64().unwrap());
            let (lines, _, has_ended) = watch(&site, after, enough).await;
            seen.extend(lines);
            if has_ended {
                break;
            }
        }
        seen
    };
    let ((), seen) = tokio::join!(writer, reader);
    let numbers: Vec<i64> = seen
        .iter()
        .map(|line| line["n"].as_i64().unwrap())
        .collect();
    assert_eq!(numbers, (1..=LINES).collect::<Vec<_>>());
    assert_eq!(seen[0]["text"], "1: 10%\r100%\0");
    assert_eq!(seen[0]["spans"], json!([{"class": "", "text": "100%0%"}]));
    assert_eq!(seen[0]["stage"], "test");
}

/// The state of the server's end of a connection, as the kernel has it; empty where it is gone.
fn state_at_server(server: SocketAddr, viewer: SocketAddr) -> String {
    let (server, viewer) = (
        format!(":{:04X}", server.port()),
        format!(":{:04X}", viewer.port()),
    );
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let mut rows = table
        .lines()
        .map(|row| row.split_whitespace().collect::<Vec<_>>());
    rows.find(|row| row[1].ends_with(&server) && row[2].ends_with(&viewer))
        .map_or_else(String::new, |row| row[3].to_owned())
}

#[tokio::test]
async fn a_viewer_that_does_not_read_is_dropped_and_goes_on_where_it_was() {
    const LINES: i64 = 2_000;
    const ESTABLISHED: &str = "01";
    let site = Site::new().await;
    let build = site.start("hello", &push("main", "a", "Ada")).await;
    let long = "x".repeat(16_000);
    for first in (1..=LINES).step_by(50) {
        let text: Vec<String> = (first..first + 50)
            .map(|n| format!("{n} {long}\n"))
            .collect();
        let lines: Vec<&[u8]> = text.iter().map(String::as_bytes).collect();
        site.write(&build, first, &lines).await;
    }
    let store = &site.app.store;
    store
        .finish(&build, Status::Passed, Outcome::Live, None)
        .await
        .unwrap();

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut limits = server::Limits::of_process();
    limits.unread = Duration::from_secs(2);
    tokio::spawn(server::serve(
        listener,
        site.routes.clone(),
        limits,
        site.app.shutdown.clone(),
    ));
    let mut stream = TcpStream::connect(address).await.unwrap();
    let ask = format!(
        "GET /api/builds/{}/log/live HTTP/1.1\r\nhost: localhost\r\n\r\n",
        build.id
    );
    stream.write_all(ask.as_bytes()).await.unwrap();
    let viewer = stream.local_addr().unwrap();
    timeout(2 * ANSWER_LIMIT, async {
        while state_at_server(address, viewer) == ESTABLISHED {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await
    .expect("a viewer that reads nothing keeps its connection");

    let mut got = Vec::new();
    let _ = timeout(ANSWER_LIMIT, stream.read_to_end(&mut got))
        .await
        .unwrap();
    let got = String::from_utf8_lossy(&got);
    assert!(
        !got.contains("event: end"),
        "it got everything: nothing was tried"
    );
    // A browser counts what it got whole.
    let whole = got.rsplit_once("\n\n").map_or("", |(whole, _)| whole);
    let last = whole
        .rsplit_once("\nid: ")
        .unwrap()
        .1
        .lines()
        .next()
        .unwrap();
    let last = last.trim().parse().unwrap();
    let (lines, _, has_ended) = watch(&site, Some(last), usize::MAX).await;
    let numbers: Vec<i64> = lines
        .iter()
        .map(|line| line["n"].as_i64().unwrap())
        .collect();
    assert_eq!(numbers, (last + 1..=LINES).collect::<Vec<_>>());
    assert!(has_ended);
}

/// More viewers than one, each from another line on: one that is ahead keeps nobody from the lines behind it.
#[tokio::test]
async fn viewers_of_one_build_get_each_line_once_wherever_they_begin() {
    const LINES: i64 = 4_000;
    let site = Site::new().await;
    let build = site.start("hello", &push("main", "a", "Ada")).await;
    let long = "y".repeat(200);
    let writer = async {
        for first in (1..=LINES).step_by(200) {
            let text: Vec<String> = (first..first + 200)
                .map(|n| format!("{n} {long}\n"))
                .collect();
            let lines: Vec<&[u8]> = text.iter().map(String::as_bytes).collect();
            site.write(&build, first, &lines).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let store = &site.app.store;
        store
            .finish(&build, Status::Passed, Outcome::Live, None)
            .await
            .unwrap();
    };
    let starts = [None, Some(1), Some(700), Some(3_999), Some(1_000_000)];
    let viewers = starts.map(|after| watch(&site, after, usize::MAX));
    let ((), seen) = tokio::join!(writer, futures_util::future::join_all(viewers));
    for (after, (lines, _, has_ended)) in starts.into_iter().zip(seen) {
        let numbers: Vec<i64> = lines
            .iter()
            .map(|line| line["n"].as_i64().unwrap())
            .collect();
        let wanted: Vec<i64> = (after.unwrap_or(0) + 1..=LINES).collect();
        assert_eq!(numbers, wanted, "from {after:?} on");
        assert!(has_ended, "from {after:?} on");
    }
}

#[tokio::test]
async fn a_live_log_tells_of_stages_and_ends_with_the_build() {
    let site = Site::new().await;
    let build = site.start("hello", &push("main", "a", "Ada")).await;
    let store = &site.app.store;
    let steps = async {
        store.begin_stage(&build, Stage::Checkout).await.unwrap();
        site.write(&build, 1, &[b"\xff\xed\xa0\x80 no UTF-8\n"])
            .await;
        store
            .end_stage(&build, Stage::Checkout, StageStatus::Passed, None)
            .await
            .unwrap();
        store
            .finish(&build, Status::Passed, Outcome::Live, None)
            .await
            .unwrap();
    };
    let (_, (lines, names, has_ended)) = tokio::join!(steps, watch(&site, None, usize::MAX));
    assert!(has_ended);
    assert_eq!(
        names,
        BTreeSet::from(["build".to_owned(), "stage".to_owned()])
    );
    assert!(lines[0]["text"].as_str().unwrap().ends_with(" no UTF-8"));
    let (lines, _, has_ended) = watch(&site, Some(1), usize::MAX).await;
    assert!(lines.is_empty() && has_ended);
}

#[tokio::test]
async fn a_live_log_ends_with_the_agent() {
    let site = Site::new().await;
    site.start("hello", &push("main", "a", "Ada")).await;
    let stop = async {
        tokio::task::yield_now().await;
        site.app.shutdown.cancel();
    };
    let ((lines, _, has_ended), ()) = tokio::join!(watch(&site, None, usize::MAX), stop);
    assert!(lines.is_empty() && !has_ended);
}

#[tokio::test]
async fn a_wrong_place_to_go_on_is_refused() {
    let site = Site::new().await;
    site.queue("hello", &push("main", "a", "Ada")).await;
    for odd in ["x", "-1", "1.5", "99999999999999999999"] {
        let request = Request::get("/api/builds/1/log/live").header("last-event-id", odd);
        assert_eq!(
            site.send(request, "").await.status,
            StatusCode::BAD_REQUEST,
            "{odd}"
        );
        let answer = site
            .get(&format!("/api/builds/1/log/live?after={odd}"))
            .await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{odd}");
    }
}

#[tokio::test]
async fn files_are_kept_by_their_hash() {
    let site = Site::new().await;
    let html = site.page("/").await;
    let path = html
        .split('"')
        .find(|text| text.ends_with("/style.css"))
        .unwrap();
    let answer = site.get(path).await;
    assert_eq!(answer.header("content-type"), "text/css; charset=utf-8");
    assert!(answer.header("cache-control").contains("immutable"));
    let tag = answer.header("etag").to_owned();
    let again = site
        .send(Request::get(path).header(header::IF_NONE_MATCH, &tag), "")
        .await;
    assert_eq!(
        (again.status, again.body.len()),
        (StatusCode::NOT_MODIFIED, 0)
    );
    let old = site.get("/static/0000/style.css").await;
    assert_eq!(
        (old.status, old.header("cache-control")),
        (StatusCode::OK, "no-cache")
    );
    let icon = site.get("/favicon.svg?status=failed").await;
    assert_eq!(icon.header("content-type"), "image/svg+xml");
    assert_ne!(icon.body, site.get("/favicon.svg").await.body);
    let odd = site.get("/favicon.svg?status=%22%3E%3Cscript%3E").await;
    assert!(!odd.text().contains("script"));
}

#[tokio::test]
async fn only_what_serves_now_is_called_live() {
    let site = Site::new().await;
    for title in ["first", "second"] {
        let build = site.start("hello", &push("main", title, "Ada")).await;
        let release = Release {
            environment: "hello".to_owned(),
            build_id: build.id,
            commit: build.commit.clone(),
            image: "hello@sha256:0".to_owned(),
            namespace: "hello-ns".to_owned(),
            set_hash: "0".to_owned(),
            ..Release::default()
        };
        let id = site.app.store.plan_release(&build, &release).await.unwrap();
        site.app
            .store
            .release_is_live(&build, &Release { id, ..release }, &[])
            .await
            .unwrap();
        let store = &site.app.store;
        assert!(
            store
                .finish(&build, Status::Passed, Outcome::Live, None)
                .await
                .unwrap()
        );
    }
    let html = site.page("/").await;
    assert_eq!(html.matches(">Live<").count(), 1);
    assert!(html.contains("is live") && html.contains("release 2"));
    assert!(site.page("/builds/1").await.contains(">Went live<"));
    assert!(site.page("/builds/2").await.contains(">Live<"));
    let told = site.get("/api/environments").await.json();
    assert_eq!(
        told["environments"][0]["deployed"],
        json!({"commit": COMMIT, "release": 2})
    );
}
