//! The lease of an environment and its fence: the number that grows with each new holder.
//!
//! `claim` takes the number by compare-and-set in a Lease; `fence` writes it on an object as a label that only
//! `landfall-fence` forces. From then on the API server compares: whoever applies with another number is refused.

use std::time::Duration;

use anyhow::{Context, anyhow};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::ObjectMeta;
use serde_json::{Value, json};

use super::ownership::{FENCE, MANAGER_FENCE};
use super::{Answer, Cluster, Resource, Trouble};
use crate::fail_point;
use crate::manifests::{api_version, display_name, kind, name, text};

const TRIES_MAX: u32 = 5;
const PAUSE: Duration = Duration::from_millis(50);
/// Held for as long as a release may take; only for people who look: what counts is the number.
const LEASE_SECONDS: i32 = 3600;

/// The right to write in an environment's namespace, until somebody claims a greater number.
#[derive(Clone)]
pub struct Held {
    pub cluster: Cluster,
    pub fence: i64,
    lease: String,
}

/// Takes the next number: one more than the Lease's and at least `at_least`, so that a fresh store stops nobody.
pub async fn claim(
    cluster: &Cluster,
    environment: &str,
    holder: &str,
    at_least: i64,
) -> Result<Held, Trouble> {
    let leases = cluster.api::<Lease>();
    let lease_name = format!("landfall-{environment}");
    let what = format!("claim the lease {lease_name}");
    let mut patience = cluster.patience();
    loop {
        let asked = patience.ask(async {
            let known = leases.get_opt(&lease_name).await?;
            let lease = next(known.as_ref(), &lease_name, holder, at_least);
            let parameters = PostParams {
                field_manager: Some(MANAGER_FENCE.to_owned()),
                ..PostParams::default()
            };
            // With the version that was read, so that of two claims one is refused and reads again.
            match known {
                Some(_) => leases.replace(&lease_name, &parameters, &lease).await,
                None => leases.create(&parameters, &lease).await,
            }
        });
        let error = match asked.await {
            Ok(Ok(lease)) => {
                fail_point::at("cluster: lease claimed");
                return Ok(Held {
                    cluster: cluster.clone(),
                    fence: number(&lease),
                    lease: lease_name,
                });
            }
            // Somebody wrote it since it was read.
            Ok(Err(kube::Error::Api(status)))
                if status.code == 409 && patience.begun.elapsed() < cluster.unreachable =>
            {
                tokio::time::sleep(PAUSE * 4).await;
                continue;
            }
            Ok(Err(kube::Error::Api(status))) if status.code == 403 => {
                return Err(anyhow!("{}", status.message)
                    .context("cannot claim the environment's lease: the agent's role must allow get, create and update of leases (dev/agent-rights makes such a role)")
                    .into());
            }
            Ok(Err(kube::Error::Api(status))) if !super::is_transient(&status) => {
                return Err(anyhow!("cannot {what}: {}", status.message).into());
            }
            Ok(Err(error)) => super::plain(error),
            Err(silence) => silence,
        };
        patience.wait(&what, error).await?;
    }
}

/// The greatest number on any of these objects as they are live; 0 where none has one.
pub async fn newest_label(cluster: &Cluster, objects: &[Value]) -> Result<i64, Trouble> {
    let mut newest = 0;
    for object in objects.iter().filter(|object| kind(object) != "Namespace") {
        let Some(resource) = cluster.resource(object).await? else {
            continue;
        };
        let live = cluster.get(&resource, name(object)).await;
        let live = live.map_err(|answer| answer.into_error("read what is there"))?;
        newest = newest.max(live.as_ref().map_or(0, fence_of));
    }
    Ok(newest)
}

