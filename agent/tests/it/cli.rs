//! The command line, run as users run it: against an agent that plays tricks, and against a real one.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::fake_agent::{Ending, FakeAgent, TOKEN, build};
use crate::support::eventually;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// The command, without what the surroundings set.
fn landfall(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_landfall"));
    command.args(words).stdin(Stdio::null());
    for name in [
        "LANDFALL_SERVER",
        "LANDFALL_TOKEN",
        "LANDFALL_TOKEN_FILE",
        "LANDFALL_LOG",
        "RUST_LOG",
        "DOCKER_HOST",
    ] {
        command.env_remove(name);
    }
    command
}

/// Runs a command against an agent, beside it: the agent lives in this process.
async fn run(agent: &FakeAgent, words: &[&str]) -> Output {
    let mut command = landfall(words);
    command
        .env("LANDFALL_SERVER", format!("http://{}", agent.address))
        .env("LANDFALL_TOKEN", TOKEN);
    tokio::task::spawn_blocking(move || command.output())
        .await
        .unwrap()
        .unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn talk(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn numbered(count: usize) -> Vec<String> {
    (1..=count).map(|number| format!("line {number}")).collect()
}

#[tokio::test]
async fn a_log_is_followed_over_lost_connections_without_gaps_or_doubles() {
    let endings = [
        Ending::CutAfter(100),
        Ending::Busy,
        Ending::CloseAfter(150),
        Ending::CutAfter(0),
        Ending::CloseAfter(1),
        Ending::CutAfter(500),
        Ending::End,
    ];
    let agent = FakeAgent::start(
        build("failed", "rolled_back"),
        numbered(1000),
        endings.to_vec(),
    )
    .await;
    let output = run(&agent, &["logs", "-f", "42"]).await;
    let expected: String = numbered(1000)
        .iter()
        .map(|line| format!("{line}\n"))
        .collect();
    assert!(out(&output) == expected, "{}", talk(&output));
    assert_eq!(output.status.code(), Some(3), "{}", talk(&output));
    assert!(
        talk(&output).contains("build #42 failed"),
        "{}",
        talk(&output)
    );
    assert_eq!(agent.play().asked.len(), endings.len());
    assert!(agent.play().asked.is_sorted());
}

#[tokio::test]
async fn the_exit_code_tells_how_a_build_ended() {
    let codes = [
        ("passed", "live", 0),
        ("superseded", "unchanged", 0),
        ("failed", "left_failed", 1),
        ("failed", "rollback_failed", 4),
        ("errored", "unknown", 5),
        ("canceled", "unchanged", 130),
    ];
    for (status, outcome, code) in codes {
        let agent = FakeAgent::start(build(status, outcome), numbered(2), vec![Ending::End]).await;
        let output = run(&agent, &["logs", "-f", "42"]).await;
        assert_eq!(output.status.code(), Some(code), "{status} {outcome}");
    }
    let mut late = build("failed", "unchanged");
    late["cause"] = serde_json::json!({ "id": "time_out", "sentence": "tests took longer than 5 s", "object": null, "hint": null });
    let agent = FakeAgent::start(late, numbered(1), vec![Ending::End]).await;
    let output = run(&agent, &["rerun", "42"]).await;
    assert_eq!(output.status.code(), Some(124));
    assert!(talk(&output).contains("longer than 5 s"));
    let output = run(&agent, &["rerun", "#42", "--output", "json"]).await;
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["builds"][0]["cause"]["id"], "time_out");
    assert_eq!(output.status.code(), Some(124));
}

#[tokio::test]
async fn what_a_log_holds_cannot_command_a_terminal() {
    let lines = [
        "\u{1b}[31mred\u{1b}[0m",
        "a\u{1b}]52;c;aGk=\u{7}b",
        "\u{1b}[2J\u{1b}[1Agone?",
        "10%\r20%",
        "\u{9b}2Jx",
    ]
    .map(str::to_owned);
    let agent = FakeAgent::start(build("passed", "live"), lines.to_vec(), vec![Ending::End]).await;
    let clean = "red\nab\ngone?\n10%\n20%\nx\n";
    for words in [&["logs", "42"][..], &["logs", "-f", "42"][..]] {
        assert_eq!(out(&run(&agent, words).await), clean, "{words:?}");
    }
    let raw: String = lines.iter().map(|line| format!("{line}\n")).collect();
    assert_eq!(out(&run(&agent, &["logs", "--raw", "42"]).await), raw);
    for words in [&["status"][..], &["status", "42"][..]] {
        let shown = out(&run(&agent, words).await);
        assert!(
            shown.contains("Greet louder") && shown.contains("passed"),
            "{shown}"
        );
        assert!(
            !shown.contains('\u{1b}') && !shown.contains('\u{202e}'),
            "{shown:?}"
        );
    }
}

#[tokio::test]
async fn a_closed_pipe_ends_a_command_quietly() {
    let agent = FakeAgent::start(
        build("running", "unchanged"),
        numbered(200_000),
        vec![Ending::End],
    )
    .await;
    let mut command = landfall(&[
        "logs",
        "-f",
        "42",
        "--server",
        &format!("http://{}", agent.address),
    ]);
    let output = tokio::task::spawn_blocking(move || {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut first = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut first)
            .unwrap();
        assert_eq!(first, "line 1\n");
        child.wait_with_output().unwrap()
    });
    let output = output.await.unwrap();
    assert_eq!(output.status.code(), Some(141), "{}", talk(&output));
    assert_eq!(talk(&output), "==> Test\n");
}

