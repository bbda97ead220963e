//! Test containers.
