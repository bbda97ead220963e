//! The container engine: reaching it, and telling its absence from its answers.
//!
//! The line: connect → agree on a version → can it build? Never starts, restarts or configures an engine.

pub mod registry;

use std::io;
use std::time::Duration;

use bollard::Docker;
use bollard::errors::Error;

use crate::config;

/// How long the engine may take to say which version it is.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For short requests; builds and pushes have their own.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// The first version of the API whose engine has BuildKit (Docker 18.09).
const BUILDKIT_API_MIN: (usize, usize) = (1, 39);

/// Connects and agrees on a version of the API; one attempt.
pub async fn connect(settings: &config::Docker) -> Result<Docker, Error> {
    let docker = match &settings.host {
        Some(host) => Docker::connect_with_host(host),
        None => Docker::connect_with_defaults(),
    }?;
    let docker = docker
        .with_timeout(CONNECT_TIMEOUT)
        .negotiate_version()
        .await?;
    Ok(docker.with_timeout(REQUEST_TIMEOUT))
}

/// Why this engine cannot build images for us, in words for the operator; None where it can.
pub async fn lacks_buildkit(docker: &Docker) -> Result<Option<String>, Error> {
    let version = docker.version().await?;
    let agreed = docker.client_version();
    let is_podman = version
        .components
        .iter()
        .flatten()
        .any(|component| component.name.contains("Podman"));
    if !is_podman && (agreed.major_version, agreed.minor_version) >= BUILDKIT_API_MIN {
        return Ok(None);
    }
    let known = version
        .version
        .as_deref()
        .unwrap_or("of an unknown version");
    Ok(Some(format!(
        "this engine ({known}) has only the classic builder: images are built by BuildKit, which Docker has from 18.09 on (20.10 or newer is recommended)"
    )))
}

/// Whether the connection to the engine, and not its answer, is at fault.
pub fn is_away(error: &Error) -> bool {
    match error {
        Error::IOError { .. }
        | Error::HyperResponseError { .. }
        | Error::HyperLegacyError { .. }
        | Error::RequestTimeoutError
        | Error::SocketNotFoundError(_) => !is_forbidden(error),
        Error::DockerResponseServerError { status_code, .. } => matches!(status_code, 502..=504),
        _ => false,
    }
}

/// Whether this user may not use the engine's socket: no waiting helps.
pub fn is_forbidden(error: &Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = match error {
        // It hides behind the error that it wraps.
        Error::IOError { err } => Some(err),
        error => Some(error),
    };
    while let Some(error) = cause {
        let io = error.downcast_ref::<io::Error>();
        if io.is_some_and(|io| io.kind() == io::ErrorKind::PermissionDenied) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Whether words of a registry, as Docker passes them on, mean that it cannot be reached now.
pub fn registry_is_away(text: &str) -> bool {
    const SIGNS: [&str; 12] = [
        "connection refused",
        "connection reset",
        "no such host",
        "i/o timeout",
        "TLS handshake timeout",
        "network is unreachable",
        "no route to host",
        "server misbehaving",
        "Client.Timeout",
        "unexpected EOF",
        "received unexpected HTTP status: 5",
        "unexpected status: 5",
    ];
    // `unexpected status from HEAD request to https://…: 503 Service Unavailable`.
    let of_request = text.split_once("unexpected status from ");
    let is_5xx = of_request.is_some_and(|(_, answer)| answer.contains(": 5"));
    is_5xx || SIGNS.iter().any(|sign| text.contains(sign)) || text.ends_with(": EOF")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_no_absence() {
        let answer = Error::DockerResponseServerError {
            status_code: 404,
            message: "no such image".to_owned(),
        };
        assert!(!is_away(&answer));
        assert!(is_away(&Error::RequestTimeoutError));
        assert!(is_away(&Error::SocketNotFoundError("/nowhere".to_owned())));
    }

    #[test]
    fn a_socket_that_is_not_ours_is_not_waited_for() {
        let error = Error::IOError {
            err: io::ErrorKind::PermissionDenied.into(),
        };
        assert!(!is_away(&error) && is_forbidden(&error));
    }

    #[test]
    fn a_registry_that_refuses_is_not_away() {
        assert!(registry_is_away(
            "dial tcp 127.0.0.1:1: connect: connection refused"
        ));
        assert!(registry_is_away(
            "received unexpected HTTP status: 503 Service Unavailable"
        ));
        assert!(!registry_is_away("unauthorized: authentication required"));
    }
}
