//! `POST /webhook`: what GitHub sends, proved, stored and answered in milliseconds.
//!
//! The signature is checked over the raw bytes, in constant time, before anything is parsed. URLs in a payload are
//! never used; no work is done here: a stored push is a row that the queue finds. No body and no signature is logged.

use std::sync::LazyLock;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hmac::{Hmac, KeyInit, Mac};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::app::App;
use crate::builds::{Push, is_commit_id};
use crate::config::Environment;
use crate::store::Delivery;

/// GitHub's own cap on payloads.
pub const BODY_BYTES_MAX: usize = 25 << 20;
const USUAL_BYTES_MAX: usize = 32 << 10;
/// Of a body that is too large.
const DRAINED_BYTES_MAX: usize = 64 << 20;
/// Bodies in flight over all connections.
const BODIES_KIB_MAX: usize = 128 << 10;
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// GitHub gives up after 10 s.
const STORE_TIMEOUT: Duration = Duration::from_secs(8);
/// Git itself allows more; GitHub does not.
const REF_BYTES_MAX: usize = 1024;

static IN_FLIGHT: LazyLock<Semaphore> = LazyLock::new(|| Semaphore::new(BODIES_KIB_MAX));

/// Why a delivery was not taken.
#[derive(Debug, PartialEq, Eq)]
pub enum Rejection {
    /// 401; the answer never says which part was wrong.
    Signature,
    Unreadable(String),
    TooLarge,
    Compressed,
    NotStored,
}

/// What a signed delivery asks of us.
#[derive(Debug, PartialEq, Eq)]
enum Meaning {
    Push(Push),
    Ignored(String),
}

pub async fn receive(State(app): State<App>, request: Request<Body>) -> Response {
    match take(&app, request).await {
        Ok(response) => response,
        Err(rejection) => {
            tracing::info!(?rejection, "delivery rejected");
            rejection.into_response()
        }
    }
}

async fn take(app: &App, request: Request<Body>) -> Result<Response, Rejection> {
    let (parts, body) = request.into_parts();
    if parts.headers.contains_key(header::CONTENT_ENCODING) {
        return Err(Rejection::Compressed);
    }
    // Nobody who has no signature at all is read.
    signature(&parts.headers).ok_or(Rejection::Signature)?;
    let (body, in_flight) = read(&parts.headers, body).await?;
    let environments = signed_for(&parts.headers, &body, &app.config.environments)?;
    let event = header_text(&parts.headers, "x-github-event");
    let push = match meaning(&event, &parts.headers, &body)? {
        Meaning::Push(push) => push,
        Meaning::Ignored(why) => return Ok(ignored(&why)),
    };
    let renamed = renamed(app, &push, &environments).await?;
    let takers = match takers(&push, &environments, &app.config.environments, &renamed)? {
        Takers::Environments(names) => names,
        Takers::Nobody(why) => return Ok(ignored(&why)),
    };
    let delivery = Delivery {
        guid: header_text(&parts.headers, "x-github-delivery")
            .chars()
            .take(100)
            .collect(),
        event,
        body_hash: hex::encode(Sha256::digest(&body)),
        body,
    };
    let (guid, after) = (&delivery.guid, &push.after);
    let (repository, branch) = (&push.repository, &push.branch);
    let span = tracing::info_span!("push", guid, repository, branch, after);
    let builds = tokio::time::timeout(
        STORE_TIMEOUT,
        app.store.accept(delivery, push, &takers, in_flight),
    )
    .await
    .map_err(|_| Rejection::NotStored)?
    .map_err(|error| {
        tracing::error!(error = format!("{error:#}"), "cannot store a delivery");
        Rejection::NotStored
    })?;
    span.in_scope(|| tracing::info!(?builds, "accepted"));
    Ok((StatusCode::ACCEPTED, Json(json!({ "builds": builds }))).into_response())
}

/// Its share of the bytes that may be in flight: given back when it is dropped.
type InFlight = Option<SemaphorePermit<'static>>;

