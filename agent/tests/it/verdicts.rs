//! Every way in which a rollout ends, on the real cluster: the good are never failed, the dead are called dead soon and by
//! the right cause. Each is a test by its name; `make soak` runs all of them again and again.

use std::process::Command;
use std::time::{Duration, Instant};

use axum::routing::post;
use axum::{Json, Router};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use landfall::builds::Cause;
use landfall::stages::StageError;
use serde_json::{Value, json};

use crate::stand::{SERVE, Stand, cause, deployment, ready_when_it_answers, serving};
use crate::support::{busybox, kubectl, kubectl_apply, kubectl_command, registry};
use crate::tls::{Certificate, Tls};

pub type Objects = fn(&str) -> Vec<Value>;

#[derive(Clone, Copy)]
pub struct Scenario {
    pub name: &'static str,
    /// What is applied to the namespace of this name.
    pub objects: Objects,
    pub ends: Ends,
}

#[derive(Clone, Copy)]
pub enum Ends {
    /// Live, however long it takes.
    Well,
    /// Failed within so many seconds, by this cause, with these words in its sentence.
    Failed(&'static str, &'static str, u32),
    /// As `Failed`, and not within so many seconds: until then it may pass by itself.
    Patiently(&'static str, &'static str, u32, u32),
    /// Failed when its time is up, which is so many seconds: until then it may come right.
    OutOfTime(&'static str, &'static str, u32),
}
use Ends::{Failed, OutOfTime, Patiently, Well};

macro_rules! scenarios {
    ($($name:ident $objects:expr, $ends:expr;)*) => {
        pub fn scenarios() -> Vec<Scenario> {
            vec![$(Scenario { name: stringify!($name), objects: $objects, ends: $ends }),*]
        }
        $(#[tokio::test]
        async fn $name() {
            let scenario = Scenario { name: stringify!($name), objects: $objects, ends: $ends };
            let right = judge(&scenario, None).await.unwrap();
            assert!(right.in_time(LOADED), "the right verdict after {:.1} s", right.seconds);
        })*
    };
}

