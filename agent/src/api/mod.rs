//! The JSON API: what the store says, and the few rows that a person may write.
//!
//! The line: `request → store → answer`. Starts no work: a build that is asked for here is a row that the queue finds.
//! Host, Origin and token were checked by server.rs before any of this runs.

pub mod environments;
pub mod filter;
pub mod live;
pub mod window;

use std::io;
use std::sync::Arc;

use anyhow::Context;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{DefaultBodyLimit, Path, RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Extension, Router};
use futures_util::{Stream, stream};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::app::App;
use crate::builds::{Build, BuildKind, Push, StageRow, Status, is_commit_id};
use crate::config::{Config, Environment};
use crate::store::{Filter, Store};

/// What a request of this API may weigh.
const BODY_BYTES_MAX: usize = 16 * 1024;
/// How much of a log is in memory for one reader.
pub const LOG_READ_BYTES_MAX: usize = 256 * 1024;
/// Who asked, where only the token is known.
const ADMIN: &str = "admin";
const NO_COMMIT: &str = "0000000000000000000000000000000000000000";

pub fn router() -> Router<App> {
    Router::new()
        .route("/api/builds", get(list).post(create))
        .route("/api/builds/{id}", get(one))
        .route("/api/builds/{id}/log", get(log))
        .route(
            "/api/builds/{id}/log/live",
            get(live::live).layer(Extension(Arc::<window::Windows>::default())),
        )
        .route("/api/builds/{id}/cancel", post(cancel))
        .route("/api/builds/{id}/rerun", post(rerun))
        .route("/api/builds/{id}/evidence", get(evidence))
        .route("/api/builds/{id}/plan", get(plan))
        .route("/api/environments", get(environments::list))
        .route(
            "/api/environments/{name}/releases",
            get(environments::releases),
        )
        .route("/api/environments/{name}/undo", post(environments::undo))
        .route("/api/environments/{name}/redo", post(environments::redo))
        .route("/api/environments/{name}/pin", post(environments::pin))
        .route("/api/environments/{name}/unpin", post(environments::unpin))
        .route("/api/openapi.json", get(openapi))
        .route("/api", any(unknown_path))
        .route("/api/{*rest}", any(unknown_path))
        .method_not_allowed_fallback(async || {
            ApiError::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this path has no such method",
            )
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
}

/// An answer that is no success: `{"error": …, "hint": …}`.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    error: String,
    hint: Option<String>,
}

impl ApiError {
    pub fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self {
            status,
            error: error.into(),
            hint: None,
        }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn no_such_build() -> Self {
        Self::new(StatusCode::NOT_FOUND, "there is no such build")
            .hint("GET /api/builds lists what there is")
    }
}

impl From<anyhow::Error> for ApiError {
    fn from(error: anyhow::Error) -> Self {
        tracing::error!("cannot answer a request: {error:#}");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the agent cannot read or write its store",
        )
        .hint("the agent's own log says why")
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = json!({"error": self.error, "hint": self.hint});
        (self.status, axum::Json(body)).into_response()
    }
}

/// The number in a path, or none where it is no number: such a path does not exist.
pub type IdPath = Result<Path<String>, PathRejection>;

/// A build's number: digits only, so that every build has one address.
pub fn build_id(path: &IdPath) -> Option<i64> {
    let text = path.as_ref().ok()?.as_str();
    let is_plain = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    is_plain.then(|| text.parse().ok()).flatten()
}

/// The build that a path names.
pub async fn find(store: &Store, path: &IdPath) -> Result<Build, ApiError> {
    let id = build_id(path).ok_or_else(ApiError::no_such_build)?;
    store.build(id).await?.ok_or_else(ApiError::no_such_build)
}

/// A build as the API shows it, with a link to its page.
pub fn view(config: &Config, build: &Build) -> anyhow::Result<Value> {
    let mut view = serde_json::to_value(build).context("cannot write a build as JSON")?;
    if let Some(fields) = view.as_object_mut() {
        fields.insert(
            "page".to_owned(),
            format!("{}/builds/{}", config.base_url(), build.id).into(),
        );
        if let Some(cause) = fields.get_mut("cause").and_then(Value::as_object_mut) {
            for field in ["object", "hint"] {
                cause.entry(field).or_insert(Value::Null);
            }
        }
    }
    Ok(view)
}

/// As `view`, with the stages.
pub fn full_view(config: &Config, build: &Build, stages: &[StageRow]) -> anyhow::Result<Value> {
    let mut view = view(config, build)?;
    if let Some(fields) = view.as_object_mut() {
        fields.insert("stages".to_owned(), serde_json::to_value(stages)?);
    }
    Ok(view)
}

