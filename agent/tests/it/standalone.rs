//! Commands that need no server, on the real cluster: `verify`, `deploy`, `plan`.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::landfall::Landfall;
use crate::support::{Namespace, busybox, kubeconfig, kubectl, kubectl_apply, setting};

/// Exit code, and all that was printed.
fn landfall(namespace: &Namespace, arguments: &[&str]) -> (Option<i32>, String) {
    let kubectl = setting("LANDFALL_TEST_KUBECTL");
    let folder = Path::new(&kubectl).parent().unwrap().display().to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_landfall"))
        .args(arguments)
        .args(["-n", &namespace.0, "--kubeconfig"])
        .arg(kubeconfig())
        .env(
            "PATH",
            format!("{folder}:{}", std::env::var("PATH").unwrap()),
        )
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

fn deployment(image: &str, command: &str) -> String {
    format!(
        "apiVersion: apps/v1
kind: Deployment
metadata: {{name: web}}
spec:
  replicas: 2
  selector: {{matchLabels: {{app: web}}}}
  template:
    metadata: {{labels: {{app: web}}}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: main
          image: {image}
          command: [sh, -c, \"{command}\"]
          readinessProbe: {{exec: {{command: ['true']}}, periodSeconds: 1}}
"
    )
}

fn field(namespace: &Namespace, object: &str, path: &str) -> String {
    kubectl(&[
        "-n",
        &namespace.0,
        "get",
        object,
        "--ignore-not-found",
        "-o",
        &format!("jsonpath={{{path}}}"),
    ])
}

#[test]
fn verify_says_why_a_rollout_fails_long_before_kubectl() {
    let namespace = Namespace::new("by-hand");
    kubectl_apply(&namespace.0, &deployment(&busybox(), "sleep 1000"));
    let (code, said) = landfall(&namespace, &["verify", "deployment/web"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("deployment/web successfully rolled out"),
        "{said}"
    );

    kubectl_apply(
        &namespace.0,
        &deployment(&busybox(), "echo fatal: no DATABASE_URL; exit 3"),
    );
    let begun = Instant::now();
    let (code, said) = landfall(&namespace, &["verify", "deploy/web", "--timeout", "2m"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("exited with code 3") && said.contains("fatal: no DATABASE_URL"),
        "{said}"
    );
    assert!(
        begun.elapsed() < Duration::from_secs(40),
        "it took {:?}",
        begun.elapsed()
    );

    let (code, said) = landfall(&namespace, &["verify", "deployment/none"]);
    assert_eq!(code, Some(2), "{said}");
    let (code, said) = landfall(&namespace, &["verify", "service/web"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("has no rollout"), "{said}");
}

/// Whoever looks at any one moment finds it running.
#[test]
fn verify_is_not_taken_in_by_a_program_that_dies_every_few_seconds() {
    let namespace = Namespace::new("dying");
    let dying = deployment(&busybox(), "sleep 3; exit 7");
    kubectl_apply(
        &namespace.0,
        &dying.replace("periodSeconds: 1", "periodSeconds: 2"),
    );
    for _ in 0..100 {
        let restarts = kubectl(&[
            "-n",
            &namespace.0,
            "get",
            "pods",
            "-o",
            "jsonpath={.items[*].status.containerStatuses[0].restartCount}{.items[*].status.containerStatuses[0].state.running}",
        ]);
        if restarts.starts_with("1 1") && restarts.matches("startedAt").count() == 2 {
            break;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    let (code, said) = landfall(&namespace, &["verify", "deployment/web", "--timeout", "1m"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("exited with code 7"), "{said}");
}

#[test]
fn deploy_shows_no_value_of_a_secret() {
    let namespace = Namespace::new("masked");
    let file = tempfile::NamedTempFile::with_suffix(".yaml").unwrap();
    let secret = "---\napiVersion: v1\nkind: Secret\nmetadata: {name: db}\nstringData: {password: tell-nobody-of-this}\n";
    let says = "echo cannot log in with tell-nobody-of-this; exit 3";
    let set = [secret, "---\n", &deployment(&busybox(), says)].concat();
    std::fs::write(file.path(), set).unwrap();
    let path = file.path().to_str().unwrap();
    let (code, said) = landfall(&namespace, &["deploy", "-f", path, "--timeout", "1m"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("cannot log in with") && !said.contains("tell-nobody"),
        "{said}"
    );
}

#[test]
fn verify_waits_for_a_job_and_says_how_it_ended() {
    let namespace = Namespace::new("job-by-hand");
    let job = |name: &str, command: &str| {
        format!(
            "---
apiVersion: batch/v1
kind: Job
metadata: {{name: {name}}}
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      containers: [{{name: main, image: {}, command: [sh, -c, \"{command}\"]}}]
",
            busybox()
        )
    };
    let jobs = [
        job("good", "sleep 3"),
        job("bad", "echo cannot migrate; exit 9"),
        job("slow", "sleep 1000"),
    ];
    kubectl_apply(&namespace.0, &jobs.concat());
    let (code, said) = landfall(&namespace, &["verify", "job/good"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("job/good is complete"), "{said}");
    let (code, said) = landfall(&namespace, &["verify", "job/good", "job/bad"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("cannot migrate"), "{said}");
    let (code, said) = landfall(&namespace, &["verify", "job/slow", "--timeout", "2s"]);
    assert_eq!(code, Some(124), "{said}");
    assert!(said.contains("took longer than 2 s"), "{said}");
}

#[test]
fn deploy_goes_live_or_back_without_a_server() {
    let namespace = Namespace::new("deploy-by-hand");
    let folder = tempfile::tempdir().unwrap();
    let write = |text: &str| std::fs::write(folder.path().join("app.yaml"), text).unwrap();
    let files = folder.path().to_str().unwrap();
    write(&deployment("web:1", "sleep 1000"));
    let image = format!("web={}", busybox());
    let deploy = ["deploy", "-f", files, "--image", &image];
    let (code, said) = landfall(&namespace, &[&deploy[..], &["--plan"]].concat());
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("deployment/web will be created"), "{said}");
    assert_eq!(field(&namespace, "deployment/web", ".metadata.name"), "");
    let (code, said) = landfall(&namespace, &deploy);
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(
        field(
            &namespace,
            "deployment/web",
            ".spec.template.spec.containers[0].image"
        ),
        busybox()
    );

    let more = "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: more}\n";
    write(
        &[
            deployment("web:2", "echo fatal: broken; exit 1").as_str(),
            more,
        ]
        .concat(),
    );
    let (code, said) = landfall(&namespace, &[&deploy[..], &["--rollback"]].concat());
    assert_eq!(code, Some(3), "{said}");
    assert!(
        said.contains("fatal: broken") && said.contains("is back and verified"),
        "{said}"
    );
    assert!(
        field(
            &namespace,
            "deployment/web",
            ".spec.template.spec.containers[0].command"
        )
        .contains("sleep 1000")
    );
    assert_eq!(field(&namespace, "configmap/more", ".metadata.name"), "");

    let (code, said) = landfall(&namespace, &deploy);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("rollout undo deployment/web"), "{said}");
    let (code, said) = landfall(&namespace, &["deploy", "-f", files, "--image", "nginx=x"]);
    assert_eq!(code, Some(2), "{said}");
}

#[test]
fn a_way_back_without_a_server_ends_jobs_and_says_what_stays() {
    let namespace = Namespace::new("back-by-hand");
    let folder = tempfile::tempdir().unwrap();
    let write = |text: &str| std::fs::write(folder.path().join("app.yaml"), text).unwrap();
    let files = folder.path().to_str().unwrap();
    let image = format!("web={}", busybox());
    let deploy = [
        "deploy",
        "-f",
        files,
        "--image",
        &image,
        "--rollback",
        "--timeout",
        "20s",
    ];
    // Nothing was there before.
    let hangs = format!(
        "apiVersion: batch/v1\nkind: Job\nmetadata: {{name: migrate}}\nspec:\n  template:\n    spec:\n      restartPolicy: Never\n      \
         terminationGracePeriodSeconds: 0\n      containers: [{{name: migrate, image: {}, command: [sleep, '1000']}}]\n---\n",
        busybox()
    );
    let settings =
        "---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: settings}\ndata: {greeting: one}\n";
    let serves = deployment("web:1", "sleep 1000");
    write(
        &[
            &hangs,
            settings.trim_start_matches("---\n"),
            "---\n",
            &serves,
        ]
        .concat(),
    );
    let (code, said) = landfall(&namespace, &deploy);
    assert_eq!(code, Some(3), "{said}");
    assert!(
        said.contains("nothing was there before: what it had made is removed"),
        "{said}"
    );
    assert_eq!(
        kubectl(&["-n", &namespace.0, "get", "jobs,configmaps", "-o", "name"]),
        "configmap/kube-root-ca.crt\n"
    );

    write(&[&serves, settings].concat());
    let (code, said) = landfall(&namespace, &deploy);
    assert_eq!(code, Some(0), "{said}");
    let for_ever = settings.replace("one", "two") + "immutable: true\n";
    write(&[&deployment("web:2", "exit 1"), &for_ever[..]].concat());
    let (code, said) = landfall(&namespace, &deploy);
    assert_eq!(code, Some(3), "{said}");
    let back = "what was there before is back and verified, but configmap/settings cannot be put back as it was";
    assert!(said.contains(back), "{said}");
}

#[test]
fn a_kustomization_is_rendered_by_kubectl() {
    let namespace = Namespace::new("kustomize");
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    std::fs::create_dir(&base).unwrap();
    std::fs::write(base.join("web.yaml"), deployment(&busybox(), "sleep 1000")).unwrap();
    let kustomization = "resources: [web.yaml]\nnamePrefix: my-\nconfigMapGenerator:\n  - name: settings\n    literals: [greeting=hello]\n";
    std::fs::write(base.join("kustomization.yaml"), kustomization).unwrap();
    let (code, said) = landfall(
        &namespace,
        &["deploy", "-f", base.to_str().unwrap(), "--plan"],
    );
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("deployment/my-web will be created")
            && said.contains("configmap/my-settings-"),
        "{said}"
    );
    std::fs::write(
        base.join("kustomization.yaml"),
        "resources: ['https://example.org/all.yaml']\n",
    )
    .unwrap();
    let (code, said) = landfall(
        &namespace,
        &["deploy", "-f", base.to_str().unwrap(), "--plan"],
    );
    assert_eq!(code, Some(2), "{said}");
    assert!(
        said.contains("only files and folders of the repository"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plan_shows_what_a_push_would_change() {
    let landfall = Landfall::start("plan").await;
    let (code, said) = landfall.run_command(&["plan", "work"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("deployment/hello will be created") && said.contains("placeholder"),
        "{said}"
    );
    std::fs::write(landfall.path("work/kubernetes/service.yaml"), "apiVersion: v1\nkind: Service\nmetadata: {name: hello}\nspec: {selector: {app: hallo}, ports: [{port: 80}]}\n").unwrap();
    let (code, said) = landfall.run_command(&["plan", "work"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("selects app=hallo"), "{said}");
}
