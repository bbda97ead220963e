//! The demo's GitHub: a push over HTTP runs the hook, which sends the delivery that GitHub would send.

use std::path::Path;
use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode};
use hmac::{Hmac, KeyInit, Mac};

use crate::git_server::GitServer;
use crate::git_world::{World, command, git};

type Deliveries = Arc<Mutex<Vec<(HeaderMap, Bytes)>>>;

/// An agent that stores what comes and answers as the real one does.
async fn agent() -> (String, Deliveries) {
    let deliveries = Deliveries::default();
    let stored = deliveries.clone();
    let routes = axum::Router::new().fallback(move |headers: HeaderMap, body: Bytes| async move {
        stored.lock().unwrap().push((headers, body));
        (
            StatusCode::ACCEPTED,
            r#"{"builds": [{"build": 42, "environment": "hello", "status": "queued", "duplicate": false}]}"#,
        )
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, routes).await });
    (url, deliveries)
}

fn install_hook(world: &World, agent: &str, secret: &Path) {
    let hook = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dev/post-receive");
    std::fs::copy(hook, world.bare().join("hooks/post-receive")).unwrap();
    for (key, value) in [
        ("landfall.url", format!("{agent}/webhook").as_str()),
        ("landfall.page", agent),
        ("landfall.repository", "demo/hello"),
        ("landfall.secretfile", secret.to_str().unwrap()),
    ] {
        git(&world.bare(), &["config", key, value]);
    }
}

/// Pushes over HTTP and returns what the user's terminal shows.
async fn push(world: &World, server: &GitServer, refspec: &str) -> String {
    let mut push = tokio::process::Command::from(command(&world.work()));
    let output = push
        .args(["push", &server.url("hello.git"), refspec])
        .output()
        .await
        .unwrap();
    let shown = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{shown}");
    shown
}

fn signed(secret: &str, body: &[u8]) -> String {
    let mut mac = Hmac::<sha2::Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(body);
    format!("sha256={}", hex::encode(mac.finalize().into_bytes()))
}

#[tokio::test]
async fn a_push_sends_the_signed_delivery_that_github_would_send() {
    let world = World::new();
    let folder = tempfile::tempdir().unwrap();
    let secret_file = folder.path().join("secret");
    let (url, deliveries) = agent().await;
    install_hook(&world, &url, &secret_file);
    let server = GitServer::start(&world.served(), ([127, 0, 0, 1], 0).into(), None)
        .await
        .unwrap();
    let zero = "0".repeat(40);
    let mut before = zero.clone();
    // Shorter and longer than one block of SHA-256, and with bytes that a shell would like to eat.
    let secrets = [
        "0123456789abcdef0123456789abcdef",
        "%s\\n $(id) 'quoted' \"twice\" `x`",
        &"long".repeat(40),
    ];
    let message = "Greet \"warmly\" \\ with\ttabs,\nlines\n\n- ünïcödé 🚀 $(id) `id` %s\u{7}";
    for (n, secret) in secrets.into_iter().enumerate() {
        std::fs::write(&secret_file, format!("{secret}\n")).unwrap();
        world.write("n", &n.to_string());
        let after = world.commit(message);
        let shown = push(&world, &server, "HEAD:refs/heads/feature/a;$(id)").await;
        let line = format!("remote: landfall: build #42 queued, {url}/builds/42");
        assert!(shown.contains(&line), "{shown}");

        let (headers, body) = deliveries.lock().unwrap().pop().unwrap();
        assert_eq!(headers["x-github-event"], "push");
        assert_eq!(headers["content-type"], "application/json");
        assert_eq!(headers["x-github-delivery"].len(), 36);
        assert!(
            headers["user-agent"]
                .to_str()
                .unwrap()
                .starts_with("GitHub-Hookshot/")
        );
        assert_eq!(
            headers["x-hub-signature-256"],
            signed(secret, &body),
            "{secret}"
        );
        let push: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(push["ref"], "refs/heads/feature/a;$(id)");
        assert_eq!(
            (push["before"].as_str(), push["after"].as_str()),
            (Some(&*before), Some(&*after))
        );
        assert_eq!(
            (push["created"].as_bool(), push["deleted"].as_bool()),
            (Some(n == 0), Some(false))
        );
        assert_eq!(push["repository"]["full_name"], "demo/hello");
        assert!(push["repository"]["id"].as_i64().unwrap() > 0);
        assert!(push["repository"]["pushed_at"].as_i64().unwrap() > 1_700_000_000);
        assert_eq!(push["pusher"]["name"], "Ada");
        assert_eq!(push["head_commit"]["id"], *after);
        assert_eq!(push["head_commit"]["message"], message.trim_end());
        assert_eq!(push["commits"].as_array().unwrap().len(), 1);
        before = after;
    }
}

#[tokio::test]
async fn force_deletion_and_an_absent_agent_are_told_too() {
    let world = World::new();
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "0123456789abcdef0123456789abcdef").unwrap();
    let (url, deliveries) = agent().await;
    install_hook(&world, &url, &secret);
    let server = GitServer::start(&world.served(), ([127, 0, 0, 1], 0).into(), None)
        .await
        .unwrap();
    world.commit("One");
    push(&world, &server, "HEAD:refs/heads/x").await;
    git(
        &world.work(),
        &["commit", "-q", "--amend", "--allow-empty", "-m", "Another"],
    );
    push(&world, &server, "+HEAD:refs/heads/x").await;
    push(&world, &server, ":refs/heads/x").await;
    let bodies: Vec<serde_json::Value> = deliveries
        .lock()
        .unwrap()
        .drain(..)
        .map(|(_, body)| serde_json::from_slice(&body).unwrap())
        .collect();
    let flags = bodies
        .iter()
        .map(|push| ["created", "forced", "deleted"].map(|name| push[name].as_bool().unwrap()));
    let expected = [
        [true, false, false],
        [false, true, false],
        [false, false, true],
    ];
    assert_eq!(flags.collect::<Vec<_>>(), expected);
    assert!(bodies[2]["head_commit"].is_null());

    git(
        &world.bare(),
        &["config", "landfall.url", "http://127.0.0.1:1/webhook"],
    );
    let shown = push(&world, &server, "HEAD:refs/heads/y").await;
    assert!(
        shown.contains("remote: landfall: the agent at http://127.0.0.1:1/webhook does not answer"),
        "{shown}"
    );
    assert!(git(&world.bare(), &["branch", "--list", "y"]).contains('y'));
}
