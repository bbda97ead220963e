//! Verify and smoke test on the real cluster: what is good passes, what is dead is called dead in seconds and by its name.

use std::time::{Duration, Instant};

use landfall::build_log::{BuildLog, Masker};
use landfall::builds::{Build, BuildKind, Cause, Outcome, Stage, Status};
use landfall::config::{Docker, Environment};
use landfall::release::{AppliedObject, Change, Release};
use landfall::stages::{
    Applied, Live, RolledOut, Scope, StageError, StageResult, smoke_test, smoke_test::Soak, verify,
    verify::Show,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::support::{Namespace, busybox, kubeconfig, kubectl, registry};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A namespace with a release in it, applied by kubectl, and what a stage is given.
struct Stand {
    namespace: Namespace,
    environment: Environment,
    build: Build,
    release: Release,
    log: BuildLog,
    cancel: CancellationToken,
}

impl Stand {
    fn new(name: &str, objects: impl FnOnce(&str) -> Vec<Value>) -> Self {
        let namespace = Namespace::new(name);
        let environment = serde_json::from_value(json!({
            "name": "hello", "repository": "acme/hello", "branch": "main", "clone_url": "https://example.org/hello",
            "kubeconfig": kubeconfig(), "namespace": namespace.0, "image_prefix": registry(),
            "smoke_test_hosts": ["127.0.0.1"],
        }))
        .unwrap();
        let release = serde_json::from_value(json!({
            "environment": "hello", "build_id": 1, "commit": COMMIT, "image": busybox(), "namespace": namespace.0,
            "objects": objects(&namespace.0), "smoke_tests": [], "verify": {"timeout_seconds": 90, "soak_seconds": 0},
            "rollback": "automatic", "first_release": "leave", "set_hash": "",
        }))
        .unwrap();
        let log = BuildLog::new(Masker::new(["hunter2-secret"]), 1 << 20, 0);
        Self {
            namespace,
            environment,
            build: build(),
            release,
            log,
            cancel: CancellationToken::new(),
        }
    }

    fn scope<'a>(&'a self, log: &'a landfall::build_log::StageLog) -> Scope<'a> {
        let nowhere = std::path::Path::new("/nonexistent");
        Scope {
            build: &self.build,
            environment: &self.environment,
            docker: Box::leak(Box::new(Docker::default())),
            mirrors: nowhere,
            work: nowhere,
            log,
            cancel: &self.cancel,
        }
    }

    fn apply(&self) -> Applied {
        let file = tempfile::NamedTempFile::with_suffix(".json").unwrap();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": self.release.objects});
        std::fs::write(file.path(), list.to_string()).unwrap();
        kubectl(&[
            "-n",
            &self.namespace.0,
            "apply",
            "-f",
            file.path().to_str().unwrap(),
        ]);
        Applied {
            release_id: 7,
            objects: self
                .release
                .objects
                .iter()
                .map(|object| self.applied(object))
                .collect(),
        }
    }

    fn applied(&self, object: &Value) -> AppliedObject {
        let text = |pointer: &str| {
            object
                .pointer(pointer)
                .unwrap()
                .as_str()
                .unwrap()
                .to_owned()
        };
        let (kind, name) = (text("/kind"), text("/metadata/name"));
        let live: Value = serde_json::from_str(&kubectl(&[
            "-n",
            &self.namespace.0,
            "get",
            &kind,
            &name,
            "-o",
            "json",
        ]))
        .unwrap();
        AppliedObject {
            api_version: text("/apiVersion"),
            kind,
            namespace: self.namespace.0.clone(),
            name,
            uid: live["metadata"]["uid"].as_str().unwrap().to_owned(),
            generation: live["metadata"]["generation"].as_i64().unwrap_or_default(),
            change: Change::Changed,
        }
    }

    async fn verify(&self) -> StageResult<RolledOut> {
        let applied = self.apply();
        let log = self.log.stage(Stage::Verify);
        verify::run(&self.scope(&log), &self.release, &applied, None, Show::All).await
    }

    async fn smoke_test(&mut self, tests: Value, soak_seconds: u64) -> StageResult<Live> {
        self.release.smoke_tests = serde_json::from_value(tests).unwrap();
        self.release.verify.soak_seconds = soak_seconds;
        let rolled_out = RolledOut {
            release_id: 7,
            revisions: Vec::new(),
        };
        let log = self.log.stage(Stage::SmokeTest);
        smoke_test::run(
            &self.scope(&log),
            &self.release,
            &rolled_out,
            Soak::AsPlanned,
        )
        .await
    }

    /// Cancels as soon as the log says this; what it drained until then is lost to `log`.
    fn cancel_at(&self, words: &'static str) -> tokio::task::JoinHandle<()> {
        let (cancel, log) = (self.cancel.clone(), self.log.clone());
        tokio::spawn(async move {
            let mut text = String::new();
            while !text.contains(words) {
                let lines = log.drain().await.unwrap();
                lines
                    .iter()
                    .for_each(|line| text.push_str(&String::from_utf8_lossy(&line.bytes)));
            }
            cancel.cancel();
        })
    }

    async fn log(&self) -> String {
        self.log.close();
        let mut text = String::new();
        while let Some(lines) = self.log.drain().await {
            lines
                .iter()
                .for_each(|line| text.push_str(&String::from_utf8_lossy(&line.bytes)));
        }
        println!("{text}");
        text
    }
}

fn build() -> Build {
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

/// One container of busybox that runs this in a shell.
fn deployment(namespace: &str, replicas: u32, shell: &str) -> Value {
    let labels = json!({"app": "web"});
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": namespace},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels, "annotations": {"landfall.dev/release": "aaaa"}},
            "spec": {"terminationGracePeriodSeconds": 1, "containers": [
                {"name": "app", "image": busybox(), "command": ["sh", "-c", shell], "ports": [{"name": "http", "containerPort": 8080}]}]}}}})
}

