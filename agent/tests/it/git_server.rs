//! git over HTTP for tests and the demo: `git http-backend` behind axum, serving one folder of bare repositories.
//!
//! Clones and pushes are streamed through and run the repositories' hooks. Only for a loopback address: without a
//! token whoever reaches it may push.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Response, StatusCode, header};
use base64::Engine;
use futures_util::StreamExt;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};

/// The body of one push.
const BODY_BYTES_MAX: u64 = 1 << 30;
/// The headers that `git http-backend` answers.
const HEADER_BYTES_MAX: u64 = 16 * 1024;
/// One clone or push.
const REQUEST_MAX: Duration = Duration::from_secs(600);

/// A server that runs until it is dropped.
pub struct GitServer {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

struct Shared {
    root: PathBuf,
    token: Option<String>,
    requests: AtomicUsize,
    /// Not zero: what is answered instead of git.
    broken: AtomicU16,
}

impl GitServer {
    /// Serves `root/*.git`. With a token every request needs it as the password of Basic authentication.
    pub async fn start(
        root: &Path,
        listen: SocketAddr,
        token: Option<&str>,
    ) -> std::io::Result<Self> {
        assert!(
            listen.ip().is_loopback(),
            "{listen} is not a loopback address"
        );
        let listener = tokio::net::TcpListener::bind(listen).await?;
        let shared = Arc::new(Shared {
            root: std::path::absolute(root)?,
            token: token.map(str::to_owned),
            requests: AtomicUsize::new(0),
            broken: AtomicU16::new(0),
        });
        let routes = axum::Router::new()
            .fallback(serve)
            .with_state(shared.clone());
        Ok(Self {
            address: listener.local_addr()?,
            shared,
            task: tokio::spawn(async move {
                let _ = axum::serve(listener, routes).await;
            }),
        })
    }

    pub fn url(&self, repository: &str) -> String {
        format!("http://{}/{repository}", self.address)
    }

    /// How many requests came.
    pub fn requests(&self) -> usize {
        self.shared.requests.load(Ordering::SeqCst)
    }

    /// Answers this status to everything; 0 is git again.
    pub fn answer_only(&self, status: u16) {
        self.shared.broken.store(status, Ordering::SeqCst);
    }

    /// Until it ends by itself, which it does not: what the demo waits on.
    #[allow(dead_code)]
    pub async fn run(mut self) {
        let _ = (&mut self.task).await;
    }
}

impl Drop for GitServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(State(shared): State<Arc<Shared>>, request: Request) -> Response<Body> {
    shared.requests.fetch_add(1, Ordering::SeqCst);
    let broken = shared.broken.load(Ordering::SeqCst);
    if broken != 0 {
        return plain(StatusCode::from_u16(broken).unwrap(), "as the test wishes");
    }
    if !is_loopback_host(request.headers()) {
        return plain(
            StatusCode::MISDIRECTED_REQUEST,
            "this host is not served here",
        );
    }
    if !may_enter(&shared, request.headers()) {
        let mut refusal = plain(StatusCode::UNAUTHORIZED, "a token is needed");
        let realm = header::HeaderValue::from_static("Basic realm=\"git\"");
        refusal
            .headers_mut()
            .insert(header::WWW_AUTHENTICATE, realm);
        return refusal;
    }
    match bridge(&shared, request).await {
        Ok(answer) => answer,
        Err(error) => plain(StatusCode::BAD_GATEWAY, &error.to_string()),
    }
}

/// A page that names this machine by a name of its own (DNS rebinding) must not push.
fn is_loopback_host(headers: &HeaderMap) -> bool {
    let host = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
        .unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    matches!(name, "127.0.0.1" | "localhost") || name.ends_with(".localhost")
}

fn plain(status: StatusCode, text: &str) -> Response<Body> {
    let mut answer = Response::new(Body::from(format!("{text}\n")));
    *answer.status_mut() = status;
    answer
}

fn may_enter(shared: &Shared, headers: &HeaderMap) -> bool {
    let Some(token) = &shared.token else {
        return true;
    };
    let given = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok()?.strip_prefix("Basic "))
        .and_then(|text| base64::engine::general_purpose::STANDARD.decode(text).ok())
        .and_then(|bytes| String::from_utf8(bytes).ok());
    given.is_some_and(|text| {
        text.split_once(':')
            .is_some_and(|(_, password)| password == token)
    })
}

