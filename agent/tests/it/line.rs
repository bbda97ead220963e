//! The whole line from outside: push, then look.

use serde_json::{Value, json};

use crate::docker_world::docker;
use crate::fake_github::{FakeGithub, TOKEN};
use crate::forward_proxy::ForwardProxy;
use crate::landfall::{BRANCH, Landfall, is_terminal, push_payload, secret, sign};
use crate::support::{Namespace, agent_kubeconfig, busybox, eventually, registry};
use crate::tls::{Certificate, Tls};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn titles(build: &Value) -> Vec<&str> {
    build["stages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|stage| stage["title"].as_str().unwrap())
        .collect()
}

/// Of the newest build; how that ended.
async fn rerun(landfall: &Landfall, id: i64) -> Value {
    let (status, answer) = landfall
        .write(&format!("/api/builds/{id}/rerun"), json!({}))
        .await;
    assert_eq!(status, 202, "{answer}");
    landfall.end(id + 1).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_goes_live_through_six_stages() {
    let mut landfall = Landfall::start("line").await;
    // Where a payload says that the repository is, nobody goes.
    let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    elsewhere.set_nonblocking(true).unwrap();
    let lure = format!("http://{}/hello.git", elsewhere.local_addr().unwrap());
    let commit = landfall.commit(&[]);
    let mut payload = landfall.payload(&commit);
    for field in ["clone_url", "git_url", "ssh_url", "url", "html_url"] {
        payload["repository"][field] = json!(lure);
    }
    let (status, answer) = landfall.deliver(&payload).await;
    assert_eq!(status, 202, "{answer}");
    let id = answer["builds"][0]["build"].as_i64().unwrap();
    let build = landfall.end(id).await;
    let log = landfall.log(id).await;
    assert_eq!(
        (&build["status"], &build["outcome"]),
        (&json!("passed"), &json!("live")),
        "{build:#}\n{log}"
    );
    let six = [
        "Checkout Code",
        "Build Docker Image",
        "Test",
        "Deploy to Kubernetes",
        "Verify Deployment",
        "Smoke Test",
    ];
    assert_eq!(titles(&build), six);
    assert!(
        landfall
            .served("/version")
            .contains(build["commit"].as_str().unwrap())
    );
    assert!(
        elsewhere.accept().is_err(),
        "the payload's address was asked"
    );
    assert!(log.contains("test greeting ... ok"), "{log}");
    for shown in ["deployment/hello", "service/hello", "hello-"] {
        assert!(log.contains(shown), "the log does not show {shown}:\n{log}");
    }

    // GitHub delivers again: the same build, and nothing runs.
    let payload = push_payload(
        "acme/hello",
        "refs/heads/main",
        crate::landfall::ZERO,
        build["commit"].as_str().unwrap(),
    );
    let (status, answer) = landfall.deliver(&payload).await;
    assert_eq!(status, 202);
    assert_eq!(
        answer["builds"][0],
        json!({ "build": id, "environment": "hello", "status": "passed", "duplicate": true })
    );

    // The same commit again, by hand: passed, and unchanged.
    let again = rerun(&landfall, id).await;
    assert_eq!(
        (&again["status"], &again["outcome"]),
        (&json!("passed"), &json!("unchanged")),
        "{again:#}\n{}",
        landfall.log(id + 1).await
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_killed_in_any_stage_goes_on_and_ends_right() {
    let mut landfall = Landfall::start("kill").await;
    let slow_test = "sleep 2; grep -q Hello /www/index.html && echo ok";
    let slow_start = "sleep 2; exec httpd -f -p 5000 -h /www";
    for stage in [
        "checkout",
        "image",
        "test",
        "deploy",
        "verify",
        "smoke_test",
    ] {
        let mut tries = 0;
        // A stage that takes milliseconds may be over when the kill comes: then once more.
        while !killed_in(
            &mut landfall,
            stage,
            &[("test.sh", slow_test), ("start.sh", slow_start)],
        )
        .await
        {
            tries += 1;
            assert!(tries < 8, "the kill always came too late for {stage}");
        }
    }
}

/// Pushes, kills the agent in that stage, starts it again and sees the build end right. Whether the kill was in time.
async fn killed_in(landfall: &mut Landfall, stage: &str, files: &[(&str, &str)]) -> bool {
    let greeting = format!("Hello {stage} {:?}", std::time::Instant::now());
    let id = landfall
        .push(&[files, &[("www/index.html", greeting.as_str())]].concat())
        .await;
    landfall.reach(id, stage).await;
    landfall.kill();
    landfall.run().await;
    let seen = landfall.log(id).await;
    let build = landfall.end(id).await;
    let log = landfall.log(id).await;
    assert_eq!(
        build["status"], "passed",
        "killed in {stage}: {build:#}\n{log}"
    );
    assert_eq!(
        landfall.served("/index.html").trim(),
        greeting,
        "killed in {stage}"
    );
    assert!(
        landfall
            .served("/version")
            .contains(build["commit"].as_str().unwrap())
    );
    assert_eq!(
        build["outcome"], "live",
        "killed in {stage}: {build:#}\n{seen}"
    );
    let resumed = build["stages"]
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["stage"] == stage)
        .unwrap();
    resumed["attempt"] == 2
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_push_takes_the_place_of_one_that_has_not_begun_to_deploy() {
    let mut landfall = Landfall::start("supersede").await;
    let first = landfall.push(&[("test.sh", "sleep 60")]).await;
    landfall.reach(first, "test").await;
    let second = landfall.push(&[("test.sh", "echo ok")]).await;
    let (first, second) = (landfall.end(first).await, landfall.end(second).await);
    assert_eq!(
        (&first["status"], &first["outcome"]),
        (&json!("superseded"), &json!("unchanged")),
        "{first:#}"
    );
    assert_eq!(second["status"], "passed", "{second:#}");
    assert!(
        landfall
            .served("/version")
            .contains(second["commit"].as_str().unwrap())
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_build_can_be_canceled_and_rerun() {
    let mut landfall = Landfall::start("cancel").await;
    let id = landfall.push(&[("test.sh", "sleep 10")]).await;
    landfall.reach(id, "test").await;
    let (status, _) = landfall
        .write(&format!("/api/builds/{id}/cancel"), json!({}))
        .await;
    assert_eq!(status, 202);
    let begun = std::time::Instant::now();
    let build = landfall.end(id).await;
    assert_eq!(build["status"], "canceled", "{build:#}");
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "canceling took {:?}",
        begun.elapsed()
    );
    let again = rerun(&landfall, id).await;
    assert_eq!(
        (&again["kind"], &again["outcome"], &again["commit"]),
        (&json!("rerun"), &json!("live"), &build["commit"]),
        "{again:#}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_fault_of_the_author_is_named_and_changes_nothing() {
    let mut landfall = Landfall::start("faults").await;
    let good = landfall.push(&[]).await;
    assert_eq!(landfall.end(good).await["status"], "passed");
    let serving = landfall.served("/version");
    let site = |name: &str| {
        std::fs::read_to_string(format!(
            "{}/tests/fixtures/hello/{name}",
            env!("CARGO_MANIFEST_DIR")
        ))
        .unwrap()
    };
    let cluster_role =
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata:\n  name: mine\n";
    let elsewhere =
        "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: mine\n  namespace: kube-system\n";
    let cases: [(&str, &str, String, &str, &str); 6] = [
        (
            "a red test",
            "test.sh",
            "echo 'test sums ... FAILED'; exit 3".to_owned(),
            "tests_failed",
            "unit tests",
        ),
        (
            "a failing Dockerfile",
            "Dockerfile",
            format!("{}\nRUN false\n", site("Dockerfile")),
            "image_build_failed",
            "RUN false",
        ),
        (
            "a typo in pipeline.yaml",
            "pipeline.yaml",
            site("pipeline.yaml").replace("smoke_test", "smoketest"),
            "pipeline_invalid",
            "smoketest",
        ),
        (
            "a kind that is not allowed",
            "kubernetes/mine.yaml",
            cluster_role.to_owned(),
            "policy_denied",
            "ClusterRole",
        ),
        (
            "another namespace",
            "kubernetes/mine.yaml",
            elsewhere.to_owned(),
            "",
            "kube-system",
        ),
        (
            "broken YAML",
            "kubernetes/mine.yaml",
            "kind: [".to_owned(),
            "",
            "mine.yaml",
        ),
    ];
    for (name, path, text, cause, named) in cases {
        let before = if path == "kubernetes/mine.yaml" {
            String::new()
        } else {
            site(path)
        };
        let id = landfall.push(&[(path, &text)]).await;
        let build = landfall.end(id).await;
        let log = landfall.log(id).await;
        assert_eq!(
            (&build["status"], &build["outcome"]),
            (&json!("failed"), &json!("unchanged")),
            "{name}: {build:#}\n{log}"
        );
        assert!(
            cause.is_empty() || build["cause"]["id"] == cause,
            "{name}: {:#}",
            build["cause"]
        );
        assert!(
            log.contains(named),
            "{name}: the log does not name {named:?}\n{log}"
        );
        assert_eq!(
            landfall.served("/version"),
            serving,
            "{name}: the cluster was changed"
        );
        if before.is_empty() {
            std::fs::remove_file(landfall.path("work").join(path)).unwrap();
        } else {
            std::fs::write(landfall.path("work").join(path), before).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_answer_to_the_smoke_test_fails_the_build() {
    let mut landfall = Landfall::start("smoke").await;
    let pipeline = std::fs::read_to_string(landfall.path("work/pipeline.yaml")).unwrap();
    let id = landfall
        .push(&[(
            "pipeline.yaml",
            &pipeline.replace("status: 200", "status: 204"),
        )])
        .await;
    let build = landfall.end(id).await;
    assert_eq!(
        (&build["status"], &build["outcome"]),
        (&json!("failed"), &json!("left_failed")),
        "{build:#}"
    );
    assert!(
        build["cause"]["id"].as_str().unwrap().starts_with("smoke_"),
        "{:#}",
        build["cause"]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_live_log_is_read_while_the_build_runs() {
    let mut landfall = Landfall::start("sse").await;
    let id = landfall
        .push(&[(
            "test.sh",
            "for i in 1 2 3 4 5; do printf 'tick %s\\r' $i; sleep 0.5; done; echo; echo done",
        )])
        .await;
    landfall.reach(id, "test").await;
    // curl is a real client: it ends when the server says that the build has ended.
    let output = tokio::process::Command::new("curl")
        .args([
            "-sN",
            "--max-time",
            "120",
            &landfall.url(&format!("/api/builds/{id}/log/live")),
        ])
        .output()
        .await
        .unwrap();
    assert!(output.status.success());
    let events = String::from_utf8(output.stdout).unwrap();
    assert!(
        !events.contains('\r'),
        "a carriage return would end a line of the stream"
    );
    let mut numbers = Vec::new();
    for event in events.split("\n\n") {
        let Some(number) = event.lines().find_map(|line| line.strip_prefix("id:")) else {
            continue;
        };
        let data = event
            .lines()
            .find_map(|line| line.strip_prefix("data:"))
            .unwrap();
        let data: Value = serde_json::from_str(data).unwrap();
        assert!(
            data["text"].is_string() && data["stage"].is_string(),
            "{data}"
        );
        numbers.push(number.trim().parse::<i64>().unwrap());
    }
    let expected: Vec<i64> = (1..=numbers.len() as i64).collect();
    assert_eq!(numbers, expected, "gaps or doubles");
    assert!(
        events.contains("tick 5") && events.contains("passed"),
        "{events}"
    );
    let build = landfall.build(id).await;
    assert!(is_terminal(&build));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signature_that_is_not_right_is_401_and_leaves_nothing() {
    let landfall = Landfall::start("signature").await;
    let body = push_payload(
        "acme/hello",
        "refs/heads/main",
        &"a".repeat(40),
        &"b".repeat(40),
    )
    .to_string();
    let good = sign(secret(), body.as_bytes());
    let other = sign("another secret of more than 32 bytes here", body.as_bytes());
    let upper = good.to_uppercase().replace("SHA256=", "sha256=");
    let table: Vec<(&str, Vec<(&str, &str)>)> = vec![
        ("none", vec![]),
        ("empty", vec![("x-hub-signature-256", "")]),
        ("no digits", vec![("x-hub-signature-256", "sha256=")]),
        (
            "too short",
            vec![("x-hub-signature-256", &good[..good.len() - 1])],
        ),
        ("of another secret", vec![("x-hub-signature-256", &other)]),
        ("upper case", vec![("x-hub-signature-256", &upper)]),
        (
            "without its name",
            vec![("x-hub-signature-256", &good["sha256=".len()..])],
        ),
        (
            "twice, good and bad",
            vec![
                ("x-hub-signature-256", &good),
                ("x-hub-signature-256", &other),
            ],
        ),
        (
            "twice, bad and good",
            vec![
                ("x-hub-signature-256", &other),
                ("x-hub-signature-256", &good),
            ],
        ),
        (
            "sha1 only",
            vec![(
                "x-hub-signature",
                "sha1=0123456789012345678901234567890123456789",
            )],
        ),
    ];
    for (name, headers) in table {
        let (status, answer) = landfall
            .post("push", &headers, body.clone().into_bytes())
            .await;
        assert_eq!(
            (status, answer["error"].as_str()),
            (401, Some("the signature is missing or wrong")),
            "{name}"
        );
    }
    let deep = "[".repeat(1 << 20);
    assert_eq!(
        landfall
            .post("push", &[("x-hub-signature-256", &good)], deep.into_bytes())
            .await
            .0,
        401
    );
    assert_eq!(landfall.get("/api/builds").await["builds"], json!([]));

    // Nor is the delivery itself in the store's files; a signed one is.
    let is_stored = || {
        ["landfall.db", "landfall.db-wal"].iter().any(|file| {
            let bytes = std::fs::read(landfall.path("data").join(file)).unwrap_or_default();
            bytes.windows(40).any(|found| found == [b'b'; 40])
        })
    };
    assert!(!is_stored());
    let headers = [("x-hub-signature-256", good.as_str())];
    let (status, _) = landfall.post("push", &headers, body.into_bytes()).await;
    assert_eq!((status, is_stored()), (202, true));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_delivery_that_is_no_push_for_us_is_said_to_be_ignored() {
    let landfall = Landfall::start("ignored").await;
    let (a, b, zero) = ("a".repeat(40), "b".repeat(40), "0".repeat(40));
    let mut deleted = push_payload("acme/hello", "refs/heads/main", &a, &zero);
    deleted["deleted"] = json!(true);
    let table = [
        ("ping", json!({ "zen": "Keep it logically awesome." })),
        ("issues", json!({ "action": "opened" })),
        (
            "push",
            push_payload("acme/hello", "refs/heads/other", &a, &b),
        ),
        ("push", push_payload("acme/hello", "refs/tags/v1", &a, &b)),
        (
            "push",
            push_payload("acme/unknown", "refs/heads/main", &a, &b),
        ),
        ("push", deleted),
    ];
    // A ref is text, whatever it holds.
    let long = format!("refs/heads/{}", "ä".repeat(120));
    let hostile = [
        "refs/heads/main;reboot",
        "refs/heads/$(reboot)",
        "refs/heads/ma in",
        "refs/heads/--upload-pack=reboot",
        "refs/heads/../main",
        "refs/heads/main\u{0}",
        "refs/heads/",
        "main",
        &long,
    ];
    let hostile = hostile.map(|reference| {
        let payload = push_payload("acme/hello", reference, &a, &b);
        ("push", payload)
    });
    for (event, payload) in table.into_iter().chain(hostile) {
        let body = payload.to_string();
        let (status, answer) = landfall
            .post(
                event,
                &[("x-hub-signature-256", &sign(secret(), body.as_bytes()))],
                body.into_bytes(),
            )
            .await;
        assert!(
            status == 200 && answer["ignored"].is_string(),
            "{event} {payload}: {status} {answer}"
        );
    }
    for bad in [
        "",
        "not json",
        "[0]",
        "{}",
        "{\"ref\": 5}",
        "{\"ref\":\"refs/heads/main\",\"before\":\"x\",\"after\":\"y\",\"repository\":{\"full_name\":\"acme/hello\"}}",
        &"[".repeat(100_000),
    ] {
        let (status, _) = landfall
            .post(
                "push",
                &[("x-hub-signature-256", &sign(secret(), bad.as_bytes()))],
                bad.as_bytes().to_vec(),
            )
            .await;
        assert_eq!(status, 400, "{bad:.60}");
    }
    let large = vec![b' '; 26 << 20];
    let status = landfall
        .post(
            "push",
            &[("x-hub-signature-256", &sign(secret(), &large))],
            large,
        )
        .await
        .0;
    assert_eq!(status, 413);
    // Nobody says how much comes.
    let piece = vec![b' '; 1 << 20];
    let pieces = (0..26).map(move |_| Ok::<_, std::io::Error>(piece.clone()));
    let pieces = reqwest::Body::wrap_stream(tokio_stream::iter(pieces));
    let endless = landfall
        .request(reqwest::Method::POST, "/webhook")
        .header("x-github-event", "push")
        .header("content-type", "application/json")
        .header("x-hub-signature-256", sign(secret(), b""))
        .body(pieces);
    assert_eq!(endless.send().await.unwrap().status(), 413);
    let body = b"{}".to_vec();
    let headers = [
        ("x-hub-signature-256", sign(secret(), &body)),
        ("content-encoding", "gzip".to_owned()),
    ];
    let headers: Vec<_> = headers
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    assert_eq!(landfall.post("push", &headers, body).await.0, 415);
    assert_eq!(landfall.get("/api/builds").await["builds"], json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_is_built_for_each_environment_of_its_branch_at_once_or_in_turns() {
    let mut landfall = Landfall::start("several").await;
    let second = Namespace::new("several-too");
    let rights = agent_kubeconfig(&second.0);
    std::fs::write(landfall.path("second.kubeconfig"), rights).unwrap();
    let environment = format!(
        "environments:\n  - name: second\n    repository: acme/hello\n    branch: {BRANCH}\n    clone_url: {}\n    \
         webhook_secrets: [{}]\n    kubeconfig: second.kubeconfig\n    namespace: {namespace}\n    \
         image_prefix: {}/{namespace}\n    build_args: {{ BASE: \"{}\" }}\n",
        landfall.git_url(),
        secret(),
        registry(),
        busybox(),
        namespace = second.0,
    );
    landfall.restart("environments:\n", &environment, &[]).await;
    let times = |build: &Value| {
        let at = |key: &str| build[key].as_i64().unwrap();
        at("started_at")..at("finished_at")
    };
    let both = async |landfall: &mut Landfall, test: &str| {
        let id = landfall.push(&[("test.sh", test)]).await;
        let builds = [landfall.end(id).await, landfall.end(id + 1).await];
        let mut names = builds
            .each_ref()
            .map(|build| build["environment"].as_str().unwrap());
        names.sort_unstable();
        assert_eq!(names, ["hello", "second"]);
        builds
    };

    let [one, other] = both(&mut landfall, "sleep 3").await;
    assert_eq!([&one["outcome"], &other["outcome"]], ["live", "live"]);
    let (a, b) = (times(&one), times(&other));
    assert!(a.start < b.end && b.start < a.end, "{a:?} {b:?}");

    let in_turns = "data_dir: data\nbuilds_at_once: 1\n";
    landfall.restart("data_dir: data\n", in_turns, &[]).await;
    let [one, other] = both(&mut landfall, "exit 1").await;
    assert_eq!([&one["status"], &other["status"]], ["failed", "failed"]);
    let (a, b) = (times(&one), times(&other));
    assert!(a.end <= b.start || b.end <= a.start, "{a:?} {b:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_webhook_may_have_an_address_and_two_secrets_of_its_own_and_the_page_a_token() {
    let mut landfall = Landfall::start("apart").await;
    let port = crate::landfall::free_port();
    let apart = format!("\nwebhook_listen: 127.0.0.1:{port}\nread_access: token\ndata_dir:");
    landfall.restart("\ndata_dir:", &apart, &[]).await;
    let newer = "a newer secret of more than 32 bytes";
    let both = format!("webhook_secrets: [{newer}, {}]", secret());
    let one = format!("webhook_secrets: [{}]", secret());
    landfall.restart(&one, &both, &[]).await;

    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let elsewhere = format!("http://127.0.0.1:{port}");
    let commit = landfall.commit(&[]);
    let body = landfall.payload(&commit).to_string();
    for (key, status, is_repeated) in [
        (newer, 202, json!(false)),
        (secret(), 202, json!(true)),
        (
            "a secret of nobody, of more than 32 bytes",
            401,
            Value::Null,
        ),
    ] {
        let delivery = http
            .post(format!("{elsewhere}/webhook"))
            .header("x-github-event", "push")
            .header("content-type", "application/json")
            .header("x-hub-signature-256", sign(key, body.as_bytes()))
            .body(body.clone());
        let answer = delivery.send().await.unwrap();
        assert_eq!(answer.status(), status, "{key}");
        let answer: Value = answer.json().await.unwrap_or_default();
        assert_eq!(answer["builds"][0]["duplicate"], is_repeated, "{answer}");
    }
    // Each has its own place, and no other.
    let signed = sign(secret(), body.as_bytes());
    let signed = [("x-hub-signature-256", signed.as_str())];
    let (status, _) = landfall.post("push", &signed, body.into_bytes()).await;
    assert!(matches!(status, 404 | 405), "{status}");
    let token = std::fs::read_to_string(landfall.path("data/admin-token")).unwrap();
    for path in ["/", "/api/builds", "/metrics"] {
        let there = http.get(format!("{elsewhere}{path}"));
        let there = there.bearer_auth(token.trim()).send().await.unwrap();
        assert_eq!(there.status(), 404, "{path}");
        // Numbers alone are everybody's.
        let wanted = if path == "/metrics" { 200 } else { 401 };
        let without = landfall.request(reqwest::Method::GET, path);
        assert_eq!(without.send().await.unwrap().status(), wanted, "{path}");
    }
    let get = || landfall.request(reqwest::Method::GET, "/api/builds");
    let bearer = get().bearer_auth(token.trim()).send().await.unwrap();
    assert_eq!(bearer.status(), 200);
    let basic = get().basic_auth("anybody", Some(token.trim()));
    assert_eq!(basic.send().await.unwrap().status(), 200);
    let wrong = get().basic_auth("anybody", Some("wrong"));
    assert_eq!(wrong.send().await.unwrap().status(), 401);
    // Another site could make a browser send a password.
    let write = landfall.request(reqwest::Method::POST, "/api/builds");
    let write = write
        .basic_auth("anybody", Some(token.trim()))
        .json(&json!({}));
    assert_eq!(write.send().await.unwrap().status(), 401);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_form_delivery_is_read_as_a_json_one() {
    let mut landfall = Landfall::start("form").await;
    let after = landfall.commit(&[("test.sh", "exit 1")]);
    let payload = landfall.payload(&after).to_string();
    let body: String = url::form_urlencoded::Serializer::new(String::new())
        .append_pair("payload", &payload)
        .finish();
    let headers = [
        (
            "content-type",
            "application/x-www-form-urlencoded".to_owned(),
        ),
        ("x-hub-signature-256", sign(secret(), body.as_bytes())),
    ];
    let headers: Vec<_> = headers
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    let (status, answer) = landfall
        .post("push", &headers, body.clone().into_bytes())
        .await;
    assert_eq!(
        (status, answer["builds"][0]["duplicate"].as_bool()),
        (202, Some(false)),
        "{answer}"
    );
    let twice = format!("{body}&{body}");
    let signature = sign(secret(), twice.as_bytes());
    let headers = [
        ("content-type", "application/x-www-form-urlencoded"),
        ("x-hub-signature-256", signature.as_str()),
    ];
    assert_eq!(
        landfall.post("push", &headers, twice.into_bytes()).await.0,
        400
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writes_need_the_token_and_pages_their_own_host() {
    let landfall = Landfall::start("guard").await;
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let status =
        async |request: reqwest::RequestBuilder| request.send().await.unwrap().status().as_u16();
    for path in ["/api/builds", "/api/builds/1/cancel", "/api/builds/1/rerun"] {
        assert_eq!(status(http.post(landfall.url(path))).await, 401, "{path}");
        assert_eq!(
            status(http.post(landfall.url(path)).bearer_auth("wrong")).await,
            401,
            "{path}"
        );
    }
    for path in ["/", "/api/builds"] {
        assert_eq!(
            status(http.get(landfall.url(path)).header("host", "evil.example")).await,
            421,
            "{path}"
        );
        assert_eq!(
            status(
                http.get(landfall.url(path))
                    .header("origin", "http://evil.example")
            )
            .await,
            403,
            "{path}"
        );
        assert_eq!(status(http.get(landfall.url(path))).await, 200, "{path}");
    }
    assert_eq!(
        status(http.get(landfall.url("/healthz")).header("host", "probe")).await,
        200
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_does_not_come_to_the_point_is_closed() {
    let landfall = Landfall::start("silent").await;
    let address = landfall.url("").replace("http://", "");
    for words in ["", "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"] {
        let begun = std::time::Instant::now();
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        stream.write_all(words.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let closed = stream.read_to_end(&mut answer);
        let closed = tokio::time::timeout(Duration::from_secs(20), closed).await;
        assert!(closed.is_ok(), "still open after {:?}", begun.elapsed());
        assert!(begun.elapsed() > Duration::from_secs(8), "closed at once");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_doctor_finds_nothing_wrong_where_all_is_well() {
    let mut landfall = Landfall::start("doctor").await;
    landfall.commit(&[]);
    let (code, said) = landfall.run_command(&["doctor"]);
    assert!(
        code == Some(0) && !said.contains("FAIL"),
        "{code:?}: {said}"
    );
    assert!(said.contains("that releases need"), "{said}");

    // The same where the rest of the world is behind a proxy.
    let proxy = "http://127.0.0.1:1";
    let variables = [
        ("HTTP_PROXY", proxy),
        ("HTTPS_PROXY", proxy),
        ("ALL_PROXY", proxy),
        ("NO_PROXY", ""),
        ("no_proxy", ""),
    ];
    let mut doctor = landfall.command(&["doctor", "--config", "agent.yaml"]);
    let output = doctor.envs(variables).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    landfall
        .restart("data_dir: data\n", "data_dir: data\n", &variables)
        .await;
    let id = landfall.push(&[]).await;
    let build = landfall.end(id).await;
    assert_eq!(build["outcome"], "live", "{build:#}");

    let role = format!(
        "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles/landfall-agent",
        landfall.namespace.0
    );
    let mut less: Value =
        serde_json::from_str(&crate::support::api("GET", &role, None).unwrap()).unwrap();
    for rule in less["rules"].as_array_mut().unwrap() {
        let verbs = rule["verbs"].as_array_mut().unwrap();
        verbs.retain(|verb| verb != "patch");
    }
    crate::support::api("PUT", &role, Some(&less)).unwrap();
    let (code, said) = landfall.run_command(&["doctor"]);
    assert_eq!(code, Some(5), "{said}");
    assert!(
        said.contains("FAIL") && said.contains("patch deployments") && said.contains("kubectl"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_with_another_name_is_known_by_its_number() {
    let landfall = Landfall::start("renamed").await;
    let (status, _) = landfall.deliver(&landfall.payload(&"a".repeat(40))).await;
    assert_eq!(status, 202);
    let mut moved = landfall.payload(&"b".repeat(40));
    moved["before"] = json!("a".repeat(40));
    moved["repository"]["full_name"] = json!("acme/hallo");
    let (status, answer) = landfall.deliver(&moved).await;
    assert!(
        status == 202 && answer["builds"][0]["build"] == 2,
        "{status} {answer}"
    );
    let log = std::fs::read_to_string(landfall.path("agent.log")).unwrap();
    assert!(log.contains("is now called \"acme/hallo\""), "{log}");
    moved["repository"]["id"] = json!(2);
    moved["after"] = json!("c".repeat(40));
    let (status, answer) = landfall.deliver(&moved).await;
    assert!(
        status == 200 && answer["ignored"].is_string(),
        "{status} {answer}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn git_and_github_are_reached_by_the_way_out_that_the_environment_names() {
    let (git, api) = ("git.corp.localhost", "ghe.corp.localhost");
    let mut landfall = Landfall::start("proxied").await;
    let github = FakeGithub::start().await;
    let host = |url: String| url.split('/').nth(2).unwrap().to_owned();
    let names = [(git, host(landfall.git_url())), (api, host(github.url()))];
    let proxy = ForwardProxy::start(&landfall.path(""), names.into()).await;
    let plain = landfall.git_url();
    let hidden = format!("https://{git}/hello.git");
    landfall.restart(&plain, &hidden, &[]).await;
    let variables = [
        ("HTTPS_PROXY", proxy.url()),
        (
            "SSL_CERT_FILE",
            proxy.certificate.file.display().to_string(),
        ),
        ("NO_PROXY", String::new()),
        ("no_proxy", String::new()),
    ];
    let variables = variables
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let told =
        format!("github: {{ api_url: \"https://{api}/api/v3\", token: {TOKEN} }}\nenvironments:");
    landfall.restart("environments:", &told, &variables).await;
    let id = landfall.push(&[]).await;
    let build = landfall.goes_live(id).await;
    let commit = build["commit"].as_str().unwrap();
    eventually("GitHub shows it", Duration::from_secs(30), async || {
        (github.states(commit, "landfall/hello").last()? == "success").then_some(())
    })
    .await;
    let asked = proxy.asked();
    assert!(
        [git, api]
            .iter()
            .all(|name| asked.iter().any(|one| one == name)),
        "{asked:?}"
    );

    // A wrong login: the author reads why, and nobody reads the password.
    let wrong = proxy.url().replace("landfall:", "nobody:");
    let [_, rest @ ..] = variables;
    let variables = [[("HTTPS_PROXY", wrong.as_str())].as_slice(), &rest].concat();
    landfall
        .restart("data_dir: data\n", "data_dir: data\n", &variables)
        .await;
    let id = landfall.push(&[]).await;
    let build = landfall.end(id).await;
    let cause = build["cause"]["sentence"].as_str().unwrap();
    assert!(cause.contains("HTTPS_PROXY"), "{build:#}");
    let own = std::fs::read_to_string(landfall.path("agent.log")).unwrap();
    let said = landfall.log(id).await + &own;
    assert!(!said.contains(ForwardProxy::password()), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_agent_on_the_same_folder_or_port_is_refused_with_what_to_do() {
    let landfall = Landfall::start("second").await;
    let output = landfall
        .command(&["serve", "--config", "agent.yaml"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("another agent") && said.contains("data_dir"),
        "{said}"
    );
    let output = landfall
        .command(&["serve", "--config", "agent.yaml"])
        .env("LANDFALL_DATA_DIR", landfall.path("other"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.code() == Some(2) && said.contains("LANDFALL_LISTEN"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_agent_leaves_its_build_to_the_next_start() {
    let mut landfall = Landfall::start("stop").await;
    let id = landfall.push(&[("test.sh", "sleep 3")]).await;
    landfall.reach(id, "test").await;
    let took = landfall.terminate();
    assert!(took < Duration::from_secs(30), "{took:?}");
    landfall.run().await;
    let build = landfall.end(id).await;
    assert_eq!(
        (&build["status"], build["attempt"].as_i64()),
        (&json!("passed"), Some(2)),
        "{build:#}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manual_build_takes_the_head_of_the_branch() {
    // What git takes as a name is text wherever it goes.
    let branch =
        "feature/$(touch${IFS}/tmp/landfall-ran-a-branch);`id`&'\"<b>{{x}}-größe--upload-pack=x";
    let mut landfall = Landfall::start("manual").await;
    let head = landfall.commit(&[]);
    let named = std::process::Command::new("git")
        .args(["branch", branch, BRANCH])
        .current_dir(landfall.path("hello.git"))
        .status();
    assert!(named.unwrap().success());
    let quoted = format!("branch: {}", json!(branch));
    let usual = format!("branch: {BRANCH}");
    landfall.restart(&usual, &quoted, &[]).await;
    let (status, answer) = landfall
        .write(
            "/api/builds",
            json!({ "environment": "hello", "branch": branch }),
        )
        .await;
    assert_eq!(status, 202, "{answer}");
    let builds = landfall.get("/api/builds").await;
    let build = landfall
        .end(builds["builds"][0]["id"].as_i64().unwrap())
        .await;
    assert_eq!(
        (&build["outcome"], &build["commit"], &build["branch"]),
        (&json!("live"), &json!(head), &json!(branch)),
        "{build:#}"
    );
    eventually(
        "the environment shows what is live",
        Duration::from_secs(5),
        async || {
            landfall
                .get("/api/environments")
                .await
                .to_string()
                .contains(&head)
                .then_some(())
        },
    )
    .await;
    let page = landfall
        .text(&format!("/builds/{}", build["id"].as_i64().unwrap()))
        .await;
    assert!(
        page.contains("{{x}}-größe") && !page.contains("<b>{{x}}"),
        "{page}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_counts_for_its_own_environment_only() {
    let theirs = "the secret of another team of 32 bytes and more";
    let other = format!(
        "  - name: other\n    repository: acme/other\n    branch: main\n    clone_url: https://127.0.0.1:1/other.git\n    \
         webhook_secrets: [{theirs}]\n    namespace: other\n    image_prefix: localhost:1\n"
    );
    let landfall = Landfall::start_with("secrets", &other).await;
    let body = push_payload(
        "acme/hello",
        "refs/heads/main",
        &"a".repeat(40),
        &"b".repeat(40),
    )
    .to_string();
    let signature = sign(theirs, body.as_bytes());
    let (status, _) = landfall
        .post(
            "push",
            &[("x-hub-signature-256", &signature)],
            body.into_bytes(),
        )
        .await;
    assert_eq!(status, 401, "signed by another environment's secret");
    assert_eq!(landfall.get("/api/builds").await["builds"], json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_or_engine_that_is_away_ends_as_errored_and_never_as_failed() {
    let away = "    limits: { unreachable_seconds: 2 }\ndocker: { host: \"tcp://127.0.0.1:1\" }\n";
    let mut landfall = Landfall::start_with("away", away).await;
    let id = landfall.push(&[]).await;
    let build = landfall.end(id).await;
    assert_eq!(
        (&build["status"], &build["outcome"]),
        (&json!("errored"), &json!("unchanged")),
        "{build:#}"
    );
    let sentence = |build: &Value| build["cause"]["sentence"].as_str().unwrap().to_owned();
    assert!(sentence(&build).contains("Docker"), "{build:#}");

    let rights = std::fs::read_to_string(landfall.path("agent.kubeconfig")).unwrap();
    let server = rights
        .lines()
        .find_map(|line| line.trim().strip_prefix("server: "))
        .unwrap();
    let nowhere = rights.replace(server, "https://127.0.0.1:1");
    std::fs::write(landfall.path("agent.kubeconfig"), nowhere).unwrap();
    landfall
        .restart("docker: { host: \"tcp://127.0.0.1:1\" }\n", "", &[])
        .await;
    let id = landfall.push(&[]).await;
    let build = landfall.end(id).await;
    assert_eq!(
        (&build["status"], &build["outcome"], &build["stage"]),
        (&json!("errored"), &json!("unchanged"), &json!("deploy")),
        "{build:#}"
    );
    assert!(
        sentence(&build).contains("the cluster at https://127.0.0.1:1"),
        "{build:#}"
    );
    let log = landfall.log(id).await;
    assert!(log.contains("waiting for the cluster at"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_path_of_the_openapi_description_is_there() {
    let landfall = Landfall::start("openapi").await;
    let description = landfall.get("/api/openapi.json").await;
    let paths = description["paths"].as_object().unwrap();
    assert!(paths.len() >= 15, "{}", paths.len());
    for (path, methods) in paths {
        let path = path.replace("{id}", "1").replace("{name}", "hello");
        for method in methods.as_object().unwrap().keys() {
            let request = match method.as_str() {
                "get" => landfall.request(reqwest::Method::GET, &path),
                _ => landfall.request(reqwest::Method::POST, &path),
            };
            let answer = request.send().await.unwrap();
            let (status, text) = (answer.status().as_u16(), answer.text().await.unwrap());
            assert!(
                !text.contains("no such path") && status != 405,
                "{method} {path}: {status} {text}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_comes_over_https_and_only_from_who_is_trusted() {
    let mut landfall = Landfall::start("https").await;
    let certificate = Certificate::make(&landfall.path(""), &["localhost"]);
    let plain = landfall.git_url();
    let server = plain.split('/').nth(2).unwrap();
    let tls = Tls::before(server, &certificate);
    let https = format!("https://localhost:{}/hello.git", tls.port);
    landfall.restart(&plain, &https, &[]).await;
    let begun = std::time::Instant::now();
    let id = landfall.push(&[]).await;
    let refused = landfall.end(id).await;
    assert!(
        begun.elapsed() < Duration::from_secs(30),
        "it was waited for"
    );
    let log = landfall.log(id).await;
    assert_eq!(refused["status"], "errored", "{refused:#}\n{log}");
    assert!(
        refused.to_string().to_lowercase().contains("certificate"),
        "{refused:#}\n{log}"
    );

    let trusted = certificate.file.display().to_string();
    landfall
        .restart(&https, &https, &[("SSL_CERT_FILE", &trusted)])
        .await;
    let id = landfall.push(&[("www/index.html", "Hello over TLS")]).await;
    landfall.goes_live(id).await;
    assert!(landfall.log(id).await.contains(&https));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_whose_delivery_never_came_is_built_once() {
    let mut landfall = Landfall::start("missed").await;
    let often = "data_dir: data\nreconcile_seconds: 1\n";
    landfall.restart("data_dir: data\n", often, &[]).await;
    let first = landfall.push(&[("www/index.html", "Hello one")]).await;
    let build = landfall.end(first).await;
    assert_eq!(build["outcome"], "live", "{build:#}");

    let lost = landfall.commit(&[("www/index.html", "Hello two")]);
    let found = eventually("it is found", Duration::from_secs(20), async || {
        let builds = landfall.get("/api/builds").await;
        let newest = &builds["builds"][0];
        (newest["commit"] == lost.as_str()).then(|| newest["id"].as_i64().unwrap())
    })
    .await;
    let build = landfall.end(found).await;
    assert_eq!(build["outcome"], "live", "{build:#}");
    assert_eq!(landfall.served("/index.html").trim(), "Hello two");

    // The delivery comes after all.
    let (status, answer) = landfall.deliver(&landfall.payload(&lost)).await;
    assert_eq!(status, 202, "{answer}");
    assert_eq!(answer["builds"][0]["duplicate"], true, "{answer}");
    assert_eq!(answer["builds"][0]["build"], found, "{answer}");
    let builds = landfall.get("/api/builds").await;
    assert_eq!(builds["builds"].as_array().unwrap().len(), 2, "{builds:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_owns_any_more_is_swept_and_nothing_of_others() {
    let mut landfall = Landfall::start("swept").await;
    let first = landfall.push(&[]).await;
    assert_eq!(landfall.end(first).await["outcome"], "live");
    let works = landfall.path("data/work");
    let of_this_agent = std::fs::read_dir(works)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let work = of_this_agent.join("4711");
    let mirror = landfall.path("data/mirrors/gone-0123456789abcdef.git");
    let own_mirrors = || {
        std::fs::read_dir(landfall.path("data/mirrors"))
            .unwrap()
            .count()
    };
    let before = own_mirrors();
    for folder in [&work, &mirror] {
        std::fs::create_dir_all(folder.join("deep")).unwrap();
    }
    let start = |owner: &str| {
        let owner = format!("landfall.dev/owner={owner}");
        let build = "landfall.dev/build=4711";
        let base = busybox();
        let arguments = [
            "run",
            "-d",
            "--network=none",
            "--label",
            build,
            "--label",
            &owner,
            &base,
            "sleep",
            "600",
        ];
        docker(&arguments).trim().to_owned()
    };
    let left = start(&landfall::stages::test::owner(&work));
    let of_another = start(&landfall::stages::test::owner(std::path::Path::new(
        "/of/another",
    )));
    let is_there = |id: &str| docker(&["ps", "-aq", "--no-trunc"]).contains(id);
    let second = landfall.push(&[("www/index.html", "Hello, too")]).await;
    let second = landfall.end(second).await;
    let tag_of = |build: &serde_json::Value| {
        let (image, _) = build["image"].as_str().unwrap().split_once('@').unwrap();
        format!("{image}:{}", build["commit"].as_str().unwrap())
    };
    let (old, new) = (tag_of(&landfall.build(first).await), tag_of(&second));
    let is_tag =
        |tag: &str| docker(&["images", "--format", "{{.Repository}}:{{.Tag}}"]).contains(tag);
    assert!(is_tag(&old) && is_tag(&new));

    let retention = "data_dir: data\nretention: { images: 1 }\n";
    landfall.restart("data_dir: data\n", retention, &[]).await;
    eventually("it is swept", Duration::from_secs(30), async || {
        let is_swept = !work.exists() && !mirror.exists() && !is_there(&left) && !is_tag(&old);
        is_swept.then_some(())
    })
    .await;
    assert!(is_tag(&new), "the newest image is gone");
    assert!(is_there(&of_another), "another agent's container is gone");
    docker(&["rm", "-f", &of_another]);
    assert_eq!(
        std::fs::read_dir(landfall.path("data/mirrors"))
            .unwrap()
            .count(),
        before
    );
    let again = landfall.push(&[("www/index.html", "Hello again")]).await;
    assert_eq!(landfall.end(again).await["outcome"], "live");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_build_begins_on_a_full_disk_and_they_go_on_with_room() {
    let mut landfall = Landfall::start("full").await;
    let full = "data_dir: data\nmin_free_bytes: 9000000000000000000\n";
    landfall.restart("data_dir: data\n", full, &[]).await;
    let waits = landfall.push(&[]).await;
    // Three turns of the queue.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(landfall.build(waits).await["status"], "queued");
    let log = std::fs::read_to_string(landfall.path("agent.log")).unwrap();
    assert!(log.contains("no build begins"), "{log}");
    let (code, said) = landfall.run_command(&["doctor"]);
    assert_eq!(code, Some(5), "{said}");
    assert!(
        said.contains("(`min_free_bytes`) no build begins"),
        "{said}"
    );
    landfall.restart(full, "data_dir: data\n", &[]).await;
    assert_eq!(landfall.end(waits).await["outcome"], "live");
}

/// The agent's, by a file that says how far it is off: the cluster, Docker and the database keep theirs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_set_while_builds_run_spoils_none_and_no_time_is_negative() {
    let mut landfall = Landfall::start("clock").await;
    let clock = landfall.path("clock");
    let set = |offset: &str| std::fs::write(&clock, offset).unwrap();
    set("+0");
    let library = found_in("/usr/lib", "faketime/libfaketimeMT.so.1");
    let same = "data_dir: data\n";
    let variables = [
        ("LD_PRELOAD", library.as_str()),
        ("FAKETIME_TIMESTAMP_FILE", clock.to_str().unwrap()),
        ("FAKETIME_NO_CACHE", "1"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ];
    landfall.restart(same, same, &variables).await;
    for (offset, shift) in [("+3600", 3_600_000_i64), ("+0", 0)] {
        let page = format!("Hello at {offset}");
        let build = landfall.push(&[("www/index.html", &page)]).await;
        landfall.reach(build, "image").await;
        set(offset);
        let build = landfall.goes_live(build).await;
        let at = |of: &serde_json::Value, key: &str| of[key].as_i64().unwrap();
        let took = at(&build, "finished_at") - at(&build, "started_at");
        assert!((shift..shift + 120_000).contains(&took), "{build:#}");
        for stage in build["stages"].as_array().unwrap() {
            assert!(at(stage, "begun_at") <= at(stage, "done_at"), "{stage:#}");
        }
        assert_eq!(landfall.served("/").trim(), page);
    }
    // The release of before, which began an hour later by its own clock.
    let (status, undo) = landfall
        .write("/api/environments/hello/undo", serde_json::json!({}))
        .await;
    assert_eq!(status, 202, "{undo}");
    landfall.goes_live(undo["id"].as_i64().unwrap()).await;
    assert_eq!(landfall.served("/").trim(), "Hello at +3600");
    let history = landfall.get("/api/environments/hello/releases").await;
    for one in history["releases"].as_array().unwrap() {
        let ended = one["ended_at"].as_i64().unwrap_or(i64::MAX);
        assert!(one["began_at"].as_i64().unwrap() <= ended, "{one:#}");
    }
}

/// Faults of our own: nothing but the build that met it ends, and the next one settles what it left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_ends_its_build_alone_and_the_next_one_puts_right_what_it_left() {
    let mut landfall = Landfall::start("panic").await;
    let first = landfall.push(&[]).await;
    landfall.goes_live(first).await;
    for (point, outcome) in [
        ("checkout: fetched:1:panic", "unchanged"),
        ("cluster: applied:2:panic", "unknown"),
    ] {
        landfall.kill();
        landfall.run_doomed(&[("LANDFALL_FAIL_POINT", point)]);
        landfall.is_ready().await;
        let page = format!("Hello before {outcome}");
        let met = landfall.push(&[("www/index.html", &page)]).await;
        let met = landfall.end(met).await;
        assert_eq!(
            (&met["status"], &met["outcome"], &met["cause"]["id"]),
            (&"errored".into(), &outcome.into(), &"agent_panicked".into()),
            "{met:#}"
        );
        assert!(landfall.lives(), "{point}");
        let page = format!("Hello after {outcome}");
        let next = landfall.push(&[("www/index.html", &page)]).await;
        landfall.goes_live(next).await;
        assert_eq!(landfall.served("/").trim(), page);
    }
}

/// The first file whose path ends so.
fn found_in(root: &str, end: &str) -> String {
    let found = std::process::Command::new("find")
        .args([root, "-path", &format!("*/{end}")])
        .output()
        .unwrap();
    let found = String::from_utf8(found.stdout).unwrap();
    let first = found.lines().next();
    first
        .unwrap_or_else(|| panic!("no {end} in {root}: apt-get install faketime"))
        .to_owned()
}
