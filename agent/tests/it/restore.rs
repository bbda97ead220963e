//! `landfall restore`, killed at each of its steps and run again.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use landfall::builds::{BuildKind, Push};
use landfall::store::{Filter, Store, care};

async fn push(store: &Store, commit: &str) {
    let push = Push {
        repository_id: None,
        repository: "acme/hello".to_owned(),
        branch: "main".to_owned(),
        before: "0".repeat(40),
        after: commit.repeat(40),
        pusher: "ann".to_owned(),
        title: String::new(),
        pushed_at: None,
    };
    let queued = store.enqueue("hello", &push, BuildKind::Push);
    queued.await.unwrap();
}

/// Commits of its builds, the newest first.
async fn commits(data_dir: &Path) -> anyhow::Result<Vec<String>> {
    let store = Store::open(data_dir, None).await?;
    let builds = store.builds(&Filter::default()).await?;
    Ok(builds.into_iter().map(|build| build.commit).collect())
}

fn restore(root: &Path, fail_point: Option<&str>) -> ExitStatus {
    let mut restore = Command::new(env!("CARGO_BIN_EXE_landfall"));
    restore
        .args(["restore", "copy", "--config", "agent.yaml"])
        .current_dir(root);
    if let Some(fail_point) = fail_point {
        restore.env("LANDFALL_FAIL_POINT", fail_point);
    }
    restore.output().unwrap().status
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// What was moved aside, the first time first.
fn aside(data: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(data).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let is_aside = |path: &PathBuf| path.display().to_string().contains("/before-restore-");
    let mut aside: Vec<PathBuf> = paths.filter(is_aside).collect();
    aside.sort();
    aside
}

#[tokio::test]
async fn a_restore_that_is_killed_at_any_step_is_refused_until_it_is_run_again() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let config = "environments:\n  - name: hello\n    repository: acme/hello\n    branch: main\n    clone_url: https://github.com/x/y\n    \
                  webhook_secrets: [0123456789abcdef0123456789abcdef]\n    namespace: hello\n    image_prefix: localhost:5001\n";
    std::fs::write(root.join("agent.yaml"), format!("data_dir: data\n{config}")).unwrap();
    let stood = root.join("stood");
    let store = Store::open(&stood, None).await.unwrap();
    push(&store, "a").await;
    care::backup(&stood, &root.join("copy")).await.unwrap();
    push(&store, "b").await;
    // As a killed agent leaves it: the newest builds are in the files beside.
    let left = root.join("left");
    copy(&stood, &left);
    drop(store);
    assert!(left.join("landfall.db-wal").metadata().unwrap().len() > 0);
    let (before, after) = (vec!["b".repeat(40), "a".repeat(40)], vec!["a".repeat(40)]);

    let mut killed = 0;
    for count in 1.. {
        let data = root.join("data");
        let _ = std::fs::remove_dir_all(&data);
        copy(&left, &data);
        if restore(root, Some(&format!("*:{count}"))).success() {
            break;
        }
        killed += 1;
        match commits(&data).await {
            Ok(commits) => assert_eq!(commits, after, "after step {count}"),
            Err(error) => assert!(
                format!("{error:#}").contains("was cut off: run it again"),
                "after step {count}: {error:#}"
            ),
        }
        assert!(restore(root, None).success(), "again after step {count}");
        assert_eq!(
            commits(&data).await.unwrap(),
            after,
            "again after step {count}"
        );
        care::check(&data).await.unwrap();
        let kept = aside(&data);
        assert_eq!(
            commits(&kept[0]).await.unwrap(),
            before,
            "after step {count}"
        );
    }
    assert!(killed > 6, "killed at {killed} steps");
}