fn service(namespace: &str, app: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": namespace},
        "spec": {"selector": {"app": app}, "ports": [{"port": 80, "targetPort": "http"}]}})
}

fn container(deployment: &mut Value) -> &mut Value {
    &mut deployment["spec"]["template"]["spec"]["containers"][0]
}

fn ready_when_it_answers(deployment: &mut Value) {
    container(deployment)["readinessProbe"] =
        json!({"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1});
}

/// Serves a file of JSON with the commit, and ends as soon as it is told to.
const SERVE: &str = "mkdir /tmp/www; echo '{\"status\":\"healthy\",\"commit\":\"0123456789abcdef0123456789abcdef01234567\"}' > /tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www";

fn serving(namespace: &str) -> Vec<Value> {
    let mut deployment = deployment(namespace, 2, SERVE);
    ready_when_it_answers(&mut deployment);
    vec![service(namespace, "web"), deployment]
}

fn cause<T: std::fmt::Debug>(result: StageResult<T>) -> Cause {
    match result {
        Err(StageError::Failed(cause)) => cause,
        other => panic!("{other:?}"),
    }
}

/// The cause of a rollout that must be called dead within so many seconds.
async fn dead_within(seconds: u64, stand: &Stand) -> Cause {
    let begun = Instant::now();
    let cause = cause(stand.verify().await);
    println!(
        "{} after {:.1} s: {}",
        cause.id,
        begun.elapsed().as_secs_f64(),
        cause.sentence
    );
    let log = stand.log().await;
    assert!(
        begun.elapsed() < Duration::from_secs(seconds),
        "{} s",
        begun.elapsed().as_secs()
    );
    assert!(
        log.contains("READY") && log.contains("Deployments"),
        "what stands is shown: {log}"
    );
    cause
}

#[tokio::test]
async fn a_good_rollout_is_complete_shown_and_answers() {
    let mut stand = Stand::new("good", serving);
    let rolled_out = stand.verify().await.unwrap();
    assert_eq!(
        rolled_out.revisions,
        [("deployment/web".to_owned(), "1".to_owned())]
    );
    let tests = json!([
        {"get": "/", "service": "web", "expect": {"status": 200, "json": {"status": "healthy", "commit": "$commit"}}},
        {"get": "/index.html?a=b", "service": "web", "expect": {"body_contains": "healthy"}},
    ]);
    let live = stand.smoke_test(tests, 3).await.unwrap();
    assert!(
        live.requests >= 2 * (2 + 3),
        "two pods and the Service, twice: {}",
        live.requests
    );
    let log = stand.log().await;
    for line in [
        "deployment/web successfully rolled out",
        "NAME",
        "UP-TO-DATE",
        "CLUSTER-IP",
        "REVISION",
        "2/2",
        "GET / of service/web: 200 in ",
        "Soak: 3 s",
    ] {
        assert!(log.contains(line), "{line} is missing in {log}");
    }
}

#[tokio::test]
async fn what_the_apply_left_as_it_was_is_verified_all_the_same() {
    let stand = Stand::new("unchanged", serving);
    stand.verify().await.unwrap();
    let mut applied = stand.apply();
    applied
        .objects
        .iter_mut()
        .for_each(|object| object.change = Change::Unchanged);
    let log = stand.log.stage(Stage::Verify);
    let begun = Instant::now();
    verify::run(
        &stand.scope(&log),
        &stand.release,
        &applied,
        None,
        Show::All,
    )
    .await
    .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert!(stand.log().await.contains("changed nothing"));
}

#[tokio::test]
async fn a_program_that_exits_at_start_is_named_with_its_last_words() {
    let shell = "echo starting; echo 'fatal: DATABASE_URL is not set (hunter2-secret)' >&2; exit 1";
    let stand = Stand::new("exit1", |namespace| vec![deployment(namespace, 3, shell)]);
    let cause = dead_within(15, &stand).await;
    assert_eq!(cause.id, "crash_loop");
    assert!(
        cause
            .sentence
            .ends_with("exited with code 1 twice: fatal: DATABASE_URL is not set (***)"),
        "{cause:?}"
    );
}

#[tokio::test]
async fn the_previous_release_stays_while_the_new_one_dies() {
    let mut stand = Stand::new("second", serving);
    stand.verify().await.unwrap();
    let dying = &mut stand.release.objects[1];
    container(dying)["command"] = json!(["sh", "-c", "exit 3"]);
    dying["spec"]["template"]["metadata"]["annotations"]["landfall.dev/release"] = json!("bbbb");
    let cause = dead_within(15, &stand).await;
    assert_eq!(cause.id, "crash_loop");
    let ready = kubectl(&[
        "-n",
        &stand.namespace.0,
        "get",
        "deployment",
        "web",
        "-o",
        "jsonpath={.status.readyReplicas}",
    ]);
    assert!(ready == "1" || ready == "2", "{ready}");
}

#[tokio::test]
async fn an_image_that_is_not_there_is_named() {
    let image = format!("{}/nosuch:1", registry());
    let stand = Stand::new("noimage", |namespace| {
        let mut deployment = deployment(namespace, 1, "true");
        container(&mut deployment)["image"] = json!(image);
        vec![deployment]
    });
    let cause = dead_within(15, &stand).await;
    assert_eq!(cause.id, "image_not_found");
    assert!(cause.sentence.contains(&image), "{cause:?}");
}

#[tokio::test]
async fn a_missing_key_of_a_config_map_is_named() {
    let stand = Stand::new("configkey", |namespace| {
        let mut deployment = deployment(namespace, 1, SERVE);
        container(&mut deployment)["env"] = json!([{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "conf", "key": "missing"}}}]);
        let config = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "conf", "namespace": namespace}, "data": {}});
        vec![config, deployment]
    });
    let cause = dead_within(15, &stand).await;
    assert_eq!(cause.id, "config_key_missing");
    assert!(
        cause.sentence.contains("couldn't find key missing"),
        "{cause:?}"
    );
}

