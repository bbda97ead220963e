//! A release on the real cluster, put there by kubectl, and what the stages after the apply are given of it.

use std::collections::BTreeSet;

use landfall::build_log::{BuildLog, Masker, StageLog};
use landfall::builds::{Build, Cause, Stage};
use landfall::config::{Docker, Environment};
use landfall::release::{AppliedObject, Change, Evidence, Planned, Release};
use landfall::stages::{
    Applied, Live, RolledOut, Scope, StageError, StageResult, job, listening, smoke_test, soak,
    verify,
    verify::{Known, Show},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::support::{
    self, COMMIT, Namespace, busybox, kubeconfig, kubectl, kubectl_command, registry,
};

/// A namespace with a release in it, applied by kubectl, and what a stage is given.
pub struct Stand {
    pub namespace: Namespace,
    pub environment: Environment,
    pub build: Build,
    pub release: Release,
    pub log: BuildLog,
    pub cancel: CancellationToken,
    /// Of the smoke test's requests that failed.
    pub evidence: Vec<Evidence>,
}

impl Stand {
    pub fn new(name: &str, objects: impl FnOnce(&str) -> Vec<Value>) -> Self {
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
            build: support::build(),
            release,
            log,
            cancel: CancellationToken::new(),
            evidence: Vec::new(),
        }
    }

    pub fn scope<'a>(&'a self, log: &'a StageLog) -> Scope<'a> {
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

    pub fn apply(&self) -> Applied {
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
            unwell: Vec::new(),
            refused: Vec::new(),
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
        let live = support::api("GET", &support::path_of(object), None).unwrap();
        let live: Value = serde_json::from_str(&live).unwrap();
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

    pub async fn verify(&self) -> StageResult<RolledOut> {
        let applied = self.apply();
        let log = self.log.stage(Stage::Verify);
        let scope = self.scope(&log);
        let cluster = scope.cluster().await?;
        // As the deploy does.
        for object in applied.objects.iter().filter(|it| it.kind == "Job") {
            job::completed(&scope, &cluster, &self.release, object).await?;
        }
        self.verify_applied(&applied).await
    }

    pub async fn verify_applied(&self, applied: &Applied) -> StageResult<RolledOut> {
        let log = self.log.stage(Stage::Verify);
        let known = Known::default();
        verify::run(&self.scope(&log), &self.release, applied, &known, Show::All).await
    }

    pub async fn smoke_test(&mut self, tests: Value, soak_seconds: u64) -> StageResult<Live> {
        let rolled_out = RolledOut {
            release_id: 7,
            ..RolledOut::default()
        };
        self.smoke_test_after(&rolled_out, tests, soak_seconds)
            .await
    }

    pub async fn smoke_test_after(
        &mut self,
        rolled_out: &RolledOut,
        tests: Value,
        soak_seconds: u64,
    ) -> StageResult<Live> {
        self.release.smoke_tests = serde_json::from_value(tests).unwrap();
        self.release.verify.soak_seconds = soak_seconds;
        let log = self.log.stage(Stage::SmokeTest);
        let scope = self.scope(&log);
        let mut evidence = Vec::new();
        let live = smoke_test::run(&scope, &self.release, rolled_out, &mut evidence).await;
        let soaked = match &live {
            Ok(_) => {
                let never = CancellationToken::new();
                let scope = Scope {
                    cancel: &never,
                    ..scope
                };
                let cut = async {
                    self.cancel.cancelled().await;
                    "the test says so".to_owned()
                };
                soak::run(&scope, &self.release, rolled_out, cut).await
            }
            Err(_) => Ok(()),
        };
        self.evidence = evidence;
        soaked.and(live)
    }

    /// Whether somebody listens where each Service leads that no smoke test asks.
    pub async fn listens(&self) -> StageResult<()> {
        let log = self.log.stage(Stage::SmokeTest);
        let objects = self.release.objects.iter();
        let touched: Vec<_> = objects.map(|object| self.applied(object)).collect();
        listening::run(&self.scope(&log), &self.release, &touched, &BTreeSet::new()).await
    }

    /// Which Services somebody answers that a plan leaves as they are, where it changes every workload.
    pub async fn heard(&mut self) -> BTreeSet<String> {
        let planned = |object: &Value| Planned {
            object: landfall::manifests::display_name(object),
            change: match object["kind"] == "Service" {
                true => Change::Unchanged,
                false => Change::Changed,
            },
            lines: Vec::new(),
            notes: Vec::new(),
        };
        self.release.plan = self.release.objects.iter().map(planned).collect();
        let log = self.log.stage(Stage::Deploy);
        listening::heard(&self.scope(&log), &self.release).await
    }

    /// As `listens`, where the Services stand as they were, and these answered before.
    pub async fn still_listens(&self, heard: &BTreeSet<String>) -> StageResult<()> {
        let log = self.log.stage(Stage::SmokeTest);
        listening::run(&self.scope(&log), &self.release, &[], heard).await
    }

    /// Does this to the namespace as soon as the log says these words; what was logged until then is lost to `log`.
    pub fn at(
        &self,
        words: &'static str,
        act: impl FnOnce(&str) + Send + 'static,
    ) -> tokio::task::JoinHandle<()> {
        let (namespace, log) = (self.namespace.0.clone(), self.log.clone());
        tokio::spawn(async move {
            let mut text = String::new();
            while !text.contains(words) {
                let lines = log.drain().await.unwrap();
                lines
                    .iter()
                    .for_each(|line| text.push_str(&String::from_utf8_lossy(&line.bytes)));
            }
            act(&namespace);
        })
    }

    pub fn cancel_at(&self, words: &'static str) -> tokio::task::JoinHandle<()> {
        let cancel = self.cancel.clone();
        self.at(words, move |_| cancel.cancel())
    }

    pub async fn log(&self) -> String {
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

/// What no namespace takes with it.
impl Drop for Stand {
    fn drop(&mut self) {
        let cluster_wide = self.release.objects.iter().filter(|object| {
            object["metadata"]["namespace"].is_null() && object["kind"] != "Namespace"
        });
        for object in cluster_wide {
            let (kind, name) = (&object["kind"], &object["metadata"]["name"]);
            let (kind, name) = (kind.as_str().unwrap(), name.as_str().unwrap());
            // A test that fails must not end the others by a second panic.
            let _ = kubectl_command(&["delete", "--ignore-not-found", "--wait=false", kind, name])
                .output();
        }
    }
}

/// `replicas` of one container of busybox that runs this in a shell.
pub fn deployment(namespace: &str, replicas: u32, shell: &str) -> Value {
    let labels = json!({"app": "web"});
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "namespace": namespace},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels, "annotations": {"landfall.dev/release": "aaaa"}},
            "spec": {"terminationGracePeriodSeconds": 1, "containers": [
                {"name": "app", "image": busybox(), "command": ["sh", "-c", shell], "ports": [{"name": "http", "containerPort": 8080}]}]}}}})
}

pub fn service(namespace: &str, app: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": namespace},
        "spec": {"selector": {"app": app}, "ports": [{"port": 80, "targetPort": "http"}]}})
}

pub fn container(deployment: &mut Value) -> &mut Value {
    &mut deployment["spec"]["template"]["spec"]["containers"][0]
}

pub fn ready_when_it_answers(deployment: &mut Value) {
    container(deployment)["readinessProbe"] =
        json!({"httpGet": {"path": "/", "port": 8080}, "periodSeconds": 1});
}

/// Serves a file of JSON with the commit, and ends as soon as it is told to.
pub const SERVE: &str = "mkdir /tmp/www; echo '{\"status\":\"healthy\",\"commit\":\"0123456789abcdef0123456789abcdef01234567\"}' > /tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www";

pub fn serving(namespace: &str) -> Vec<Value> {
    let mut deployment = deployment(namespace, 2, SERVE);
    ready_when_it_answers(&mut deployment);
    vec![service(namespace, "web"), deployment]
}

pub fn cause<T: std::fmt::Debug>(result: StageResult<T>) -> Cause {
    match result {
        Err(StageError::Failed(cause)) => cause,
        other => panic!("{other:?}"),
    }
}
