//! The load of `make bench`: signed push deliveries over kept connections, every body another. Prints one line of JSON.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Parser;
use hmac::{Hmac, KeyInit, Mac};
use serde_json::json;
use sha2::Sha256;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Posts signed push deliveries for a while, and tells how many were answered and how fast.
#[derive(Parser, Clone)]
struct Arguments {
    /// Where the server listens.
    #[arg(long)]
    address: SocketAddr,
    #[arg(long, default_value = "/webhook")]
    path: String,
    /// File with the webhook's secret.
    #[arg(long)]
    secret: std::path::PathBuf,
    #[arg(long)]
    repository: String,
    #[arg(long)]
    branch: String,
    #[arg(long, default_value_t = 50)]
    connections: u64,
    #[arg(long, default_value_t = 5)]
    seconds: u32,
    /// The status that counts.
    #[arg(long, default_value_t = 202)]
    status: u16,
}

/// Stands for the commit of each push.
const COMMIT: &str = "c0ffee00c0ffee00c0ffee00c0ffee00c0ffee00";
/// The addresses that GitHub lists with a repository, less `https://api.github.com/repos/OWNER/NAME`.
const ADDRESSES: [&str; 38] = [
    "forks",
    "keys{/key_id}",
    "collaborators{/collaborator}",
    "teams",
    "hooks",
    "issues/events{/number}",
    "events",
    "assignees{/user}",
    "branches{/branch}",
    "tags",
    "git/blobs{/sha}",
    "git/tags{/sha}",
    "git/refs{/sha}",
    "git/trees{/sha}",
    "statuses/{sha}",
    "languages",
    "stargazers",
    "contributors",
    "subscribers",
    "subscription",
    "commits{/sha}",
    "git/commits{/sha}",
    "comments{/number}",
    "issues/comments{/number}",
    "contents/{+path}",
    "compare/{base}...{head}",
    "merges",
    "{archive_format}{/ref}",
    "downloads",
    "issues{/number}",
    "pulls{/number}",
    "milestones{/number}",
    "notifications{?since,all,participating}",
    "labels{/name}",
    "releases{/id}",
    "deployments",
    "hooks/1/deliveries",
    "topics",
];

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let secret = std::fs::read_to_string(&arguments.secret)?;
    let end = Instant::now() + Duration::from_secs(arguments.seconds.into());
    let mut connections = JoinSet::new();
    for number in 0..arguments.connections {
        let (arguments, secret) = (arguments.clone(), secret.trim().to_owned());
        connections.spawn(async move { post(&arguments, &secret, number, end).await });
    }
    let mut took = Vec::new();
    for answers in connections.join_all().await {
        took.extend(answers?);
    }
    took.sort();
    let at = |percent: usize| {
        took.get(took.len() * percent / 100)
            .map_or(0.0, |it: &Duration| it.as_secs_f64() * 1e3)
    };
    println!(
        "{}",
        json!({"answers": took.len(), "per_second": f64::from(u32::try_from(took.len())?) / f64::from(arguments.seconds), "p50_ms": at(50), "p99_ms": at(99)})
    );
    Ok(())
}

/// One kept connection, one delivery after the other; how long each answer took.
async fn post(
    arguments: &Arguments,
    secret: &str,
    connection: u64,
    end: Instant,
) -> anyhow::Result<Vec<Duration>> {
    let mut stream = TcpStream::connect(arguments.address).await?;
    stream.set_nodelay(true)?;
    let (mut took, mut buffer) = (Vec::new(), Vec::new());
    let started = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)?
        .as_nanos();
    // Made once: what the load costs is missing on both sides.
    let template = payload(&arguments.repository, &arguments.branch).to_string();
    for number in 0_u64.. {
        if Instant::now() >= end {
            break;
        }
        let after = format!(
            "{:016x}{connection:08x}{number:016x}",
            started & u128::from(u64::MAX)
        );
        let body = template.replace(COMMIT, &after);
        let request = request(arguments, secret, &after, &body)?;
        let begun = Instant::now();
        stream.write_all(&request).await?;
        let status = answer(&mut stream, &mut buffer).await?;
        anyhow::ensure!(
            status == arguments.status,
            "answered {status} in place of {}",
            arguments.status
        );
        took.push(begun.elapsed());
    }
    Ok(took)
}

