//! The architecture as a test: who may name whom, where foreign crates live, and what must not appear.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Files whose modules do no IO: they name no module of ours that does.
const PURE: [&str; 26] = [
    "ansi",
    "builds",
    "cluster/container_signs",
    "cluster/diagnose",
    "cluster/diff",
    "cluster/ownership",
    "cluster/pod_signs",
    "cluster/policy",
    "cluster/probes",
    "cluster/refusal",
    "cluster/rollout",
    "cluster/sign",
    "cluster/snapshot",
    "cluster/tables",
    "cluster/words",
    "cluster/workload_signs",
    "diagnostic",
    "manifests/mod",
    "manifests/render",
    "manifests/yaml",
    "manifests/yaml_scalar",
    "pipeline",
    "release",
    "stages/expect",
    "stages/failed_tests",
    "stages/steps",
];
const DOES_IO: [&str; 20] = [
    "api",
    "build_log",
    "cli",
    "client",
    "cluster::apply",
    "cluster::observe",
    "config::load",
    "dashboard",
    "docker",
    "fail_point",
    "git",
    "github",
    "manifests::files",
    "manifests::kustomize",
    "queue",
    "runner",
    "server",
    "stages",
    "store",
    "webhook",
];

/// Each source file of the agent by its path below src, less `.rs`, with the text above its tests.
fn sources() -> BTreeMap<String, String> {
    let mut sources = BTreeMap::new();
    let mut folders = vec![PathBuf::from(ROOT).join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path
                    .strip_prefix(Path::new(ROOT).join("src"))
                    .unwrap()
                    .with_extension("")
                    .display()
                    .to_string();
                let text = fs::read_to_string(&path).unwrap();
                sources.insert(name, text.split("#[cfg(test)]").next().unwrap().to_owned());
            }
        }
    }
    assert!(
        sources.len() > 20,
        "the sources were not found: {sources:?}"
    );
    sources
}

/// Every path below `crate::` that a file names, in full (`cluster::apply::Done`): uses with their groups, and paths in
/// code, those of `super::` and `self::` too. `path` is the file's own, below src.
fn names(path: &str, text: &str) -> BTreeSet<String> {
    let code: String = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    let own: Vec<&str> = path
        .split('/')
        .filter(|part| !["mod", "lib", "main"].contains(part))
        .collect();
    let parent = &own[..own.len().saturating_sub(1)];
    let mut names = BTreeSet::new();
    for (root, base) in [
        ("crate::", &[][..]),
        ("super::", parent),
        ("self::", &own[..]),
    ] {
        for (at, _) in code.match_indices(root) {
            let is_path = code[..at]
                .chars()
                .next_back()
                .is_none_or(|before| !before.is_alphanumeric() && before != '_' && before != ':');
            if is_path {
                expand(&base.join("::"), &code[at + root.len()..], &mut names);
            }
        }
    }
    names
}

/// Reads one path, or one tree of a use, that begins at `rest`; answers where it ends.
fn expand(base: &str, rest: &str, names: &mut BTreeSet<String>) -> usize {
    let join = |part: &str| match (base, part) {
        (base, "self" | "") => base.to_owned(),
        ("", part) => part.to_owned(),
        (base, part) => format!("{base}::{part}"),
    };
    let word = rest
        .find(|c: char| !c.is_alphanumeric() && c != '_')
        .unwrap_or(rest.len());
    let here = join(&rest[..word]);
    if let Some(deeper) = rest[word..].strip_prefix("::") {
        return word + 2 + expand(&here, deeper, names);
    }
    if word > 0 || !rest.starts_with('{') {
        names.insert(here);
        return word;
    }
    let mut at = 1;
    loop {
        at += rest[at..]
            .find(|c: char| !c.is_whitespace() && c != ',')
            .expect("a group of a use ends");
        if rest[at..].starts_with('}') {
            return at + 1;
        }
        at += expand(base, &rest[at..], names);
        // What follows `as` is a name of the file's own.
        at += rest[at..].find([',', '}']).expect("a group of a use ends");
    }
}

#[test]
fn names_are_found_in_groups_and_beneath_super() {
    let text = "use super::policy::{self, ACCOUNT};\nuse crate::{api::{self, filter::Filter as Own}, docker};\nfn a() { crate::store::b(super::d()) }";
    let found = names("cluster/apply", text);
    let wanted = [
        "api",
        "api::filter::Filter",
        "cluster::d",
        "cluster::policy",
        "cluster::policy::ACCOUNT",
        "docker",
        "store::b",
    ];
    assert_eq!(found.iter().map(String::as_str).collect::<Vec<_>>(), wanted);
}

