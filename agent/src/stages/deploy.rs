//! Deploy: plan and apply.
