//! The build context: what of the commit's tree the image build is given, as a tar.
//!
//! The line: open the folder → read .dockerignore → list → stream the tar, the same bytes for the same commit.
//! Never follows a symlink (one is sent as a symlink), never leaves the tree, never opens what is no plain file.

use std::ffi::{CStr, CString, OsStr};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::{StageError, StageResult};
use crate::builds::Cause;
use crate::dockerignore::{self, Ignore, Matched};

/// Folders in folders; each holds a file descriptor while it is listed.
const DEPTH_MAX: usize = 128;
/// A Dockerfile is read whole for its first lines.
const DOCKERFILE_BYTES_MAX: u64 = 1024 * 1024;
/// Pieces of the tar that may wait for Docker, and their size.
const PIECES_MAX: usize = 8;
const PIECE_BYTES: usize = 64 * 1024;
/// The Dockerfile's name in the tar where it lies outside the context's folder.
const DOCKERFILE_OUTSIDE: &[u8] = b".landfall.Dockerfile";

/// What to send, and how much of it at most.
#[derive(Debug, Clone)]
pub struct Source {
    /// The commit's tree on disk.
    pub tree: std::path::PathBuf,
    /// Folder of the tree that is the context.
    pub context: String,
    /// Path of the Dockerfile in the tree.
    pub dockerfile: String,
    /// Seconds since 1970, for every entry.
    pub time: i64,
    pub bytes_max: u64,
    pub files_max: u64,
}

/// A context that was listed and found good, ready to be sent.
#[derive(Debug)]
pub struct Context {
    tree: OwnedFd,
    /// Of the tree's path of each entry, what is not part of its name in the tar.
    prefix: usize,
    entries: Vec<Entry>,
    time: u64,
    /// Name of the Dockerfile in the tar.
    pub dockerfile: String,
    /// The Dockerfile's own text.
    pub dockerfile_text: String,
    pub bytes: u64,
    pub files: u64,
}

#[derive(Debug)]
struct Entry {
    /// Path in the tree.
    path: Vec<u8>,
    /// Name in the tar where it is another one.
    renamed: bool,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Folder,
    File { bytes: u64, executable: bool },
    Symlink { target: Vec<u8> },
}

