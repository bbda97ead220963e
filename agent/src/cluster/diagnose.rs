//! Why a workload does not come up: the signs that a snapshot shows, the most telling first.
//!
//! Pure. Each sign is a cause and the patience that it deserves; `rollout` holds the clock and decides. Texts of
//! Kubernetes and of containerd are read here and nowhere else. Nothing here is ever a verdict by itself.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, Pod};

use super::snapshot::{
    Kind, Running, Snapshot, Target, Workload, created, has_ended, is_ready, name, pod_condition,
    uid,
};
use crate::builds::Cause;

/// What is wrong for good is believed when it has been seen for this long: the cluster's parts hear of each other late.
const PERMANENT: Duration = Duration::from_secs(2);
/// A ConfigMap, a Secret or a ServiceAccount of the same set reaches the kubelet a moment later than its pod.
const CONFIGURATION: Duration = Duration::from_secs(2);
/// The container runtime was asked and failed; it is asked again within this.
const RUNTIME: Duration = Duration::from_secs(10);
/// Something on the way that may pass by itself: a registry that restarts, a webhook that is rolled.
const PASSING: Duration = Duration::from_secs(60);
/// No node has room, and nothing has moved.
const UNSCHEDULABLE_QUIET: Duration = Duration::from_secs(8);
/// No node has room, but new ones may come.
const UNSCHEDULABLE_AUTOSCALE: Duration = Duration::from_secs(120);
/// The old pods' quota comes free only when they have gone.
const QUOTA_QUIET: Duration = Duration::from_secs(3);
/// A kubelet that is well takes up a pod within this.
const KUBELET_MAX: jiff::SignedDuration = jiff::SignedDuration::from_secs(5);
/// So often a container of one pod dies before the release is called dead.
pub const DEATHS_MAX: i32 = 2;
const WORDS_CHARS_MAX: usize = 300;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sign {
    pub cause: Cause,
    pub patience: Patience,
    /// The pod or object that shows it: the same sign of the same one is one sight after another.
    pub of: String,
}

/// What must come to pass before a sign is a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    None,
    /// Seen for so long.
    Seen(Duration),
    /// Seen for so long while nothing of the workload moved and none of its pods was on its way out.
    Quiet(Duration),
    /// Seen for much longer than the last good releases took, and for what its own probes allow.
    Unlike(Duration),
    /// It explains a time-out, and no more.
    UntilDeadline,
}

