//! Deploy on a real cluster: plan and apply over what people's tools, autoscalers and quotas do there.

use std::process::{Command, Stdio};
use std::time::Duration;

use landfall::build_log::{BuildLog, Masker};
use landfall::builds::{Build, Cause, Stage};
use landfall::cluster::apply::{self, Rules};
use landfall::config::{Docker, Environment};
use landfall::diagnostic::parse_yaml;
use landfall::pipeline::{self, Pipeline};
use landfall::release::{Change, Release};
use landfall::stages::deploy::{self, Applying, Way};
use landfall::stages::plan::{self, Ground};
use landfall::stages::{Applied, Built, CheckedOut, Scope, StageError, StageResult};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::support::{
    self, COMMIT, Namespace, busybox, eventually, kubeconfig, kubectl, registry, setting,
};

const LIMIT: Duration = Duration::from_secs(90);

/// One environment, and the tree of a commit.
struct Place {
    namespace: Namespace,
    environment: Environment,
    tree: TempDir,
    pipeline: Pipeline,
}

impl Place {
    fn new(name: &str) -> Self {
        Self::with(name, "")
    }

    /// `more` lines of agent.yaml.
    fn with(name: &str, more: &str) -> Self {
        let namespace = Namespace::new(name);
        let environment = environment(&namespace.0, more);
        let text =
            "image: {name: busybox}\ndeploy: {manifests: [k8s/]}\nverify: {timeout_seconds: 60}\n";
        Self {
            namespace,
            environment,
            tree: tempfile::tempdir().unwrap(),
            pipeline: pipeline::parse("pipeline.yaml", text).unwrap(),
        }
    }

    fn ns(&self) -> &str {
        &self.namespace.0
    }

    fn kubectl(&self, arguments: &[&str]) -> String {
        kubectl(&[&["-n", self.ns()], arguments].concat())
    }

    /// A field of an object, empty where it is not there.
    fn field(&self, object: &str, path: &str) -> String {
        self.kubectl(&[
            "get",
            object,
            "--ignore-not-found",
            "-o",
            &format!("jsonpath={{{path}}}"),
        ])
    }

    /// `kubectl apply`, as people do it.
    fn kubectl_apply(&self, manifests: &str, options: &[&str]) {
        let file = self.tree.path().join("by-hand.yaml");
        std::fs::write(
            &file,
            manifests.replace("image: busybox", &format!("image: {}", busybox())),
        )
        .unwrap();
        self.kubectl(&[&["apply", "-f", file.to_str().unwrap()], options].concat());
    }

    async fn plan(&self, number: i64, manifests: &str) -> (StageResult<Release>, String) {
        self.plan_over(number, manifests, None).await
    }

    /// As `plan`, where a release serves already.
    async fn plan_over(
        &self,
        number: i64,
        manifests: &str,
        serving: Option<&Release>,
    ) -> (StageResult<Release>, String) {
        let folder = self.tree.path().join("k8s");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("app.yaml"), manifests).unwrap();
        let checked_out = CheckedOut {
            commit: COMMIT.to_owned(),
            commit_time: 0,
            title: format!("Change {number}"),
            author: "A. U. Thor".to_owned(),
            tree: self.tree.path().to_owned(),
            pipeline: self.pipeline.clone(),
        };
        let (repository, digest) = busybox()
            .split_once('@')
            .map(|(a, b)| (a.to_owned(), b.to_owned()))
            .unwrap();
        let built = Built {
            tag: format!("{repository}:{COMMIT}"),
            repository,
            digest,
            config_digest: String::new(),
        };
        self.with_scope(number, async |scope| {
            let ground = Ground {
                serving: serving.cloned(),
                ..Ground::default()
            };
            let plan = plan::run(scope, &checked_out, &built, &ground).await?;
            Ok(plan.release)
        })
        .await
    }

    async fn apply(&self, number: i64, release: &Release) -> (StageResult<Applied>, String) {
        self.with_scope(number, async |scope| {
            let held = deploy::hold(scope, Some(release)).await?;
            let mut applying = Applying::begin(scope, &held, release, Way::Forward).await?;
            let mut objects = Vec::new();
            while let Some((_, object)) = applying.next().await? {
                objects.push(object);
            }
            Ok(Applied {
                release_id: release.id,
                objects,
                unwell: Vec::new(),
                refused: Vec::new(),
            })
        })
        .await
    }

    async fn with_scope<T>(
        &self,
        number: i64,
        work: impl AsyncFnOnce(&Scope<'_>) -> T,
    ) -> (T, String) {
        let log = BuildLog::new(Masker::default(), 1 << 20, 0);
        let stage_log = log.stage(Stage::Deploy);
        let build = build(number);
        let scope = Scope {
            build: &build,
            environment: &self.environment,
            docker: &Docker::default(),
            mirrors: self.tree.path(),
            work: self.tree.path(),
            log: &stage_log,
            cancel: &CancellationToken::new(),
        };
        let result = work(&scope).await;
        log.close();
        let mut text = String::new();
        while let Some(lines) = log.drain().await {
            lines
                .iter()
                .for_each(|line| text += &String::from_utf8_lossy(&line.bytes));
        }
        println!("{text}");
        (result, text)
    }

    /// Plan and apply; what was applied and the log of both.
    async fn deploy(&self, number: i64, manifests: &str) -> (Applied, String) {
        let (release, plan) = self.plan(number, manifests).await;
        let (applied, log) = self.apply(number, &release.unwrap()).await;
        (applied.unwrap(), plan + &log)
    }

    async fn refused(&self, manifests: &str) -> Cause {
        match self.plan(1, manifests).await.0 {
            Err(StageError::Failed(cause)) => cause,
            other => panic!("not refused: {other:?}"),
        }
    }
}

