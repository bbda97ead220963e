//! git, in a process of its own that is killed at its deadline.
//!
//! Ours is `process` (ask, and read the answer) and `tree` (names on disk, each judged); `child` with `remote`,
//! `walk` and `report` runs in the child, and names git2.

pub mod child;
pub mod process;
mod remote;
mod report;
pub mod tree;
mod walk;
