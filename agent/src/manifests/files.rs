//! The files of manifests in a checked-out tree, read without ever leaving it.
//!
//! Each component of a path is opened from the one before and none may be a symbolic link, so that a repository cannot
//! have the agent read its host. Blocking: call it on a thread for that.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustix::fd::OwnedFd;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat};

use super::{BYTES_MAX, kustomize};

const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];

/// Path and text of every file that the paths mean: files, or folders of which `*.yaml`, `*.yml` and `*.json` are
/// taken (not recursive, sorted), as `kubectl apply -f` does; a folder with a kustomization is rendered. An error is one
/// sentence that names the path.
pub fn read(tree: &Path, paths: &[String]) -> Result<Vec<(String, String)>, String> {
    let mut files: Vec<(String, String)> = Vec::new();
    let mut budget = BYTES_MAX;
    for path in paths {
        if let Some(name) = kustomization(tree, path)? {
            let text = kustomize::render(tree, path)?;
            budget = budget
                .checked_sub(text.len())
                .ok_or_else(|| too_large(&name))?;
            files.push((name, text));
            continue;
        }
        for (name, file) in open(tree, path)? {
            if files.iter().any(|(known, _)| *known == name) {
                continue;
            }
            let text = text(&name, file, budget)?;
            budget = budget.saturating_sub(text.len());
            files.push((name, text));
        }
    }
    Ok(files)
}

/// One file of the tree; None where there is none, or a folder.
pub(super) fn read_file(tree: &Path, path: &str) -> Result<Option<String>, String> {
    let full = tree.join(path);
    match full.symlink_metadata() {
        Err(_) => return Ok(None),
        Ok(metadata) if metadata.is_dir() => return Ok(None),
        Ok(_) => {}
    }
    match open(tree, path)?.pop() {
        Some((name, file)) => text(&name, file, BYTES_MAX).map(Some),
        None => Ok(None),
    }
}

/// The kustomization of a folder.
fn kustomization(tree: &Path, path: &str) -> Result<Option<String>, String> {
    let folder = path.trim_start_matches("./").trim_end_matches('/');
    for name in kustomize::NAMES {
        let inside = if matches!(folder, "" | ".") {
            name.to_owned()
        } else {
            format!("{folder}/{name}")
        };
        if !folder.split('/').any(|part| part == "..")
            && !path.starts_with('/')
            && read_file(tree, &inside)?.is_some()
        {
            return Ok(Some(inside));
        }
    }
    Ok(None)
}

fn open(tree: &Path, path: &str) -> Result<Vec<(String, OwnedFd)>, String> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at = openat(CWD, tree, flags, Mode::empty())
        .map_err(|error| format!("cannot open the checked-out tree: {error}"))?;
    let mut kind = FileType::Directory;
    for component in path
        .split('/')
        .filter(|component| !matches!(*component, "" | "."))
    {
        if component == ".." || path.starts_with('/') {
            return Err(format!("{path} leads out of the repository"));
        }
        if kind != FileType::Directory {
            return Err(format!("{path} is not in the repository"));
        }
        (at, kind) = step(&at, component, path)?;
    }
    let name = path.trim_start_matches("./").trim_end_matches('/');
    match kind {
        FileType::RegularFile => Ok(vec![(name.to_owned(), at)]),
        FileType::Directory => open_folder(&at, name),
        _ => Err(format!("{path} is neither a file nor a folder")),
    }
}

fn open_folder(folder: &OwnedFd, path: &str) -> Result<Vec<(String, OwnedFd)>, String> {
    let cannot = |error: rustix::io::Errno| format!("cannot read the folder {path}: {error}");
    let mut names = Vec::new();
    for entry in Dir::read_from(folder).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name
            .rsplit_once('.')
            .is_some_and(|(_, extension)| EXTENSIONS.contains(&extension))
        {
            names.push(name);
        }
    }
    names.sort_unstable();
    let mut files = Vec::new();
    for name in names {
        let full = if matches!(path, "" | ".") {
            name.clone()
        } else {
            format!("{path}/{name}")
        };
        match step(folder, &name, &full)? {
            (file, FileType::RegularFile) => files.push((full, file)),
            // A folder whose name ends so is not looked into, as by kubectl.
            (_, FileType::Directory) => {}
            _ => return Err(format!("{full} is not a file")),
        }
    }
    Ok(files)
}

