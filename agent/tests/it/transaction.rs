//! The release transaction from outside: it ends proved live, or what served before is back, and the cause is told.

use std::time::Duration;

use serde_json::{Value, json};

use crate::landfall::Landfall;
use crate::support::{busybox, eventually, kubectl, kubectl_apply};

const DIES: (&str, &str) = (
    "start.sh",
    "echo 'fatal: DATABASE_URL is not set' >&2; exit 1",
);

fn settings(name: &str, value: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: {name}\ndata:\n  greeting: {value}\n"
    )
}

fn field(landfall: &Landfall, object: &str, path: &str) -> String {
    let path = format!("jsonpath={{{path}}}");
    kubectl(&[
        "-n",
        &landfall.namespace.0,
        "get",
        object,
        "--ignore-not-found",
        "-o",
        &path,
    ])
}

fn ended(build: &Value) -> (&str, &str) {
    (
        build["status"].as_str().unwrap(),
        build["outcome"].as_str().unwrap(),
    )
}

/// Pushes, and sees it go live.
async fn live(landfall: &mut Landfall, files: &[(&str, &str)]) -> Value {
    ends(landfall, files, ("passed", "live")).await
}

/// Pushes, and sees the build end with this status and outcome.
async fn ends(landfall: &mut Landfall, files: &[(&str, &str)], how: (&str, &str)) -> Value {
    let id = landfall.push(files).await;
    let build = landfall.end(id).await;
    assert_eq!(ended(&build), how, "{build:#}\n{}", landfall.log(id).await);
    build
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_served_is_back_and_the_cause_told_when_a_release_dies_at_start() {
    let mut landfall = Landfall::start("dies").await;
    let good = live(
        &mut landfall,
        &[("kubernetes/settings.yaml", &settings("settings", "good"))],
    )
    .await;
    let serving = landfall.served("/version");
    let files = [
        DIES,
        ("kubernetes/settings.yaml", &settings("settings", "bad")),
        ("kubernetes/more.yaml", &settings("more", "bad")),
    ];
    let id = landfall.push(&files).await;
    let build = landfall.end(id).await;
    let log = landfall.log(id).await;
    assert_eq!(ended(&build), ("failed", "rolled_back"), "{build:#}\n{log}");
    let cause = &build["cause"];
    assert_eq!(cause["id"], "crash_loop", "{build:#}\n{log}");
    assert!(
        cause["sentence"]
            .as_str()
            .unwrap()
            .contains("DATABASE_URL is not set"),
        "{cause:#}\n{log}"
    );
    let back = format!("release {} is back and verified", good["release_id"]);
    let hint = cause["hint"].as_str().unwrap();
    assert!(hint.contains(&back), "{cause:#}");
    assert!(lost(hint).is_some(), "{cause:#}\n{log}");
    assert_eq!(build["restored_release"], good["release_id"]);

    assert_eq!(landfall.served("/version"), serving);
    assert_eq!(
        field(&landfall, "configmap/settings", ".data.greeting"),
        "good"
    );
    assert_eq!(
        field(&landfall, "configmap/more", ".metadata.name"),
        "",
        "what the failed release made is still there"
    );
    assert!(
        log.contains("configmap/more removed") && log.contains("Putting back release"),
        "{log}"
    );

    let kept = landfall
        .get(&format!("/api/builds/{id}/evidence"))
        .await
        .to_string();
    assert!(
        kept.contains("before its restart") && kept.contains("DATABASE_URL is not set"),
        "{kept}"
    );
    let history = landfall.get("/api/environments/hello/releases").await;
    let states: Vec<&str> = history["releases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["state"].as_str().unwrap())
        .collect();
    assert_eq!(states, ["failed", "live"], "{history:#}");
    assert_eq!(history["current"], good["release_id"]);

    // A correction goes live on top of it.
    live(
        &mut landfall,
        &[
            ("start.sh", "exec httpd -f -p 5000 -h /www"),
            ("www/index.html", "Hello mended"),
        ],
    )
    .await;
    assert_eq!(landfall.served("/index.html").trim(), "Hello mended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_release_over_what_was_there_goes_back_to_it() {
    let mut landfall = Landfall::start("adopted").await;
    let site = std::fs::read_to_string(landfall.path("work/kubernetes/deployment.yaml")).unwrap();
    let by_hand = site.replace(
        "image: hello\n",
        &format!("image: {}\n          command: [sh, -c, 'mkdir /tmp/w; echo by hand > /tmp/w/health; exec httpd -f -p 5000 -h /tmp/w']\n", busybox()),
    );
    kubectl_apply(&landfall.namespace.0, &by_hand);
    kubectl(&[
        "-n",
        &landfall.namespace.0,
        "rollout",
        "status",
        "deployment/hello",
        "--timeout=60s",
    ]);
    // Beside it something that has been dead for long.
    let dead = worker("one");
    kubectl_apply(&landfall.namespace.0, &dead);
    tokio::time::sleep(Duration::from_secs(62)).await;
    let id = landfall
        .push(&[DIES, ("kubernetes/worker.yaml", &dead)])
        .await;
    let build = landfall.end(id).await;
    let log = landfall.log(id).await;
    assert_eq!(ended(&build), ("failed", "rolled_back"), "{build:#}\n{log}");
    assert!(
        log.contains("deployment/worker was not well before either"),
        "{log}"
    );
    kubectl_apply(&landfall.namespace.0, &settings("elsewhere", "hello"));
    let image = field(
        &landfall,
        "deployment/hello",
        ".spec.template.spec.containers[0].image",
    );
    assert_eq!(image, busybox());
    assert!(log.contains("what stood here before Landfall"), "{log}");
    // The Service came with the failed release.
    assert_eq!(field(&landfall, "service/hello", ".metadata.name"), "");
    let history = landfall.get("/api/environments/hello/releases").await;
    assert!(
        history["releases"].to_string().contains("adopted"),
        "{history:#}"
    );

    live(
        &mut landfall,
        &[("start.sh", "exec httpd -f -p 5000 -h /www")],
    )
    .await;
    let (status, undo) = landfall
        .write("/api/environments/hello/undo", json!({"reason": "try"}))
        .await;
    assert_eq!(status, 202, "{undo:#}");
    let undone = landfall.end(undo["id"].as_i64().unwrap()).await;
    assert_eq!(
        ended(&undone),
        ("passed", "live"),
        "{undone:#}\n{}",
        landfall.log(undone["id"].as_i64().unwrap()).await
    );
    assert_eq!(
        field(
            &landfall,
            "deployment/hello",
            ".spec.template.spec.containers[0].image"
        ),
        busybox()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_first_release_that_fails_is_left_or_removed_as_the_pipeline_says() {
    for (word, outcome, stands) in [("leave", "left_failed", "hello"), ("remove", "removed", "")] {
        let mut landfall = Landfall::start("first").await;
        let pipeline = std::fs::read_to_string(landfall.path("work/pipeline.yaml")).unwrap();
        let pipeline = format!("{pipeline}first_release: {word}\n");
        let build = ends(
            &mut landfall,
            &[DIES, ("pipeline.yaml", &pipeline)],
            ("failed", outcome),
        )
        .await;
        assert_eq!(
            field(&landfall, "deployment/hello", ".metadata.name"),
            stands
        );
        assert_eq!(field(&landfall, "service/hello", ".metadata.name"), stands);
        let hint = build["cause"]["hint"].as_str().unwrap();
        assert!(
            hint.contains(if word == "leave" {
                "kubectl -n"
            } else {
                "is removed"
            }),
            "{hint}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_undo_goes_back_and_holds_there_until_it_is_unpinned() {
    let mut landfall = Landfall::start("undo").await;
    let one = live(&mut landfall, &[("www/index.html", "Hello one")]).await;
    let two = live(&mut landfall, &[("www/index.html", "Hello two")]).await;
    let (code, said) = landfall.run_command(&["undo", "hello", "--reason", "the second is wrong"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(landfall.served("/index.html").trim(), "Hello one");
    assert_eq!(
        landfall.get("/api/environments").await["environments"][0]["deployed"]["release"],
        one["release_id"]
    );

    let (_, history) = landfall.run_command(&["history", "hello"]);
    assert!(
        history.contains("the second is wrong") && history.contains("undo by admin"),
        "{history}"
    );
    let rollouts = kubectl(&[
        "-n",
        &landfall.namespace.0,
        "rollout",
        "history",
        "deployment/hello",
    ]);
    assert_eq!(rollouts.matches("Landfall #").count(), 2, "{rollouts}");

    // A push is held back, and a build by hand is refused with the way out.
    let third = landfall.push(&[("www/index.html", "Hello three")]).await;
    let held = landfall.end(third).await;
    assert_eq!(ended(&held), ("skipped", "unchanged"), "{held:#}");
    assert_eq!(held["cause"]["id"], "pinned");
    let (status, refused) = landfall
        .write(
            "/api/builds",
            json!({"environment": "hello", "branch": "main"}),
        )
        .await;
    assert_eq!(status, 409);
    assert!(
        refused["hint"].as_str().unwrap().contains("unpin"),
        "{refused}"
    );

    // Forward again, and free.
    let (code, said) = landfall.run_command(&["redo", "hello"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(landfall.served("/index.html").trim(), "Hello two");
    assert_eq!(
        landfall.get("/api/environments").await["environments"][0]["deployed"]["release"],
        two["release_id"]
    );
    let (code, said) = landfall.run_command(&["redo", "hello"]);
    assert_eq!(code, Some(2), "{said}");

    // A pin by hand; unpinned, the head that was pushed meanwhile is built.
    assert_eq!(
        landfall
            .run_command(&["pin", "hello", "--reason", "sale"])
            .0,
        Some(0)
    );
    let (code, said) = landfall.run_command(&["unpin", "hello"]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(landfall.served("/index.html").trim(), "Hello three");

    // By the number that kubectl shows, which the undo has moved.
    let rollouts = kubectl(&[
        "-n",
        &landfall.namespace.0,
        "rollout",
        "history",
        "deployment/hello",
    ]);
    let of_one = format!("Landfall #{}", one["id"]);
    let line = rollouts.lines().find(|line| line.contains(&of_one));
    let revision = line.unwrap_or_else(|| panic!("{rollouts}"));
    let revision = revision.split_whitespace().next().unwrap();
    assert_ne!(revision, "1", "{rollouts}");
    let (code, said) = landfall.run_command(&["undo", "hello", "--to-revision", revision]);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(landfall.served("/index.html").trim(), "Hello one");
    let (code, said) = landfall.run_command(&["undo", "hello", "--to-revision", "99"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("known as revision 99"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_release_no_longer_has_is_removed_once_it_is_live() {
    let mut landfall = Landfall::start("prune").await;
    live(
        &mut landfall,
        &[("kubernetes/old.yaml", &settings("old", "one"))],
    )
    .await;
    kubectl_apply(&landfall.namespace.0, &settings("not-ours", "mine"));
    std::fs::remove_file(landfall.path("work/kubernetes/old.yaml")).unwrap();
    // A release that fails takes nothing away.
    let failed = landfall.push(&[DIES]).await;
    assert_eq!(
        ended(&landfall.end(failed).await),
        ("failed", "rolled_back")
    );
    assert_eq!(field(&landfall, "configmap/old", ".data.greeting"), "one");
    let build = live(
        &mut landfall,
        &[
            ("start.sh", "exec httpd -f -p 5000 -h /www"),
            ("www/index.html", "Hello two"),
        ],
    )
    .await;
    assert_eq!(field(&landfall, "configmap/old", ".metadata.name"), "");
    assert_eq!(
        field(&landfall, "configmap/not-ours", ".data.greeting"),
        "mine"
    );
    let plan = landfall
        .get(&format!("/api/builds/{}/plan", build["id"]))
        .await;
    assert!(
        plan["plan"]
            .to_string()
            .contains(r#"{"change":"removed","object":"configmap/old"}"#),
        "{plan:#}"
    );
    let log = landfall.log(build["id"].as_i64().unwrap()).await;
    assert!(
        log.contains("configmap/old will be removed") && log.contains("configmap/old removed"),
        "{log}"
    );
}

/// What is to be removed once the release is live must not be what it lives on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_pruned_that_the_release_still_needs() {
    let mut landfall = Landfall::start("needs").await;
    let namespace = landfall.namespace.0.clone();
    let listens = "mkdir /w; exec httpd -f -p 80 -h /w";
    let side = worker("one")
        .replace("worker", "side")
        .replace("exec sleep 3600", listens);
    let service = "apiVersion: v1\nkind: Service\nmetadata:\n  name: side\nspec:\n  selector:\n    app: side\n  ports:\n    - port: 80\n";
    let files = [
        (
            "kubernetes/settings.yaml",
            [settings("more", "hello"), settings("elsewhere", "hello")].join("---\n"),
        ),
        ("kubernetes/side.yaml", side.clone()),
        ("kubernetes/side-service.yaml", service.to_owned()),
    ];
    let files: Vec<_> = files
        .iter()
        .map(|(name, text)| (*name, text.as_str()))
        .collect();
    live(&mut landfall, &files).await;

    // The workload has another name now, and its Service does not know.
    let renamed = side.replace("side", "other");
    let files = [("kubernetes/side.yaml", renamed.as_str())];
    let build = ends(&mut landfall, &files, ("failed", "unchanged")).await;
    assert_eq!(build["cause"]["id"], "service_selects_nothing", "{build:#}");

    // The Service that the smoke test asks is forgotten.
    let service = std::fs::read_to_string(landfall.path("work/kubernetes/service.yaml")).unwrap();
    let files = [
        ("kubernetes/side.yaml", side.as_str()),
        ("kubernetes/service.yaml", &settings("another", "hello")),
    ];
    let build = ends(&mut landfall, &files, ("failed", "unchanged")).await;
    let sentence = build["cause"]["sentence"].as_str().unwrap();
    assert!(
        sentence.ends_with("the smoke test asks service/hello, which the manifests hold no more"),
        "{sentence}"
    );

    // A ConfigMap that is forgotten, and named all the same.
    let files = [
        ("kubernetes/side.yaml", side.as_str()),
        ("kubernetes/settings.yaml", &settings("more", "hello")),
        ("kubernetes/service.yaml", &service),
    ];
    let build = live(&mut landfall, &files).await;
    let log = landfall.log(build["id"].as_i64().unwrap()).await;
    assert!(
        log.contains("configmap/elsewhere stays: the manifests hold it no more"),
        "{log}"
    );
    kubectl(&["-n", &namespace, "get", "configmap/elsewhere"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_put_back_stays_and_is_in_the_cause() {
    let mut landfall = Landfall::start("immutable").await;
    let file = "kubernetes/settings.yaml";
    live(&mut landfall, &[(file, &settings("settings", "good"))]).await;
    let for_ever = format!("{}immutable: true\n", settings("settings", "bad"));
    let files = [DIES, (file, for_ever.as_str())];
    let build = ends(&mut landfall, &files, ("failed", "rolled_back")).await;
    let hint = build["cause"]["hint"].as_str().unwrap();
    let stays = "but configmap/settings cannot be put back as it was and stays as it is: ";
    assert!(
        hint.contains(stays) && hint.contains("immutable"),
        "{build:#}"
    );
    assert_eq!(
        field(&landfall, "configmap/settings", ".data.greeting"),
        "bad"
    );
    assert_eq!(build["cause"]["id"], "crash_loop", "{build:#}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_that_is_killed_is_finished_by_the_next_start() {
    let mut landfall = Landfall::start("killed-back").await;
    let good = live(&mut landfall, &[("www/index.html", "Hello one")]).await;
    let serving = landfall.served("/version");
    let id = landfall.push(&[DIES]).await;
    landfall.reach(id, "rollback").await;
    landfall.kill();
    landfall.run().await;
    let build = landfall.end(id).await;
    let log = landfall.log(id).await;
    assert_eq!(ended(&build), ("failed", "rolled_back"), "{build:#}\n{log}");
    assert_eq!(build["restored_release"], good["release_id"]);
    assert!(
        build["cause"]["sentence"]
            .as_str()
            .unwrap()
            .contains("DATABASE_URL"),
        "{build:#}"
    );
    assert_eq!(landfall.served("/version"), serving);
}

/// A StatefulSet by itself waits for ever for its broken pod (https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/#forced-rollback).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_in_which_a_stateful_set_is_stuck_is_freed_on_the_way_back() {
    let mut landfall = Landfall::start("stuck").await;
    let database = |command: &str| {
        format!(
            "apiVersion: apps/v1\nkind: StatefulSet\nmetadata:\n  name: database\nspec:\n  replicas: 2\n  serviceName: database\n  selector:\n    matchLabels:\n      app: database\n  \
             template:\n    metadata:\n      labels:\n        app: database\n    spec:\n      terminationGracePeriodSeconds: 1\n      containers:\n        - name: database\n          image: {}\n          \
             command: [sh, -c, \"{command}\"]\n          readinessProbe:\n            exec:\n              command: [\"true\"]\n            periodSeconds: 1\n",
            busybox()
        )
    };
    let serves = database("sleep 1000");
    live(&mut landfall, &[("kubernetes/database.yaml", &serves)]).await;
    let dies = database("echo disk format too old >&2; exit 1");
    let files = [("kubernetes/database.yaml", dies.as_str())];
    let build = ends(&mut landfall, &files, ("failed", "rolled_back")).await;
    let sentence = build["cause"]["sentence"].as_str().unwrap();
    assert!(sentence.contains("disk format too old"), "{build:#}");
    let log = landfall.log(build["id"].as_i64().unwrap()).await;
    assert!(log.contains("pod/database-1"), "{log}");
    let ready = field(&landfall, "statefulset/database", ".status.readyReplicas");
    assert_eq!(ready, "2");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_failed_is_not_deployed_again_unless_asked() {
    let mut landfall = Landfall::start("quarantine").await;
    live(&mut landfall, &[]).await;
    let id = landfall.push(&[DIES]).await;
    let failed = landfall.end(id).await;
    assert_eq!(ended(&failed), ("failed", "rolled_back"));
    live(
        &mut landfall,
        &[
            ("start.sh", "exec httpd -f -p 5000 -h /www"),
            ("www/index.html", "Hello good"),
        ],
    )
    .await;
    // The branch goes back to the commit that failed.
    let again = landfall
        .push_again(failed["commit"].as_str().unwrap())
        .await;
    let held = landfall.end(again).await;
    assert_eq!(ended(&held), ("skipped", "unchanged"), "{held:#}");
    assert_eq!(held["cause"]["id"], "quarantined");
    assert_eq!(landfall.served("/index.html").trim(), "Hello good");
    let (status, rerun) = landfall
        .write(&format!("/api/builds/{again}/rerun"), json!({}))
        .await;
    assert_eq!(status, 202, "{rerun}");
    assert_eq!(
        ended(&landfall.end(rerun["id"].as_i64().unwrap()).await),
        ("failed", "rolled_back")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_fails_stops_the_release_and_its_log_is_kept() {
    let mut landfall = Landfall::start("migration").await;
    let job = |command: &str| {
        format!(
            "apiVersion: batch/v1\nkind: Job\nmetadata:\n  name: migrate\nspec:\n  backoffLimit: 0\n  template:\n    spec:\n      restartPolicy: Never\n      \
             containers:\n        - name: migrate\n          image: {}\n          command: [sh, -c, \"{command}\"]\n",
            busybox()
        )
    };
    live(
        &mut landfall,
        &[("kubernetes/migrate.yaml", &job("echo migrated"))],
    )
    .await;
    let serving = landfall.served("/version");
    let files = [
        (
            "kubernetes/migrate.yaml",
            job("echo fatal: column exists; exit 4"),
        ),
        ("www/index.html", "Hello two".to_owned()),
    ];
    let files: Vec<(&str, &str)> = files
        .iter()
        .map(|(path, text)| (*path, text.as_str()))
        .collect();
    let id = landfall.push(&files).await;
    let build = landfall.end(id).await;
    let log = landfall.log(id).await;
    assert_eq!(ended(&build), ("failed", "rolled_back"), "{build:#}\n{log}");
    assert_eq!(build["cause"]["id"], "job_failed");
    assert!(
        build["cause"]["sentence"]
            .as_str()
            .unwrap()
            .contains("column exists"),
        "{build:#}"
    );
    assert_eq!(
        landfall.served("/version"),
        serving,
        "the workload was touched"
    );
    let evidence = landfall
        .get(&format!("/api/builds/{id}/evidence"))
        .await
        .to_string();
    assert!(evidence.contains("column exists"), "{evidence}");
    // Mended, it runs; what is done is not run again by the next push.
    live(
        &mut landfall,
        &[("kubernetes/migrate.yaml", &job("echo migrated again"))],
    )
    .await;
    let namespace = landfall.namespace.0.clone();
    let jobs = || kubectl(&["-n", &namespace, "get", "jobs", "-o", "name"]);
    let left = jobs();
    assert_eq!(left.lines().count(), 1, "{left}");

    // One that hangs does not go on under the release that is put back.
    let pipeline = std::fs::read_to_string(landfall.path("work/pipeline.yaml")).unwrap();
    let hasty = pipeline.replace("timeout_seconds: 60", "timeout_seconds: 6");
    let files = [
        ("kubernetes/migrate.yaml", job("sleep 600")),
        ("pipeline.yaml", hasty),
    ];
    let files = files.each_ref().map(|(path, text)| (*path, text.as_str()));
    let id = landfall.push(&files).await;
    let build = landfall.end(id).await;
    let log = landfall.log(id).await;
    assert_eq!(ended(&build), ("failed", "rolled_back"), "{build:#}\n{log}");
    assert_eq!(jobs(), left, "{log}");
}

/// An agent that slept between the store's word and the cluster's Lease raises the Lease's number before it hears that it has
/// lost the environment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_holds_the_environment_claims_it_anew_after_one_that_woke() {
    let mut landfall = Landfall::start("woken").await;
    let job = format!(
        "apiVersion: batch/v1\nkind: Job\nmetadata:\n  name: migrate\nspec:\n  template:\n    spec:\n      restartPolicy: Never\n      \
         containers:\n        - name: migrate\n          image: {}\n          command: [sh, -c, \"sleep 5; echo migrated\"]\n",
        busybox()
    );
    let id = landfall.push(&[("kubernetes/migrate.yaml", &job)]).await;
    let namespace = landfall.namespace.0.clone();
    let migrates = || kubectl(&["-n", &namespace, "get", "jobs", "-o", "name"]);
    eventually("the Job runs", Duration::from_secs(60), async || {
        migrates().contains("migrate").then_some(())
    })
    .await;
    // The Deployment is not there yet, so that only the Lease says who may make it.
    let lease = "lease/landfall-hello";
    let number = kubectl(&[
        "-n",
        &namespace,
        "get",
        lease,
        "-o",
        "jsonpath={.spec.leaseTransitions}",
    ]);
    let woken = format!(
        "{{\"spec\":{{\"leaseTransitions\":{}}}}}",
        number.parse::<u32>().unwrap() + 1
    );
    kubectl(&[
        "-n",
        &namespace,
        "patch",
        lease,
        "--type=merge",
        "-p",
        &woken,
    ]);
    let build = landfall.end(id).await;
    let log = landfall.log(id).await;
    assert_eq!(ended(&build), ("passed", "live"), "{build:#}\n{log}");
    assert!(log.contains("Claiming the environment anew"), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_its_own_time_to_live_took_away_is_not_run_again() {
    let mut landfall = Landfall::start("ttl").await;
    let job = format!(
        "apiVersion: batch/v1\nkind: Job\nmetadata:\n  name: migrate\nspec:\n  ttlSecondsAfterFinished: 0\n  template:\n    spec:\n      restartPolicy: Never\n      \
         containers:\n        - name: migrate\n          image: {}\n          command: [sh, -c, \"echo migrated\"]\n",
        busybox()
    );
    live(&mut landfall, &[("kubernetes/migrate.yaml", &job)]).await;
    let jobs = || kubectl(&["-n", &landfall.namespace.0, "get", "jobs", "-o", "name"]);
    eventually("the Job is gone", Duration::from_secs(20), async || {
        jobs().is_empty().then_some(())
    })
    .await;
    let build = live(&mut landfall, &[("www/index.html", "Hello two")]).await;
    let log = landfall.log(build["id"].as_i64().unwrap()).await;
    assert!(
        log.contains("has run before, and is not run again"),
        "{log}"
    );
    let ran = kubectl(&[
        "-n",
        &landfall.namespace.0,
        "get",
        "events",
        "--field-selector=reason=SuccessfulCreate,involvedObject.kind=Job",
        "-o",
        "name",
    ]);
    assert_eq!(ran.lines().count(), 1, "{ran}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_soak_ends_when_the_next_push_waits() {
    let mut landfall = Landfall::start("soaking").await;
    let pipeline = std::fs::read_to_string(landfall.path("work/pipeline.yaml"))
        .unwrap()
        .replace("soak_seconds: 0", "soak_seconds: 600");
    let first = landfall.push(&[("pipeline.yaml", &pipeline)]).await;
    eventually("it soaks", Duration::from_secs(60), async || {
        landfall
            .log(first)
            .await
            .contains("Soak: watching for 600 s")
            .then_some(())
    })
    .await;
    let second = landfall.push(&[("www/index.html", "Hello two")]).await;
    let build = landfall.end(first).await;
    assert_eq!(ended(&build), ("passed", "live"), "{build:#}");
    let log = landfall.log(first).await;
    assert!(
        log.contains("The soak is cut short after") && log.contains(&format!("#{second} waits")),
        "{log}"
    );
    // A person's cancel is no failure of what soaks either.
    eventually(
        "the second one soaks",
        Duration::from_secs(60),
        async || {
            landfall
                .log(second)
                .await
                .contains("Soak: watching for 600 s")
                .then_some(())
        },
    )
    .await;
    let (status, answer) = landfall
        .write(&format!("/api/builds/{second}/cancel"), json!({}))
        .await;
    assert_eq!(status, 202, "{answer}");
    let build = landfall.end(second).await;
    assert_eq!(ended(&build), ("passed", "live"), "{build:#}");
}

/// Of "…, 3 of 20 requests lost".
fn lost(text: &str) -> Option<u32> {
    let (before, _) = text.split_once(" requests lost")?;
    let mut words = before.rsplit(' ');
    let (requests, of, lost) = (words.next()?, words.next()?, words.next()?);
    assert!(of == "of" && requests.parse::<u32>().unwrap() > 2, "{text}");
    lost.parse().ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_a_release_costs_are_counted_and_told() {
    let mut landfall = Landfall::start("costs").await;
    let site = std::fs::read_to_string(landfall.path("work/kubernetes/deployment.yaml")).unwrap();
    // The old pods end before the new ones begin.
    let recreated = site.replace(
        "spec:\n  replicas",
        "spec:\n  strategy: { type: Recreate }\n  replicas",
    );
    assert_ne!(recreated, site);
    live(&mut landfall, &[("kubernetes/deployment.yaml", &recreated)]).await;
    let slow = "sleep 4; exec httpd -f -p 5000 -h /www";
    let build = live(&mut landfall, &[("start.sh", slow)]).await;
    let log = landfall.log(build["id"].as_i64().unwrap()).await;
    let told = log
        .lines()
        .find(|line| line.contains(" is live, "))
        .unwrap_or_default();
    assert!(lost(told) >= Some(2), "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_back_that_is_barred_is_said_loudly_once_and_gone_by_hand() {
    let mut landfall = Landfall::start("barred").await;
    let site = std::fs::read_to_string(landfall.path("work/kubernetes/deployment.yaml")).unwrap();
    let recreated = site.replace(
        "spec:\n  replicas",
        "spec:\n  strategy: { type: Recreate }\n  replicas",
    );
    let good = live(&mut landfall, &[("kubernetes/deployment.yaml", &recreated)]).await;
    let serving = landfall.served("/version");

    let id = landfall.push(&[DIES]).await;
    eventually("it dies", Duration::from_secs(60), async || {
        let log = landfall.log(id).await;
        log.contains("Last words of").then_some(())
    })
    .await;
    // From now on no pod is let in, and the old one is gone.
    let namespace = landfall.namespace.0.clone();
    kubectl(&["-n", &namespace, "create", "quota", "none", "--hard=pods=0"]);
    let build = landfall.end(id).await;
    let log = landfall.log(id).await;
    assert_eq!(
        ended(&build),
        ("failed", "rollback_failed"),
        "{build:#}\n{log}"
    );
    // The cause is what was wrong with the release; what bars the way back is beside it, with the way out.
    assert_eq!(build["cause"]["id"], "crash_loop", "{build:#}\n{log}");
    let hint = build["cause"]["hint"].as_str().unwrap();
    let again = format!("landfall undo hello --to {}", good["release_id"]);
    assert!(
        hint.contains("exceeded quota: none") && hint.contains(&again),
        "{hint}\n{log}"
    );
    assert_eq!(log.matches("The rollback failed").count(), 1, "{log}");

    kubectl(&["-n", &namespace, "delete", "quota", "none"]);
    let words: Vec<&str> = again.split(' ').skip(1).collect();
    let (code, said) = landfall.run_command(&words);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(landfall.served("/version"), serving);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_to_be_rolled_back_is_left_with_the_commands_that_do_it() {
    let mut landfall = Landfall::start("never").await;
    let good = live(&mut landfall, &[]).await;
    let namespace = landfall.namespace.0.clone();
    let served = landfall.served("/version");
    let pipeline = std::fs::read_to_string(landfall.path("work/pipeline.yaml")).unwrap();
    let pipeline = format!("{pipeline}rollback: never\n");
    let build = ends(
        &mut landfall,
        &[DIES, ("pipeline.yaml", &pipeline)],
        ("failed", "left_failed"),
    )
    .await;
    let hint = build["cause"]["hint"].as_str().unwrap();
    let by_hand = format!("kubectl -n {namespace} rollout undo deployment/hello");
    let whole = format!("landfall undo hello --to {}", good["release_id"]);
    assert!(hint.contains(&by_hand) && hint.contains(&whole), "{hint}");
    let kept = landfall
        .get(&format!("/api/builds/{}/evidence", build["id"]))
        .await;
    assert!(kept.to_string().contains("DATABASE_URL"), "{kept:#}");

    kubectl(&["-n", &namespace, "rollout", "undo", "deployment/hello"]);
    kubectl(&[
        "-n",
        &namespace,
        "rollout",
        "status",
        "deployment/hello",
        "--timeout=60s",
    ]);
    assert_eq!(landfall.served("/version"), served);
    let whole: Vec<&str> = whole.split(' ').skip(1).collect();
    let (code, said) = landfall.run_command(&whole);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(landfall.served("/version"), served);
}

/// A second workload, which needs a ConfigMap that somebody else looks after.
fn worker(version: &str) -> String {
    format!(
        r"apiVersion: apps/v1
kind: Deployment
metadata:
  name: worker
spec:
  selector:
    matchLabels:
      app: worker
  template:
    metadata:
      labels:
        app: worker
    spec:
      terminationGracePeriodSeconds: 1
      containers:
        - name: worker
          image: {}
          command: [sh, -c, 'exec sleep 3600']
          env:
            - name: VERSION
              value: {version}
          envFrom:
            - configMapRef:
                name: elsewhere
          resources:
            requests:
              cpu: 50m
",
        busybox()
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_failed_before_a_release_is_not_held_against_it_while_it_stays_the_same() {
    let mut landfall = Landfall::start("unwell").await;
    let namespace = landfall.namespace.0.clone();
    kubectl_apply(&namespace, &settings("elsewhere", "hello"));
    live(&mut landfall, &[("kubernetes/worker.yaml", &worker("one"))]).await;

    kubectl(&["-n", &namespace, "delete", "configmap/elsewhere"]);
    kubectl(&["-n", &namespace, "delete", "pod", "-l", "app=worker"]);
    let why = "jsonpath={.items[*].status.containerStatuses[*].state.waiting.reason}";
    let worker_pods = [
        "-n",
        &namespace,
        "get",
        "pods",
        "-l",
        "app=worker",
        "-o",
        why,
    ];
    eventually("the worker fails", Duration::from_secs(30), async || {
        (kubectl(&worker_pods) == "CreateContainerConfigError").then_some(())
    })
    .await;
    // For so long it might be about to come up.
    tokio::time::sleep(Duration::from_secs(60)).await;

    let build = live(&mut landfall, &[("www/index.html", "Hello again")]).await;
    let log = landfall.log(build["id"].as_i64().unwrap()).await;
    assert!(
        log.contains("deployment/worker was not well before this release: "),
        "{log}"
    );
    assert!(
        log.contains("deployment/worker was not well before either, and is left as it is: "),
        "{log}"
    );

    // A bad one is put back all the same, and the way back is as good as what was there.
    let build = ends(&mut landfall, &[DIES], ("failed", "rolled_back")).await;
    assert_eq!(build["cause"]["object"], "deployment/hello");

    // Nor does it keep anybody from going back, and forward again.
    for way in ["undo", "redo"] {
        let (code, said) = landfall.run_command(&[way, "hello"]);
        assert_eq!(code, Some(0), "{way}: {said}");
    }
    assert_eq!(landfall.served("/index.html").trim(), "Hello again");

    // Nor where the agent is killed half-way: what was seen before is kept.
    landfall.kill();
    landfall.run_doomed(&[("LANDFALL_FAIL_POINT", "cluster: applied:2")]);
    landfall.is_ready().await;
    let (code, said) = landfall.run_command(&["undo", "hello"]);
    assert!(
        landfall.dies_within(Duration::from_secs(20)).await,
        "{code:?} {said}"
    );
    assert_eq!(landfall.fail_points(), ["cluster: applied"]);
    landfall.run().await;
    let builds = landfall.get("/api/builds").await;
    let undo = landfall
        .end(builds["builds"][0]["id"].as_i64().unwrap())
        .await;
    let log = landfall.log(undo["id"].as_i64().unwrap()).await;
    assert_eq!(
        (&undo["kind"], &undo["attempt"]),
        (&json!("undo"), &json!(2)),
        "{undo:#}"
    );
    assert_eq!(ended(&undo), ("passed", "live"), "{undo:#}\n{log}");
    let (code, said) = landfall.run_command(&["redo", "hello"]);
    assert_eq!(code, Some(0), "{said}");

    // What the release itself changes is its own.
    let good = ("start.sh", "exec httpd -f -p 5000 -h /www");
    let build = ends(
        &mut landfall,
        &[good, ("kubernetes/worker.yaml", &worker("two"))],
        ("failed", "rolled_back"),
    )
    .await;
    assert_eq!(build["cause"]["object"], "deployment/worker");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answer_that_failed_the_smoke_test_is_kept() {
    let mut landfall = Landfall::start("answer").await;
    let good = live(&mut landfall, &[("www/index.html", "Hello one")]).await;
    let pipeline = std::fs::read_to_string(landfall.path("work/pipeline.yaml")).unwrap();
    let wrong = pipeline.replace("get: /version", "get: /index.html");
    let id = landfall
        .push(&[
            ("pipeline.yaml", &wrong),
            ("www/index.html", "Hello, I am no JSON"),
        ])
        .await;
    let build = landfall.end(id).await;
    assert_eq!(ended(&build), ("failed", "rolled_back"), "{build:#}");
    assert_eq!(build["cause"]["id"], "smoke_wrong_body", "{build:#}");
    assert_eq!(build["restored_release"], good["release_id"]);
    let kept = landfall.get(&format!("/api/builds/{id}/evidence")).await;
    let first = &kept["evidence"][0];
    let (title, body) = (
        first["title"].as_str().unwrap(),
        first["body"].as_str().unwrap(),
    );
    assert!(
        title.starts_with("GET /index.html of pod ") && title.ends_with(": the last answer"),
        "{kept:#}"
    );
    assert!(
        body.starts_with("200 in ") && body.ends_with("Hello, I am no JSON"),
        "{kept:#}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_secret_of_the_manifests_is_sealed_masked_and_put_back() {
    let kinds = "    allowed_kinds: [Deployment, Service, Secret, Job]\n";
    let mut landfall = Landfall::start_with("sealed", kinds).await;
    let namespace = landfall.namespace.0.clone();
    let role = [
        "-n",
        &namespace,
        "create",
        "role",
        "secrets",
        "--verb=get,list,create,patch,delete",
        "--resource=secrets",
    ];
    kubectl(&role);
    let account = format!("--serviceaccount=landfall-agents:{namespace}");
    kubectl(&[
        "-n",
        &namespace,
        "create",
        "rolebinding",
        "secrets",
        "--role=secrets",
        &account,
    ]);
    let secret = |value: &str| {
        format!(
            "apiVersion: v1\nkind: Secret\nmetadata:\n  name: login\nstringData:\n  password: {value}\n"
        )
    };
    live(
        &mut landfall,
        &[("kubernetes/login.yaml", &secret("correct-horse"))],
    )
    .await;
    let id = landfall
        .push(&[
            ("kubernetes/login.yaml", &secret("wrong-battery")),
            (
                "start.sh",
                "echo 'fatal: wrong-battery is no password' >&2; exit 1",
            ),
        ])
        .await;
    let build = landfall.end(id).await;
    let log = landfall.log(id).await;
    assert_eq!(ended(&build), ("failed", "rolled_back"), "{build:#}\n{log}");
    assert!(log.contains("fatal: *** is no password"), "{log}");
    let put_back = field(&landfall, "secret/login", ".data.password");
    assert_eq!(put_back, "Y29ycmVjdC1ob3JzZQ==");
    let shown = format!(
        "{build}{log}{}",
        landfall.get(&format!("/api/builds/{id}/evidence")).await
    );
    assert!(!shown.contains("wrong-battery"), "{shown}");

    // What a Job says last is in the cause, and so on the page and on GitHub.
    let tells = format!(
        "apiVersion: batch/v1\nkind: Job\nmetadata:\n  name: tells\nspec:\n  backoffLimit: 0\n  template:\n    spec:\n      restartPolicy: Never\n      \
         containers:\n        - name: tells\n          image: {}\n          command: [sh, -c, \"echo fatal: $PASSWORD is wrong; exit 4\"]\n          \
         env: [{{name: PASSWORD, valueFrom: {{secretKeyRef: {{name: login, key: password}}}}}}]\n",
        busybox()
    );
    let id = landfall
        .push(&[
            ("kubernetes/login.yaml", &secret("third-staple")),
            ("kubernetes/tells.yaml", &tells),
            ("start.sh", "exec httpd -f -p 5000 -h /www"),
        ])
        .await;
    let build = landfall.end(id).await;
    assert_eq!(build["cause"]["id"], "job_failed", "{build:#}");
    let sentence = build["cause"]["sentence"].as_str().unwrap();
    assert!(sentence.ends_with("fatal: *** is wrong"), "{sentence}");
    let history = landfall.get("/api/environments/hello/releases").await;
    assert!(!history.to_string().contains("third-staple"), "{history:#}");

    for file in ["landfall.db", "landfall.db-wal", "logs.db", "logs.db-wal"] {
        let bytes = std::fs::read(landfall.path("data").join(file)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        for clear in [
            "third-staple",
            "correct-horse",
            "wrong-battery",
            "Y29ycmVjdC1ob3JzZQ",
            "d3JvbmctYmF0dGVyeQ",
        ] {
            assert!(!text.contains(clear), "{file} holds {clear}");
        }
    }
}
