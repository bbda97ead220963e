//! What is read of the environment beside agent.yaml.

use std::path::PathBuf;

use hyper::Uri;
use hyper_util::client::proxy::matcher::Matcher;

use super::is_loopback_url;

/// Where a program of this machine is, by its PATH.
pub fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let mut found = std::env::split_paths(&path).map(|folder| folder.join(name));
    found.find(|program| program.is_file())
}

/// What the git process keeps of the environment: where programs and certificate authorities are.
pub fn variables_for_git() -> impl Iterator<Item = (&'static str, std::ffi::OsString)> {
    ["PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"]
        .into_iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)))
}

/// `LANDFALL_FAIL_POINT=NAME:COUNT`, of the tests.
#[cfg(debug_assertions)]
pub fn fail_point() -> Option<(String, u64)> {
    let wanted = std::env::var("LANDFALL_FAIL_POINT").ok()?;
    let (name, count) = wanted.rsplit_once(':')?;
    Some((name.to_owned(), count.parse().ok()?))
}

/// Which of our own lines the operator wants to see: `LANDFALL_LOG`, then `RUST_LOG`, in the words of `EnvFilter`.
pub fn log_filter() -> Option<String> {
    let variable = |name| {
        std::env::var(name)
            .ok()
            .filter(|text: &String| !text.is_empty())
    };
    variable("LANDFALL_LOG").or_else(|| variable("RUST_LOG"))
}

/// Whether `NO_COLOR`, or a terminal that knows none, forbids colours.
pub fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
        || std::env::var_os("TERM").is_some_and(|value| value == "dumb")
}

/// Whether `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY` send requests for this address to a proxy. None leads to this very
/// machine.
pub fn is_proxied(address: &Uri) -> bool {
    !is_loopback_url(&address.to_string()) && Matcher::from_env().intercept(address).is_some()
}
