//! git in a process of its own: our binary once more (`landfall __git`), killed at its deadline or when it is dropped.
//!
//! The line: one request on its stdin, JSON lines on its stdout, an answer or a trouble at the end. The token travels
//! on stdin only: never in a URL, an argument, the environment or an error.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use sha2::Digest;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

use crate::build_log::Masker;
use crate::builds::Cause;
use crate::config::{self, Environment};

/// The hidden subcommand; `main.rs` hands it to `git::child::main_in_child`.
pub const SUBCOMMAND: &str = "__git";
/// One line either way.
pub const LINE_BYTES_MAX: u64 = 1 << 20;
/// What is kept of the child's stderr.
const STDERR_BYTES_MAX: u64 = 16 * 1024;

static HALVES: AtomicU64 = AtomicU64::new(0);

/// What the child is asked. Holds the token: no `Debug`.
#[derive(Serialize, Deserialize)]
pub struct Request {
    pub url: String,
    /// With its own login, where it wants one.
    pub proxy: Option<String>,
    pub token: Option<String>,
    pub ssh_key: Option<PathBuf>,
    /// The bare repository that mirrors `url`.
    pub mirror: PathBuf,
    pub branch: String,
    pub job: Job,
    pub bytes_max: u64,
    /// Processor time.
    pub seconds_max: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Job {
    /// The branch's head, without fetching anything.
    Head,
    /// Writes the tree of a commit; unless it is older than one of `newer`.
    Checkout {
        commit: String,
        newer: Vec<String>,
        tree: PathBuf,
    },
}

/// One line of the child's stdout.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// Something moved.
    Alive,
    /// For the build log.
    Note(String),
    Answer(Answer),
    Trouble(Trouble),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Head(Option<String>),
    Stale { head: String },
    Tree(TreeFacts),
}

/// What is known of a checked-out commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TreeFacts {
    pub commit: String,
    /// Seconds since 1970.
    pub commit_time: i64,
    pub title: String,
    pub author: String,
    pub files: u64,
    pub bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trouble {
    /// The server could not be asked: worth another try.
    Network(String),
    /// What the operator has to mend, with how.
    Setup(String),
    /// What the author of the push has to mend.
    Cause(Cause),
    /// Ours: disk, mirror, the child itself.
    Agent(String),
}

impl Trouble {
    fn masked(self, masker: &Masker) -> Self {
        match self {
            Self::Network(text) => Self::Network(masker.mask_text(&text)),
            Self::Setup(text) => Self::Setup(masker.mask_text(&text)),
            Self::Agent(text) => Self::Agent(masker.mask_text(&text)),
            Self::Cause(mut cause) => {
                cause.sentence = masker.mask_text(&cause.sentence);
                cause.object = cause.object.map(|object| masker.mask_text(&object));
                Self::Cause(cause)
            }
        }
    }
}

/// Our own binary, also after it was replaced on disk.
pub fn own_exe() -> anyhow::Result<PathBuf> {
    let own = Path::new("/proc/self/exe");
    if own.exists() {
        return Ok(own.to_owned());
    }
    std::env::current_exe().context("cannot find our own binary")
}

/// Where the mirror of a clone URL is: a readable name, and enough of a hash to be unique.
pub fn mirror_of(mirrors: &Path, url: &str) -> PathBuf {
    let name: String = url
        .trim_end_matches('/')
        .trim_end_matches(".git")
        .rsplit(['/', ':'])
        .next()
        .unwrap_or_default()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
        .take(40)
        .collect();
    mirrors.join(format!("{name}-{}.git", digest(url)))
}

/// Asks the child once. Dropping the future kills it; so does `silence` without a sign of life.
pub async fn ask(
    exe: &Path,
    environment: &Environment,
    mirrors: &Path,
    branch: &str,
    job: Job,
    silence: Duration,
    note: &(dyn Fn(&str) + Sync),
) -> Result<Answer, Trouble> {
    let token = environment
        .clone_token
        .as_ref()
        .map(|token| token.expose().to_owned());
    let proxy = proxy_to(&environment.clone_url);
    let login = proxy
        .as_deref()
        .and_then(|proxy| url::Url::parse(proxy).ok());
    let password = login.as_ref().and_then(url::Url::password);
    let masker = Masker::new(token.as_deref().into_iter().chain(password));
    let request = Request {
        url: environment.clone_url.clone(),
        proxy,
        token,
        ssh_key: environment.ssh_key.clone(),
        mirror: mirror_of(mirrors, &environment.clone_url),
        branch: branch.to_owned(),
        job,
        bytes_max: environment.limits.clone_bytes,
        seconds_max: environment.limits.clone_timeout_seconds,
    };
    let home = home(mirrors, environment)?;
    let mut child = spawn(exe, &home, &environment.clone_url)?;
    let masked = |text: &str| note(&masker.mask_text(text));
    let conversation = converse(&mut child, &request, silence, &masked);
    conversation
        .await
        .map_err(|trouble| trouble.masked(&masker))
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Self::Agent(format!("{error:#}"))
    }
}

/// None for ssh, which knows none.
fn proxy_to(url: &str) -> Option<String> {
    let address = url.parse().ok()?;
    url.starts_with("http")
        .then(|| config::proxy_for(&address))?
}

