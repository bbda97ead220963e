//! `landfall serve`: the agent. Configuration, store, listeners, then queue, GitHub and pages side by side until a
//! signal ends them.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::config::Config;
use crate::runner::Agent;
use crate::server;
use crate::store::Store;
use crate::{github, queue};

/// Exit code of a configuration that cannot be used (design section 7).
const EXIT_CONFIGURATION: u8 = 2;

pub async fn run(config_path: &Path) -> anyhow::Result<ExitCode> {
    match start(config_path).await {
        Ok(serving) => {
            serving.until_signal().await;
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            eprintln!("landfall: {error:#}");
            Ok(ExitCode::from(EXIT_CONFIGURATION))
        }
    }
}

struct Serving {
    app: App,
    agent: Arc<Agent>,
    listener: tokio::net::TcpListener,
    webhook_listener: Option<tokio::net::TcpListener>,
}

/// Everything that can be refused is refused here, before the first request.
async fn start(config_path: &Path) -> anyhow::Result<Serving> {
    let config = Arc::new(Config::load(config_path)?);
    // What we write is for our own user: the store holds deliveries and manifests.
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o077));
    anyhow::ensure!(
        !config.environments.is_empty(),
        "{} names no environment: nothing could be deployed (the README has an example)",
        config_path.display()
    );
    let store = Store::open(
        &config.data_dir,
        config.database.as_ref().map(crate::config::Secret::expose),
    )
    .await?;
    store.ensure_environments(&config.environments).await?;
    let listener = server::bind(config.listen, "LANDFALL_LISTEN").await?;
    let webhook_listener = match config.webhook_listen {
        Some(address) => Some(server::bind(address, "LANDFALL_WEBHOOK_LISTEN").await?),
        None => None,
    };
    let admin_token = admin_token(&config.data_dir)?;
    let shutdown = CancellationToken::new();
    let agent = Agent {
        config: Arc::clone(&config),
        store: store.clone(),
        exe: crate::git::process::own_exe()?,
        holder: hex::encode(random_bytes::<8>()?),
        stopping: CancellationToken::new(),
    };
    let app = App {
        config,
        store,
        admin_token: admin_token.into(),
        shutdown,
    };
    Ok(Serving {
        app,
        agent: Arc::new(agent),
        listener,
        webhook_listener,
    })
}

impl Serving {
    async fn until_signal(self) {
        let Self {
            app,
            agent,
            listener,
            webhook_listener,
        } = self;
        let shutdown = app.shutdown.clone();
        println!(
            "landfall {} at {}",
            env!("CARGO_PKG_VERSION"),
            app.config.base_url()
        );
        tracing::info!(listen = %app.config.listen, environments = app.config.environments.len(), "serving");
        let pages = tokio::spawn(server::serve(
            listener,
            server::routes(app.clone()),
            shutdown.clone(),
        ));
        let webhook = webhook_listener.map(|listener| {
            tokio::spawn(server::serve(
                listener,
                server::webhook_routes(app.clone()),
                shutdown.clone(),
            ))
        });
        let github = tokio::spawn(github::run(
            Arc::clone(&app.config),
            app.store.clone(),
            shutdown.clone(),
        ));
        let queue = tokio::spawn(queue::run(agent, shutdown.clone()));
        wait_for_signal().await;
        tracing::info!(
            "stopping; running builds are left for the next start, a second signal ends at once"
        );
        shutdown.cancel();
        let all = async {
            let _ = queue.await;
            let _ = pages.await;
            if let Some(webhook) = webhook {
                let _ = webhook.await;
            }
            let _ = github.await;
        };
        tokio::select! {
            () = all => {}
            () = wait_for_signal() => tracing::warn!("second signal: ended at once"),
        }
    }
}

async fn wait_for_signal() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// The token for writes: made at the first start, readable by its owner only.
fn admin_token(data_dir: &Path) -> anyhow::Result<String> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let path = data_dir.join("admin-token");
    match std::fs::read_to_string(&path) {
        Ok(token) if token.trim().len() >= 32 => return Ok(token.trim().to_owned()),
        Ok(_) => anyhow::bail!(
            "{} holds no token of 32 characters or more: remove it, and a new one is made",
            path.display()
        ),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
    let token = hex::encode(random_bytes::<32>()?);
    let unfinished = data_dir.join("admin-token.new");
    let mut file = std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&unfinished)
        .with_context(|| format!("cannot write {}", unfinished.display()))?;
    file.write_all(format!("{token}\n").as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&unfinished, &path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(token)
}

fn random_bytes<const N: usize>() -> anyhow::Result<[u8; N]> {
    use std::io::Read;
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("cannot read /dev/urandom")?;
    Ok(bytes)
}
