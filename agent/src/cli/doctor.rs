//! `landfall doctor`: what a build needs, looked at from here, each with its fix.
//!
//! The line: agent.yaml → all checks side by side, each within `CHECK_LIMIT` → findings. Changes nothing, neither here
//! nor in the cluster.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use futures_util::future::{BoxFuture, FutureExt, join_all};
use rustix::fs::{Access, access, statvfs};

use super::findings::{self, Finding};
use super::{OutputArgument, doctor_cluster, doctor_registry, exit};
use crate::config::{self, Config, Environment};
use crate::git::process;
use crate::stages::checkout;
use crate::{docker, github};

/// Of one check.
pub const CHECK_LIMIT: Duration = Duration::from_secs(5);
const DOCKER_MIN: (u32, u32) = (20, 10);
/// Beyond what agent.yaml's `min_free_bytes` keeps builds from beginning.
const DISK_BYTES_SPARE: u64 = 4 << 30;

/// Look at everything that a build needs, and say how to mend what is missing
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  landfall doctor\n  landfall doctor --config /etc/landfall/agent.yaml --output json\n\nExit codes: 0 nothing fails, 2 agent.yaml cannot be used, 5 something fails"
)]
pub struct Arguments {
    /// The operator's file
    #[arg(long, value_name = "FILE", default_value = config::AGENT_YAML)]
    config: PathBuf,
    #[command(flatten)]
    output: OutputArgument,
}

pub async fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let path = arguments.config.display().to_string();
    let (findings, code) = match Config::load(&arguments.config) {
        Ok(config) => {
            let mut findings = vec![configuration(&path, &config)];
            findings.extend(look(&config, &path).await);
            let code = if findings::any_failed(&findings) {
                exit::UNREACHABLE
            } else {
                0
            };
            (findings, code)
        }
        Err(error) => {
            let fix = "mend it, or name another file with --config";
            let mut findings = vec![Finding::fail("agent.yaml", format!("{error:#}"), fix)];
            findings.extend(limited("docker", check_docker(&config::Docker::default())).await);
            (findings, exit::USAGE)
        }
    };
    findings::print(&findings, arguments.output.is_json())?;
    Ok(ExitCode::from(code))
}

fn configuration(path: &str, config: &Config) -> Finding {
    let names: Vec<&str> = config
        .environments
        .iter()
        .map(|environment| environment.name.as_str())
        .collect();
    match names.as_slice() {
        [] => Finding::fail(
            "agent.yaml",
            format!("{path} names no environment"),
            "add one under `environments:`; the README has an example",
        ),
        names => Finding::ok(
            "agent.yaml",
            format!("{path}, environments: {}", names.join(", ")),
        ),
    }
}

async fn look(config: &Config, path: &str) -> Vec<Finding> {
    let mut checks: Vec<BoxFuture<'_, Vec<Finding>>> = vec![
        limited("agent", check_agent(config, path)).boxed(),
        async { vec![check_data_dir(&config.data_dir), check_disk(config)] }.boxed(),
        limited("docker", check_docker(&config.docker)).boxed(),
        check_github(config).boxed(),
    ];
    for environment in &config.environments {
        checks.push(async { vec![check_secrets(environment)] }.boxed());
        checks.push(limited_for(environment, "clone", check_clone(environment)).boxed());
        checks.push(
            limited_for(
                environment,
                "registry",
                doctor_registry::check(config, environment),
            )
            .boxed(),
        );
        checks.push(doctor_cluster::check(environment).boxed());
    }
    join_all(checks).await.into_iter().flatten().collect()
}

/// A check that takes too long fails.
pub async fn limited(check: &str, looking: impl Future<Output = Vec<Finding>>) -> Vec<Finding> {
    tokio::time::timeout(CHECK_LIMIT, looking)
        .await
        .unwrap_or_else(|_| {
            let says = format!("no answer within {} s", CHECK_LIMIT.as_secs());
            vec![Finding::fail(
                check,
                says,
                "is it up, and does the network let us through?",
            )]
        })
}