scenarios! {
    // Images.
    an_image_that_is_not_there_is_named
        |ns| web(ns, "true", |c| c["image"] = json!(format!("{}/nosuch:1", registry()))), Failed("image_not_found", "/nosuch:1 of container app of pod web-", 10);
    a_registry_without_an_address_is_named
        |ns| web(ns, "true", |c| c["image"] = json!("registry.invalid/nosuch:1")), Failed("registry_unknown", "the registry registry.invalid", 15);
    a_registry_that_refuses_the_connection_has_a_minute
        |ns| web(ns, "true", |c| c["image"] = json!("127.0.0.1:9/nosuch:1")), Patiently("registry_unreachable", "connection refused", 60, 80);
    a_registry_that_never_answers_is_named_when_time_is_up
        silent_registry, OutOfTime("image_pull_slow", "still pulling the image 127.0.0.1:5996/nosuch:1", 20);
    an_image_whose_name_is_none_is_named
        |ns| web(ns, "true", |c| c["image"] = json!(format!("{}/No Such Name", registry()))), Failed("image_not_found", "/No Such Name of container app of pod web-", 10);
    a_registry_that_wants_a_password_is_named
        private_registry, Failed("image_pull_denied", "may not pull its image 127.0.0.1:5999/private/app:1", 50);
    a_program_for_another_cpu_is_named
        program_for_arm, Failed("wrong_architecture", "exec format error", 15);
    a_registry_that_is_back_after_20_seconds_is_no_failure
        registry_that_comes_late, Well;

    // Death.
    a_program_that_exits_at_start_is_named_with_its_last_words
        |ns| vec![deployment(ns, 3, "echo starting; echo 'fatal: DATABASE_URL is not set (hunter2-secret)' >&2; exit 1")],
        Failed("crash_loop", "exited with code 1 twice: fatal: DATABASE_URL is not set (***)", 12);
    a_program_that_a_signal_ends_is_named
        |ns| web(ns, "echo 'bad pointer'; sh -c 'kill -SEGV $$$$'; exit $?", |_| {}), Failed("crash_loop", "was ended by signal 11 (exit code 139) twice: ", 12);
    a_hook_after_the_start_that_fails_is_named
        |ns| web(ns, SERVE, |c| c["lifecycle"] = json!({"postStart": {"exec": {"command": ["sh", "-c", "exit 7"]}}})), Failed("hook_failed", "was ended twice because its postStart hook failed", 20);
    a_program_that_is_not_in_the_image_is_named
        |ns| web(ns, "", |c| c["command"] = json!(["/nosuchbinary"])), Failed("cannot_start", "/nosuchbinary: no such file", 20);
    a_program_killed_for_memory_is_dead_though_it_was_available
        |ns| web(ns, "sleep 1; exec dd if=/dev/zero of=/dev/null bs=64M", |c| c["resources"] = json!({"limits": {"memory": "16Mi"}})),
        Failed("oom_killed", "(its limit is 16Mi)", 15);
    a_program_killed_by_its_liveness_probe_is_named
        |ns| web(ns, SERVE, |c| c["livenessProbe"] = json!({"httpGet": {"path": "/nothing", "port": 8080}, "periodSeconds": 1, "failureThreshold": 1})),
        Failed("liveness_failed", "because its liveness probe failed", 30);
    an_init_container_that_fails_is_named
        with_init_container, Failed("init_failed", "exited with code 4 twice: migration failed", 15);
    a_program_of_a_stateful_set_that_exits_is_named
        |ns| vec![stateful(ns, 3, 0, "echo 'fatal: no disk'; exit 2")], Failed("crash_loop", "fatal: no disk", 15);
    a_program_of_a_daemon_set_that_exits_is_named
        |ns| vec![daemon(ns, "echo 'fatal: no device'; exit 2")], Failed("crash_loop", "fatal: no device", 15);
    a_job_that_fails_is_named
        |ns| vec![job(ns, "echo 'cannot migrate'; exit 9")], Failed("job_failed", "cannot migrate", 20);
    one_crash_and_then_a_good_life_is_no_failure
        crashes_once, Well;

    // Readiness.
    a_port_where_nobody_listens_is_named
        |ns| probed(ns, "sleep 600"), OutOfTime("probe_refused", "connection refused", 20);
    a_program_that_listens_elsewhere_is_told_where
        |ns| changed(probed(ns, &SERVE.replace("8080", "9090")), |it| crate::stand::container(it)["ports"] = json!([{"containerPort": 8080}, {"containerPort": 9090}])),
        OutOfTime("listens_elsewhere", "it listens on port 9090", 20);
    a_path_that_answers_404_to_its_probe_is_named
        |ns| web(ns, SERVE, |c| c["readinessProbe"] = json!({"httpGet": {"path": "/nothing", "port": 8080}, "periodSeconds": 1})),
        OutOfTime("probe_wrong_status", "statuscode: 404", 20);
    a_program_that_does_not_answer_its_probe_is_named
        |ns| probed(ns, "exec nc -ll -p 8080 -e sleep 60"), OutOfTime("probe_time_out", "does not become ready", 20);
    a_slow_start_is_never_a_failure
        |ns| probed(ns, &format!("sleep 20; {SERVE}")), Well;

    // What it needs.
    a_missing_config_map_is_named
        |ns| with_env_from(ns, &json!({"configMapKeyRef": {"name": "nosuchmap", "key": "a"}})), Failed("config_map_missing", "configmap \"nosuchmap\" not found", 10);
    a_missing_key_of_a_config_map_is_named
        |ns| [vec![config_map(ns)], with_env_from(ns, &json!({"configMapKeyRef": {"name": "conf", "key": "missing"}}))].concat(),
        Failed("config_key_missing", "couldn't find key missing", 10);
    a_missing_secret_is_named
        |ns| with_env_from(ns, &json!({"secretKeyRef": {"name": "nosuchsecret", "key": "a"}})), Patiently("secret_missing", "secret \"nosuchsecret\" not found", 20, 30);
    a_missing_key_of_a_secret_is_named
        |ns| [vec![secret(ns)], with_env_from(ns, &json!({"secretKeyRef": {"name": "login", "key": "missing"}}))].concat(),
        Failed("config_key_missing", "couldn't find key missing in Secret", 10);
    a_missing_secret_to_mount_is_named
        |ns| with_volume(ns, &json!({"secret": {"secretName": "nosuchsecret"}})), Patiently("secret_missing", "secret \"nosuchsecret\" not found", 35, 50);
    a_volume_that_cannot_be_mounted_is_named
        |ns| with_volume(ns, &json!({"hostPath": {"path": "/nosuchfolder", "type": "Directory"}})), OutOfTime("mount_failed", "/nosuchfolder", 20);
    a_claim_that_no_volume_fits_is_named
        |ns| [vec![claim(ns)], with_volume(ns, &json!({"persistentVolumeClaim": {"claimName": "data"}}))].concat(),
        OutOfTime("pvc_not_bound", "unbound immediate PersistentVolumeClaims", 8);
    a_missing_claim_is_named
        |ns| with_volume(ns, &json!({"persistentVolumeClaim": {"claimName": "nosuchclaim"}})), OutOfTime("pvc_not_bound", "nosuchclaim", 8);
    a_missing_service_account_is_named
        |ns| shaped(ns, |pod| pod["serviceAccountName"] = json!("nosuchaccount")), Failed("service_account_missing", "nosuchaccount", 10);

    // A place to run.
    a_pod_that_asks_for_more_cpu_than_there_is_is_named
        |ns| web(ns, SERVE, |c| c["resources"] = json!({"requests": {"cpu": "1000"}})), Failed("unschedulable", "Insufficient cpu", 20);
    a_pod_that_asks_for_more_memory_than_there_is_is_named
        |ns| web(ns, SERVE, |c| c["resources"] = json!({"requests": {"memory": "1000Ti"}})), Failed("unschedulable", "Insufficient memory", 20);
    a_pod_for_a_node_that_there_is_not_is_named
        |ns| shaped(ns, |pod| pod["nodeSelector"] = json!({"disk": "floppy"})), Failed("unschedulable", "node affinity/selector", 20);
    a_pod_that_a_taint_keeps_away_is_named
        |ns| [vec![unmanned_node(ns)], shaped(ns, |pod| pod["nodeSelector"] = json!({"landfall.test/node": ns}))].concat(),
        Failed("unschedulable", "untolerated taint", 20);
    two_pods_for_one_port_of_the_node_are_named
        two_for_one_host_port, Failed("unschedulable", "free ports", 20);
    a_node_that_is_not_heard_of_is_named
        |ns| [vec![unmanned_node(ns)], on_node(ns)].concat(), OutOfTime("node_lost", "is not heard of", 20);

    // What the cluster allows.
    an_admission_webhook_that_is_away_has_a_minute
        |ns| [vec![webhook_that_is_away(ns)], web(ns, SERVE, |_| {})].concat(), Patiently("pods_refused", "failed calling webhook", 60, 80);
    a_quota_that_is_used_up_is_named
        |ns| [vec![json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "few", "namespace": ns}, "spec": {"hard": {"pods": "0"}}})], web(ns, SERVE, |_| {})].concat(),
        Failed("quota_exceeded", "exceeded quota: few", 12);
    a_limit_range_that_is_passed_is_named
        |ns| [vec![limit_range(ns)], web(ns, SERVE, |c| c["resources"] = json!({"limits": {"memory": "1Gi"}}))].concat(),
        Failed("limit_range", "maximum memory usage per Container is 64Mi", 12);
    a_pod_that_the_namespace_thinks_unsafe_is_named
        |ns| [vec![restricted(ns)], web(ns, SERVE, |_| {})].concat(), Failed("pod_security", "restricted", 12);
    a_policy_that_denies_the_pods_is_named
        |ns| [policy_against_pods(ns), web(ns, SERVE, |_| {})].concat(), Failed("admission_denied", "no pods on a Sunday", 20);
    a_paused_deployment_is_named
        |ns| changed(web(ns, SERVE, |_| {}), |it| it["spec"]["paused"] = json!(true)), Failed("paused", "is paused", 10);
    a_deployment_without_progress_until_its_own_deadline_is_named
        |ns| changed(shaped(ns, |pod| pod["readinessGates"] = json!([{"conditionType": "landfall.test/never"}])), |it| it["spec"]["progressDeadlineSeconds"] = json!(6)),
        Failed("progress_deadline", "made no progress for 6 s", 20);

    // Good lives of every kind.
    a_deployment_without_probes_goes_live
        |ns| web(ns, SERVE, |_| {}), Well;
    a_deployment_that_is_made_anew_goes_live
        |ns| changed(probed(ns, SERVE), |it| it["spec"]["strategy"] = json!({"type": "Recreate"})), Well;
    a_deployment_of_no_pods_goes_live
        |ns| vec![deployment(ns, 0, "exit 1")], Well;
    a_deployment_with_an_autoscaler_goes_live
        |ns| [serving(ns), vec![autoscaler(ns)]].concat(), Well;
    a_stateful_set_goes_live_pod_by_pod
        |ns| vec![stateful(ns, 3, 0, SERVE)], Well;
    a_stateful_set_with_a_partition_goes_live
        |ns| vec![stateful(ns, 2, 1, SERVE)], Well;
    a_daemon_set_goes_live
        |ns| vec![daemon(ns, SERVE)], Well;
    a_job_that_completes_goes_live
        |ns| vec![job(ns, "echo migrated")], Well;
    a_cron_job_and_its_config_go_live
        |ns| vec![config_map(ns), cron_job(ns)], Well;
    an_init_container_that_takes_its_time_goes_live
        |ns| shaped(ns, |pod| pod["initContainers"] = json!([{"name": "wait", "image": busybox(), "command": ["sleep", "4"]}])), Well;
}