#[tokio::test]
async fn a_pod_that_no_node_has_room_for_is_named() {
    let stand = Stand::new("noroom", |namespace| {
        let mut deployment = deployment(namespace, 1, SERVE);
        container(&mut deployment)["resources"] = json!({"requests": {"cpu": "1000"}});
        vec![deployment]
    });
    let cause = dead_within(20, &stand).await;
    assert_eq!(cause.id, "unschedulable");
    assert!(cause.sentence.contains("Insufficient cpu"), "{cause:?}");
}

#[tokio::test]
async fn a_program_killed_for_memory_is_dead_though_it_was_available() {
    let stand = Stand::new("oom", |namespace| {
        let mut deployment = deployment(
            namespace,
            1,
            "sleep 1; exec dd if=/dev/zero of=/dev/null bs=64M",
        );
        container(&mut deployment)["resources"] = json!({"limits": {"memory": "16Mi"}});
        vec![deployment]
    });
    let cause = dead_within(30, &stand).await;
    assert_eq!(cause.id, "oom_killed");
}

#[tokio::test]
async fn what_is_never_ready_is_failed_when_its_time_is_up() {
    let mut stand = Stand::new("unready", |namespace| {
        let mut deployment = deployment(namespace, 1, "sleep 600");
        ready_when_it_answers(&mut deployment);
        vec![deployment]
    });
    stand.release.verify.timeout_seconds = 8;
    let begun = Instant::now();
    let cause = dead_within(20, &stand).await;
    assert!(begun.elapsed() >= Duration::from_secs(8));
    assert_eq!(cause.id, "probe_refused");
    assert!(cause.sentence.contains("connection refused"), "{cause:?}");
}