/// The signs of a snapshot, the most telling first. `deaths` says how often a container died since our apply.
pub fn signs(
    target: &Target,
    snapshot: &Snapshot,
    nodes_autoscale: bool,
    deaths: &dyn Fn(&Running<'_>) -> i32,
) -> Vec<Sign> {
    let mut signs = Vec::new();
    signs.extend(changed_by_another(target, snapshot));
    let is_job = target.kind == Kind::Job;
    let pods: Vec<&Pod> = snapshot
        .new_pods()
        .into_iter()
        .filter(|pod| !has_ended(pod))
        .collect();
    for pod in &pods {
        for container in Running::all(pod) {
            if !is_job {
                signs.extend(died(&container, snapshot, deaths(&container)));
            }
            signs.extend(waits(&container));
        }
    }
    for pod in &pods {
        signs.extend(cannot_mount(pod, snapshot));
        signs.extend(unschedulable(pod, snapshot, nodes_autoscale));
    }
    signs.extend(pods.iter().filter_map(|pod| node_lost(pod, snapshot.now)));
    signs.extend(refused_pods(snapshot));
    signs.extend(paused(target, snapshot));
    signs.extend(on_delete(target, snapshot));
    for pod in &pods {
        signs.extend(fails_liveness(pod, snapshot));
        signs.extend(never_ready(pod, snapshot));
    }
    signs.extend(deadline_exceeded(target, snapshot));
    signs.into_iter().map(|sign| named(target, sign)).collect()
}

fn named(target: &Target, mut sign: Sign) -> Sign {
    sign.cause
        .object
        .get_or_insert_with(|| target.display_name());
    sign
}

fn sign(of: &str, patience: Patience, cause: Cause) -> Sign {
    Sign {
        cause,
        patience,
        of: of.to_owned(),
    }
}

/// Somebody else wrote another template after our apply: what rolls out is not this release.
fn changed_by_another(target: &Target, snapshot: &Snapshot) -> Option<Sign> {
    if target.generation == 0 || snapshot.workload.generation() <= target.generation {
        return None;
    }
    let template = snapshot.workload.template()?;
    let annotation_differs = target.release.is_some()
        && super::snapshot::template_release(template) != target.release.as_deref();
    let spec = template.spec.as_ref()?;
    let live = |name: &str| {
        let containers = spec
            .init_containers
            .iter()
            .flatten()
            .chain(&spec.containers);
        containers
            .into_iter()
            .find(|container| container.name == name)?
            .image
            .as_deref()
    };
    let other_image = target
        .images
        .iter()
        .find(|(name, image)| live(name).is_some_and(|live| live != image));
    let what = match other_image {
        Some((container, image)) => {
            format!(
                "container {container} is now {} and not {image}",
                live(container).unwrap_or_default()
            )
        }
        None if annotation_differs => {
            "its pod template is no longer the one of this release".to_owned()
        }
        None => return None,
    };
    let cause = Cause::new(
        "changed_by_another",
        format!(
            "{} was changed by another while it rolled out: {what}",
            target.display_name()
        ),
    )
    .hint("see who wrote last with `kubectl get -o yaml --show-managed-fields`, then build again");
    Some(sign(&target.name, Patience::None, cause))
}

/// A container that died: twice is a verdict, once explains.
fn died(container: &Running<'_>, snapshot: &Snapshot, deaths: i32) -> Option<Sign> {
    let death = container.death().filter(|_| deaths > 0)?;
    let who = container.display_name();
    let often = match deaths {
        1 => "once".to_owned(),
        2 => "twice".to_owned(),
        more => format!("{more} times"),
    };
    let words = snapshot
        .last_words
        .get(&container.key())
        .map(String::as_str)
        .unwrap_or_default();
    let limit = container
        .spec
        .and_then(|spec| spec.resources.as_ref()?.limits.as_ref()?.get("memory"))
        .map(|quantity| format!(" (its limit is {})", quantity.0));
    let liveness = snapshot.events_of(uid(container.pod)).any(|event| {
        is_about(event, &container.status.name) && message(event).contains("failed liveness probe")
    });
    let cause = if death.reason == "OOMKilled" {
        Cause::new(
            "oom_killed",
            format!(
                "{who} was killed {often} for using too much memory{}",
                limit.unwrap_or_default()
            ),
        )
        .hint("raise resources.limits.memory in the manifest, or let the program use less")
    } else if matches!(death.reason, "StartError" | "ContainerCannotRun") {
        cannot_start(&who, death.message)
    } else if words.contains("exec format error") {
        Cause::new("wrong_architecture", format!("{who} cannot start: exec format error: the image is built for another CPU than the node's"))
            .hint("build the image for the nodes' platform")
    } else if liveness && !container.is_init {
        Cause::new(
            "liveness_failed",
            format!(
                "{who} was restarted {often} because its liveness probe failed{}",
                probe_words(container.pod, snapshot, "Liveness")
            ),
        )
        .hint("let the probe's path answer, or give the program more time with a startupProbe")
    } else {
        let last = last_line(words)
            .map(|line| format!(": {line}"))
            .unwrap_or_default();
        let ended = match death.exit_code {
            0 => "ended by itself with exit code 0".to_owned(),
            code @ 129..=192 => format!("was ended by signal {} (exit code {code})", code - 128),
            code => format!("exited with code {code}"),
        };
        let id = if container.is_init {
            "init_failed"
        } else {
            "crash_loop"
        };
        Cause::new(id, format!("{who} {ended} {often}{last}")).hint(format!(
            "see `kubectl logs {} -c {} --previous`",
            name(container.pod),
            container.status.name
        ))
    };
    let patience = if deaths >= DEATHS_MAX {
        Patience::None
    } else {
        Patience::UntilDeadline
    };
    Some(sign(&of(container), patience, cause))
}

fn of(container: &Running<'_>) -> String {
    let (pod, name) = container.key();
    format!("{pod}/{name}")
}

fn cannot_start(who: &str, message: &str) -> Cause {
    // The runtime's message is a chain of wrappers; the end of it is what happened.
    let told = message
        .rsplit_once("unable to start container process: ")
        .map_or(message, |(_, rest)| rest);
    let told = told.trim_end_matches(": unknown");
    Cause::new(
        "cannot_start",
        format!("{who} cannot be started: {}", shortened(told)),
    )
    .hint("check `command` and `args` in the manifest and ENTRYPOINT in the Dockerfile")
}

/// A container that does not get as far as to run.
fn waits(container: &Running<'_>) -> Option<Sign> {
    let (reason, message) = container.waiting()?;
    let who = container.display_name();
    let (patience, cause) = match reason {
        "ErrImagePull"
        | "ImagePullBackOff"
        | "RegistryUnavailable"
        | "SignatureValidationFailed" => pull(container, message),
        "InvalidImageName" | "ErrImageNeverPull" => (
            Patience::Seen(PERMANENT),
            Cause::new(
                "image_not_found",
                format!(
                    "the image {} of {who} cannot be used: {}",
                    container.status.image,
                    shortened(message)
                ),
            ),
        ),
        "CreateContainerConfigError" => (
            Patience::Seen(CONFIGURATION),
            Cause::new(
                missing_config(message),
                format!("{who} cannot be configured: {}", shortened(message)),
            )
            .hint("add the missing ConfigMap, Secret or key to the namespace or to the manifests"),
        ),
        "RunContainerError"
        | "CreateContainerError"
        | "PreStartHookError"
        | "PostStartHookError" => (Patience::Seen(RUNTIME), cannot_start(&who, message)),
        _ => return None,
    };
    Some(sign(&of(container), patience, cause))
}

/// What a container waits for: `secret "x" not found`, `couldn't find key k in ConfigMap ns/x`.
fn missing_config(message: &str) -> &'static str {
    let lower = message.to_lowercase();
    if lower.contains("find key") || lower.contains("non-existent config key") {
        "config_key_missing"
    } else if lower.contains("secret") {
        "secret_missing"
    } else if lower.contains("configmap") {
        "config_map_missing"
    } else {
        "config_invalid"
    }
}