/// Seconds more than a verdict may take: here the cores are busy with other tests. `make bench-verdict` measures.
const LOADED: f64 = 20.0;

/// A verdict by the right cause: how many seconds it took, and how many it may.
pub struct Right {
    pub seconds: f64,
    least: u32,
    most: u32,
}

impl Right {
    /// Whether it was not hasty, and took at most `slack` seconds more than it may.
    pub fn in_time(&self, slack: f64) -> bool {
        self.seconds >= self.least.into() && self.seconds <= f64::from(self.most) + slack
    }
}

/// Runs one to its end, over what stood before; or says what was wrong with its verdict.
pub async fn judge(scenario: &Scenario, over: Option<Objects>) -> Result<Right, String> {
    let mut stand = Stand::new("verdict", over.unwrap_or(scenario.objects));
    if over.is_some() {
        stand
            .verify()
            .await
            .map_err(|error| format!("what stood before: {error:?}"))?;
        stand.release.objects = (scenario.objects)(&stand.namespace.0);
    }
    if let OutOfTime(_, _, seconds) = scenario.ends {
        stand.release.verify.timeout_seconds = seconds.into();
    }
    let begun = Instant::now();
    let ended = stand.verify().await;
    let took = begun.elapsed().as_secs_f64();
    if std::env::var_os("RECORD_FIXTURES").is_some() {
        record(&stand.namespace.0, scenario.name);
    }
    let log = stand.log().await;
    println!("{}: {took:.1} s", scenario.name);
    let right = |least, most| {
        Ok(Right {
            seconds: took,
            least,
            most,
        })
    };
    match (&scenario.ends, ended) {
        (Well, Ok(_)) => right(0, u32::MAX),
        (Failed(id, words, most), Err(StageError::Failed(cause))) if is(&cause, id, words) => {
            shown(&stand.release.objects, &log)?;
            right(0, *most)
        }
        (Patiently(id, words, least, most), Err(StageError::Failed(cause)))
            if is(&cause, id, words) =>
        {
            shown(&stand.release.objects, &log)?;
            right(*least, *most)
        }
        (OutOfTime(id, words, limit), Err(StageError::Failed(cause))) if is(&cause, id, words) => {
            shown(&stand.release.objects, &log)?;
            right(*limit, *limit + 8)
        }
        (_, ended) => Err(format!("after {took:.1} s: {ended:?}\n{log}")),
    }
}

