//! The image stage on the real engine and registry: what is built, pushed, refused, and ended in time.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use landfall::stages::{Built, StageError, image};

use crate::docker_world::{COMMIT, World, agent_error, base, docker, failed, processes, unique};
use crate::registry_proxy::RegistryProxy;
use crate::support;

const IMAGE: &str = "image: { name: sample }";

/// Of its own image each time: a test that removes what it made must not remove another's.
fn dockerfile(rest: &str) -> String {
    static MADE: AtomicUsize = AtomicUsize::new(0);
    let made = MADE.fetch_add(1, Ordering::Relaxed);
    let label = format!("LABEL it={}-{made}", std::process::id());
    format!("FROM {}\n{rest}\n{label}\n", base())
}

async fn digest_in_registry(built: &Built) -> String {
    let (host, name) = built.repository.split_once('/').unwrap();
    let url = format!("http://{host}/v2/{name}/manifests/{COMMIT}");
    let answer = reqwest::Client::new()
        .get(url)
        .header(
            "Accept",
            "application/vnd.docker.distribution.manifest.v2+json",
        )
        .send()
        .await
        .unwrap();
    answer.headers()["docker-content-digest"]
        .to_str()
        .unwrap()
        .to_owned()
}

#[tokio::test]
async fn an_image_is_built_pushed_and_known_by_the_registrys_digest() {
    let name = format!("good-{}", unique());
    let world = World::new("", "    build_args: { GREETING: hi }\n");
    // The name makes the step new in each run of the tests.
    let text = dockerfile(&format!(
        "ARG GREETING\nARG GIT_COMMIT\nCOPY greeting /greeting\nRUN echo \"$GREETING $GIT_COMMIT\" > /said && cat /greeting && : {name}",
    ));
    let checked_out = world.checked_out(
        &format!("image: {{ name: {name} }}"),
        &[("Dockerfile", &text), ("greeting", "salve\n")],
    );
    let built = image::run(&world.scope(), &checked_out).await.unwrap();
    assert_eq!(built.digest, digest_in_registry(&built).await);
    assert_eq!(
        built.config_digest,
        docker(&["inspect", "--format", "{{.Id}}", &built.tag])
    );
    assert_eq!(
        docker(&[
            "run",
            "--rm",
            "--network=none",
            &built.reference(),
            "cat",
            "/said"
        ]),
        format!("hi {COMMIT}")
    );
    let labels = docker(&["inspect", "--format", "{{json .Config.Labels}}", &built.tag]);
    for label in ["landfall.dev/environment", "landfall.dev/commit"] {
        assert!(labels.contains(label), "{labels}");
    }
    assert!(image::still_there(&world.scope(), &built).await);
    let gone = Built {
        digest: format!("sha256:{}", "0".repeat(64)),
        ..built.clone()
    };
    assert!(!image::still_there(&world.scope(), &gone).await);
    let log = world.log().await;
    assert!(
        log.contains("RUN echo") && log.contains(" salve\n") && log.contains(" done in "),
        "{log}"
    );
    assert!(log.contains(&built.reference()), "{log}");
    // The same commit again: nothing is run, and the log says so. A busy engine (20.10) once had forgotten what it had just built:
    // then another commit, and that again.
    let build = async |greeting: &str| {
        let world = World::new("", "    build_args: { GREETING: hi }\n");
        let checked_out = world.checked_out(
            &format!("image: {{ name: {name} }}"),
            &[("Dockerfile", &text), ("greeting", greeting)],
        );
        image::run(&world.scope(), &checked_out).await.unwrap();
        let log = world.log().await;
        let mut lines = log.lines();
        lines.any(|line| line.contains("RUN echo") && line.ends_with("CACHED"))
    };
    let mut is_cached = build("salve\n").await;
    if !is_cached {
        assert!(!build("ave\n").await, "another file is another step");
        is_cached = build("ave\n").await;
    }
    assert!(is_cached);
    docker(&["rmi", "-f", &built.tag]);
}

#[tokio::test]
async fn a_failing_step_is_named_with_its_exit_code_and_its_last_lines() {
    let world = World::new("", "");
    let text = dockerfile(&format!(
        "RUN echo first {}; echo last words >&2; exit 7",
        unique()
    ));
    let checked_out = world.checked_out(IMAGE, &[("Dockerfile", &text)]);
    let cause = failed(image::run(&world.scope(), &checked_out).await);
    assert_eq!(cause.id, "image_build_failed");
    assert!(
        cause.sentence.contains("RUN echo first") && cause.sentence.ends_with("exit code 7"),
        "{cause:?}"
    );
    assert_eq!(cause.object.as_deref(), Some("Dockerfile"));
    let log = world.log().await;
    assert!(
        log.contains(" last words\n") && log.contains("failed after"),
        "{log}"
    );
}