fn pull(container: &Running<'_>, message: &str) -> (Patience, Cause) {
    let image = container
        .spec
        .and_then(|spec| spec.image.as_deref())
        .unwrap_or(&container.status.image);
    let who = container.display_name();
    // What stands before the last "failed to …" repeats the image's name and may hold any of these words.
    let told = message
        .rsplit_once("failed to ")
        .map_or(message, |(_, rest)| rest)
        .to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| told.contains(word));
    if has(&[
        "unauthorized",
        "denied",
        "forbidden",
        "authorization failed",
        "authentication required",
    ]) {
        let cause = Cause::new("image_pull_denied", format!("{who} may not pull its image {image}"))
            .hint("give the namespace's service account, or the manifest, an imagePullSecret that may read this image");
        return (Patience::Seen(PERMANENT), cause);
    }
    if has(&[
        "not found",
        "manifest unknown",
        "name unknown",
        "no match for platform",
    ]) && !has(&["no such host"])
    {
        let cause = Cause::new("image_not_found", format!("the image {image} of {who} does not exist"))
            .hint("check the name, the tag or the digest in the manifest, and that it was pushed to this registry");
        return (Patience::Seen(PERMANENT), cause);
    }
    if has(&["no such host"]) || message.contains("no such host") {
        let host = image.split('/').next().unwrap_or_default();
        let cause = Cause::new(
            "registry_unknown",
            format!("the registry {host} of the image {image} of {who} has no address"),
        )
        .hint("check the name of the registry in the manifest, and the DNS of the cluster's nodes");
        return (Patience::Seen(PERMANENT), cause);
    }
    let told = message
        .rsplit_once("failed to do request: ")
        .map_or(message, |(_, rest)| rest);
    let cause = Cause::new(
        "registry_unreachable",
        format!(
            "the node cannot pull {image} for {who}: {}",
            shortened(told)
        ),
    )
    .hint("check that the cluster's nodes reach the registry");
    (Patience::Seen(PASSING), cause)
}

