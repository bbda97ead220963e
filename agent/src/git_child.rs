//! What runs in `landfall __git`: the only file that names git2.
//!
//! The line: open the mirror → fetch the branch → judge the commit → write its tree. It limits itself before it speaks
//! to anyone, follows no redirect to another host, trusts no host key that is not pinned, checks out no submodule.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use git2::{
    CertificateCheckStatus, Cred, CredentialType, ErrorClass, ErrorCode, FetchOptions, Oid,
    RemoteCallbacks, RemoteRedirect, Repository,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use sha2::Digest;

use crate::builds::{Cause, short};
use crate::git_process::{
    Answer, Job, LINE_BYTES_MAX, Line, Request, TreeFacts, Trouble, repository_too_large,
};
use crate::git_tree::{Refusal, Writer, shown};

/// Files and folders of one commit.
const TREE_FILES_MAX: u64 = 500_000;
/// A fetch adds a pack, and nothing ever joins them: from here on the mirror is cloned anew.
const MIRROR_PACKS_MAX: usize = 400;
/// Memory beside what the packs are mapped to.
const MEMORY_BYTES: u64 = 4 << 30;
/// A sign of life this often, at most.
const ALIVE_EVERY: Duration = Duration::from_millis(500);
/// GitHub's replicas can be behind the delivery: a commit that is nowhere is asked for once more after this.
const REPLICA_LAG: Duration = Duration::from_secs(2);
/// Title and author in characters.
const TITLE_CHARS_MAX: usize = 200;
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1";

enum Failure {
    Trouble(Trouble),
    /// The mirror cannot be read: clone it anew.
    Broken(String),
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

/// What git2 says about anything but the server is about the mirror.
impl From<git2::Error> for Failure {
    fn from(error: git2::Error) -> Self {
        Self::Broken(error.message().to_owned())
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Trouble(match refusal {
            Refusal::Cause(cause) => Trouble::Cause(cause),
            Refusal::Io(error) => Trouble::Agent(format!("{error:#}")),
        })
    }
}

/// Reads one request from stdin and answers on stdout. Ends by itself when stdin does: then the agent is gone.
pub fn main_in_child() -> ExitCode {
    let mut line = Vec::new();
    let read = std::io::stdin()
        .lock()
        .take(LINE_BYTES_MAX)
        .read_until(b'\n', &mut line);
    let request: Request = match read.map(|_| serde_json::from_slice(&line)) {
        Ok(Ok(request)) => request,
        _ => {
            eprintln!("this is for the agent's own use");
            return ExitCode::from(2);
        }
    };
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        std::process::exit(1);
    });
    limit_ourselves(&request);
    let report = Report {
        alive: Cell::new(Instant::now()),
    };
    report.line(&match work(&request, &report) {
        Ok(answer) => Line::Answer(answer),
        Err(trouble) => Line::Trouble(trouble),
    });
    ExitCode::SUCCESS
}

fn limit_ourselves(request: &Request) {
    let limit = |resource, value| {
        let both = Rlimit {
            current: Some(value),
            maximum: Some(value),
        };
        let _ = setrlimit(resource, both);
    };
    limit(
        Resource::As,
        request
            .bytes_max
            .saturating_mul(3)
            .saturating_add(MEMORY_BYTES),
    );
    // A little more than the limit that is reported in words.
    limit(Resource::Fsize, request.bytes_max.saturating_add(1 << 20));
    limit(Resource::Cpu, request.seconds_max.max(1));
    limit(Resource::Core, 0);
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
}

struct Report {
    alive: Cell<Instant>,
}

impl Report {
    fn line(&self, line: &Line) {
        let mut text = serde_json::to_vec(line).unwrap_or_default();
        text.push(b'\n');
        let mut out = std::io::stdout().lock();
        if out.write_all(&text).and_then(|()| out.flush()).is_err() {
            std::process::exit(1);
        }
    }

    fn note(&self, text: String) {
        self.line(&Line::Note(text));
    }

    fn alive(&self) {
        if self.alive.get().elapsed() >= ALIVE_EVERY {
            self.alive.set(Instant::now());
            self.line(&Line::Alive);
        }
    }
}

