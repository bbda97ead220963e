//! A real PostgreSQL of one test's own, on a folder and a port of its own. It is ended with the test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::landfall::free_port;

pub struct Postgres {
    server: Child,
    port: u16,
    folder: tempfile::TempDir,
}

impl Postgres {
    pub async fn start() -> Self {
        let folder = tempfile::Builder::new()
            .prefix("landfall-postgres-")
            .tempdir()
            .unwrap();
        let data = folder.path().join("data");
        if rustix::process::getuid().is_root() {
            let mut owned = Command::new("chown");
            owned.arg("postgres").arg(folder.path());
            assert!(owned.status().unwrap().success());
        }
        let mut init = as_postgres("initdb");
        init.args(["--auth=trust", "--username=landfall", "--no-sync", "-D"]);
        let made = init.arg(&data).output().unwrap();
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let port = free_port();
        let server = Self::run(folder.path(), port);
        let mut postgres = Self {
            server,
            port,
            folder,
        };
        postgres.wait().await;
        postgres
    }

    pub fn url(&self) -> String {
        format!("postgres://landfall@127.0.0.1:{}/postgres", self.port)
    }

    /// Runs statements in the agents' own database.
    pub fn sql(&self, statements: &str) {
        let mut psql = Command::new(program("psql"));
        psql.args([
            "-q",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            &self.url(),
            "-c",
            statements,
        ]);
        let output = psql.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
    }

    /// Ends it at once, as a crash does, and starts it again after a while.
    pub async fn crash(&mut self, away: Duration) {
        // PostgreSQL's own children end with it.
        self.server.kill().unwrap();
        self.server.wait().unwrap();
        tokio::time::sleep(away).await;
        let _ = std::fs::remove_file(self.folder.path().join("data/postmaster.pid"));
        self.server = Self::run(self.folder.path(), self.port);
        self.wait().await;
    }

    fn run(folder: &Path, port: u16) -> Child {
        let log = crate::support::log_file(&folder.join("log"));
        as_postgres("postgres")
            .arg("-D")
            .arg(folder.join("data"))
            .args(["-p", &port.to_string(), "-c", "max_connections=200", "-k"])
            .arg(folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    async fn wait(&mut self) {
        let port = self.port.to_string();
        let is_ready = || {
            let asked = Command::new(program("pg_isready"))
                .args(["-q", "-h", "127.0.0.1", "-p", &port])
                .status();
            asked.unwrap().success().then_some(())
        };
        crate::support::eventually("PostgreSQL is ready", Duration::from_secs(60), async || {
            is_ready()
        })
        .await;
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.folder.path().join("log"));
            println!("--- PostgreSQL's log\n{}", log.unwrap_or_default());
        }
    }
}

/// It refuses to run as root.
fn as_postgres(name: &str) -> Command {
    if !rustix::process::getuid().is_root() {
        return Command::new(program(name));
    }
    let mut command = Command::new("setpriv");
    command
        .args([
            "--reuid=postgres",
            "--regid=postgres",
            "--clear-groups",
            "--",
        ])
        .arg(program(name))
        .current_dir("/");
    command
}

/// Of the newest version that the distribution has put on this machine; else by PATH.
fn program(name: &str) -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql");
    let mut found: Vec<PathBuf> = versions
        .into_iter()
        .flatten()
        .flatten()
        .map(|version| version.path().join("bin").join(name))
        .filter(|program| program.exists())
        .collect();
    found.sort();
    found.pop().unwrap_or_else(|| PathBuf::from(name))
}
