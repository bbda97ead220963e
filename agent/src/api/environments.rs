//! Environments in the API: what serves, what served, and the rows by which a person goes back, forward, or holds.
//!
//! The line: name → environment of agent.yaml → row. Nothing is undone here: an undo is a build that the queue finds.

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{
    ADMIN, ApiError, accepted, as_pushed, current_build, read_body, unknown_environment, view,
};
use crate::app::App;
use crate::builds::BuildKind;
use crate::config::Environment;
use crate::store::{HISTORY_MAX, Serving, steps};

const REASON_CHARS_MAX: usize = 300;

/// Where an undo leads.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Undo {
    /// The number of a release.
    release: Option<i64>,
    /// A number of `kubectl rollout history`.
    revision: Option<i64>,
    reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Reason {
    reason: Option<String>,
}

pub async fn list(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    let mut environments = Vec::with_capacity(app.config.environments.len());
    for environment in &app.config.environments {
        let (commit, release) = app.store.deployed(&environment.name).await?;
        let build = current_build(&app.store, &environment.name).await?;
        let build = build.map(|build| view(&app.config, &build)).transpose()?;
        environments.push(json!({
            "name": environment.name,
            "repository": environment.repository,
            "branch": environment.branch,
            "namespace": environment.namespace,
            "deployed": {"commit": commit, "release": release},
            "pinned": app.store.pinned(&environment.name).await?,
            "build": build,
        }));
    }
    Ok(Json(json!({"environments": environments})))
}

pub async fn releases(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let environment = find(&app, &name)?;
    let (_, current) = app.store.deployed(&environment.name).await?;
    let releases = app.store.history(&environment.name, HISTORY_MAX).await?;
    let pinned = app.store.pinned(&environment.name).await?;
    Ok(Json(json!({
        "environment": environment.name, "current": current, "pinned": pinned, "releases": releases,
    })))
}

pub async fn undo(
    State(app): State<App>,
    Path(name): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let environment = find(&app, &name)?;
    let asked: Undo = optional(body)?;
    let history = app.store.history(&environment.name, HISTORY_MAX).await?;
    let target = match (asked.release, asked.revision) {
        (Some(_), Some(_)) => return Err(bad_request("give a release or a revision, not both")),
        (Some(release), None) => named(&history, |row| row.release == release)
            .ok_or_else(|| nothing(&name, &format!("release {release} has never served here")))?,
        (None, Some(revision)) => {
            named(&history, |row| has_revision(row, revision)).ok_or_else(|| {
                nothing(
                    &name,
                    &format!("no release that served here is known as revision {revision}"),
                )
            })?
        }
        (None, None) => previous(&history)
            .ok_or_else(|| nothing(&name, "no earlier release has served here"))?,
    };
    let reason = match bounded(asked.reason) {
        Some(reason) => format!("undo to release {}: {reason}", target.release),
        None => format!("undo to release {}", target.release),
    };
    bring_back(&app, environment, target, BuildKind::Undo, &reason).await
}

pub async fn redo(
    State(app): State<App>,
    Path(name): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let environment = find(&app, &name)?;
    let asked: Reason = optional(body)?;
    let history = app.store.history(&environment.name, HISTORY_MAX).await?;
    let target =
        next(&history).ok_or_else(|| nothing(&name, "no later release has served here"))?;
    let reason =
        bounded(asked.reason).unwrap_or_else(|| format!("redo of release {}", target.release));
    bring_back(&app, environment, target, BuildKind::Redo, &reason).await
}

pub async fn pin(
    State(app): State<App>,
    Path(name): Path<String>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    let environment = find(&app, &name)?;
    let asked: Reason = optional(body)?;
    let Some(reason) = bounded(asked.reason) else {
        return Err(bad_request(
            "a pin needs a reason: whoever finds it will ask",
        ));
    };
    app.store.pin(&environment.name, &reason, ADMIN).await?;
    Ok(Json(
        json!({"environment": environment.name, "pinned": app.store.pinned(&environment.name).await?}),
    ))
}

/// Lets it go; where something else than what serves was pushed meanwhile, the branch's head is built.
pub async fn unpin(State(app): State<App>, Path(name): Path<String>) -> Result<Response, ApiError> {
    let environment = find(&app, &name)?;
    let head = as_pushed(environment, String::new(), String::new());
    let Some(let_go) = app.store.unpin(&environment.name, &head).await? else {
        return Err(ApiError::new(
            StatusCode::CONFLICT,
            format!("{name} is not pinned"),
        ));
    };
    match let_go.build {
        Some(id) => accepted(&app, id).await,
        None => {
            let answer = json!({"environment": environment.name, "pinned": null, "build": null});
            Ok(axum::response::IntoResponse::into_response(Json(answer)))
        }
    }
}