fn environment(namespace: &str, more: &str) -> Environment {
    let kubeconfig = kubeconfig();
    let text = format!(
        "name: test\nrepository: acme/hello\nbranch: main\nclone_url: https://example.org/hello\nnamespace: {namespace}\nimage_prefix: localhost:5002\nkubeconfig: {}\n{more}",
        kubeconfig.display()
    );
    parse_yaml("agent.yaml", &text).unwrap()
}

fn build(number: i64) -> Build {
    Build {
        id: number,
        environment: "test".to_owned(),
        by: "me".to_owned(),
        fence: number,
        ..support::build()
    }
}

/// A Deployment; `spec` and `container` are further lines of each, in flow style.
fn deployment(name: &str, spec: &str, container: &str) -> String {
    format!(
        "---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  selector: {{matchLabels: {{app: {name}}}}}
  {spec}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: main
          image: busybox
          command: [/bin/busybox, sleep, '10000']
          {container}
"
    )
}

fn configmap(name: &str, value: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\ndata: {{key: {value}, mode: '0644'}}\n"
    )
}

fn autoscaler(min: u8) -> String {
    format!(
        "---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {{name: web}}
spec:
  scaleTargetRef: {{apiVersion: apps/v1, kind: Deployment, name: web}}
  minReplicas: {min}
  maxReplicas: 9
  metrics: [{{type: Resource, resource: {{name: cpu, target: {{type: Utilization, averageUtilization: 70}}}}}}]
"
    )
}

fn changes(applied: &Applied) -> Vec<(String, Change)> {
    applied
        .objects
        .iter()
        .map(|object| (object.display_name(), object.change))
        .collect()
}

fn change_of(applied: &Applied, name: &str) -> Change {
    changes(applied)
        .into_iter()
        .find(|(known, _)| known == name)
        .unwrap()
        .1
}

#[tokio::test]
async fn the_same_set_twice_is_unchanged() {
    let place = Place::new("deploy-twice");
    let set = [
        "---\napiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: web}\nspec: {minAvailable: 1, selector: {matchLabels: {app: web}}}\n",
        &deployment("web", "replicas: 3", ""),
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {selector: {app: web}, ports: [{port: 80, targetPort: 5000}]}\n",
        "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: web}\n",
        "---\napiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {name: web}\nspec: {defaultBackend: {service: {name: web, port: {number: 80}}}}\n",
        &format!("---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {}, labels: {{team: blue}}}}\n", place.ns()),
        &configmap("settings", "one"),
    ]
    .concat();
    let (release, plan) = place.plan(1, &set).await;
    let release = release.unwrap();
    assert!(
        plan.contains("deployment/web will be created") && plan.contains("labels.team is missing"),
        "{plan}"
    );
    assert_eq!(
        place.kubectl(&["get", "deployments,services,pdb,ingress", "-o", "name"]),
        "",
        "a plan changed something"
    );
    let (applied, log) = place.apply(1, &release).await;
    let kinds: Vec<_> = applied
        .as_ref()
        .unwrap()
        .objects
        .iter()
        .map(|object| object.kind.as_str())
        .collect();
    let order = [
        "ServiceAccount",
        "ConfigMap",
        "Service",
        "Deployment",
        "PodDisruptionBudget",
        "Ingress",
    ];
    assert_eq!(kinds, order);
    assert!(log.contains("deployment/web created\n"), "{log}");
    assert_eq!(place.field("deployment/web", ".spec.replicas"), "3");

    // The controller writes its status and revision meanwhile.
    eventually("three pods", LIMIT, async || {
        (place.field("deployment/web", ".status.replicas") == "3").then_some(())
    })
    .await;
    let (again, log) = place.deploy(2, &set).await;
    assert!(again.changed_nothing(), "{:?}", changes(&again));
    assert!(
        log.contains("deployment/web is unchanged") && log.contains("deployment/web unchanged\n"),
        "{log}"
    );
    assert_eq!(
        place.field(
            "deployment/web",
            ".metadata.annotations.landfall\\.dev/build"
        ),
        "1"
    );
    assert_eq!(place.field("deployment/web", ".metadata.generation"), "1");
    assert_eq!(place.field("deployment/web", ".spec.replicas"), "3");
    let cause = place.field(
        "deployment/web",
        ".metadata.annotations.kubernetes\\.io/change-cause",
    );
    assert_eq!(cause, "Landfall #1: 0123456789ab Change 1");
    assert_eq!(deploy::undo_hint(place.ns(), &again.objects), None);
}

