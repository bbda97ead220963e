//! Verify: watch the rollout.
