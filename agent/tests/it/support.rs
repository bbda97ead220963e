//! What tests share: the real cluster, registry and engine that `make test` has set up, and waiting for a condition.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Secret;
use kube::config::{KubeConfigOptions, Kubeconfig};
use landfall::builds::{Build, BuildKind, Outcome, Status};
use serde::Deserialize;
use serde_json::{Value, json};

/// A variable that `make test` sets; a test without its surroundings fails and never skips.
pub fn setting(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!(
            "{name} is not set: run these tests by `make test`, or `dev/test NAME` for some of them"
        )
    })
}

pub fn kubeconfig() -> PathBuf {
    PathBuf::from(setting("LANDFALL_TEST_KUBECONFIG"))
}

/// The registry of the test cluster, as host and cluster both call it: `localhost:5002`.
pub fn registry() -> String {
    setting("LANDFALL_TEST_REGISTRY")
}

/// A small image that is in the registry already, by digest: it has a shell and the usual tools (busybox).
pub fn busybox() -> String {
    setting("LANDFALL_TEST_BUSYBOX")
}

/// kubectl as the cluster's admin.
pub fn kubectl_command(arguments: &[&str]) -> Command {
    let mut command = Command::new(setting("LANDFALL_TEST_KUBECTL"));
    command
        .arg("--kubeconfig")
        .arg(kubeconfig())
        .args(arguments);
    command
}

/// Runs kubectl as the cluster's admin; panics with what it said when it fails.
pub fn kubectl(arguments: &[&str]) -> String {
    let output = kubectl_command(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "kubectl {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// One request to the API server as the cluster's admin: what is asked for often is asked without starting a kubectl,
/// which costs a core a seventh of a second.
pub fn api(method: &str, path: &str, body: Option<&Value>) -> kube::Result<String> {
    let body = body.map_or_else(String::new, Value::to_string);
    let request = request(method, path, "application/json", body);
    as_admin(async |client| client.request_text(request).await)
}

fn request(
    method: &str,
    path: &str,
    content_type: &str,
    body: String,
) -> axum::http::Request<Vec<u8>> {
    axum::http::Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", content_type)
        .body(body.into_bytes())
        .unwrap()
}

/// The API server, as the cluster's admin.
pub async fn admin() -> kube::Client {
    let file = Kubeconfig::read_from(kubeconfig()).unwrap();
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await;
    kube::Client::try_from(config.unwrap()).unwrap()
}

/// Not on the test's own thread, which may run a runtime already.
fn as_admin<T: Send>(work: impl AsyncFnOnce(kube::Client) -> T + Send) -> T {
    let asked = || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async { work(admin().await).await })
    };
    std::thread::scope(|scope| scope.spawn(asked).join().unwrap())
}

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A running build of a push, as a stage is given it.
pub fn build() -> Build {
    Build {
        id: 1,
        environment: "hello".to_owned(),
        repository: "acme/hello".to_owned(),
        branch: "main".to_owned(),
        commit: COMMIT.to_owned(),
        title: String::new(),
        by: "ada".to_owned(),
        kind: BuildKind::Push,
        status: Status::Running,
        outcome: Outcome::Unchanged,
        cause: None,
        stage: None,
        attempt: 1,
        fence: 1,
        image: None,
        release_id: None,
        queued_at: 0,
        started_at: None,
        finished_at: None,
        cancel_requested: false,
        superseded_by: None,
        restored_release: None,
    }
}

