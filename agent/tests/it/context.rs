//! The build context: .dockerignore against moby's own module, and trees made to escape.

use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use landfall::dockerignore::{Ignore, Matched};
use landfall::stages::context::{self, Source};
use landfall::stages::{StageError, StageResult};
use tokio_util::sync::CancellationToken;

use crate::docker_world::{failed, write};

/// A file of patterns and the paths to judge by it.
type Question = (Vec<u8>, Vec<Vec<u8>>);

#[test]
fn a_dockerignore_means_what_moby_says_it_means() {
    let mut questions = table();
    let mut random = Random(0x1aed_fa11);
    questions.extend((0..6000).map(|_| random.question()));
    let answers = ask_oracle(&questions);
    let mut kinds = [0; 4];
    for ((text, paths), answer) in questions.iter().zip(&answers) {
        let ours = judge(text, paths);
        assert_eq!(
            &ours,
            answer,
            "{:?} on {:?}",
            String::from_utf8_lossy(text),
            paths
                .iter()
                .map(|path| String::from_utf8_lossy(path))
                .collect::<Vec<_>>()
        );
        for (kind, word) in kinds.iter_mut().zip(["in", "out", "error", "refused"]) {
            *kind += ours.iter().filter(|verdict| **verdict == word).count();
        }
    }
    assert_eq!(answers.len(), questions.len());
    assert!(
        kinds.iter().all(|count| *count > 100),
        "the questions do not try enough: {kinds:?}"
    );
}

fn judge(text: &[u8], paths: &[Vec<u8>]) -> Vec<String> {
    let Ok(ignore) = Ignore::parse(text) else {
        return vec!["refused".to_owned()];
    };
    let verdict = |path: &Vec<u8>| {
        let mut matched = Matched::default();
        let mut out = false;
        let ends = path
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == b'/')
            .map(|(index, _)| index);
        for end in ends.chain([path.len()]) {
            match ignore.judge(&path[..end], &matched) {
                Ok(verdict) => (out, matched) = verdict,
                Err(_) => return "error",
            }
        }
        if out { "out" } else { "in" }
    };
    paths.iter().map(|path| verdict(path).to_owned()).collect()
}

/// Builds and asks the Go program; without Go this fails, and never passes unseen.
fn ask_oracle(questions: &[Question]) -> Vec<Vec<String>> {
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("oracle-dockerignore");
    let built = Command::new("go")
        .args(["build", "-o"])
        .arg(&program)
        .arg(".")
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/dockerignore"))
        .env("GOFLAGS", "-mod=mod -buildvcs=false")
        .output()
        .expect(
            "this test needs Go (1.24 or newer), the language of the oracle: https://go.dev/dl",
        );
    assert!(
        built.status.success(),
        "go build: {}",
        String::from_utf8_lossy(&built.stderr)
    );
    let mut input = String::new();
    for (text, paths) in questions {
        let paths: Vec<_> = paths.iter().map(|path| STANDARD.encode(path)).collect();
        input += &serde_json::json!({"ignore": STANDARD.encode(text), "paths": paths}).to_string();
        input.push('\n');
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), input).unwrap();
    let output = Command::new(program)
        .stdin(file.reopen().unwrap())
        .stderr(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success());
    let answers = String::from_utf8(output.stdout).unwrap();
    answers
        .lines()
        .map(|line| {
            let answer: serde_json::Value = serde_json::from_str(line).unwrap();
            match answer["refused"].as_bool().unwrap() {
                true => vec!["refused".to_owned()],
                false => answer["verdicts"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|verdict| verdict.as_str().unwrap().to_owned())
                    .collect(),
            }
        })
        .collect()
}

fn table() -> Vec<Question> {
    let paths: Vec<Vec<u8>> = [
        "Dockerfile",
        ".dockerignore",
        "README.md",
        "target",
        "target/debug/x",
        "app/target/x",
        "app/src/main.rs",
        "app/Cargo.toml",
        "docs/a/b/c.md",
        "a.md",
        "foo bar",
        "#odd",
        "!odd",
        "agent/src/lib.rs",
        "x/y/z",
        "z",
        "node_modules/a/index.js",
        "b/node_modules/a",
        "ä/ö",
    ]
    .iter()
    .map(|path| path.as_bytes().to_vec())
    .collect();
    let files = [
        "",
        "*",
        "**",
        "*\n!app",
        "*\n!app/src\n",
        "target",
        "/target/",
        "**/target",
        "target/**",
        "*.md\n!README.md",
        "**/*.md\n!docs/**",
        "# comment\n  target  \n\n",
        "\u{feff}target\n",
        "target\r\n*.md\r\n",
        "!target",
        "\\#odd",
        "\\!odd",
        "foo*bar",
        "docs/*/*/c.md",
        "docs/**/c.md",
        "x/../target",
        "./target",
        "../target",
        "node_modules\n**/node_modules",
        "a?md",
        "[a-z].md",
        "[^z]",
        "!",
        "[",
        "a[",
        "**/",
        "/",
        "agent/src\n!agent/src/lib.rs",
        "*\n!**/src",
        "ä/?",
        "a.md|target",
        "x{1}*",
        "\\",
    ];
    files
        .iter()
        .map(|file| (file.as_bytes().to_vec(), paths.clone()))
        .collect()
}