/// The whole body, within the limits of one delivery and of all that are in flight until they are stored.
async fn read(headers: &HeaderMap, mut body: Body) -> Result<(Vec<u8>, InFlight), Rejection> {
    let announced = header_text(headers, "content-length").parse::<usize>().ok();
    let reading = async {
        if announced.is_some_and(|bytes| bytes > BODY_BYTES_MAX) {
            return Err(Rejection::TooLarge);
        }
        let mut body = Limited::new(&mut body, BODY_BYTES_MAX);
        let (mut bytes, mut in_flight): (_, InFlight) = (Vec::new(), None);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| match error.is::<LengthLimitError>() {
                true => Rejection::TooLarge,
                false => Rejection::Unreadable("the body ended early".to_owned()),
            })?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            // Only what has come counts, by its sum: a connection that announces much and sends nothing, or one byte at a time,
            // takes nobody's place.
            let whole = (bytes.len() + data.len()).div_ceil(1024) - bytes.len().div_ceil(1024);
            let kib = u32::try_from(whole).unwrap_or(u32::MAX);
            let share = IN_FLIGHT
                .try_acquire_many(kib)
                .map_err(|_| Rejection::NotStored)?;
            match &mut in_flight {
                Some(sum) => sum.merge(share),
                None => in_flight = Some(share),
            }
            if bytes.is_empty() {
                // Whoever has begun is believed, up to the length of a usual push.
                bytes.reserve(announced.unwrap_or_default().min(USUAL_BYTES_MAX));
            }
            bytes.extend_from_slice(&data);
        }
        Ok((bytes, in_flight))
    };
    let read = tokio::time::timeout(BODY_TIMEOUT, reading)
        .await
        .unwrap_or_else(|_| {
            Err(Rejection::Unreadable(
                "the body did not come in time".to_owned(),
            ))
        });
    if matches!(read, Err(Rejection::TooLarge)) {
        drain(body).await;
    }
    read
}

/// Who still sends when the connection ends sees a broken pipe, and not the answer: so a little more is taken and dropped.
async fn drain(body: Body) {
    let dropping = async {
        let mut body = Limited::new(body, DRAINED_BYTES_MAX);
        while let Some(Ok(_)) = body.frame().await {}
    };
    let _ = tokio::time::timeout(BODY_TIMEOUT, dropping).await;
}

/// The environments one of whose secrets signed these bytes. None is a rejection.
fn signed_for<'a>(
    headers: &HeaderMap,
    body: &[u8],
    environments: &'a [Environment],
) -> Result<Vec<&'a Environment>, Rejection> {
    let signature = signature(headers).ok_or(Rejection::Signature)?;
    let signed = |environment: &&Environment| {
        environment
            .webhook_secrets
            .iter()
            .any(|secret| is_signed(secret.expose().as_bytes(), body, &signature))
    };
    let environments: Vec<_> = environments.iter().filter(signed).collect();
    if environments.is_empty() {
        Err(Rejection::Signature)
    } else {
        Ok(environments)
    }
}

/// The one `X-Hub-Signature-256` header: `sha256=` and 64 lower-case hex digits. The older sha1 header is never read.
fn signature(headers: &HeaderMap) -> Option<Vec<u8>> {
    let mut values = headers.get_all("x-hub-signature-256").iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return None;
    };
    let digits = value.to_str().ok()?.strip_prefix("sha256=")?;
    let lower_case_hex = digits.len() == 64
        && digits
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if lower_case_hex {
        hex::decode(digits).ok()
    } else {
        None
    }
}

/// Constant in time.
fn is_signed(secret: &[u8], body: &[u8], signature: &[u8]) -> bool {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret) else {
        return false;
    };
    mac.update(body);
    mac.verify_slice(signature).is_ok()
}

/// Every field may be missing or null: Gitea leaves some out, and a deleted branch has no head commit.
#[derive(Deserialize)]
struct Payload {
    #[serde(rename = "ref")]
    reference: Option<String>,
    before: Option<String>,
    after: Option<String>,
    #[serde(default)]
    deleted: Option<bool>,
    repository: Option<Repository>,
    pusher: Option<Person>,
    head_commit: Option<HeadCommit>,
}