/// A kubeconfig of an agent that may do in this namespace what it needs, and nothing elsewhere: as dev/agent-rights makes
/// it (the demo's own test runs that), without its four kubectls.
pub fn agent_kubeconfig(namespace: &str) -> Vec<u8> {
    let rights = include_str!("../../../dev/agent-rights.yaml").replace("NAMESPACE", namespace);
    let secret = format!("/api/v1/namespaces/landfall-agents/secrets/{namespace}");
    let token = as_admin(async |client| {
        for document in serde_yaml::Deserializer::from_str(&rights) {
            let object = Value::deserialize(document).unwrap();
            let path = format!("{}?fieldManager=kubectl&force=true", path_of(&object));
            let apply = request(
                "PATCH",
                &path,
                "application/apply-patch+yaml",
                object.to_string(),
            );
            client.request_text(apply).await.unwrap();
        }
        eventually("the account's token", Duration::from_secs(10), async || {
            let get = request("GET", &secret, "application/json", String::new());
            let secret: Secret = client.request(get).await.unwrap();
            secret.data?.remove("token")
        })
        .await
    });
    let mut config = Kubeconfig::read_from(kubeconfig()).unwrap();
    let user = &mut config.auth_infos[0];
    user.auth_info = Some(kube::config::AuthInfo {
        token: Some(String::from_utf8(token.0).unwrap().into()),
        ..kube::config::AuthInfo::default()
    });
    for context in &mut config.contexts {
        let context = context.context.as_mut().unwrap();
        context.namespace = Some(namespace.to_owned());
    }
    serde_yaml::to_string(&config).unwrap().into_bytes()
}

/// Where the API server keeps this object.
pub fn path_of(object: &Value) -> String {
    let metadata = &object["metadata"];
    let of = metadata["namespace"]
        .as_str()
        .map_or_else(String::new, |name| format!("namespaces/{name}/"));
    let api = match object["apiVersion"].as_str().unwrap() {
        "v1" => "/api/v1".to_owned(),
        version => format!("/apis/{version}"),
    };
    let kind = object["kind"].as_str().unwrap().to_lowercase();
    let plural = match kind.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None if kind.ends_with('s') => format!("{kind}es"),
        None => format!("{kind}s"),
    };
    let name = metadata["name"].as_str().unwrap();
    format!("{api}/{of}{plural}/{name}")
}

/// A namespace of one test's own, removed with it.
pub struct Namespace(pub String);

impl Namespace {
    pub fn new(name: &str) -> Self {
        let nanos = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_nanos();
        let unique = format!("{name}-{:x}", nanos & 0xffff_ffff_ffff);
        Self::create(unique)
    }

    /// One of this very name; what stood there is removed first.
    pub fn anew(name: &str) -> Self {
        kubectl(&[
            "delete",
            "namespace",
            name,
            "--ignore-not-found",
            "--timeout=60s",
        ]);
        Self::create(name.to_owned())
    }

    fn create(name: String) -> Self {
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        api("POST", "/api/v1/namespaces", Some(&namespace)).unwrap();
        Self(name)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let path = format!("/api/v1/namespaces/{}", self.0);
        let _ = api("DELETE", &path, None);
    }
}

/// Applies YAML as people do, with `kubectl apply`.
pub fn kubectl_apply(namespace: &str, yaml: &str) {
    let mut child = kubectl_command(&["-n", namespace, "apply", "-f", "-"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    std::io::Write::write_all(&mut stdin, yaml.as_bytes()).unwrap();
    drop(stdin);
    assert!(child.wait().unwrap().success());
}

/// Where a program that is started again and again writes on.
pub fn log_file(path: &Path) -> std::fs::File {
    let mut options = std::fs::File::options();
    options.create(true).append(true).open(path).unwrap()
}

/// Asking costs as much as what is asked about, where cores are few: what took long is asked for less often.
const ASK_MIN: Duration = Duration::from_millis(20);
const ASK_MAX: Duration = Duration::from_millis(200);

/// Asks again until there is an answer; panics with `what` after the limit.
pub async fn eventually<T>(
    what: &str,
    limit: Duration,
    mut ask: impl AsyncFnMut() -> Option<T>,
) -> T {
    let begun = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(
            begun.elapsed() < limit,
            "after {} s still not: {what}",
            limit.as_secs()
        );
        tokio::time::sleep((begun.elapsed() / 10).clamp(ASK_MIN, ASK_MAX)).await;
    }
}
