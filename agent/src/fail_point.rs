//! Fail points: where a test may end the agent as `kill -9` does, after a durable write or an effect outside.
//!
//! `LANDFALL_FAIL_POINT=NAME:COUNT` ends it when the point of that name is passed for the COUNT-th time; the name `*` is any
//! but that of log lines, which are many. With `:panic` behind it the point panics instead. Nothing of this is in a release build. `tests/it/trial.rs` finds the names in the
//! sources.

/// Passes the point; may not come back.
#[cfg(debug_assertions)]
pub fn at(name: &'static str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static WANTED: LazyLock<Option<(String, u64, bool)>> = LazyLock::new(crate::config::fail_point);
    static PASSED: AtomicU64 = AtomicU64::new(0);

    let is_meant = |wanted: &str| match wanted {
        "*" => name != "store: append_log",
        wanted => wanted == name,
    };
    if let Some((wanted, count, panics)) = &*WANTED
        && is_meant(wanted)
        && PASSED.fetch_add(1, Ordering::SeqCst) + 1 == *count
    {
        assert!(!panics, "as a test wishes at {name}");
        eprintln!("ended at fail point {name}");
        let _ =
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // The signal is on its way.
        loop {
            std::thread::park();
        }
    }
}

/// Passes the point.
#[cfg(not(debug_assertions))]
pub const fn at(_name: &'static str) {}