#[derive(Deserialize)]
struct Repository {
    id: Option<i64>,
    full_name: Option<String>,
    /// Seconds since 1970 in a push event.
    pushed_at: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Person {
    name: Option<String>,
    login: Option<String>,
}

#[derive(Deserialize)]
struct HeadCommit {
    message: Option<String>,
}

fn meaning(event: &str, headers: &HeaderMap, body: &[u8]) -> Result<Meaning, Rejection> {
    let unreadable = |error: serde_json::Error| {
        Rejection::Unreadable(format!("not the JSON of a {event} event: {error}"))
    };
    let form;
    let bytes =
        if header_text(headers, "content-type").starts_with("application/x-www-form-urlencoded") {
            form = form_payload(body)?;
            form.as_bytes()
        } else {
            body
        };
    match event {
        "push" => {}
        "" => {
            return Err(Rejection::Unreadable(
                "the header X-GitHub-Event is missing".to_owned(),
            ));
        }
        other => {
            serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(bytes)
                .map_err(unreadable)?;
            return Ok(Meaning::Ignored(format!(
                "event {:?}",
                other.chars().take(40).collect::<String>()
            )));
        }
    }
    push_meaning(serde_json::from_slice(bytes).map_err(unreadable)?)
}

/// The one field `payload` of a form body.
fn form_payload(body: &[u8]) -> Result<String, Rejection> {
    let mut payloads = url::form_urlencoded::parse(body).filter(|(name, _)| name == "payload");
    match (payloads.next(), payloads.next()) {
        (Some((_, payload)), None) => Ok(payload.into_owned()),
        _ => Err(Rejection::Unreadable(
            "a form body needs the field `payload`, once".to_owned(),
        )),
    }
}

fn push_meaning(payload: Payload) -> Result<Meaning, Rejection> {
    let missing = |field: &str| Rejection::Unreadable(format!("the push has no `{field}`"));
    let reference = payload.reference.ok_or_else(|| missing("ref"))?;
    let repository = payload.repository.ok_or_else(|| missing("repository"))?;
    let after = payload.after.ok_or_else(|| missing("after"))?;
    let before = payload.before.ok_or_else(|| missing("before"))?;
    if !is_commit_id(&after) || !is_commit_id(&before) {
        return Err(Rejection::Unreadable(
            "`before` and `after` must be 40 lower-case hex digits".to_owned(),
        ));
    }
    if reference.len() > REF_BYTES_MAX {
        return Err(Rejection::Unreadable(format!(
            "`ref` is longer than {REF_BYTES_MAX} bytes"
        )));
    }
    let Some(branch) = reference.strip_prefix("refs/heads/") else {
        return Ok(Meaning::Ignored(format!("{reference:?} is no branch")));
    };
    if payload.deleted == Some(true) || after.bytes().all(|b| b == b'0') {
        return Ok(Meaning::Ignored(format!("branch {branch:?} was deleted")));
    }
    let pusher = payload
        .pusher
        .and_then(|person| person.name.or(person.login))
        .unwrap_or_else(|| "unknown".to_owned());
    let message = payload
        .head_commit
        .and_then(|commit| commit.message)
        .unwrap_or_default();
    Ok(Meaning::Push(Push {
        repository_id: repository.id,
        repository: repository
            .full_name
            .ok_or_else(|| missing("repository.full_name"))?,
        branch: branch.to_owned(),
        before,
        after,
        pusher: shortened(&pusher, 100),
        title: shortened(message.lines().next().unwrap_or_default(), 200),
        pushed_at: repository.pushed_at.as_ref().and_then(milliseconds),
    }))
}

/// PostgreSQL stores no NUL in a text.
fn shortened(text: &str, chars_max: usize) -> String {
    text.chars()
        .filter(|c| *c != '\0')
        .take(chars_max)
        .collect()
}

/// GitHub writes seconds in push events and text elsewhere.
fn milliseconds(value: &serde_json::Value) -> Option<i64> {
    match value {
        serde_json::Value::Number(seconds) => seconds.as_i64()?.checked_mul(1000),
        serde_json::Value::String(text) => text
            .parse::<jiff::Timestamp>()
            .ok()
            .map(jiff::Timestamp::as_millisecond),
        _ => None,
    }
}

enum Takers<'a> {
    Environments(Vec<&'a str>),
    Nobody(String),
}

/// Signed environments whose repository has another name by now: its number stays.
async fn renamed(
    app: &App,
    push: &Push,
    signed: &[&Environment],
) -> Result<Vec<String>, Rejection> {
    let Some(id) = push.repository_id else {
        return Ok(Vec::new());
    };
    let is_known = |environment: &Environment| {
        environment
            .repository
            .eq_ignore_ascii_case(&push.repository)
    };
    if app.config.environments.iter().any(is_known) {
        return Ok(Vec::new());
    }
    let names: Vec<&str> = signed
        .iter()
        .map(|environment| environment.name.as_str())
        .collect();
    let found = app.store.of_repository(&names, id).await;
    let found = found.map_err(|error| {
        tracing::error!(
            error = format!("{error:#}"),
            "cannot read whose repository this is"
        );
        Rejection::NotStored
    })?;
    if !found.is_empty() {
        tracing::warn!(environments = ?found, "their repository is now called {:?}: change `repository` and `clone_url` in agent.yaml", push.repository);
    }
    Ok(found)
}

/// A secret counts only for its own environments: a push that names the repository of another one is unsigned.
fn takers<'a>(
    push: &Push,
    signed: &[&'a Environment],
    all: &[Environment],
    renamed: &[String],
) -> Result<Takers<'a>, Rejection> {
    let of_repository = |environment: &&Environment| {
        environment
            .repository
            .eq_ignore_ascii_case(&push.repository)
            || renamed.contains(&environment.name)
    };
    let mut ours = signed.iter().copied().filter(of_repository).peekable();
    if ours.peek().is_none() {
        if all.iter().any(|environment| of_repository(&environment)) {
            return Err(Rejection::Signature);
        }
        return Ok(Takers::Nobody(format!(
            "no environment is of repository {:?}",
            push.repository
        )));
    }
    let names: Vec<_> = ours
        .filter(|environment| environment.branch == push.branch)
        .map(|environment| environment.name.as_str())
        .collect();
    if names.is_empty() {
        Ok(Takers::Nobody(format!(
            "no environment is of branch {:?}",
            push.branch
        )))
    } else {
        Ok(Takers::Environments(names))
    }
}