fn work(request: &Request, report: &Report) -> Result<Answer, Trouble> {
    let lock = lock(&request.mirror, report).map_err(|error| {
        Trouble::Agent(format!(
            "cannot lock the mirror {}: {error}",
            request.mirror.display()
        ))
    })?;
    let first = with_mirror(request, report);
    let result = match first {
        Err(Failure::Broken(why)) => {
            report.note(format!(
                "the mirror cannot be used ({why}): cloning it anew"
            ));
            std::fs::remove_dir_all(&request.mirror).map_err(|error| {
                Trouble::Agent(format!(
                    "cannot remove {}: {error}",
                    request.mirror.display()
                ))
            })?;
            if let Job::Checkout { tree, .. } = &request.job {
                let _ = std::fs::remove_dir_all(tree);
            }
            with_mirror(request, report)
        }
        first => first,
    };
    drop(lock);
    result.map_err(|failure| match failure {
        Failure::Trouble(trouble) => trouble,
        Failure::Broken(why) => Trouble::Agent(format!(
            "cannot use {}, although it was cloned anew: {why}",
            request.mirror.display()
        )),
    })
}

/// One process at a time per mirror; the kernel frees it however we end.
fn lock(mirror: &Path, report: &Report) -> std::io::Result<File> {
    use rustix::fs::{FlockOperation, flock};
    if let Some(folder) = mirror.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let file = File::options()
        .create(true)
        .append(true)
        .open(mirror.with_extension("lock"))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        report.note("waiting for another build that uses the same mirror".to_owned());
        while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            report.alive();
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(file)
}

fn with_mirror(request: &Request, report: &Report) -> Result<Answer, Failure> {
    let repository = open(&request.mirror, report)?;
    if let Job::Head = request.job {
        return Ok(Answer::Head(head(request, report, &repository)?));
    }
    let mut tip = fetch(request, report, &repository)?;
    match &request.job {
        Job::Head => Ok(Answer::Head(Some(tip.to_string()))),
        Job::Resolve { digits: None } => Ok(Answer::Resolved(tip.to_string())),
        Job::Resolve {
            digits: Some(digits),
        } => {
            let found = repository
                .find_commit_by_prefix(digits)
                .ok()
                .map(|commit| commit.id());
            match found {
                Some(id) if reaches(&repository, tip, id)? => Ok(Answer::Resolved(id.to_string())),
                _ => Err(Trouble::Setup(format!(
                    "branch {:?} of {} has no commit {digits:?} (or several that begin so)",
                    request.branch, request.url
                ))
                .into()),
            }
        }
        Job::Checkout {
            commit,
            deployed,
            tree,
        } => {
            let id = Oid::from_str(commit)?;
            if !repository.odb()?.exists(id) {
                report.note(format!(
                    "commit {} is not there yet: asking again",
                    short(commit)
                ));
                std::thread::sleep(REPLICA_LAG);
                tip = fetch(request, report, &repository)?;
            }
            if !reaches(&repository, tip, id)? {
                return Err(Trouble::Cause(commit_gone(request, commit, tip)).into());
            }
            if id != tip && is_older(&repository, id, deployed.as_deref())? {
                return Ok(Answer::Stale {
                    head: tip.to_string(),
                });
            }
            Ok(Answer::Tree(write_tree(
                &repository,
                id,
                tree,
                request,
                report,
            )?))
        }
    }
}

fn commit_gone(request: &Request, commit: &str, tip: Oid) -> Cause {
    let head = tip.to_string();
    Cause::new(
        "commit_gone",
        format!("commit {} is no longer on branch {:?}", short(commit), request.branch),
    )
    .hint(format!(
        "the branch was pushed with force, and its head is {} now: build that one, or push the commit again",
        short(&head)
    ))
}

/// Whether `id` is `tip` or one of its ancestors.
fn reaches(repository: &Repository, tip: Oid, id: Oid) -> Result<bool, Failure> {
    if id == tip {
        return Ok(true);
    }
    if repository.find_commit(id).is_err() {
        return Ok(false);
    }
    Ok(repository.graph_descendant_of(tip, id)?)
}

/// Whether what is deployed came after `id`. What the mirror does not know says nothing.
fn is_older(repository: &Repository, id: Oid, deployed: Option<&str>) -> Result<bool, Failure> {
    let Some(deployed) = deployed.and_then(|text| Oid::from_str(text).ok()) else {
        return Ok(false);
    };
    if deployed == id || repository.find_commit(deployed).is_err() {
        return Ok(false);
    }
    Ok(repository.graph_descendant_of(deployed, id)?)
}