/// Keeps what the cluster shows now as a fixture of the units that judge and diagnose.
fn record(namespace: &str, name: &str) {
    let kinds = "deployments,statefulsets,daemonsets,replicasets,pods,events";
    let shown = kubectl(&["-n", namespace, "get", kinds, "-o", "json"]);
    let mut shown: Value = serde_json::from_str(&shown).unwrap();
    let documents = shown["items"]
        .as_array_mut()
        .unwrap()
        .iter_mut()
        .map(|object| {
            object["metadata"]
                .as_object_mut()
                .unwrap()
                .remove("managedFields");
            serde_yaml::to_string(object).unwrap()
        });
    let text = documents.collect::<Vec<_>>().join("---\n");
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/verdicts");
    std::fs::create_dir_all(folder).unwrap();
    std::fs::write(format!("{folder}/{name}.yaml"), text).unwrap();
}

fn is(cause: &Cause, id: &str, words: &str) -> bool {
    cause.id == id && cause.sentence.contains(words)
}

/// Of a Job its own words: nothing is rolled out yet.
fn shown(stands: &[Value], log: &str) -> Result<(), String> {
    let is_told = stands.iter().any(|it| it["kind"] == "Job") && log.contains("job/");
    match is_told || log.contains("Deployments") || log.contains("Pods") {
        true => Ok(()),
        false => Err(format!("what stands is not shown: {log}")),
    }
}

