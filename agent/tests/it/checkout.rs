//! Checkout against a real git server, a real sshd, and servers that misbehave.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use landfall::build_log::{BuildLog, Masker};
use landfall::builds::{Build, Cause, Stage};
use landfall::config::{Config, Docker, Environment};
use landfall::stages::checkout::{self, Checkout};
use landfall::stages::{CheckedOut, Scope, StageError, StageResult};
use tokio_util::sync::CancellationToken;

use crate::git_server::GitServer;
use crate::git_world::{PIPELINE, World, git};
use crate::support::{self, eventually};

pub const EXE: &str = env!("CARGO_BIN_EXE_landfall");
const CANARY: &str = "ghp_CanaryCanaryCanary0123456789";

/// agent.yaml's environment for a clone URL, with more lines (indented by four) where a test needs them.
pub fn environment(url: &str, more: &str) -> Environment {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.yaml");
    let text = format!(
        "environments:\n  - name: hello\n    repository: acme/hello\n    branch: main\n    clone_url: {url}\n    webhook_secrets: [0123456789abcdef0123456789abcdef]\n    namespace: hello\n    image_prefix: localhost:5002\n{more}"
    );
    std::fs::write(&path, text).unwrap();
    Config::load_with(&path, &|_| None)
        .unwrap()
        .environments
        .remove(0)
}

/// Limits so short that a server which is away is given up soon.
const IMPATIENT: &str = "    limits: { unreachable_seconds: 1 }\n";

/// What one checkout did.
pub struct Seen {
    result: StageResult<Checkout>,
    log: String,
}

impl Seen {
    pub fn ready(self) -> CheckedOut {
        match self.result {
            Ok(Checkout::Ready(checked_out)) => checked_out,
            other => panic!("{other:?}\n{}", self.log),
        }
    }

    fn cause(self) -> Cause {
        match self.result {
            Err(StageError::Failed(cause)) => cause,
            other => panic!("{other:?}\n{}", self.log),
        }
    }

    pub fn agent_error(self) -> String {
        match self.result {
            Err(StageError::Agent(error)) => format!("{error:#}"),
            other => panic!("{other:?}\n{}", self.log),
        }
    }
}

/// Mirrors and work folders of one agent.
pub struct Agent {
    folder: tempfile::TempDir,
    cancel: CancellationToken,
}

impl Agent {
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            cancel: CancellationToken::new(),
        }
    }

    fn mirrors(&self) -> PathBuf {
        self.folder.path().join("mirrors")
    }

    /// The one mirror that there is.
    fn mirror(&self) -> PathBuf {
        let entries = std::fs::read_dir(self.mirrors()).unwrap();
        let mut mirrors = entries.map(|entry| entry.unwrap().path());
        mirrors
            .find(|path| path.extension().is_some_and(|end| end == "git"))
            .unwrap()
    }

    fn work(&self, branch: &str, commit: &str) -> PathBuf {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let mut hasher = DefaultHasher::new();
        (branch, commit).hash(&mut hasher);
        self.folder
            .path()
            .join(format!("work-{:x}", hasher.finish()))
    }

    pub async fn checkout(&self, environment: &Environment, commit: &str) -> Seen {
        self.checkout_of(environment, "main", commit, None).await
    }

    async fn checkout_of(
        &self,
        environment: &Environment,
        branch: &str,
        commit: &str,
        deployed: Option<&str>,
    ) -> Seen {
        let work = self.work(branch, commit);
        let newer: Vec<String> = deployed.into_iter().map(str::to_owned).collect();
        let log = BuildLog::new(Masker::default(), 1 << 20, 0);
        let build = build(branch, commit);
        let docker = Docker::default();
        let stage_log = log.stage(Stage::Checkout);
        let scope = Scope {
            build: &build,
            environment,
            docker: &docker,
            mirrors: &self.mirrors(),
            work: &work,
            log: &stage_log,
            cancel: &self.cancel,
        };
        let result = checkout::run(&scope, Path::new(EXE), &newer).await;
        log.close();
        let mut bytes = Vec::new();
        while let Some(lines) = log.drain().await {
            lines
                .iter()
                .for_each(|line| bytes.extend_from_slice(&line.bytes));
        }
        Seen {
            result,
            log: String::from_utf8_lossy(&bytes).into_owned(),
        }
    }

    /// The processes that run git for this agent.
    fn children(&self) -> Vec<PathBuf> {
        let home = self.mirrors().join("homes");
        let processes = std::fs::read_dir("/proc")
            .unwrap()
            .flatten()
            .map(|entry| entry.path());
        processes
            .filter(|process| {
                std::fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(&home))
            })
            .collect()
    }
}