async fn limited_for(
    environment: &Environment,
    check: &str,
    looking: impl Future<Output = Vec<Finding>>,
) -> Vec<Finding> {
    limited(&name(environment, check), looking).await
}

/// `hello: registry`.
pub fn name(environment: &Environment, check: &str) -> String {
    format!("{}: {check}", environment.name)
}

async fn check_agent(config: &Config, path: &str) -> Vec<Finding> {
    let address = config::reachable(config.listen);
    let fix = format!("start it: landfall serve --config {path}");
    let asked = async {
        reqwest::Client::builder()
            .no_proxy()
            .build()?
            .get(format!("http://{address}/readyz"))
            .send()
            .await
    };
    vec![match asked.await {
        Ok(answer) if answer.status().is_success() => {
            Finding::ok("agent", format!("running, {}", config.base_url()))
        }
        Ok(answer) => Finding::warn(
            "agent",
            format!("something answers {} at {address}", answer.status()),
            "see its log, or choose another `listen`",
        ),
        Err(_) => Finding::warn(
            "agent",
            format!("not running: nobody answers at {address}"),
            fix,
        ),
    }]
}

fn check_data_dir(data_dir: &Path) -> Finding {
    let shown = data_dir.display();
    let (existing, note) = match data_dir.is_dir() {
        true => (data_dir, String::new()),
        false => (nearest(data_dir), ", made at the first start".to_owned()),
    };
    match access(existing, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => Finding::ok("data_dir", format!("{shown}{note}")),
        Err(error) => Finding::fail(
            "data_dir",
            format!("cannot write to {}: {error}", existing.display()),
            format!(
                "let the agent's user own it: mkdir -p {shown} && chown USER {shown}; or set `data_dir`"
            ),
        ),
    }
}

/// The folder itself, or the first above it that exists.
fn nearest(path: &Path) -> &Path {
    path.ancestors()
        .find(|one| one.is_dir())
        .unwrap_or(Path::new("/"))
}

fn check_disk(config: &Config) -> Finding {
    let data_dir = &config.data_dir;
    let place = nearest(data_dir);
    let free = match statvfs(place) {
        Ok(found) => found.f_bavail.saturating_mul(found.f_frsize),
        Err(error) => {
            return Finding::warn(
                "disk",
                format!("cannot see how full {} is: {error}", place.display()),
                "look with `df`",
            );
        }
    };
    let says = format!(
        "{:.1} GiB free for {}",
        bytes_as_gib(free),
        data_dir.display()
    );
    let fix = "make room, or move `data_dir`: trees, build contexts and logs are kept there";
    let least = config.min_free_bytes;
    if free < least {
        let says = format!(
            "{says}; below {:.1} GiB (`min_free_bytes`) no build begins",
            bytes_as_gib(least)
        );
        return Finding::fail("disk", says, fix);
    }
    match free < least.saturating_add(DISK_BYTES_SPARE) {
        true => Finding::warn("disk", says, fix),
        false => Finding::ok("disk", says),
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "for people, with one digit behind the point"
)]
fn bytes_as_gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

async fn check_docker(settings: &config::Docker) -> Vec<Finding> {
    let engine = match docker::connect(settings).await {
        Ok(engine) => engine,
        Err(error) => {
            let fix = "start Docker (`systemctl start docker`), add this user to the group `docker`, or set `docker.host` or DOCKER_HOST";
            return vec![Finding::fail(
                "docker",
                format!("cannot reach it: {error}"),
                fix,
            )];
        }
    };
    let version = match engine.version().await {
        Ok(version) => version.version.unwrap_or_default(),
        Err(error) => {
            return vec![Finding::fail(
                "docker",
                format!("it does not say its version: {error}"),
                "restart Docker",
            )];
        }
    };
    if is_older(&version) {
        return vec![Finding::fail(
            "docker",
            format!("{version} is too old"),
            "install Docker 20.10 or later",
        )];
    }
    vec![match docker::lacks_buildkit(&engine).await {
        Ok(None) => Finding::ok("docker", format!("{version}, with BuildKit")),
        Ok(Some(_)) => {
            let fix = "install Docker 20.10 or later; Podman cannot build here yet";
            Finding::fail(
                "docker",
                format!("{version} has only the classic builder"),
                fix,
            )
        }
        Err(error) => Finding::fail(
            "docker",
            format!("it does not say what it can do: {error}"),
            "restart Docker",
        ),
    }]
}