#[tokio::test]
async fn what_is_not_allowed_is_named_and_nothing_is_applied() {
    let place = Place::new("deploy-policy");
    let role = "---\napiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRoleBinding\nmetadata: {name: mine}\n";
    let cause = place
        .refused(&[&configmap("a", "b"), role, &deployment("web", "", "")].concat())
        .await;
    assert_eq!(cause.id, "policy_denied");
    assert!(
        cause
            .sentence
            .contains("clusterrolebinding/mine in k8s/app.yaml:7 (document 2)"),
        "{}",
        cause.sentence
    );
    assert_eq!(place.field("configmap/a", ".metadata.name"), "");

    place.kubectl(&["create", "serviceaccount", "admin"]);
    let account = "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: admin}\n";
    let cause = place
        .refused(&[account, &deployment("web", "", "")].concat())
        .await;
    assert_eq!(cause.id, "policy_denied");
    assert!(
        cause.sentence.contains("serviceaccount/admin exists"),
        "{}",
        cause.sentence
    );
}

#[tokio::test]
async fn fields_of_kubectl_apply_really_go() {
    let place = Place::new("deploy-taken");
    let by_hand = deployment(
        "web",
        "replicas: 1\n  paused: true",
        "env: [{name: EXTRA, value: '1'}, {name: KEPT, value: '1'}]",
    );
    place.kubectl_apply(&by_hand, &[]);
    let ours = deployment("web", "replicas: 1", "env: [{name: KEPT, value: '2'}]");
    let (_, log) = place.deploy(1, &ours).await;
    assert!(log.contains("took over what kubectl had applied"), "{log}");
    // Already the plan names them.
    let plan = log.split("took over").next().unwrap_or_default();
    let extra = r#".spec.template.spec.containers[name="main"].env[name="EXTRA"]"#;
    for field in [extra, ".spec.paused"] {
        let told = format!("{field}: removed, kubectl had set it");
        assert!(plan.contains(&told), "{plan}");
    }
    assert_eq!(plan.matches(": removed, kubectl").count(), 2, "{plan}");
    let names = ".spec.template.spec.containers[0].env[*].name";
    assert_eq!(place.field("deployment/web", names), "KEPT");
    assert_eq!(place.field("deployment/web", ".spec.paused"), "");
    assert_eq!(
        place.field(
            "deployment/web",
            ".spec.template.spec.containers[0].env[0].value"
        ),
        "2"
    );
    assert!(place.deploy(2, &ours).await.0.changed_nothing());

    // Turns: kubectl applies again, then we.
    place.kubectl_apply(&by_hand, &[]);
    assert_eq!(place.field("deployment/web", names), "EXTRA KEPT");
    place.deploy(3, &ours).await;
    assert_eq!(place.field("deployment/web", names), "KEPT");
    let managers = place.field(
        "deployment/web",
        ".metadata.managedFields[?(@.operation=='Update')].manager",
    );
    assert!(!managers.contains("landfall"), "{managers}");
}

#[tokio::test]
async fn what_people_changed_with_kubectl_is_taken_back_and_said() {
    let place = Place::new("deploy-people");
    let first = deployment("web", "replicas: 1", "env: [{name: OLD, value: '1'}]");
    let second = deployment("web", "replicas: 1", "env: [{name: NEW, value: '1'}]");
    place.deploy(1, &first).await;
    let (applied, plan) = place.deploy(2, &second).await;
    assert_eq!(change_of(&applied, "deployment/web"), Change::Changed);
    assert!(
        plan.contains("spec.template.spec.containers[main].env[OLD]")
            && plan.contains("is removed"),
        "{plan}"
    );
    assert!(plan.contains("change-cause"), "{plan}");

    place.kubectl(&["scale", "deployment/web", "--replicas=2"]);
    place.kubectl(&[
        "set",
        "image",
        "deployment/web",
        "main=localhost:5002/none:1",
    ]);
    place.kubectl(&[
        "patch",
        "deployment/web",
        "--field-manager=kubectl-edit",
        "-p",
        "{\"metadata\":{\"labels\":{\"app\":\"edited\"}}}",
    ]);
    let (_, log) = place.deploy(3, &second).await;
    for taken in [
        "took .spec.replicas back from kubectl",
        "image back from kubectl-set",
        "took .metadata.labels.app back from kubectl-edit",
    ] {
        assert!(log.contains(taken), "{taken}: {log}");
    }
    assert_eq!(place.field("deployment/web", ".spec.replicas"), "1");
    assert_eq!(place.field("deployment/web", ".metadata.labels.app"), "web");
    assert_eq!(
        place.field("deployment/web", ".spec.template.spec.containers[0].image"),
        busybox()
    );

    place.kubectl(&["rollout", "undo", "deployment/web"]);
    place.kubectl(&["rollout", "undo", "deployment/web", "--to-revision=1"]);
    assert_eq!(
        place.field(
            "deployment/web",
            ".spec.template.spec.containers[0].env[*].name"
        ),
        "OLD"
    );
    place.deploy(4, &second).await;
    assert_eq!(
        place.field(
            "deployment/web",
            ".spec.template.spec.containers[0].env[*].name"
        ),
        "NEW"
    );
    assert!(place.deploy(5, &second).await.0.changed_nothing());
}

