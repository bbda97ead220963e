//! The program itself, as Kubernetes starts and stops it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn app(port: &str) -> Command {
    let mut app = Command::new(env!("CARGO_BIN_EXE_app"));
    app.env("PORT", port)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    app
}

/// The program and the port that it chose.
fn start() -> (Child, u16) {
    let mut app = app("0").spawn().unwrap();
    let mut line = String::new();
    let mut stdout = BufReader::new(app.stdout.take().unwrap());
    stdout.read_line(&mut line).unwrap();
    let port = line.trim().rsplit(':').next().unwrap().parse().unwrap();
    (app, port)
}

fn status(port: u16, path: &str) -> std::io::Result<u16> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: app\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer[9..12].parse().unwrap())
}

/// By the shell's own `kill`: slim images have no other.
fn signal(app: &Child, name: &str) {
    let kill = format!("kill -{name} {}", app.id());
    assert!(
        Command::new("sh")
            .args(["-c", &kill])
            .status()
            .unwrap()
            .success()
    );
}

#[test]
fn a_bad_port_is_a_clear_error() {
    for bad in ["", "http", "-1", "65536"] {
        let ended = app(bad).output().unwrap();
        assert_eq!(ended.status.code(), Some(2), "PORT={bad}");
        let stderr = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(
            stderr,
            format!("PORT must be a number from 0 to 65535, not {bad:?}\n")
        );
    }
}

#[test]
fn a_port_in_use_is_a_clear_error() {
    let (mut first, port) = start();
    let second = app(&port.to_string()).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let stderr = String::from_utf8(second.stderr).unwrap();
    assert!(
        stderr.starts_with(&format!("cannot serve on port {port}: ")),
        "{stderr}"
    );
    first.kill().unwrap();
    first.wait().unwrap();
}

#[test]
fn ctrl_c_ends_it_at_once() {
    let (mut app, _) = start();
    let told = Instant::now();
    signal(&app, "INT");
    assert_eq!(app.wait().unwrap().code(), Some(0));
    assert!(told.elapsed() < Duration::from_secs(4));
}

#[test]
#[ignore = "takes 5 s, and every push runs these tests: `cargo test -p app -- --include-ignored`"]
fn sigterm_makes_it_unready_for_five_seconds_and_then_it_exits_with_0() {
    let (mut app, port) = start();
    assert_eq!(status(port, "/ready").unwrap(), 200);
    let told = Instant::now();
    signal(&app, "TERM");
    while status(port, "/ready").unwrap() != 503 {}
    while told.elapsed() < Duration::from_millis(4500) {
        assert_eq!(status(port, "/").unwrap(), 200);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(app.wait().unwrap().code(), Some(0));
    let took = told.elapsed();
    assert!(
        took >= Duration::from_secs(5) && took < Duration::from_secs(9),
        "{took:?}"
    );
    assert!(status(port, "/").is_err());
}
