//! Whether an environment's registry answers and knows our login, as Docker would ask it.
//!
//! The line: `/v2/` → what it wants (nothing, a password, a token) → once more with that. A password goes only where the
//! registry itself is, or over https to the token server that it names.

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};
use reqwest::{RequestBuilder, StatusCode};
use serde_json::Value;

use super::doctor::name;
use super::findings::Finding;
use crate::config::{Config, Environment, client_to};
use crate::docker::registry::{self, Logins};

struct Login {
    username: String,
    password: String,
}

/// What a registry wants before it answers.
#[derive(Debug, PartialEq, Eq)]
enum Wants {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
    },
    Unknown,
}

pub async fn check(config: &Config, environment: &Environment) -> Vec<Finding> {
    let check = name(environment, "registry");
    let reference = format!("{}/image", environment.image_prefix);
    let host = registry::host(&reference).to_owned();
    let login = match Logins::read(&config.docker, environment).await {
        Ok(logins) => logins.of(&reference).and_then(|login| {
            Some(Login {
                username: login.username?,
                password: login.password?,
            })
        }),
        Err(error) => {
            return vec![Finding::fail(
                check,
                format!("{error:#}"),
                "mend Docker's config.json, or set `registry` in agent.yaml",
            )];
        }
    };
    vec![match ask(&host, &reference, login.as_ref()).await {
        Ok(how) => Finding::ok(check, format!("{host} answers{how}")),
        Err(Problem::Away(why)) => {
            let fix = format!(
                "is it up? `curl {}` must answer; else set `image_prefix`",
                base(&host)
            );
            Finding::fail(check, format!("cannot reach {host}: {why}"), fix)
        }
        Err(Problem::Login) => {
            let fix = format!(
                "set `registry: {{ username, password }}` in agent.yaml, or `docker login {host}` as the agent's user"
            );
            let says = match login {
                Some(login) => format!("{host} refuses the login of {}", login.username),
                None => format!("{host} wants a login, and there is none"),
            };
            Finding::fail(check, says, fix)
        }
    }]
}

enum Problem {
    Away(String),
    Login,
}

impl From<reqwest::Error> for Problem {
    fn from(error: reqwest::Error) -> Self {
        let error = anyhow::Error::new(error.without_url());
        Self::Away(error.root_cause().to_string())
    }
}

async fn ask(host: &str, reference: &str, login: Option<&Login>) -> Result<String, Problem> {
    let base = base(host);
    let without_redirects = reqwest::redirect::Policy::none();
    let http = client_to(&base).redirect(without_redirects).build()?;
    let answer = http.get(&base).send().await?;
    match answer.status() {
        status if status.is_success() => return Ok(", without a login".to_owned()),
        StatusCode::UNAUTHORIZED => {}
        status => {
            return Err(Problem::Away(format!(
                "it answers {status} for /v2/, as no registry does"
            )));
        }
    }
    let with = |request: RequestBuilder| match login {
        Some(login) => request.basic_auth(&login.username, Some(&login.password)),
        None => request,
    };
    let who = login.map(|login| format!(", as {}", login.username));
    let request = match wants(answer.headers()) {
        Wants::Basic => with(http.get(&base)),
        Wants::Bearer { realm, service } => {
            if !realm.starts_with("https://") && base.starts_with("https://") {
                return Err(Problem::Away(format!(
                    "it wants the password sent in the clear to {realm}"
                )));
            }
            let path = reference
                .strip_prefix(&format!("{host}/"))
                .unwrap_or(reference);
            let mut pairs = vec![("scope", format!("repository:{path}:pull,push"))];
            pairs.extend(service.map(|service| ("service", service)));
            let answer = with(http.get(&realm).query(&pairs)).send().await?;
            if matches!(answer.status().as_u16(), 400 | 401 | 403) {
                return Err(Problem::Login);
            }
            let body: Value = answer.json().await?;
            let token = ["token", "access_token"]
                .into_iter()
                .find_map(|name| body.get(name)?.as_str().map(str::to_owned));
            http.get(&base).bearer_auth(token.ok_or(Problem::Login)?)
        }
        Wants::Unknown => {
            return Err(Problem::Away(
                "it wants a kind of login that is not known".to_owned(),
            ));
        }
    };
    match request.send().await?.status() {
        status if status.is_success() && login.is_some() => Ok(who.unwrap_or_default()),
        // A token server gives a token to anybody: it opens `/v2/`, and allows no push.
        _ => Err(Problem::Login),
    }
}

/// Docker speaks plain http to loopback only, and so do we.
fn base(host: &str) -> String {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let is_here = name == "localhost"
        || name
            .parse::<std::net::Ipv4Addr>()
            .is_ok_and(|ip| ip.is_loopback());
    match host {
        "docker.io" => "https://registry-1.docker.io/v2/".to_owned(),
        host if is_here => format!("http://{host}/v2/"),
        host => format!("https://{host}/v2/"),
    }
}

fn wants(headers: &HeaderMap) -> Wants {
    let header = headers
        .get(WWW_AUTHENTICATE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let (scheme, parameters) = header.split_once(' ').unwrap_or((header, ""));
    let parameter = |wanted: &str| {
        let mut rest = parameters;
        while let Some((name, after)) = rest.split_once("=\"") {
            let (value, after) = after.split_once('"')?;
            if name.trim_matches([',', ' ']).eq_ignore_ascii_case(wanted) {
                return Some(value.to_owned());
            }
            rest = after;
        }
        None
    };
    match (scheme.to_ascii_lowercase().as_str(), parameter("realm")) {
        ("basic", _) => Wants::Basic,
        ("bearer", Some(realm)) => Wants::Bearer {
            realm,
            service: parameter("service"),
        },
        _ => Wants::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_registry_wants_is_read_as_docker_reads_it() {
        let read = |text: &str| {
            wants(&HeaderMap::from_iter([(
                WWW_AUTHENTICATE,
                text.parse().unwrap(),
            )]))
        };
        let bearer = Wants::Bearer {
            realm: "https://auth.docker.io/token".to_owned(),
            service: Some("registry, docker.io".to_owned()),
        };
        assert_eq!(
            read("Bearer realm=\"https://auth.docker.io/token\",service=\"registry, docker.io\""),
            bearer
        );
        assert_eq!(read("Basic realm=\"x\""), Wants::Basic);
        assert_eq!(read("Bearer realm=\"cut"), Wants::Unknown);
        assert_eq!(read("Negotiate"), Wants::Unknown);
    }

    #[test]
    fn plain_http_is_for_this_machine() {
        assert_eq!(base("localhost:5001"), "http://localhost:5001/v2/");
        assert_eq!(base("127.0.0.1:5001"), "http://127.0.0.1:5001/v2/");
        assert_eq!(base("10.0.0.1:5000"), "https://10.0.0.1:5000/v2/");
        assert_eq!(base("ghcr.io"), "https://ghcr.io/v2/");
    }
}
