//! The store: deliveries, builds, their stages, releases and logs. The only place that knows SQL.
//!
//! SQLite embedded (two files), or PostgreSQL. Every write of a build's rows carries the fence of its holder, so that
//! an agent that lost the environment cannot write over its successor.

mod agents;
mod builds;
pub mod care;
mod dialect;
mod environments;
mod github;
mod heads;
mod intake;
mod logs;
mod notice;
mod releases;
pub mod relocate;
mod retention;
mod seal;

use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::sync::{mpsc, watch};

use crate::config::Environment;
use dialect::{Db, Opened, on};
use notice::Notices;
use seal::Seal;

pub use agents::{LEASE, RENEW_EVERY};
pub use seal::Unsealable;

pub use builds::{Filter, NewBuild};
pub use environments::{HISTORY_MAX, Pin, Serving, steps};
pub use github::{About, Siblings, Untold, UntoldPage};
pub use intake::{Accepted, Delivery};
pub use logs::NumberedLine;

const LOCK_WAITS: Duration = Duration::from_secs(1);

/// Cheap to clone.
#[derive(Clone)]
pub struct Store {
    main: Db,
    logs: Db,
    /// Word of every change of builds, stages or logs: wakes the queue, GitHub and viewers.
    notices: Arc<Notices>,
    /// `,one,two,`: the environments of this agent's agent.yaml, once they are known.
    served: Arc<OnceLock<String>>,
    /// To the task that stores deliveries in groups.
    intake: mpsc::Sender<intake::Waiting>,
    seal: Arc<Seal>,
    /// Held as long as the store: a second agent on the same folder is refused.
    _lock: Arc<File>,
}

impl Store {
    /// Opens or makes the store in `data_dir`, brings it up to date, and locks the folder.
    pub async fn open(data_dir: &Path, database: Option<&str>) -> anyhow::Result<Self> {
        let lock = lock(data_dir)?;
        care::ensure_at_rest(data_dir)?;
        care::remove_copies(data_dir)?;
        let seal = Arc::new(Seal::open(data_dir)?);
        let Opened { main, intake, logs } = dialect::open(data_dir, database).await?;
        let is_new_key = seal.is_new;
        let notices = Notices::new();
        if let Db::Postgres(pool) = &main {
            notices.share(pool);
        }
        let store = Self {
            intake: intake::start(intake, main.clone(), Arc::clone(&notices)),
            main,
            logs,
            seal,
            notices,
            served: Arc::default(),
            _lock: Arc::new(lock),
        };
        if is_new_key && store.has_sealed().await? {
            let path = data_dir.join(seal::KEY_FILE);
            std::fs::remove_file(&path)?;
            anyhow::bail!(
                "the store holds sealed Secrets, and {} is missing: restore it from a backup, or from the agent that sealed them",
                path.display()
            );
        }
        Ok(store)
    }

    /// Tells when something changed; the value itself means nothing.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.notices.subscribe()
    }

    fn notify(&self) {
        self.notices.tell();
    }

    /// A row for each environment of agent.yaml. Of several agents each takes builds of its own environments only.
    pub async fn ensure_environments(&self, environments: &[Environment]) -> anyhow::Result<()> {
        let names = environments.iter().map(|one| format!("{},", one.name));
        let _ = self.served.set(format!(",{}", names.collect::<String>()));
        for environment in environments {
            on!(&self.main, pool => {
                sqlx::query("INSERT INTO environments (name) VALUES ($1) ON CONFLICT (name) DO NOTHING")
                    .bind(&environment.name)
                    .execute(pool)
                    .await?;
            });
        }
        Ok(())
    }

    /// What a claim is bound to: on SQLite nothing, so that builds of an environment that agent.yaml has no more come to an end.
    fn served(&self) -> &str {
        match self.is_alone() {
            true => "",
            false => self.served.get().map_or("", String::as_str),
        }
    }

    /// Whether the store answers: what `/readyz` asks.
    pub async fn ping(&self) -> anyhow::Result<()> {
        on!(&self.main, pool => { sqlx::query("SELECT 1").execute(pool).await?; });
        Ok(())
    }
}

fn lock(data_dir: &Path) -> anyhow::Result<File> {
    make_private_dir(data_dir)?;
    let path = data_dir.join("lock");
    let file = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let begun = Instant::now();
    let mut locked = file.try_lock();
    // What an agent that was killed had just begun to start holds its files for a moment more.
    while matches!(locked, Err(TryLockError::WouldBlock)) && begun.elapsed() < LOCK_WAITS {
        std::thread::sleep(LOCK_WAITS / 20);
        locked = file.try_lock();
    }
    match locked {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => anyhow::bail!(
            "another agent is working in {}: stop it first, or give this one a `data_dir` of its own",
            data_dir.display()
        ),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    }
}

/// A folder that only its owner can read.
pub fn make_private_dir(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the folder {}", path.display()))
}

#[cfg(test)]
mod model;

/// A push to `main` of which only the commit matters.
#[cfg(test)]
fn pushed(after: &str) -> crate::builds::Push {
    crate::builds::Push {
        repository_id: None,
        repository: "acme/hello".to_owned(),
        branch: "main".to_owned(),
        before: String::new(),
        after: after.to_owned(),
        pusher: String::new(),
        title: String::new(),
        pushed_at: None,
    }
}