#[test]
fn modules_have_no_cycles() {
    let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let sources = sources();
    let modules: BTreeSet<&str> = sources.keys().map(|path| module(path)).collect();
    for (path, text) in sources
        .iter()
        .filter(|(path, _)| !["lib", "main"].contains(&path.as_str()) && !path.ends_with("tests"))
    {
        let own = module(path);
        let named = names(path, text)
            .into_iter()
            .map(|name| module(&name).to_owned());
        uses.entry(own.to_owned())
            .or_default()
            .extend(named.filter(|name| name != own && modules.contains(name.as_str())));
    }
    // Takes away what names nothing that is left; a cycle stays.
    loop {
        let leaves: Vec<String> = uses
            .iter()
            .filter(|(_, named)| named.is_empty())
            .map(|(name, _)| name.clone())
            .collect();
        if leaves.is_empty() {
            break;
        }
        for leaf in leaves {
            uses.remove(&leaf);
            uses.values_mut().for_each(|named| {
                named.remove(&leaf);
            });
        }
    }
    assert!(
        uses.is_empty(),
        "modules name each other in a circle, or lead into one: {uses:#?}"
    );
}

fn module(path: &str) -> &str {
    path.split(['/', ':']).next().unwrap()
}

#[test]
fn pure_modules_name_nothing_that_does_io() {
    for (path, text) in sources()
        .iter()
        .filter(|(path, _)| PURE.contains(&path.as_str()))
    {
        for name in names(path, text).into_iter().filter(|name| {
            !PURE.contains(
                &name
                    .split("::")
                    .take(2)
                    .collect::<Vec<_>>()
                    .join("/")
                    .as_str(),
            )
        }) {
            let offender = DOES_IO.iter().find(|io| name.starts_with(**io));
            assert!(
                offender.is_none(),
                "{path}.rs is pure and names crate::{name}"
            );
        }
        assert!(
            !text.contains("async fn") && !text.contains("std::fs"),
            "{path}.rs is pure: no async, no files"
        );
    }
}

#[test]
fn modules_name_only_what_is_downstream() {
    let forbidden: [(&str, &[&str]); 14] = [
        (
            "sweep",
            &[
                "cluster",
                "github",
                "dashboard",
                "cli",
                "webhook",
                "server",
                "api",
            ],
        ),
        (
            "reconcile",
            &[
                "stages",
                "cluster",
                "github",
                "dashboard",
                "cli",
                "webhook",
                "server",
                "api",
            ],
        ),
        (
            "webhook",
            &[
                "runner",
                "stages",
                "cluster",
                "github",
                "dashboard",
                "cli",
                "queue",
            ],
        ),
        (
            "api",
            &[
                "runner", "stages", "cluster", "github", "queue", "cli", "webhook",
            ],
        ),
        (
            "dashboard",
            &[
                "runner", "stages", "cluster", "github", "queue", "cli", "webhook",
            ],
        ),
        (
            "github",
            &[
                "runner",
                "stages",
                "cluster",
                "queue",
                "dashboard",
                "cli",
                "webhook",
                "server",
            ],
        ),
        (
            "queue",
            &[
                "stages",
                "cluster",
                "github",
                "dashboard",
                "cli",
                "webhook",
                "server",
            ],
        ),
        (
            "runner",
            &[
                "queue",
                "github",
                "dashboard",
                "cli",
                "webhook",
                "server",
                "api",
            ],
        ),
        (
            "stages",
            &[
                "queue",
                "runner",
                "store",
                "github",
                "dashboard",
                "cli",
                "webhook",
                "server",
                "api",
            ],
        ),
        (
            "cluster",
            &[
                "queue",
                "runner",
                "stages",
                "store",
                "github",
                "dashboard",
                "cli",
                "webhook",
                "server",
                "api",
            ],
        ),
        (
            "store",
            &[
                "queue",
                "runner",
                "stages",
                "cluster",
                "github",
                "dashboard",
                "cli",
                "webhook",
                "server",
                "api",
            ],
        ),
        (
            "build_log",
            &[
                "queue",
                "runner",
                "stages",
                "cluster",
                "github",
                "dashboard",
                "cli",
                "webhook",
                "server",
                "api",
            ],
        ),
        (
            "config",
            &[
                "queue",
                "runner",
                "stages",
                "cluster",
                "store",
                "github",
                "dashboard",
                "cli",
                "webhook",
                "server",
                "api",
            ],
        ),
        (
            "client",
            &[
                "queue",
                "runner",
                "stages",
                "cluster",
                "store",
                "github",
                "dashboard",
                "webhook",
                "server",
            ],
        ),
    ];
    for (path, text) in sources() {
        let Some((_, upstream)) = forbidden.iter().find(|(from, _)| *from == module(&path)) else {
            continue;
        };
        for name in names(&path, &text) {
            assert!(
                !upstream.contains(&module(&name)),
                "{path}.rs names crate::{name}, which is upstream of it"
            );
        }
    }
}

