//! What the tests of image and test stage share: a scope on the real engine and registry, a tree, and the log as it grows.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use landfall::build_log::{BuildLog, Masker, StageLog};
use landfall::builds::{Build, Cause, Stage};
use landfall::config::Config;
use landfall::pipeline;
use landfall::stages::{CheckedOut, Scope, StageError, StageResult};
use tokio_util::sync::CancellationToken;

use crate::support;

pub use crate::support::COMMIT;

pub struct World {
    pub config: Config,
    pub build: Build,
    pub cancel: CancellationToken,
    pub folder: tempfile::TempDir,
    log: BuildLog,
    stage_log: StageLog,
    text: Arc<Mutex<Vec<u8>>>,
}

impl World {
    /// `agent` is put at the front of agent.yaml, `environment` into its environment (indented by four).
    pub fn new(agent: &str, environment: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let prefix = match environment.contains("image_prefix") {
            true => String::new(),
            false => format!("    image_prefix: {}/landfall-it\n", support::registry()),
        };
        let yaml = format!(
            "{agent}environments:\n  - name: hello\n    repository: acme/hello\n    branch: main\n    clone_url: https://github.com/acme/hello\n    webhook_secrets: [0123456789abcdef0123456789abcdef]\n    namespace: hello\n{prefix}{environment}"
        );
        let path = folder.path().join("agent.yaml");
        std::fs::write(&path, &yaml).unwrap();
        let config =
            Config::load_with(&path, &|_| None).unwrap_or_else(|error| panic!("{yaml}: {error:#}"));
        let log = BuildLog::new(Masker::default(), 1 << 30, 0);
        let text = Arc::new(Mutex::new(Vec::new()));
        let (source, sink) = (log.clone(), text.clone());
        tokio::spawn(async move {
            while let Some(lines) = source.drain().await {
                lines
                    .iter()
                    .for_each(|line| sink.lock().unwrap().extend_from_slice(&line.bytes));
            }
        });
        Self {
            config,
            build: build(),
            cancel: CancellationToken::new(),
            stage_log: log.stage(Stage::Test),
            log,
            folder,
            text,
        }
    }

    pub fn scope(&self) -> Scope<'_> {
        Scope {
            build: &self.build,
            environment: &self.config.environments[0],
            docker: &self.config.docker,
            mirrors: self.folder.path(),
            work: self.folder.path(),
            log: &self.stage_log,
            cancel: &self.cancel,
        }
    }

    pub fn tree(&self) -> PathBuf {
        self.folder.path().join("tree")
    }

    /// Writes the files and reads pipeline.yaml, which begins with the given text.
    pub fn checked_out(&self, pipeline: &str, files: &[(&str, &str)]) -> CheckedOut {
        for (name, text) in files {
            write(&self.tree().join(name), text);
        }
        let text = format!("{pipeline}\ndeploy: {{ manifests: [kubernetes/] }}\n");
        CheckedOut {
            commit: COMMIT.to_owned(),
            commit_time: 1_700_000_000,
            title: "A commit".to_owned(),
            author: "somebody".to_owned(),
            tree: self.tree(),
            pipeline: pipeline::parse("pipeline.yaml", &text)
                .unwrap_or_else(|problem| panic!("{problem}")),
        }
    }

    /// The log up to now.
    pub fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap()).into_owned()
    }

    /// The whole log's bytes.
    pub async fn bytes(&self) -> Vec<u8> {
        // What was written before is drained before this.
        let mark = format!("end of log {}", self.build.id);
        self.stage_log.line(&mark);
        support::eventually("the log is drained", Duration::from_secs(10), async || {
            self.so_far().contains(&mark).then_some(())
        })
        .await;
        let bytes = self.text.lock().unwrap().clone();
        let end = bytes
            .windows(mark.len())
            .rposition(|window| window == mark.as_bytes())
            .unwrap();
        bytes[..end].to_vec()
    }

    pub async fn log(&self) -> String {
        String::from_utf8_lossy(&self.bytes().await).into_owned()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.log.close();
    }
}

pub fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
}

/// The test cluster's busybox with all its applets on PATH, in its registry, by digest.
pub fn base() -> String {
    static BASE: OnceLock<String> = OnceLock::new();
    BASE.get_or_init(|| {
        let tag = format!("{}/landfall-it/base:1", support::registry());
        let folder = tempfile::tempdir().unwrap();
        let text = format!(
            "FROM {}\nRUN [\"/bin/busybox\", \"mkdir\", \"-p\", \"/bin\", \"/sbin\", \"/usr/bin\", \"/usr/sbin\", \"/tmp\"]\nRUN [\"/bin/busybox\", \"--install\", \"-s\"]\n",
            support::busybox()
        );
        write(&folder.path().join("Dockerfile"), &text);
        docker(&["build", "-q", "-t", &tag, &folder.path().display().to_string()]);
        docker(&["push", &tag]);
        let digests = docker(&["inspect", "--format", "{{join .RepoDigests \"\\n\"}}", &tag]);
        let ours = digests.lines().find(|digest| digest.starts_with(&format!("{}/landfall-it/base@", support::registry())));
        ours.unwrap_or_else(|| panic!("no digest of {tag} in {digests}")).to_owned()
    })
    .clone()
}

/// Runs the docker command line; panics with what it said when it fails.
pub fn docker(arguments: &[&str]) -> String {
    let output = Command::new("docker").args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "docker {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A number that no other test on this machine has.
pub fn unique() -> i64 {
    static NEXT: AtomicI64 = AtomicI64::new(1);
    i64::from(std::process::id()) * 1000 + NEXT.fetch_add(1, Ordering::Relaxed)
}

pub fn build() -> Build {
    Build {
        id: unique(),
        by: "somebody".to_owned(),
        ..support::build()
    }
}

pub fn failed<T: std::fmt::Debug>(result: StageResult<T>) -> Cause {
    match result {
        Err(StageError::Failed(cause)) => cause,
        other => panic!("not a failure of the commit: {other:?}"),
    }
}

pub fn agent_error<T: std::fmt::Debug>(result: StageResult<T>) -> String {
    match result {
        Err(StageError::Agent(error)) => format!("{error:#}"),
        other => panic!("not our error: {other:?}"),
    }
}

/// The processes of this machine whose command line holds the text.
pub fn processes(text: &str) -> usize {
    let lines = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok());
    lines
        .filter(|line| {
            String::from_utf8_lossy(line)
                .replace('\0', " ")
                .contains(text)
        })
        .count()
}