#[tokio::test]
async fn a_restart_by_hand_rolls_nothing_a_second_time() {
    let place = Place::new("deploy-restart");
    let set = deployment("web", "replicas: 1", "");
    place.deploy(1, &set).await;
    place.kubectl(&["rollout", "restart", "deployment/web"]);
    let generation = place.field("deployment/web", ".metadata.generation");
    assert!(place.deploy(2, &set).await.0.changed_nothing());
    assert_eq!(
        place.field("deployment/web", ".metadata.generation"),
        generation
    );
}

#[tokio::test]
async fn the_fields_of_another_manager_are_refused_unless_the_operator_says_so() {
    let mut place = Place::new("deploy-helm");
    let set = |value: &str| {
        [
            configmap("shared", value),
            deployment("web", "replicas: 1", ""),
        ]
        .concat()
    };
    place.kubectl_apply(
        &configmap("shared", "theirs"),
        &["--server-side", "--field-manager=helm"],
    );
    let cause = place.refused(&set("ours")).await;
    assert_eq!(cause.id, "field_conflict");
    assert!(
        cause.sentence.contains("configmap/shared")
            && cause.sentence.contains(".data.key belongs to helm"),
        "{}",
        cause.sentence
    );
    assert_eq!(place.field("configmap/shared", ".data.key"), "theirs");
    assert_eq!(place.field("deployment/web", ".metadata.name"), "");
    place.environment.take_fields_from = vec!["helm".to_owned()];
    let (_, log) = place.deploy(2, &set("ours")).await;
    assert!(log.contains("took .data.key back from helm"), "{log}");
    assert_eq!(place.field("configmap/shared", ".data.key"), "ours");
}

/// Every value that `spec.replicas` had, as a watching client sees it.
struct Replicas(std::process::Child);

