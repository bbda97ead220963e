//! A commit's tree on disk: every name is judged before it is written, and nothing is ever written through a link.
//!
//! The line: folders and files as they come, symlinks last, each resolved in our own memory of the tree as the kernel
//! would. Also the only way to read a file of a repository (`read_beneath`). Never follows a symlink, never overwrites.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::fs::{Mode, OFlags};

use crate::builds::Cause;

/// Folders inside folders; deeper ones are an attack on whoever walks the tree.
const DEPTH_MAX: usize = 128;
/// Linux's own limit of one name.
const NAME_BYTES_MAX: usize = 255;
/// Linux's own limit of a path, less its end.
const TARGET_BYTES_MAX: usize = 4095;
/// One file: it is held in memory while it is written.
const FILE_BYTES_MAX: u64 = 512 << 20;
/// Linux's own limit (`ELOOP`): a longer chain of symlinks leads nowhere.
const LINKS_FOLLOWED_MAX: usize = 40;

/// Why a tree could not be written.
#[derive(Debug)]
pub enum Refusal {
    /// The commit's fault, with the file's name.
    Cause(Cause),
    /// Ours: the disk.
    Io(anyhow::Error),
}

impl From<Cause> for Refusal {
    fn from(cause: Cause) -> Self {
        Self::Cause(cause)
    }
}

impl From<anyhow::Error> for Refusal {
    fn from(error: anyhow::Error) -> Self {
        Self::Io(error)
    }
}

/// Writes one tree into a folder that did not exist before.
pub struct Writer {
    root: PathBuf,
    bytes_max: u64,
    files_max: u64,
    pub bytes: u64,
    pub files: u64,
    links: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Writer {
    /// Creates `root` with mode 0700. Limits are of all files together.
    pub fn create(root: &Path, bytes_max: u64, files_max: u64) -> anyhow::Result<Self> {
        DirBuilder::new()
            .mode(0o700)
            .create(root)
            .with_context(|| format!("cannot create {}", root.display()))?;
        Ok(Self {
            root: root.to_owned(),
            bytes_max,
            files_max,
            bytes: 0,
            files: 0,
            links: BTreeMap::new(),
        })
    }

    /// Judges a size before its bytes are read.
    pub fn admit(&mut self, path: &[u8], bytes: u64) -> Result<(), Cause> {
        self.files += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        if bytes > FILE_BYTES_MAX.min(self.bytes_max) {
            return Err(too_large(path, &format!("is {bytes} bytes large, more than a build may use"))
                .hint("keep it out of the repository, or raise `limits.clone_bytes` in agent.yaml (512 MiB a file at most)"));
        }
        if self.bytes > self.bytes_max {
            let what = format!(
                "brings the commit's files to more than {} bytes",
                self.bytes_max
            );
            return Err(too_large(path, &what)
                .hint("make the repository smaller, or raise `limits.clone_bytes` in agent.yaml"));
        }
        if self.files > self.files_max {
            let what = format!("is one file too many: {} are allowed", self.files_max);
            return Err(too_large(path, &what).hint("make the repository smaller"));
        }
        Ok(())
    }

    pub fn folder(&mut self, path: &[u8]) -> Result<(), Refusal> {
        check_path(path)?;
        self.admit(path, 0)?;
        let made = DirBuilder::new().mode(0o755).create(self.place(path));
        written(path, made)
    }

    pub fn file(&mut self, path: &[u8], bytes: &[u8], executable: bool) -> Result<(), Refusal> {
        check_path(path)?;
        let mode = if executable { 0o755 } else { 0o644 };
        let made = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(self.place(path))
            .and_then(|mut file| file.write_all(bytes));
        written(path, made)
    }

    /// Kept until `finish`: a link that is not there yet cannot be written through.
    pub fn symlink(&mut self, path: &[u8], target: &[u8]) -> Result<(), Refusal> {
        check_path(path)?;
        if target.is_empty() || target.len() > TARGET_BYTES_MAX {
            let what = format!("is a symlink whose target has {} bytes", target.len());
            return Err(unsafe_path(path, &what)
                .hint("remove it from the repository")
                .into());
        }
        if self.links.insert(path.to_vec(), target.to_vec()).is_some() {
            return Err(twice(path).into());
        }
        Ok(())
    }

    /// Judges all symlinks together, then writes them.
    pub fn finish(self) -> Result<(u64, u64), Refusal> {
        for (path, target) in &self.links {
            if leads_outside(&self.links, path, target) {
                return Err(unsafe_path(
                    path,
                    &format!(
                        "is a symlink that leads out of the repository, to {}",
                        shown(target)
                    ),
                )
                .hint("let it lead to a file of the repository by a relative path, or remove it")
                .into());
            }
        }
        for (path, target) in &self.links {
            let made =
                std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(target), self.place(path));
            written(path, made)?;
        }
        Ok((self.files, self.bytes))
    }

