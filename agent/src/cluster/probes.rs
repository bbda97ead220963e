//! The signs of probes: what runs and does not become ready, or is about to be ended.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, Pod};

use super::container_signs::of;
use super::sign::{Patience, Sign};
use super::snapshot::{Running, Snapshot, is_ready, is_terminating, name, uid};
use super::words::{is_about, last_seen, message, shortened};
use crate::builds::Cause;

/// How old a failed probe may be and still speak of now; more than the usual period of 10 s.
const PROBE_RECENT: Duration = Duration::from_secs(15);

/// What the probe said, where it failed a moment ago.
pub fn recent_probe_failure<'a>(
    pod: &'a Pod,
    snapshot: &'a Snapshot,
    probe: &str,
) -> Option<&'a str> {
    let event = probe_failure(pod, snapshot, probe)?;
    let age = snapshot.now.duration_since(last_seen(event)?);
    (age.as_secs() <= PROBE_RECENT.as_secs().cast_signed()).then(|| message(event))
}

pub(super) fn fails_liveness(pod: &Pod, snapshot: &Snapshot) -> Option<Sign> {
    let recent = recent_probe_failure(pod, snapshot, "Liveness")?;
    let cause = Cause::new(
        "liveness_failed",
        format!(
            "pod {} fails its liveness probe: {}",
            name(pod),
            shortened(recent)
        ),
    )
    .hint("let the probe's path answer, or give the program more time with a startupProbe");
    Some(Sign::new(uid(pod), Patience::UntilDeadline, cause))
}

pub(super) fn never_ready(pod: &Pod, snapshot: &Snapshot) -> Option<Sign> {
    let containers = Running::all(pod);
    let container = containers
        .iter()
        // An init container is not ready until it has ended, however well it does.
        .find(|it| it.is_running() && !it.status.ready && !it.is_init)?;
    if is_ready(pod) {
        return None;
    }
    let probe = if container.status.started == Some(false) {
        "Startup"
    } else {
        "Readiness"
    };
    let told = probe_failure(pod, snapshot, probe).map_or("", message);
    let cause = match snapshot.listening.get(uid(pod)) {
        Some(port) if is_refused(told) => Cause::new(
            "listens_elsewhere",
            format!(
                "{} runs but does not become ready: its probe is refused, and it listens on port {port}{}",
                container.display_name(),
                probe_words(pod, snapshot, probe)
            ),
        )
        .hint(format!(
            "let the probe and the Service's targetPort name port {port}, or let the program listen where they ask"
        )),
        _ => {
            let (id, hint) = never_ready_because(told);
            let sentence = format!(
                "{} runs but does not become ready{}",
                container.display_name(),
                probe_words(pod, snapshot, probe)
            );
            Cause::new(id, sentence).hint(hint)
        }
    };
    Some(Sign::new(
        &of(container),
        Patience::Unlike(allowed(container)),
        cause,
    ))
}

/// The kubelet's own words of a probe: `dial tcp …: connect: connection refused`, `… statuscode: 404`,
/// `… context deadline exceeded`.
fn never_ready_because(told: &str) -> (&'static str, &'static str) {
    if is_refused(told) {
        (
            "probe_refused",
            "nobody listens on the probe's port: does the program listen there, and on 0.0.0.0 rather than 127.0.0.1?",
        )
    } else if told.contains("statuscode:") {
        (
            "probe_wrong_status",
            "let the probe's path answer with 200 to 399, or correct the path",
        )
    } else if told.contains("context deadline exceeded")
        || told.contains("Client.Timeout")
        || told.contains("i/o timeout")
    {
        (
            "probe_time_out",
            "the probe is not answered in time: raise its timeoutSeconds, or find what the program waits for",
        )
    } else {
        (
            "never_ready",
            "let the probe succeed, or give it more time with `verify: timeout_seconds`",
        )
    }
}

fn is_refused(told: &str) -> bool {
    told.contains("connection refused")
}

/// The declared ports of a container whose probe is refused, other than the refusing one: it may listen there.
pub fn other_ports(pod: &Pod, events: &[Event]) -> Vec<i32> {
    let refused = events.iter().find(|event| {
        event.involved_object.uid.as_deref() == Some(uid(pod))
            && event.reason.as_deref() == Some("Unhealthy")
            && is_refused(message(event))
    });
    let Some(refused) = refused.filter(|_| !is_ready(pod) && !is_terminating(pod)) else {
        return Vec::new();
    };
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    containers
        .filter(|container| is_about(refused, &container.name))
        .flat_map(|container| container.ports.iter().flatten())
        .filter(|port| port.protocol.as_deref().unwrap_or("TCP") == "TCP")
        .map(|port| port.container_port)
        // `… dial tcp 10.0.0.7:8080: connect: connection refused`
        .filter(|port| !message(refused).contains(&format!(":{port}: connect")))
        .collect()
}

/// What a container's own probes give it before they count.
fn allowed(container: &Running<'_>) -> Duration {
    let Some(spec) = container.spec else {
        return Duration::ZERO;
    };
    let is_started = container.status.started == Some(true);
    let startup = spec.startup_probe.as_ref().filter(|_| !is_started);
    let startup = startup.map_or(0, |probe| {
        let rounds = i64::from(probe.failure_threshold.unwrap_or(3));
        i64::from(probe.initial_delay_seconds.unwrap_or(0))
            + rounds * i64::from(probe.period_seconds.unwrap_or(10))
    });
    let readiness = spec.readiness_probe.as_ref();
    // What comes up just after one round is seen by the next.
    let delay = readiness.map_or(0, |probe| {
        let rounds = i64::from(probe.success_threshold.unwrap_or(1));
        let round = i64::from(probe.period_seconds.unwrap_or(10));
        i64::from(probe.initial_delay_seconds.unwrap_or(0)) + (rounds * round - 1).max(0)
    });
    Duration::from_secs(u64::try_from(startup.max(delay)).unwrap_or_default())
}

fn probe_failure<'a>(pod: &'a Pod, snapshot: &'a Snapshot, probe: &str) -> Option<&'a Event> {
    snapshot
        .events_of(uid(pod))
        .filter(|event| {
            event.reason.as_deref() == Some("Unhealthy") && message(event).starts_with(probe)
        })
        .max_by_key(|event| last_seen(event))
}

pub(super) fn probe_words(pod: &Pod, snapshot: &Snapshot, probe: &str) -> String {
    probe_failure(pod, snapshot, probe)
        .map(|event| format!(": {}", shortened(message(event))))
        .unwrap_or_default()
}
