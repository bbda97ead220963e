//! The signs of one container: it died, or it does not get as far as to run.

use std::time::Duration;

use k8s_openapi::api::core::v1::Event;

use super::probes::probe_words;
use super::sign::{PASSING, PERMANENT, Patience, Sign, of_missing};
use super::snapshot::{Death, Running, Snapshot, name, uid};
use super::words::{is_about, last_line, last_seen, message, shortened};
use crate::builds::Cause;

/// The container runtime was asked and failed; it is asked again within this.
const RUNTIME: Duration = Duration::from_secs(10);
/// So often a container of one pod dies before the release is called dead.
pub const DEATHS_MAX: i32 = 2;

/// A container that died: twice is a verdict, once explains.
pub(super) fn died(container: &Running<'_>, snapshot: &Snapshot, deaths: i32) -> Option<Sign> {
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
    } else if let Some(hook) = failed_hook(container, snapshot, death) {
        let sentence = format!("{who} was ended {often} because its postStart hook failed{hook}");
        Cause::new("hook_failed", sentence)
            .hint("run the command of `lifecycle: postStart` by hand in the image: what it writes is in no log")
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
    Some(Sign::new(&of(container), patience, cause))
}

/// What the kubelet says of a `postStart` hook that failed, for which it ended the container. It may say no more than that. In a
/// program that has ended by itself the hook fails too.
fn failed_hook(container: &Running<'_>, snapshot: &Snapshot, death: Death<'_>) -> Option<String> {
    if !matches!(death.exit_code, 0 | 129..) {
        return None;
    }
    let told = snapshot.events_of(uid(container.pod)).find(|event| {
        event.reason.as_deref() == Some("FailedPostStartHook")
            && is_about(event, &container.status.name)
            && last_seen(event) >= death.began
    })?;
    let says = message(told);
    Some(match says == "PostStartHook failed" {
        true => String::new(),
        false => format!(": {}", shortened(says)),
    })
}

pub(super) fn of(container: &Running<'_>) -> String {
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
pub(super) fn waits(container: &Running<'_>) -> Option<Sign> {
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
        "CreateContainerConfigError" => {
            let id = missing_config(message);
            (
                of_missing(id, false),
                Cause::new(
                    id,
                    format!("{who} cannot be configured: {}", shortened(message)),
                )
                .hint(
                    "add the missing ConfigMap, Secret or key to the namespace or to the manifests",
                ),
            )
        }
        "RunContainerError" | "CreateContainerError" | "PreStartHookError" => {
            (Patience::Seen(RUNTIME), cannot_start(&who, message))
        }
        _ => return None,
    };
    Some(Sign::new(&of(container), patience, cause))
}

/// A pull that has neither come to an end nor failed: a large image, or a registry that takes connections and says nothing.
pub(super) fn pulls(container: &Running<'_>, snapshot: &Snapshot) -> Option<Sign> {
    container
        .waiting()
        .filter(|(reason, _)| matches!(*reason, "ContainerCreating" | "PodInitializing"))?;
    let is_pulling = |event: &Event| event.reason.as_deref() == Some("Pulling");
    // Times of events are whole seconds: of two in one second the end of a pull is the later.
    let newest = snapshot
        .events_of(uid(container.pod))
        .filter(|event| {
            let reason = event.reason.as_deref().unwrap_or_default();
            matches!(reason, "Pulling" | "Pulled" | "Failed" | "BackOff")
                && event.involved_object.field_path.is_some()
                && is_about(event, &container.status.name)
        })
        .max_by_key(|event| (last_seen(event), !is_pulling(event)))?;
    let image = container.spec?.image.as_deref()?;
    is_pulling(newest).then(|| {
        let who = container.display_name();
        let sentence = format!("the node is still pulling the image {image} of {who}");
        let cause = Cause::new("image_pull_slow", sentence).hint(
            "check how large the image is, and that the cluster's nodes reach the registry; `verify: timeout_seconds` gives it more time",
        );
        Sign::new(&of(container), Patience::UntilDeadline, cause)
    })
}

/// What a container waits for: `secret "x" not found`, `couldn't find key k in ConfigMap ns/x`.
pub(super) fn missing_config(message: &str) -> &'static str {
    let lower = message.to_lowercase();
    let has = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    if has(&[
        "find key",
        "non-existent config key",
        "non-existent secret key",
    ]) {
        "config_key_missing"
    } else if has(&["configmap \""]) {
        // Its own name, or the volume's, may hold the word.
        "config_map_missing"
    } else if has(&["secret"]) {
        "secret_missing"
    } else if has(&["configmap"]) {
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