/// A version that is not like `24.0.7` is a development build, and taken.
fn is_older(version: &str) -> bool {
    let mut parts = version.split('.').map(|part| part.parse::<u32>().ok());
    let (Some(Some(major)), Some(Some(minor))) = (parts.next(), parts.next()) else {
        return false;
    };
    (major, minor) < DOCKER_MIN
}

fn check_secrets(environment: &Environment) -> Finding {
    let count = environment.webhook_secrets.len();
    let least = config::WEBHOOK_SECRET_BYTES_MIN;
    Finding::ok(
        name(environment, "webhook secret"),
        format!("{count} of at least {least} bytes"),
    )
}

async fn check_clone(environment: &Environment) -> Vec<Finding> {
    let check = name(environment, "clone");
    let (url, branch) = (&environment.clone_url, &environment.branch);
    let head = async {
        let (exe, folder) = (process::own_exe()?, Throwaway::new(environment)?);
        checkout::branch_head(environment, &exe, &folder.0).await
    };
    vec![match head.await {
        Ok(Some(commit)) => Finding::ok(
            check,
            format!("{url}, {branch} is at {}", crate::builds::short(&commit)),
        ),
        Ok(None) => Finding::fail(
            check,
            format!("{url} has no branch {branch:?}"),
            "push it, or set `branch`",
        ),
        Err(error) => {
            let fix = format!(
                "try `git ls-remote {url} {branch}`; a private repository needs `clone_token`, or `ssh_key` and `known_hosts`"
            );
            Finding::fail(check, format!("{error:#}"), fix)
        }
    }]
}

/// A folder for one question to git. Not the agent's own: we may be another user, and would leave it what it cannot use.
struct Throwaway(PathBuf);

impl Throwaway {
    fn new(environment: &Environment) -> anyhow::Result<Self> {
        let name = format!(
            "landfall-doctor-{}-{}",
            std::process::id(),
            environment.name
        );
        let path = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Throwaway {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

async fn check_github(config: &Config) -> Vec<Finding> {
    if config.github.token.is_none() {
        let fix = "set `github.token` (or LANDFALL_GITHUB_TOKEN_FILE) to a token that may write commit statuses";
        return vec![Finding::warn(
            "github token",
            "there is none: commits get no status on GitHub",
            fix,
        )];
    }
    let mut repositories: Vec<&str> = config
        .environments
        .iter()
        .map(|environment| environment.repository.as_str())
        .collect();
    repositories.sort_unstable();
    repositories.dedup();
    let checks = repositories.into_iter().map(async |repository| {
        let looking = async {
            vec![match github::check(&config.github, repository).await {
                Ok(()) => Finding::ok("github token", format!("it can see {repository}")),
                Err(error) => Finding::fail(
                    "github token",
                    format!("{error:#}"),
                    "make a token that may read the repository and write commit statuses",
                ),
            }]
        };
        limited("github token", looking).await
    });
    join_all(checks).await.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_docker_are_compared_as_numbers() {
        for old in ["19.03.15", "20.9.1", "1.13.0"] {
            assert!(is_older(old), "{old}");
        }
        for new in ["20.10.0", "29.0", "100.1.1", "dev", "", "library-import"] {
            assert!(!is_older(new), "{new}");
        }
    }

    #[tokio::test]
    async fn a_check_that_hangs_fails_at_its_limit() {
        let findings = limited("docker", std::future::pending()).await;
        assert!(findings[0].says.contains("no answer within 5 s"));
    }

    #[test]
    fn a_data_folder_that_is_not_there_is_judged_by_where_it_will_be() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("a/b/data");
        assert_eq!(check_data_dir(&data).level, findings::Level::Ok);
        assert_eq!(nearest(&data), folder.path());
    }
}