fn build(branch: &str, commit: &str) -> Build {
    Build {
        branch: branch.to_owned(),
        commit: commit.to_owned(),
        stage: Some(Stage::Checkout),
        ..support::build()
    }
}

async fn served(world: &World) -> GitServer {
    GitServer::start(&world.served(), ([127, 0, 0, 1], 0).into(), None)
        .await
        .unwrap()
}

#[tokio::test]
async fn a_checkout_is_whole_and_the_next_fetch_brings_only_what_is_new() {
    use std::os::unix::fs::PermissionsExt;
    let world = World::new();
    for n in 0..30 {
        world.write(&format!("many/{n}.txt"), &format!("{n}\n").repeat(100));
    }
    world.write("run.sh", "#!/bin/sh\n");
    std::fs::set_permissions(
        world.work().join("run.sh"),
        PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    std::os::unix::fs::symlink("many/1.txt", world.work().join("link")).unwrap();
    let first = world.commit("First \x1b[31mred");
    world.push("main");
    let server = served(&world).await;
    let (agent, environment) = (Agent::new(), environment(&server.url("hello.git"), ""));

    let seen = agent.checkout(&environment, &first).await;
    assert!(
        seen.log.contains("cloning for the first time"),
        "{}",
        seen.log
    );
    assert!(!seen.log.contains('\x1b'), "{}", seen.log);
    let done = seen.ready();
    assert_eq!(
        (done.author.as_str(), done.title.as_str()),
        ("Ada", "First  [31mred")
    );
    assert_eq!(done.commit_time, 1_700_000_000);
    let mode = |path: PathBuf| path.symlink_metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(done.tree.clone()), 0o700);
    assert_eq!(mode(done.tree.join("run.sh")), 0o755);
    assert_eq!(mode(done.tree.join("many/3.txt")), 0o644);
    assert_eq!(
        std::fs::read(done.tree.join("link")).unwrap(),
        "1\n".repeat(100).as_bytes()
    );
    assert!(!done.tree.join(".git").exists());
    assert_eq!(done.pipeline.image.name, "hello-axum");

    world.write("new.txt", "new");
    let second = world.commit("Second");
    world.push("main");
    let seen = agent.checkout(&environment, &second).await;
    assert!(seen.log.contains("received 3 objects"), "{}", seen.log);
    assert!(!seen.log.contains("first time"), "{}", seen.log);
    assert!(seen.ready().tree.join("new.txt").exists());
}

#[tokio::test]
async fn a_token_opens_the_repository_and_is_seen_nowhere() {
    let world = World::new();
    let commit = world.commit("First");
    world.push("main");
    let loopback = ([127, 0, 0, 1], 0).into();
    let server = GitServer::start(&world.served(), loopback, Some(CANARY))
        .await
        .unwrap();
    let url = server.url("hello.git");
    let agent = Agent::new();

    let without = agent
        .checkout(&environment(&url, ""), &commit)
        .await
        .agent_error();
    assert!(without.contains("clone_token"), "{without}");
    let wrong = environment(&url, "    clone_token: ghp_WrongWrongWrong\n");
    let seen = agent.checkout(&wrong, &commit).await;
    assert!(!seen.log.contains("ghp_Wrong"), "{}", seen.log);
    let error = seen.agent_error();
    assert!(error.contains("does not accept `clone_token`"), "{error}");
    assert!(!error.contains("ghp_Wrong"), "{error}");

    let right = environment(&url, &format!("    clone_token: {CANARY}\n"));
    let seen = agent.checkout(&right, &commit).await;
    assert!(!seen.log.contains(CANARY), "{}", seen.log);
    seen.ready();
    let found = std::process::Command::new("grep")
        .args(["-r", CANARY])
        .arg(agent.folder.path())
        .output()
        .unwrap();
    assert!(
        found.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&found.stdout)
    );
}

