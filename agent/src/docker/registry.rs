//! Names of images, and the credentials of their registries: from agent.yaml, else from Docker's own config.json.
//!
//! The line: reference → host → login. Credential helpers are asked as Docker asks them. Nothing of it is ever printed:
//! `Logins` has no Debug, and `scrub` takes it out of what others say.

use std::collections::HashMap;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bollard::auth::DockerCredentials;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::build_log::Masker;
use crate::config::{self, Environment};

/// Under this key Docker's config.json has the login of Docker Hub.
const HUB_KEY: &str = "https://index.docker.io/v1/";
/// Under this one BuildKit asks for it.
const HUB_HOST: &str = "registry-1.docker.io";
const CONFIG_BYTES_MAX: u64 = 1024 * 1024;
const HELPER_TIMEOUT: Duration = Duration::from_secs(10);
const HELPER_BYTES_MAX: u64 = 64 * 1024;

/// The registry of a reference: `ghcr.io` of `ghcr.io/acme/web:1`, `docker.io` of `debian`.
pub fn host(reference: &str) -> &str {
    match reference.split_once('/') {
        Some((host, _)) if host.contains(['.', ':']) || host == "localhost" => host,
        _ => "docker.io",
    }
}

/// The name, and what stands behind it: a tag (`latest` where there is none) or a digest.
pub fn split(reference: &str) -> (&str, &str) {
    if let Some((name, digest)) = reference.split_once('@') {
        return (name, digest);
    }
    match reference.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (reference, "latest"),
    }
}

/// The logins that one build may use, by the registry's host.
pub struct Logins {
    by_host: HashMap<String, DockerCredentials>,
}

impl Logins {
    /// Reads them all; a helper that fails leaves its registry without a login, and says so to the operator.
    pub async fn read(docker: &config::Docker, environment: &Environment) -> anyhow::Result<Self> {
        let mut by_host = match &docker.config_dir {
            Some(folder) => of_docker(&folder.join("config.json")).await?,
            None => HashMap::new(),
        };
        if let Some(login) = &environment.registry {
            let host = host(&format!("{}/", environment.image_prefix)).to_owned();
            let credentials = credentials(&host, &login.username, login.password.expose());
            by_host.insert(host, credentials);
        }
        Ok(Self { by_host })
    }

    /// For a push or a pull of this reference.
    pub fn of(&self, reference: &str) -> Option<DockerCredentials> {
        self.by_host.get(host(reference)).cloned()
    }

    /// For BuildKit's session.
    pub fn for_buildkit(&self) -> HashMap<String, DockerCredentials> {
        let rename = |host: &String| match host.as_str() {
            "docker.io" => HUB_HOST.to_owned(),
            _ => host.clone(),
        };
        self.by_host
            .iter()
            .map(|(host, login)| (rename(host), login.clone()))
            .collect()
    }

