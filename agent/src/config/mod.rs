//! agent.yaml and the environment variables: the operator's word, and the only reader of either.
//!
//! File, then `LANDFALL_*` variables over it, then `LANDFALL_*_FILE` for secrets. Relative paths are relative to the
//! file. Nothing that a repository or a payload says ever reaches this module.

mod access;
mod secret;
mod variables;

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use secrecy::SecretString;
use serde::Deserialize;

pub use self::access::{Access, reachable};
pub use self::secret::Secret;
#[cfg(debug_assertions)]
pub use self::variables::fail_point;
pub use self::variables::{client_to, log_filter, no_color, program, proxy_for, variables_for_git};
use crate::diagnostic;

/// The operator's file, where no other is named.
pub const AGENT_YAML: &str = "agent.yaml";
/// A shorter one could be guessed from signatures offline.
pub const WEBHOOK_SECRET_BYTES_MIN: usize = 32;

/// The kinds that an environment allows where agent.yaml does not say otherwise (design section 8, policy).
pub const KINDS_DEFAULT: [&str; 13] = [
    "Deployment",
    "StatefulSet",
    "DaemonSet",
    "Job",
    "CronJob",
    "Service",
    "Ingress",
    "ConfigMap",
    "HorizontalPodAutoscaler",
    "PodDisruptionBudget",
    "NetworkPolicy",
    "PersistentVolumeClaim",
    "ServiceAccount",
];

/// The whole of agent.yaml, paths made absolute.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Page, API and, without `webhook_listen`, the webhook.
    #[serde(default = "listen")]
    pub listen: SocketAddr,
    /// The webhook alone, where the rest must not be seen from outside.
    #[serde(default)]
    pub webhook_listen: Option<SocketAddr>,
    /// How people reach the page; links in commit statuses, the Host check.
    #[serde(default)]
    pub public_url: Option<String>,
    #[serde(default)]
    pub read_access: ReadAccess,
    #[serde(default = "data_dir")]
    pub data_dir: PathBuf,
    /// `sqlite` (in `data_dir`) or `postgres://…`.
    #[serde(default)]
    pub database: Option<Secret>,
    /// How often each branch's head is compared with the last push that was accepted; 0: never.
    #[serde(default = "reconcile_seconds")]
    pub reconcile_seconds: u64,
    /// Builds of all environments that one agent runs at a time; an undo or redo is never kept waiting.
    #[serde(default = "builds_at_once")]
    pub builds_at_once: usize,
    /// No build begins while the disk of `data_dir` has less than this free.
    #[serde(default = "min_free_bytes")]
    pub min_free_bytes: u64,
    #[serde(default)]
    pub retention: Retention,
    #[serde(default)]
    pub github: Github,
    #[serde(default)]
    pub docker: Docker,
    #[serde(default)]
    pub environments: Vec<Environment>,
}

impl Environment {
    /// For commands that need no server: what a person's kubeconfig leads to. `name` is that of the lease.
    pub fn of_person(
        name: &str,
        kubeconfig: Option<PathBuf>,
        context: Option<String>,
        namespace: String,
    ) -> Self {
        Self {
            name: name.to_owned(),
            repository: String::new(),
            branch: String::new(),
            pipeline: pipeline_path(),
            clone_url: String::new(),
            clone_token: None,
            ssh_key: None,
            known_hosts: None,
            webhook_secrets: Vec::new(),
            kubeconfig_of_person: kubeconfig.is_none(),
            kubeconfig,
            context,
            namespace,
            create_namespace: false,
            image_prefix: String::new(),
            registry: None,
            build_args: BTreeMap::new(),
            allowed_kinds: kinds(),
            take_fields_from: Vec::new(),
            smoke_test_hosts: Vec::new(),
            nodes_autoscale: false,
            prune_many: false,
            limits: Limits::default(),
        }
    }
}