/// An error where somebody has claimed a greater number since.
pub async fn ensure_newest(held: &Held, object: &Value) -> Result<(), Trouble> {
    let resource = Resource::built_in("coordination.k8s.io/v1", "Lease", "leases", true);
    let lease = held.cluster.get(&resource, &held.lease).await;
    let lease = lease.map_err(|answer| answer.into_error("read the environment's lease"))?;
    let newest = lease
        .as_ref()
        .and_then(|lease| lease.pointer("/spec/leaseTransitions")?.as_i64());
    match newest {
        Some(newest) if newest != held.fence => {
            let newest = format!("{newest} (by the lease)");
            let taken = LeaseTaken(refused(object, &newest, held.fence));
            Err(Trouble::Agent(taken.into()))
        }
        _ => Ok(()),
    }
}

fn number(lease: &Lease) -> i64 {
    let spec = lease.spec.as_ref();
    spec.and_then(|spec| spec.lease_transitions)
        .unwrap_or_default()
        .into()
}

fn next(known: Option<&Lease>, name: &str, holder: &str, at_least: i64) -> Lease {
    let number = known.map_or(0, number).saturating_add(1).max(at_least);
    let now = Some(MicroTime(Timestamp::now()));
    Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            resource_version: known.and_then(|lease| lease.metadata.resource_version.clone()),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            acquire_time: now.clone(),
            renew_time: now,
            lease_transitions: Some(i32::try_from(number).unwrap_or(i32::MAX)),
            ..LeaseSpec::default()
        }),
    }
}

/// The number on a live object; 0 where it has none.
pub fn fence_of(live: &Value) -> i64 {
    text(live, "/metadata/labels/landfall.dev~1fence")
        .parse()
        .unwrap_or_default()
}

/// Somebody has written their number on an object after us: nothing more is ours to write.
pub fn lost(object: &Value, theirs: &str, ours: i64) -> Trouble {
    Trouble::Agent(anyhow!("{}", refused(object, theirs, ours)))
}

fn refused(object: &Value, theirs: &str, ours: i64) -> String {
    let object = display_name(object);
    format!(
        "another agent has taken over this environment: {object} is under the fence {theirs}, ours is {ours}"
    )
}

/// Somebody has claimed the Lease after us. On one store it may be an agent that woke, and is told by the store before it writes
/// anything: unlike a greater number on an object, it says nothing of who holds the environment.
#[derive(Debug)]
pub struct LeaseTaken(String);

impl std::fmt::Display for LeaseTaken {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for LeaseTaken {}

/// Writes our number on an object that is there. None where it is not.
pub async fn fence(
    held: &Held,
    resource: &Resource,
    object: &Value,
) -> Result<Option<Value>, Trouble> {
    let (cluster, ours) = (&held.cluster, held.fence);
    let what = format!("fence {}", display_name(object));
    for attempt in 0..TRIES_MAX {
        let live = cluster.get(resource, name(object)).await;
        let Some(live) = live.map_err(|answer| answer.into_error(&what))? else {
            return Ok(None);
        };
        let theirs = fence_of(&live);
        if theirs > ours {
            return Err(lost(object, &theirs.to_string(), ours));
        }
        if theirs == ours {
            return Ok(Some(live));
        }
        let label = json!({
            "apiVersion": api_version(&live), "kind": kind(&live),
            "metadata": {
                "name": name(&live),
                "uid": text(&live, "/metadata/uid"),
                "resourceVersion": text(&live, "/metadata/resourceVersion"),
                "labels": {FENCE: ours.to_string()},
            },
        });
        let parameters = PatchParams {
            force: true,
            field_manager: Some(MANAGER_FENCE.to_owned()),
            ..PatchParams::default()
        };
        let request =
            cluster
                .request(resource)
                .patch(name(&live), &parameters, &Patch::Apply(&label));
        let request = request.context("cannot write a fence")?;
        match cluster.send(&what, &request).await {
            Ok(live) => {
                fail_point::at("cluster: fence written");
                return Ok(Some(live));
            }
            // Changed or made anew since it was read.
            Err(Answer::Refused(status)) if matches!(status.code, 409 | 422) => {}
            Err(answer) => return Err(answer.into_error(&what).into()),
        }
        tokio::time::sleep(PAUSE * (attempt + 1)).await;
    }
    Err(anyhow!("cannot {what}: it is changed by somebody else again and again").into())
}
