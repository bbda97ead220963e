//! A running Landfall for tests: the real binary on a folder of its own, a git server that plays GitHub's, and a
//! repository to push to. It is killed when the test ends.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use sha2::Sha256;

use crate::git_server::GitServer;
use crate::support::{Namespace, agent_kubeconfig, busybox, eventually, registry, setting};

pub const BRANCH: &str = "main";
pub const ZERO: &str = "0000000000000000000000000000000000000000";
const SECRET: &str = "a webhook secret of more than 32 bytes";
/// A build of the small site takes a few seconds; machines are slow and shared.
pub const BUILD_LIMIT: Duration = Duration::from_secs(150);

pub struct Landfall {
    folder: tempfile::TempDir,
    pub namespace: Namespace,
    git: GitServer,
    agent: Option<Child>,
    port: u16,
    http: reqwest::Client,
    last: String,
    /// What the agent is given besides our own environment.
    variables: Vec<(String, String)>,
}

impl Landfall {
    /// A fresh repository with the small site, an environment of its own and a running agent.
    pub async fn start(name: &str) -> Self {
        Self::start_with(name, "").await
    }

    /// As `start`, with further lines of YAML for the environment, or a further environment.
    pub async fn start_with(name: &str, more: &str) -> Self {
        let site = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hello");
        let copy = format!("cp -r {} \"$0\"", site.display());
        let more = format!("    build_args: {{ BASE: \"{}\" }}\n{more}", busybox());
        Self::assemble(Namespace::new(name), &copy, &more).await
    }