    /// Somebody else's words without our secrets.
    pub fn scrub(&self, text: &str) -> String {
        let secrets = self.by_host.values().flat_map(|login| {
            [&login.password, &login.identitytoken]
                .into_iter()
                .flatten()
                .map(String::as_str)
        });
        Masker::new(secrets).mask_text(text)
    }
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct DockerConfig {
    auths: HashMap<String, Auth>,
    #[serde(rename = "credsStore")]
    store: Option<String>,
    #[serde(rename = "credHelpers")]
    helpers: HashMap<String, String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Auth {
    auth: String,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

async fn of_docker(path: &Path) -> anyhow::Result<HashMap<String, DockerCredentials>> {
    let file = match tokio::fs::File::open(path).await {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(HashMap::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let mut text = Vec::new();
    file.take(CONFIG_BYTES_MAX)
        .read_to_end(&mut text)
        .await
        .with_context(|| format!("cannot read {}", path.display()))?;
    // serde_json's own message would quote the file.
    let config: DockerConfig = serde_json::from_slice(&text)
        .map_err(|error| anyhow::anyhow!("line {}, column {}", error.line(), error.column()))
        .with_context(|| format!("{} is not Docker's configuration", path.display()))?;
    let mut by_host = HashMap::new();
    let mut asked = Vec::new();
    for (key, auth) in &config.auths {
        match inline(key, auth) {
            Some(login) => drop(by_host.insert(normal(key), login)),
            None => asked.extend(config.store.as_ref().map(|helper| (key, helper))),
        }
    }
    asked.extend(&config.helpers);
    let answers = asked
        .into_iter()
        .map(|(key, helper)| ask_named(key.clone(), helper.clone()));
    for (key, helper, answer) in futures_util::future::join_all(answers).await {
        match answer {
            Ok(login) => drop(by_host.insert(normal(&key), login)),
            Err(error) => {
                tracing::warn!(registry = %key, %helper, "no login from the credential helper: {error:#}")
            }
        }
    }
    Ok(by_host)
}

fn inline(key: &str, auth: &Auth) -> Option<DockerCredentials> {
    let decoded = STANDARD.decode(&auth.auth).ok()?;
    let decoded = String::from_utf8(decoded).ok()?;
    let pair = decoded
        .split_once(':')
        .map(|(name, password)| (name.to_owned(), password.trim_end_matches('\0').to_owned()))
        .or_else(|| auth.username.clone().zip(auth.password.clone()));
    let mut login = match pair {
        Some((name, password)) => credentials(&normal(key), &name, &password),
        None => DockerCredentials::default(),
    };
    login.identitytoken = auth.identitytoken.clone().filter(|token| !token.is_empty());
    (login.username.is_some() || login.identitytoken.is_some()).then_some(login)
}

async fn ask_named(
    key: String,
    helper: String,
) -> (String, String, anyhow::Result<DockerCredentials>) {
    let answer = ask(&helper, &key).await;
    (key, helper, answer)
}

/// `docker-credential-HELPER get`, with the registry on its standard input.
async fn ask(helper: &str, key: &str) -> anyhow::Result<DockerCredentials> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    ensure!(
        helper.bytes().all(is_plain),
        "{helper:?} is no name of a helper"
    );
    let mut child = tokio::process::Command::new(format!("docker-credential-{helper}"))
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context("cannot start it")?;
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let talk = async {
        if let Some(mut stdin) = stdin {
            stdin.write_all(key.as_bytes()).await?;
        }
        let mut text = Vec::new();
        if let Some(stdout) = stdout {
            stdout.take(HELPER_BYTES_MAX).read_to_end(&mut text).await?;
        }
        anyhow::Ok((text, child.wait().await?))
    };
    let (text, status) = tokio::time::timeout(HELPER_TIMEOUT, talk)
        .await
        .context("it does not answer")??;
    ensure!(status.success(), "it ended with {status}");
    let answer: Answer =
        serde_json::from_slice(&text).map_err(|_| anyhow::anyhow!("it does not answer in JSON"))?;
    let mut login = credentials(&normal(key), &answer.username, &answer.secret);
    if answer.username == "<token>" {
        login.identitytoken = login.password.take();
        login.username = None;
    }
    Ok(login)
}

fn credentials(host: &str, username: &str, password: &str) -> DockerCredentials {
    let address = if host == "docker.io" { HUB_KEY } else { host };
    DockerCredentials {
        username: Some(username.to_owned()),
        password: Some(password.to_owned()),
        serveraddress: Some(address.to_owned()),
        ..DockerCredentials::default()
    }
}

/// The host of a key of config.json, which may be a whole address.
fn normal(key: &str) -> String {
    let host = key
        .trim_start_matches("https://")
        .trim_start_matches("http://")
        .split('/')
        .next()
        .unwrap_or_default();
    match host {
        "index.docker.io" | HUB_HOST => "docker.io".to_owned(),
        host => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_reference_names_its_registry() {
        assert_eq!(host("debian"), "docker.io");
        assert_eq!(host("acme/web:1"), "docker.io");
        assert_eq!(host("localhost/web"), "localhost");
        assert_eq!(host("localhost:5001/web"), "localhost:5001");
        assert_eq!(host("ghcr.io/acme/web@sha256:00"), "ghcr.io");
    }

    #[test]
    fn a_port_is_no_tag() {
        assert_eq!(
            split("localhost:5001/web"),
            ("localhost:5001/web", "latest")
        );
        assert_eq!(split("localhost:5001/web:2"), ("localhost:5001/web", "2"));
        assert_eq!(split("web@sha256:ab"), ("web", "sha256:ab"));
    }

    #[tokio::test]
    async fn logins_are_read_as_docker_keeps_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let pair = STANDARD.encode("me:pass:word");
        let text = format!(
            r#"{{"auths": {{"https://index.docker.io/v1/": {{"auth": "{pair}"}}, "ghcr.io": {{"auth": "{pair}", "identitytoken": "tok"}}, "empty.io": {{}}}}, "other": 1}}"#
        );
        std::fs::write(&path, text).unwrap();
        let logins = Logins {
            by_host: of_docker(&path).await.unwrap(),
        };
        let hub = logins.of("acme/web").unwrap();
        assert_eq!(hub.password.as_deref(), Some("pass:word"));
        assert_eq!(hub.serveraddress.as_deref(), Some(HUB_KEY));
        assert_eq!(
            logins.of("ghcr.io/x/y").unwrap().identitytoken.as_deref(),
            Some("tok")
        );
        assert!(logins.of("empty.io/x").is_none());
        assert!(logins.for_buildkit().contains_key(HUB_HOST));
        assert_eq!(logins.scrub("refused me:pass:word"), "refused me:***");
    }

    #[tokio::test]
    async fn a_broken_configuration_is_not_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, r#"{"auths": {"x": {"auth": canary}}}"#).unwrap();
        let error = of_docker(&path).await.unwrap_err();
        assert!(!format!("{error:#}").contains("canary"), "{error:#}");
    }

    #[tokio::test]
    async fn a_helper_that_is_missing_is_an_error_of_that_login_only() {
        assert!(ask("landfall-no-such-helper", "ghcr.io").await.is_err());
        assert!(ask("../evil", "ghcr.io").await.is_err());
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let path = folder.path().join("config.json");
        std::fs::write(&path, r#"{"credHelpers": {"a.io": "landfall-no-such-helper"}, "auths": {"b.io": {"auth": "bTpw"}}}"#).unwrap();
        let by_host = of_docker(&path).await.unwrap();
        assert!(by_host.contains_key("b.io") && !by_host.contains_key("a.io"));
    }
}
