//! A registry that asks for a Bearer token, before the test cluster's own: tokens for one name and password, then the
//! requests are passed on. Its answers follow from what it was given.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::support;

pub struct RegistryProxy {
    /// `127.0.0.1:PORT`.
    pub host: String,
    state: Arc<Shared>,
}

struct Shared {
    host: String,
    name: String,
    password: String,
    token: String,
    tokens: AtomicUsize,
    client: reqwest::Client,
}

impl RegistryProxy {
    pub async fn start(name: &str, password: &str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Shared {
            host: host.clone(),
            name: name.to_owned(),
            password: password.to_owned(),
            token: format!("token{}", crate::docker_world::unique()),
            tokens: AtomicUsize::new(0),
            client: reqwest::Client::new(),
        });
        let router = Router::new()
            .route("/token", any(token))
            .fallback(pass)
            .layer(axum::extract::DefaultBodyLimit::disable())
            .with_state(state.clone());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { host, state }
    }

    /// How many tokens were given out.
    pub fn tokens(&self) -> usize {
        self.state.tokens.load(Ordering::SeqCst)
    }
}

/// Both ways: GET with Basic, and POST of a form with the password.
async fn token(State(state): State<Arc<Shared>>, headers: HeaderMap, body: Bytes) -> Response {
    let basic = format!(
        "Basic {}",
        STANDARD.encode(format!("{}:{}", state.name, state.password))
    );
    let has_basic = headers
        .get("authorization")
        .is_some_and(|given| given.as_bytes() == basic.as_bytes());
    let form: Vec<(String, String)> = url::form_urlencoded::parse(&body).into_owned().collect();
    let has = |key: &str, value: &str| form.iter().any(|(k, v)| k == key && v == value);
    if !has_basic && !(has("username", &state.name) && has("password", &state.password)) {
        return (StatusCode::UNAUTHORIZED, "who are you?").into_response();
    }
    state.tokens.fetch_add(1, Ordering::SeqCst);
    axum::Json(
        serde_json::json!({"token": state.token, "access_token": state.token, "expires_in": 300}),
    )
    .into_response()
}

async fn pass(
    State(state): State<Arc<Shared>>,
    method: Method,
    uri: Uri,
    mut headers: HeaderMap,
    body: Bytes,
) -> Response {
    let wanted = format!("Bearer {}", state.token);
    if !headers
        .get("authorization")
        .is_some_and(|given| given.as_bytes() == wanted.as_bytes())
    {
        let name = uri
            .path()
            .trim_start_matches("/v2/")
            .split("/manifests/")
            .next()
            .unwrap()
            .split("/blobs/")
            .next()
            .unwrap()
            .to_owned();
        let challenge = format!(
            r#"Bearer realm="http://{}/token",service="test",scope="repository:{name}:pull,push""#,
            state.host
        );
        let words = r#"{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}"#;
        return (
            StatusCode::UNAUTHORIZED,
            [
                ("www-authenticate", challenge),
                ("content-type", "application/json".to_owned()),
            ],
            words,
        )
            .into_response();
    }
    headers.remove("authorization");
    headers.remove("host");
    let url = format!(
        "http://{}{}",
        support::registry(),
        uri.path_and_query().unwrap()
    );
    let answer = state
        .client
        .request(method, url)
        .headers(headers)
        .body(body)
        .send()
        .await
        .unwrap();
    let mut response = Response::builder().status(answer.status());
    for (name, value) in answer.headers() {
        let value = match name.as_str() {
            "location" => value
                .to_str()
                .unwrap()
                .replace(&support::registry(), &state.host)
                .parse()
                .unwrap(),
            "transfer-encoding" => continue,
            _ => value.clone(),
        };
        response = response.header(name, value);
    }
    response
        .body(Body::from_stream(answer.bytes_stream()))
        .unwrap()
}