/// The child's HOME: nothing but the pinned host keys, named by their content. libgit2 reads them there.
fn home(mirrors: &Path, environment: &Environment) -> anyhow::Result<PathBuf> {
    let pinned = match &environment.known_hosts {
        Some(path) => std::fs::read_to_string(path).with_context(|| {
            format!(
                "cannot read `known_hosts` of environment {:?}, {}",
                environment.name,
                path.display()
            )
        })?,
        None => String::new(),
    };
    let home = mirrors.join("homes").join(digest(&pinned));
    let keys = home.join(".ssh/known_hosts");
    if std::fs::read_to_string(&keys).is_ok_and(|text| text == pinned) {
        return Ok(home);
    }
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(home.join(".ssh"))?;
        // Several builds may come here at once.
        let turn = HALVES.fetch_add(1, Ordering::Relaxed);
        let half = home.join(format!(".ssh/{}-{turn}.half", std::process::id()));
        std::fs::write(&half, &pinned)?;
        std::fs::rename(half, &keys)
    };
    write().with_context(|| format!("cannot write {}", keys.display()))?;
    Ok(home)
}

fn digest(text: &str) -> String {
    hex::encode(sha2::Sha256::digest(text))
        .chars()
        .take(16)
        .collect()
}

fn spawn(exe: &Path, home: &Path, url: &str) -> anyhow::Result<Child> {
    let mut command = Command::new(exe);
    command
        .arg0("landfall")
        .arg(SUBCOMMAND)
        .env_clear()
        .envs(config::variables_for_git());
    let is_over_tls = url.to_ascii_lowercase().starts_with("https:");
    if !is_over_tls {
        // libgit2 reads the machine's certificate authorities at its start, whatever it is asked for; redirects are not followed.
        command.env("SSL_CERT_FILE", "/dev/null");
        command.env("SSL_CERT_DIR", "/dev/null");
    }
    command
        .env("HOME", home)
        .current_dir(home)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {} for git", exe.display()))
}

async fn converse(
    child: &mut Child,
    request: &Request,
    silence: Duration,
    note: &(dyn Fn(&str) + Sync),
) -> Result<Answer, Trouble> {
    let gone = || Trouble::Agent("the git process has no pipes".to_owned());
    let mut stdin = child.stdin.take().ok_or_else(gone)?;
    let mut stdout = BufReader::new(child.stdout.take().ok_or_else(gone)?);
    let stderr = tokio::spawn(head_of(child.stderr.take().ok_or_else(gone)?));
    let mut text = serde_json::to_vec(request).map_err(anyhow::Error::from)?;
    text.push(b'\n');
    // A child that is gone already says why on stderr.
    let _ = stdin.write_all(&text).await;
    let _ = stdin.flush().await;
    let answer = loop {
        match tokio::time::timeout(silence, next_line(&mut stdout)).await {
            Err(_) => {
                break Some(Err(Trouble::Network(format!(
                    "the git server said nothing for {} s",
                    silence.as_secs()
                ))));
            }
            Ok(None) => break None,
            Ok(Some(Line::Alive)) => {}
            Ok(Some(Line::Note(text))) => note(&text),
            Ok(Some(Line::Answer(answer))) => break Some(Ok(answer)),
            Ok(Some(Line::Trouble(trouble))) => break Some(Err(trouble)),
        }
    };
    if let Some(Err(Trouble::Network(_))) = &answer {
        let _ = child.start_kill();
    }
    // The pipe stays open until here: its end is how the child learns that we are gone.
    drop(stdin);
    let status = child.wait().await;
    match answer {
        Some(answer) => answer,
        None => Err(ended_early(status, &stderr.await.unwrap_or_default())),
    }
}

async fn next_line(stdout: &mut (impl AsyncBufReadExt + Unpin)) -> Option<Line> {
    let mut line = Vec::new();
    stdout
        .take(LINE_BYTES_MAX)
        .read_until(b'\n', &mut line)
        .await
        .ok()?;
    serde_json::from_slice(&line).ok()
}

async fn head_of(mut stderr: impl AsyncRead + Unpin) -> String {
    let mut head = Vec::new();
    let _ = (&mut stderr)
        .take(STDERR_BYTES_MAX)
        .read_to_end(&mut head)
        .await;
    let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
    String::from_utf8_lossy(&head).trim().to_owned()
}

fn ended_early(status: std::io::Result<std::process::ExitStatus>, stderr: &str) -> Trouble {
    use std::os::unix::process::ExitStatusExt;
    let signal = status.as_ref().ok().and_then(ExitStatusExt::signal);
    if signal == Some(rustix::process::Signal::XFSZ.as_raw()) {
        return Trouble::Cause(repository_too_large());
    }
    let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
    let words = if stderr.is_empty() {
        String::new()
    } else {
        format!(": {stderr}")
    };
    Trouble::Agent(format!("the git process ended early ({how}){words}"))
}

/// More was received than `limits.clone_bytes`.
pub fn repository_too_large() -> Cause {
    Cause::new(
        "too_large",
        "the repository is larger than the agent accepts",
    )
    .hint("make it smaller, or raise `limits.clone_bytes` in agent.yaml")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_has_a_readable_name_that_stays_in_its_folder() {
        let mirrors = Path::new("/m");
        for url in [
            "https://github.com/acme/hello.git",
            "git@github.com:acme/hello.git",
            "https://github.com/acme/../../..",
            "ssh://git@host:22/~a/$(id);x",
            "https://host/",
        ] {
            let mirror = mirror_of(mirrors, url);
            assert_eq!(mirror.parent(), Some(mirrors), "{url}");
        }
        let one = mirror_of(mirrors, "https://github.com/acme/hello.git");
        assert!(one.to_str().unwrap().starts_with("/m/hello-"), "{one:?}");
        assert_ne!(
            one,
            mirror_of(mirrors, "https://github.com/other/hello.git")
        );
    }
}