fn request(
    arguments: &Arguments,
    secret: &str,
    after: &str,
    body: &str,
) -> anyhow::Result<Vec<u8>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes())?;
    mac.update(body.as_bytes());
    let signature = hex::encode(mac.finalize().into_bytes());
    let request = format!(
        "POST {} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\nx-github-event: push\r\nx-github-delivery: {after}\r\n\
         x-hub-signature-256: sha256={signature}\r\ncontent-length: {}\r\n\r\n{body}",
        arguments.path,
        arguments.address,
        body.len()
    );
    Ok(request.into_bytes())
}

/// Reads one answer to its end; its status.
async fn answer(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> anyhow::Result<u16> {
    buffer.clear();
    loop {
        if let Some(head) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let text = std::str::from_utf8(&buffer[..head])?.to_ascii_lowercase();
            let length = text
                .split_once("content-length: ")
                .map_or("0", |(_, rest)| rest.split("\r\n").next().unwrap_or("0"));
            if buffer.len() >= head + 4 + length.parse::<usize>()? {
                return Ok(text.get(9..12).context("no status")?.parse()?);
            }
        }
        let read = stream.read_buf(buffer).await?;
        anyhow::ensure!(read > 0, "the connection was closed");
    }
}

/// What GitHub sends for a push of `COMMIT`, in its parts and its length (about 7 kB).
fn payload(repository: &str, branch: &str) -> serde_json::Value {
    let after = COMMIT;
    let web = format!("https://github.com/{repository}");
    let person = |login: &str| {
        let api = format!("https://api.github.com/users/{login}");
        json!({
            "login": login, "id": 583_231, "node_id": "MDQ6VXNlcjU4MzIzMQ==", "avatar_url": "https://avatars.githubusercontent.com/u/583231?v=4",
            "url": api, "html_url": format!("https://github.com/{login}"), "followers_url": format!("{api}/followers"),
            "gists_url": format!("{api}/gists{{/gist_id}}"), "starred_url": format!("{api}/starred{{/owner}}{{/repo}}"),
            "repos_url": format!("{api}/repos"), "type": "User", "site_admin": false, "name": login, "email": format!("{login}@example.com"),
        })
    };
    let commit = json!({
        "id": after, "tree_id": after, "distinct": true, "message": "Change the greeting",
        "timestamp": "2026-11-26T15:30:05+00:00", "url": format!("{web}/commit/{after}"),
        "author": {"name": "mona", "email": "mona@example.com", "username": "mona"},
        "committer": {"name": "GitHub", "email": "noreply@github.com", "username": "web-flow"},
        "added": [], "removed": [], "modified": ["app/src/main.rs"],
    });
    let mut about = json!({
        "id": 1, "node_id": "MDEwOlJlcG9zaXRvcnkx", "name": "hello", "full_name": repository, "private": true, "owner": person("demo"),
        "html_url": web, "description": "Says hello", "fork": false, "created_at": 1_700_000_000, "pushed_at": 1_790_000_000,
        "clone_url": format!("{web}.git"), "size": 4096, "language": "Rust", "default_branch": branch, "topics": ["axum", "kubernetes"],
    });
    for address in ADDRESSES {
        let key = address
            .split(['{', '?'])
            .next()
            .unwrap_or(address)
            .replace('/', "_");
        about[format!("{key}_url")] =
            format!("https://api.github.com/repos/{repository}/{address}").into();
    }
    json!({
        "ref": format!("refs/heads/{branch}"), "before": "0".repeat(40), "after": after, "created": false, "deleted": false, "forced": false,
        "compare": format!("{web}/compare/{}...{}", "0".repeat(12), after.get(..12).unwrap_or(after)),
        "repository": about, "pusher": {"name": "mona", "email": "mona@example.com"}, "sender": person("mona"),
        "organization": person("demo"), "commits": [commit.clone()], "head_commit": commit,
    })
}