/// The mirror, made where it is missing, freed of what a killed predecessor left.
fn open(mirror: &Path, report: &Report) -> Result<Repository, Failure> {
    let packs = mirror.join("objects/pack");
    let mut kept = 0;
    for entry in std::fs::read_dir(&packs).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("pack-") {
            kept += usize::from(name.ends_with(".pack"));
        } else if name.starts_with("pack_") || name.starts_with("tmp_") {
            let _ = std::fs::remove_file(entry.path());
        }
    }
    if kept > MIRROR_PACKS_MAX {
        return Err(Failure::Broken(format!("it is in {kept} pieces")));
    }
    let refs = std::fs::read_dir(mirror.join("refs/landfall"))
        .into_iter()
        .flatten()
        .flatten();
    let locks = refs
        .map(|entry| entry.path())
        .filter(|path| path.extension() == Some("lock".as_ref()));
    for lock in
        locks.chain(["config.lock", "HEAD.lock", "packed-refs.lock"].map(|name| mirror.join(name)))
    {
        let _ = std::fs::remove_file(lock);
    }
    let repository = if mirror.exists() {
        Repository::open_bare(mirror)?
    } else {
        report
            .note("cloning for the first time: this brings the branch's whole history".to_owned());
        let mut options = git2::RepositoryInitOptions::new();
        options
            .bare(true)
            .no_reinit(true)
            .mkpath(true)
            .external_template(false);
        Repository::init_opts(mirror, &options)?
    };
    // Listing a remote takes no options: only this keeps it from following redirects.
    let mut config = git2::Config::open(&mirror.join("config"))?;
    if config.get_bool("http.followRedirects").unwrap_or(true) {
        config.set_bool("http.followRedirects", false)?;
    }
    drop(config);
    Ok(Repository::open_bare(repository.path())?)
}

/// What happened while we spoke with the server; callbacks cannot return it.
#[derive(Default)]
struct Talk {
    asked: Cell<u32>,
    refused: RefCell<Option<String>>,
    host_key: RefCell<Option<String>>,
    too_much: Cell<bool>,
    tip: Cell<Option<Oid>>,
}

/// Fetches the branch and returns its head. The mirror's own name for it is a hash: a branch may be called `a` today
/// and `a/b` tomorrow, or fill a file name to its last byte.
fn fetch(request: &Request, report: &Report, repository: &Repository) -> Result<Oid, Failure> {
    let theirs = format!("refs/heads/{}", request.branch);
    if !git2::Reference::is_valid_name(&theirs) {
        return Err(branch_missing(request).into());
    }
    let name: String = hex::encode(sha2::Sha256::digest(&request.branch));
    let ours = format!("refs/landfall/{name}");
    let talk = Talk::default();
    let mut callbacks = callbacks(request, &talk);
    callbacks.transfer_progress(|progress| {
        report.alive();
        let fits = progress.received_bytes() as u64 <= request.bytes_max;
        talk.too_much.set(!fits);
        fits
    });
    callbacks.sideband_progress(|_| {
        report.alive();
        true
    });
    callbacks.update_tips(|name, _, new| {
        if name == ours {
            talk.tip.set(Some(new));
        }
        true
    });
    let mut options = FetchOptions::new();
    options
        .remote_callbacks(callbacks)
        .follow_redirects(RemoteRedirect::None)
        .download_tags(git2::AutotagOption::None)
        .update_fetchhead(false)
        .report_unchanged(true);
    let mut remote = repository.remote_anonymous(&request.url)?;
    let fetched = remote.fetch(&[format!("+{theirs}:{ours}")], Some(&mut options), None);
    drop(options);
    fetched.map_err(|error| judge(&error, request, &talk))?;
    let Some(tip) = talk.tip.get() else {
        return Err(branch_missing(request).into());
    };
    let stats = remote.stats();
    report.note(format!(
        "received {} objects, {} bytes; branch {:?} is at {}",
        stats.received_objects(),
        stats.received_bytes(),
        request.branch,
        short(&tip.to_string())
    ));
    Ok(tip)
}

fn head(
    request: &Request,
    report: &Report,
    repository: &Repository,
) -> Result<Option<String>, Failure> {
    let theirs = format!("refs/heads/{}", request.branch);
    let talk = Talk::default();
    let mut callbacks = callbacks(request, &talk);
    callbacks.sideband_progress(|_| {
        report.alive();
        true
    });
    let mut remote = repository.remote_anonymous(&request.url)?;
    let connected = remote.connect_auth(git2::Direction::Fetch, Some(callbacks), None);
    let connection = connected.map_err(|error| judge(&error, request, &talk))?;
    let heads = connection
        .list()
        .map_err(|error| judge(&error, request, &talk))?;
    let found = heads.iter().find(|head| head.name() == theirs);
    Ok(found.map(|head| head.oid().to_string()))
}