async fn bridge(shared: &Shared, request: Request) -> std::io::Result<Response<Body>> {
    let (head, body) = request.into_parts();
    let path = percent_encoding::percent_decode_str(head.uri.path()).decode_utf8_lossy();
    if path.split('/').any(|part| part == "..") {
        return Ok(plain(StatusCode::BAD_REQUEST, "no such path"));
    }
    let text = |name: &str| {
        let value = head.headers.get(name);
        value
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
            .unwrap_or_default()
    };
    let mut command = Command::new("git");
    command
        .arg("http-backend")
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("GIT_PROJECT_ROOT", &shared.root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("REQUEST_METHOD", head.method.as_str())
        .env("PATH_INFO", path.as_ref())
        .env("QUERY_STRING", head.uri.query().unwrap_or_default())
        .env("CONTENT_TYPE", text("content-type"))
        .env("HTTP_CONTENT_ENCODING", text("content-encoding"))
        .env("GIT_PROTOCOL", text("git-protocol"))
        .env("REMOTE_ADDR", "127.0.0.1");
    if let Some(length) = head.headers.get(header::CONTENT_LENGTH) {
        command.env("CONTENT_LENGTH", length.to_str().unwrap_or_default());
    }
    let settings = [
        ("http.receivepack", "true"),
        ("uploadpack.allowReachableSHA1InWant", "true"),
        ("safe.directory", "*"),
    ];
    command.env("GIT_CONFIG_COUNT", settings.len().to_string());
    for (index, (key, value)) in settings.iter().enumerate() {
        command.env(format!("GIT_CONFIG_KEY_{index}"), key);
        command.env(format!("GIT_CONFIG_VALUE_{index}"), value);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    tokio::spawn(feed(body, stdin));
    let mut stdout = BufReader::new(stdout);
    let answer = read_head(&mut stdout).await?;
    tokio::spawn(reap(child));
    Ok(answer
        .body(Body::from_stream(tokio_util::io::ReaderStream::new(stdout)))
        .unwrap())
}

async fn feed(body: Body, mut stdin: ChildStdin) {
    let mut stream = body.into_data_stream();
    let mut left = BODY_BYTES_MAX;
    while let Some(Ok(piece)) = stream.next().await {
        left = left.saturating_sub(piece.len() as u64);
        if left == 0 || stdin.write_all(&piece).await.is_err() {
            return;
        }
    }
}

/// Its end comes with the end of its output, or by the clock.
async fn reap(mut child: Child) {
    let _ = tokio::time::timeout(REQUEST_MAX, child.wait()).await;
}

async fn read_head(
    stdout: &mut (impl AsyncBufRead + Unpin),
) -> std::io::Result<axum::http::response::Builder> {
    let mut answer = Response::builder();
    let mut limited = stdout.take(HEADER_BYTES_MAX);
    loop {
        let mut line = String::new();
        if limited.read_line(&mut line).await? == 0 {
            return Err(std::io::Error::other("git http-backend said nothing"));
        }
        let line = line.trim_end();
        if line.is_empty() {
            return Ok(answer);
        }
        match line.split_once(": ") {
            Some(("Status", status)) => {
                answer = answer.status(status.split(' ').next().unwrap_or("500"));
            }
            Some((name, value)) => answer = answer.header(name, value),
            None => return Err(std::io::Error::other("git http-backend said no header")),
        }
    }
}
