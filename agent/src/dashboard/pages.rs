//! The pages: the list of builds, one build, and what is said where there is nothing.
//!
//! The line: `request → store → template → HTML`. Never anything but text from outside: templates escape it.

use askama::Template;
use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::assets;
use super::log::{self, LogView};
use super::views::{self, BuildView, CommitView, Step, Waits};
use crate::api::{self, IdPath, filter};
use crate::app::App;
use crate::builds::{Build, Millis, Status, now};
use crate::release::{Evidence, Planned};
use crate::store::{Filter, Pin};

/// The query with which scripts ask for what stands above the log.
const SUMMARY_ONLY: &str = "part=summary";

/// One environment on top of the list.
struct EnvironmentView {
    name: String,
    branch: String,
    namespace: String,
    commit: Option<CommitView>,
    release: Option<i64>,
    pin: Option<Pin>,
    build: Option<BuildView>,
}

/// One choice of a filter.
struct Choice {
    value: String,
    word: String,
    is_chosen: bool,
}

#[derive(Template)]
#[template(path = "builds.html")]
struct BuildsPage {
    version: &'static str,
    environments: Vec<EnvironmentView>,
    builds: Vec<BuildView>,
    environment_choices: Vec<Choice>,
    status_choices: Vec<Choice>,
    branch: String,
    is_filtered: bool,
    is_first_page: bool,
    newest: String,
    older: Option<String>,
    webhook_url: String,
}

#[derive(Template)]
#[template(path = "build.html", blocks = ["summary"])]
struct BuildPage {
    version: &'static str,
    build: BuildView,
    namespace: Option<String>,
    repository: String,
    steps: Vec<Step>,
    has_evidence: bool,
    plan: Vec<Planned>,
    plan_words: String,
    evidence: Vec<Evidence>,
    log: LogView,
}

#[derive(Template)]
#[template(path = "message.html")]
struct MessagePage {
    version: &'static str,
    heading: &'static str,
    text: String,
}

/// A page that could not be made.
pub enum PageError {
    NotFound,
    BadQuery(String),
    Ours(anyhow::Error),
}

impl From<anyhow::Error> for PageError {
    fn from(error: anyhow::Error) -> Self {
        Self::Ours(error)
    }
}

impl IntoResponse for PageError {
    fn into_response(self) -> Response {
        let (status, heading, text) = match self {
            Self::NotFound => (
                StatusCode::NOT_FOUND,
                "There is nothing here",
                "No page and no build has this address.".to_owned(),
            ),
            Self::BadQuery(problem) => (
                StatusCode::BAD_REQUEST,
                "This address cannot be read",
                format!("{problem}."),
            ),
            Self::Ours(error) => {
                tracing::error!("cannot make a page: {error:#}");
                (
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "The agent could not make this page",
                    "Its own log says why.".to_owned(),
                )
            }
        };
        let page = MessagePage {
            version: &assets::VERSION,
            heading,
            text,
        };
        html(status, page.render())
    }
}

/// Any address that is nobody's.
pub async fn not_found() -> Response {
    PageError::NotFound.into_response()
}