/// One Deployment of one pod whose container is changed.
fn web(ns: &str, shell: &str, change: impl FnOnce(&mut Value)) -> Vec<Value> {
    let mut it = deployment(ns, 1, shell);
    change(crate::stand::container(&mut it));
    vec![it]
}

/// One Deployment of one pod that serves, and whose pod template is changed.
fn shaped(ns: &str, change: impl FnOnce(&mut Value)) -> Vec<Value> {
    changed(web(ns, SERVE, |_| {}), |it| {
        change(&mut it["spec"]["template"]["spec"])
    })
}

fn changed(mut objects: Vec<Value>, change: impl FnOnce(&mut Value)) -> Vec<Value> {
    change(objects.last_mut().unwrap());
    objects
}

fn probed(ns: &str, shell: &str) -> Vec<Value> {
    changed(web(ns, shell, |_| {}), ready_when_it_answers)
}

fn with_env_from(ns: &str, source: &Value) -> Vec<Value> {
    web(ns, SERVE, |c| {
        c["env"] = json!([{"name": "A", "valueFrom": source}])
    })
}

fn with_volume(ns: &str, volume: &Value) -> Vec<Value> {
    let mut volume = volume.clone();
    volume["name"] = json!("v");
    let mut objects = shaped(ns, |pod| pod["volumes"] = json!([volume]));
    crate::stand::container(&mut objects[0])["volumeMounts"] =
        json!([{"name": "v", "mountPath": "/v"}]);
    objects
}