/// Lists the context; blocks on the disk. `stop` ends it early.
pub fn read(source: &Source, stop: &CancellationToken) -> StageResult<Context> {
    let tree = rustix::fs::open(
        &source.tree,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .with_context(|| format!("cannot open the checked out tree {}", source.tree.display()))?;
    let context = plain(&source.context);
    let dockerfile = plain(&source.dockerfile);
    let dockerfile_text = read_dockerfile(&tree, &dockerfile)?;
    let prefix = if context.is_empty() {
        0
    } else {
        context.len() + 1
    };
    let inside = match context.is_empty() {
        true => Some(dockerfile.as_slice()),
        false => dockerfile
            .strip_prefix(context.as_slice())
            .and_then(|rest| rest.strip_prefix(b"/")),
    };
    let forced = [
        inside.unwrap_or(DOCKERFILE_OUTSIDE).to_vec(),
        b".dockerignore".to_vec(),
    ];
    let folder = open(
        &tree,
        if context.is_empty() { b"." } else { &context },
        OFlags::DIRECTORY,
    )
    .map_err(|error| refused(&context, error, "the build context"))?;
    let mut lister = Lister {
        ignore: read_ignore(&tree, &context, &dockerfile)?,
        forced: &forced,
        source,
        stop,
        prefix: &context,
        entries: Vec::new(),
        bytes: 0,
        files: 0,
    };
    lister.list(&folder, b"", &Matched::default(), 0)?;
    let (mut entries, bytes, files) = (lister.entries, lister.bytes, lister.files);
    if inside.is_none() {
        entries.retain(|entry| entry.path.get(prefix..) != Some(DOCKERFILE_OUTSIDE));
        entries.push(Entry {
            kind: Kind::File {
                bytes: dockerfile_text.len() as u64,
                executable: false,
            },
            path: dockerfile,
            renamed: true,
        });
    }
    let name = forced
        .first()
        .map(|name| String::from_utf8_lossy(name).into_owned());
    Ok(Context {
        tree,
        prefix,
        entries,
        time: u64::try_from(source.time).unwrap_or(0),
        dockerfile: name.unwrap_or_default(),
        dockerfile_text: String::from_utf8_lossy(&dockerfile_text).into_owned(),
        bytes,
        files,
    })
}

/// Sends the tar piece by piece from a thread; the handle says what went wrong, besides that nobody listens any more.
pub fn stream(
    context: Context,
    stop: CancellationToken,
) -> (
    ReceiverStream<io::Result<Bytes>>,
    JoinHandle<StageResult<()>>,
) {
    let (pieces, stream) = mpsc::channel(PIECES_MAX);
    let sender = tokio::task::spawn_blocking(move || {
        let writer = io::BufWriter::with_capacity(PIECE_BYTES, Pieces(pieces.clone()));
        let Err(error) = write(&context, writer, &stop) else {
            return Ok(());
        };
        // The body must break off, or Docker would build half a context.
        let _ = pieces.blocking_send(Err(io::Error::other("the build context cannot be read")));
        match error {
            StageError::Agent(error) if is_broken_pipe(&error) => Ok(()),
            error => Err(error),
        }
    });
    (ReceiverStream::new(stream), sender)
}

/// Writes the tar; blocks.
pub fn write(context: &Context, writer: impl Write, stop: &CancellationToken) -> StageResult<()> {
    let mut tar = tar::Builder::new(writer);
    for entry in &context.entries {
        if stop.is_cancelled() {
            return Err(StageError::Canceled);
        }
        let name = match entry.renamed {
            true => DOCKERFILE_OUTSIDE,
            false => entry.path.get(context.prefix..).unwrap_or_default(),
        };
        append(&mut tar, context, entry, name)?;
    }
    tar.into_inner()
        .and_then(|mut writer| writer.flush())
        .context("cannot write the build context")?;
    Ok(())
}

fn append<W: Write>(
    tar: &mut tar::Builder<W>,
    context: &Context,
    entry: &Entry,
    name: &[u8],
) -> StageResult<()> {
    let mut header = tar::Header::new_gnu();
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(context.time);
    header.set_size(0);
    let failed = || format!("cannot write {} into the build context", shown(name));
    match &entry.kind {
        Kind::Folder => {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(0o755);
            let name = [name, b"/"].concat();
            append_named(tar, &mut header, &name, io::empty()).with_context(failed)?;
        }
        Kind::Symlink { target } => {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_mode(0o777);
            long_or(
                tar,
                target,
                tar::EntryType::GNULongLink,
                &mut header.as_old_mut().linkname,
            )
            .with_context(failed)?;
            append_named(tar, &mut header, name, io::empty()).with_context(failed)?;
        }
        Kind::File { bytes, executable } => {
            let file = open(&context.tree, &entry.path, OFlags::empty())
                .map_err(|error| refused(&entry.path, error, "a file"))?;
            let stat = rustix::fs::fstat(&file).context("cannot look at an open file")?;
            let is_same = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
                && u64::try_from(stat.st_size) == Ok(*bytes);
            if !is_same {
                return Err(anyhow!("{} changed while it was read", shown(&entry.path)).into());
            }
            header.set_entry_type(tar::EntryType::Regular);
            header.set_mode(if *executable { 0o755 } else { 0o644 });
            header.set_size(*bytes);
            let whole = Whole {
                file: std::fs::File::from(file),
                left: *bytes,
            };
            append_named(tar, &mut header, name, whole).with_context(failed)?;
        }
    }
    Ok(())
}

fn append_named<W: Write>(
    tar: &mut tar::Builder<W>,
    header: &mut tar::Header,
    name: &[u8],
    data: impl Read,
) -> io::Result<()> {
    long_or(
        tar,
        name,
        tar::EntryType::GNULongName,
        &mut header.as_old_mut().name,
    )?;
    header.set_cksum();
    tar.append(header, data)
}

/// Puts a name into its field of the header, and an entry before it that holds the whole where the field is too small.
fn long_or<W: Write>(
    tar: &mut tar::Builder<W>,
    name: &[u8],
    kind: tar::EntryType,
    field: &mut [u8; 100],
) -> io::Result<()> {
    if name.len() >= field.len() {
        let mut header = tar::Header::new_gnu();
        for (byte, letter) in header.as_old_mut().name.iter_mut().zip(b"././@LongLink") {
            *byte = *letter;
        }
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(name.len() as u64 + 1);
        header.set_cksum();
        tar.append(&header, name.chain(&b"\0"[..]))?;
    }
    for (byte, letter) in field.iter_mut().zip(name) {
        *byte = *letter;
    }
    Ok(())
}

/// A file of which exactly so many bytes must come.
struct Whole {
    file: std::fs::File,
    left: u64,
}

impl Read for Whole {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let got = self.file.read(buffer.get_mut(..most).unwrap_or_default())?;
        if got == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the file became shorter",
            ));
        }
        self.left -= got as u64;
        Ok(got)
    }
}