#[tokio::test]
async fn the_token_is_in_no_process_list_and_a_silent_server_ends_at_the_deadline() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/x.git", silent.local_addr().unwrap());
    let limits = format!("    clone_token: {CANARY}\n    limits: {{ clone_timeout_seconds: 2 }}\n");
    let (agent, environment) = (Agent::new(), environment(&url, &limits));
    let commit = "1".repeat(40);
    let begun = Instant::now();
    let looking = async {
        let _connection = silent.accept().await.unwrap();
        let child = eventually("a git process", Duration::from_secs(2), async || {
            agent.children().pop()
        })
        .await;
        let read = |name: &str| {
            String::from_utf8_lossy(&std::fs::read(child.join(name)).unwrap()).into_owned()
        };
        let (line, variables) = (read("cmdline"), read("environ"));
        assert_eq!(line, "landfall\0__git\0");
        assert!(
            !variables.contains("ghp_") && variables.contains("HOME="),
            "{variables}"
        );
        let _ = futures_util::future::pending::<()>().await;
    };
    let seen = tokio::select! {
        seen = agent.checkout(&environment, &commit) => seen,
        () = looking => unreachable!(),
    };
    let Err(StageError::TimedOut(cause)) = &seen.result else {
        panic!("{:?}", seen.result)
    };
    assert_eq!(cause.id, "time_out");
    assert!(
        begun.elapsed() < Duration::from_secs(4),
        "{:?}",
        begun.elapsed()
    );
    no_children(&agent).await;
}

async fn no_children(agent: &Agent) {
    eventually("no git process", Duration::from_secs(2), async || {
        agent.children().is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_git_process_ends_when_the_agent_does() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mirror = folder.path().join("x.git");
    let request = serde_json::json!({
        "url": format!("http://{}/x.git", silent.local_addr().unwrap()), "token": null, "ssh_key": null,
        "mirror": mirror, "branch": "main", "job": "head", "bytes_max": 1 << 30, "seconds_max": 60,
    });
    let mut child = tokio::process::Command::new(EXE)
        .arg("__git")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let text = format!("{request}\n");
    tokio::io::AsyncWriteExt::write_all(&mut stdin, text.as_bytes())
        .await
        .unwrap();
    let _connection = silent.accept().await.unwrap();
    assert!(child.try_wait().unwrap().is_none());
    drop(stdin);
    let ended = tokio::time::timeout(Duration::from_secs(2), child.wait()).await;
    assert_eq!(ended.unwrap().unwrap().code(), Some(1));
}

#[tokio::test]
async fn a_canceled_checkout_ends_at_once_with_its_process() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/x.git", silent.local_addr().unwrap());
    let (agent, environment) = (Agent::new(), environment(&url, ""));
    let commit = "1".repeat(40);
    let cancel = async {
        let connection = silent.accept().await.unwrap();
        agent.cancel.cancel();
        (connection, Instant::now())
    };
    let (seen, (_connection, at)) = tokio::join!(agent.checkout(&environment, &commit), cancel);
    assert!(
        matches!(seen.result, Err(StageError::Canceled)),
        "{:?}",
        seen.result
    );
    assert!(at.elapsed() < Duration::from_secs(2));
    no_children(&agent).await;
}

#[tokio::test]
async fn a_server_that_is_away_is_waited_for_and_then_named() {
    let world = World::new();
    let commit = world.commit("First");
    world.push("main");
    let server = served(&world).await;
    let agent = Agent::new();
    let url = server.url("hello.git");

    server.answer_only(503);
    let patient = environment(&url, "    limits: { unreachable_seconds: 20 }\n");
    let back = async {
        eventually("two tries", Duration::from_secs(10), async || {
            (server.requests() >= 2).then_some(())
        })
        .await;
        server.answer_only(0);
    };
    let (seen, ()) = tokio::join!(agent.checkout(&patient, &commit), back);
    assert!(
        seen.log.contains(&format!("waiting for {url} since 0 s")),
        "{}",
        seen.log
    );
    seen.ready();

    drop(server);
    let agent = Agent::new();
    let begun = Instant::now();
    let error = agent
        .checkout(&environment(&url, IMPATIENT), &commit)
        .await
        .agent_error();
    assert!(
        error.contains("cannot reach") && error.contains(&url),
        "{error}"
    );
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );

    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mute = environment(
        &format!("http://{}/x.git", silent.local_addr().unwrap()),
        IMPATIENT,
    );
    let error = agent.checkout(&mute, &commit).await.agent_error();
    assert!(error.contains("said nothing for 1 s"), "{error}");
    no_children(&agent).await;
}