/// What is kept, and how long.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// After the end of a build.
    pub log_days: u64,
    /// Of all builds together; the oldest go first.
    pub log_bytes: u64,
    /// The newest images of each repository that stay on the engine; the registry's are its own affair.
    pub images: usize,
    /// After an image was tagged.
    pub image_days: u64,
    /// Of all our images together, as the engine counts each; the oldest go first. The newest of each repository stays.
    pub image_bytes: u64,
    /// Of builds that were superseded or skipped, and of what was delivered; never less than a week.
    pub build_days: u64,
    /// Beyond so many of the newest such builds and deliveries go too, once they are a week old.
    pub builds: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            log_days: 90,
            log_bytes: 10 << 30,
            images: 10,
            image_days: 90,
            image_bytes: 50 << 30,
            build_days: 365,
            builds: 100_000,
        }
    }
}

/// Who may read pages and `/api`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReadAccess {
    /// Whoever reaches `listen`, which must then be a loopback address.
    #[default]
    Loopback,
    /// Whoever has the admin token.
    Token,
    /// Everyone.
    Public,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Github {
    /// Default `https://api.github.com`.
    pub api_url: Option<String>,
    /// The address that the repository's webhook has, where it is not `Config::webhook_url`'s guess: shown to people, and to know the
    /// webhook again in GitHub's list.
    pub webhook_url: Option<String>,
    pub token: Option<Secret>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Docker {
    /// `unix:///…` or `tcp://…`; default `DOCKER_HOST`, then the local socket.
    pub host: Option<String>,
    /// Folder of Docker's own config.json; default `DOCKER_CONFIG`, then `~/.docker`.
    pub config_dir: Option<PathBuf>,
}

/// Where one branch of one repository lives.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Environment {
    pub name: String,
    /// `owner/name`, as payloads say it.
    pub repository: String,
    pub branch: String,
    #[serde(default = "pipeline_path")]
    pub pipeline: String,
    /// https or ssh; http only to a loopback address.
    pub clone_url: String,
    /// Token for https, given by credential callback and never in a URL.
    #[serde(default)]
    pub clone_token: Option<Secret>,
    /// Private key for ssh.
    #[serde(default)]
    pub ssh_key: Option<PathBuf>,
    /// Pinned host keys for ssh, in the format of OpenSSH; needed with an ssh `clone_url`.
    #[serde(default)]
    pub known_hosts: Option<PathBuf>,
    /// Every one counts, so that a secret can be changed without a gap: `[new, old]`.
    #[serde(default)]
    pub webhook_secrets: Vec<Secret>,
    #[serde(default)]
    pub kubeconfig: Option<PathBuf>,
    #[serde(default)]
    pub context: Option<String>,
    pub namespace: String,
    #[serde(default)]
    pub create_namespace: bool,
    /// Registry and folder of the images, such as `ghcr.io/acme`.
    pub image_prefix: String,
    /// Credentials of the registry; else Docker's own config.json is asked.
    #[serde(default)]
    pub registry: Option<RegistryLogin>,
    /// Build arguments of the operator, never secrets: they show in step names and history.
    #[serde(default)]
    pub build_args: BTreeMap<String, String>,
    #[serde(default = "kinds")]
    pub allowed_kinds: Vec<String>,
    /// Field managers besides `kubectl*` whose fields a release may take.
    #[serde(default)]
    pub take_fields_from: Vec<String>,
    /// Hosts that `smoke_test: url:` may ask.
    #[serde(default)]
    pub smoke_test_hosts: Vec<String>,
    /// New nodes may come: an unschedulable pod has 120 s.
    #[serde(default)]
    pub nodes_autoscale: bool,
    /// A release may take away more than half of what the last one had, or more than 20 objects.
    #[serde(default)]
    pub prune_many: bool,
    #[serde(default)]
    pub limits: Limits,
    /// A person's own kubeconfig, as kubectl finds it; only for commands that need no server.
    #[serde(skip)]
    pub kubeconfig_of_person: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistryLogin {
    pub username: String,
    pub password: Secret,
}

/// What one build may use. The repository can only ask for less.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    pub clone_timeout_seconds: u64,
    /// Of objects received in one fetch, and of one checked-out tree.
    pub clone_bytes: u64,
    pub context_bytes: u64,
    pub context_files: u64,
    pub build_timeout_seconds: u64,
    pub push_timeout_seconds: u64,
    pub test_timeout_seconds: u64,
    pub test_memory_bytes: u64,
    pub test_processes: u64,
    pub test_cpus: u64,
    /// Whether `network: true` of a test is granted.
    pub test_network: bool,
    pub log_bytes: u64,
    /// How long Docker, the registry or the cluster may be away before a build is errored.
    pub unreachable_seconds: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            clone_timeout_seconds: 600,
            clone_bytes: 2 << 30,
            context_bytes: 1 << 30,
            context_files: 100_000,
            build_timeout_seconds: 3600,
            push_timeout_seconds: 900,
            test_timeout_seconds: 1800,
            test_memory_bytes: 4 << 30,
            test_processes: 1024,
            test_cpus: 2,
            test_network: false,
            log_bytes: 1 << 30,
            unreachable_seconds: 60,
        }
    }
}