/// The only signal of a missing Secret or ConfigMap that is to be mounted is an event.
fn cannot_mount(pod: &Pod, snapshot: &Snapshot) -> Option<Sign> {
    let is_waiting = |container: &Running<'_>| {
        matches!(
            container.waiting(),
            Some(("ContainerCreating" | "PodInitializing", _))
        )
    };
    if !Running::all(pod).iter().any(is_waiting) {
        return None;
    }
    let event = snapshot
        .events_of(uid(pod))
        .filter(|event| {
            matches!(
                event.reason.as_deref(),
                Some("FailedMount" | "FailedAttachVolume" | "FailedCreatePodSandBox")
            )
        })
        .max_by_key(|event| last_seen(event))?;
    let told = message(event);
    let is_missing = [
        "not found",
        "non-existent config key",
        "references non-existent",
    ]
    .iter()
    .any(|word| told.contains(word));
    let patience = if is_missing {
        Patience::Seen(CONFIGURATION)
    } else {
        Patience::UntilDeadline
    };
    let id = if event.reason.as_deref() == Some("FailedCreatePodSandBox") {
        "cannot_start"
    } else if is_missing {
        match missing_config(told) {
            "config_invalid" => "mount_failed",
            named => named,
        }
    } else {
        "mount_failed"
    };
    let cause = Cause::new(
        id,
        format!(
            "pod {} waits for its volumes: {}",
            name(pod),
            shortened(told)
        ),
    )
    .hint("add what is missing to the namespace or to the manifests");
    Some(sign(uid(pod), patience, cause))
}

fn unschedulable(pod: &Pod, snapshot: &Snapshot, nodes_autoscale: bool) -> Option<Sign> {
    let (_, _, told) = pod_condition(pod, "PodScheduled")
        .filter(|(status, reason, _)| *status == "False" && *reason == "Unschedulable")?;
    let nodes_may_come = nodes_autoscale
        || snapshot
            .events_of(uid(pod))
            .any(|event| event.reason.as_deref() == Some("TriggeredScaleUp"));
    let patience = if nodes_may_come {
        Patience::Seen(UNSCHEDULABLE_AUTOSCALE)
    } else if told.contains("PersistentVolumeClaim") {
        Patience::Seen(PASSING)
    } else {
        Patience::Quiet(UNSCHEDULABLE_QUIET)
    };
    // The second half tells about preemption and repeats the first.
    let told = told
        .split(" preemption: ")
        .next()
        .unwrap_or(told)
        .trim_end_matches(['.', ' ']);
    let told = told
        .trim_end_matches("no new claims to deallocate,")
        .trim_end_matches(['.', ' ']);
    let lower = told.to_lowercase();
    let (id, hint) = if lower.contains("persistentvolumeclaim") {
        (
            "pvc_not_bound",
            "see `kubectl get pvc,storageclass`: no volume fits the claim",
        )
    } else if lower.contains("taint")
        || lower.contains("affinity")
        || lower.contains("node selector")
    {
        (
            "unschedulable",
            "compare nodeSelector, affinity and tolerations with `kubectl get nodes --show-labels`",
        )
    } else if lower.contains("free ports") {
        (
            "unschedulable",
            "the hostPort is taken on every node: use a Service in its place",
        )
    } else {
        (
            "unschedulable",
            "ask for less in resources.requests, or give the cluster room",
        )
    };
    let cause = Cause::new(
        id,
        format!("pod {} finds no node: {}", name(pod), shortened(told)),
    )
    .hint(hint);
    Some(sign(uid(pod), patience, cause))
}