impl Replicas {
    fn watch(place: &Place) -> Self {
        let child = Command::new(setting("LANDFALL_TEST_KUBECTL"))
            .arg("--kubeconfig")
            .arg(kubeconfig())
            .args([
                "-n",
                place.ns(),
                "get",
                "deployment/web",
                "-w",
                "-o",
                "jsonpath={.spec.replicas}{\"\\n\"}",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self(child)
    }

    fn seen(mut self) -> Vec<String> {
        self.0.kill().unwrap();
        let output = self.0.wait_with_output().unwrap();
        String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    }
}

#[tokio::test]
async fn an_autoscaler_keeps_its_replicas_and_its_end_gives_them_back() {
    let place = Place::new("deploy-hpa");
    let web = |value: &str| {
        deployment(
            "web",
            "replicas: 3",
            &format!("env: [{{name: A, value: '{value}'}}]"),
        )
    };
    place.deploy(1, &web("1")).await;
    let watch = Replicas::watch(&place);
    // New, and without a number of its own yet: the field must not fall to its default.
    let (_, log) = place.deploy(2, &[web("2"), autoscaler(2)].concat()).await;
    assert!(
        log.contains("left the number of replicas to its autoscaler"),
        "{log}"
    );
    assert_eq!(place.field("deployment/web", ".spec.replicas"), "3");
    place.deploy(3, &[web("2"), autoscaler(5)].concat()).await;
    eventually("five replicas by the autoscaler", LIMIT, async || {
        (place.field("deployment/web", ".spec.replicas") == "5").then_some(())
    })
    .await;
    place.deploy(4, &[web("3"), autoscaler(5)].concat()).await;
    // Live, though not in the set.
    place.deploy(5, &web("4")).await;
    assert_eq!(place.field("deployment/web", ".spec.replicas"), "5");
    let mut seen = watch.seen();
    seen.dedup();
    assert_eq!(seen, ["3", "5"]);
    place.kubectl(&["delete", "hpa/web"]);
    let (_, log) = place.deploy(6, &web("4")).await;
    assert!(
        log.contains("took .spec.replicas back from kube-controller-manager"),
        "{log}"
    );
    assert_eq!(place.field("deployment/web", ".spec.replicas"), "3");
}

#[tokio::test]
async fn a_config_map_rolls_only_the_workload_that_names_it() {
    let place = Place::new("deploy-config");
    let set = |value: &str| {
        [
            configmap("settings", value),
            deployment(
                "web",
                "replicas: 1",
                "envFrom: [{configMapRef: {name: settings}}]",
            ),
            deployment("database", "replicas: 1", ""),
        ]
        .concat()
    };
    place.deploy(1, &set("one")).await;
    let (applied, _) = place.deploy(2, &set("two")).await;
    let expected = [
        ("configmap/settings".to_owned(), Change::Changed),
        ("deployment/web".to_owned(), Change::Changed),
        ("deployment/database".to_owned(), Change::Unchanged),
    ];
    assert_eq!(changes(&applied), expected);
    assert_eq!(
        place.field("deployment/database", ".metadata.generation"),
        "1"
    );
    assert_eq!(
        place.field(
            "deployment/web",
            ".metadata.annotations.landfall\\.dev/build"
        ),
        "2"
    );
    assert_eq!(place.field("configmap/settings", ".data.mode"), "0644");
    let hint = deploy::undo_hint(place.ns(), &applied.objects).unwrap();
    assert_eq!(
        hint,
        format!("kubectl -n {} rollout undo deployment/web", place.ns())
    );
}

#[tokio::test]
async fn the_plan_finds_what_the_cluster_would_refuse() {
    let place = Place::new("deploy-plan");
    let cause = place
        .refused(&[configmap("a", "b"), deployment("web", "replica: 3", "")].concat())
        .await;
    assert_eq!(cause.id, "manifest_invalid");
    assert!(
        cause
            .sentence
            .starts_with("k8s/app.yaml:7 (document 2): deployment/web ")
            && cause.sentence.contains(".spec.replica"),
        "{}",
        cause.sentence
    );

    let cause = place.refused(&deployment("web", "replicas: -1", "")).await;
    assert_eq!(cause.id, "manifest_invalid");
    assert!(
        cause.sentence.contains("spec.replicas"),
        "{}",
        cause.sentence
    );

    let cause = place
        .refused(&deployment("web", "", "").replace("apps/v1", "apps/v1beta7"))
        .await;
    assert_eq!(cause.id, "kind_unknown");
    assert!(
        cause.sentence.starts_with("k8s/app.yaml:2 (document 1): "),
        "{}",
        cause.sentence
    );

    place.kubectl(&[
        "create",
        "quota",
        "small",
        "--hard=limits.memory=1Gi,pods=50",
    ]);
    let cause = place
        .refused(&deployment("web", "", "resources: {limits: {memory: 2Gi}}"))
        .await;
    assert_eq!(cause.id, "quota_exceeded");
    assert!(
        cause.sentence.contains("deployment/web") && cause.sentence.contains("limits.memory"),
        "{}",
        cause.sentence
    );
    place.kubectl(&["delete", "quota", "small"]);
    assert_eq!(
        place.kubectl(&["get", "deployments,pods", "-o", "name"]),
        ""
    );
    assert_eq!(place.field("configmap/a", ".metadata.name"), "");

    place.deploy(1, &deployment("web", "replicas: 1", "")).await;
    let other = deployment("web", "replicas: 1", "").replace("{app: web}", "{app: other}");
    let cause = place.refused(&other).await;
    assert_eq!(cause.id, "immutable_field");
    assert!(
        cause.sentence.contains("spec.selector"),
        "{}",
        cause.sentence
    );
    assert!(cause.hint.unwrap().contains("delete deployment/web"));
}

#[tokio::test]
async fn a_missing_namespace_is_made_only_where_the_operator_says_so() {
    let mut place = Place::new("deploy-namespace");
    let other = Namespace(format!("{}-new", place.ns()));
    place.environment.namespace.clone_from(&other.0);
    let set = [configmap("a", "b"), deployment("web", "replicas: 1", "")].concat();
    let cause = place.refused(&set).await;
    assert_eq!(cause.id, "namespace_missing");
    assert_eq!(
        cause.hint.unwrap(),
        format!("make it: kubectl create namespace {}", other.0)
    );
    place.environment.create_namespace = true;
    let (applied, log) = place.deploy(1, &set).await;
    assert!(log.contains("cannot be checked before"), "{log}");
    assert!(
        log.contains(&format!("namespace/{} created", other.0)),
        "{log}"
    );
    assert_eq!(change_of(&applied, "configmap/a"), Change::Created);
    assert_eq!(
        kubectl(&["-n", &other.0, "get", "configmap/a", "-o", "name"]).trim(),
        "configmap/a"
    );
    assert!(place.deploy(2, &set).await.0.changed_nothing());
}

#[tokio::test]
async fn an_object_that_is_being_deleted_is_waited_for_and_a_namespace_is_named() {
    let place = Place::new("deploy-leaving");
    let held = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: held, finalizers: [landfall.test/hold]}\n";
    let let_go = || {
        let nobody = r#"{"metadata": {"finalizers": null}}"#;
        place.kubectl(&["patch", "configmap/held", "--type=merge", "-p", nobody]);
    };
    place.kubectl_apply(held, &[]);
    place.kubectl(&["delete", "configmap/held", "--wait=false"]);
    let uid = place.field("configmap/held", ".metadata.uid");
    let set = |value: &str| {
        [
            configmap("held", value),
            deployment("web", "replicas: 0", ""),
        ]
        .concat()
    };
    let release = place.plan(1, &set("new")).await.0.unwrap();
    let letting_go = async {
        // What it writes into it is lost with it.
        eventually("it is written", LIMIT, async || {
            (place.field("configmap/held", ".data.key") == "new").then_some(())
        })
        .await;
        let_go();
    };
    let ((applied, log), ()) = tokio::join!(place.apply(1, &release), letting_go);
    applied.unwrap();
    assert!(
        log.contains("configmap/held is being deleted, waiting until it is gone"),
        "{log}"
    );
    assert_eq!(place.field("configmap/held", ".data.key"), "new");
    assert_ne!(place.field("configmap/held", ".metadata.uid"), uid);

    place.kubectl_apply(held, &[]);
    let planned = place.plan(2, &set("newer")).await.0.unwrap();
    kubectl(&["delete", "namespace", place.ns(), "--wait=false"]);
    let Err(StageError::Failed(cause)) = place.apply(2, &planned).await.0 else {
        panic!("a namespace that went after the plan was not noticed");
    };
    assert_eq!(cause.id, "namespace_terminating", "{cause:?}");
    let cause = place.refused(&set("newest")).await;
    assert_eq!(cause.id, "namespace_terminating");
    assert_eq!(place.field("configmap/held", ".data.key"), "new");
    let_go();
}

#[tokio::test]
async fn a_job_runs_once_and_before_the_workloads() {
    let place = Place::new("deploy-job");
    let job = |command: &str| {
        format!(
            "---\napiVersion: batch/v1\nkind: Job\nmetadata: {{name: migrate}}\nspec:\n  backoffLimit: 0\n  template:\n    spec:\n      restartPolicy: Never\n      containers: [{{name: main, image: busybox, command: [/bin/busybox, {command}]}}]\n"
        )
    };
    let set = |command: &str, value: &str| {
        let env = format!("env: [{{name: A, value: '{value}'}}]");
        [deployment("web", "replicas: 1", &env), job(command)].concat()
    };
    let (applied, log) = place.deploy(1, &set("'true'", "1")).await;
    let name = applied.objects[0].display_name();
    assert!(
        name.starts_with("job/migrate-") && log.contains(&format!("{name} is complete")),
        "{log}"
    );
    let (applied, _) = place.deploy(2, &set("'true'", "2")).await;
    assert_eq!(change_of(&applied, &name), Change::Unchanged);
    assert_eq!(
        place
            .kubectl(&["get", "jobs", "-o", "name"])
            .lines()
            .count(),
        1
    );

    let (release, _) = place.plan(3, &set("'false'", "3")).await;
    let Err(StageError::Failed(cause)) = place.apply(3, &release.unwrap()).await.0 else {
        panic!("a failed job was not noticed");
    };
    assert_eq!(cause.id, "job_failed");
    assert!(
        cause.sentence.contains("backoff limit"),
        "{}",
        cause.sentence
    );
    let value = place.field(
        "deployment/web",
        ".spec.template.spec.containers[0].env[0].value",
    );
    assert_eq!(value, "2", "the workload was touched");
}

#[tokio::test]
async fn an_agent_with_a_role_in_its_namespace_can_deploy() {
    let mut place = Place::new("deploy-role");
    place.kubectl(&["create", "serviceaccount", "agent"]);
    let kinds = "--resource=deployments.apps,configmaps,horizontalpodautoscalers.autoscaling,pods,jobs.batch";
    place.kubectl(&[
        "create",
        "role",
        "agent",
        "--verb=get,list,watch,create,patch",
        kinds,
    ]);
    place.kubectl(&[
        "create",
        "role",
        "lease",
        "--verb=get,create,update",
        "--resource=leases.coordination.k8s.io",
    ]);
    place.kubectl(&[
        "create",
        "rolebinding",
        "lease",
        "--role=lease",
        &format!("--serviceaccount={}:agent", place.ns()),
    ]);
    place.kubectl(&[
        "create",
        "rolebinding",
        "agent",
        "--role=agent",
        &format!("--serviceaccount={}:agent", place.ns()),
    ]);
    let mut config: Value = serde_json::from_str(&kubectl(&[
        "config", "view", "--raw", "--minify", "-o", "json",
    ]))
    .unwrap();
    let token = place.kubectl(&["create", "token", "agent"]);
    config["users"][0]["user"] = serde_json::json!({"token": token.trim()});
    let path = place.tree.path().join("kubeconfig");
    std::fs::write(&path, config.to_string()).unwrap();
    place.environment.kubeconfig = Some(path);

    let set = [configmap("a", "b"), deployment("web", "replicas: 1", "")].concat();
    let Err(StageError::Agent(error)) = place.plan(1, &set).await.0 else {
        panic!("read a namespace without the right to");
    };
    assert!(
        format!("{error:#}").contains("cannot read the namespace"),
        "{error:#}"
    );

    // All that the agent has outside of its namespace's Role.
    place.kubectl(&[
        "create",
        "role",
        "reader",
        "--verb=get",
        "--resource=namespaces",
        &format!("--resource-name={}", place.ns()),
    ]);
    place.kubectl(&[
        "create",
        "rolebinding",
        "reader",
        "--role=reader",
        &format!("--serviceaccount={}:agent", place.ns()),
    ]);
    place.deploy(1, &set).await;
    assert!(place.deploy(2, &set).await.0.changed_nothing());

    let service =
        "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n";
    let Err(StageError::Agent(error)) = place.plan(3, &[&set, service].concat()).await.0 else {
        panic!("wrote a Service without the right to");
    };
    assert!(format!("{error:#}").contains("service/web"), "{error:#}");

    // Without `patch` nothing can be applied; the plan says so before anything is.
    place.kubectl(&["delete", "role", "agent"]);
    let verbs = "--verb=get,list,watch,create";
    place.kubectl(&["create", "role", "agent", verbs, kinds]);
    let Err(StageError::Agent(error)) = place.plan(4, &set).await.0 else {
        panic!("patched without the right to");
    };
    let error = format!("{error:#}");
    assert!(
        error.contains("the agent may not write configmap/a: ")
            && error.contains("landfall doctor"),
        "{error}"
    );
}

#[tokio::test]
async fn a_cluster_that_is_away_is_our_error_after_a_bounded_time() {
    let mut place = Place::with("deploy-away", "limits: {unreachable_seconds: 2}");
    let mut config: Value = serde_json::from_str(&kubectl(&[
        "config", "view", "--raw", "--minify", "-o", "json",
    ]))
    .unwrap();
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1".into();
    let path = place.tree.path().join("kubeconfig");
    std::fs::write(&path, config.to_string()).unwrap();
    place.environment.kubeconfig = Some(path);
    let begun = std::time::Instant::now();
    let Err(StageError::Agent(error)) = place.plan(1, &deployment("web", "", "")).await.0 else {
        panic!("reached a cluster that is not there");
    };
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
    let told = format!("{error:#}");
    assert!(
        told.contains("no good answer from the cluster at https://127.0.0.1:1 for ")
            && told.contains(" s: Connection refused"),
        "{told}"
    );
}

#[tokio::test]
async fn an_image_built_elsewhere_keeps_its_digest_until_its_name_changes() {
    let place = Place::new("deploy-foreign");
    let name = format!("{}/{}/side", registry(), place.ns());
    let publish = |label: &str| {
        let line = format!(
            "printf 'FROM {}\nLABEL of={label}\n' | docker build -q -t {name}:1 - && docker push -q {name}:1",
            busybox()
        );
        assert!(
            Command::new("bash")
                .args(["-ec", &line])
                .status()
                .unwrap()
                .success()
        );
    };
    publish("one");
    let side = format!(
        "- {{name: side, image: '{name}:1'}}\n        - {{name: away, image: '127.0.0.1:9/away:1'}}"
    );
    let set = deployment(
        "web",
        "",
        &format!("imagePullPolicy: IfNotPresent\n        {side}"),
    );
    let image = |release: &Release, at: usize| {
        let path = format!("/spec/template/spec/containers/{at}/image");
        release.objects[0]
            .pointer(&path)
            .unwrap()
            .as_str()
            .unwrap()
            .to_owned()
    };
    let (first, log) = place.plan(1, &set).await;
    let first = first.unwrap();
    assert!(
        image(&first, 1).starts_with(&format!("{name}:1@sha256:")),
        "{}",
        image(&first, 1)
    );
    assert_eq!(image(&first, 2), "127.0.0.1:9/away:1");
    assert!(
        log.contains("127.0.0.1:9/away:1 is deployed by its tag: 127.0.0.1:9 does not say"),
        "{log}"
    );

    publish("two");
    let kept = place.plan_over(2, &set, Some(&first)).await.0.unwrap();
    assert_eq!(image(&kept, 1), image(&first, 1));
    assert_eq!(kept.set_hash, first.set_hash);
    let anew = place.plan(3, &set).await.0.unwrap();
    assert_ne!(image(&anew, 1), image(&first, 1));
    let _ = Command::new("docker")
        .args(["image", "rm", &format!("{name}:1")])
        .output();
}

#[tokio::test]
async fn an_apply_under_an_older_fence_is_refused_also_where_the_object_was_deleted() {
    let place = Place::new("deploy-fence");
    let set = |value: &str| {
        [
            configmap("settings", value),
            deployment("web", "replicas: 0", ""),
        ]
        .concat()
    };
    place.deploy(1, &set("one")).await;
    for deleted in [false, true] {
        let older = place.plan(2, &set("older")).await.0.unwrap();
        let newer = place.plan(3, &set("newer")).await.0.unwrap();
        // The older holder pauses between its claim and its first object; the newer one takes over and applies.
        let paused = async |scope: &Scope<'_>| -> StageResult<()> {
            let held = deploy::hold(scope, Some(&older)).await?;
            let mut applying = Applying::begin(scope, &held, &older, Way::Forward).await?;
            place.apply(3, &newer).await.0?;
            if deleted {
                place.kubectl(&["delete", "configmap/settings"]);
            }
            while applying.next().await?.is_some() {}
            Ok(())
        };
        let refused = place.with_scope(2, paused).await.0;
        let Err(StageError::Agent(error)) = refused else {
            panic!("an older holder has written: {refused:?}");
        };
        let told = format!("{error:#}");
        assert!(
            told.contains("another agent has taken over this environment"),
            "{told}"
        );
        let stands = if deleted { "" } else { "newer" };
        assert_eq!(place.field("configmap/settings", ".data.key"), stands);
    }
    let fence = place.field("deployment/web", ".metadata.labels.landfall\\.dev/fence");
    assert_eq!(
        fence,
        place.field("lease/landfall-test", ".spec.leaseTransitions")
    );
    // A store that was lost begins anew with small numbers, and goes on all the same.
    place.deploy(1, &set("anew")).await;
    assert_eq!(place.field("configmap/settings", ".data.key"), "anew");
}