impl Config {
    /// Reads the file, puts the variables over it, reads the secret files and checks everything that can be checked
    /// without the outside world.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        Self::load_with(path, &|name| std::env::var(name).ok())
    }

    /// As `load`, with the variables given: what tests call.
    pub fn load_with(
        path: &Path,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(|| {
            format!(
                "cannot read {name}; name the file with --config, or see the README for an example"
            )
        })?;
        let mut config: Self =
            diagnostic::parse_yaml(&name, &text).map_err(diagnostic::Diagnostic::without_values)?;
        let base = std::path::absolute(path)?
            .parent()
            .map(Path::to_path_buf)
            .unwrap_or_default();
        config.override_by(variable)?;
        config.make_absolute(&base)?;
        config
            .check()
            .with_context(|| format!("{name} cannot be used"))?;
        Ok(config)
    }

    /// Bytes that the disk of `data_dir` has left. One that cannot be asked counts as having room: a build will find out.
    pub fn free_bytes(&self) -> u64 {
        rustix::fs::statvfs(&self.data_dir)
            .map_or(u64::MAX, |disk| disk.f_bavail.saturating_mul(disk.f_frsize))
    }

    fn override_by(&mut self, variable: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<()> {
        let secret = |name: &str| -> anyhow::Result<Option<Secret>> {
            if let Some(path) = variable(&format!("{name}_FILE")) {
                return Secret::from_file(Path::new(&path)).map(Some);
            }
            Ok(variable(name).map(|text| Secret::Text(SecretString::from(text))))
        };
        if let Some(text) = variable("LANDFALL_LISTEN") {
            self.listen = text.parse().with_context(|| {
                format!("LANDFALL_LISTEN={text:?} is not an address like 127.0.0.1:8080")
            })?;
        }
        if let Some(text) = variable("LANDFALL_WEBHOOK_LISTEN") {
            self.webhook_listen = Some(text.parse().with_context(|| {
                format!("LANDFALL_WEBHOOK_LISTEN={text:?} is not an address like 0.0.0.0:8081")
            })?);
        }
        if let Some(text) = variable("LANDFALL_PUBLIC_URL") {
            self.public_url = Some(text);
        }
        if let Some(text) = variable("LANDFALL_READ_ACCESS") {
            self.read_access = match text.as_str() {
                "loopback" => ReadAccess::Loopback,
                "token" => ReadAccess::Token,
                "public" => ReadAccess::Public,
                _ => anyhow::bail!(
                    "LANDFALL_READ_ACCESS={text:?} is none of loopback, token, public"
                ),
            };
        }
        if let Some(text) = variable("LANDFALL_DATA_DIR") {
            self.data_dir = std::path::absolute(text)?;
        }
        if let Some(text) = variable("LANDFALL_GITHUB_API_URL") {
            self.github.api_url = Some(text);
        }
        let docker = &mut self.docker;
        docker.host = docker.host.take().or_else(|| variable("DOCKER_HOST"));
        docker.config_dir = docker
            .config_dir
            .take()
            .or_else(|| variable("DOCKER_CONFIG").map(PathBuf::from))
            .or_else(|| variable("HOME").map(|home| Path::new(&home).join(".docker")));
        if let Some(token) = secret("LANDFALL_GITHUB_TOKEN")? {
            self.github.token = Some(token);
        }
        if let Some(database) = secret("LANDFALL_DATABASE")? {
            self.database = Some(database);
        }
        if let Some(webhook) = secret("LANDFALL_WEBHOOK_SECRET")? {
            for environment in &mut self.environments {
                environment.webhook_secrets = vec![webhook.clone()];
            }
        }
        Ok(())
    }

    fn make_absolute(&mut self, base: &Path) -> anyhow::Result<()> {
        self.data_dir = base.join(&self.data_dir);
        if let Some(folder) = &mut self.docker.config_dir {
            *folder = base.join(&*folder);
        }
        for secret in self.github.token.iter_mut().chain(self.database.iter_mut()) {
            secret.read(base)?;
        }
        for environment in &mut self.environments {
            let paths = [
                &mut environment.kubeconfig,
                &mut environment.ssh_key,
                &mut environment.known_hosts,
            ];
            for path in paths.into_iter().flatten() {
                *path = base.join(&*path);
            }
            let login = environment
                .registry
                .as_mut()
                .map(|login| &mut login.password);
            for secret in environment
                .webhook_secrets
                .iter_mut()
                .chain(environment.clone_token.iter_mut())
                .chain(login)
            {
                secret.read(base)?;
            }
        }
        Ok(())
    }

    fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.listen.ip().is_loopback() || self.read_access != ReadAccess::Loopback,
            "`listen: {}` can be reached from outside: say who may read with `read_access: token` or `read_access: public`",
            self.listen
        );
        anyhow::ensure!(
            self.builds_at_once > 0,
            "`builds_at_once: 0` would build nothing: say 1 or more"
        );
        let (mut names, mut places) = (HashSet::new(), HashSet::new());
        for environment in &self.environments {
            environment
                .check()
                .with_context(|| format!("environment {:?}", environment.name))?;
            anyhow::ensure!(
                names.insert(&environment.name),
                "two environments are called {:?}",
                environment.name
            );
            let place = (
                &environment.kubeconfig,
                &environment.context,
                &environment.namespace,
            );
            anyhow::ensure!(
                places.insert(place),
                "environment {:?} shares the namespace {:?} with another: each release would take the other's place",
                environment.name,
                environment.namespace
            );
        }
        Ok(())
    }

    pub fn environment(&self, name: &str) -> Option<&Environment> {
        self.environments
            .iter()
            .find(|environment| environment.name == name)
    }

    /// Where links lead: `public_url`, or the address that is listened on.
    pub fn base_url(&self) -> String {
        self.public_url
            .clone()
            .unwrap_or_else(|| format!("http://{}", self.listen))
            .trim_end_matches('/')
            .to_owned()
    }

    /// Where GitHub reaches the webhook, as far as we know.
    pub fn webhook_url(&self) -> String {
        match (
            &self.github.webhook_url,
            &self.public_url,
            self.webhook_listen,
        ) {
            (Some(url), ..) => url.clone(),
            (None, None, Some(listen)) => format!("http://{listen}/webhook"),
            (None, ..) => format!("{}/webhook", self.base_url()),
        }
    }

    /// Every secret that must never show in a log.
    pub fn secrets(&self) -> Vec<&str> {
        let environments = self.environments.iter().flat_map(|environment| {
            let login = environment.registry.as_ref().map(|login| &login.password);
            environment
                .webhook_secrets
                .iter()
                .chain(&environment.clone_token)
                .chain(login)
        });
        environments
            .chain(&self.github.token)
            .chain(
                self.database
                    .iter()
                    .filter(|database| database.expose().contains("://")),
            )
            .map(Secret::expose)
            .collect()
    }
}