/// Its kubelet has not been heard of: the pod may come back with it, or elsewhere. One that never took up a pod that it was
/// given shows that much without a right to read nodes: it sets `startTime` first of all.
fn node_lost(pod: &Pod, now: jiff::Timestamp) -> Option<Sign> {
    let status = pod.status.as_ref()?;
    let is_placed = pod.spec.as_ref()?.node_name.is_some();
    let is_new = created(&pod.metadata).is_none_or(|made| now.duration_since(made) < KUBELET_MAX);
    let lost = status.reason.as_deref() == Some("NodeLost")
        || pod_condition(pod, "DisruptionTarget").is_some_and(|(status, reason, _)| {
            status == "True" && reason == "DeletionByTaintManager"
        })
        || (is_placed && status.start_time.is_none() && !is_new);
    lost.then(|| {
        let node = pod
            .spec
            .as_ref()
            .and_then(|spec| spec.node_name.as_deref())
            .unwrap_or_default();
        let cause = Cause::new(
            "node_lost",
            format!("the node {node} of pod {} is not heard of", name(pod)),
        )
        .hint("see `kubectl get nodes`");
        sign(uid(pod), Patience::UntilDeadline, cause)
    })
}

/// The API server refuses the pods themselves: quota, limits, pod security, a webhook.
fn refused_pods(snapshot: &Snapshot) -> Option<Sign> {
    let told = match &snapshot.workload {
        Workload::Deployment(_) => {
            let conditions = snapshot
                .new_replica_set()?
                .status
                .as_ref()?
                .conditions
                .as_deref()?;
            let condition = conditions.iter().find(|condition| {
                condition.type_ == "ReplicaFailure" && condition.status == "True"
            })?;
            condition.message.clone()?
        }
        // These kinds have no such condition: the event is all there is.
        _ => {
            let created = snapshot.applied_at();
            let event = snapshot
                .events_of(snapshot.workload.uid())
                .filter(|event| {
                    event.reason.as_deref() == Some("FailedCreate") && last_seen(event) >= created
                })
                .max_by_key(|event| last_seen(event))?;
            message(event).to_owned()
        }
    };
    let told = told
        .trim_start_matches("(combined from similar events): ")
        .trim_start_matches("Error creating: ");
    let has = |words: &[&str]| words.iter().any(|word| told.contains(word));
    let (id, patience, hint) = if has(&["exceeded quota"]) {
        (
            "quota_exceeded",
            Patience::Quiet(QUOTA_QUIET),
            "ask for less in resources.requests, or raise the namespace's ResourceQuota",
        )
    } else if has(&[
        "failed calling webhook",
        "timeout",
        "connection refused",
        "Internal error",
    ]) {
        (
            "pods_refused",
            Patience::Seen(PASSING),
            "the cluster's admission webhook does not answer; ask the cluster's operator",
        )
    } else if has(&["serviceaccount"]) {
        (
            "service_account_missing",
            Patience::Seen(CONFIGURATION),
            "add the ServiceAccount to the manifests",
        )
    } else if has(&["violates PodSecurity"]) {
        (
            "pod_security",
            Patience::Seen(PERMANENT),
            "set what the message names in securityContext, or ask for another level of the namespace",
        )
    } else if has(&[
        "denied the request",
        "admission webhook",
        "ValidatingAdmissionPolicy",
    ]) {
        (
            "admission_denied",
            Patience::Seen(PERMANENT),
            "an admission rule of this cluster refuses it: mend what it names, or ask the cluster's operator",
        )
    } else if has(&["usage per", "limit to request ratio"]) {
        (
            "limit_range",
            Patience::Seen(PERMANENT),
            "keep resources within the namespace's LimitRange: `kubectl describe limitrange`",
        )
    } else {
        (
            "pods_refused",
            Patience::Seen(PERMANENT),
            "mend what the message names in the pod template",
        )
    };
    // The name of the pod that was not made changes with every try.
    let told = told
        .split_once(" is forbidden: ")
        .map_or(told, |(_, rest)| rest);
    let cause = Cause::new(
        id,
        format!("the cluster refuses the new pods: {}", shortened(told)),
    )
    .hint(hint);
    Some(sign(snapshot.workload.uid(), patience, cause))
}