/// The same questions in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap() % limit
    }

    fn pick(&mut self, words: &[&'static str]) -> &'static str {
        words[self.below(words.len())]
    }

    fn question(&mut self) -> Question {
        let mut text = Vec::new();
        for _ in 0..=self.below(4) {
            text.extend(self.pattern());
            text.push(b'\n');
        }
        (text, (0..10).map(|_| self.path()).collect())
    }

    fn pattern(&mut self) -> Vec<u8> {
        const TAME: [&str; 14] = [
            "a", "b", "ab", "a.b", "*", "?", "**", "/", "/", "*.b", "[ab]", "[^a]", "**/", "/**",
        ];
        const WILD: [&str; 48] = [
            "a", "b", "*", "**", "/", "[a-c]", "[]a]", "\\", "\\*", "\\?", "\\d", "\\b", "!", "#",
            " ", "..", ".", "./", "{2}", "{1,2}", "{", "}", "|", "^", "$", "(", ")", "+", "-", "]",
            "[", "é", "\u{ff}", "~", "[\\]]", "[a-]", "[-a]", "{0}", "{,3}", "\\w", "\\S", "[*]",
            "[?]", "[\\d]", "[\\W]", "***", "\t", "[!a]",
        ];
        let mut pattern = Vec::new();
        if self.below(4) == 0 {
            pattern.push(b'!');
        }
        let is_wild = self.below(2) == 0;
        for _ in 0..=self.below(6) {
            match is_wild {
                true if self.below(60) == 0 => pattern.push(0xff),
                true => pattern.extend(self.pick(&WILD).bytes()),
                false => pattern.extend(self.pick(&TAME).bytes()),
            }
        }
        pattern
    }

    fn path(&mut self) -> Vec<u8> {
        const NAMES: [&str; 25] = [
            "a", "b", "ab", "a.b", "aa", "ba", "bb", "a*", "é", "a b", "1", "a1b", "abab", "*",
            "?", "[", "]", "^a", "a\\", "x{2}", "a|b", "#a", "!a", "a\nb", "a-",
        ];
        let mut path = Vec::new();
        for index in 0..=self.below(4) {
            if index > 0 {
                path.push(b'/');
            }
            match self.below(50) {
                0 => path.extend(b"\xffa"),
                _ => path.extend(self.pick(&NAMES).bytes()),
            }
        }
        path
    }
}

fn source(tree: &Path) -> Source {
    Source {
        tree: tree.to_owned(),
        context: ".".to_owned(),
        dockerfile: "Dockerfile".to_owned(),
        time: 1_700_000_000,
        bytes_max: 1 << 20,
        files_max: 1000,
    }
}

fn tree() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("Dockerfile"), "FROM scratch\n");
    folder
}

/// The tar's bytes.
fn packed(source: &Source) -> StageResult<Vec<u8>> {
    let stop = CancellationToken::new();
    let context = context::read(source, &stop)?;
    let mut bytes = Vec::new();
    context::write(&context, &mut bytes, &stop)?;
    Ok(bytes)
}

/// Name, kind, mode and content or target of each entry.
fn entries(tar: &[u8]) -> Vec<(Vec<u8>, tar::EntryType, u32, Vec<u8>)> {
    let mut archive = tar::Archive::new(tar);
    let read = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        assert_eq!(
            (entry.header().uid().unwrap(), entry.header().gid().unwrap()),
            (0, 0)
        );
        assert_eq!(entry.header().mtime().unwrap(), 1_700_000_000);
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        if let Some(target) = entry.link_name_bytes() {
            content = target.to_vec();
        }
        (
            entry.path_bytes().to_vec(),
            entry.header().entry_type(),
            entry.header().mode().unwrap(),
            content,
        )
    });
    read.collect()
}

fn names(tar: &[u8]) -> Vec<String> {
    entries(tar)
        .into_iter()
        .map(|(name, ..)| String::from_utf8_lossy(&name).into_owned())
        .collect()
}

