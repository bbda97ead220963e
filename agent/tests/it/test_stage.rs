//! The test stage on the real engine: what a test may do, what it cannot, and that nothing of it stays.

use std::process::Command;
use std::time::{Duration, Instant};

use landfall::stages::{Built, StageError, StageResult, Tested, test};

use crate::docker_world::{World, agent_error, base, failed, processes, unique};
use crate::support;

fn built() -> Built {
    Built {
        repository: String::new(),
        tag: String::new(),
        digest: String::new(),
        config_digest: String::new(),
    }
}

/// A pipeline with one test that runs in busybox.
fn pipeline(name: &str, run: &str, more: &str) -> String {
    let run = serde_json::Value::from(run);
    format!(
        "image: {{ name: sample }}\ntest:\n  - {{ name: {name}, image: '{}', run: {run}{more} }}",
        base()
    )
}

async fn run(world: &World, pipeline: &str) -> StageResult<Tested> {
    let checked_out = world.checked_out(pipeline, &[]);
    let result = test::run(&world.scope(), &checked_out, &built()).await;
    assert_eq!(containers(world), "", "a container was left");
    result
}

fn containers(world: &World) -> String {
    let label = format!("label=landfall.dev/build={}", world.build.id);
    let output = Command::new("docker")
        .args(["ps", "-aq", "--filter", &label])
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn output_comes_byte_for_byte_and_a_passed_test_is_counted() {
    let world = World::new("", "");
    let script = r"printf '10%%\r100%%\n\377\376\000end'; printf 'no newline'";
    let tested = run(&world, &pipeline("odd", script, "")).await.unwrap();
    assert_eq!(tested.passed.len(), 1);
    assert_eq!(tested.passed[0].0, "odd");
    let bytes = world.bytes().await;
    let wanted = b"10%\r100%\n\xff\xfe\0endno newline";
    assert!(
        bytes.windows(wanted.len()).any(|window| window == wanted),
        "{}",
        String::from_utf8_lossy(&bytes)
    );
}

#[tokio::test]
async fn a_red_test_names_itself_and_the_tests_that_failed() {
    let world = World::new("", "");
    let script =
        "echo 'test a::fine ... ok'; echo 'test store::a_push_is_kept ... FAILED'; exit 101";
    let cause = failed(run(&world, &pipeline("unit tests", script, "")).await);
    assert_eq!(cause.id, "tests_failed");
    assert!(
        cause.sentence.contains("\"unit tests\"")
            && cause.sentence.contains("101")
            && cause.sentence.contains("store::a_push_is_kept"),
        "{cause:?}"
    );
    assert!(!cause.sentence.contains("a::fine"));
}

#[tokio::test]
async fn a_test_has_no_network_no_rights_and_only_its_limits() {
    let world = World::new(
        "",
        "    limits: { test_memory_bytes: 67108864, test_processes: 32, test_cpus: 64 }\n",
    );
    // It asks for a network, which the operator did not allow.
    let script = "ls /sys/class/net; grep -E 'Cap(Eff|Prm|Bnd)|NoNewPrivs' /proc/self/status; echo x > /root-is-writable && cat /root-is-writable; mount | grep -c docker.sock";
    let result = run(&world, &pipeline("walls", script, ", network: true")).await;
    assert!(
        failed(result).sentence.contains("exit code 1"),
        "docker.sock is mounted"
    );
    let log = world.log().await;
    assert!(log.contains("\nlo\n") && !log.contains("eth0"), "{log}");
    for line in [
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "\nx\n",
        "does not allow",
    ] {
        assert!(log.contains(line), "{line:?} is missing: {log}");
    }
    let world = World::new("", "    limits: { test_network: true }\n");
    run(
        &world,
        &pipeline("net", "ls /sys/class/net", ", network: true"),
    )
    .await
    .unwrap();
    assert!(world.log().await.contains("eth0"));
}

#[tokio::test]
async fn a_container_is_made_with_exactly_what_it_may_have() {
    let world = World::new(
        "",
        "    limits: { test_memory_bytes: 67108864, test_processes: 32 }\n",
    );
    let checked_out = world.checked_out(&pipeline("held", "sleep 600", ""), &[]);
    let scope = world.scope();
    let looker = async {
        let id = support::eventually("the container runs", Duration::from_secs(30), async || {
            Some(containers(&world)).filter(|ids| !ids.is_empty())
        })
        .await;
        let output = Command::new("docker")
            .args(["inspect", id.trim()])
            .output()
            .unwrap();
        world.cancel.cancel();
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()[0].clone()
    };
    let made_of = built();
    let (result, container) = tokio::join!(test::run(&scope, &checked_out, &made_of), looker);
    assert!(matches!(result, Err(StageError::Canceled)), "{result:?}");
    let host = &container["HostConfig"];
    assert_eq!(
        container["Name"],
        format!(
            "/landfall-{}-{}-1",
            world.build.id,
            test::owner(world.folder.path())
        )
    );
    assert_eq!(
        (
            host["Memory"].as_i64(),
            host["MemorySwap"].as_i64(),
            host["PidsLimit"].as_i64()
        ),
        (Some(67_108_864), Some(67_108_864), Some(32))
    );
    assert_eq!(host["CapDrop"], serde_json::json!(["ALL"]));
    assert_eq!(
        host["SecurityOpt"],
        serde_json::json!(["no-new-privileges"])
    );
    assert_eq!(
        (host["NetworkMode"].as_str(), host["Privileged"].as_bool()),
        (Some("none"), Some(false))
    );
    for (key, empty) in [
        ("Binds", "null"),
        ("CapAdd", "null"),
        ("Devices", "null"),
        ("PidMode", "\"\""),
        ("UTSMode", "\"\""),
        ("VolumesFrom", "null"),
    ] {
        let value = host[key].to_string();
        assert!(value == empty || value == "[]", "{key} is {value}");
    }
    assert_eq!(container["Mounts"], serde_json::json!([]));
}

#[tokio::test]
async fn a_test_that_takes_too_long_is_killed() {
    let world = World::new("", "    limits: { test_timeout_seconds: 1 }\n");
    let program = format!("sleep 7533.{}", unique());
    let begun = Instant::now();
    let Err(StageError::TimedOut(cause)) = run(&world, &pipeline("slow", &program, "")).await
    else {
        panic!("no time-out")
    };
    assert!(
        cause.sentence.contains("slow") && cause.sentence.contains("1 s"),
        "{cause:?}"
    );
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert_eq!(processes(&program), 0);
}

#[tokio::test]
async fn canceling_ends_a_test_within_two_seconds() {
    let world = World::new("", "");
    let program = format!("sleep 7534.{}", unique());
    let checked_out = world.checked_out(
        &pipeline("long", &format!("trap '' TERM INT; {program}; true"), ""),
        &[],
    );
    let scope = world.scope();
    let watcher = async {
        support::eventually("the test runs", Duration::from_secs(30), async || {
            (processes(&program) > 0).then_some(())
        })
        .await;
        world.cancel.cancel();
        Instant::now()
    };
    let made_of = built();
    let (result, canceled) = tokio::join!(test::run(&scope, &checked_out, &made_of), watcher);
    assert!(matches!(result, Err(StageError::Canceled)), "{result:?}");
    assert!(
        canceled.elapsed() < Duration::from_secs(2),
        "{:?}",
        canceled.elapsed()
    );
    assert_eq!((processes(&program), containers(&world).as_str()), (0, ""));
}

#[tokio::test]
async fn running_out_of_memory_fails_even_where_the_exit_code_is_0() {
    let world = World::new("", "    limits: { test_memory_bytes: 33554432 }\n");
    let script = "(tail /dev/zero); echo went on; exit 0";
    let cause = failed(run(&world, &pipeline("hungry", script, "")).await);
    assert_eq!(cause.id, "tests_failed");
    assert!(
        cause.sentence.contains("ran out of memory") && cause.sentence.contains("32 MiB"),
        "{cause:?}"
    );
    assert!(world.log().await.contains("went on"));
}

#[tokio::test]
async fn a_fork_bomb_meets_its_limit() {
    let world = World::new(
        "",
        "    limits: { test_processes: 16, test_timeout_seconds: 60 }\n",
    );
    let script =
        "i=0; while [ $i -lt 64 ]; do sleep 30 & i=$((i+1)); done; echo all of them; exit 0";
    let cause = failed(run(&world, &pipeline("bomb", script, "")).await);
    assert!(!world.log().await.contains("all of them"), "{cause:?}");
}

#[tokio::test]
async fn a_stage_of_the_dockerfile_is_built_tested_and_its_tag_removed() {
    let world = World::new("", "");
    let name = format!("staged-{}", unique());
    let text = format!(
        "FROM {} AS test\nUSER 1234\nCOPY data /data\nFROM scratch\nCOPY nothing /\n",
        base()
    );
    let checked_out = world.checked_out(
        &format!("image: {{ name: {name} }}\ntest:\n  - {{ name: one, target: test, run: 'cat /data; id -u' }}\n  - {{ name: two, target: test, run: 'exit 3' }}"),
        &[("Dockerfile", &text), ("data", "the data\n")],
    );
    let cause = failed(test::run(&world.scope(), &checked_out, &built()).await);
    assert!(
        cause.sentence.contains("\"two\"") && cause.sentence.contains('3'),
        "{cause:?}"
    );
    let log = world.log().await;
    assert!(log.contains("the data\n1234\n"), "{log}");
    let output = Command::new("docker")
        .args(["images", "-q", &format!("landfall-test/{name}")])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
}

#[tokio::test]
async fn a_test_that_cannot_begin_says_why() {
    let world = World::new("", "    limits: { unreachable_seconds: 1 }\n");
    let text = "FROM scratch\nCOPY data /data\n";
    let checked_out = world.checked_out(
        "image: { name: sample }\ntest:\n  - { name: bare, target: bare, run: 'true' }",
        &[
            ("Dockerfile", &text.replace("scratch", "scratch AS bare")),
            ("data", "x"),
        ],
    );
    let cause = failed(test::run(&world.scope(), &checked_out, &built()).await);
    assert!(cause.sentence.contains("/bin/sh"), "{cause:?}");
    let missing = format!("{}/landfall-it/no-such-image:1", support::registry());
    let lacking = pipeline("lacking", "true", "").replace(&base(), &missing);
    let cause = failed(run(&world, &lacking).await);
    assert!(cause.sentence.contains(&missing), "{cause:?}");
    let away = pipeline("away", "true", "").replace(&base(), "127.0.0.1:1/acme/test:1");
    let error = agent_error(run(&world, &away).await);
    assert!(error.contains("127.0.0.1:1"), "{error}");
}

#[tokio::test]
async fn what_a_killed_agent_left_is_swept_and_does_not_stop_the_next_attempt() {
    let world = World::new("", "");
    let owner = test::owner(world.folder.path());
    let name = format!("landfall-{}-{owner}-1", world.build.id);
    let (build, owner) = (
        format!("landfall.dev/build={}", world.build.id),
        format!("landfall.dev/owner={owner}"),
    );
    let leave = || {
        let started = Command::new("docker")
            .args([
                "run",
                "-d",
                "--name",
                &name,
                "--network=none",
                "--label",
                &build,
                "--label",
                &owner,
                &base(),
                "sleep",
                "600",
            ])
            .output()
            .unwrap();
        assert!(started.status.success(), "{started:?}");
    };
    leave();
    let own = test::owner(world.folder.path());
    let docker = &world.config.docker;
    let left_of_ours = async || {
        let mut left = test::left(docker).await.unwrap();
        left.retain(|left| left.owner == own);
        left
    };
    let left = left_of_ours().await;
    assert_eq!(left.len(), 1, "{left:?}");
    test::remove_left(docker, &left).await.unwrap();
    assert_eq!(containers(&world), "");
    assert_eq!(left_of_ours().await, []);
    leave();
    run(&world, &pipeline("again", "true", "")).await.unwrap();
}