fn with_init_container(ns: &str) -> Vec<Value> {
    let shell = "echo 'migration failed'; exit 4";
    shaped(
        ns,
        |pod| {
            pod["initContainers"] =
                json!([{"name": "migrate", "image": busybox(), "command": ["sh", "-c", shell]}])
        },
    )
}

fn crashes_once(ns: &str) -> Vec<Value> {
    let shell = format!(
        "if [ ! -e /v/seen ]; then touch /v/seen; echo 'database is not up yet'; exit 1; fi; {SERVE}"
    );
    let mut objects = with_volume(ns, &json!({"emptyDir": {}}));
    ready_when_it_answers(&mut objects[0]);
    crate::stand::container(&mut objects[0])["command"] = json!(["sh", "-c", shell]);
    objects
}

/// A Pod on the node's own network, as a registry beside the node's is.
fn on_the_node(ns: &str, name: &str, shell: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": ns}, "spec": {"hostNetwork": true, "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "app", "image": busybox(), "command": ["sh", "-c", shell]}]}})
}

/// It takes every connection and says nothing.
fn silent_registry(ns: &str) -> Vec<Value> {
    let registry = on_the_node(ns, "registry", "exec nc -ll -p 5996 -e sleep 600");
    // Not before the registry listens.
    let wait = json!([{"name": "wait", "image": busybox(), "command": ["sleep", "5"]}]);
    let mut pulls = shaped(ns, |pod| pod["initContainers"] = wait);
    crate::stand::container(&mut pulls[0])["image"] = json!("127.0.0.1:5996/nosuch:1");
    [vec![registry], pulls].concat()
}

/// It answers 401 to everything.
fn private_registry(ns: &str) -> Vec<Value> {
    let registry = on_the_node(
        ns,
        "registry",
        "echo '/:user:password' > /tmp/conf; mkdir /tmp/www; exec httpd -f -p 127.0.0.1:5999 -c /tmp/conf -h /tmp/www",
    );
    [
        vec![registry],
        web(ns, "true", |c| {
            c["image"] = json!("127.0.0.1:5999/private/app:1")
        }),
    ]
    .concat()
}

/// The cluster's own registry by another port, from the 20th second on.
fn registry_that_comes_late(ns: &str) -> Vec<Value> {
    let (own, image) = (registry(), busybox());
    let port = own.rsplit(':').next().unwrap();
    let late = on_the_node(
        ns,
        "registry",
        &format!("sleep 20; exec nc -ll -p 5998 -e nc 127.0.0.1 {port}"),
    );
    // Under another name than the one that the node has already.
    let image = image.replace(&own, "127.0.0.1:5998");
    [
        vec![late],
        web(ns, SERVE, |c| {
            c["image"] = json!(image);
            c["imagePullPolicy"] = json!("Always");
        }),
    ]
    .concat()
}

/// The first bytes of a program for 64-bit ARM, and nothing after them.
fn program_for_arm(ns: &str) -> Vec<Value> {
    let header =
        "f0VMRgIBAQAAAAAAAAAAAAIAtwABAAAAAABAAAAAAABAAAAAAAAAAAAAAAAAAAAAAABAADgAAQBAAAAAAAA=";
    let program = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "program", "namespace": ns}, "binaryData": {"app": header}});
    let mut objects = with_volume(
        ns,
        &json!({"configMap": {"name": "program", "defaultMode": 0o755}}),
    );
    crate::stand::container(&mut objects[0])["command"] = json!(["/v/app"]);
    [vec![program], objects].concat()
}

fn pod_template(ns: &str, shell: &str) -> (Value, Value) {
    let deployment = deployment(ns, 1, shell);
    (
        deployment["spec"]["selector"].clone(),
        deployment["spec"]["template"].clone(),
    )
}

pub fn stateful(ns: &str, replicas: u32, partition: u32, shell: &str) -> Value {
    let (selector, template) = pod_template(ns, shell);
    json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "db", "namespace": ns},
        "spec": {"replicas": replicas, "serviceName": "db", "selector": selector, "template": template,
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"partition": partition}}}})
}