#[test]
fn the_same_tree_gives_the_same_bytes() {
    let (one, other) = (tree(), tree());
    for (index, folder) in [&one, &other].into_iter().enumerate() {
        let mut files = ["z", "a/b", "a/a", "B"];
        if index == 1 {
            files.reverse();
        }
        for file in files {
            write(&folder.path().join(file), file);
        }
        let mode =
            std::os::unix::fs::PermissionsExt::from_mode(if index == 0 { 0o700 } else { 0o775 });
        std::fs::set_permissions(folder.path().join("z"), mode).unwrap();
    }
    let bytes = packed(&source(one.path())).unwrap();
    assert_eq!(bytes, packed(&source(other.path())).unwrap());
    assert_eq!(names(&bytes), ["B", "Dockerfile", "a/", "a/a", "a/b", "z"]);
    let modes: Vec<_> = entries(&bytes)
        .iter()
        .map(|(_, _, mode, _)| *mode)
        .collect();
    assert_eq!(modes, [0o644, 0o644, 0o755, 0o644, 0o644, 0o755]);
}

#[test]
fn a_symlink_is_sent_as_a_symlink_wherever_it_leads() {
    let folder = tree();
    let outside = tempfile::tempdir().unwrap();
    write(&outside.path().join("secret"), "canary");
    for (name, target) in [
        ("absolute", "/etc/passwd"),
        ("up", "../../../../etc/passwd"),
        ("loop", "loop"),
        ("chain", "up"),
        ("proc", "/proc/self/environ"),
    ] {
        symlink(target, folder.path().join(name)).unwrap();
    }
    symlink(outside.path(), folder.path().join("folder")).unwrap();
    let long = "x/".repeat(100);
    symlink(&long, folder.path().join("long")).unwrap();
    let bytes = packed(&source(folder.path())).unwrap();
    assert!(
        !bytes
            .windows(6)
            .any(|window| window == b"canary" || window == b"root:x")
    );
    let links: Vec<_> = entries(&bytes)
        .into_iter()
        .filter(|(_, kind, ..)| *kind == tar::EntryType::Symlink)
        .collect();
    assert_eq!(links.len(), 7);
    assert!(
        links
            .iter()
            .any(|(name, _, _, target)| name == b"up" && target == b"../../../../etc/passwd")
    );
    assert!(
        links
            .iter()
            .any(|(name, _, _, target)| name == b"long" && *target == long.as_bytes())
    );
}