fn find<'a>(app: &'a App, name: &str) -> Result<&'a Environment, ApiError> {
    let known = app.config.environment(name);
    known.ok_or_else(|| unknown_environment(&app.config, name, StatusCode::NOT_FOUND))
}

/// An empty body asks for nothing in particular.
fn optional<T: DeserializeOwned + Default>(
    body: Result<Bytes, BytesRejection>,
) -> Result<T, ApiError> {
    let body = read_body(body)?;
    if body.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&body)
        .map_err(|error| bad_request(&format!("the body is not what is expected: {error}")))
}

fn bounded(reason: Option<String>) -> Option<String> {
    let reason: String = reason?
        .chars()
        .filter(|c| !c.is_control())
        .take(REASON_CHARS_MAX)
        .collect();
    let reason = reason.trim();
    (!reason.is_empty()).then(|| reason.to_owned())
}

fn bad_request(problem: &str) -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, problem)
}

fn nothing(environment: &str, problem: &str) -> ApiError {
    ApiError::new(StatusCode::CONFLICT, problem.to_owned()).hint(format!(
        "`landfall history {environment}` shows what served"
    ))
}

async fn bring_back(
    app: &App,
    environment: &Environment,
    target: &Serving,
    kind: BuildKind,
    reason: &str,
) -> Result<Response, ApiError> {
    let push = as_pushed(environment, target.commit.clone(), target.title.clone());
    let name = &environment.name;
    let id = app
        .store
        .bring_back(&push, name, target.release, kind, reason)
        .await?;
    accepted(app, id).await
}

fn previous(history: &[Serving]) -> Option<&Serving> {
    let (past, _) = steps(history);
    past.len()
        .checked_sub(2)
        .and_then(|at| past.get(at))
        .copied()
}

fn next(history: &[Serving]) -> Option<&Serving> {
    let (_, undone) = steps(history);
    undone.last()?.last().copied()
}

/// The newest that fits.
fn named(history: &[Serving], fits: impl Fn(&Serving) -> bool) -> Option<&Serving> {
    served(history).find(|row| fits(row))
}

fn served(history: &[Serving]) -> impl Iterator<Item = &Serving> {
    history.iter().filter(|row| row.state != "failed")
}

fn has_revision(row: &Serving, revision: i64) -> bool {
    let revisions: Value = serde_json::from_str(&row.revisions).unwrap_or_default();
    let mut numbers = revisions
        .as_object()
        .into_iter()
        .flat_map(|all| all.values());
    numbers.any(|number| number.as_str() == Some(&revision.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(release: i64, state: &str, revision: &str) -> Serving {
        Serving {
            release,
            build: release,
            commit: String::new(),
            title: String::new(),
            image: String::new(),
            state: state.to_owned(),
            kind: "push".to_owned(),
            by: String::new(),
            revisions: format!("{{\"deployment/web\": \"{revision}\"}}"),
            began_at: release,
            ended_at: None,
            ended_why: None,
        }
    }

    fn by(kind: &str, release: i64) -> Serving {
        Serving {
            kind: kind.to_owned(),
            ..row(release, "live", "0")
        }
    }

    /// Told from the first to the last, as they happened.
    fn history(rows: Vec<Serving>) -> Vec<Serving> {
        rows.into_iter().rev().collect()
    }

    fn ways(rows: Vec<Serving>) -> (Option<i64>, Option<i64>) {
        let history = history(rows);
        let number = |row: Option<&Serving>| row.map(|row| row.release);
        (number(previous(&history)), number(next(&history)))
    }

    #[test]
    fn undo_goes_back_over_what_failed_and_redo_forward_again() {
        let first = || {
            vec![
                row(1, "adopted", ""),
                row(3, "live", "7"),
                row(4, "failed", ""),
                row(5, "live", "9"),
            ]
        };
        let with = |more: Vec<Serving>| ways([first(), more].concat());
        assert_eq!(with(vec![]), (Some(3), None));
        assert_eq!(with(vec![by("undo", 3)]), (Some(1), Some(5)));
        assert_eq!(with(vec![by("undo", 3), by("undo", 1)]), (None, Some(3)));
        assert_eq!(with(vec![by("undo", 1)]), (None, Some(5)));
        assert_eq!(with(vec![by("undo", 3), by("redo", 5)]), (Some(3), None));
        // What was undone is not gone back to from what came after.
        assert_eq!(
            with(vec![by("undo", 3), row(6, "live", "0")]),
            (Some(3), None)
        );
        assert_eq!(ways(vec![]), (None, None));
        let found = history(first());
        assert_eq!(
            named(&found, |row| has_revision(row, 7)).unwrap().release,
            3
        );
    }
}