fn ignored(why: &str) -> Response {
    (StatusCode::OK, Json(json!({ "ignored": why }))).into_response()
}

fn header_text(headers: &HeaderMap, name: &str) -> String {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
        .to_owned()
}

impl IntoResponse for Rejection {
    fn into_response(self) -> Response {
        let (status, error) = match self {
            Self::Signature => (
                StatusCode::UNAUTHORIZED,
                "the signature is missing or wrong".to_owned(),
            ),
            Self::Unreadable(why) => (StatusCode::BAD_REQUEST, why),
            Self::TooLarge => (
                StatusCode::PAYLOAD_TOO_LARGE,
                format!("a delivery has at most {BODY_BYTES_MAX} bytes"),
            ),
            Self::Compressed => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "a compressed body is not read".to_owned(),
            ),
            Self::NotStored => (
                StatusCode::SERVICE_UNAVAILABLE,
                "could not be stored; send it again".to_owned(),
            ),
        };
        let mut response = (status, Json(json!({ "error": error }))).into_response();
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, header::HeaderValue::from_static("5"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From GitHub's documentation, "Testing the webhook payload validation".
    #[test]
    fn the_known_answer_of_github_is_ours_too() {
        let signature =
            hex::decode("757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17")
                .unwrap();
        assert!(is_signed(
            b"It's a Secret to Everybody",
            b"Hello, World!",
            &signature
        ));
        assert!(!is_signed(
            b"It's a Secret to Everybody",
            b"Hello, World?",
            &signature
        ));
    }

    #[tokio::test]
    async fn a_body_in_crumbs_takes_no_more_of_the_budget_than_its_bytes() {
        let crumbs = futures_util::stream::iter((0..3000).map(|_| Ok::<_, std::io::Error>("x")));
        let (bytes, in_flight) = read(&HeaderMap::new(), Body::from_stream(crumbs))
            .await
            .unwrap();
        assert_eq!((bytes.len(), in_flight.unwrap().num_permits()), (3000, 3));
    }

    #[test]
    fn odd_but_valid_json_is_no_panic() {
        for body in [
            "[0]",
            "{}",
            "null",
            "{\"ref\":5}",
            "{\"ref\":\"refs/heads/x\",\"repository\":[]}",
            &"[".repeat(100_000),
            "1e400",
        ] {
            assert!(
                meaning("push", &HeaderMap::new(), body.as_bytes()).is_err(),
                "{body:.40}"
            );
        }
    }

    #[test]
    fn pushed_at_is_read_in_both_forms() {
        assert_eq!(milliseconds(&json!(1_700_000_000)), Some(1_700_000_000_000));
        assert_eq!(
            milliseconds(&json!("2023-11-14T22:13:20Z")),
            Some(1_700_000_000_000)
        );
        assert_eq!(milliseconds(&json!([])), None);
    }
}