impl Environment {
    fn check(&self) -> anyhow::Result<()> {
        let name_is_plain = !self.name.is_empty()
            && self.name.len() <= 40
            && self
                .name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        anyhow::ensure!(
            name_is_plain,
            "a name has 1 to 40 lower case letters, digits and '-'"
        );
        anyhow::ensure!(
            !self.webhook_secrets.is_empty(),
            "has no `webhook_secrets`: whoever reaches the webhook could deploy"
        );
        for secret in &self.webhook_secrets {
            let bytes = secret.expose().trim().len();
            anyhow::ensure!(
                bytes >= WEBHOOK_SECRET_BYTES_MIN,
                "a webhook secret has {bytes} bytes, and needs {WEBHOOK_SECRET_BYTES_MIN} or more: make one with `openssl rand -hex 32`"
            );
        }
        let scheme = self
            .clone_url
            .split_once("://")
            .map_or("ssh", |(scheme, _)| scheme);
        match scheme {
            "https" => {}
            "ssh" => anyhow::ensure!(
                self.known_hosts.is_some(),
                "an ssh `clone_url` needs `known_hosts`, the pinned host keys"
            ),
            "http" => anyhow::ensure!(
                is_loopback_url(&self.clone_url),
                "`clone_url` may be http only to a loopback address"
            ),
            _ => anyhow::bail!("`clone_url` must be https or ssh, not {scheme}"),
        }
        anyhow::ensure!(
            !self
                .clone_url
                .split('/')
                .nth(2)
                .unwrap_or_default()
                .contains(':')
                || !url_has_password(&self.clone_url),
            "`clone_url` holds a password: use `clone_token`"
        );
        anyhow::ensure!(
            scheme == "ssh" || !url_has_user(&self.clone_url),
            "`clone_url` holds a user name, which may be a token and is shown in logs: use `clone_token`"
        );
        anyhow::ensure!(
            !self.image_prefix.is_empty() && !self.image_prefix.ends_with('/'),
            "`image_prefix` must not be empty or end with '/'"
        );
        anyhow::ensure!(!self.namespace.is_empty(), "`namespace` is empty");
        anyhow::ensure!(!self.branch.is_empty(), "`branch` is empty");
        Ok(())
    }

