//! The sample through the demo's own line: a user's `git push`, the hook that plays GitHub, the app from its image on
//! its NodePort. Alone in the namespace `hello-axum`, so one test after the other.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::landfall::{Landfall, free_port};
use crate::support::{Namespace, eventually, kubeconfig, kubectl, setting};

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

/// `make demo` on the tests' cluster, with a state of its own.
struct Demo {
    state: tempfile::TempDir,
    ports: [u16; 2],
}

impl Demo {
    fn new() -> Self {
        Self {
            state: tempfile::tempdir().unwrap(),
            ports: [free_port(), free_port()],
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        // Whoever was started in the background ignores Ctrl-C, and a shell cannot change that.
        let mut command = Command::new("env");
        command
            .arg("--default-signal=INT")
            .arg(format!("{ROOT}/dev/demo"))
            .args(arguments)
            .env("LANDFALL_STATE", self.state.path())
            .env("DEMO_CLUSTER", "landfall-test")
            .env("CLUSTER_KEPT", "1")
            .env("AGENT_PORT", self.ports[0].to_string())
            .env("GIT_PORT", self.ports[1].to_string())
            .stdin(Stdio::null());
        command
    }

    /// To its end; what it printed.
    fn run(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(output.status.success(), "dev/demo {arguments:?}: {said}");
        said
    }

    /// Until it has said this; then as a terminal does at Ctrl-C. It must not end well.
    fn interrupt_after(&self, word: &str) {
        let mut child = self
            .command(&[])
            .process_group(0)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Kept to the end: who writes where nobody reads would die of that.
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut said = Vec::new();
        for line in lines.by_ref().map_while(Result::ok) {
            let is_it = line.contains(word);
            said.push(line);
            if is_it {
                break;
            }
        }
        let last = said.last();
        assert!(last.is_some_and(|line| line.contains(word)), "{said:#?}");
        let group = format!("-{}", child.id());
        let sent = Command::new("kill").args(["-INT", "--", &group]).status();
        assert!(sent.unwrap().success());
        assert!(!child.wait().unwrap().success());
    }

    fn landfall(&self, arguments: &[&str]) -> (bool, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_landfall"))
            .args(arguments)
            .arg("--config")
            .arg(self.state.path().join("agent.yaml"))
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }

    async fn get(&self, path: &str) -> String {
        let url = format!("http://127.0.0.1:{}{path}", self.ports[0]);
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        http.get(url).send().await.unwrap().text().await.unwrap()
    }

    async fn newest(&self) -> Value {
        let builds: Value = serde_json::from_str(&self.get("/api/builds").await).unwrap();
        let id = builds["builds"][0]["id"].as_i64().unwrap();
        serde_json::from_str(&self.get(&format!("/api/builds/{id}")).await).unwrap()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.command(&["stop"]).status();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.state.path().join("agent.log"));
            println!("--- the agent's log\n{}", log.unwrap_or_default());
        }
    }
}