/// The end of the channel that a thread writes to.
struct Pieces(mpsc::Sender<io::Result<Bytes>>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .blocking_send(Ok(Bytes::copy_from_slice(bytes)))
            .map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

struct Lister<'a> {
    ignore: Ignore,
    /// Always sent, whatever .dockerignore says.
    forced: &'a [Vec<u8>],
    source: &'a Source,
    stop: &'a CancellationToken,
    /// The context's folder in the tree.
    prefix: &'a [u8],
    entries: Vec<Entry>,
    bytes: u64,
    files: u64,
}

impl Lister<'_> {
    fn list(
        &mut self,
        folder: &OwnedFd,
        path: &[u8],
        above: &Matched,
        depth: usize,
    ) -> StageResult<()> {
        if depth > DEPTH_MAX {
            return Err(unsafe_path(
                path,
                &format!("lies deeper than {DEPTH_MAX} folders"),
            ));
        }
        for name in names(folder).with_context(|| format!("cannot list {}", shown(path)))? {
            if self.stop.is_cancelled() {
                return Err(StageError::Canceled);
            }
            let whole = joined(path, name.to_bytes());
            self.take(folder, &name, &whole, above, depth)?;
        }
        Ok(())
    }

    fn take(
        &mut self,
        folder: &OwnedFd,
        name: &CStr,
        path: &[u8],
        above: &Matched,
        depth: usize,
    ) -> StageResult<()> {
        let (left_out, matched) = self
            .ignore
            .judge(path, above)
            .map_err(|bad| bad_ignore(&bad))?;
        let stat = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)
            .with_context(|| format!("cannot look at {}", shown(path)))?;
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let left_out = left_out && !self.forced.iter().any(|forced| forced == path);
        if file_type == FileType::Directory {
            return self.take_folder(folder, name, path, &matched, left_out, depth);
        }
        if left_out {
            return Ok(());
        }
        let kind = match file_type {
            FileType::RegularFile => {
                let bytes = u64::try_from(stat.st_size).unwrap_or(0);
                self.bytes = self.bytes.saturating_add(bytes);
                Kind::File {
                    bytes,
                    executable: stat.st_mode & 0o111 != 0,
                }
            }
            FileType::Symlink => Kind::Symlink {
                target: rustix::fs::readlinkat(folder, name, Vec::new())
                    .with_context(|| format!("cannot read the symlink {}", shown(path)))?
                    .into_bytes(),
            },
            special => {
                return Err(unsafe_path(
                    path,
                    &format!("is {}, not a plain file", describe(special)),
                ));
            }
        };
        self.files += 1;
        self.push(path, kind)
    }

    fn take_folder(
        &mut self,
        folder: &OwnedFd,
        name: &CStr,
        path: &[u8],
        matched: &Matched,
        left_out: bool,
        depth: usize,
    ) -> StageResult<()> {
        let holds_forced = self.forced.iter().any(|forced| {
            forced
                .strip_prefix(path)
                .is_some_and(|rest| rest.starts_with(b"/"))
        });
        if left_out && !holds_forced && !self.ignore.may_take_back_below(path) {
            return Ok(());
        }
        let inner = open(folder, name.to_bytes(), OFlags::DIRECTORY)
            .map_err(|error| refused(path, error, "a folder"))?;
        let mark = self.entries.len();
        self.push(path, Kind::Folder)?;
        self.list(&inner, path, matched, depth + 1)?;
        if left_out && self.entries.len() == mark + 1 {
            self.entries.pop();
        }
        Ok(())
    }

    fn push(&mut self, path: &[u8], kind: Kind) -> StageResult<()> {
        let Source {
            bytes_max,
            files_max,
            ..
        } = *self.source;
        let over = match () {
            () if self.bytes > bytes_max => Some(format!("{bytes_max} bytes")),
            () if self.entries.len() as u64 >= files_max => Some(format!("{files_max} files")),
            () => None,
        };
        if let Some(limit) = over {
            let cause = Cause::new(
                "context_too_large",
                format!(
                    "the build context is larger than {limit}: {} goes beyond it",
                    shown(path)
                ),
            );
            return Err(StageError::Failed(cause.object(lossy(path)).hint(
                "leave out what the image does not need by .dockerignore, or have the operator raise limits.context_bytes or limits.context_files in agent.yaml",
            )));
        }
        self.entries.push(Entry {
            path: joined(self.prefix, path),
            renamed: false,
            kind,
        });
        Ok(())
    }
}