#[test]
fn a_stage_never_names_another_stage() {
    let stages = [
        "checkout",
        "image",
        "test",
        "deploy",
        "verify",
        "smoke_test",
        "rollback",
    ];
    for (path, text) in sources() {
        let Some(own) = path
            .strip_prefix("stages/")
            .filter(|own| stages.contains(own))
        else {
            continue;
        };
        let others = stages.iter().filter(|other| **other != own);
        for other in others {
            for form in [
                format!("super::{other}::"),
                format!("stages::{other}::"),
                format!("use super::{other};"),
            ] {
                assert!(!text.contains(&form), "{path}.rs names the stage {other}");
            }
        }
    }
}

#[test]
fn foreign_crates_have_one_place_each() {
    let places: [(&str, &[&str]); 6] = [
        ("sqlx", &["store"]),
        ("git2", &["git"]),
        ("octocrab", &["github"]),
        ("kube", &["cluster", "stages", "cli"]),
        ("bollard", &["docker", "stages", "cli"]),
        (
            "axum",
            &["server", "webhook", "api", "dashboard", "metrics"],
        ),
    ];
    for (path, text) in sources() {
        for (foreign, homes) in &places {
            let named = text.lines().any(|line| {
                let line = line.trim_start();
                !line.starts_with("//")
                    && (line.contains(&format!("{foreign}::"))
                        || line.contains(&format!("use {foreign}")))
            });
            assert!(
                !named || homes.contains(&module(&path)),
                "{path}.rs names {foreign}, whose place is {homes:?}"
            );
        }
    }
}

#[test]
fn only_config_reads_the_environment_and_only_store_writes_sql() {
    for (path, text) in sources() {
        let code: Vec<_> = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"))
            .collect();
        if module(&path) != "config" {
            assert!(
                !code.iter().any(|line| line.contains("env::var")),
                "{path}.rs reads the environment"
            );
        }
        if module(&path) != "store" {
            for word in ["INSERT INTO", "DELETE FROM", "SELECT "] {
                assert!(
                    !code.iter().any(|line| line.contains(word)),
                    "{path}.rs holds SQL"
                );
            }
        }
    }
}

#[test]
fn every_file_says_what_it_is() {
    for (path, text) in sources() {
        let head = text
            .lines()
            .take_while(|line| line.starts_with("//!"))
            .count();
        assert!(
            (1..=8).contains(&head),
            "{path}.rs begins with {head} lines of `//!`: one to eight say what it is"
        );
    }
}

#[test]
fn the_version_is_in_the_changelog() {
    let changelog = fs::read_to_string(Path::new(ROOT).join("../CHANGELOG.md")).unwrap();
    assert!(changelog.contains(env!("CARGO_PKG_VERSION")) || changelog.contains("Unreleased"));
}

#[test]
fn no_test_is_left_out_or_says_what_it_should_see_fail() {
    let mut folders = vec![
        PathBuf::from(ROOT).join("src"),
        PathBuf::from(ROOT).join("tests"),
    ];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                for attribute in [concat!("#[ig", "nore"), concat!("#[should", "_panic")] {
                    assert!(
                        !text.contains(attribute),
                        "{} holds {attribute}",
                        path.display()
                    );
                }
            }
        }
    }
}

/// What only tests bring in must not be what makes the program compile: `cargo build -p landfall` would fail for its users.
#[test]
fn the_program_is_built_of_the_same_parts_with_and_without_its_tests() {
    let parts = |edges: &str| {
        let output = Command::new("cargo")
            .args([
                "tree",
                "--locked",
                "--offline",
                "-p",
                "landfall",
                "-e",
                edges,
            ])
            .args(["--depth", "1", "--prefix", "none", "-f", "{p} {f}"])
            .current_dir(ROOT)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "cargo tree: {said}");
        let tree = String::from_utf8(output.stdout).unwrap();
        tree.lines().map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let (without, with) = (parts("no-dev"), parts("normal,build,dev"));
    assert!(without.len() > 30, "{without:?}");
    let other: Vec<_> = without.difference(&with).collect();
    assert!(
        other.is_empty(),
        "with fewer features than in tests: {other:?}; name in [dependencies] those that are needed"
    );
}

#[test]
fn the_architecture_is_short_enough_to_be_read() {
    let text = fs::read_to_string(Path::new(ROOT).join("../ARCHITECTURE.md")).unwrap();
    assert!(
        text.lines().count() <= 150,
        "ARCHITECTURE.md has {} lines",
        text.lines().count()
    );
}