/// Runs lines of shell as a user does.
fn shell(folder: &Path, lines: &str) -> String {
    let output = Command::new("bash")
        .args(["-ec", lines])
        .current_dir(folder)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

/// What people look for in an example, and copy.
#[test]
fn the_manifests_say_what_the_readme_promises_of_them() {
    let read = |name: &str| -> Value {
        let path = format!("{ROOT}/kubernetes/{name}.yaml");
        serde_yaml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    };
    let deployment = read("deployment");
    let spec = &deployment["spec"];
    assert_eq!(spec["replicas"], 3);
    let rolling = json!({"maxSurge": 1, "maxUnavailable": 1});
    assert_eq!(
        spec["strategy"],
        json!({"type": "RollingUpdate", "rollingUpdate": rolling})
    );
    let pod = &spec["template"]["spec"];
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(
        pod["securityContext"]["seccompProfile"]["type"],
        "RuntimeDefault"
    );
    let container = &pod["containers"][0];
    assert_eq!(
        container["resources"]["requests"],
        json!({"cpu": "100m", "memory": "128Mi"})
    );
    assert_eq!(
        container["resources"]["limits"],
        json!({"cpu": "200m", "memory": "256Mi"})
    );
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        assert!(container[probe]["httpGet"].is_object(), "{probe}");
    }
    let production = json!({"name": "APP_ENV", "value": "production"});
    assert!(container["env"].as_array().unwrap().contains(&production));

    let port = &read("service")["spec"]["ports"][0];
    assert_eq!(
        (&port["port"], &port["nodePort"]),
        (&json!(80), &json!(30008))
    );
    let ports = container["ports"].as_array().unwrap();
    let leads_to =
        |it: &&Value| it["name"] == port["targetPort"] || it["containerPort"] == port["targetPort"];
    assert_eq!(ports.iter().find(leads_to).unwrap()["containerPort"], 5000);

    let hpa = read("hpa");
    let spec = &hpa["spec"];
    assert_eq!(hpa["apiVersion"], "autoscaling/v2");
    assert_eq!(
        (&spec["minReplicas"], &spec["maxReplicas"]),
        (&json!(2), &json!(10))
    );
    let metrics = spec["metrics"].as_array().unwrap().iter();
    let targets: Vec<_> = metrics
        .map(|metric| {
            (
                &metric["resource"]["name"],
                &metric["resource"]["target"]["averageUtilization"],
            )
        })
        .collect();
    assert_eq!(
        targets,
        [(&json!("cpu"), &json!(70)), (&json!("memory"), &json!(80))]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_demos_own_line_takes_a_changed_greeting_live() {
    let _alone = Alone::wait().await;
    let _namespace = Namespace::anew("hello-axum");
    let demo = Demo::new();
    demo.interrupt_after("[demo] Docker: ");
    demo.interrupt_after("build #1 queued");
    let said = demo.run(&[]);
    for told in ["/hello.git /tmp/hello", "Hello, World!", "[demo] all of it"] {
        assert!(said.contains(told), "{told}: {said}");
    }
    let build = demo.newest().await;
    assert_eq!(build["outcome"], "live", "{build:#}");
    assert_eq!(app("/").await.as_deref(), Some("Hello, World!"));
    assert_eq!(
        app("/health").await.as_deref(),
        Some("{\"status\":\"healthy\",\"message\":\"Service is running\"}")
    );
    assert_eq!(
        app("/ready").await.as_deref(),
        Some("{\"status\":\"ready\",\"message\":\"Service is ready to accept traffic\"}")
    );
    let commit = build["commit"].as_str().unwrap();
    assert!(app("/version").await.unwrap().contains(commit));
    let (is_well, said) = demo.landfall(&["doctor"]);
    assert!(is_well && !said.contains("FAIL"), "{said}");
    numbers_are_real(&build).await;
    image_is_small_and_without_rights(&build);
    is_reached_by_name();

    // A user changes the greeting alone, and pushes: by the lines that the demo prints.
    let git = format!("http://127.0.0.1:{}/hello.git", demo.ports[1]);
    let said = shell(
        demo.state.path(),
        &format!(
            "git clone -q {git} hello; cd hello
            sed -i 's/Hello, World!/Hello from me!/' app/src/main.rs
            git -c user.name=me -c user.email=me@localhost commit -qam 'Say hello'
            git push"
        ),
    );
    let (is_live, log) = demo.landfall(&["logs", "-f", &build_number(&said).to_string()]);
    assert!(is_live, "{log}");
    assert_eq!(app("/").await.as_deref(), Some("Hello from me!"));
    let build = demo.newest().await;
    let commit = build["commit"].as_str().unwrap();
    assert!(app("/version").await.unwrap().contains(commit));
    let is_cached = |line: &str| line.contains("[dependencies 1/1]") && line.ends_with("CACHED");
    assert!(
        log.lines().any(is_cached),
        "a changed greeting compiles the app's dependencies too:\n{log}"
    );
    let history = kubectl(&[
        "-n",
        "hello-axum",
        "rollout",
        "history",
        "deployment/hello-axum",
    ]);
    assert!(history.contains(&commit[..12]), "{history}");

    // Stopped, and begun once more.
    demo.run(&["stop"]);
    assert!(std::net::TcpStream::connect(("127.0.0.1", demo.ports[0])).is_err());
    assert_eq!(app("/").await.as_deref(), Some("Hello from me!"));
    demo.run(&[]);
    assert_eq!(app("/").await.as_deref(), Some("Hello, World!"));
}

/// From another pod, by the name that the cluster's DNS knows.
fn is_reached_by_name() {
    let k = |arguments: &[&str]| kubectl(&[&["-n", "hello-axum"], arguments].concat());
    let image = format!("--image={}", crate::support::busybox());
    let asks = ["--command", "--", "wget", "-qO-", "http://hello-axum"];
    k(&[&["run", "asks", "--restart=Never", &image], &asks[..]].concat());
    k(&[
        "wait",
        "--for=jsonpath={.status.phase}=Succeeded",
        "--timeout=60s",
        "pod/asks",
    ]);
    let asked = k(&["logs", "pod/asks"]);
    k(&["delete", "pod/asks", "--wait=false"]);
    assert!(asked.contains("Hello, World!"), "{asked}");
}

fn image_is_small_and_without_rights(build: &Value) {
    let (repository, _) = build["image"].as_str().unwrap().split_once('@').unwrap();
    let tag = format!("{repository}:{}", build["commit"].as_str().unwrap());
    let image = crate::docker_world::docker(&["image", "inspect", &tag]);
    let image: Value = serde_json::from_str(&image).unwrap();
    assert_eq!(image[0]["Config"]["User"], "65532:65532", "{image:#}");
    let bytes = image[0]["Size"].as_u64().unwrap();
    assert!(bytes <= 3_000_000, "{bytes} bytes");
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