async fn list(
    State(app): State<App>,
    RawQuery(query): RawQuery,
) -> Result<axum::Json<Value>, ApiError> {
    let filter = filter::parse(query.as_deref())
        .map_err(|problem| ApiError::new(StatusCode::BAD_REQUEST, problem))?;
    if let Some(name) = filter.environment.as_deref() {
        // An environment that was taken out of agent.yaml keeps its builds.
        let is_known = app.config.environment(name).is_some()
            || newest(&app.store, name, None).await?.is_some();
        if !is_known {
            return Err(unknown_environment(
                &app.config,
                name,
                StatusCode::BAD_REQUEST,
            ));
        }
    }
    let (builds, next) = filter::page(&app.store, &filter).await?;
    let builds = builds
        .iter()
        .map(|build| view(&app.config, build))
        .collect::<anyhow::Result<Vec<Value>>>()?;
    Ok(axum::Json(json!({"builds": builds, "next": next})))
}

async fn one(State(app): State<App>, path: IdPath) -> Result<axum::Json<Value>, ApiError> {
    let build = find(&app.store, &path).await?;
    let stages = app.store.stages(build.id).await?;
    Ok(axum::Json(full_view(&app.config, &build, &stages)?))
}

/// The log as it stands, byte for byte as it was stored.
async fn log(State(app): State<App>, path: IdPath) -> Result<Response, ApiError> {
    let build = find(&app.store, &path).await?;
    let disposition = format!("inline; filename=\"landfall-{}.log\"", build.id);
    let headers = [
        (header::CONTENT_TYPE, "text/plain; charset=utf-8"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-cache"),
        (header::CONTENT_DISPOSITION, disposition.as_str()),
    ];
    let body = Body::from_stream(log_bytes(app.store, build.id));
    Ok((headers, body).into_response())
}

/// Reads on only when the reader has taken what came before.
fn log_bytes(store: Store, build_id: i64) -> impl Stream<Item = io::Result<Bytes>> {
    stream::try_unfold((store, 1), move |(store, from)| async move {
        let lines = store
            .read_log(build_id, from, LOG_READ_BYTES_MAX)
            .await
            .map_err(|error| {
                tracing::error!("cannot read the log of build #{build_id}: {error:#}");
                io::Error::other("cannot read the log")
            })?;
        let Some(last) = lines.last() else {
            return Ok(None);
        };
        let next = last.number + 1;
        let bytes: Vec<u8> = lines.into_iter().flat_map(|line| line.bytes).collect();
        Ok(Some((Bytes::from(bytes), (store, next))))
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ManualBuild {
    environment: String,
    #[serde(default)]
    branch: Option<String>,
    #[serde(default)]
    commit: Option<String>,
}

async fn create(
    State(app): State<App>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let asked = manual_build(body)?;
    let Some(environment) = app.config.environment(&asked.environment) else {
        return Err(unknown_environment(
            &app.config,
            &asked.environment,
            StatusCode::NOT_FOUND,
        ));
    };
    let push = manual_push(environment, &asked)?;
    enqueue(&app, &environment.name, &push, BuildKind::Manual).await
}

fn read_body(body: Result<Bytes, BytesRejection>) -> Result<Bytes, ApiError> {
    body.map_err(|rejection| {
        ApiError::new(
            rejection.status(),
            format!("cannot read the body (at most {BODY_BYTES_MAX} bytes)"),
        )
    })
}

fn manual_build(body: Result<Bytes, BytesRejection>) -> Result<ManualBuild, ApiError> {
    let body = read_body(body)?;
    serde_json::from_slice(&body).map_err(|error| {
        ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the body is not what is expected: {error}"),
        )
        .hint(
            r#"send {"environment": "hello", "branch": "main"}, or "commit" in place of "branch""#,
        )
    })
}

/// What a delivery would have said. Without a commit the branch's head is built, as checkout finds it.
fn manual_push(environment: &Environment, asked: &ManualBuild) -> Result<Push, ApiError> {
    let name = &environment.name;
    let bad_request = |problem: String| Err(ApiError::new(StatusCode::BAD_REQUEST, problem));
    if asked.branch.is_none() && asked.commit.is_none() {
        return bad_request("neither a branch nor a commit is given".to_owned());
    }
    if let Some(branch) = asked
        .branch
        .as_ref()
        .filter(|name| **name != environment.branch)
    {
        return bad_request(format!(
            "{name:?} takes branch {:?} only, not {branch:?}",
            environment.branch
        ));
    }
    let commit = asked
        .commit
        .as_deref()
        .unwrap_or_default()
        .to_ascii_lowercase();
    if asked.commit.is_some() && !is_commit_id(&commit) {
        return bad_request(format!(
            "{commit:?} is no commit: a commit has all of its 40 hex digits (`git rev-parse` prints them)"
        ));
    }
    Ok(as_pushed(environment, commit, String::new()))
}

/// What a delivery would have said, had a person pushed it.
fn as_pushed(environment: &Environment, commit: String, title: String) -> Push {
    Push {
        repository_id: None,
        repository: environment.repository.clone(),
        branch: environment.branch.clone(),
        before: NO_COMMIT.to_owned(),
        after: commit,
        pusher: ADMIN.to_owned(),
        title,
        pushed_at: None,
    }
}

async fn enqueue(
    app: &App,
    environment: &str,
    push: &Push,
    kind: BuildKind,
) -> Result<Response, ApiError> {
    if let Some(pin) = app.store.pinned(environment).await? {
        let problem = format!("{environment} is pinned by {}: {}", pin.by, pin.reason);
        return Err(ApiError::new(StatusCode::CONFLICT, problem)
            .hint(format!("`landfall unpin {environment}` lets it go")));
    }
    let id = app.store.enqueue(environment, push, kind).await?;
    accepted(app, id).await
}

/// 202 with the build as it is now.
async fn accepted(app: &App, id: i64) -> Result<Response, ApiError> {
    let build = app.store.build(id).await?;
    let build = build.ok_or_else(ApiError::no_such_build)?;
    let body = axum::Json(view(&app.config, &build)?);
    Ok((StatusCode::ACCEPTED, body).into_response())
}

async fn cancel(State(app): State<App>, path: IdPath) -> Result<Response, ApiError> {
    let id = build_id(&path).ok_or_else(ApiError::no_such_build)?;
    match app.store.cancel(id, ADMIN).await? {
        None => Err(ApiError::no_such_build()),
        Some(status) if status.is_terminal() => Err(ApiError::new(
            StatusCode::CONFLICT,
            format!("build #{id} has ended already: {status}"),
        )),
        Some(_) => accepted(&app, id).await,
    }
}

async fn rerun(State(app): State<App>, path: IdPath) -> Result<Response, ApiError> {
    let build = find(&app.store, &path).await?;
    if !build.status.is_terminal() {
        let problem = format!("build #{} has not ended: {}", build.id, build.status);
        return Err(ApiError::new(StatusCode::CONFLICT, problem)
            .hint(format!("`landfall cancel {}` ends it", build.id)));
    }
    if app.config.environment(&build.environment).is_none() {
        let problem = format!(
            "environment {:?} is no longer in agent.yaml",
            build.environment
        );
        return Err(ApiError::new(StatusCode::CONFLICT, problem));
    }
    let push = app.store.push_of(build.id).await?;
    let push = push.ok_or_else(ApiError::no_such_build)?;
    enqueue(&app, &build.environment, &push, BuildKind::Rerun).await
}

/// What a failed release showed, kept before it was undone.
async fn evidence(State(app): State<App>, path: IdPath) -> Result<axum::Json<Value>, ApiError> {
    let build = find(&app.store, &path).await?;
    let evidence = app.store.evidence(build.id).await?;
    Ok(axum::Json(json!({"build": build.id, "evidence": evidence})))
}

/// What the build was to change, object by object.
async fn plan(State(app): State<App>, path: IdPath) -> Result<axum::Json<Value>, ApiError> {
    let build = find(&app.store, &path).await?;
    let release = match build.release_id {
        // A release that is brought back was planned on another day, over something else.
        Some(id) if !build.kind.brings_back() => app.store.release_to_show(id).await?,
        _ => None,
    };
    let plan = release.map(|release| release.plan);
    Ok(axum::Json(
        json!({"build": build.id, "release": build.release_id, "plan": plan}),
    ))
}

/// The build that runs in an environment, else the newest that waits or has ended.
pub async fn current_build(store: &Store, environment: &str) -> anyhow::Result<Option<Build>> {
    match newest(store, environment, Some(Status::Running)).await? {
        Some(build) => Ok(Some(build)),
        None => newest(store, environment, None).await,
    }
}

async fn newest(
    store: &Store,
    environment: &str,
    status: Option<Status>,
) -> anyhow::Result<Option<Build>> {
    let filter = Filter {
        environment: Some(environment.to_owned()),
        status,
        limit: Some(1),
        ..Filter::default()
    };
    Ok(store.builds(&filter).await?.into_iter().next())
}

fn unknown_environment(config: &Config, name: &str, status: StatusCode) -> ApiError {
    let known: Vec<&str> = config
        .environments
        .iter()
        .map(|environment| environment.name.as_str())
        .collect();
    let hint = match known.as_slice() {
        [] => "agent.yaml has no environments yet".to_owned(),
        known => format!("known are {}", known.join(", ")),
    };
    ApiError::new(status, format!("unknown environment {name:?}")).hint(hint)
}

/// The description of this API, kept by hand beside it; a test asks for each of its paths.
async fn openapi() -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "application/json")],
        include_str!("openapi.json"),
    )
}

async fn unknown_path() -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "there is no such path in this API")
}