/// STALE_WRITES, default 20.
#[tokio::test]
async fn p5_the_cluster_refuses_every_write_of_a_holder_that_was_outdone() {
    let place = Place::new("deploy-outdone");
    let set = |value: &str| {
        [
            configmap("settings", value),
            deployment("web", "replicas: 0", ""),
        ]
        .concat()
    };
    place.deploy(1, &set("one")).await;
    let older = place.plan(2, &set("older")).await.0.unwrap();
    let newer = place.plan(3, &set("newer")).await.0.unwrap();
    let wanted = crate::soak::number("STALE_WRITES", 20);
    let sleeps = async |scope: &Scope<'_>| -> StageResult<usize> {
        let held = deploy::hold(scope, Some(&older)).await?;
        place.apply(3, &newer).await.0?;
        let rules = Rules {
            held: Some(&held),
            ..Rules::default()
        };
        let mut refused = 0;
        for turn in 0..wanted {
            let mut object = older.objects[0].clone();
            object["data"]["key"] = json!(format!("late {turn}"));
            refused += usize::from(
                apply::apply(&held.cluster, &rules, &object, false)
                    .await
                    .is_err(),
            );
        }
        Ok(refused)
    };
    let refused = place.with_scope(2, sleeps).await.0.unwrap();
    crate::soak::keep(
        "stale_writes_refused_by_the_cluster",
        &json!({"writes": wanted, "refused": refused}),
    );
    assert_eq!(refused, wanted);
    assert_eq!(place.field("configmap/settings", ".data.key"), "newer");
}