fn paused(target: &Target, snapshot: &Snapshot) -> Option<Sign> {
    let spec = snapshot.deployment()?.spec.as_ref()?;
    spec.paused.unwrap_or_default().then(|| {
        let object = target.display_name();
        let cause = Cause::new(
            "paused",
            format!("{object} is paused: the cluster does not roll it out"),
        )
        .hint(format!(
            "`kubectl rollout resume {object}`, or take `paused: true` out of the manifest"
        ));
        sign(&target.name, Patience::None, cause)
    })
}

/// Such a workload rolls out when somebody deletes its pods: nobody will.
fn on_delete(target: &Target, snapshot: &Snapshot) -> Option<Sign> {
    let strategy = match &snapshot.workload {
        Workload::StatefulSet(it) => it.spec.as_ref()?.update_strategy.as_ref()?.type_.as_deref(),
        Workload::DaemonSet(it) => it.spec.as_ref()?.update_strategy.as_ref()?.type_.as_deref(),
        _ => None,
    };
    (strategy == Some("OnDelete")).then(|| {
        let cause = Cause::new("update_on_delete", format!("{} has the update strategy OnDelete: its pods stay old until somebody deletes them", target.display_name()))
            .hint("use the update strategy RollingUpdate");
        sign(&target.name, Patience::None, cause)
    })
}

fn fails_liveness(pod: &Pod, snapshot: &Snapshot) -> Option<Sign> {
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
    Some(sign(uid(pod), Patience::UntilDeadline, cause))
}