    /// The sample itself, as this checkout has it, in the namespace that its manifests name.
    pub async fn start_sample() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let copy = format!(
            "mkdir \"$0\" && cd {} && git ls-files -z --cached --others --exclude-standard | \
             tar --null --ignore-failed-read -T - -c | tar -C \"$0\" -x",
            root.display()
        );
        let image = setting("LANDFALL_TEST_RUST_IMAGE");
        let more = match image.as_str() {
            "" => String::new(),
            image => format!("    build_args: {{ RUST_IMAGE: \"{image}\" }}\n"),
        };
        Self::assemble(Namespace::anew("hello-axum"), &copy, &more).await
    }

    /// `copy` is a line of shell that fills the folder `$0`.
    async fn assemble(namespace: Namespace, copy: &str, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let bare = folder.path().join("hello.git");
        git(
            folder.path(),
            &["init", "-q", "--bare", "-b", BRANCH, bare.to_str().unwrap()],
        );
        git(&bare, &["config", "http.receivepack", "true"]);
        let server = GitServer::start(folder.path(), ([127, 0, 0, 1], 0).into(), None)
            .await
            .unwrap();
        let work = folder.path().join("work");
        let filled = Command::new("bash").args(["-ec", copy]).arg(&work).status();
        assert!(filled.unwrap().success());
        git(&work, &["init", "-q", "-b", BRANCH]);
        let mut landfall = Self {
            port: free_port(),
            // The agent closes a connection that is quiet for 10 s.
            http: reqwest::Client::builder()
                .no_proxy()
                .pool_idle_timeout(Duration::from_secs(5))
                .build()
                .unwrap(),
            agent: None,
            git: server,
            last: ZERO.to_owned(),
            variables: Vec::new(),
            folder,
            namespace,
        };
        landfall.configure(more);
        landfall.run().await;
        landfall
    }

    fn configure(&self, more: &str) {
        let kubeconfig = agent_kubeconfig(&self.namespace.0);
        fs::write(self.path("agent.kubeconfig"), kubeconfig).unwrap();
        let config = format!(
            "listen: 127.0.0.1:{port}\ndata_dir: data\nenvironments:\n  - name: hello\n    repository: acme/hello\n    branch: {BRANCH}\n    \
             clone_url: {url}\n    webhook_secrets: [{SECRET}]\n    kubeconfig: agent.kubeconfig\n    namespace: {namespace}\n    \
             image_prefix: {registry}/{namespace}\n{more}",
            port = self.port,
            url = self.git.url("hello.git"),
            namespace = self.namespace.0,
            registry = registry(),
        );
        fs::write(self.path("agent.yaml"), config).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_landfall"));
        command.args(arguments).current_dir(self.folder.path());
        command
    }

    /// Runs a command of ours to its end; its exit code, and what it printed.
    pub fn run_command(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let mut command = self.command(&[arguments, &["--config", "agent.yaml"]].concat());
        let output = command.output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }

    fn spawn(&mut self, variables: &[(&str, &str)]) {
        let log = crate::support::log_file(&self.path("agent.log"));
        let child = self
            .command(&["serve", "--config", "agent.yaml"])
            .envs(self.variables.clone())
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.agent = Some(child);
    }

    /// Starts an agent that these variables may end at any moment.
    pub fn run_doomed(&mut self, variables: &[(&str, &str)]) {
        self.spawn(variables);
    }

    pub fn lives(&mut self) -> bool {
        let agent = self.agent.as_mut().expect("the agent was started");
        agent.try_wait().unwrap().is_none()
    }

    /// Waits until the agent has died by itself; one that lives on is killed. Which of the two it was.
    pub async fn dies_within(&mut self, limit: Duration) -> bool {
        let begun = std::time::Instant::now();
        while self.lives() && begun.elapsed() < limit {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let died = !self.lives();
        self.kill();
        died
    }

    /// At which fail points agents have ended so far.
    pub fn fail_points(&self) -> Vec<String> {
        let log = fs::read_to_string(self.path("agent.log")).unwrap();
        let named = |line: &str| line.strip_prefix("ended at fail point ").map(str::to_owned);
        log.lines().filter_map(named).collect()
    }

    /// SIGTERM; it may still be there.
    pub fn ask_to_stop(&self) {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").arg(pid).status().unwrap().success());
    }

    pub fn pid(&self) -> u32 {
        self.agent.as_ref().expect("the agent runs").id()
    }

    /// The agent's anonymous memory: what it holds now less its binary, which in a debug build is large, and the system's to keep.
    pub fn anonymous_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("RssAnon:"))
            .unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib * 1024
    }

    /// Starts the agent and waits until it is ready.
    pub async fn run(&mut self) {
        self.spawn(&[]);
        self.is_ready().await;
    }

    pub async fn is_ready(&self) {
        let ready = self.url("/readyz");
        eventually("the agent is ready", Duration::from_secs(20), async || {
            self.http
                .get(&ready)
                .send()
                .await
                .ok()
                .filter(|answer| answer.status().is_success())
                .map(drop)
        })
        .await;
    }

    /// Ends the agent and starts it with a changed agent.yaml and further variables.
    pub async fn restart(&mut self, from: &str, to: &str, variables: &[(&str, &str)]) {
        self.terminate();
        let config = fs::read_to_string(self.path("agent.yaml")).unwrap();
        assert!(config.contains(from), "{config}");
        fs::write(self.path("agent.yaml"), config.replace(from, to)).unwrap();
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        self.variables = variables.iter().map(owned).collect();
        self.run().await;
    }

    /// Where the repository is served.
    pub fn git_url(&self) -> String {
        self.git.url("hello.git")
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let mut agent = self.agent.take().expect("the agent runs");
        agent.kill().unwrap();
        agent.wait().unwrap();
    }

    /// SIGTERM, and how long it took to end.
    pub fn terminate(&mut self) -> Duration {
        self.ask_to_stop();
        let mut agent = self.agent.take().expect("the agent runs");
        let begun = std::time::Instant::now();
        agent.wait().unwrap();
        begun.elapsed()
    }

    /// Writes files, commits them and pushes the branch to the git server. Tells the commit; GitHub's delivery is extra.
    pub fn commit(&mut self, files: &[(&str, &str)]) -> String {
        let work = self.path("work");
        for (path, text) in files {
            let path = work.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        git(&work, &["add", "-A"]);
        git(
            &work,
            &[
                "commit",
                "-q",
                "--allow-empty",
                "-m",
                "Change the site <b>& more",
            ],
        );
        git(
            &work,
            &["push", "-q", "--force", &self.git.url("hello.git"), BRANCH],
        );
        git(&work, &["rev-parse", "HEAD"])
    }

    /// Makes the git server send its own deliveries, as the demo's does: a `git push` is then all that is needed.
    pub fn hook(&self) {
        let bare = self.path("hello.git");
        fs::write(self.path("webhook-secret"), SECRET).unwrap();
        let settings = [
            ("landfall.url", self.url("/webhook")),
            (
                "landfall.secretfile",
                self.path("webhook-secret").display().to_string(),
            ),
            ("landfall.repository", "acme/hello".to_owned()),
            ("landfall.page", self.url("")),
        ];
        for (key, value) in settings {
            git(&bare, &["config", key, &value]);
        }
        let hook = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dev/post-receive");
        std::os::unix::fs::symlink(hook, bare.join("hooks/post-receive")).unwrap();
    }

    /// Commits and pushes to a server with a hook; what the hook said to the author.
    pub fn push_to_hook(&self, files: &[(&str, &str)]) -> String {
        let work = self.path("work");
        for (path, text) in files {
            fs::write(work.join(path), text).unwrap();
        }
        git(&work, &["add", "-A"]);
        git(
            &work,
            &["commit", "-q", "--allow-empty", "-m", "Change the greeting"],
        );
        let output = Command::new("git")
            .args(["push", &self.git.url("hello.git"), BRANCH])
            .current_dir(&work)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        said
    }

    /// The push delivery that GitHub would send for this commit on top of the last one.
    pub fn payload(&self, after: &str) -> Value {
        push_payload(
            "acme/hello",
            &format!("refs/heads/{BRANCH}"),
            &self.last,
            after,
        )
    }

    /// Commits, pushes, delivers; the number of the build.
    pub async fn push(&mut self, files: &[(&str, &str)]) -> i64 {
        let after = self.commit(files);
        let payload = self.payload(&after);
        self.last = after;
        let (status, answer) = self.deliver(&payload).await;
        assert_eq!(status, 202, "{answer}");
        answer["builds"][0]["build"].as_i64().unwrap()
    }

    /// Moves the branch back to a commit that was pushed before, and delivers that.
    pub async fn push_again(&mut self, commit: &str) -> i64 {
        let work = self.path("work");
        git(&work, &["reset", "-q", "--hard", commit]);
        git(
            &work,
            &["push", "-q", "--force", &self.git.url("hello.git"), BRANCH],
        );
        let payload = self.payload(commit);
        commit.clone_into(&mut self.last);
        let (status, answer) = self.deliver(&payload).await;
        assert_eq!(status, 202, "{answer}");
        answer["builds"][0]["build"].as_i64().unwrap()
    }

    /// Signed and sent as GitHub does.
    pub async fn deliver(&self, payload: &Value) -> (u16, Value) {
        let body = payload.to_string();
        self.post(
            "push",
            &[("x-hub-signature-256", &sign(SECRET, body.as_bytes()))],
            body.into_bytes(),
        )
        .await
    }

    /// As `deliver`; None where nobody answers.
    pub async fn try_deliver(&self, payload: &Value) -> Option<(u16, Value)> {
        try_deliver(&self.http, &self.url("/webhook"), payload).await
    }

    pub async fn post(&self, event: &str, headers: &[(&str, &str)], body: Vec<u8>) -> (u16, Value) {
        let mut request = self
            .http
            .post(self.url("/webhook"))
            .header("x-github-event", event)
            .header("x-github-delivery", "d-1");
        if !headers.iter().any(|(name, _)| *name == "content-type") {
            request = request.header("content-type", "application/json");
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let answer = request.body(body).send().await.unwrap();
        (
            answer.status().as_u16(),
            answer.json().await.unwrap_or(Value::Null),
        )
    }

    /// A request that nobody has sent yet, without the token.
    pub fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, self.url(path))
    }

    pub async fn get(&self, path: &str) -> Value {
        let answer = self.http.get(self.url(path)).send().await.unwrap();
        assert!(
            answer.status().is_success(),
            "GET {path}: {}",
            answer.status()
        );
        answer.json().await.unwrap()
    }

    pub async fn text(&self, path: &str) -> String {
        self.http
            .get(self.url(path))
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap()
    }

    /// A write, with the admin token.
    pub async fn write(&self, path: &str, body: Value) -> (u16, Value) {
        let answer = self.try_write(path, &body).await;
        answer.expect("the agent answers")
    }

    /// As `write`; None where nobody answers.
    pub async fn try_write(&self, path: &str, body: &Value) -> Option<(u16, Value)> {
        let token = fs::read_to_string(self.path("data/admin-token")).unwrap();
        let request = self.http.post(self.url(path)).bearer_auth(token.trim());
        let answer = request.json(body).send().await.ok()?;
        let status = answer.status().as_u16();
        Some((status, answer.json().await.unwrap_or(Value::Null)))
    }

    pub async fn build(&self, id: i64) -> Value {
        self.get(&format!("/api/builds/{id}")).await
    }

    /// Waits until a build is in a stage; the build where it is already past it.
    pub async fn reach(&self, id: i64, stage: &str) -> Value {
        eventually(
            &format!("build {id} reaches {stage}"),
            BUILD_LIMIT,
            async || {
                let build = self.build(id).await;
                let begun = build["stages"]
                    .as_array()?
                    .iter()
                    .any(|row| row["stage"] == stage);
                (begun || is_terminal(&build)).then_some(build)
            },
        )
        .await
    }

    /// Waits until a build has ended.
    pub async fn end(&self, id: i64) -> Value {
        let build = eventually(&format!("build {id} ends"), BUILD_LIMIT, async || {
            let build = self.build(id).await;
            is_terminal(&build).then_some(build)
        })
        .await;
        if build["status"] == "errored" {
            println!(
                "--- log of build {id}\n{}",
                self.text(&format!("/api/builds/{id}/log")).await
            );
        }
        build
    }

    /// How it ended, which is live.
    pub async fn goes_live(&self, id: i64) -> Value {
        let build = self.end(id).await;
        let log = self.log(id).await;
        assert_eq!(build["outcome"], "live", "{build:#}\n{log}");
        build
    }

    pub async fn log(&self, id: i64) -> String {
        self.text(&format!("/api/builds/{id}/log")).await
    }

    /// What the site serves inside the cluster.
    pub fn served(&self, path: &str) -> String {
        let service = format!(
            "/api/v1/namespaces/{}/services/hello:80/proxy{path}",
            self.namespace.0
        );
        crate::support::api("GET", &service, None).unwrap()
    }
}

