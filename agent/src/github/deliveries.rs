//! Deliveries that never arrived: GitHub's own list is read, and they are asked for again.
//!
//! GitHub does not send a failed delivery again by itself. The list is shown only to a token that may see the repository's
//! webhooks; without one the look at the branch (`reconcile.rs`) finds the push all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use http_body_util::{BodyExt, Limited};
use jiff::Timestamp;
use octocrab::Octocrab;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;

use super::{ANSWER_BYTES_MAX, REQUEST_TIMEOUT, connect, message, repository_path, unreached};
use crate::config::Config;
use crate::store::Store;

/// GitHub's limits are for all of the token's use.
const EVERY: Duration = Duration::from_mins(10);
/// What is older has long been found by a look at the branch.
const AGE_SECONDS_MAX: i64 = 24 * 60 * 60;
/// One that we refuse each time must not be asked for again for ever.
const SENT_MAX: usize = 3;

#[derive(Deserialize)]
struct Hook {
    id: i64,
    #[serde(default)]
    config: HookConfig,
}

#[derive(Default, Deserialize)]
struct HookConfig {
    #[serde(default)]
    url: String,
}

/// One of the list; those of one push share their guid.
#[derive(Debug, Clone, Deserialize)]
struct Sent {
    id: i64,
    guid: String,
    event: String,
    #[serde(default)]
    status_code: i64,
    delivered_at: Timestamp,
}

/// Asks until `shutdown` fires; not at all without a token. Of several agents one asks.
pub async fn run(config: Arc<Config>, store: Store, holder: String, shutdown: CancellationToken) {
    let Some(token) = &config.github.token else {
        return;
    };
    let Ok(octocrab) = connect(&config.github, token) else {
        // `github::run` has said why.
        return;
    };
    let url = config.webhook_url();
    let repositories = config.environments.iter().map(|it| it.repository.clone());
    let repositories: BTreeSet<String> = repositories.collect();
    let mut told = BTreeSet::new();
    loop {
        for repository in &repositories {
            let asked = async {
                if store.leads(&holder).await? {
                    ask_again(&octocrab, repository, &url).await
                } else {
                    Ok(0)
                }
            };
            let asked = tokio::select! {
                () = shutdown.cancelled() => return,
                asked = asked => asked,
            };
            match asked {
                Ok(0) => {}
                Ok(count) => tracing::info!(
                    repository,
                    count,
                    "asked GitHub again for deliveries that had failed"
                ),
                Err(error) if told.insert(repository.clone()) => tracing::info!(
                    repository,
                    "deliveries that fail are found by a look at the branch alone: {error:#}"
                ),
                Err(_) => {}
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

/// Of the hooks that lead to us, what failed and did not arrive since; how many deliveries were asked for.
async fn ask_again(octocrab: &Octocrab, repository: &str, url: &str) -> anyhow::Result<usize> {
    let path = repository_path(repository)
        .with_context(|| format!("{repository:?} is not like owner/name"))?;
    let hooks: Vec<Hook> = get(octocrab, &format!("{path}/hooks?per_page=100")).await?;
    let ours: Vec<&Hook> = hooks.iter().filter(|hook| hook.config.url == url).collect();
    ensure!(
        !ours.is_empty(),
        "no webhook of it leads to {url}; where GitHub reaches us by another address, name that in `github.webhook_url`"
    );
    let mut asked = 0;
    for hook in ours {
        let deliveries = format!("{path}/hooks/{}/deliveries", hook.id);
        let sent: Vec<Sent> = get(octocrab, &format!("{deliveries}?per_page=100")).await?;
        for id in missing(&sent, Timestamp::now()) {
            let again = octocrab._post(format!("{deliveries}/{id}/attempts"), None::<&()>);
            let answer = tokio::time::timeout(REQUEST_TIMEOUT, again).await??;
            let code = answer.status().as_u16();
            match answer.status().is_success() {
                true => asked += 1,
                false => tracing::info!(
                    repository,
                    id,
                    code,
                    "GitHub does not send a delivery again"
                ),
            }
        }
    }
    Ok(asked)
}

/// The newest try of each push that was never answered well, as long as it was not tried too often.
fn missing(sent: &[Sent], now: Timestamp) -> Vec<i64> {
    let mut pushes: BTreeMap<&str, Vec<&Sent>> = BTreeMap::new();
    for one in sent.iter().filter(|one| one.event == "push") {
        pushes.entry(&one.guid).or_default().push(one);
    }
    let newest_unanswered = |tries: Vec<&Sent>| {
        let newest = tries.iter().max_by_key(|one| one.id)?;
        let is_answered = tries
            .iter()
            .any(|one| (200..300).contains(&one.status_code));
        let is_old = now.as_second() - newest.delivered_at.as_second() > AGE_SECONDS_MAX;
        (!is_answered && !is_old && tries.len() < SENT_MAX).then_some(newest.id)
    };
    pushes.into_values().filter_map(newest_unanswered).collect()
}

async fn get<T: DeserializeOwned>(octocrab: &Octocrab, path: &str) -> anyhow::Result<T> {
    let asked = async {
        let answer = octocrab._get(path).await.map_err(unreached)?;
        let (parts, body) = answer.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
        let body = body.map_err(|error| anyhow::anyhow!(error))?.to_bytes();
        let code = parts.status.as_u16();
        anyhow::ensure!(code == 200, "GitHub answers {code} {}", message(&body));
        anyhow::Ok(serde_json::from_slice(&body)?)
    };
    tokio::time::timeout(REQUEST_TIMEOUT, asked).await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pushes_that_never_arrived_are_asked_for_and_not_for_ever() {
        let now: Timestamp = "2026-11-26T12:00:00Z".parse().unwrap();
        let sent = |id: i64, guid: &str, event: &str, status_code: i64, hours: i64| Sent {
            id,
            guid: guid.to_owned(),
            event: event.to_owned(),
            status_code,
            delivered_at: Timestamp::from_second(now.as_second() - hours * 3600).unwrap(),
        };
        let list = [
            sent(1, "arrived", "push", 202, 1),
            sent(2, "failed", "push", 502, 1),
            sent(3, "again", "push", 0, 2),
            sent(4, "again", "push", 202, 1),
            sent(5, "twice", "push", 503, 2),
            sent(6, "twice", "push", 0, 1),
            sent(7, "refused", "push", 401, 1),
            sent(8, "refused", "push", 401, 1),
            sent(9, "refused", "push", 401, 1),
            sent(10, "old", "push", 500, 30),
            sent(11, "another", "ping", 500, 1),
        ];
        let mut asked = missing(&list, now);
        asked.sort_unstable();
        assert_eq!(asked, [2, 6]);
    }
}