#[tokio::test]
async fn a_service_that_would_lead_nowhere_is_refused_before_the_rollout() {
    let place = Place::new("deploy-wiring");
    let service = |selector: &str, port: &str| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {{selector: {{app: {selector}}}, ports: [{{port: 80, targetPort: {port}}}]}}\n"
        )
    };
    let web = deployment(
        "web",
        "replicas: 1",
        "ports: [{name: http, containerPort: 5000}]",
    );
    let cause = place
        .refused(&[&service("wbe", "5000"), web.as_str()].concat())
        .await;
    assert_eq!(cause.id, "service_selects_nothing", "{}", cause.sentence);
    let cause = place
        .refused(&[&service("web", "htpp"), web.as_str()].concat())
        .await;
    assert_eq!(cause.id, "service_port_unknown");
    assert!(
        cause.sentence.contains("(they have http)"),
        "{}",
        cause.sentence
    );
    let ingress = "---\napiVersion: networking.k8s.io/v1\nkind: Ingress\nmetadata: {name: web}\nspec: {defaultBackend: {service: {name: gone, port: {number: 80}}}}\n";
    let cause = place.refused(&[ingress, web.as_str()].concat()).await;
    assert_eq!(cause.id, "ingress_backend_missing");
    // What selects pods that are live is well: somebody else rolls them out.
    place.kubectl(&[
        "run",
        "wbe",
        &format!("--image={}", busybox()),
        "--labels=app=wbe",
        "--",
        "/bin/busybox",
        "sleep",
        "1000",
    ]);
    place
        .plan(1, &[&service("wbe", "5000"), web.as_str()].concat())
        .await
        .0
        .unwrap();
    assert_eq!(
        place.kubectl(&["get", "deployments,services", "-o", "name"]),
        ""
    );
}

