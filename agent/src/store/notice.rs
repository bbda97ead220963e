//! Word of a change: to everyone in this process at once, and on PostgreSQL to the other agents of the store.
//!
//! It carries nothing: whoever hears it reads the store. Polling is the truth, so that a lost word is only a delay.

use std::sync::{Arc, Weak};
use std::time::Duration;

use sqlx::PgPool;
use sqlx::postgres::PgListener;
use tokio::sync::{Notify, watch};

const CHANNEL: &str = "landfall";
/// A chatty build is told of this often.
const TELL_EVERY: Duration = Duration::from_millis(50);
/// Between two tries to listen; also how long a task outlives its store.
const PAUSE: Duration = Duration::from_secs(2);

/// Who is told in this process, and what is to be told to others.
pub struct Notices {
    changed: watch::Sender<u64>,
    ours: Notify,
}

impl Notices {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            changed: watch::Sender::new(0),
            ours: Notify::new(),
        })
    }

    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// We changed something.
    pub fn tell(&self) {
        self.hear();
        self.ours.notify_one();
    }

    /// Somebody changed something.
    fn hear(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Tells the other agents on this database, and hears them, as long as somebody holds the notices.
    pub fn share(self: &Arc<Self>, pool: &PgPool) {
        let name = std::process::id().to_string() + &format!("{:p}", Arc::as_ptr(self));
        tokio::spawn(tell_others(
            Arc::downgrade(self),
            pool.clone(),
            name.clone(),
        ));
        tokio::spawn(hear_others(Arc::downgrade(self), pool.clone(), name));
    }
}

async fn tell_others(notices: Weak<Notices>, pool: PgPool, name: String) {
    while let Some(notices) = notices.upgrade() {
        let is_ours = tokio::time::timeout(PAUSE, notices.ours.notified())
            .await
            .is_ok();
        drop(notices);
        if is_ours {
            // What cannot be told is found by polling.
            let _ = sqlx::query("SELECT pg_notify($1, $2)")
                .bind(CHANNEL)
                .bind(&name)
                .execute(&pool)
                .await;
            tokio::time::sleep(TELL_EVERY).await;
        }
    }
}

async fn hear_others(notices: Weak<Notices>, pool: PgPool, name: String) {
    while notices.strong_count() > 0 {
        if let Ok(mut listener) = PgListener::connect_with(&pool).await
            && listener.listen(CHANNEL).await.is_ok()
        {
            while let Some(notices) = notices.upgrade() {
                match tokio::time::timeout(PAUSE, listener.recv()).await {
                    Ok(Ok(told)) if told.payload() != name => notices.hear(),
                    Ok(Err(_)) => break,
                    _ => {}
                }
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}