fn never_ready(pod: &Pod, snapshot: &Snapshot) -> Option<Sign> {
    let containers = Running::all(pod);
    let container = containers
        .iter()
        .find(|container| container.is_running() && !container.status.ready)?;
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
    Some(sign(
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

/// The declared ports of a pod whose probe is refused, other than the refusing one: the program may listen there.
pub fn other_ports(pod: &Pod, events: &[Event]) -> Vec<i32> {
    let refused = events.iter().find(|event| {
        event.involved_object.uid.as_deref() == Some(uid(pod))
            && event.reason.as_deref() == Some("Unhealthy")
            && is_refused(message(event))
    });
    let Some(refused) = refused.filter(|_| !is_ready(pod)) else {
        return Vec::new();
    };
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    containers
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
    let delay = readiness.map_or(0, |probe| {
        i64::from(probe.initial_delay_seconds.unwrap_or(0))
    });
    Duration::from_secs(u64::try_from(startup.max(delay)).unwrap_or_default())
}

/// The manifest's own patience, `progressDeadlineSeconds`, has run out.
fn deadline_exceeded(target: &Target, snapshot: &Snapshot) -> Option<Sign> {
    let deployment = snapshot.deployment()?;
    let condition = deployment
        .status
        .as_ref()?
        .conditions
        .as_ref()?
        .iter()
        .find(|condition| {
            condition.type_ == "Progressing"
                && condition.reason.as_deref() == Some("ProgressDeadlineExceeded")
        })?;
    // The last rollout's may still be there.
    let updated = condition.last_update_time.as_ref().map(|time| time.0);
    if target.changed && updated < snapshot.applied_at() {
        return None;
    }
    let seconds = deployment
        .spec
        .as_ref()?
        .progress_deadline_seconds
        .unwrap_or(600);
    let cause = Cause::new(
        "progress_deadline",
        format!(
            "{} made no progress for {seconds} s (its progressDeadlineSeconds)",
            target.display_name()
        ),
    );
    Some(sign(&target.name, Patience::None, cause))
}

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

fn probe_failure<'a>(pod: &'a Pod, snapshot: &'a Snapshot, probe: &str) -> Option<&'a Event> {
    snapshot
        .events_of(uid(pod))
        .filter(|event| {
            event.reason.as_deref() == Some("Unhealthy") && message(event).starts_with(probe)
        })
        .max_by_key(|event| last_seen(event))
}

fn probe_words(pod: &Pod, snapshot: &Snapshot, probe: &str) -> String {
    probe_failure(pod, snapshot, probe)
        .map(|event| format!(": {}", shortened(message(event))))
        .unwrap_or_default()
}

fn is_about(event: &Event, container: &str) -> bool {
    let path = event
        .involved_object
        .field_path
        .as_deref()
        .unwrap_or_default();
    path.is_empty() || path.ends_with(&format!("{{{container}}}"))
}

pub fn message(event: &Event) -> &str {
    event.message.as_deref().unwrap_or_default()
}

/// When it was last counted; None where the event names no time.
pub fn last_seen(event: &Event) -> Option<jiff::Timestamp> {
    let series = event
        .series
        .as_ref()
        .and_then(|series| series.last_observed_time.as_ref())
        .map(|time| time.0);
    let last = event.last_timestamp.as_ref().map(|time| time.0);
    let first = event.event_time.as_ref().map(|time| time.0);
    let made = event
        .metadata
        .creation_timestamp
        .as_ref()
        .map(|time| time.0);
    series.max(last).or(first).or(made)
}

/// The line of a program's last words that tells most. It need not be the last: stdout and stderr overtake each other,
/// and a trace or a shell's "Killed" may follow.
pub fn last_line(words: &str) -> Option<String> {
    const LOUD: [&str; 3] = ["fatal", "panic", "uncaught"];
    const CLEAR: [&str; 8] = [
        "error",
        "exception",
        "cannot",
        "could not",
        "failed",
        "denied",
        "missing",
        "not found",
    ];
    let lines: Vec<&str> = words
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let with = |marks: &[&str]| {
        lines.iter().rposition(|line| {
            let line = line.to_lowercase();
            marks.iter().any(|mark| line.contains(mark))
        })
    };
    let at = with(&LOUD)
        .or_else(|| with(&CLEAR))
        .or(lines.len().checked_sub(1))?;
    let line = lines.get(at)?;
    // A Rust panic says where first, and what on the next line.
    let goes_on = line.ends_with(':').then(|| lines.get(at + 1)).flatten();
    Some(shortened(&goes_on.map_or_else(
        || (*line).to_owned(),
        |next| format!("{line} {next}"),
    )))
}

/// One line of bounded length: messages of others end up in our sentences.
pub fn shortened(text: &str) -> String {
    let line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(WORDS_CHARS_MAX + 1)
        .collect();
    let line = line.trim().trim_end_matches('.');
    match line.char_indices().nth(WORDS_CHARS_MAX) {
        Some((cut, _)) => format!("{}…", line.get(..cut).unwrap_or(line)),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_telling_line_is_told() {
        for (words, line) in [
            (
                "fatal: DATABASE_URL is not set\nstarting\n",
                "fatal: DATABASE_URL is not set",
            ),
            ("listening\nbye\n\n", "bye"),
            (
                "Traceback (most recent call last):\n  File \"a.py\"\nValueError: bad port",
                "ValueError: bad port",
            ),
            (
                "thread 'main' (7) panicked at src/main.rs:5:1:\nno port\nnote: run with RUST_BACKTRACE=1",
                "thread 'main' (7) panicked at src/main.rs:5:1: no port",
            ),
            (
                "panic: nil map\n\ngoroutine 1 [running]:\nmain.main()\n\t/a/main.go:5 +0x1",
                "panic: nil map",
            ),
            ("panicked\nKilled", "panicked"),
        ] {
            assert_eq!(last_line(words).unwrap(), line);
        }
        assert_eq!(last_line(" \n\n"), None);
        assert!(shortened(&"é\u{7}".repeat(1000)).chars().count() <= WORDS_CHARS_MAX + 1);
    }
}
