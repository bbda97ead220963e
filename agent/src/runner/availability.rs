//! Availability: whether the app can be reached while its release changes. One request a second to its Service, as its
//! users would send them. No verdict hangs on it: it says what the release cost.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Service;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::task::AbortOnDropHandle;

use crate::cluster::Cluster;
use crate::cluster::proxy::{self, Asked, Place};
use crate::config::{Config, Environment};
use crate::release::Release;

const ASK_EVERY: Duration = Duration::from_secs(1);

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
    /// Begins to ask for what the release that serves is smoke-tested by; None where none of its tests goes to a Service.
    /// Nothing is counted where the app could not be reached to begin with.
    pub fn begin(config: Arc<Config>, environment: &str, serving: &Release) -> Option<Self> {
        let (service, path) = serving.smoke_tests.iter().find_map(|test| {
            let path = test.get.clone().filter(|path| proxy::is_plain_path(path))?;
            Some((test.service.clone()?, path))
        })?;
        let counted = Arc::new(Mutex::new(Availability::default()));
        let (counts, name) = (Arc::clone(&counted), environment.to_owned());
        let task = tokio::spawn(async move {
            if let Some(environment) = config.environment(&name) {
                ask(environment, &service, &path, &counts).await;
            }
        });
        Some(Self {
            counted,
            _task: AbortOnDropHandle::new(task),
        })
    }

    /// None where nothing was counted.
    pub fn so_far(&self) -> Option<Availability> {
        let counted = *self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        (counted.requests > 0).then_some(counted)
    }
}

async fn ask(environment: &Environment, service: &str, path: &str, counts: &Mutex<Availability>) {
    let Ok(cluster) = Cluster::connect(environment).await else {
        return;
    };
    let Ok(Some(live)) = cluster.api::<Service>().get_opt(service).await else {
        return;
    };
    let place = Place::of_service(&live);
    let mut turns = interval(ASK_EVERY);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        let Some(is_reached) = is_reached(&proxy::get(&cluster, &place, path).await) else {
            continue;
        };
        let mut counted = counts.lock().unwrap_or_else(PoisonError::into_inner);
        if counted.requests == 0 && !is_reached {
            return;
        }
        counted.count(is_reached);
    }
}

/// Whether the app took the request; None where that cannot be known.
fn is_reached(asked: &Asked) -> Option<bool> {
    match asked {
        Asked::Answered(answer) => Some(answer.status < 500),
        Asked::NoEndpoints | Asked::NobodyThere(_) => Some(false),
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
            })
        };
        let mut availability = Availability::default();
        let asked = [
            answered(200),
            answered(404),
            answered(503),
            Asked::NoEndpoints,
            Asked::NobodyThere("connection refused".to_owned()),
            Asked::Blind("the API server is away".to_owned()),
            Asked::Forbidden("not yours".to_owned()),
        ];
        for is_reached in asked.iter().filter_map(is_reached) {
            availability.count(is_reached);
        }
        assert_eq!(availability.to_string(), "3 of 5 requests lost");
    }
}
