//! `landfall serve`: the agent. Configuration, store, listeners, then queue, GitHub and pages side by side until a
//! signal ends them.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::systemd::{self, Inherited};
use crate::app::App;
use crate::config::Config;
use crate::runner::Agent;
use crate::server;
use crate::store::Store;
use crate::{github, own_secret, queue, reconcile, sweep};

/// Exit code of a configuration that cannot be used (design section 7).
const EXIT_CONFIGURATION: u8 = 2;
const ADMIN_TOKEN_MIN: usize = 32;

pub async fn run(config_path: &Path) -> anyhow::Result<ExitCode> {
    match start(config_path).await {
        Ok(serving) => Ok(match serving.until_signal().await {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        }),
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
    let mut inherited = Inherited::take()?;
    let mut listen = async |address, variable| match inherited.of(address)? {
        Some(listener) => Ok(listener),
        None => server::bind(address, variable).await,
    };
    let listener = listen(config.listen, "LANDFALL_LISTEN").await?;
    let webhook_listener = match config.webhook_listen {
        Some(address) => Some(listen(address, "LANDFALL_WEBHOOK_LISTEN").await?),
        None => None,
    };
    inherited.all_taken()?;
    let admin_token = admin_token(&config.data_dir)?;
    let shutdown = CancellationToken::new();
    let name = folder_name(&config.data_dir)?;
    let agent = Agent {
        config: Arc::clone(&config),
        store: store.clone(),
        work: config.data_dir.join("work").join(&name),
        exe: crate::git::process::own_exe()?,
        holder: format!(
            "{name}{}.{}",
            place(&config.data_dir)?,
            own_secret::random_hex()?
        ),
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
    /// False where it ended because of a fault of its own.
    async fn until_signal(self) -> bool {
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
        let limits = server::Limits::of_process();
        let mut tasks = JoinSet::new();
        if let Some(listener) = webhook_listener {
            let routes = server::webhook_routes(app.clone());
            let serving = server::serve(listener, routes, limits.clone(), shutdown.clone());
            tasks.spawn(serving);
        }
        let routes = server::routes(app.clone());
        tasks.spawn(server::serve(listener, routes, limits, shutdown.clone()));
        tasks.spawn(github::run(
            Arc::clone(&app.config),
            app.store.clone(),
            agent.holder.clone(),
            shutdown.clone(),
        ));
        tasks.spawn(github::deliveries::run(
            Arc::clone(&app.config),
            app.store.clone(),
            agent.holder.clone(),
            shutdown.clone(),
        ));
        tasks.spawn(reconcile::run(Arc::clone(&agent), shutdown.clone()));
        tasks.spawn(sweep::run(Arc::clone(&agent), shutdown.clone()));
        tasks.spawn(queue::run(agent, shutdown.clone()));
        tasks.spawn(systemd::tell(shutdown.clone()));
        let is_well = tokio::select! {
            () = wait_for_signal() => true,
            () = panicked(&mut tasks) => false,
            () = app.store.intake_ended() => false,
        };
        match is_well {
            true => tracing::info!(
                "stopping; running builds are left for the next start, a second signal ends at once"
            ),
            false => tracing::error!(
                "a part of the agent has panicked, which is a fault of ours: ending, so that a new start takes everything up again"
            ),
        }
        shutdown.cancel();
        tokio::select! {
            () = ended(&mut tasks) => {}
            () = wait_for_signal() => tracing::warn!("second signal: ended at once"),
        }
        is_well
    }
}

/// Parts that have nothing to do end by themselves.
async fn panicked(tasks: &mut JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        if ended.is_err() {
            return;
        }
    }
    std::future::pending().await
}

async fn ended(tasks: &mut JoinSet<()>) {
    while tasks.join_next().await.is_some() {}
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

/// A data folder's name is random, and made once: agents with the same path on two machines, or in two containers, may
/// share an engine or a database.
fn folder_name(data_dir: &Path) -> anyhow::Result<String> {
    let id = own_secret::read_or_make(&data_dir.join("agent-id"))?;
    Ok(id.chars().take(8).collect())
}

/// Tells a folder from its copy, on this machine or another (a cloned one, a container): by its inode, by the name of the machine
/// and by its start.
fn place(data_dir: &Path) -> anyhow::Result<String> {
    use std::os::unix::fs::MetadataExt;
    let folder = std::fs::metadata(data_dir)?;
    let started = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let machine = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let place = format!("{}:{}:{machine}:{started}", folder.dev(), folder.ino());
    let mut digits = hex::encode(Sha256::digest(place));
    digits.truncate(8);
    Ok(digits)
}

/// The token for writes: made at the first start.
fn admin_token(data_dir: &Path) -> anyhow::Result<String> {
    let path = data_dir.join("admin-token");
    let token = own_secret::read_or_make(&path)?;
    anyhow::ensure!(
        token.len() >= ADMIN_TOKEN_MIN,
        "{} holds no token of {ADMIN_TOKEN_MIN} characters or more: remove it, and a new one is made",
        path.display()
    );
    Ok(token)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_part_that_panics_is_noticed_and_one_that_has_nothing_to_do_is_none() {
        let mut tasks = JoinSet::new();
        tasks.spawn(async {});
        tasks.spawn(std::future::pending());
        let soon = Duration::from_millis(200);
        assert!(
            tokio::time::timeout(soon, panicked(&mut tasks))
                .await
                .is_err()
        );
        tasks.spawn(async { panic!("as the test wishes") });
        tokio::time::timeout(soon, panicked(&mut tasks))
            .await
            .unwrap();
    }
}