fn read_dockerfile(tree: &OwnedFd, path: &[u8]) -> StageResult<Vec<u8>> {
    match read_small(tree, path, DOCKERFILE_BYTES_MAX)? {
        Some(text) => Ok(text),
        None => {
            let name = lossy(path);
            let cause = Cause::new("image_build_failed", format!("{name} is not in the commit"));
            Err(StageError::Failed(cause.object(name).hint(
                "add it, or name another one as `image: dockerfile:` in pipeline.yaml",
            )))
        }
    }
}

/// `<Dockerfile>.dockerignore` where there is one, else the context's own.
fn read_ignore(tree: &OwnedFd, context: &[u8], dockerfile: &[u8]) -> StageResult<Ignore> {
    let own = [dockerfile, b".dockerignore"].concat();
    let common = joined(context, b".dockerignore");
    for path in [own, common] {
        if let Some(text) = read_small(tree, &path, dockerignore::BYTES_MAX as u64)? {
            return Ignore::parse(&text).map_err(|bad| bad_ignore(&bad));
        }
    }
    Ok(Ignore::default())
}

fn bad_ignore(bad: &dockerignore::BadPattern) -> StageError {
    StageError::Failed(
        Cause::new("image_build_failed", format!(".dockerignore, {bad}"))
            .object(format!(".dockerignore:{}", bad.line))
            .hint("mend or remove that line"),
    )
}

/// A plain file's bytes; None where there is nothing of that name.
fn read_small(tree: &OwnedFd, path: &[u8], bytes_max: u64) -> StageResult<Option<Vec<u8>>> {
    let file = match open(tree, path, OFlags::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
        Err(error) => return Err(refused(path, error, "a file")),
    };
    let stat = rustix::fs::fstat(&file).context("cannot look at an open file")?;
    let file_type = FileType::from_raw_mode(stat.st_mode);
    if file_type != FileType::RegularFile {
        return Err(unsafe_path(
            path,
            &format!("is {}, not a plain file", describe(file_type)),
        ));
    }
    let mut bytes = Vec::new();
    std::fs::File::from(file)
        .take(bytes_max + 1)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read {}", shown(path)))?;
    if bytes.len() as u64 > bytes_max {
        return Err(unsafe_path(
            path,
            &format!("is larger than {} KiB", bytes_max / 1024),
        ));
    }
    Ok(Some(bytes))
}

/// Opens what lies below the folder; no symlink anywhere on the way, and no waiting for the other end of a FIFO.
fn open(folder: &OwnedFd, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat2(
        folder,
        OsStr::from_bytes(path),
        flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Names in a folder, sorted by their bytes.
fn names(folder: &OwnedFd) -> rustix::io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(folder)? {
        let name = entry?.file_name().to_owned();
        if !matches!(name.to_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

fn refused(path: &[u8], error: Errno, what: &str) -> StageError {
    match error {
        Errno::LOOP => unsafe_path(path, "is or goes through a symlink"),
        Errno::XDEV => unsafe_path(path, "leads out of the repository"),
        Errno::NAMETOOLONG => unsafe_path(path, "is too long"),
        // What open(2) says of a socket and of a device without a driver.
        Errno::NXIO | Errno::NODEV => unsafe_path(path, "is no plain file"),
        Errno::NOENT | Errno::NOTDIR => StageError::Failed(
            Cause::new(
                "image_build_failed",
                format!("{} is not in the commit", shown(path)),
            )
            .object(lossy(path)),
        ),
        error => anyhow!(error)
            .context(format!("cannot open {} as {what}", shown(path)))
            .into(),
    }
}

fn unsafe_path(path: &[u8], problem: &str) -> StageError {
    let cause = Cause::new("unsafe_path", format!("{} {problem}", shown(path)));
    StageError::Failed(
        cause
            .object(lossy(path))
            .hint("remove it from the repository, or leave it out by .dockerignore"),
    )
}

fn describe(kind: FileType) -> &'static str {
    match kind {
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Directory => "a folder",
        FileType::Symlink => "a symlink",
        _ => "something unknown",
    }
}

/// A path of pipeline.yaml without `./`, doubled or trailing slashes. `..` stays, and is refused when it is opened.
fn plain(path: &str) -> Vec<u8> {
    let parts: Vec<&[u8]> = Path::new(path)
        .components()
        .filter(|part| *part != std::path::Component::CurDir)
        .map(|part| part.as_os_str().as_bytes())
        .collect();
    parts.join(&b'/')
}

fn joined(folder: &[u8], name: &[u8]) -> Vec<u8> {
    match folder {
        [] => name.to_vec(),
        folder => [folder, b"/", name].concat(),
    }
}

fn lossy(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// A path for a sentence: quoted, with control characters made visible.
fn shown(path: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(path))
}
