//! The agent under systemd: its units are right, its socket is handed down, and it says when it is ready.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::landfall::free_port;
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