#[tokio::test]
async fn a_slow_start_is_never_a_failure() {
    let stand = Stand::new("slow", |namespace| {
        let mut deployment = deployment(namespace, 1, &format!("sleep 20; {SERVE}"));
        ready_when_it_answers(&mut deployment);
        vec![deployment]
    });
    let begun = Instant::now();
    stand.verify().await.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(18));
    stand.log().await;
}

#[tokio::test]
async fn one_crash_and_then_a_good_life_is_no_failure() {
    let once = format!(
        "if [ ! -e /data/seen ]; then touch /data/seen; echo 'database is not up yet'; exit 1; fi; {SERVE}"
    );
    let stand = Stand::new("once", |namespace| {
        let mut deployment = deployment(namespace, 1, &once);
        ready_when_it_answers(&mut deployment);
        container(&mut deployment)["volumeMounts"] =
            json!([{"name": "data", "mountPath": "/data"}]);
        deployment["spec"]["template"]["spec"]["volumes"] =
            json!([{"name": "data", "emptyDir": {}}]);
        vec![deployment]
    });
    stand.verify().await.unwrap();
    assert!(stand.log().await.contains("| database is not up yet"));
}

#[tokio::test]
async fn each_wrong_answer_fails_the_smoke_test_with_its_cause() {
    let mut stand = Stand::new("wrong", serving);
    stand.verify().await.unwrap();
    for (test, id, says) in [
        (
            json!({"get": "/nothing"}),
            "smoke_wrong_status",
            "answered 404 and not 200",
        ),
        (
            json!({"get": "/", "expect": {"body_contains": "Guten Tag"}}),
            "smoke_wrong_body",
            "Guten Tag",
        ),
        (
            json!({"get": "/", "expect": {"json": {"commit": "not $commit"}}}),
            "smoke_wrong_version",
            "not 0123456789ab",
        ),
        (json!({"get": "/../../../secrets"}), "smoke_path", "no path"),
        (
            json!({"url": "http://169.254.169.254/"}),
            "smoke_host_not_allowed",
            "169.254.169.254",
        ),
        (
            json!({"url": "http://127.0.0.1:1/", "timeout_seconds": 1}),
            "smoke_no_answer",
            "127.0.0.1:1",
        ),
    ] {
        let mut test = test;
        if test.get("get").is_some() {
            test["service"] = json!("web");
        }
        let begun = Instant::now();
        let cause = cause(stand.smoke_test(json!([test]), 0).await);
        assert_eq!(cause.id, id, "{cause:?}");
        assert!(cause.sentence.contains(says), "{cause:?}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{cause:?}");
    }
    stand.log().await;
}

#[tokio::test]
async fn a_service_that_leads_nowhere_fails_the_smoke_test() {
    let mut stand = Stand::new("nowhere", |namespace| {
        vec![service(namespace, "other"), deployment(namespace, 1, SERVE)]
    });
    stand.verify().await.unwrap();
    let nowhere = cause(
        stand
            .smoke_test(json!([{"get": "/", "service": "web"}]), 0)
            .await,
    );
    assert_eq!(nowhere.id, "smoke_no_endpoint");
    assert!(
        nowhere.sentence.contains("selects app=other"),
        "{nowhere:?}"
    );
    let missing = cause(
        stand
            .smoke_test(json!([{"get": "/", "service": "nosuch"}]), 0)
            .await,
    );
    assert_eq!(missing.sentence, "service/nosuch does not exist");
}

