//! The judge on what a real cluster showed (tests/fixtures/rollout: 6 s and 3 min after the apply; tests/fixtures/verdicts: at
//! the verdict), and on odd cases.

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::snapshot::Kind;
use super::super::{container_signs, pod_signs, probes, sign, workload_signs};
use super::*;

fn documents(name: &str) -> Vec<Value> {
    recorded(&format!("rollout/{name}"))
}

fn recorded(name: &str) -> Vec<Value> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    let path = format!("{folder}/{name}.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    serde_yaml::Deserializer::from_str(&text)
        .map(|document| Value::deserialize(document).unwrap())
        .collect()
}

fn of_kind<T: serde::de::DeserializeOwned>(documents: &[Value], kind: &str) -> Vec<T> {
    let wanted = documents.iter().filter(|document| document["kind"] == kind);
    wanted
        .map(|document| serde_json::from_value(document.clone()).unwrap())
        .collect()
}

#[test]
fn a_node_that_runs_another_digest_than_was_asked_for_is_remarked() {
    let snapshot = snapshot(&documents("readiness"), 30);
    let pods = snapshot.new_pods();
    let running = pods[0].status.as_ref().unwrap().container_statuses.as_ref();
    let running = &running.unwrap()[0];
    let (_, digest) = running.image_id.rsplit_once("sha256:").unwrap();
    let with = |digest: &str| Target {
        images: vec![(
            running.name.clone(),
            format!("registry/app@sha256:{digest}"),
        )],
        ..target(&snapshot)
    };
    assert!(remarks(&with(digest), &snapshot).is_empty());
    let other = "0".repeat(64);
    let said = remarks(&with(&other), &snapshot);
    assert_eq!(said.len(), pods.len());
    let both = [&other[..12], &digest[..12]];
    assert!(both.iter().all(|part| said[0].contains(part)), "{said:?}");
}

/// What the fixture shows, `seconds` after its apply.
fn snapshot(documents: &[Value], seconds: i64) -> Snapshot {
    let deployment: Deployment = of_kind(documents, "Deployment").remove(0);
    let applied = deployment.metadata.creation_timestamp.as_ref().unwrap().0;
    Snapshot {
        now: applied + Duration::from_secs(seconds.unsigned_abs()),
        workload: Workload::Deployment(Box::new(deployment)),
        replica_sets: of_kind::<ReplicaSet>(documents, "ReplicaSet"),
        pods: of_kind(documents, "Pod"),
        events: of_kind(documents, "Event"),
        autoscaled: false,
        last_words: super::super::snapshot::LastWords::new(),
        others_are_leaving: false,
        listening: std::collections::BTreeMap::new(),
    }
}

fn target(snapshot: &Snapshot) -> Target {
    let metadata = snapshot.workload.metadata();
    Target {
        kind: Kind::Deployment,
        name: metadata.name.clone().unwrap(),
        uid: metadata.uid.clone(),
        generation: metadata.generation.unwrap(),
        changed: true,
        release: None,
        images: Vec::new(),
    }
}

/// The verdict of someone who has watched since the second second.
fn verdict(name: &str, seconds: i64) -> Verdict {
    watched(&documents(name), seconds, false)
}

/// The same picture, looked at once a second; the first verdict that is final, or the last.
fn watched(documents: &[Value], seconds: i64, nodes_autoscale: bool) -> Verdict {
    let mut history = History::default();
    let target = target(&snapshot(documents, 2));
    let mut looks = (2..=seconds)
        .map(|second| {
            judge(
                &target,
                &snapshot(documents, second),
                nodes_autoscale,
                &mut history,
            )
        })
        .peekable();
    loop {
        let verdict = looks.next().unwrap();
        if looks.peek().is_none() || !matches!(verdict, Verdict::NotYet { .. }) {
            return verdict;
        }
    }
}

