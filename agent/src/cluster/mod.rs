//! The cluster: what is asked of the API server (`apply`, `observe`), and what is judged without it (`policy`, `rollout`).
pub mod policy;
