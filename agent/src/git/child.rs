//! What runs in `landfall __git`: with `remote.rs` and `walk.rs` the only code that names git2.
//!
//! The line: open the mirror → fetch the branch (`remote.rs`) → judge the commit → write its tree (`walk.rs`). It
//! limits itself before it speaks to anyone, follows no redirect to another host, trusts no host key that is not
//! pinned, checks out no submodule.

use std::fs::File;
use std::io::{BufRead, Read};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use git2::{Oid, Repository};
use rustix::process::{Resource, Rlimit, setrlimit};

use super::process::{Answer, Job, LINE_BYTES_MAX, Line, Request, Trouble};
use super::report::{Failure, Report};
use super::{remote, walk};
use crate::builds::{Cause, short};

/// A fetch adds a pack, and nothing ever joins them: from here on the mirror is cloned anew.
const MIRROR_PACKS_MAX: usize = 400;
/// Memory beside what the packs are mapped to.
const MEMORY_BYTES: u64 = 4 << 30;
/// GitHub's replicas can be behind the delivery: a commit that is nowhere is asked for once more after this.
const REPLICA_LAG: Duration = Duration::from_secs(2);

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
    let report = Report::new();
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
        return Ok(Answer::Head(remote::head(request, report, &repository)?));
    }
    let mut tip = remote::fetch(request, report, &repository)?;
    match &request.job {
        Job::Head => Ok(Answer::Head(Some(tip.to_string()))),
        Job::Checkout {
            commit,
            newer,
            tree,
        } => {
            let id = Oid::from_str(commit)?;
            if !repository.odb()?.exists(id) {
                report.note(format!(
                    "commit {} is not there yet: asking again",
                    short(commit)
                ));
                std::thread::sleep(REPLICA_LAG);
                tip = remote::fetch(request, report, &repository)?;
            }
            if !reaches(&repository, tip, id)? {
                return Err(Trouble::Cause(commit_gone(request, commit, tip)).into());
            }
            for one in newer {
                if id != tip && is_older(&repository, id, one)? {
                    return Ok(Answer::Stale {
                        head: tip.to_string(),
                    });
                }
            }
            Ok(Answer::Tree(walk::write_tree(
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

/// Whether `other` was made on top of `id`. What the mirror does not know says nothing.
fn is_older(repository: &Repository, id: Oid, other: &str) -> Result<bool, Failure> {
    let Ok(other) = Oid::from_str(other) else {
        return Ok(false);
    };
    if other == id || repository.find_commit(other).is_err() {
        return Ok(false);
    }
    Ok(repository.graph_descendant_of(other, id)?)
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