    pub fn kind_is_allowed(&self, kind: &str) -> bool {
        self.allowed_kinds.iter().any(|allowed| allowed == kind)
    }
}

fn url_has_user(url: &str) -> bool {
    url::Url::parse(url).is_ok_and(|url| !url.username().is_empty())
}

fn url_has_password(url: &str) -> bool {
    url::Url::parse(url).is_ok_and(|url| url.password().is_some())
}

pub fn is_loopback_url(url: &str) -> bool {
    match url::Url::parse(url).as_ref().map(url::Url::host) {
        Ok(Some(url::Host::Ipv4(ip))) => ip.is_loopback(),
        Ok(Some(url::Host::Ipv6(ip))) => ip.is_loopback(),
        Ok(Some(url::Host::Domain(name))) => name == "localhost",
        _ => false,
    }
}

fn listen() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 8080))
}
fn min_free_bytes() -> u64 {
    1 << 30
}
fn builds_at_once() -> usize {
    4
}
fn reconcile_seconds() -> u64 {
    60
}
fn data_dir() -> PathBuf {
    PathBuf::from("data")
}
fn pipeline_path() -> String {
    "pipeline.yaml".to_owned()
}
fn kinds() -> Vec<String> {
    KINDS_DEFAULT.iter().map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub const ENVIRONMENT: &str = "environments:\n  - name: hello\n    repository: acme/hello\n    branch: main\n    clone_url: https://github.com/acme/hello\n    webhook_secrets: [0123456789abcdef0123456789abcdef]\n    namespace: hello\n    image_prefix: localhost:5001\n";

    fn load(text: &str, variables: &[(&str, &str)]) -> anyhow::Result<Config> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("agent.yaml");
        std::fs::write(&path, text)?;
        Config::load_with(&path, &|name| {
            variables
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| (*v).to_owned())
        })
    }

    const README: &str = include_str!("../../../README.md");

    #[test]
    fn the_agent_yaml_of_the_readme_is_read_and_its_defaults_are_ours() {
        let (_, block) = README.split_once("```yaml\n# agent.yaml").unwrap();
        let (block, _) = block.split_once("```").unwrap();
        let folder = tempfile::tempdir().unwrap();
        for file in [
            "github-token",
            "clone-token",
            "webhook-secret",
            "registry-password",
            "agent.kubeconfig",
        ] {
            assert!(block.contains(file), "{file}");
            std::fs::write(folder.path().join(file), "x".repeat(64)).unwrap();
        }
        let path = folder.path().join("agent.yaml");
        std::fs::write(&path, format!("#{block}")).unwrap();
        let read = Config::load_with(&path, &|_| None).unwrap();
        let ours = load(ENVIRONMENT, &[]).unwrap();
        let defaults = |config: &Config| {
            let environment = &config.environments[0];
            format!(
                "{} {:?} {} {} {} {:?} {} {:?} {} {} {:?} {:?}",
                config.listen,
                config.read_access,
                config.reconcile_seconds,
                config.builds_at_once,
                config.min_free_bytes,
                config.retention,
                environment.pipeline,
                environment.take_fields_from,
                environment.create_namespace,
                environment.nodes_autoscale || environment.prune_many,
                environment.smoke_test_hosts,
                environment.limits,
            )
        };
        assert_eq!(defaults(&read), defaults(&ours));
        let kinds = &ours.environments[0].allowed_kinds;
        let said = format!("# default: {} usual kinds, without Secret", kinds.len());
        assert!(block.contains(&said) && !kinds.contains(&"Secret".to_owned()));
    }

    #[test]
    fn a_short_secret_is_refused_with_how_to_make_one() {
        let error = load(
            &ENVIRONMENT.replace("0123456789abcdef0123456789abcdef", "short"),
            &[],
        )
        .unwrap_err();
        assert!(
            format!("{error:#}").contains("openssl rand -hex 32"),
            "{error:#}"
        );
    }

    #[test]
    fn an_open_listener_needs_a_word_on_who_may_read() {
        let error = load(&format!("listen: 0.0.0.0:8080\n{ENVIRONMENT}"), &[]).unwrap_err();
        assert!(format!("{error:#}").contains("read_access"), "{error:#}");
        assert!(
            load(
                &format!("listen: 0.0.0.0:8080\nread_access: token\n{ENVIRONMENT}"),
                &[]
            )
            .is_ok()
        );
    }

    #[test]
    fn variables_override_the_file() {
        let config = load(ENVIRONMENT, &[("LANDFALL_LISTEN", "127.0.0.1:9999")]).unwrap();
        assert_eq!(config.listen.port(), 9999);
    }

    #[test]
    fn plain_http_is_for_loopback_only() {
        let to = |url: &str| {
            load(
                &ENVIRONMENT.replace("https://github.com/acme/hello", url),
                &[],
            )
        };
        assert!(to("http://127.0.0.1:9000/hello.git").is_ok());
        assert!(to("http://example.org/hello.git").is_err());
        assert!(to("file:///etc").is_err());
        assert!(to("https://me:secret@example.org/x.git").is_err());
    }

    #[test]
    fn a_secret_under_a_misspelt_key_is_not_shown() {
        let text = ENVIRONMENT.replace(
            "webhook_secrets: [0123456789abcdef0123456789abcdef]",
            "webhook_secrets: \"0123456789abcdef0123456789abcdef\"",
        );
        let error = format!("{:#}", load(&text, &[]).unwrap_err());
        assert!(
            error.contains(":6:") && !error.contains("0123456789"),
            "{error}"
        );
    }

    #[test]
    fn a_secret_is_never_printed() {
        let config = load(ENVIRONMENT, &[]).unwrap();
        assert!(!format!("{config:?}").contains("0123456789abcdef"));
    }
}