#[tokio::test]
async fn what_the_operator_must_mend_is_said_at_once() {
    let world = World::new();
    let commit = world.commit("First");
    world.push("main");
    let server = served(&world).await;
    let agent = Agent::new();
    let begun = Instant::now();
    let here = environment(&server.url("hello.git"), "");
    let error = agent
        .checkout_of(&here, "release", &commit, None)
        .await
        .agent_error();
    assert!(error.contains("has no branch \"release\""), "{error}");
    let nowhere = environment(&server.url("nothing.git"), "");
    let error = agent.checkout(&nowhere, &commit).await.agent_error();
    assert!(error.contains("is not there: check `clone_url`"), "{error}");
    server.answer_only(403);
    let error = agent.checkout(&here, &commit).await.agent_error();
    assert!(error.contains("403"), "{error}");
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test]
async fn a_commit_that_was_pushed_away_is_gone() {
    let world = World::new();
    world.commit("First");
    world.write("x", "1");
    let lost = world.commit("Lost");
    world.push("main");
    let server = served(&world).await;
    let (agent, environment) = (Agent::new(), environment(&server.url("hello.git"), ""));
    agent.checkout(&environment, &lost).await.ready();

    git(&world.work(), &["reset", "-q", "--hard", "HEAD~1"]);
    world.write("x", "2");
    let other = world.commit("Other");
    world.push("main");
    // The mirror knows the commit, and another agent's does not: neither builds it.
    for agent in [&agent, &Agent::new()] {
        std::fs::remove_dir_all(agent.work("main", &lost)).ok();
        let cause = agent.checkout(&environment, &lost).await.cause();
        assert_eq!(cause.id, "commit_gone");
        assert!(cause.sentence.contains(&lost[..12]), "{cause:?}");
        assert!(cause.hint.unwrap().contains(&other[..12]));
    }
}

#[tokio::test]
async fn a_hostile_branch_name_is_only_ever_text() {
    let world = World::new();
    let commit = world.commit("First");
    let long = "ü".repeat(120);
    let names = [
        "a;touch${IFS}pwned",
        "$(id)",
        "--upload-pack=touch",
        "-oProxyCommand=id",
        "a|b&c'd\"e",
        "\u{202e}evil",
        &long,
    ];
    for name in names {
        world.push(name);
    }
    let server = served(&world).await;
    let (agent, environment) = (Agent::new(), environment(&server.url("hello.git"), ""));
    for name in names {
        agent
            .checkout_of(&environment, name, &commit, None)
            .await
            .ready();
    }
    let too_long = "é".repeat(127) + "x";
    for name in [
        "a b",
        "../../x",
        "main:refs/heads/y",
        "*",
        "a\nb",
        "",
        "@{0}",
        &too_long,
        "HEAD",
    ] {
        let error = agent
            .checkout_of(&environment, name, &commit, None)
            .await
            .agent_error();
        assert!(error.contains("has no branch"), "{name:?}: {error}");
    }
    assert!(!Path::new("pwned").exists());
}

#[tokio::test]
async fn a_branch_may_become_a_folder_of_branches() {
    let world = World::new();
    let commit = world.commit("First");
    world.push("a");
    let server = served(&world).await;
    let (agent, environment) = (Agent::new(), environment(&server.url("hello.git"), ""));
    agent
        .checkout_of(&environment, "a", &commit, None)
        .await
        .ready();
    git(&world.bare(), &["update-ref", "-d", "refs/heads/a"]);
    world.push("a/b");
    agent
        .checkout_of(&environment, "a/b", &commit, None)
        .await
        .ready();
}

