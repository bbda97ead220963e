//! Availability: whether an app can be reached while its release changes. About once a second its Service is asked by way of
//! the API server. No verdict hangs on it: it says what the release cost.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::Cluster;
use super::proxy::{self, Asked, Place};
use crate::config::Environment;
use crate::release::Release;

const ASK_EVERY: Duration = Duration::from_secs(1);
/// Whoever waits longer has gone.
const ANSWER_MAX: Duration = Duration::from_secs(3);

/// Requests to a Service, and how many of them the app did not take.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Availability {
    pub requests: u32,
    pub lost: u32,
}

impl Availability {
    fn count(&mut self, is_reached: bool) {
        self.requests += 1;
        self.lost += u32::from(!is_reached);
    }
}

impl fmt::Display for Availability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} requests lost", self.lost, self.requests)
    }
}

/// Asks until it is dropped.
pub struct Watch {
    counted: Arc<Mutex<Availability>>,
    _task: AbortOnDropHandle<()>,
}

impl Watch {
    /// Begins to ask for what the release that serves is smoke-tested by. None where none of its tests goes to a Service, and
    /// where the app is not reached to begin with.
    pub async fn begin(environment: &Environment, serving: &Release) -> Option<Self> {
        let (service, path) = serving.smoke_tests.iter().find_map(|test| {
            let path = test.get.clone().filter(|path| proxy::is_plain_path(path))?;
            Some((test.service.as_ref()?, path))
        })?;
        let first = async {
            let cluster = Cluster::connect(environment).await.ok()?;
            let live = cluster.api::<Service>().get_opt(service).await.ok()??;
            let place = Place::of_service(&live);
            let first = proxy::get(&cluster, &place, &path).await;
            (is_reached(&first) == Some(true)).then_some((cluster, place))
        };
        let (cluster, place) = timeout(ANSWER_MAX, first).await.ok()??;
        let mut counted = Availability::default();
        counted.count(true);
        let counted = Arc::new(Mutex::new(counted));
        let task = tokio::spawn(ask(cluster, place, path, Arc::clone(&counted)));
        Some(Self {
            counted,
            _task: AbortOnDropHandle::new(task),
        })
    }

    pub fn so_far(&self) -> Availability {
        *self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn ask(cluster: Cluster, place: Place, path: String, counted: Arc<Mutex<Availability>>) {
    let mut turns = interval_at(Instant::now() + ASK_EVERY, ASK_EVERY);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        let is_reached = match timeout(ANSWER_MAX, proxy::get(&cluster, &place, &path)).await {
            Ok(asked) => is_reached(&asked),
            Err(_) => proxy::is_in_sight(&cluster).await.then_some(false),
        };
        if let Some(is_reached) = is_reached {
            let mut counted = counted.lock().unwrap_or_else(PoisonError::into_inner);
            counted.count(is_reached);
        }
    }
}

/// Whether the app took the request; None where that cannot be known.
fn is_reached(asked: &Asked) -> Option<bool> {
    match asked {
        Asked::Answered(answer) => Some(answer.status < 500),
        Asked::NoEndpoints | Asked::NobodyThere(_) => Some(false),
        // The way was there before: it leads to a pod that is gone.
        Asked::Unreached(_) | Asked::Gone => Some(false),
        Asked::Blind(_) | Asked::Forbidden(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::proxy::Answer;

    #[test]
    fn only_what_the_app_did_not_take_is_lost() {
        let answered = |status| {
            Asked::Answered(Answer {
                status,
                body: Vec::new(),
                took: Duration::ZERO,
                forwarded: false,
            })
        };
        let mut availability = Availability::default();
        let asked = [
            answered(200),
            answered(404),
            answered(503),
            Asked::NoEndpoints,
            Asked::NobodyThere("connection refused".to_owned()),
            Asked::Unreached("dial tcp 10.0.0.1:80: connect: no route to host".to_owned()),
            Asked::Blind("the API server is away".to_owned()),
            Asked::Forbidden("not yours".to_owned()),
        ];
        for is_reached in asked.iter().filter_map(is_reached) {
            availability.count(is_reached);
        }
        assert_eq!(availability.to_string(), "4 of 6 requests lost");
    }
}