    fn place(&self, path: &[u8]) -> PathBuf {
        self.root.join(std::ffi::OsString::from_vec(path.to_vec()))
    }
}

fn written<T>(path: &[u8], made: io::Result<T>) -> Result<(), Refusal> {
    match made {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(twice(path).into()),
        Err(error) => Err(anyhow::Error::new(error)
            .context(format!("cannot write {} of the checkout", shown(path)))
            .into()),
    }
}

/// Whether each part of a path may be a name in a work tree, by git's own rules (`.git` in any spelling is none).
pub fn check_path(path: &[u8]) -> Result<(), Cause> {
    if path.split(|b| *b == b'/').count() > DEPTH_MAX {
        let what = format!("lies more than {DEPTH_MAX} folders deep");
        return Err(unsafe_path(path, &what).hint("make the folders less deep"));
    }
    for name in path.split(|b| *b == b'/') {
        let plain = name.to_ascii_lowercase();
        let end = plain
            .iter()
            .rposition(|b| !matches!(b, b'.' | b' '))
            .map_or(0, |last| last + 1);
        let stem = plain.get(..end).unwrap_or_default();
        let problem = if name.is_empty() {
            "is absolute, or has an empty part"
        } else if name == b"." || name == b".." {
            "has a part that is `.` or `..`"
        } else if name.contains(&0) {
            "holds a NUL byte"
        } else if name.len() > NAME_BYTES_MAX {
            "has a part of more than 255 bytes"
        } else if stem == b".git" || stem == b"git~1" {
            "would be git's own folder"
        } else {
            continue;
        };
        return Err(unsafe_path(path, problem).hint("remove it from the repository"));
    }
    Ok(())
}

/// Follows the target as the kernel would, with `links` as the only symlinks; true once it passes the root.
fn leads_outside(links: &BTreeMap<Vec<u8>, Vec<u8>>, path: &[u8], target: &[u8]) -> bool {
    let parts = |text: &[u8]| -> Vec<Vec<u8>> {
        let parts = text
            .split(|b| *b == b'/')
            .filter(|part| !part.is_empty() && *part != b".");
        parts.map(<[u8]>::to_vec).rev().collect()
    };
    let mut at: Vec<Vec<u8>> = parts(path).into_iter().rev().collect();
    at.pop();
    if target.first() == Some(&b'/') || target.contains(&0) {
        return true;
    }
    let mut left = parts(target);
    let mut followed = 0;
    while let Some(part) = left.pop() {
        if part == b".." {
            if at.pop().is_none() {
                return true;
            }
            continue;
        }
        at.push(part);
        if let Some(next) = links.get(&at.join(&b'/')) {
            followed += 1;
            if followed > LINKS_FOLLOWED_MAX {
                return false;
            }
            if next.first() == Some(&b'/') {
                return true;
            }
            at.pop();
            left.extend(parts(next));
        }
    }
    false
}

/// Reads a regular file below `root` without following any symlink on the way; at most `bytes_max` bytes.
pub fn read_beneath(root: &Path, path: &str, bytes_max: u64) -> io::Result<Vec<u8>> {
    if !crate::pipeline::stays_inside(path) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "leads out of the repository",
        ));
    }
    let mut at: std::os::fd::OwnedFd = File::open(root)?.into();
    let names: Vec<_> = Path::new(path)
        .components()
        .filter(|part| matches!(part, std::path::Component::Normal(_)))
        .collect();
    for (index, name) in names.iter().enumerate() {
        let kind = if index + 1 < names.len() {
            OFlags::DIRECTORY
        } else {
            OFlags::NONBLOCK
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | kind;
        at = rustix::fs::openat(&at, name.as_os_str(), flags, Mode::empty())?;
    }
    let file = File::from(at);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "is not a regular file",
        ));
    }
    let mut bytes = Vec::new();
    file.take(bytes_max.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("is larger than {bytes_max} bytes"),
        ));
    }
    Ok(bytes)
}

/// A name from a repository, fit for a log: no control characters, bounded.
pub fn shown(path: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(path).chars().take(200).collect();
    format!("{text:?}")
}

