//! The conversation with the git server: fetch a branch, or ask for its head, and say what went wrong in whose words.
//!
//! The line: callbacks → git2 → `judge`. Credentials go to the configured server only and never into a URL or an error;
//! host keys and certificates are compared by libgit2 with what is pinned and with the system's authorities.

use std::cell::{Cell, RefCell};
use std::fs::File;

use git2::{
    CertificateCheckStatus, Cred, CredentialType, ErrorClass, ErrorCode, FetchOptions, Oid,
    ProxyOptions, RemoteCallbacks, RemoteRedirect, Repository,
};
use sha2::Digest;

use super::process::{Request, Trouble, repository_too_large};
use super::report::{Failure, Report};
use crate::builds::short;

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
pub fn fetch(request: &Request, report: &Report, repository: &Repository) -> Result<Oid, Failure> {
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
        .proxy_options(proxy(request))
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

/// The branch's head by the server's word; None where there is no such branch.
pub fn head(
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
    let connected = remote.connect_auth(
        git2::Direction::Fetch,
        Some(callbacks),
        Some(proxy(request)),
    );
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

fn proxy(request: &Request) -> ProxyOptions<'_> {
    let mut options = ProxyOptions::new();
    if let Some(url) = &request.proxy {
        options.url(url);
    }
    options
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
    if request.proxy.is_some() && text.contains("proxy authentication") {
        let fix = "check the name and the password that HTTPS_PROXY holds for it";
        return Trouble::Setup(format!("the proxy before {url} refuses us: {fix}")).into();
    }
    if error.code() == ErrorCode::Auth || refused.is_some() || text.contains("authenticat") {
        let why = refused.unwrap_or_else(|| text.to_owned());
        return Trouble::Setup(format!("{url} refuses us: {why}")).into();
    }
    let is_untrusted =
        error.class() == ErrorClass::Ssl && text.to_lowercase().contains("certificate");
    if error.code() == ErrorCode::Certificate || is_untrusted {
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
