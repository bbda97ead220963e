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

/// `LANDFALL_FAIL_POINT=NAME:COUNT` or `NAME:COUNT:panic`, of the tests: which, when, and whether it panics.
#[cfg(debug_assertions)]
pub fn fail_point() -> Option<(String, u64, bool)> {
    let wanted = std::env::var("LANDFALL_FAIL_POINT").ok()?;
    let (wanted, panics) = match wanted.strip_suffix(":panic") {
        Some(wanted) => (wanted, true),
        None => (wanted.as_str(), false),
    };
    let (name, count) = wanted.rsplit_once(':')?;
    Some((name.to_owned(), count.parse().ok()?, panics))
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

/// The proxy that `HTTPS_PROXY`, `HTTP_PROXY` and `ALL_PROXY` name for requests to this address, unless `NO_PROXY` leaves it out. None
/// leads to this very machine.
pub fn proxy_for(address: &Uri) -> Option<String> {
    proxy_by(address, &|name| std::env::var(name).ok())
}

/// Requests to one address, by the proxy that `proxy_for` speaks of: no proxy must see the token that a request to this very
/// machine holds.
pub fn client_to(url: &str) -> reqwest::ClientBuilder {
    let client = reqwest::Client::builder();
    match is_loopback_url(url) {
        true => client.no_proxy(),
        false => client,
    }
}

/// As `proxy_for`, with the variables given: what tests call.
fn proxy_by(address: &Uri, variable: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    if is_loopback_url(&address.to_string()) {
        return None;
    }
    let value = |name: &str| {
        let either = [name.to_owned(), name.to_lowercase()];
        let mut given = either.iter().filter_map(|name| variable(name));
        given.find(|value| !value.is_empty())
    };
    let scheme = address.scheme_str().unwrap_or("https").to_uppercase();
    let proxy = value(&format!("{scheme}_PROXY")).or_else(|| value("ALL_PROXY"))?;
    let rules = Matcher::builder()
        .all(proxy.clone())
        .no(value("NO_PROXY").unwrap_or_default())
        .build();
    rules.intercept(address)?;
    match proxy.contains("://") {
        true => Some(proxy),
        false => Some(format!("http://{proxy}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_is_for_who_is_neither_here_nor_left_out() {
        let proxy = |address: &str, variables: &[(&str, &str)]| {
            let variable = |name: &str| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            proxy_by(&address.parse().unwrap(), &variable)
        };
        let away = "https://10.1.2.3:6443";
        let given = ("HTTPS_PROXY", "http://me:word@10.9.9.9:3128");
        let through = Some(given.1.to_owned());
        assert_eq!(proxy(away, &[]), None);
        assert_eq!(proxy(away, &[given]), through);
        assert_eq!(proxy("https://127.0.0.1:6443", &[given]), None);
        assert_eq!(proxy("https://localhost:6443", &[given]), None);
        assert_eq!(proxy(away, &[given, ("NO_PROXY", "10.1.0.0/16,")]), None);
        assert_eq!(proxy(away, &[given, ("no_proxy", "10.9.9.9")]), through);
        assert_eq!(
            proxy(
                "https://k.example.org",
                &[given, ("NO_PROXY", "example.org")]
            ),
            None
        );
        let bare = [("HTTPS_PROXY", ""), ("all_proxy", "proxy:3128")];
        assert_eq!(proxy(away, &bare).as_deref(), Some("http://proxy:3128"));
        assert_eq!(proxy(away, &[("HTTP_PROXY", "http://proxy")]), None);
    }
}