fn twice(path: &[u8]) -> Cause {
    unsafe_path(path, "appears twice in its folder")
        .hint("the tree is malformed: remove one of them")
}

fn unsafe_path(path: &[u8], problem: &str) -> Cause {
    Cause::new("unsafe_path", format!("{} {problem}", shown(path)))
        .object(String::from_utf8_lossy(path))
}

fn too_large(path: &[u8], problem: &str) -> Cause {
    Cause::new("too_large", format!("{} {problem}", shown(path)))
        .object(String::from_utf8_lossy(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer(folder: &Path) -> Writer {
        Writer::create(&folder.join("tree"), 1000, 20).unwrap()
    }

    fn cause(refusal: Refusal) -> Cause {
        match refusal {
            Refusal::Cause(cause) => cause,
            Refusal::Io(error) => panic!("{error:#}"),
        }
    }

    #[test]
    fn names_that_git_forbids_are_refused() {
        for path in [
            "..",
            "a/../b",
            "/etc/passwd",
            "a//b",
            "",
            ".git",
            "a/.GIT/config",
            ".git. .",
            "git~1",
            "a\0b",
        ] {
            assert_eq!(
                check_path(path.as_bytes()).unwrap_err().id,
                "unsafe_path",
                "{path:?}"
            );
        }
        for path in [
            ".gitignore",
            "a/.github/x",
            "...a",
            "--upload-pack",
            "$(id)",
            "git~10",
        ] {
            check_path(path.as_bytes()).unwrap();
        }
        assert!(check_path(&[b'x'; 256]).is_err());
        assert!(check_path("a/".repeat(200).trim_end_matches('/').as_bytes()).is_err());
    }

    #[test]
    fn a_symlink_that_leaves_the_tree_is_refused_even_through_another() {
        let leaving: [&[(&str, &str)]; 5] = [
            &[("passwd", "/etc/passwd")],
            &[("a/b/up", "../../../x")],
            // Each alone stays inside by its text; together they do not.
            &[("deep/x/y/root", "../../.."), ("out", "deep/x/y/root/..")],
            &[("one", "two/.."), ("two", ".")],
            &[("x", "y/etc"), ("y", "/")],
        ];
        for links in leaving {
            let folder = tempfile::tempdir().unwrap();
            let mut writer = writer(folder.path());
            for (path, target) in links {
                writer.symlink(path.as_bytes(), target.as_bytes()).unwrap();
            }
            let cause = cause(writer.finish().unwrap_err());
            assert_eq!(cause.id, "unsafe_path", "{links:?}");
            assert!(
                links.iter().any(|(path, _)| cause.sentence.contains(path)),
                "{cause:?}"
            );
        }
    }

    #[test]
    fn a_symlink_inside_is_written_and_a_loop_leads_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = writer(folder.path());
        writer.folder(b"a").unwrap();
        writer.file(b"a/real", b"text", false).unwrap();
        writer.symlink(b"a/link", b"../a/./real").unwrap();
        writer.symlink(b"loop", b"loop").unwrap();
        writer.finish().unwrap();
        assert_eq!(
            std::fs::read(folder.path().join("tree/a/link")).unwrap(),
            b"text"
        );
    }

    #[test]
    fn a_folder_that_is_also_a_symlink_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = writer(folder.path());
        writer.symlink(b"a", b"b").unwrap();
        writer.folder(b"a").unwrap();
        writer.file(b"a/x", b"", false).unwrap();
        assert!(
            cause(writer.finish().unwrap_err())
                .sentence
                .contains("twice")
        );
    }

    #[test]
    fn a_file_too_large_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = writer(folder.path());
        writer.admit(b"small", 600).unwrap();
        let cause = writer.admit(b"data/huge.bin", 600).unwrap_err();
        assert_eq!(cause.id, "too_large");
        assert!(cause.sentence.contains("data/huge.bin"), "{cause:?}");
    }

    #[test]
    fn only_regular_files_inside_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir(root.join("a")).unwrap();
        std::fs::write(root.join("a/file"), "12345").unwrap();
        std::os::unix::fs::symlink("a", root.join("link")).unwrap();
        std::os::unix::fs::symlink("a/file", root.join("file")).unwrap();
        assert_eq!(read_beneath(root, "./a/file", 5).unwrap(), b"12345");
        for path in [
            "link/file",
            "file",
            "a",
            "../x",
            "/etc/passwd",
            "a/file/x",
            "nothing",
        ] {
            assert!(read_beneath(root, path, 5).is_err(), "{path}");
        }
        assert!(read_beneath(root, "a/file", 4).is_err());
    }
}
