//! The sample through the demo's own line: a user's `git push`, the hook that plays GitHub, the app from its image on
//! its NodePort. Alone in the namespace `hello-axum`, so one test after the other.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::landfall::Landfall;
use crate::support::{eventually, kubeconfig, kubectl, setting};

/// Whoever holds it has the namespace and the NodePort: these tests, one after the other, and dev/test-jenkinsfile.
struct Alone(#[expect(dead_code, reason = "held")] std::fs::File);

impl Alone {
    async fn wait() -> Self {
        let waiting = tokio::task::spawn_blocking(|| {
            let file = std::fs::File::open(kubeconfig()).unwrap();
            file.lock().unwrap();
            file
        });
        Self(waiting.await.unwrap())
    }
}

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

fn build_number(said: &str) -> i64 {
    let (_, rest) = said
        .split_once("build #")
        .unwrap_or_else(|| panic!("the hook names no build: {said}"));
    rest.chars()
        .take_while(char::is_ascii_digit)
        .collect::<String>()
        .parse()
        .unwrap()
}

async fn app(path: &str) -> Option<String> {
    let url = format!(
        "http://127.0.0.1:{}{path}",
        setting("LANDFALL_TEST_NODE_PORT")
    );
    let http = reqwest::Client::builder()
        .no_proxy()
        .timeout(Duration::from_secs(2))
        .build()
        .unwrap();
    http.get(url).send().await.ok()?.text().await.ok()
}

async fn passed(landfall: &Landfall, id: i64) -> Value {
    // The first time the image's dependencies are compiled too.
    let build = eventually(
        &format!("build {id} ends"),
        Duration::from_secs(900),
        async || {
            let build = landfall.build(id).await;
            crate::landfall::is_terminal(&build).then_some(build)
        },
    )
    .await;
    assert_eq!(
        build["status"],
        "passed",
        "{build:#}\n{}",
        landfall.log(id).await
    );
    build
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demos_own_line_takes_a_changed_greeting_live() {
    let _alone = Alone::wait().await;
    let landfall = Landfall::start_sample().await;
    landfall.hook();
    let said = landfall.push_to_hook(&[]);
    let build = passed(&landfall, build_number(&said)).await;
    let commit = build["commit"].as_str().unwrap();
    assert_eq!(app("/").await.as_deref(), Some("Hello, World!"));
    assert_eq!(
        app("/health").await.as_deref(),
        Some("{\"status\":\"healthy\",\"message\":\"Service is running\"}")
    );
    assert_eq!(
        app("/ready").await.as_deref(),
        Some("{\"status\":\"ready\",\"message\":\"Service is ready to accept traffic\"}")
    );
    assert!(app("/version").await.unwrap().contains(commit));
    numbers_are_real(&build).await;

    // A user changes the greeting alone, and pushes.
    let main = std::fs::read_to_string(landfall.path("work/app/src/main.rs")).unwrap();
    assert!(main.contains("\"Hello, World!\""));
    let said = landfall.push_to_hook(&[(
        "app/src/main.rs",
        &main.replace("\"Hello, World!\"", "\"Hello from me!\""),
    )]);
    let build = passed(&landfall, build_number(&said)).await;
    let commit = build["commit"].as_str().unwrap();
    eventually(
        "the new greeting on the NodePort",
        Duration::from_secs(3),
        async || {
            app("/")
                .await
                .filter(|greeting| greeting == "Hello from me!")
        },
    )
    .await;
    assert!(app("/version").await.unwrap().contains(commit));
    let history = kubectl(&[
        "-n",
        "hello-axum",
        "rollout",
        "history",
        "deployment/hello-axum",
    ]);
    assert!(history.contains(&commit[..12]), "{history}");
}

/// `kubectl top` and the HPA show numbers and not "unknown" within a minute of the apply; on a busy machine a little later.
async fn numbers_are_real(build: &Value) {
    let stages = build["stages"].as_array().unwrap();
    let deployed = stages.iter().find(|stage| stage["stage"] == "deploy");
    let deployed = deployed.unwrap()["done_at"].as_i64().unwrap();
    let since = || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.unwrap()
            .saturating_sub(Duration::from_millis(deployed.unsigned_abs()))
    };
    eventually(
        "kubectl top and the HPA show numbers",
        Duration::from_secs(75).saturating_sub(since()),
        async || {
            let hpa: Value = serde_json::from_str(&kubectl(&[
                "-n",
                "hello-axum",
                "get",
                "hpa",
                "hello-axum",
                "-o",
                "json",
            ]))
            .unwrap();
            let metrics = hpa["status"]["currentMetrics"]
                .as_array()
                .map_or(0, |metrics| {
                    metrics
                        .iter()
                        .filter(|metric| {
                            metric["resource"]["current"]["averageUtilization"].is_i64()
                        })
                        .count()
                });
            let top = Command::new(setting("LANDFALL_TEST_KUBECTL"))
                .arg("--kubeconfig")
                .arg(kubeconfig())
                .args(["-n", "hello-axum", "top", "pods", "--no-headers"])
                .output()
                .unwrap();
            (metrics == 2
                && top.status.success()
                && String::from_utf8_lossy(&top.stdout).lines().count() >= 3)
                .then_some(())
        },
    )
    .await;
    println!("all metrics {} s after the apply", since().as_secs());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jenkins_and_the_agent_can_take_turns() {
    let _alone = Alone::wait().await;
    let landfall = Landfall::start_sample().await;
    landfall.hook();
    let first = passed(&landfall, build_number(&landfall.push_to_hook(&[]))).await;
    assert_eq!(first["outcome"], "live");

    let branch = "feature/jenkins-k8s-pipeline";
    let bare = landfall.path("hello.git");
    assert!(
        Command::new("git")
            .arg("-C")
            .arg(&bare)
            .args(["branch", branch, "main"])
            .status()
            .unwrap()
            .success()
    );
    let arguments = setting("LANDFALL_TEST_RUST_IMAGE");
    let arguments = if arguments.is_empty() {
        arguments
    } else {
        format!("--build-arg RUST_IMAGE={arguments}")
    };
    let kubectl_folder = std::path::PathBuf::from(setting("LANDFALL_TEST_KUBECTL"))
        .parent()
        .unwrap()
        .to_owned();
    let path = format!(
        "{}:{}",
        kubectl_folder.display(),
        std::env::var("PATH").unwrap()
    );
    let output = Command::new(format!("{ROOT}/dev/jenkins/run"))
        .arg(&bare)
        .arg(branch)
        .arg(landfall.path("jenkins"))
        .env("PATH", path)
        .env("KUBECONFIG", kubeconfig())
        .env("REGISTRY", setting("LANDFALL_TEST_REGISTRY"))
        .env("BUILD_ARGS", arguments)
        .env("CREDENTIAL_FILE_kubeconfig", kubeconfig())
        .env("CREDENTIAL_LOGIN_registry", "nobody:nothing")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "Jenkins' turn: {said}");

    let again = passed(&landfall, build_number(&landfall.push_to_hook(&[]))).await;
    let log = landfall.log(again["id"].as_i64().unwrap()).await;
    assert!(
        log.contains("kubectl"),
        "the log does not say whose fields were taken back:\n{log}"
    );
    assert!(
        app("/version")
            .await
            .unwrap()
            .contains(again["commit"].as_str().unwrap())
    );
}

#[test]
fn the_variants_of_the_service_are_taken_by_the_api_server() {
    for example in ["service-loadbalancer.yaml", "service-clientip.yaml"] {
        let text =
            std::fs::read_to_string(format!("{ROOT}/kubernetes/examples/{example}")).unwrap();
        let object: Value =
            serde_json::to_value(serde_yaml::from_str::<serde_yaml::Value>(&text).unwrap())
                .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut object = object;
        object["metadata"]["namespace"] = json!("default");
        // The NodePort of the real one is taken where the sample runs.
        if let Some(ports) = object["spec"]["ports"].as_array_mut() {
            ports
                .iter_mut()
                .for_each(|port| drop(port.as_object_mut().unwrap().remove("nodePort")));
        }
        let path = folder.path().join("service.json");
        std::fs::write(&path, object.to_string()).unwrap();
        let answer = kubectl(&[
            "apply",
            "--dry-run=server",
            "-o",
            "json",
            "-f",
            path.to_str().unwrap(),
        ]);
        let answer: Value = serde_json::from_str(&answer).unwrap();
        match example {
            "service-loadbalancer.yaml" => assert_eq!(answer["spec"]["type"], "LoadBalancer"),
            _ => assert_eq!(answer["spec"]["sessionAffinity"], "ClientIP"),
        }
    }
}