#[tokio::test]
async fn what_would_leave_the_tree_is_refused_by_name() {
    let world = World::new();
    world.commit("First");
    let blob = git(&world.work(), &["rev-parse", "HEAD:pipeline.yaml"]);
    let tree_of = |lines: &str| world.git_with_input(&["mktree", "--missing"], lines);
    let passwd = world.git_with_input(&["hash-object", "-w", "--stdin"], "/etc/passwd");
    let up = world.git_with_input(&["hash-object", "-w", "--stdin"], "../../etc/passwd");
    let inner = tree_of(&format!("120000 blob {up}\tup\n"));
    let cases = [
        (
            "secrets",
            tree_of(&format!("120000 blob {passwd}\tsecrets\n")),
        ),
        ("k8s/up", tree_of(&format!("040000 tree {inner}\tk8s\n"))),
        (".git", tree_of(&format!("100644 blob {blob}\t.git\n"))),
        ("..", tree_of(&format!("040000 tree {inner}\t..\n"))),
        (".GIT/up", tree_of(&format!("040000 tree {inner}\t.GIT\n"))),
    ];
    let server = served(&world).await;
    let (agent, environment) = (Agent::new(), environment(&server.url("hello.git"), ""));
    for (name, tree) in cases {
        let commit = git(&world.work(), &["commit-tree", "-m", "hostile", &tree]);
        git(
            &world.work(),
            &[
                "push",
                "-q",
                "-f",
                world.bare().to_str().unwrap(),
                &format!("{commit}:refs/heads/main"),
            ],
        );
        let seen = agent.checkout(&environment, &commit).await;
        assert!(!seen.log.contains("root:"), "{}", seen.log);
        let cause = seen.cause();
        assert_eq!(cause.id, "unsafe_path", "{cause:?}");
        let first = name.split('/').next().unwrap();
        assert!(cause.sentence.contains(first), "{name}: {cause:?}");
        assert!(!cause.sentence.contains("root:"), "{cause:?}");
    }
    let folders: Vec<_> = std::fs::read_dir(agent.folder.path()).unwrap().collect();
    assert!(
        folders
            .iter()
            .flatten()
            .all(|entry| !entry.path().join("up").exists())
    );
}