#[tokio::test]
async fn a_service_that_only_pods_on_their_way_out_carry_is_refused_before_the_rollout() {
    let place = Place::new("deploy-label");
    let set = |version: &str, wanted: &str| {
        let service = format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {{selector: {{app: web, {wanted}}}, ports: [{{port: 80}}]}}\n"
        );
        let web = deployment("web", "replicas: 1", "ports: [{containerPort: 5000}]");
        let labeled = web.replacen(
            "metadata: {labels: {app: web}}",
            &format!("metadata: {{labels: {{app: web, version: {version}}}}}"),
            1,
        );
        assert_ne!(web, labeled);
        service + &labeled
    };
    place.deploy(1, &set("v1", "version: v1")).await;
    let count = ["get", "pods", "-l", "app=web,version=v1", "-o", "name"];
    crate::support::eventually("its pod", std::time::Duration::from_secs(20), async || {
        place.kubectl(&count).starts_with("pod/").then_some(())
    })
    .await;
    let cause = place.refused(&set("v2", "version: v1")).await;
    assert_eq!(cause.id, "service_selects_nothing", "{}", cause.sentence);
    place.plan(2, &set("v2", "version: v2")).await.0.unwrap();
    // What a StatefulSet writes on its pods is in no template; a hash that is written down leads to nobody soon.
    let of_a_pod = "statefulset.kubernetes.io/pod-name: web-0";
    place.plan(2, &set("v2", of_a_pod)).await.0.unwrap();
    let cause = place.refused(&set("v2", "pod-template-hash: abc")).await;
    assert_eq!(cause.id, "service_selects_nothing", "{}", cause.sentence);
}
