//! `landfall restore`, killed at each of its steps and run again.

use std::path::{Path, PathBuf};
use std::process::Command;

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

fn restore(root: &Path, backup: &str, fail_point: Option<&str>) -> bool {
    let mut restore = Command::new(env!("CARGO_BIN_EXE_landfall"));
    restore
        .args(["restore", backup, "--config", "agent.yaml"])
        .current_dir(root);
    if let Some(fail_point) = fail_point {
        restore.env("LANDFALL_FAIL_POINT", fail_point);
    }
    restore.output().unwrap().status.success()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// What was moved aside, less the folder of a restore of long ago.
fn aside(data: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(data).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let is_aside = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("before-restore-") && name != OF_LONG_AGO
    };
    let mut aside: Vec<PathBuf> = paths.filter(is_aside).collect();
    aside.sort();
    aside
}

/// Behind all others by its name.
const OF_LONG_AGO: &str = "before-restore-keep";

#[tokio::test]
async fn a_restore_that_is_killed_at_any_step_is_gone_to_its_end_by_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let config = "environments:\n  - name: hello\n    repository: acme/hello\n    branch: main\n    clone_url: https://github.com/x/y\n    \
                  webhook_secrets: [0123456789abcdef0123456789abcdef]\n    namespace: hello\n    image_prefix: localhost:5001\n";
    std::fs::write(root.join("agent.yaml"), format!("data_dir: data\n{config}")).unwrap();
    let stood = root.join("stood");
    let store = Store::open(&stood, None).await.unwrap();
    push(&store, "a").await;
    care::backup(&stood, &root.join("one")).await.unwrap();
    push(&store, "b").await;
    care::backup(&stood, &root.join("two")).await.unwrap();
    push(&store, "c").await;
    // As a killed agent leaves it: the newest builds are in the files beside.
    let left = root.join("left");
    copy(&stood, &left);
    drop(store);
    assert!(left.join("landfall.db-wal").metadata().unwrap().len() > 0);
    let of = |names: &[&str]| -> Vec<String> { names.iter().map(|name| name.repeat(40)).collect() };
    let before = of(&["c", "b", "a"]);
    let data = root.join("data");

    for (stands, again, after) in [
        (true, "one", of(&["a"])),
        (true, "two", of(&["b", "a"])),
        (false, "one", of(&["a"])),
    ] {
        let mut killed = 0;
        for count in 1.. {
            let told = format!("stands: {stands}, then {again}, after step {count}");
            let _ = std::fs::remove_dir_all(&data);
            if stands {
                copy(&left, &data);
                copy(&left, &data.join(OF_LONG_AGO));
            }
            if restore(root, "one", Some(&format!("*:{count}"))) {
                break;
            }
            killed += 1;
            // Looking makes a store where there is none.
            let found = match stands {
                true => Some(commits(&data).await),
                false => None,
            };
            let is_done = match &found {
                Some(Ok(found)) => {
                    assert!(
                        *found == before || *found == of(&["a"]),
                        "{told}: {found:?}"
                    );
                    *found != before
                }
                Some(Err(error)) => {
                    let error = format!("{error:#}");
                    let is_told = error.contains("was cut off: run it again");
                    assert!(is_told, "{told}: {error}");
                    false
                }
                None => !data.join("restoring").exists() && data.join("landfall.db").exists(),
            };
            // What stood there is a backup too, once it is whole; before that it is none.
            if stands && !is_done {
                let kept = aside(&data).pop().unwrap_or_default();
                let is_whole = kept.join("landfall.db").exists();
                let back = restore(root, kept.to_str().unwrap(), None);
                assert!(back == is_whole || kept.as_os_str().is_empty(), "{told}");
                if back {
                    assert_eq!(commits(&data).await.unwrap(), before, "{told}");
                }
            }
            assert!(restore(root, again, None), "{told}");
            assert_eq!(commits(&data).await.unwrap(), after, "{told}");
            care::check(&data).await.unwrap();
            let kept = aside(&data);
            match stands {
                true => assert_eq!(commits(&kept[0]).await.unwrap(), before, "{told}"),
                false => assert_eq!(!kept.is_empty(), is_done, "{told}: {kept:?}"),
            }
        }
        assert!(killed > 12, "killed at {killed} steps");
    }
}
