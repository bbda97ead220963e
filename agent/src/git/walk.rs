//! From a commit of the mirror to a tree on disk.
//!
//! The line: git's tree objects, entry by entry → `tree::Writer`, which judges each name and size before any byte
//! is written. Content is written as it is stored: no filter, no attribute, no hook.

use std::path::Path;

use git2::{Oid, Repository};

use super::process::{Request, TreeFacts, Trouble};
use super::report::{Failure, Report};
use super::tree::{Writer, shown};

/// Files and folders of one commit.
const TREE_FILES_MAX: u64 = 500_000;
/// Title and author in characters.
const TITLE_CHARS_MAX: usize = 200;
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/v1";

/// Writes the commit's tree to `place`, which must not exist.
pub fn write_tree(
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