#[tokio::test]
async fn a_port_where_nobody_listens_fails_the_smoke_test() {
    let mut stand = Stand::new("deaf", |namespace| {
        vec![
            service(namespace, "web"),
            deployment(namespace, 1, "sleep 600"),
        ]
    });
    stand.verify().await.unwrap();
    let cause = cause(
        stand
            .smoke_test(
                json!([{"get": "/", "service": "web", "timeout_seconds": 3}]),
                0,
            )
            .await,
    );
    stand.log().await;
    assert_eq!(cause.id, "smoke_no_answer", "{cause:?}");
}

#[tokio::test]
async fn a_program_that_dies_after_the_smoke_test_fails_in_the_soak() {
    let shell = "(sleep 14; echo 'panicked at the wrong moment'; kill -9 -1) & mkdir /tmp/www; httpd -f -p 8080 -h /tmp/www; exit 3";
    let mut stand = Stand::new("soak", |namespace| {
        let mut deployment = deployment(namespace, 1, shell);
        container(&mut deployment)["command"] = json!(["sh", "-c", format!("{{ {shell}; }}")]);
        vec![service(namespace, "web"), deployment]
    });
    stand.verify().await.unwrap();
    let soaked = stand
        .smoke_test(
            json!([{"get": "/", "service": "web", "expect": {"status": 404}}]),
            40,
        )
        .await;
    stand.log().await;
    let cause = cause(soaked);
    assert_eq!(cause.id, "crash_in_soak", "{cause:?}");
    assert!(
        cause.sentence.contains("panicked at the wrong moment"),
        "{cause:?}"
    );
}

#[tokio::test]
async fn a_cancel_cuts_the_soak_short_and_the_release_stays_live() {
    let mut stand = Stand::new("cut", serving);
    stand.verify().await.unwrap();
    let canceler = stand.cancel_at("Soak: watching for 300 s");
    let begun = Instant::now();
    stand
        .smoke_test(json!([{"get": "/", "service": "web"}]), 300)
        .await
        .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(60));
    canceler.await.unwrap();
    assert!(stand.log().await.contains("cut short"));
}

#[tokio::test]
async fn a_cluster_out_of_sight_is_never_a_failure_of_the_release() {
    let mut stand = Stand::new("blind", |namespace| vec![deployment(namespace, 1, SERVE)]);
    let applied = stand.apply();
    let file = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
    let nowhere = json!({"apiVersion": "v1", "kind": "Config", "current-context": "x",
        "clusters": [{"name": "x", "cluster": {"server": "http://127.0.0.1:1"}}],
        "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}], "users": [{"name": "x", "user": {}}]});
    std::fs::write(file.path(), nowhere.to_string()).unwrap();
    stand.environment.kubeconfig = Some(file.path().to_path_buf());
    stand.environment.limits.unreachable_seconds = 3;
    let log = stand.log.stage(Stage::Verify);
    let error = verify::run(
        &stand.scope(&log),
        &stand.release,
        &applied,
        None,
        Show::All,
    )
    .await
    .unwrap_err();
    let StageError::Agent(error) = error else {
        panic!("{error:?}")
    };
    assert!(
        format!("{error:#}").starts_with("cannot see the cluster for 3 s"),
        "{error:#}"
    );
}

#[tokio::test]
async fn a_canceled_verify_ends_at_once() {
    let stand = Stand::new("cancel", |namespace| {
        let mut deployment = deployment(namespace, 1, "sleep 600");
        ready_when_it_answers(&mut deployment);
        vec![deployment]
    });
    let canceler = stand.cancel_at("0 of 1 new pods ready");
    let begun = Instant::now();
    assert!(matches!(stand.verify().await, Err(StageError::Canceled)));
    assert!(begun.elapsed() < Duration::from_secs(10));
    canceler.await.unwrap();
}