fn branch_missing(request: &Request) -> Trouble {
    Trouble::Setup(format!(
        "{} has no branch {:?}: push it, or change `branch` in agent.yaml",
        request.url, request.branch
    ))
}

fn callbacks<'a>(request: &'a Request, talk: &'a Talk) -> RemoteCallbacks<'a> {
    let mut callbacks = RemoteCallbacks::new();
    callbacks.credentials(|url, user, allowed| {
        credentials(request, talk, url, user.unwrap_or("git"), allowed).map_err(|why| {
            let error = git2::Error::new(ErrorCode::Auth, ErrorClass::Callback, &why);
            *talk.refused.borrow_mut() = Some(why);
            error
        })
    });
    // libgit2 itself compares: certificates with the system's authorities, host keys with HOME/.ssh/known_hosts.
    callbacks.certificate_check(|certificate, _| {
        if let Some(key) = certificate.as_hostkey() {
            let kind = key.hostkey_type().map_or("unknown", |kind| kind.name());
            let print = key.hash_sha256().map(|hash| {
                use base64::Engine;
                base64::engine::general_purpose::STANDARD_NO_PAD.encode(hash)
            });
            *talk.host_key.borrow_mut() =
                Some(format!("{kind} SHA256:{}", print.unwrap_or_default()));
        }
        Ok(CertificateCheckStatus::CertificatePassthrough)
    });
    callbacks
}

fn credentials(
    request: &Request,
    talk: &Talk,
    url: &str,
    user: &str,
    allowed: CredentialType,
) -> Result<Cred, String> {
    let said = |error: git2::Error| error.message().to_owned();
    if !same_server(url, &request.url) {
        return Err("another server asked for credentials, which it does not get".to_owned());
    }
    if allowed.contains(CredentialType::USERNAME) {
        return Cred::username(user).map_err(said);
    }
    talk.asked.set(talk.asked.get() + 1);
    let again = talk.asked.get() > 1;
    if allowed.contains(CredentialType::SSH_KEY) {
        let Some(key) = &request.ssh_key else {
            return Err("it asks for a key: name one as `ssh_key` in agent.yaml".to_owned());
        };
        if again {
            return Err("it does not accept the key `ssh_key`: add its public half to the repository's deploy keys".to_owned());
        }
        File::open(key)
            .map_err(|error| format!("cannot read `ssh_key` {}: {error}", key.display()))?;
        return Cred::ssh_key(user, None, key, None).map_err(said);
    }
    match &request.token {
        Some(_) if again => Err("it does not accept `clone_token`: check that it is valid and may read the repository".to_owned()),
        Some(token) => Cred::userpass_plaintext("x-access-token", token).map_err(said),
        None => Err("it asks for a token (or the repository does not exist): set `clone_token` in agent.yaml".to_owned()),
    }
}

fn same_server(one: &str, other: &str) -> bool {
    match (url::Url::parse(one), url::Url::parse(other)) {
        (Ok(one), Ok(other)) if other.scheme().starts_with("http") => {
            one.scheme() == other.scheme()
                && one.host() == other.host()
                && one.port_or_known_default() == other.port_or_known_default()
        }
        _ => !other.starts_with("http"),
    }
}

/// What an error in a conversation means to whoever has to mend it.
fn judge(error: &git2::Error, request: &Request, talk: &Talk) -> Failure {
    let (text, url) = (error.message(), &request.url);
    let refused = talk.refused.borrow_mut().take();
    if talk.too_much.get() || error.class() == ErrorClass::NoMemory {
        return Trouble::Cause(repository_too_large()).into();
    }
    if error.code() == ErrorCode::Auth || refused.is_some() || text.contains("authenticat") {
        let why = refused.unwrap_or_else(|| text.to_owned());
        return Trouble::Setup(format!("{url} refuses us: {why}")).into();
    }
    if error.code() == ErrorCode::Certificate {
        return Trouble::Setup(match talk.host_key.borrow().as_deref() {
            Some(key) => format!(
                "{url} shows the host key {key}, which `known_hosts` does not hold: compare it with what the server's owner publishes, then add it there (and only then)"
            ),
            None => format!("the certificate of {url} is not trusted ({text}): SSL_CERT_FILE names more authorities"),
        })
        .into();
    }
    if text.contains("redirect") {
        return Trouble::Setup(format!(
            "{url} redirects elsewhere ({text}), which is not followed: put the final address into `clone_url`"
        ))
        .into();
    }
    let status = text
        .strip_prefix("unexpected http status code: ")
        .and_then(|code| code.parse::<u16>().ok());
    match (status, error.class()) {
        (Some(404 | 410), _) => Trouble::Setup(format!(
            "{url} is not there: check `clone_url`, and that `clone_token` may read it"
        ))
        .into(),
        (Some(403), _) => Trouble::Setup(format!(
            "{url} refuses us (403): check that `clone_token` may read the repository"
        ))
        .into(),
        (Some(code), _) if code < 500 && code != 408 && code != 429 => {
            Trouble::Setup(format!("{url} answers {code}: check `clone_url`")).into()
        }
        (_, ErrorClass::Ssh) if error.code() == ErrorCode::Eof => Trouble::Setup(format!(
            "{url} ends the conversation ({text}): check `clone_url`, and that the key may read it"
        ))
        .into(),
        (
            _,
            ErrorClass::Net | ErrorClass::Http | ErrorClass::Os | ErrorClass::Ssl | ErrorClass::Ssh,
        ) => Trouble::Network(text.to_owned()).into(),
        (_, ErrorClass::Indexer) if !text.contains("delta base") => {
            Trouble::Network(text.to_owned()).into()
        }
        _ => Failure::Broken(text.to_owned()),
    }
}

