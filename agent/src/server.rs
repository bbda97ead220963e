//! The accept loop, its limits, shutdown and routes.
//!
//! Web handlers start no work: they read the store, or write a row that the queue will find. Own loop, since
//! `axum::serve` sets no time-out for headers: a connection that says nothing is closed after `HEADER_TIMEOUT`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use base64::Engine;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;

use crate::app::App;
use crate::config::{Config, ReadAccess};
use crate::{api, dashboard, metrics, webhook};

const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Whoever takes nothing of an answer for so long is gone. A person may look at the beginning of a long log meanwhile.
const UNREAD_MAX: Duration = Duration::from_secs(300);
const CONNECTIONS_MAX: u64 = 12_000;
/// Open files that no connection may take: the store, the engine, the cluster, git.
const FILES_KEPT: u64 = 256;
/// How long open requests may go on once the agent stops.
const DRAIN: Duration = Duration::from_secs(5);
/// Who was accepted a moment ago has not said anything yet, and would be hung up on.
const FIRST_WORDS: Duration = Duration::from_millis(200);

/// Page, API and, where it has no listener of its own, the webhook.
pub fn routes(app: App) -> Router {
    let mut routes = Router::new()
        .merge(dashboard::router())
        .merge(api::router())
        .merge(health())
        .route("/metrics", get(metrics::render));
    if app.config.webhook_listen.is_none() {
        routes = routes.route("/webhook", post(webhook::receive));
    }
    finish(routes, app)
}

/// The webhook and nothing else, for the listener that is seen from outside.
pub fn webhook_routes(app: App) -> Router {
    finish(
        Router::new()
            .route("/webhook", post(webhook::receive))
            .merge(health()),
        app,
    )
}

fn health() -> Router<App> {
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
}

async fn readyz(State(app): State<App>) -> Response {
    match app.store.ping().await {
        Ok(()) if !app.shutdown.is_cancelled() => "ready\n".into_response(),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response(),
    }
}

fn finish(routes: Router<App>, app: App) -> Router {
    routes
        .layer(from_fn_with_state(app.clone(), guard))
        .layer(CatchPanicLayer::new())
        .with_state(app)
}

/// Binds, or says who is to move: the address is in use, and which variable changes it.
pub async fn bind(address: SocketAddr, variable: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!("cannot listen on {address}: stop what listens there, or choose another address with {variable} or in agent.yaml")
    })
}

/// What all listeners of a process share.
#[derive(Clone)]
pub struct Limits {
    connections: Arc<Semaphore>,
    /// How long an answer may wait for who asked for it.
    pub unread: Duration,
}

impl Limits {
    pub fn of_process() -> Self {
        Self {
            connections: Arc::new(Semaphore::new(connections_max())),
            unread: UNREAD_MAX,
        }
    }
}

/// Serves until `shutdown` fires, then lets open requests end for at most `DRAIN`.
pub async fn serve(
    listener: TcpListener,
    routes: Router,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let graceful = GracefulShutdown::new();
    loop {
        let permit = tokio::select! {
            () = shutdown.cancelled() => break,
            permit = Arc::clone(&limits.connections).acquire_owned() => permit,
        };
        let Ok(permit) = permit else { break };
        let stream = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(limits.unread));
        let connection = http.serve_connection(
            TokioIo::new(Box::pin(stream)),
            TowerToHyperService::new(routes.clone()),
        );
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
            drop(permit);
        });
    }
    // Who comes now is for the next agent, where the socket is systemd's.
    drop(listener);
    tokio::time::sleep(FIRST_WORDS).await;
    let _ = tokio::time::timeout(DRAIN, graceful.shutdown()).await;
}

/// As many as there may be open files, once the process has asked for as many as it may have.
fn connections_max() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let allowed = limit.maximum.unwrap_or(u64::MAX);
    let wanted = allowed.min(CONNECTIONS_MAX + FILES_KEPT);
    let current = limit.current.unwrap_or(u64::MAX).max(wanted);
    let raised = Rlimit {
        current: Some(current),
        maximum: limit.maximum,
    };
    let files = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => current,
        Err(_) => limit.current.unwrap_or(u64::MAX),
    };
    let connections = files.saturating_sub(FILES_KEPT).clamp(1, CONNECTIONS_MAX);
    usize::try_from(connections).unwrap_or(usize::MAX)
}