pub fn daemon(ns: &str, shell: &str) -> Value {
    let (selector, template) = pod_template(ns, shell);
    json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "agent", "namespace": ns}, "spec": {"selector": selector, "template": template}})
}

fn job_spec(shell: &str) -> Value {
    json!({"backoffLimit": 0, "template": {"spec": {"restartPolicy": "Never",
        "containers": [{"name": "app", "image": busybox(), "command": ["sh", "-c", shell]}]}}})
}

fn job(ns: &str, shell: &str) -> Value {
    json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "migrate", "namespace": ns}, "spec": job_spec(shell)})
}

fn cron_job(ns: &str) -> Value {
    json!({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "nightly", "namespace": ns},
        "spec": {"schedule": "0 3 * * *", "jobTemplate": {"spec": job_spec("true")}}})
}

fn autoscaler(ns: &str) -> Value {
    json!({"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "web", "namespace": ns},
        "spec": {"scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"}, "minReplicas": 3, "maxReplicas": 4}})
}

fn config_map(ns: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "conf", "namespace": ns}, "data": {}})
}

fn secret(ns: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "login", "namespace": ns}, "stringData": {"user": "hello"}})
}

pub fn claim(ns: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data", "namespace": ns},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}})
}

fn limit_range(ns: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "small", "namespace": ns},
        "spec": {"limits": [{"type": "Container", "max": {"memory": "64Mi"}}]}})
}

/// The test's own namespace, which now wants pods of the strictest level.
fn restricted(ns: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": ns, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}})
}

fn two_for_one_host_port(ns: &str) -> Vec<Value> {
    let mut it = deployment(ns, 2, SERVE);
    crate::stand::container(&mut it)["ports"] = json!([{"containerPort": 8080, "hostPort": 31999}]);
    vec![it]
}

/// A Node without a kubelet, for this test alone; DaemonSets of others keep away from it.
fn unmanned_node(ns: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": ns, "labels": {"landfall.test/node": ns}},
        "spec": {"taints": [{"key": "landfall.test/unmanned", "effect": "NoSchedule"}]}})
}

fn on_node(ns: &str) -> Vec<Value> {
    shaped(ns, |pod| pod["nodeName"] = json!(ns))
}

fn own_namespace(ns: &str) -> Value {
    json!({"matchLabels": {"kubernetes.io/metadata.name": ns}})
}

fn about_pods() -> Value {
    json!({"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]})
}

fn policy_against_pods(ns: &str) -> Vec<Value> {
    let kind = |kind: &str, spec: Value| json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": kind, "metadata": {"name": ns}, "spec": spec});
    let policy = kind(
        "ValidatingAdmissionPolicy",
        json!({"failurePolicy": "Fail", "matchConstraints": {"resourceRules": [about_pods()]},
        "validations": [{"expression": "false", "message": "no pods on a Sunday"}]}),
    );
    let binding = kind(
        "ValidatingAdmissionPolicyBinding",
        json!({"policyName": ns, "validationActions": ["Deny"], "matchResources": {"namespaceSelector": own_namespace(ns)}}),
    );
    in_force(ns, vec![policy, binding])
}

fn webhook_that_is_away(ns: &str) -> Value {
    webhook(ns, "away", &json!({"url": "https://127.0.0.1:9/"}))
}

fn webhook(ns: &str, name: &str, client: &Value) -> Value {
    let webhook = json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration", "metadata": {"name": ns},
        "webhooks": [{"name": format!("{name}.landfall.test"), "admissionReviewVersions": ["v1"], "sideEffects": "None", "failurePolicy": "Fail", "timeoutSeconds": 2,
            "namespaceSelector": own_namespace(ns), "rules": [about_pods()], "clientConfig": client}]});
    in_force(ns, vec![webhook]).remove(0)
}