#[tokio::test]
async fn ctrl_c_ends_the_watching_and_not_the_build() {
    let agent = FakeAgent::start(
        build("running", "unchanged"),
        numbered(3),
        vec![Ending::HangAfter(3)],
    )
    .await;
    let mut command = landfall(&["logs", "-f", "42"]);
    command
        .env("LANDFALL_SERVER", format!("http://{}", agent.address))
        .env("LANDFALL_TOKEN", TOKEN);
    let output = tokio::task::spawn_blocking(move || {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        while lines.next().unwrap().unwrap() != "line 3" {}
        interrupt(&child);
        child.wait_with_output().unwrap()
    });
    let output = output.await.unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", talk(&output));
    assert!(
        talk(&output).contains("build #42 goes on"),
        "{}",
        talk(&output)
    );
    assert!(agent.play().posts.is_empty());
}

fn interrupt(child: &Child) {
    let id = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
}

#[tokio::test]
async fn writes_carry_the_token_and_without_one_it_is_said_how_to_give_it() {
    let agent = FakeAgent::start(
        build("running", "unchanged"),
        numbered(1),
        vec![Ending::End],
    )
    .await;
    assert_eq!(run(&agent, &["cancel", "42"]).await.status.code(), Some(0));
    assert_eq!(agent.play().posts, ["cancel"]);
    let mut command = landfall(&[
        "cancel",
        "42",
        "--server",
        &format!("http://{}", agent.address),
    ]);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        talk(&output).contains("LANDFALL_TOKEN"),
        "{}",
        talk(&output)
    );
    assert_eq!(run(&agent, &["cancel", "43"]).await.status.code(), Some(2));
}

