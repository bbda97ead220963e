//! The demo's GitHub: `git-server --root DIR --listen 127.0.0.1:PORT` serves DIR's bare repositories over HTTP.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;

#[allow(dead_code)]
#[path = "../tests/it/git_server.rs"]
mod git_server;

/// Serves a folder of bare git repositories over HTTP, for clones and pushes from this machine.
#[derive(Parser)]
struct Arguments {
    /// Folder that holds the repositories.
    #[arg(long)]
    root: PathBuf,
    /// Loopback address to listen on.
    #[arg(long)]
    listen: SocketAddr,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let Arguments { root, listen } = Arguments::parse();
    anyhow::ensure!(root.is_dir(), "--root {} is not a folder", root.display());
    anyhow::ensure!(
        listen.ip().is_loopback(),
        "--listen {listen}: only loopback addresses, since everyone may push"
    );
    let server = git_server::GitServer::start(&root, listen, None)
        .await
        .with_context(|| format!("cannot listen on {listen}"))?;
    println!("serving {} on {}", root.display(), server.url(""));
    server.run().await;
    Ok(())
}