/// Applies what speaks at admission, and waits until it does: the API server hears of it a moment later.
fn in_force(ns: &str, objects: Vec<Value>) -> Vec<Value> {
    for object in &objects {
        kubectl_apply(ns, &object.to_string());
    }
    let begun = Instant::now();
    while may_make_a_pod(ns) {
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{objects:?} is not in force"
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    objects
}

fn may_make_a_pod(ns: &str) -> bool {
    let arguments = ["-n", ns, "run", "probe", "--image=none", "--dry-run=server"];
    kubectl_command(&arguments)
        .output()
        .unwrap()
        .status
        .success()
}

/// It says no to every pod, from outside the cluster.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_admission_webhook_that_denies_the_pods_is_named() {
    let denies = async |Json(review): Json<Value>| {
        let uid = &review["request"]["uid"];
        let response =
            json!({"uid": uid, "allowed": false, "status": {"message": "no pods of team blue"}});
        Json(
            json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}),
        )
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap().to_string();
    let app = Router::new().route("/", post(denies));
    tokio::spawn(async move { axum::serve(listener, app).await });
    let folder = tempfile::tempdir().unwrap();
    let machine = address_of_the_machine();
    let certificate = Certificate::make(folder.path(), &[&machine]);
    let tls = Tls::at(&machine, &server, &certificate);
    let authority = STANDARD.encode(std::fs::read(&certificate.file).unwrap());
    let client = json!({"url": format!("https://{machine}:{}/", tls.port), "caBundle": authority});

    let stand = Stand::new("denied", |ns| {
        [vec![webhook(ns, "blue", &client)], web(ns, SERVE, |_| {})].concat()
    });
    let cause = cause(stand.verify().await);
    assert_eq!(cause.id, "admission_denied", "{cause:?}");
    assert!(cause.sentence.contains("no pods of team blue"), "{cause:?}");
}

/// Where the tests' cluster sees the machine that it runs on.
fn address_of_the_machine() -> String {
    let gateway = "{{range .IPAM.Config}}{{.Gateway}}{{end}}";
    let arguments = ["network", "inspect", "-f", gateway, "landfall-test"];
    let output = Command::new("docker").args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_that_an_operator_makes_seconds_later_is_no_failure() {
    let missing = json!({"secretKeyRef": {"name": "login", "key": "user"}});
    let stand = Stand::new("operator", |ns| with_env_from(ns, &missing));
    let making = stand.at("0 of 1 new pods ready", |ns| {
        std::thread::sleep(Duration::from_secs(5));
        kubectl_apply(ns, &secret(ns).to_string());
    });
    stand.verify().await.unwrap();
    making.await.unwrap();
}

#[tokio::test]
async fn what_another_changes_midway_is_said() {
    let stand = Stand::new("midway", |ns| probed(ns, "sleep 600"));
    let changing = stand.at("0 of 1 new pods ready", |ns| {
        kubectl(&[
            "-n",
            ns,
            "set",
            "image",
            "deployment/web",
            "app=registry.invalid/other:1",
        ]);
    });
    let cause = cause(stand.verify().await);
    changing.await.unwrap();
    assert_eq!(cause.id, "changed_by_another", "{cause:?}");
    assert!(
        cause
            .sentence
            .contains("container app is now registry.invalid/other:1"),
        "{cause:?}"
    );
}

#[tokio::test]
async fn what_another_deletes_midway_is_said() {
    let stand = Stand::new("deleted", |ns| probed(ns, "sleep 600"));
    let deleting = stand.at("0 of 1 new pods ready", |ns| {
        kubectl(&["-n", ns, "delete", "deployment/web"]);
    });
    let cause = cause(stand.verify().await);
    deleting.await.unwrap();
    assert_eq!(cause.id, "changed_by_another", "{cause:?}");
    assert!(cause.sentence.contains("deleted by another"), "{cause:?}");
}
