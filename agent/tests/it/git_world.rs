//! A repository to push from and the bare one that is served, made by the real git.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub const PIPELINE: &str = "image:\n  name: hello-axum\ndeploy:\n  manifests: [kubernetes/]\n";

/// `work` with a first pipeline.yaml, and `served/hello.git`.
pub struct World {
    folder: tempfile::TempDir,
}

impl World {
    pub fn new() -> Self {
        let world = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        std::fs::create_dir_all(world.served()).unwrap();
        let path = |path: PathBuf| path.to_str().unwrap().to_owned();
        git(
            world.folder.path(),
            &["init", "-q", "--bare", "-b", "main", &path(world.bare())],
        );
        git(
            world.folder.path(),
            &["init", "-q", "-b", "main", &path(world.work())],
        );
        world.write("pipeline.yaml", PIPELINE);
        world
    }

    pub fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    pub fn served(&self) -> PathBuf {
        self.folder.path().join("served")
    }

    pub fn bare(&self) -> PathBuf {
        self.served().join("hello.git")
    }

    pub fn write(&self, path: &str, text: &str) {
        let path = self.work().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// Commits everything and returns the id.
    pub fn commit(&self, message: &str) -> String {
        git(&self.work(), &["add", "-A"]);
        git(
            &self.work(),
            &["commit", "-q", "--allow-empty", "-m", message],
        );
        git(&self.work(), &["rev-parse", "HEAD"])
    }

    /// Makes HEAD the branch's head, by force.
    pub fn push(&self, branch: &str) {
        let to = format!("+HEAD:refs/heads/{branch}");
        git(
            &self.work(),
            &["push", "-q", self.bare().to_str().unwrap(), &to],
        );
    }

    pub fn git_with_input(&self, arguments: &[&str], input: &str) -> String {
        let mut child = command(&self.work())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "git {arguments:?}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

/// git as Ada, who has no settings of her own, always at the same second.
pub fn command(folder: &Path) -> Command {
    let mut command = Command::new("git");
    command
        .current_dir(folder)
        .env("HOME", folder)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_TERMINAL_PROMPT", "0");
    for who in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{who}_NAME"), "Ada");
        command.env(format!("GIT_{who}_EMAIL"), "ada@example.org");
        command.env(format!("GIT_{who}_DATE"), "1700000000 +0000");
    }
    command
}

pub fn git(folder: &Path, arguments: &[&str]) -> String {
    let output = command(folder).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "git {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