#[test]
fn an_agent_that_is_away_is_exit_5_with_what_to_do() {
    for words in [
        &["status"][..],
        &["logs", "-f", "42"][..],
        &["build", "main"][..],
        &["rerun", "42"][..],
    ] {
        let output = landfall(words)
            .args(["--server", "http://127.0.0.1:1"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(5), "{words:?}");
        assert!(
            talk(&output).contains("landfall serve"),
            "{}",
            talk(&output)
        );
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn words_that_are_not_understood_are_exit_2() {
    for words in [
        &["logs"][..],
        &["logs", "0"][..],
        &["logs", "-1"][..],
        &["logs", "4x"][..],
        &["status", "--limit", "0"][..],
        &["status", "--status", "red"][..],
        &["deploy"][..],
    ] {
        assert_eq!(
            landfall(words).output().unwrap().status.code(),
            Some(2),
            "{words:?}"
        );
    }
}

#[test]
fn the_schema_is_draft_07_and_knows_every_key() {
    let schema: Value =
        serde_json::from_slice(&landfall(&["schema"]).output().unwrap().stdout).unwrap();
    assert_eq!(schema["$schema"], "http://json-schema.org/draft-07/schema#");
    for key in [
        "image",
        "test",
        "deploy",
        "verify",
        "smoke_test",
        "rollback",
    ] {
        assert!(schema["properties"][key].is_object(), "{key}");
    }
}

/// A working tree with a good pipeline.
fn tree() -> tempfile::TempDir {
    let tree = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = tree.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write(
        "pipeline.yaml",
        "image: { name: web }\ntest:\n  - { name: unit, target: test, run: ./test }\ndeploy:\n  manifests: [k8s/]\nsmoke_test:\n  - get: /\n    service: web\n",
    );
    write("Dockerfile", "FROM scratch AS test\nFROM scratch\n");
    write(
        "k8s/web.yaml",
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: { name: web }\nspec:\n  selector: { matchLabels: { app: web } }\n  template:\n    \
         metadata: { labels: { app: web } }\n    spec: { containers: [{ name: web, image: web }] }\n---\napiVersion: v1\nkind: Service\nmetadata: { name: web }\n",
    );
    write("agent.yaml", &agent_yaml(1, 1));
    tree
}

/// Nothing that it names can be reached; a build is given up after so many seconds.
fn agent_yaml(port: u16, unreachable_seconds: u8) -> String {
    format!(
        "listen: 127.0.0.1:{port}\ndata_dir: data\nenvironments:\n  - name: hello\n    repository: acme/web\n    branch: main\n    clone_url: http://127.0.0.1:1/web.git\n    \
         webhook_secrets: [0123456789abcdef0123456789abcdef]\n    kubeconfig: nowhere.kubeconfig\n    namespace: web\n    image_prefix: localhost:1/acme\n    \
         limits: {{ unreachable_seconds: {unreachable_seconds} }}\n"
    )
}

fn validate(tree: &Path) -> (Option<i32>, String) {
    let output = landfall(&["validate"]).current_dir(tree).output().unwrap();
    (output.status.code(), out(&output))
}

fn edit(tree: &Path, name: &str, from: &str, to: &str) {
    let path = tree.join(name);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{name} holds no {from}");
    std::fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn a_good_tree_is_valid_and_what_is_fine_is_said() {
    let tree = tree();
    let (code, said) = validate(tree.path());
    assert_eq!(code, Some(0), "{said}");
    for part in [
        "image web, 1 test",
        "2 stages",
        "deployment/web, service/web",
        "environment hello allows",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let (code, said) = validate(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    assert_eq!(code, Some(0), "the sample of this repository: {said}");
}

#[test]
fn what_a_push_would_be_refused_for_is_found_before_it() {
    let cases = [
        (
            "pipeline.yaml",
            "manifests",
            "manifest",
            "did you mean `manifests`",
        ),
        (
            "pipeline.yaml",
            "target: test",
            "target: tests",
            "its stages are called test",
        ),
        (
            "pipeline.yaml",
            "k8s/",
            "kube/",
            "kube/ is not in the repository",
        ),
        ("pipeline.yaml", "k8s/", "../k8s", "inside the repository"),
        ("pipeline.yaml", "name: web }", "name: other }", "other"),
        (
            "k8s/web.yaml",
            "kind: Service",
            "kind: Secret",
            "kind Secret of v1 is not allowed",
        ),
        (
            "k8s/web.yaml",
            "spec: { containers",
            "spec: { hostNetwork: true, containers",
            "hostNetwork",
        ),
        (
            "k8s/web.yaml",
            "kind: Service\n",
            "kind: Service\n\tx",
            "k8s/web.yaml:",
        ),
    ];
    for (file, from, to, expected) in cases {
        let tree = tree();
        edit(tree.path(), file, from, to);
        let (code, said) = validate(tree.path());
        assert_eq!(code, Some(2), "{to}: {said}");
        assert!(
            said.contains("FAIL") && said.contains(expected),
            "{to}: {said}"
        );
    }
    let tree = tree();
    std::fs::remove_file(tree.path().join("Dockerfile")).unwrap();
    assert!(validate(tree.path()).1.contains("there is no Dockerfile"));
    std::fs::remove_file(tree.path().join("pipeline.yaml")).unwrap();
    assert_eq!(validate(tree.path()).0, Some(2));
}

#[test]
fn doctor_says_everything_that_is_missing_and_its_fix_in_time() {
    let tree = tree();
    let begun = Instant::now();
    let doctor = |words: &[&str]| {
        landfall(words)
            .current_dir(tree.path())
            .env("DOCKER_HOST", "unix:///nowhere/docker.sock")
            .output()
            .unwrap()
    };
    let output = doctor(&["doctor", "--output", "json"]);
    assert!(
        begun.elapsed() < Duration::from_secs(20),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(output.status.code(), Some(5), "{}", talk(&output));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let level = |check: &str| {
        let findings = json["findings"].as_array().unwrap();
        let found = findings.iter().find(|finding| finding["check"] == check);
        found.unwrap_or_else(|| panic!("{check}: {json}"))["level"].clone()
    };
    for check in [
        "docker",
        "hello: clone",
        "hello: registry",
        "hello: cluster",
    ] {
        assert_eq!(level(check), "fail", "{check}");
    }
    for check in ["agent", "github token"] {
        assert_eq!(level(check), "warn", "{check}");
    }
    for check in ["agent.yaml", "data_dir", "disk", "hello: webhook secret"] {
        assert_eq!(level(check), "ok", "{check}");
    }
    assert!(!tree.path().join("data").exists(), "doctor changes nothing");
    let text = out(&doctor(&["doctor"]));
    assert!(
        text.contains("FAIL  docker") && text.contains("fix: start Docker"),
        "{text}"
    );
    assert!(!text.contains("0123456789abcdef"), "{text}");
    assert_eq!(
        doctor(&["doctor", "--config", "none.yaml"]).status.code(),
        Some(2)
    );
}

#[tokio::test]
async fn the_command_line_and_a_real_agent_understand_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    std::fs::write(folder.path().join("agent.yaml"), agent_yaml(port, 4)).unwrap();
    let here = |words: &[&str]| {
        let mut command = landfall(words);
        command.current_dir(folder.path());
        command
    };
    let mut agent = here(&["serve"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the agent answers", Duration::from_secs(20), async || {
        here(&["status"])
            .output()
            .unwrap()
            .status
            .success()
            .then_some(())
    })
    .await;
    let output = here(&["build", COMMIT]).output().unwrap();
    assert_eq!(
        output.status.code(),
        Some(5),
        "nothing can be cloned: {}",
        talk(&output)
    );
    assert!(out(&output).contains("127.0.0.1:1"), "{}", out(&output));
    assert!(
        talk(&output).contains("build #1 errored"),
        "{}",
        talk(&output)
    );
    let output = here(&["rerun", "1", "--no-wait"]).output().unwrap();
    assert_eq!(out(&output), "2\n", "{}", talk(&output));
    assert_eq!(
        here(&["cancel", "2"]).output().unwrap().status.code(),
        Some(0)
    );
    assert_eq!(
        here(&["logs", "-f", "2"]).output().unwrap().status.code(),
        Some(130)
    );
    let output = here(&["build", &COMMIT[..8], "--no-wait", "--output", "json"])
        .output()
        .unwrap();
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["builds"][0]["commit"], COMMIT);
    assert!(out(&here(&["status"]).output().unwrap()).contains("#1  errored"));
    assert!(out(&here(&["status", "1"]).output().unwrap()).contains("Checkout Code"));
    assert_eq!(
        here(&["status", "99"]).output().unwrap().status.code(),
        Some(2)
    );
    let output = here(&["build", "other"]).output().unwrap();
    assert!(
        talk(&output).contains("hello (branch main)"),
        "{}",
        talk(&output)
    );
    interrupt(&agent);
    assert!(agent.wait().unwrap().success());
}