#[tokio::test]
async fn what_is_wrong_with_a_dockerfile_is_said_with_its_line() {
    let text = dockerfile("RUN true\nFRUM x");
    let world = World::new("", "");
    let checked_out = world.checked_out(IMAGE, &[("Dockerfile", &text)]);
    let cause = failed(image::run(&world.scope(), &checked_out).await);
    assert_eq!(cause.object.as_deref(), Some("Dockerfile:3"), "{cause:?}");
    assert!(cause.sentence.contains("FRUM"), "{cause:?}");
    for (text, words) in [("COPY nothing /x", "nothing"), ("# only a comment", "")] {
        let text = if words.is_empty() {
            text.to_owned()
        } else {
            dockerfile(text)
        };
        let checked_out = world.checked_out(IMAGE, &[("Dockerfile", &text)]);
        let cause = failed(image::run(&world.scope(), &checked_out).await);
        assert!(
            cause.id == "image_build_failed" && cause.sentence.contains(words),
            "{cause:?}"
        );
    }
    let checked_out = world.checked_out(
        "image: { name: sample, target: nowhere }",
        &[("Dockerfile", &dockerfile(""))],
    );
    let cause = failed(image::run(&world.scope(), &checked_out).await);
    assert!(cause.sentence.contains("nowhere"), "{cause:?}");
    let checked_out = world.checked_out(
        IMAGE,
        &[(
            "Dockerfile",
            "# syntax=evil.example/frontend:1\nFROM scratch\n",
        )],
    );
    assert_eq!(
        failed(image::run(&world.scope(), &checked_out).await).id,
        "frontend_not_allowed"
    );
}

#[tokio::test]
async fn a_base_image_that_cannot_be_had_is_named() {
    let world = World::new("", "    limits: { unreachable_seconds: 1 }\n");
    let missing = format!("{}/landfall-it/no-such-image:1", support::registry());
    let checked_out = world.checked_out(IMAGE, &[("Dockerfile", &format!("FROM {missing}\n"))]);
    let cause = failed(image::run(&world.scope(), &checked_out).await);
    assert!(cause.sentence.contains(&missing), "{cause:?}");
    // A registry that does not answer is nobody's commit's fault.
    let checked_out = world.checked_out(IMAGE, &[("Dockerfile", "FROM 127.0.0.1:1/acme/base:1\n")]);
    let error = agent_error(image::run(&world.scope(), &checked_out).await);
    assert!(
        error.contains("127.0.0.1:1/acme/base:1") && error.contains("away for 1 s"),
        "{error}"
    );
    assert!(world.log().await.contains("waiting for"));
}