/// Who may ask what: Host and Origin against DNS rebinding and foreign pages, the token for writes, `read_access` for
/// reads. `/webhook` proves itself by its signature; health and metrics say nothing secret.
async fn guard(State(app): State<App>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let open = matches!(path, "/webhook" | "/healthz" | "/readyz" | "/metrics");
    if !open && let Err((status, why)) = admit(&app, request.method(), request.headers()) {
        let mut response =
            (status, axum::Json(serde_json::json!({ "error": why }))).into_response();
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(
                header::WWW_AUTHENTICATE,
                HeaderValue::from_static("Basic realm=\"landfall\""),
            );
        }
        return with_headers(response);
    }
    with_headers(next.run(request).await)
}

fn admit(
    app: &App,
    method: &Method,
    headers: &HeaderMap,
) -> Result<(), (StatusCode, &'static str)> {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or_default();
    if !is_our_host(&app.config, host) {
        return Err((
            StatusCode::MISDIRECTED_REQUEST,
            "this host is not served here: set `public_url` in agent.yaml",
        ));
    }
    if let Some(origin) = headers.get(header::ORIGIN) {
        let host = origin
            .to_str()
            .ok()
            .and_then(|origin| origin.split_once("://"))
            .map_or("", |(_, host)| host);
        if !is_our_host(&app.config, host) {
            return Err((StatusCode::FORBIDDEN, "a request from another site"));
        }
    }
    let reads = matches!(*method, Method::GET | Method::HEAD);
    if reads && app.config.read_access != ReadAccess::Token {
        return Ok(());
    }
    let given = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let token = match given.split_once(' ') {
        Some(("Bearer", token)) => Some(token.to_owned()),
        // So that a browser can ask a person for it; never for writes, which another site could then make.
        Some(("Basic", encoded)) if reads => basic_password(encoded),
        _ => None,
    };
    match token {
        Some(token) if is_same(&token, &app.admin_token) => Ok(()),
        _ => Err((
            StatusCode::UNAUTHORIZED,
            "needs `Authorization: Bearer` with the token of data_dir/admin-token",
        )),
    }
}

fn basic_password(encoded: &str) -> Option<String> {
    let decoded = base64::engine::general_purpose::STANDARD
        .decode(encoded)
        .ok()?;
    String::from_utf8(decoded)
        .ok()?
        .split_once(':')
        .map(|(_, password)| password.to_owned())
}

/// Compares digests: how long it takes says nothing about the token.
fn is_same(given: &str, expected: &str) -> bool {
    Sha256::digest(given) == Sha256::digest(expected)
}

/// A loopback name, the address that is listened on, or the host of `public_url`.
fn is_our_host(config: &Config, host: &str) -> bool {
    let name = host
        .rsplit_once(':')
        .filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()))
        .map_or(host, |(name, _)| name);
    let public = config
        .public_url
        .as_deref()
        .and_then(|url| url::Url::parse(url).ok());
    matches!(name, "localhost" | "127.0.0.1" | "[::1]")
        || host.parse() == Ok(config.listen)
        || public
            .as_ref()
            .and_then(url::Url::host_str)
            .is_some_and(|ours| ours.eq_ignore_ascii_case(name))
}

fn with_headers(mut response: Response) -> Response {
    let headers = response.headers_mut();
    let fixed = [
        (
            header::CONTENT_SECURITY_POLICY,
            dashboard::CONTENT_SECURITY_POLICY,
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        ),
    ];
    for (name, value) in fixed {
        headers
            .entry(name)
            .or_insert(HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn who_comes_when_all_connections_are_taken_waits_for_one() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let limits = Limits {
            connections: Arc::new(Semaphore::new(2)),
            unread: UNREAD_MAX,
        };
        let routes = Router::new().route("/", get(async || "here"));
        let shutdown = CancellationToken::new();
        let served = tokio::spawn(serve(listener, routes, limits, shutdown.clone()));
        let held = TcpStream::connect(address).await.unwrap();
        let _also_held = TcpStream::connect(address).await.unwrap();
        let mut waits = TcpStream::connect(address).await.unwrap();
        let request = b"GET / HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n";
        waits.write_all(request).await.unwrap();
        let mut answer = String::new();
        let read = timeout(
            Duration::from_millis(300),
            waits.read_to_string(&mut answer),
        );
        assert!(read.await.is_err(), "answered beyond the limit: {answer}");
        drop(held);
        waits.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("here"), "{answer}");
        shutdown.cancel();
        served.await.unwrap();
    }
}