#[test]
fn what_is_no_plain_file_is_refused_by_name_and_never_waited_for() {
    let begun = Instant::now();
    let fifo = tree();
    assert!(
        Command::new("mkfifo")
            .arg(fifo.path().join("pipe"))
            .status()
            .unwrap()
            .success()
    );
    let socket = tree();
    let _listener = std::os::unix::net::UnixListener::bind(socket.path().join("pipe")).unwrap();
    for folder in [&fifo, &socket] {
        let cause = failed(packed(&source(folder.path())));
        assert_eq!(
            (cause.id.as_str(), cause.object.as_deref()),
            ("unsafe_path", Some("pipe")),
            "{cause:?}"
        );
        // Left out, it hurts nobody.
        write(&folder.path().join(".dockerignore"), "pipe\n");
        packed(&source(folder.path())).unwrap();
    }
    for name in ["Dockerfile", ".dockerignore"] {
        let folder = tree();
        let _ = std::fs::remove_file(folder.path().join(name));
        assert!(
            Command::new("mkfifo")
                .arg(folder.path().join(name))
                .status()
                .unwrap()
                .success()
        );
        assert_eq!(failed(packed(&source(folder.path()))).id, "unsafe_path");
    }
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn what_is_read_is_never_read_through_a_symlink() {
    for (name, target) in [
        ("Dockerfile", "/etc/passwd"),
        ("Dockerfile", "real"),
        (".dockerignore", "/proc/self/environ"),
    ] {
        let folder = tree();
        write(&folder.path().join("real"), "FROM scratch\n");
        let _ = std::fs::remove_file(folder.path().join(name));
        symlink(target, folder.path().join(name)).unwrap();
        let cause = failed(packed(&source(folder.path())));
        assert_eq!(
            (cause.id.as_str(), cause.object.as_deref()),
            ("unsafe_path", Some(name))
        );
        assert!(!cause.sentence.contains("root"), "{cause:?}");
    }
    let folder = tree();
    symlink("/etc", folder.path().join("sub")).unwrap();
    for (context, dockerfile) in [
        ("sub", "Dockerfile"),
        ("..", "Dockerfile"),
        (".", "../../etc/passwd"),
        (".", "sub/passwd"),
    ] {
        let mut source = source(folder.path());
        (source.context, source.dockerfile) = (context.to_owned(), dockerfile.to_owned());
        assert_eq!(
            failed(packed(&source)).id,
            "unsafe_path",
            "{context} {dockerfile}"
        );
    }
}

#[test]
fn odd_names_arrive_as_they_are() {
    let folder = tree();
    let mut names = vec![
        vec![b'n'; 255],
        b"\xff\xfe not UTF-8".to_vec(),
        b"new\nline".to_vec(),
        b"back\\slash".to_vec(),
        [b"\xff", vec![b'x'; 200].as_slice()].concat(),
    ];
    for name in &names {
        std::fs::write(
            folder.path().join(std::ffi::OsStr::from_bytes(name)),
            b"content",
        )
        .unwrap();
    }
    let found: Vec<_> = entries(&packed(&source(folder.path())).unwrap())
        .into_iter()
        .map(|(name, ..)| name)
        .collect();
    names.push(b"Dockerfile".to_vec());
    names.sort();
    assert_eq!(found, names);
}

#[test]
fn a_context_over_its_limits_is_refused_with_the_file_that_is_too_much() {
    let folder = tree();
    let huge = std::fs::File::create(folder.path().join("huge")).unwrap();
    huge.set_len(10 << 30).unwrap();
    let begun = Instant::now();
    let cause = failed(packed(&source(folder.path())));
    assert_eq!(
        (cause.id.as_str(), cause.object.as_deref()),
        ("context_too_large", Some("huge"))
    );
    assert!(begun.elapsed() < Duration::from_secs(1), "it was read");
    write(&folder.path().join(".dockerignore"), "huge");
    packed(&source(folder.path())).unwrap();
    for number in 0..20 {
        write(&folder.path().join(format!("f{number}")), "");
    }
    let few = Source {
        files_max: 5,
        ..source(folder.path())
    };
    assert_eq!(failed(packed(&few)).id, "context_too_large");
}

#[test]
fn folders_without_end_are_refused() {
    let folder = tree();
    std::fs::create_dir_all(folder.path().join("d/".repeat(200))).unwrap();
    assert_eq!(failed(packed(&source(folder.path()))).id, "unsafe_path");
}

#[test]
fn what_is_left_out_stays_out_and_what_docker_needs_is_sent() {
    let folder = tree();
    for name in [
        "secret",
        "app/src/main.rs",
        "app/Cargo.toml",
        "docs/readme",
        "empty/deep/x",
    ] {
        write(&folder.path().join(name), "text");
    }
    write(&folder.path().join(".dockerignore"), "*\n!app/src\n");
    assert_eq!(
        names(&packed(&source(folder.path())).unwrap()),
        [
            ".dockerignore",
            "Dockerfile",
            "app/",
            "app/src/",
            "app/src/main.rs"
        ]
    );
    write(&folder.path().join("Dockerfile.dockerignore"), "secret\n");
    let sent = names(&packed(&source(folder.path())).unwrap());
    assert!(
        sent.contains(&"docs/readme".to_owned()) && !sent.contains(&"secret".to_owned()),
        "{sent:?}"
    );
    write(&folder.path().join("Dockerfile.dockerignore"), "ok\n[\n");
    let cause = failed(packed(&source(folder.path())));
    assert_eq!(cause.object.as_deref(), Some(".dockerignore:2"));
}

#[test]
fn a_dockerfile_outside_the_context_is_sent_along() {
    let folder = tree();
    write(&folder.path().join("app/main.rs"), "fn main() {}");
    let inside = Source {
        context: "app/".to_owned(),
        ..source(folder.path())
    };
    let stop = CancellationToken::new();
    let context = context::read(&inside, &stop).unwrap();
    assert_eq!(context.dockerfile, ".landfall.Dockerfile");
    let sent = entries(&packed(&inside).unwrap());
    assert_eq!(
        sent.iter()
            .map(|(name, ..)| name.as_slice())
            .collect::<Vec<_>>(),
        [&b"main.rs"[..], b".landfall.Dockerfile"]
    );
    assert_eq!(sent[1].3, b"FROM scratch\n");
    let missing = Source {
        dockerfile: "Nothing".to_owned(),
        ..source(folder.path())
    };
    assert!(
        failed(packed(&missing))
            .sentence
            .contains("Nothing is not in the commit")
    );
}

#[test]
fn listing_ends_when_nobody_wants_it_any_more() {
    let folder = tree();
    let stop = CancellationToken::new();
    stop.cancel();
    assert!(matches!(
        context::read(&source(folder.path()), &stop),
        Err(StageError::Canceled)
    ));
}