#[tokio::test]
async fn canceling_ends_the_program_that_a_step_runs() {
    let world = World::new("", "");
    let program = format!("sleep 7531.{}", unique());
    let checked_out = world.checked_out(
        IMAGE,
        &[("Dockerfile", &dockerfile(&format!("RUN {program}")))],
    );
    let scope = world.scope();
    let watcher = async {
        support::eventually("the step runs", Duration::from_secs(60), async || {
            (processes(&program) > 0).then_some(())
        })
        .await;
        world.cancel.cancel();
        Instant::now()
    };
    let (result, canceled) = tokio::join!(image::run(&scope, &checked_out), watcher);
    assert!(matches!(result, Err(StageError::Canceled)), "{result:?}");
    assert!(canceled.elapsed() < Duration::from_secs(1));
    support::eventually("the program is gone", Duration::from_secs(2), async || {
        (processes(&program) == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_build_that_takes_too_long_is_ended() {
    let world = World::new("", "    limits: { build_timeout_seconds: 2 }\n");
    let program = format!("sleep 7532.{}", unique());
    let checked_out = world.checked_out(
        IMAGE,
        &[("Dockerfile", &dockerfile(&format!("RUN {program}")))],
    );
    let Err(StageError::TimedOut(cause)) = image::run(&world.scope(), &checked_out).await else {
        panic!("no time-out")
    };
    assert!(cause.sentence.contains("2 s"), "{cause:?}");
    support::eventually("the program is gone", Duration::from_secs(2), async || {
        (processes(&program) == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn bases_and_pushes_behind_a_registry_that_wants_a_token_work_and_the_login_is_never_seen() {
    let canary = format!("canary-{}-password", unique());
    let proxy = RegistryProxy::start("me", &canary).await;
    let world = World::new(
        "",
        &format!(
            "    image_prefix: {}/landfall-it\n    registry: {{ username: me, password: {canary} }}\n",
            proxy.host
        ),
    );
    let base = base().replace(&support::registry(), &proxy.host);
    let text = format!("FROM {base}\nRUN echo {}\n", unique());
    let checked_out = world.checked_out("image: { name: token }", &[("Dockerfile", &text)]);
    let built = image::run(&world.scope(), &checked_out)
        .await
        .unwrap_or_else(|error| panic!("{error:?}\n{}", world.so_far()));
    assert!(
        proxy.tokens() > 0,
        "the registry was never asked for a token"
    );
    assert!(image::still_there(&world.scope(), &built).await);
    assert!(!world.log().await.contains(&canary));
    docker(&["rmi", "-f", &built.tag]);
    // With another password: our error, with what to do, and without either password.
    let wrong = format!("wrong-{canary}");
    let world = World::new(
        "",
        &format!(
            "    image_prefix: {}/landfall-it\n    registry: {{ username: me, password: {wrong} }}\n",
            proxy.host
        ),
    );
    let checked_out =
        world.checked_out("image: { name: token }", &[("Dockerfile", &dockerfile(""))]);
    let error = agent_error(image::run(&world.scope(), &checked_out).await);
    assert!(
        error.contains(&proxy.host) && error.contains("agent.yaml"),
        "{error}"
    );
    assert!(
        !error.contains(&canary) && !world.log().await.contains(&canary),
        "{error}"
    );
}

#[tokio::test]
async fn a_login_is_taken_from_dockers_own_configuration() {
    use base64::Engine;
    let canary = format!("canary-{}-config", unique());
    let proxy = RegistryProxy::start("me", &canary).await;
    let folder = tempfile::tempdir().unwrap();
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("me:{canary}"));
    std::fs::write(
        folder.path().join("config.json"),
        format!(r#"{{"auths": {{"{}": {{"auth": "{auth}"}}}}}}"#, proxy.host),
    )
    .unwrap();
    let world = World::new(
        &format!("docker: {{ config_dir: {} }}\n", folder.path().display()),
        &format!("    image_prefix: {}/landfall-it\n", proxy.host),
    );
    let checked_out = world.checked_out(
        "image: { name: config }",
        &[("Dockerfile", &dockerfile(""))],
    );
    let built = image::run(&world.scope(), &checked_out)
        .await
        .unwrap_or_else(|error| panic!("{error:?}\n{}", world.so_far()));
    let log = world.log().await;
    assert!(!log.contains(&canary) && !log.contains(&auth), "{log}");
    docker(&["rmi", "-f", &built.tag]);
}

#[tokio::test]
async fn a_registry_that_is_away_is_waited_for_and_then_it_is_our_error() {
    let world = World::new(
        "",
        "    image_prefix: 127.0.0.1:1/acme\n    limits: { unreachable_seconds: 1 }\n",
    );
    let checked_out = world.checked_out(IMAGE, &[("Dockerfile", &dockerfile(""))]);
    let error = agent_error(image::run(&world.scope(), &checked_out).await);
    assert!(
        error.contains("registry 127.0.0.1:1 was away for 1 s"),
        "{error}"
    );
    assert!(
        world
            .log()
            .await
            .contains("waiting for registry 127.0.0.1:1, since 0 s")
    );
}

#[tokio::test]
async fn an_engine_that_is_away_is_waited_for_and_then_it_is_our_error() {
    let world = World::new(
        "docker: { host: 'unix:///nowhere/docker.sock' }\n",
        "    limits: { unreachable_seconds: 1 }\n",
    );
    let checked_out = world.checked_out(IMAGE, &[("Dockerfile", &dockerfile(""))]);
    let begun = Instant::now();
    let error = agent_error(image::run(&world.scope(), &checked_out).await);
    assert!(error.contains("Docker was away for 1 s"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(3));
    assert!(world.log().await.contains("waiting for Docker"));
}

/// A socket before Docker's that can be cut: open connections end, new ones are refused.
struct Cut {
    path: PathBuf,
    is_open: Arc<AtomicBool>,
    cut: tokio::sync::watch::Sender<()>,
}

impl Cut {
    fn start(folder: &std::path::Path) -> Self {
        let path = folder.join("docker.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let is_open = Arc::new(AtomicBool::new(true));
        let (cut, seen) = tokio::sync::watch::channel(());
        let open = is_open.clone();
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                if !open.load(Ordering::SeqCst) {
                    continue;
                }
                let mut seen = seen.clone();
                seen.mark_unchanged();
                tokio::spawn(async move {
                    let mut far = tokio::net::UnixStream::connect("/var/run/docker.sock")
                        .await
                        .unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = seen.changed() => {}
                    }
                });
            }
        });
        Self { path, is_open, cut }
    }
}

#[tokio::test]
async fn an_engine_that_goes_away_during_a_build_is_waited_for_and_the_build_is_done_again() {
    let folder = tempfile::tempdir().unwrap();
    let socket = Cut::start(folder.path());
    let world = World::new(
        &format!("docker: {{ host: 'unix://{}' }}\n", socket.path.display()),
        "    limits: { unreachable_seconds: 30 }\n",
    );
    let program = format!("sleep 3.{}", unique());
    let text = dockerfile(&format!("RUN {program}"));
    let checked_out = world.checked_out(
        &format!("image: {{ name: cut-{} }}", unique()),
        &[("Dockerfile", &text)],
    );
    let scope = world.scope();
    let cutter = async {
        support::eventually("the step runs", Duration::from_secs(60), async || {
            (processes(&program) > 0).then_some(())
        })
        .await;
        socket.is_open.store(false, Ordering::SeqCst);
        socket.cut.send(()).unwrap();
        support::eventually("it is waited for", Duration::from_secs(20), async || {
            world.so_far().contains("waiting for Docker").then_some(())
        })
        .await;
        socket.is_open.store(true, Ordering::SeqCst);
    };
    let (built, ()) = tokio::join!(image::run(&scope, &checked_out), cutter);
    let built = built.unwrap_or_else(|error| panic!("{error:?}\n{}", world.so_far()));
    docker(&["rmi", "-f", &built.tag]);
}