fn write_tree(
    repository: &Repository,
    id: Oid,
    place: &Path,
    request: &Request,
    report: &Report,
) -> Result<TreeFacts, Failure> {
    let commit = repository.find_commit(id)?;
    let author = one_line(commit.author().name_bytes());
    let title = one_line(commit.summary_bytes().unwrap_or_default());
    report.note(format!("commit {id}\n  by {author}: {title}"));
    let mut walk = Walk {
        repository,
        odb: repository.odb()?,
        writer: Writer::create(place, request.bytes_max, TREE_FILES_MAX)
            .map_err(|error| Trouble::Agent(format!("{error:#}")))?,
        report,
        pointers: Vec::new(),
        submodules: Vec::new(),
    };
    walk.folder(&commit.tree()?, b"")?;
    for (what, names) in [
        (
            "is a Git LFS pointer, and LFS is not supported: the file holds only the pointer",
            &walk.pointers,
        ),
        (
            "is a submodule, which is not checked out: the folder is empty",
            &walk.submodules,
        ),
    ] {
        if let Some(first) = names.first() {
            let more = match names.len() - 1 {
                0 => String::new(),
                more => format!(" (and {more} more)"),
            };
            report.note(format!("warning: {}{more} {what}", shown(first)));
        }
    }
    let (files, bytes) = walk.writer.finish()?;
    Ok(TreeFacts {
        commit: id.to_string(),
        commit_time: commit.time().seconds(),
        title,
        author,
        files,
        bytes,
    })
}

fn one_line(text: &[u8]) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    String::from_utf8_lossy(text)
        .chars()
        .map(plain)
        .take(TITLE_CHARS_MAX)
        .collect()
}

struct Walk<'a> {
    repository: &'a Repository,
    odb: git2::Odb<'a>,
    writer: Writer,
    report: &'a Report,
    pointers: Vec<Vec<u8>>,
    submodules: Vec<Vec<u8>>,
}

impl Walk<'_> {
    /// As deep as `Writer` allows folders to be.
    fn folder(&mut self, tree: &git2::Tree<'_>, base: &[u8]) -> Result<(), Failure> {
        for entry in tree {
            self.report.alive();
            let mut path = base.to_vec();
            if !base.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(entry.name_bytes());
            match entry.filemode_raw() & 0o170_000 {
                0o040_000 => {
                    self.writer.folder(&path)?;
                    let inner = self.repository.find_tree(entry.id())?;
                    self.folder(&inner, &path)?;
                }
                0o160_000 => {
                    self.writer.folder(&path)?;
                    self.submodules.push(path);
                }
                0o120_000 => {
                    let target = self.content(&path, entry.id())?;
                    self.writer.symlink(&path, &target)?;
                }
                _ => {
                    let bytes = self.content(&path, entry.id())?;
                    if bytes.starts_with(LFS_POINTER) {
                        self.pointers.push(path.clone());
                    }
                    let executable = entry.filemode_raw() & 0o111 != 0;
                    self.writer.file(&path, &bytes, executable)?;
                }
            }
        }
        Ok(())
    }

    fn content(&mut self, path: &[u8], id: Oid) -> Result<Vec<u8>, Failure> {
        let (bytes, _) = self.odb.read_header(id)?;
        self.writer
            .admit(path, bytes as u64)
            .map_err(Trouble::Cause)?;
        Ok(self.odb.read(id)?.data().to_vec())
    }
}