#[tokio::test]
async fn a_file_or_a_repository_too_large_is_refused() {
    let world = World::new();
    world.write("data/zeros.bin", &"\0".repeat(3 << 20));
    let zeros = world.commit("Ten megabytes in ten kilobytes");
    world.push("main");
    let server = served(&world).await;
    let small = environment(
        &server.url("hello.git"),
        "    limits: { clone_bytes: 1000000 }\n",
    );
    let agent = Agent::new();
    let cause = agent.checkout(&small, &zeros).await.cause();
    assert_eq!(
        (cause.id.as_str(), cause.object.as_deref()),
        ("too_large", Some("data/zeros.bin"))
    );
    assert_eq!(
        std::fs::read_dir(agent.work("main", &zeros))
            .unwrap()
            .count(),
        0
    );

    std::fs::remove_file(world.work().join("data/zeros.bin")).unwrap();
    let noise: String = (0u64..400_000)
        .map(|n| format!("{:x}", n.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
        .collect();
    world.write("noise", &noise);
    let large = world.commit("Noise");
    world.push("main");
    let cause = agent.checkout(&small, &large).await.cause();
    assert_eq!(cause.id, "too_large");
    assert!(cause.sentence.contains("repository"), "{cause:?}");
    let left = std::fs::read_dir(agent.mirror().join("objects/pack")).unwrap();
    let bytes: u64 = left
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    assert!(bytes < 3_000_000, "{bytes}");
}

#[tokio::test]
async fn a_redirect_to_another_host_is_never_followed() {
    let world = World::new();
    let commit = world.commit("First");
    let hits = Arc::new(AtomicUsize::new(0));
    let canary = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let elsewhere = format!(
        "http://localhost:{}/hello.git",
        canary.local_addr().unwrap().port()
    );
    let counted = hits.clone();
    tokio::spawn(async move {
        while canary.accept().await.is_ok() {
            counted.fetch_add(1, Ordering::SeqCst);
        }
    });
    let redirecting = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/hello.git", redirecting.local_addr().unwrap());
    let routes = axum::Router::new().fallback(move |uri: axum::http::Uri| async move {
        let rest = uri.to_string().replace("/hello.git", "");
        (
            axum::http::StatusCode::FOUND,
            [("location", format!("{elsewhere}{rest}"))],
        )
    });
    tokio::spawn(async move { axum::serve(redirecting, routes).await });
    let agent = Agent::new();
    let here = environment(&url, &format!("    clone_token: {CANARY}\n"));
    let error = agent.checkout(&here, &commit).await.agent_error();
    assert!(
        error.contains("redirect") && error.contains("clone_url"),
        "{error}"
    );
    let error = checkout::branch_head(&here, Path::new(EXE), &agent.mirrors())
        .await
        .unwrap_err();
    assert!(format!("{error:#}").contains("redirect"), "{error:#}");
    assert_eq!(hits.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_pipeline_with_a_typo_is_shown_with_its_caret() {
    let world = World::new();
    world.write("pipeline.yaml", &PIPELINE.replace("manifests", "manifest"));
    let typo = world.commit("Typo");
    world.push("main");
    let server = served(&world).await;
    let (agent, here) = (Agent::new(), environment(&server.url("hello.git"), ""));
    let seen = agent.checkout(&here, &typo).await;
    let log = seen.log.clone();
    assert!(
        log.contains("| ") && log.contains('^') && log.contains("did you mean `manifests`"),
        "{log}"
    );
    let cause = seen.cause();
    assert_eq!(
        (cause.id.as_str(), cause.object.as_deref()),
        ("pipeline_invalid", Some("pipeline.yaml:4"))
    );

    std::fs::remove_file(world.work().join("pipeline.yaml")).unwrap();
    std::os::unix::fs::symlink("other.yaml", world.work().join("pipeline.yaml")).unwrap();
    world.write("other.yaml", PIPELINE);
    let link = world.commit("A link");
    world.push("main");
    assert_eq!(
        agent.checkout(&here, &link).await.cause().id,
        "pipeline_invalid"
    );

    git(&world.work(), &["rm", "-q", "pipeline.yaml"]);
    let missing = world.commit("None");
    world.push("main");
    let cause = agent.checkout(&here, &missing).await.cause();
    assert_eq!(cause.id, "pipeline_missing");
    assert!(cause.hint.is_some());
}

#[tokio::test]
async fn a_commit_older_than_what_is_deployed_is_stale_unless_it_is_the_head() {
    let world = World::new();
    let old = world.commit("Old");
    world.write("x", "1");
    let live = world.commit("Live");
    world.write("x", "2");
    let head = world.commit("Head");
    world.push("main");
    let server = served(&world).await;
    let (agent, environment) = (Agent::new(), environment(&server.url("hello.git"), ""));
    let deployed = Some(live.as_str());
    let seen = agent
        .checkout_of(&environment, "main", &old, deployed)
        .await;
    let Ok(Checkout::Stale { head: said }) = &seen.result else {
        panic!("{:?}", seen.result)
    };
    assert_eq!(said, &head);
    agent
        .checkout_of(&environment, "main", &head, deployed)
        .await
        .ready();
    let unknown = "f".repeat(40);
    agent
        .checkout_of(&environment, "main", &live, Some(&unknown))
        .await
        .ready();
    // The branch itself went back.
    git(&world.work(), &["reset", "-q", "--hard", &old]);
    world.push("main");
    agent
        .checkout_of(&environment, "main", &old, deployed)
        .await
        .ready();
}

#[tokio::test]
async fn a_finished_checkout_is_used_again_and_a_damaged_one_is_not() {
    let world = World::new();
    let commit = world.commit("First");
    world.push("main");
    let server = served(&world).await;
    let (agent, environment) = (Agent::new(), environment(&server.url("hello.git"), ""));
    let baton = agent.checkout(&environment, &commit).await.ready();
    assert!(checkout::still_there(&baton));
    let before = server.requests();
    assert_eq!(agent.checkout(&environment, &commit).await.ready(), baton);
    assert_eq!(server.requests(), before);
    // What a kill in the middle leaves: half a tree, no marker.
    std::fs::remove_file(baton.tree.with_extension("json")).unwrap();
    std::fs::remove_file(baton.tree.join("pipeline.yaml")).unwrap();
    std::fs::create_dir(baton.tree.with_extension("half")).unwrap();
    assert!(!checkout::still_there(&baton));
    assert_eq!(agent.checkout(&environment, &commit).await.ready(), baton);
    assert!(baton.tree.join("pipeline.yaml").exists());
}

#[tokio::test]
async fn a_broken_mirror_is_cloned_anew() {
    let world = World::new();
    let first = world.commit("First");
    world.push("main");
    let server = served(&world).await;
    let (agent, environment) = (Agent::new(), environment(&server.url("hello.git"), ""));
    agent.checkout(&environment, &first).await.ready();
    for damage in ["objects/pack", "HEAD", "config"] {
        let place = agent.mirror().join(damage);
        if place.is_dir() {
            for entry in std::fs::read_dir(&place).unwrap().flatten() {
                std::fs::remove_file(entry.path()).unwrap();
                std::fs::write(entry.path(), "garbage").unwrap();
            }
        } else if damage == "HEAD" {
            std::fs::remove_file(&place).unwrap();
        } else {
            std::fs::write(&place, "[garbage\0").unwrap();
        }
        world.write("x", damage);
        let next = world.commit("Next");
        world.push("main");
        let seen = agent.checkout(&environment, &next).await;
        assert!(
            seen.log.contains("cloning it anew"),
            "{damage}: {}",
            seen.log
        );
        seen.ready();
    }
}

#[tokio::test]
async fn what_a_killed_process_left_in_the_mirror_does_not_hinder_the_next() {
    let world = World::new();
    let first = world.commit("First");
    world.push("main");
    let server = served(&world).await;
    let (agent, environment) = (Agent::new(), environment(&server.url("hello.git"), ""));
    agent.checkout(&environment, &first).await.ready();
    let mirror = agent.mirror();
    let reference = std::fs::read_dir(mirror.join("refs/landfall"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    std::fs::write(format!("{}.lock", reference.display()), "").unwrap();
    std::fs::write(mirror.join("config.lock"), "").unwrap();
    std::fs::write(mirror.join("objects/pack/pack_git2_abcdef"), "half").unwrap();
    world.write("x", "1");
    let next = world.commit("Next");
    world.push("main");
    let seen = agent.checkout(&environment, &next).await;
    assert!(!seen.log.contains("anew"), "{}", seen.log);
    seen.ready();
    assert!(!mirror.join("objects/pack/pack_git2_abcdef").exists());
}

#[tokio::test]
async fn two_builds_share_one_mirror_without_hurting_each_other() {
    let world = World::new();
    let first = world.commit("First");
    world.write("x", "1");
    let second = world.commit("Second");
    world.push("main");
    let server = served(&world).await;
    let (agent, environment) = (Agent::new(), environment(&server.url("hello.git"), ""));
    let (one, two) = tokio::join!(
        agent.checkout(&environment, &first),
        agent.checkout(&environment, &second)
    );
    assert!(!one.ready().tree.join("x").exists());
    assert!(two.ready().tree.join("x").exists());
}

#[tokio::test]
async fn submodules_stay_out_and_lfs_pointers_are_warned_of() {
    let world = World::new();
    world.write(
        "model.bin",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    );
    world.write(
        ".gitmodules",
        "[submodule \"x\"]\n\tpath = sub\n\turl = http://127.0.0.1:1/evil\n",
    );
    let zero = "1".repeat(40);
    git(
        &world.work(),
        &[
            "update-index",
            "--add",
            "--cacheinfo",
            &format!("160000,{zero},sub"),
        ],
    );
    git(
        &world.work(),
        &["add", "pipeline.yaml", "model.bin", ".gitmodules"],
    );
    git(&world.work(), &["commit", "-q", "-m", "Both"]);
    let commit = git(&world.work(), &["rev-parse", "HEAD"]);
    world.push("main");
    let server = served(&world).await;
    let (agent, environment) = (Agent::new(), environment(&server.url("hello.git"), ""));
    let seen = agent.checkout(&environment, &commit).await;
    assert!(
        seen.log
            .contains("warning: \"model.bin\" is a Git LFS pointer"),
        "{}",
        seen.log
    );
    assert!(
        seen.log.contains("warning: \"sub\" is a submodule"),
        "{}",
        seen.log
    );
    assert_eq!(
        std::fs::read_dir(seen.ready().tree.join("sub"))
            .unwrap()
            .count(),
        0
    );
}

#[tokio::test]
async fn the_head_of_the_branch_is_told_and_that_there_is_none() {
    let world = World::new();
    let head = world.commit("Head");
    world.push("main");
    let server = served(&world).await;
    let (agent, here) = (Agent::new(), environment(&server.url("hello.git"), ""));
    let (exe, mirrors) = (Path::new(EXE), agent.mirrors());
    assert_eq!(
        checkout::branch_head(&here, exe, &mirrors).await.unwrap(),
        Some(head)
    );
    git(&world.bare(), &["update-ref", "-d", "refs/heads/main"]);
    assert_eq!(
        checkout::branch_head(&here, exe, &mirrors).await.unwrap(),
        None
    );
}
