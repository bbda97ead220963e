//! A sign: one thing that is wrong with a rollout, and the patience that it deserves.

use std::time::Duration;

use crate::builds::Cause;

/// What is wrong for good is believed when it has been seen for this long: the cluster's parts hear of each other late.
pub(super) const PERMANENT: Duration = Duration::from_secs(1);
/// A ConfigMap, a key or a ServiceAccount of the same set reaches the kubelet a moment later than its pod.
pub(super) const CONFIGURATION: Duration = Duration::from_millis(1_400);
/// Secrets are also made by operators in the cluster (external-secrets, cert-manager), in seconds; the kubelet tries to start
/// a container again within ten.
const SECRET: Duration = Duration::from_secs(20);
/// To mount a volume it tries again after 0.5, 1, 2, 4, 8 and 16 s.
const SECRET_TO_MOUNT: Duration = Duration::from_secs(35);
/// Something on the way that may pass by itself: a registry that restarts, a webhook that is rolled.
pub(super) const PASSING: Duration = Duration::from_secs(60);

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
    /// Seen for so long while nothing of the workload moved and none of its pods was on its way out. Who failed tries again after
    /// about as long as it has tried: it must be still for as long as it was not.
    Quiet(Duration),
    /// As `Quiet`, of a controller whose waits each are twice the one before: it must be still for half as long again.
    QuietOverRetries(Duration),
    /// Seen for much longer than the last good releases took, and for what its own probes allow.
    Unlike(Duration),
    /// It explains a time-out, and no more.
    UntilDeadline,
}

/// For something that a container needs and that is not there, by the id of the cause.
pub(super) fn of_missing(id: &str, is_volume: bool) -> Patience {
    Patience::Seen(match (id, is_volume) {
        ("secret_missing", false) => SECRET,
        ("secret_missing", true) => SECRET_TO_MOUNT,
        _ => CONFIGURATION,
    })
}

impl Sign {
    pub fn new(of: &str, patience: Patience, cause: Cause) -> Self {
        Self {
            cause,
            patience,
            of: of.to_owned(),
        }
    }
}