impl Drop for Landfall {
    fn drop(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        if std::thread::panicking() {
            println!(
                "--- the agent's log\n{}",
                fs::read_to_string(self.path("agent.log")).unwrap_or_default()
            );
        }
    }
}

pub fn is_terminal(build: &Value) -> bool {
    !matches!(build["status"].as_str(), Some("queued" | "running"))
}

pub fn push_payload(repository: &str, reference: &str, before: &str, after: &str) -> Value {
    json!({
        "ref": reference, "before": before, "after": after, "created": false, "deleted": false, "forced": false,
        "repository": { "id": 1, "full_name": repository, "clone_url": "http://127.0.0.1:1/never-contacted.git" },
        "pusher": { "name": "mona", "email": "mona@example.org" },
        "head_commit": { "id": after, "message": "Change the site <b>& more\n\nBody" },
    })
}

pub fn sign(secret: &str, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(body);
    format!("sha256={}", hex::encode(mac.finalize().into_bytes()))
}

/// Status and answer of a signed push; None where nobody answers.
pub async fn try_deliver(
    http: &reqwest::Client,
    url: &str,
    payload: &Value,
) -> Option<(u16, Value)> {
    let body = payload.to_string();
    let request = http
        .post(url)
        .header("x-github-event", "push")
        .header("x-hub-signature-256", sign(SECRET, body.as_bytes()))
        .header("content-type", "application/json");
    let answer = request.body(body).send().await.ok()?;
    let status = answer.status().as_u16();
    Some((status, answer.json().await.ok()?))
}

/// Every build of an agent, page after page.
pub async fn all_builds(url: &str) -> Vec<Value> {
    let mut builds = Vec::new();
    let mut before = String::new();
    loop {
        let page = reqwest::get(format!("{url}/api/builds?limit=200{before}"));
        let page: Value = page.await.unwrap().json().await.unwrap();
        builds.extend(page["builds"].as_array().unwrap().iter().cloned());
        match page["next"].as_i64() {
            Some(next) => before = format!("&before={next}"),
            None => return builds,
        }
    }
}

pub fn secret() -> &'static str {
    SECRET
}

pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

fn git(folder: &Path, arguments: &[&str]) -> String {
    let output = Command::new("git")
        .args(["-c", "user.name=Mona", "-c", "user.email=mona@example.org"])
        .args(arguments)
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "git {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