fn html(status: StatusCode, rendered: askama::Result<String>) -> Response {
    match rendered {
        Ok(text) => {
            let headers = [
                (header::CONTENT_TYPE, "text/html; charset=utf-8"),
                (header::CACHE_CONTROL, "no-store"),
            ];
            (status, headers, text).into_response()
        }
        Err(error) => {
            tracing::error!("cannot render a page: {error}");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// `GET /`.
pub async fn builds(
    State(app): State<App>,
    RawQuery(query): RawQuery,
) -> Result<Response, PageError> {
    let filter = filter::parse(query.as_deref()).map_err(PageError::BadQuery)?;
    let at = now();
    let (builds, next) = filter::page(&app.store, &filter).await?;
    let environments = environments(&app, at).await?;
    let free = app.config.free_bytes();
    let builds = builds
        .iter()
        .map(|build| {
            let environment = environments
                .iter()
                .find(|environment| environment.name == build.environment);
            let serving = environment.and_then(|environment| environment.release);
            let current = environment.and_then(|environment| environment.build.as_ref());
            let running = current.filter(|build| build.status == Status::Running);
            BuildView::new(&app.config, build, serving, at).waiting(Waits::new(
                &app.config,
                build,
                running.map(|build| build.id),
                free,
            ))
        })
        .collect();
    let page = BuildsPage {
        version: &assets::VERSION,
        environments,
        builds,
        environment_choices: environment_choices(&app, &filter),
        status_choices: status_choices(filter.status),
        branch: filter.branch.clone().unwrap_or_default(),
        is_filtered: filter.environment.is_some()
            || filter.branch.is_some()
            || filter.status.is_some(),
        is_first_page: filter.before.is_none(),
        newest: address(&filter, None),
        older: next.map(|next| address(&filter, Some(next))),
        webhook_url: app.config.webhook_url(),
    };
    Ok(html(StatusCode::OK, page.render()))
}

/// `GET /builds/{id}`.
pub async fn build(
    State(app): State<App>,
    path: IdPath,
    RawQuery(query): RawQuery,
) -> Result<Response, PageError> {
    let id = api::build_id(&path).ok_or(PageError::NotFound)?;
    let build = app.store.build(id).await?.ok_or(PageError::NotFound)?;
    let at = now();
    let stages = app.store.stages(id).await?;
    let (_, serving) = app.store.deployed(&build.environment).await?;
    let is_part = query.as_deref() == Some(SUMMARY_ONLY);
    let log = if is_part {
        LogView {
            sections: Vec::new(),
            hidden: 0,
            last: 0,
        }
    } else {
        log::tail(&app.store, id).await?
    };
    let evidence = app.store.evidence(id).await?;
    let plan = match build.release_id {
        Some(release) if !is_part && !build.kind.brings_back() => {
            let release = app.store.release_to_show(release).await?;
            release.map(|release| release.plan).unwrap_or_default()
        }
        _ => Vec::new(),
    };
    let waits = match build.status {
        Status::Queued => waits(&app, &build).await?,
        _ => None,
    };
    let page = BuildPage {
        version: &assets::VERSION,
        has_evidence: !evidence.is_empty(),
        plan_words: views::plan_words(&plan),
        plan,
        evidence,
        steps: views::steps(&build, &stages, at),
        namespace: app
            .config
            .environment(&build.environment)
            .map(|environment| environment.namespace.clone()),
        build: BuildView::new(&app.config, &build, serving, at).waiting(waits),
        repository: build.repository,
        log,
    };
    let rendered = if is_part {
        page.as_summary().render()
    } else {
        page.render()
    };
    Ok(html(StatusCode::OK, rendered))
}

async fn waits(app: &App, queued: &Build) -> anyhow::Result<Option<Waits>> {
    let current = api::current_build(&app.store, &queued.environment).await?;
    let running = current.filter(|build| build.status == Status::Running);
    let (running, free) = (running.map(|build| build.id), app.config.free_bytes());
    Ok(Waits::new(&app.config, queued, running, free))
}

async fn environments(app: &App, at: Millis) -> anyhow::Result<Vec<EnvironmentView>> {
    let mut views = Vec::with_capacity(app.config.environments.len());
    for environment in &app.config.environments {
        let (commit, release) = app.store.deployed(&environment.name).await?;
        let build = api::current_build(&app.store, &environment.name).await?;
        let commit = commit.and_then(|commit| {
            views::commit(
                &app.config,
                &environment.name,
                &environment.repository,
                &commit,
            )
        });
        views.push(EnvironmentView {
            name: environment.name.clone(),
            branch: environment.branch.clone(),
            namespace: environment.namespace.clone(),
            commit,
            release,
            pin: app.store.pinned(&environment.name).await?,
            build: build.map(|build| BuildView::new(&app.config, &build, release, at)),
        });
    }
    Ok(views)
}

fn environment_choices(app: &App, filter: &Filter) -> Vec<Choice> {
    let chosen = filter.environment.as_deref();
    let mut names: Vec<&str> = app
        .config
        .environments
        .iter()
        .map(|environment| environment.name.as_str())
        .collect();
    // One that was taken out of agent.yaml stays chosen where the address names it.
    names.extend(chosen.filter(|name| app.config.environment(name).is_none()));
    names
        .into_iter()
        .map(|name| Choice {
            value: name.to_owned(),
            word: name.to_owned(),
            is_chosen: chosen == Some(name),
        })
        .collect()
}

fn status_choices(chosen: Option<Status>) -> Vec<Choice> {
    Status::ALL
        .iter()
        .map(|status| Choice {
            value: status.as_str().to_owned(),
            word: views::status_title(*status).to_owned(),
            is_chosen: chosen == Some(*status),
        })
        .collect()
}

/// The list with the same filter, from `before` on.
fn address(filter: &Filter, before: Option<i64>) -> String {
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    let pairs = [
        ("environment", filter.environment.clone()),
        ("branch", filter.branch.clone()),
        (
            "status",
            filter.status.map(|status| status.as_str().to_owned()),
        ),
        ("limit", filter.limit.map(|limit| limit.to_string())),
        ("before", before.map(|before| before.to_string())),
    ];
    for (key, value) in pairs {
        if let Some(value) = value {
            query.append_pair(key, &value);
        }
    }
    match query.finish() {
        query if query.is_empty() => "/".to_owned(),
        query => format!("/?{query}"),
    }
}
