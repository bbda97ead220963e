//! The agent under systemd: its units are right, its socket is handed down, and it says when it is ready.

use std::fs;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crate::landfall::{ZERO, free_port, push_payload, try_deliver};
use crate::support::eventually;

const UNITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd");

#[test]
fn the_units_are_right_by_the_word_of_systemd() {
    let folder = tempfile::tempdir().unwrap();
    let service = fs::read_to_string(Path::new(UNITS).join("landfall.service")).unwrap();
    // It wants to see the program, and here it is elsewhere.
    let here = service.replace("/usr/local/bin/landfall", env!("CARGO_BIN_EXE_landfall"));
    assert_ne!(here, service);
    fs::write(folder.path().join("landfall.service"), here).unwrap();
    fs::copy(
        Path::new(UNITS).join("landfall.socket"),
        folder.path().join("landfall.socket"),
    )
    .unwrap();
    let judged = Command::new("systemd-analyze")
        .args([
            "verify",
            "--man=no",
            "./landfall.service",
            "./landfall.socket",
        ])
        .current_dir(folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&judged.stderr);
    let of_ours: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("landfall"))
        .collect();
    assert!(judged.status.success() && of_ours.is_empty(), "{said}");
}

#[tokio::test]
async fn a_socket_of_systemd_is_taken_and_readiness_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    fs::write(
        folder.path().join("agent.yaml"),
        crate::intake::agent_yaml(port),
    )
    .unwrap();
    let notify = folder.path().join("notify");
    let heard = UnixDatagram::bind(&notify).unwrap();
    heard.set_nonblocking(true).unwrap();
    let log = fs::File::create(folder.path().join("log")).unwrap();
    let mut agent = Command::new("systemd-socket-activate")
        .args(["--listen", &format!("127.0.0.1:{port}"), "-E"])
        .arg(format!("NOTIFY_SOCKET={}", notify.display()))
        .arg(env!("CARGO_BIN_EXE_landfall"))
        .args(["serve", "--config", "agent.yaml"])
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap();
    // The first to come starts it, and gets its answer.
    let url = format!("http://127.0.0.1:{port}/readyz");
    let asked = async || reqwest::get(&url).await.ok()?.text().await.ok();
    let answer = eventually("the agent answers", Duration::from_secs(20), asked).await;
    assert_eq!(answer, "ready\n");
    let said = async |word: &str| {
        eventually(word, Duration::from_secs(10), async || {
            let mut bytes = [0; 256];
            let read = heard.recv(&mut bytes).ok()?;
            let text = String::from_utf8_lossy(&bytes[..read]).into_owned();
            text.contains(word).then_some(())
        })
        .await;
    };
    said("READY=1").await;
    let pid = agent.id().to_string();
    assert!(Command::new("kill").arg(&pid).status().unwrap().success());
    said("STOPPING=1").await;
    assert!(agent.wait().unwrap().success());
}

/// As systemd starts a service: the socket is the third open file, and stays open when the service ends.
fn start_with(socket: &TcpListener, folder: &Path) -> Child {
    let third =
        "exec 3<&0 < /dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" serve --config agent.yaml";
    let log = crate::support::log_file(&folder.join("log"));
    Command::new("bash")
        .args(["-c", third, env!("CARGO_BIN_EXE_landfall")])
        .current_dir(folder)
        .stdin(OwnedFd::from(socket.try_clone().unwrap()))
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_delivery_meets_a_closed_port_while_the_agent_restarts() {
    let folder = tempfile::tempdir().unwrap();
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    let config = crate::intake::agent_yaml(port);
    fs::write(folder.path().join("agent.yaml"), config).unwrap();
    let mut agent = start_with(&socket, folder.path());
    let (end, answered) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicUsize::new(0)),
    );
    let github = tokio::spawn({
        let (end, answered) = (Arc::clone(&end), Arc::clone(&answered));
        let url = format!("http://127.0.0.1:{port}/webhook");
        async move {
            // A connection for each, as GitHub's do; GitHub waits for ten seconds, a busy machine for longer.
            let http = reqwest::Client::builder()
                .no_proxy()
                .pool_max_idle_per_host(0)
                .timeout(Duration::from_secs(30))
                .build()
                .unwrap();
            let mut answers = Vec::new();
            while !end.load(Ordering::Relaxed) {
                let after = format!("{:040x}", answers.len() + 1);
                let payload = push_payload("acme/hello", "refs/heads/main", ZERO, &after);
                let answer = try_deliver(&http, &url, &payload).await;
                answers.push(answer.map(|(status, _)| status));
                answered.store(answers.len(), Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            answers
        }
    });
    let some_more = async || {
        let before = answered.load(Ordering::Relaxed);
        let more = async || (answered.load(Ordering::Relaxed) > before + 5).then_some(());
        eventually("deliveries are answered", Duration::from_secs(60), more).await;
    };
    for _ in 0..3 {
        some_more().await;
        let stopped = Command::new("kill").arg(agent.id().to_string()).status();
        assert!(stopped.unwrap().success() && agent.wait().unwrap().success());
        agent = start_with(&socket, folder.path());
    }
    some_more().await;
    end.store(true, Ordering::Relaxed);
    let answers = github.await.unwrap();
    agent.kill().unwrap();
    agent.wait().unwrap();
    let log = fs::read_to_string(folder.path().join("log")).unwrap();
    assert!(answers.len() > 20, "{answers:?}\n{log}");
    let others: Vec<_> = answers
        .iter()
        .filter(|answer| **answer != Some(202))
        .collect();
    assert!(others.is_empty(), "{others:?} of {}\n{log}", answers.len());
}