fn failed(verdict: Verdict) -> Cause {
    match verdict {
        Verdict::Failed(cause) => cause,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_dead_for_good_is_failed_within_six_seconds() {
    for (name, id, says) in [
        ("exit1", "crash_loop", "exited with code 1 twice"),
        ("execformat", "crash_loop", "exited with code 1 twice"),
        (
            "nocommand",
            "cannot_start",
            "stat /nosuchbinary: no such file or directory",
        ),
        ("oom", "oom_killed", "its limit is 16Mi"),
        (
            "notfound-tag",
            "image_not_found",
            "localhost:5001/app:nosuchtag",
        ),
        ("notfound-digest", "image_not_found", "does not exist"),
        ("notfound-repo", "image_not_found", "does not exist"),
    ] {
        let cause = failed(verdict(&format!("{name}.early"), 6));
        assert_eq!((cause.id.as_str(), name), (id, name), "{cause:?}");
        assert!(cause.sentence.contains(says), "{cause:?}");
        assert_eq!(cause.object.unwrap(), format!("deployment/{name}"));
    }
}

#[test]
fn what_may_pass_is_waited_for() {
    for (name, seconds) in [
        ("configkey", 3),
        ("configmap", 3),
        ("secretvol", 33),
        ("quota", 3),
        ("unschedulable", 6),
        ("registry-down", 6),
        ("readiness", 6),
        ("liveness", 6),
    ] {
        let verdict = verdict(&format!("{name}.early"), seconds);
        assert!(
            matches!(verdict, Verdict::NotYet { .. }),
            "{name}: {verdict:?}"
        );
    }
}

/// Each wait of a ReplicaSet's controller is twice the one before: after 20 s of refusals it tries again at about 41 s.
#[test]
fn a_quota_that_came_free_late_is_waited_for_until_the_controller_tries_again() {
    let documents = documents("quota.early");
    let target = target(&snapshot(&documents, 2));
    let mut history = History::default();
    for second in 2..=60 {
        let mut seen = snapshot(&documents, second);
        // Something moves until then.
        let moving = format!("node-{}", second.min(20));
        seen.pods[0].spec.as_mut().unwrap().node_name = Some(moving);
        let verdict = judge(&target, &seen, false, &mut history);
        if let Verdict::Failed(cause) = verdict {
            assert_eq!(cause.id, "quota_exceeded");
            assert!((45..=50).contains(&second), "after {second} s");
            return;
        }
    }
    panic!("no verdict");
}

#[test]
fn what_does_not_pass_is_failed_in_its_time() {
    for (name, seconds, id, says) in [
        (
            "configkey",
            8,
            "config_key_missing",
            "couldn't find key missing in ConfigMap",
        ),
        (
            "configmap",
            8,
            "config_map_missing",
            "configmap \"nosuchmap\" not found",
        ),
        (
            "secretvol",
            43,
            "secret_missing",
            "secret \"nosuchsecret\" not found",
        ),
        ("quota", 8, "quota_exceeded", "exceeded quota: q"),
        ("unschedulable", 11, "unschedulable", "1 Insufficient cpu"),
        (
            "registry-down",
            63,
            "registry_unreachable",
            "connection refused",
        ),
    ] {
        let cause = failed(verdict(&format!("{name}.early"), seconds));
        assert_eq!((cause.id.as_str(), name), (id, name), "{cause:?}");
        assert!(cause.sentence.contains(says), "{cause:?}");
    }
}

#[test]
fn three_minutes_later_each_has_its_own_cause() {
    for (name, id) in [
        ("configkey", "config_key_missing"),
        ("configmap", "config_map_missing"),
        ("secretvol", "secret_missing"),
        ("quota", "quota_exceeded"),
        ("unschedulable", "unschedulable"),
        ("registry-down", "registry_unreachable"),
        ("readiness", "probe_refused"),
        ("liveness", "liveness_failed"),
        ("exit1", "crash_loop"),
        ("execformat", "crash_loop"),
        ("nocommand", "cannot_start"),
        ("oom", "oom_killed"),
        ("notfound-tag", "image_not_found"),
        ("notfound-digest", "image_not_found"),
        ("notfound-repo", "image_not_found"),
    ] {
        let cause = failed(verdict(name, 180));
        assert_eq!((cause.id.as_str(), name), (id, name), "{cause:?}");
        assert!(
            !cause.sentence.ends_with('.') && !cause.sentence.contains('\n'),
            "{cause:?}"
        );
    }
}

/// No watch has seen it die: what stands is asked about before anything is changed.
#[test]
fn what_keeps_a_workload_from_being_well_is_known_at_one_look() {
    let minute = Duration::from_secs(60);
    for (name, id) in [
        ("configkey", "config_key_missing"),
        ("unschedulable", "unschedulable"),
        ("readiness", "probe_refused"),
        ("exit1", "crash_loop"),
        ("notfound-tag", "image_not_found"),
    ] {
        let at = |seconds| snapshot(&documents(name), seconds);
        let target = Target {
            changed: false,
            ..target(&at(180))
        };
        let trouble_now = trouble(&target, &at(180), minute).unwrap();
        assert_eq!(Vec::from_iter(trouble_now.causes), [id], "{name}");
        assert_eq!(trouble_now.ready, 0, "{name}");
        // A pod that is only starting is not unwell.
        assert_eq!(trouble(&target, &at(20), minute), None, "{name}");
        // Another's template is another's trouble.
        let other = Target {
            release: Some("another".to_owned()),
            ..target
        };
        assert_eq!(trouble(&other, &at(180), minute), None, "{name}");
    }
    assert_eq!(
        trouble(&healthy_target(), &snapshot(&healthy(), 300), minute),
        None
    );
    // Nor are the deaths of last week a trouble of today, where a pod is missing.
    let mut documents = healthy();
    died(&mut documents, 7, 1);
    documents[0]["status"]["availableReplicas"] = json!(0);
    assert_eq!(
        trouble(&healthy_target(), &snapshot(&documents, 300), minute),
        None
    );
}

/// Recorded by tests/it/verdicts.rs (RECORD_FIXTURES=1), as the cluster stood when it had its verdict.
#[test]
fn each_cause_is_read_from_what_the_cluster_showed() {
    for (name, id, says) in [
        (
            "a_registry_that_wants_a_password_is_named",
            "image_pull_denied",
            "may not pull its image 127.0.0.1:5999/private/app:1",
        ),
        (
            "a_registry_without_an_address_is_named",
            "registry_unknown",
            "the registry registry.invalid",
        ),
        (
            "an_init_container_that_fails_is_named",
            "init_failed",
            "init container migrate of pod web-",
        ),
        (
            "a_path_that_answers_404_to_its_probe_is_named",
            "probe_wrong_status",
            "statuscode: 404",
        ),
        (
            "a_program_that_does_not_answer_its_probe_is_named",
            "probe_time_out",
            "does not become ready",
        ),
        (
            "a_volume_that_cannot_be_mounted_is_named",
            "mount_failed",
            "/nosuchfolder is not a directory",
        ),
        (
            "a_claim_that_no_volume_fits_is_named",
            "pvc_not_bound",
            "unbound immediate PersistentVolumeClaims",
        ),
        ("a_missing_claim_is_named", "pvc_not_bound", "nosuchclaim"),
        (
            "a_missing_service_account_is_named",
            "service_account_missing",
            "nosuchaccount",
        ),
        (
            "a_pod_that_asks_for_more_memory_than_there_is_is_named",
            "unschedulable",
            "Insufficient memory",
        ),
        (
            "a_pod_for_a_node_that_there_is_not_is_named",
            "unschedulable",
            "node affinity/selector",
        ),
        (
            "a_pod_that_a_taint_keeps_away_is_named",
            "unschedulable",
            "untolerated taint",
        ),
        (
            "two_pods_for_one_port_of_the_node_are_named",
            "unschedulable",
            "free ports",
        ),
        (
            "a_node_that_is_not_heard_of_is_named",
            "node_lost",
            "is not heard of",
        ),
        (
            "a_limit_range_that_is_passed_is_named",
            "limit_range",
            "maximum memory usage per Container is 64Mi",
        ),
        (
            "a_pod_that_the_namespace_thinks_unsafe_is_named",
            "pod_security",
            "violates PodSecurity",
        ),
        (
            "a_policy_that_denies_the_pods_is_named",
            "admission_denied",
            "no pods on a Sunday",
        ),
        (
            "an_admission_webhook_that_is_away_has_a_minute",
            "pods_refused",
            "failed calling webhook",
        ),
        ("a_paused_deployment_is_named", "paused", "is paused"),
        (
            "a_deployment_without_progress_until_its_own_deadline_is_named",
            "progress_deadline",
            "made no progress for 6 s",
        ),
    ] {
        let snapshot = snapshot(&recorded(&format!("verdicts/{name}")), 10);
        let target = target(&snapshot);
        let mut history = History::default();
        let limit = Duration::from_secs(10);
        let cause = at_deadline(&target, &snapshot, limit, &mut history)
            .unwrap_or_else(|| panic!("{name}: nothing is wrong"));
        assert_eq!((cause.id.as_str(), name), (id, name), "{cause:?}");
        assert!(cause.sentence.contains(says), "{cause:?}");
        assert_eq!(cause.object.as_deref(), Some("deployment/web"));
        assert!(
            cause.hint.is_some() || id == "progress_deadline",
            "{cause:?}"
        );
    }
}

/// Events expire and get lost: only a mount that fails shows nowhere else.
#[test]
fn without_events_the_verdict_is_the_same() {
    for (name, id) in [
        ("exit1", "crash_loop"),
        ("oom", "oom_killed"),
        ("quota", "quota_exceeded"),
        ("unschedulable", "unschedulable"),
        ("configkey", "config_key_missing"),
        ("liveness", "crash_loop"),
    ] {
        let documents: Vec<Value> = documents(name)
            .into_iter()
            .filter(|it| it["kind"] != "Event")
            .collect();
        let cause = failed(watched(&documents, 180, false));
        assert_eq!((cause.id.as_str(), name), (id, name), "{cause:?}");
    }
}

#[test]
fn the_last_words_of_the_program_are_in_the_sentence() {
    let documents = documents("exit1.early");
    let mut snapshot = snapshot(&documents, 6);
    for pod in &snapshot.pods {
        let words = "starting\nfatal: DATABASE_URL is not set\n\n".to_owned();
        snapshot
            .last_words
            .insert((uid(pod).to_owned(), "app".to_owned()), words);
    }
    let cause = failed(judge(
        &target(&snapshot),
        &snapshot,
        false,
        &mut History::default(),
    ));
    assert!(
        cause.sentence.ends_with(
            "exited with code 1 twice: fatal: DATABASE_URL is not set (3 of 3 new pods)"
        ),
        "{cause:?}"
    );
}

#[test]
fn a_program_for_another_cpu_is_named_by_its_last_words() {
    let documents = documents("execformat.early");
    let mut snapshot = snapshot(&documents, 6);
    let key = (uid(&snapshot.pods[0]).to_owned(), "app".to_owned());
    snapshot
        .last_words
        .insert(key, "exec /app: exec format error".to_owned());
    assert_eq!(
        failed(judge(
            &target(&snapshot),
            &snapshot,
            false,
            &mut History::default()
        ))
        .id,
        "wrong_architecture"
    );
}

/// A healthy Deployment of two replicas, as it is after its rollout.
fn healthy() -> Vec<Value> {
    let template = json!({"metadata": {"labels": {"app": "web"}, "annotations": {"landfall.dev/release": "aaa"}},
        "spec": {"containers": [{"name": "app", "image": "r/app@sha256:aaaa"}]}});
    let mut of_set = template.clone();
    of_set["metadata"]["labels"]["pod-template-hash"] = json!("h1");
    let mut documents = vec![
        json!({"kind": "Deployment", "metadata": {"name": "web", "uid": "d", "generation": 3, "creationTimestamp": "2026-11-23T10:00:00Z",
            "annotations": {"deployment.kubernetes.io/revision": "3"},
            "managedFields": [{"manager": "landfall", "operation": "Apply", "time": "2026-11-23T10:00:00Z"}]},
            "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": template},
            "status": {"observedGeneration": 3, "replicas": 2, "updatedReplicas": 2, "readyReplicas": 2, "availableReplicas": 2,
                "conditions": [{"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}]}}),
        json!({"kind": "ReplicaSet", "metadata": {"name": "web-h1", "uid": "rs1", "creationTimestamp": "2026-11-23T10:00:00Z",
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": "web", "uid": "d", "controller": true}]},
            "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": of_set},
            "status": {"replicas": 2, "readyReplicas": 2, "availableReplicas": 2}}),
    ];
    for number in 1..=2 {
        documents.push(json!({"kind": "Pod", "metadata": {"name": format!("web-h1-{number}"), "uid": format!("p{number}"), "labels": {"app": "web"},
            "creationTimestamp": "2026-11-23T10:00:01Z",
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web-h1", "uid": "rs1", "controller": true}]},
            "spec": {"containers": [{"name": "app", "image": "r/app@sha256:aaaa"}]},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
                "containerStatuses": [{"name": "app", "image": "x", "imageID": "r/app@sha256:aaaa", "ready": true, "restartCount": 0,
                    "state": {"running": {"startedAt": "2026-11-23T10:00:02Z"}}}]}}));
    }
    documents
}

fn healthy_target() -> Target {
    Target {
        release: Some("aaa".to_owned()),
        images: vec![("app".to_owned(), "r/app@sha256:aaaa".to_owned())],
        ..target(&snapshot(&healthy(), 0))
    }
}

fn once(documents: &[Value], target: &Target) -> Verdict {
    judge(
        target,
        &snapshot(documents, 30),
        false,
        &mut History::default(),
    )
}

#[test]
fn a_healthy_deployment_is_complete() {
    assert_eq!(once(&healthy(), &healthy_target()), Verdict::Complete);
}

/// K01: right after the apply the old rollout's status still says that all is well.
#[test]
fn the_old_healthy_status_right_after_the_apply_completes_nothing() {
    let mut documents = healthy();
    documents[0]["metadata"]["generation"] = json!(4);
    let target = Target {
        generation: 4,
        ..healthy_target()
    };
    assert!(matches!(once(&documents, &target), Verdict::NotYet { .. }));
    // A cache that has not even seen our apply.
    assert!(matches!(once(&healthy(), &target), Verdict::NotYet { .. }));
}

#[test]
fn a_status_ahead_of_its_replica_set_completes_nothing() {
    let mut documents = healthy();
    documents[0]["spec"]["template"]["metadata"]["annotations"]["landfall.dev/release"] =
        json!("bbb");
    let target = Target {
        release: Some("bbb".to_owned()),
        ..healthy_target()
    };
    assert!(matches!(once(&documents, &target), Verdict::NotYet { .. }));
}

#[test]
fn another_owners_replica_set_does_not_count() {
    let mut documents = healthy();
    documents[1]["metadata"]["ownerReferences"][0]["uid"] = json!("another");
    assert!(matches!(
        once(&documents, &healthy_target()),
        Verdict::NotYet { .. }
    ));
}

#[test]
fn a_paused_deployment_is_failed_at_once_unless_it_is_complete() {
    let mut documents = healthy();
    documents[0]["spec"]["paused"] = json!(true);
    assert_eq!(once(&documents, &healthy_target()), Verdict::Complete);
    documents[0]["status"]["updatedReplicas"] = json!(0);
    assert_eq!(failed(once(&documents, &healthy_target())).id, "paused");
}

#[test]
fn a_template_changed_by_another_is_failed_and_names_the_image() {
    let mut documents = healthy();
    documents[0]["metadata"]["generation"] = json!(4);
    documents[0]["spec"]["template"]["spec"]["containers"][0]["image"] = json!("r/app:other");
    let cause = failed(once(&documents, &healthy_target()));
    assert_eq!(cause.id, "changed_by_another");
    assert!(cause.sentence.contains("r/app:other"), "{cause:?}");
}

#[test]
fn more_replicas_by_an_autoscaler_are_waited_for() {
    let mut documents = healthy();
    documents[0]["metadata"]["generation"] = json!(4);
    documents[0]["status"]["observedGeneration"] = json!(4);
    documents[0]["spec"]["replicas"] = json!(5);
    let Verdict::NotYet { progress } = once(&documents, &healthy_target()) else {
        panic!()
    };
    assert!(progress.contains("2 of 5 new pods ready"), "{progress}");
}

#[test]
fn nothing_to_run_is_complete() {
    let mut documents = healthy();
    documents.truncate(1);
    documents[0]["spec"]["replicas"] = json!(0);
    documents[0]["status"] = json!({"observedGeneration": 3});
    assert_eq!(once(&documents, &healthy_target()), Verdict::Complete);
}

fn died(documents: &mut [Value], times: u64, exit_code: i64) {
    documents[2]["status"]["containerStatuses"][0]["restartCount"] = json!(times);
    documents[2]["status"]["containerStatuses"][0]["lastState"] =
        json!({"terminated": {"exitCode": exit_code, "reason": "Error"}});
}

#[test]
fn one_death_and_then_calm_is_complete() {
    let mut documents = healthy();
    died(&mut documents, 1, 1);
    let mut history = History::default();
    let at = |seconds, history: &mut History| {
        judge(
            &healthy_target(),
            &snapshot(&documents, seconds),
            false,
            history,
        )
    };
    assert!(matches!(at(30, &mut history), Verdict::NotYet { .. }));
    assert!(matches!(at(45, &mut history), Verdict::NotYet { .. }));
    assert_eq!(at(51, &mut history), Verdict::Complete);
}

#[test]
fn without_a_readiness_probe_a_program_must_live_for_a_moment() {
    let mut documents = healthy();
    let mut history = History::default();
    let at = |documents: &[Value], seconds, history: &mut History| {
        judge(
            &healthy_target(),
            &snapshot(documents, seconds),
            false,
            history,
        )
    };
    assert!(matches!(
        at(&documents, 3, &mut history),
        Verdict::NotYet { .. }
    ));
    assert_eq!(at(&documents, 8, &mut history), Verdict::Complete);
    for pod in [2, 3] {
        documents[pod]["spec"]["containers"][0]["readinessProbe"] =
            json!({"httpGet": {"port": 80}});
    }
    assert_eq!(
        at(&documents, 3, &mut History::default()),
        Verdict::Complete
    );
}

#[test]
fn two_deaths_are_failed_though_all_counts_are_right() {
    let mut documents = healthy();
    died(&mut documents, 2, 137);
    assert_eq!(failed(once(&documents, &healthy_target())).id, "crash_loop");
}

#[test]
fn the_deaths_of_last_week_do_not_count_where_nothing_changed() {
    let mut documents = healthy();
    died(&mut documents, 7, 1);
    let target = Target {
        changed: false,
        ..healthy_target()
    };
    assert_eq!(once(&documents, &target), Verdict::Complete);
    // Nor where only metadata changed, and the pods are older than our apply.
    documents[0]["metadata"]["managedFields"][0]["time"] = json!("2026-11-23T10:00:20Z");
    assert_eq!(once(&documents, &healthy_target()), Verdict::Complete);
}

#[test]
fn a_pod_that_waits_for_the_room_of_an_old_one_is_waited_for() {
    let mut documents = documents("unschedulable.early");
    let mut leaving = healthy().remove(2);
    leaving["metadata"]["deletionTimestamp"] = json!("2026-11-23T13:57:00Z");
    documents.push(leaving);
    let mut history = History::default();
    let first = snapshot(&documents, 2);
    let target = target(&first);
    let _ = judge(&target, &first, false, &mut history);
    assert!(matches!(
        judge(&target, &snapshot(&documents, 60), false, &mut history),
        Verdict::NotYet { .. }
    ));
    documents.pop();
    assert!(
        matches!(
            judge(&target, &snapshot(&documents, 61), false, &mut history),
            Verdict::NotYet { .. }
        ),
        "something just moved"
    );
    assert_eq!(
        failed(judge(
            &target,
            &snapshot(&documents, 70),
            false,
            &mut history
        ))
        .id,
        "unschedulable"
    );
}

#[test]
fn where_nodes_may_come_no_room_has_two_minutes() {
    let documents = documents("unschedulable.early");
    assert!(matches!(
        watched(&documents, 120, true),
        Verdict::NotYet { .. }
    ));
    assert_eq!(failed(watched(&documents, 123, true)).id, "unschedulable");
}

#[test]
fn a_registry_that_is_away_for_less_than_a_minute_is_no_failure() {
    assert!(matches!(
        verdict("registry-down.early", 60),
        Verdict::NotYet { .. }
    ));
}

#[test]
fn the_deadline_names_what_was_wrong_last() {
    let documents = documents("readiness.early");
    let snapshot = snapshot(&documents, 20);
    let cause = at_deadline(
        &target(&snapshot),
        &snapshot,
        Duration::from_secs(20),
        &mut History::default(),
    )
    .unwrap();
    assert_eq!(cause.id, "probe_refused");
    assert!(
        cause.sentence.contains("connection refused") && cause.sentence.ends_with("(after 20 s)"),
        "{cause:?}"
    );
}

fn other(workload: Workload, kind: Kind) -> (Snapshot, Target) {
    let mut snapshot = snapshot(&healthy(), 30);
    snapshot.workload = workload;
    snapshot.pods.clear();
    let target = Target {
        kind,
        release: None,
        ..target(&snapshot)
    };
    (snapshot, target)
}

#[test]
fn stateful_and_daemon_sets_are_judged_by_the_rules_of_kubectl() {
    let set = |status: Value, strategy: Value| -> StatefulSet {
        serde_json::from_value(json!({"metadata": {"name": "db", "uid": "s", "generation": 2},
            "spec": {"replicas": 3, "serviceName": "db", "selector": {"matchLabels": {"a": "b"}}, "template": {}, "updateStrategy": strategy}, "status": status})).unwrap()
    };
    let judged = |status: Value, strategy: Value| {
        let (snapshot, target) = other(
            Workload::StatefulSet(Box::new(set(status, strategy))),
            Kind::StatefulSet,
        );
        judge(&target, &snapshot, false, &mut History::default())
    };
    let rolling = json!({"type": "RollingUpdate"});
    let status = |updated: i32, ready: i32, current: &str| json!({"observedGeneration": 2, "replicas": 3, "readyReplicas": ready, "updatedReplicas": updated, "currentRevision": current, "updateRevision": "new"});
    assert_eq!(
        judged(status(3, 3, "new"), rolling.clone()),
        Verdict::Complete
    );
    assert!(matches!(
        judged(status(3, 3, "old"), rolling.clone()),
        Verdict::NotYet { .. }
    ));
    assert!(matches!(
        judged(status(3, 2, "new"), rolling),
        Verdict::NotYet { .. }
    ));
    assert_eq!(
        judged(
            status(1, 3, "old"),
            json!({"type": "RollingUpdate", "rollingUpdate": {"partition": 2}})
        ),
        Verdict::Complete
    );
    assert_eq!(
        judged(status(3, 3, "old"), json!({"type": "OnDelete"})),
        Verdict::Complete
    );
    // Where no pod is old, nobody has to be deleted.
    assert!(matches!(
        judged(status(0, 2, "old"), json!({"type": "OnDelete"})),
        Verdict::NotYet { .. }
    ));

    let daemon = |updated: i32, available: i32| {
        let set: DaemonSet = serde_json::from_value(json!({"metadata": {"name": "d", "uid": "s", "generation": 2},
            "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {}},
            "status": {"observedGeneration": 2, "currentNumberScheduled": 2, "numberMisscheduled": 0, "numberReady": 2, "desiredNumberScheduled": 2, "updatedNumberScheduled": updated, "numberAvailable": available}})).unwrap();
        let (snapshot, target) = other(Workload::DaemonSet(Box::new(set)), Kind::DaemonSet);
        judge(&target, &snapshot, false, &mut History::default())
    };
    assert_eq!(daemon(2, 2), Verdict::Complete);
    assert!(matches!(daemon(1, 2), Verdict::NotYet { .. }));
    assert!(matches!(daemon(2, 1), Verdict::NotYet { .. }));
}

#[test]
fn a_job_is_done_or_failed_by_its_own_word() {
    let judged = |conditions: Value| {
        let job: Job = serde_json::from_value(json!({"metadata": {"name": "migrate", "uid": "j", "generation": 1},
            "spec": {"template": {"spec": {"containers": []}}}, "status": {"active": 1, "conditions": conditions}})).unwrap();
        let (mut snapshot, target) = other(Workload::Job(Box::new(job)), Kind::Job);
        snapshot.last_words.insert(
            ("p".to_owned(), "c".to_owned()),
            "no such table: users".to_owned(),
        );
        judge(&target, &snapshot, false, &mut History::default())
    };
    assert!(matches!(judged(json!([])), Verdict::NotYet { .. }));
    assert_eq!(
        judged(json!([{"type": "Complete", "status": "True"}])),
        Verdict::Complete
    );
    let cause = failed(judged(
        json!([{"type": "Failed", "status": "True", "message": "Job has reached the specified backoff limit"}]),
    ));
    assert_eq!(cause.id, "job_failed");
    assert!(
        cause.sentence.contains("backoff limit")
            && cause.sentence.ends_with("no such table: users"),
        "{cause:?}"
    );
}

/// A StatefulSet whose set was applied at the tenth second of a minute.
fn stateful(pods: &[Value], events: &[Value]) -> Snapshot {
    let at = |second: u32| format!("2026-01-01T00:00:{second:02}Z");
    let of = |values: &[Value]| Value::from(values.to_vec());
    let set = json!({"metadata": {"name": "db", "uid": "set", "managedFields": [{"manager": "landfall", "time": at(10)}]}});
    Snapshot {
        now: at(30).parse().unwrap(),
        workload: Workload::StatefulSet(Box::new(serde_json::from_value(set).unwrap())),
        replica_sets: Vec::new(),
        pods: serde_json::from_value(of(pods)).unwrap(),
        events: serde_json::from_value(of(events)).unwrap(),
        autoscaled: false,
        last_words: super::super::snapshot::LastWords::new(),
        others_are_leaving: false,
        listening: std::collections::BTreeMap::new(),
    }
}

fn pod_of_set(made: &str, more: &Value) -> Value {
    let mut pod = json!({
        "metadata": {"name": "db-0", "uid": "pod", "creationTimestamp": made,
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "db", "uid": "set", "controller": true}]},
        "spec": {"containers": [{"name": "main"}], "initContainers": [{"name": "migrate"}]},
    });
    pod["status"] = more.clone();
    pod
}

fn event(reason: &str, of: &str, at: &str, told: &str) -> Value {
    json!({"metadata": {"name": "e"}, "involvedObject": {"uid": of}, "reason": reason, "lastTimestamp": at, "message": told})
}

/// Texts of the kubelet's.
#[test]
fn what_is_missing_is_told_by_its_own_words() {
    for (told, id) in [
        ("secret \"login\" not found", "secret_missing"),
        (
            "configmap \"secret-settings\" not found",
            "config_map_missing",
        ),
        (
            "MountVolume.SetUp failed for volume \"app-secrets\" : configmap \"x\" not found",
            "config_map_missing",
        ),
        (
            "MountVolume.SetUp failed for volume \"v\" : secret \"x\" not found",
            "secret_missing",
        ),
        (
            "MountVolume.SetUp failed for volume \"v\" : references non-existent secret key: k",
            "config_key_missing",
        ),
        (
            "MountVolume.SetUp failed for volume \"v\" : references non-existent config key: k",
            "config_key_missing",
        ),
        ("couldn't find key k in Secret ns/x", "config_key_missing"),
    ] {
        assert_eq!(container_signs::missing_config(told), id, "{told}");
    }
}

#[test]
fn a_program_that_ends_by_itself_is_not_blamed_on_its_hook() {
    let hook = event(
        "FailedPostStartHook",
        "pod",
        "2026-01-01T00:00:15Z",
        "PostStartHook failed",
    );
    let ended =
        |code: i32, began: &str| json!({"exitCode": code, "reason": "Error", "startedAt": began});
    for (code, began, id) in [
        (137, "2026-01-01T00:00:14Z", "hook_failed"),
        (0, "2026-01-01T00:00:14Z", "hook_failed"),
        (1, "2026-01-01T00:00:14Z", "crash_loop"),
        // It began after the hook of the one before it.
        (137, "2026-01-01T00:00:16Z", "crash_loop"),
    ] {
        let status = json!({"containerStatuses": [{"name": "main", "ready": false, "restartCount": 1, "image": "", "imageID": "",
            "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": ended(code, began)}}]});
        let pod = pod_of_set("2026-01-01T00:00:12Z", &status);
        let snapshot = stateful(&[pod], std::slice::from_ref(&hook));
        let containers = super::super::snapshot::Running::all(&snapshot.pods[0]);
        let main = containers
            .iter()
            .find(|it| it.status.name == "main")
            .unwrap();
        let sign = container_signs::died(main, &snapshot, 2).unwrap();
        assert_eq!(sign.cause.id, id, "{code} {began}: {:?}", sign.cause);
    }
}

#[test]
fn a_pull_is_under_way_until_something_is_said_of_its_end() {
    let of = |reason: &str, at: &str, container: &str| {
        let mut event = event(reason, "pod", at, "told");
        if !container.is_empty() {
            event["involvedObject"]["fieldPath"] = json!(format!("spec.containers{{{container}}}"));
        }
        event
    };
    let scheduled = of("Scheduled", "2026-01-01T00:00:15Z", "");
    let pulling = of("Pulling", "2026-01-01T00:00:15Z", "main");
    let others = of("Pulled", "2026-01-01T00:00:16Z", "sidecar");
    let pulled = of("Pulled", "2026-01-01T00:00:15Z", "main");
    for (events, is_pulling) in [
        (vec![pulling.clone(), scheduled.clone(), others], true),
        (vec![pulled, pulling, scheduled.clone()], false),
        (vec![scheduled], false),
    ] {
        let status = json!({"containerStatuses": [{"name": "main", "ready": false, "restartCount": 0, "image": "", "imageID": "",
            "state": {"waiting": {"reason": "ContainerCreating"}}}]});
        let mut pod = pod_of_set("2026-01-01T00:00:12Z", &status);
        pod["spec"]["containers"][0]["image"] = json!("registry/app:1");
        let snapshot = stateful(&[pod], &events);
        let containers = super::super::snapshot::Running::all(&snapshot.pods[0]);
        let main = containers
            .iter()
            .find(|it| it.status.name == "main")
            .unwrap();
        let sign = container_signs::pulls(main, &snapshot);
        assert_eq!(sign.is_some(), is_pulling, "{events:?}");
    }
}

#[test]
fn a_workload_that_rolls_out_on_delete_is_stuck_by_old_pods_alone() {
    for (revision, is_stuck) in [("old", true), ("new", false)] {
        let mut pod = pod_of_set("2026-01-01T00:00:12Z", &json!({}));
        pod["metadata"]["labels"] = json!({"controller-revision-hash": revision});
        let mut snapshot = stateful(&[pod], &[]);
        let set = json!({"metadata": {"name": "db", "uid": "set"}, "status": {"updateRevision": "new", "replicas": 1},
            "spec": {"serviceName": "db", "selector": {}, "template": {}, "updateStrategy": {"type": "OnDelete"}}});
        snapshot.workload = Workload::StatefulSet(Box::new(serde_json::from_value(set).unwrap()));
        let target = Target::named(Kind::StatefulSet, "db");
        let sign = workload_signs::on_delete(&target, &snapshot);
        assert_eq!(sign.is_some(), is_stuck, "{revision}: {sign:?}");

        let status = json!({"currentNumberScheduled": 2, "desiredNumberScheduled": 3, "numberMisscheduled": 0, "numberReady": 0,
            "updatedNumberScheduled": if is_stuck { 1 } else { 2 }});
        let set = json!({"metadata": {"name": "db", "uid": "set"}, "status": status,
            "spec": {"selector": {}, "template": {}, "updateStrategy": {"type": "OnDelete"}}});
        snapshot.workload = Workload::DaemonSet(Box::new(serde_json::from_value(set).unwrap()));
        let sign = workload_signs::on_delete(&target, &snapshot);
        assert_eq!(sign.is_some(), is_stuck, "{revision}: {sign:?}");
    }
}

#[test]
fn a_refusal_of_pods_is_over_once_one_was_made() {
    let refused = event(
        "FailedCreate",
        "set",
        "2026-01-01T00:00:15Z",
        "create Pod db-0 failed: exceeded quota: few",
    );
    for (made, is_refused) in [
        ("2026-01-01T00:00:14Z", true),
        ("2026-01-01T00:00:16Z", false),
    ] {
        let pods = [pod_of_set(made, &json!({}))];
        let sign = workload_signs::refused_pods(&stateful(&pods, std::slice::from_ref(&refused)));
        assert_eq!(sign.is_some(), is_refused, "{made}: {sign:?}");
    }
}

#[test]
fn an_api_server_that_has_not_decided_is_waited_for() {
    for told in [
        "etcdserver: request timed out",
        "status unknown for quota: few",
        "Operation cannot be fulfilled on resourcequotas \"few\"",
    ] {
        let told = event("FailedCreate", "set", "2026-01-01T00:00:15Z", told);
        let sign = workload_signs::refused_pods(&stateful(&[], &[told])).unwrap();
        assert_eq!(sign.patience, Patience::Seen(sign::PASSING), "{sign:?}");
    }
}

#[test]
fn a_mount_that_has_come_about_is_no_sign_however_long_the_pull_takes() {
    let missing = event(
        "FailedMount",
        "pod",
        "2026-01-01T00:00:15Z",
        "MountVolume.SetUp failed: secret \"tls\" not found",
    );
    for (is_mounted, status) in [(false, "False"), (true, "True")] {
        let pod = pod_of_set(
            "2026-01-01T00:00:12Z",
            &json!({"conditions": [{"type": "PodReadyToStartContainers", "status": status}],
                "containerStatuses": [{"name": "main", "ready": false, "restartCount": 0, "image": "", "imageID": "",
                    "state": {"waiting": {"reason": "ContainerCreating"}}}]}),
        );
        let snapshot = stateful(&[pod], std::slice::from_ref(&missing));
        let sign = pod_signs::cannot_mount(&snapshot.pods[0], &snapshot);
        assert_eq!(sign.is_none(), is_mounted, "{sign:?}");
    }
}

#[test]
fn an_init_container_at_work_is_not_one_that_never_becomes_ready() {
    let status = |name: &str, state: &Value| json!({"name": name, "ready": false, "restartCount": 0, "image": "", "imageID": "", "state": state});
    let running = json!({"running": {"startedAt": "2026-01-01T00:00:13Z"}});
    let waiting = json!({"waiting": {"reason": "PodInitializing"}});
    let ended = json!({"terminated": {"exitCode": 0}});
    for (is_late, init, main) in [(false, &running, &waiting), (true, &ended, &running)] {
        let pod = pod_of_set(
            "2026-01-01T00:00:12Z",
            &json!({"initContainerStatuses": [status("migrate", init)], "containerStatuses": [status("main", main)]}),
        );
        let snapshot = stateful(&[pod], &[]);
        let sign = probes::never_ready(&snapshot.pods[0], &snapshot);
        assert_eq!(sign.is_some(), is_late, "{sign:?}");
    }
}

#[test]
fn no_room_is_no_verdict_while_another_workload_of_the_release_makes_some() {
    let documents = documents("unschedulable.early");
    for is_leaving in [false, true] {
        let mut history = History::default();
        let target = target(&snapshot(&documents, 2));
        let verdicts: Vec<_> = (2..=30)
            .map(|second| {
                let mut seen = snapshot(&documents, second);
                seen.others_are_leaving = is_leaving;
                judge(&target, &seen, false, &mut history)
            })
            .collect();
        let has_failed = verdicts
            .iter()
            .any(|verdict| matches!(verdict, Verdict::Failed(_)));
        assert_eq!(has_failed, !is_leaving);
    }
}

/// A StatefulSet of one pod, all of whose counts are right, whose program died once at 00:00:15; `second` is when it is looked at.
fn died_once(second: i64, events: &[Value]) -> Snapshot {
    let mut pod = pod_of_set(
        "2026-01-01T00:00:12Z",
        &json!({"conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": "main", "ready": true, "started": true, "restartCount": 1, "image": "", "imageID": "",
                "state": {"running": {"startedAt": "2026-01-01T00:00:16Z"}},
                "lastState": {"terminated": {"exitCode": 1, "finishedAt": "2026-01-01T00:00:15Z"}}}]}),
    );
    pod["metadata"]["labels"] = json!({"controller-revision-hash": "r"});
    pod["spec"]["containers"][0] = json!({"name": "main", "readinessProbe": {"tcpSocket": {"port": 1}},
        "livenessProbe": {"tcpSocket": {"port": 1}, "initialDelaySeconds": 60}});
    let mut snapshot = stateful(&[pod], events);
    let set = json!({"metadata": {"name": "db", "uid": "set", "generation": 1}, "spec": {"replicas": 1},
        "status": {"observedGeneration": 1, "replicas": 1, "readyReplicas": 1, "updatedReplicas": 1, "currentRevision": "r", "updateRevision": "r"}});
    snapshot.workload = Workload::StatefulSet(Box::new(serde_json::from_value(set).unwrap()));
    snapshot.now = snapshot.now + Duration::from_secs(second.unsigned_abs());
    snapshot
}

#[test]
fn one_death_is_no_failure_when_time_runs_out_unless_it_was_just_now_or_another_is_near() {
    let fails = event(
        "Unhealthy",
        "pod",
        "2026-01-01T00:00:58Z",
        "Liveness probe failed: connection refused",
    );
    for (seconds, events, is_well) in [
        (30, vec![], true),
        (10, vec![], false),
        (30, vec![fails], false),
    ] {
        let mut history = History::default();
        let target = Target {
            kind: Kind::StatefulSet,
            ..target(&died_once(0, &[]))
        };
        let mut verdict = Verdict::Complete;
        for second in [0, seconds] {
            verdict = judge(&target, &died_once(second, &events), false, &mut history);
        }
        assert!(matches!(verdict, Verdict::NotYet { .. }), "{verdict:?}");
        let late = died_once(seconds, &events);
        assert_eq!(
            is_only_young(&target, &late, &history),
            is_well,
            "{seconds} {events:?}"
        );
    }
}
