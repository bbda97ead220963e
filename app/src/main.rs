//! Hello World, and how a server behaves well in Kubernetes: it says when it is
//! ready, it says when it no longer is, and it ends no request half-way.

use axum::http::{StatusCode, header::CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router, routing::get};
use std::{env, future::Future, io, process::ExitCode, time::Duration};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::{sync::watch, time::sleep};

const GREETING: &str = "Hello, World!";

const HEALTHY: &str = r#"{"status":"healthy","message":"Service is running"}"#;
const READY: &str = r#"{"status":"ready","message":"Service is ready to accept traffic"}"#;
const LEAVING: &str = r#"{"status":"leaving","message":"Service is shutting down"}"#;

/// How long it still accepts after SIGTERM, so that balancers see `/ready` fail before connections do.
const LINGER: Duration = Duration::from_secs(5);
/// How long requests that are under way may then take.
const DRAIN: Duration = Duration::from_secs(10);

#[derive(Clone, Copy, PartialEq)]
enum Phase {
    Serving,
    Leaving,
    Draining,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let port = env::var("PORT").unwrap_or_else(|_| "5000".into());
    let Ok(port) = port.parse::<u16>() else {
        eprintln!("PORT must be a number from 0 to 65535, not {port:?}");
        return ExitCode::from(2);
    };
    match run(port).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot serve on port {port}: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(port: u16) -> io::Result<()> {
    // Before the first connection, so that no signal falls between.
    let (mut term, mut int) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    let listener = TcpListener::bind(("0.0.0.0", port)).await?;
    println!("listening on {}", listener.local_addr()?);
    let stop = async move {
        tokio::select! {
            _ = term.recv() => LINGER,
            _ = int.recv() => Duration::ZERO, // Ctrl-C: no balancer to tell
        }
    };
    serve(listener, stop, DRAIN).await
}

/// Serves until `stop` resolves, lingers for as long as it says, then drains for at most `drain`.
async fn serve(
    listener: TcpListener,
    stop: impl Future<Output = Duration>,
    drain: Duration,
) -> io::Result<()> {
    let (phase, seen) = watch::channel(Phase::Serving);
    let mut closing = seen.clone();
    let server = axum::serve(listener, router(seen)).with_graceful_shutdown(async move {
        drop(closing.wait_for(|p| *p == Phase::Draining).await);
    });
    let shutdown = async {
        let linger = stop.await;
        phase.send_replace(Phase::Leaving);
        sleep(linger).await;
        phase.send_replace(Phase::Draining);
        sleep(drain).await;
    };
    tokio::select! {
        ended = server => ended,
        () = shutdown => Ok(()),
    }
}

fn router(phase: watch::Receiver<Phase>) -> Router {
    let commit = env::var("GIT_COMMIT").unwrap_or_else(|_| "unknown".into());
    let version =
        serde_json::json!({ "commit": commit, "started_at": jiff::Timestamp::now().to_string() });
    let ready = move || async move {
        match *phase.borrow() {
            Phase::Serving => json(StatusCode::OK, READY),
            Phase::Leaving | Phase::Draining => json(StatusCode::SERVICE_UNAVAILABLE, LEAVING),
        }
    };
    Router::new()
        .route("/", get(GREETING))
        .route("/health", get(async || json(StatusCode::OK, HEALTHY)))
        .route("/ready", get(ready))
        .route("/version", get(Json(version)))
}

fn json(status: StatusCode, body: &'static str) -> Response {
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}

#[cfg(test)]
mod tests;