/// Opens one component, which must not be a symbolic link; a FIFO is opened without waiting for its other end.
fn step(folder: &OwnedFd, component: &str, path: &str) -> Result<(OwnedFd, FileType), String> {
    let cannot = |error| match error {
        rustix::io::Errno::NOENT => format!("{path} is not in the repository"),
        rustix::io::Errno::LOOP => {
            format!("{path} is or goes through a symbolic link, which is not followed")
        }
        error => format!("cannot open {path}: {error}"),
    };
    let seen = statat(folder, component, AtFlags::SYMLINK_NOFOLLOW).map_err(cannot)?;
    match FileType::from_raw_mode(seen.st_mode) {
        FileType::Symlink => return Err(cannot(rustix::io::Errno::LOOP)),
        FileType::RegularFile | FileType::Directory => {}
        _ => return Err(format!("{path} is neither a file nor a folder")),
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = openat(folder, component, flags, Mode::empty()).map_err(cannot)?;
    let kind = rustix::fs::fstat(&opened).map_err(cannot)?;
    Ok((opened, FileType::from_raw_mode(kind.st_mode)))
}

fn text(name: &str, file: OwnedFd, budget: usize) -> Result<String, String> {
    let mut bytes = Vec::new();
    File::from(file)
        .take(budget as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("cannot read {name}: {error}"))?;
    if bytes.len() > budget {
        return Err(too_large(name));
    }
    String::from_utf8(bytes).map_err(|_| format!("{name} is not text in UTF-8"))
}

fn too_large(name: &str) -> String {
    format!(
        "{name}: the manifests are larger than {} MiB in all",
        BYTES_MAX >> 20
    )
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(tree: &Path, paths: &[&str]) -> Result<Vec<String>, String> {
        let paths: Vec<String> = paths.iter().map(ToString::to_string).collect();
        Ok(read(tree, &paths)?
            .into_iter()
            .map(|(name, _)| name)
            .collect())
    }

    #[test]
    fn folders_give_their_manifests_sorted_and_only_once() {
        let tree = tempfile::tempdir().unwrap();
        fs::create_dir_all(tree.path().join("k8s/more.yaml")).unwrap();
        for name in ["b.yml", "a.yaml", "c.json", "README.md", "yaml"] {
            fs::write(tree.path().join("k8s").join(name), "x").unwrap();
        }
        let expected = ["k8s/a.yaml", "k8s/b.yml", "k8s/c.json"];
        assert_eq!(names(tree.path(), &["k8s/"]).unwrap(), expected);
        assert_eq!(
            names(tree.path(), &["./k8s/a.yaml", "k8s"]).unwrap(),
            expected
        );
        assert!(
            names(tree.path(), &["k8s/none.yaml"])
                .unwrap_err()
                .contains("k8s/none.yaml is not in the repository")
        );
        assert!(
            names(tree.path(), &["k8s/a.yaml/x"])
                .unwrap_err()
                .contains("is not in the repository")
        );
    }

    #[test]
    fn nothing_outside_the_tree_is_read() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret.yaml"), "secret").unwrap();
        let tree = tempfile::tempdir().unwrap();
        fs::create_dir(tree.path().join("k8s")).unwrap();
        symlink(outside.path(), tree.path().join("folder")).unwrap();
        symlink(
            outside.path().join("secret.yaml"),
            tree.path().join("file.yaml"),
        )
        .unwrap();
        symlink("/dev/zero", tree.path().join("k8s/zero.yaml")).unwrap();
        for path in ["folder", "folder/secret.yaml", "file.yaml", "k8s"] {
            let error = names(tree.path(), &[path]).unwrap_err();
            assert!(error.contains("symbolic link"), "{path}: {error}");
        }
        for path in ["../x", "k8s/../../x", "/etc/passwd"] {
            assert!(
                names(tree.path(), &[path])
                    .unwrap_err()
                    .contains("leads out"),
                "{path}"
            );
        }
    }

    #[test]
    fn what_is_no_text_is_refused_without_waiting() {
        let tree = tempfile::tempdir().unwrap();
        fs::write(tree.path().join("bytes.yaml"), b"a: \xff").unwrap();
        fs::write(tree.path().join("large.yaml"), vec![b'#'; BYTES_MAX + 1]).unwrap();
        let fifo = tree.path().join("fifo.yaml");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(
            names(tree.path(), &["bytes.yaml"])
                .unwrap_err()
                .contains("UTF-8")
        );
        assert!(
            names(tree.path(), &["large.yaml"])
                .unwrap_err()
                .contains("larger than 4 MiB")
        );
        assert!(
            names(tree.path(), &["fifo.yaml"])
                .unwrap_err()
                .contains("neither a file")
        );
    }
}
