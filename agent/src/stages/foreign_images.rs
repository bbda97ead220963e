//! Images that are built elsewhere: each is resolved to a digest once, and keeps it while its reference is unchanged.
//!
//! So a tag that moves rolls nothing by itself, and a release that is put back is the one that served. The engine asks
//! the registry, with the logins that builds have. A registry that does not answer is no fault: the tag is deployed then.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{Scope, StageResult};
use crate::docker;
use crate::docker::registry::{self, Logins};

/// How long one registry may take to name a digest.
const ASK_LIMIT: Duration = Duration::from_secs(10);

/// What each reference is deployed as: as before, or as its registry says now.
pub async fn pin(
    scope: &Scope<'_>,
    references: BTreeSet<String>,
    kept: Option<&BTreeMap<String, String>>,
) -> StageResult<BTreeMap<String, String>> {
    let mut pinned = BTreeMap::new();
    let mut logins = None;
    for reference in references {
        if let Some(known) = kept.and_then(|kept| kept.get(&reference)) {
            pinned.insert(reference, known.clone());
            continue;
        }
        if logins.is_none() {
            logins = Some(Logins::read(scope.docker, scope.environment).await?);
        }
        let Some(logins) = &logins else { continue };
        match ask(scope, &reference, logins).await {
            Ok(digest) => {
                scope.log.line(format!(
                    "{reference} is {digest}, and stays it while the manifests name it so"
                ));
                pinned.insert(reference.clone(), format!("{reference}@{digest}"));
            }
            Err(why) => scope.log.line(format!(
                "{reference} is deployed by its tag: {} does not say its digest ({})",
                registry::host(&reference),
                logins.scrub(&why)
            )),
        }
    }
    Ok(pinned)
}

async fn ask(scope: &Scope<'_>, reference: &str, logins: &Logins) -> Result<String, String> {
    let asking = async {
        let docker = docker::connect(scope.docker).await?;
        docker
            .inspect_registry_image(reference, logins.of(reference))
            .await
    };
    let answer = tokio::time::timeout(ASK_LIMIT, asking).await;
    let answer = answer.map_err(|_| format!("no answer within {} s", ASK_LIMIT.as_secs()))?;
    let answer = answer.map_err(|error| error.to_string())?;
    answer
        .descriptor
        .digest
        .ok_or_else(|| "the answer holds none".to_owned())
}
