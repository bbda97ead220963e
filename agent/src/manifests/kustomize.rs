//! Kustomize: a folder with a kustomization is rendered by the machine's own `kustomize`, or by `kubectl kustomize`.
//!
//! Whatever it names is looked at first: only files and folders of the tree, no address, no chart, no plugin: the tools
//! would fetch them with this machine's rights. They run without git, an environment or a way out, within limits. Blocking.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::BYTES_MAX;
use super::files::read_file;
use crate::config;

pub const NAMES: [&str; 3] = ["kustomization.yaml", "kustomization.yml", "Kustomization"];
const LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);
const FOLDERS_MAX: usize = 100;
const ERROR_CHARS_MAX: usize = 1_000;
/// There is no such folder, by the distributions' own convention: no git is found, no configuration read.
const ABSENT: &str = "/nonexistent";
/// Nobody listens there.
const NOWHERE: &str = "http://127.0.0.1:9";
/// Every key that is understood here, exactly so written: the tools themselves take any case.
const KNOWN: [&str; 29] = [
    "apiVersion",
    "kind",
    "metadata",
    "resources",
    "bases",
    "components",
    "crds",
    "configurations",
    "patches",
    "patchesStrategicMerge",
    "patchesJson6902",
    "replacements",
    "vars",
    "namespace",
    "namePrefix",
    "nameSuffix",
    "commonLabels",
    "commonAnnotations",
    "labels",
    "images",
    "replicas",
    "configMapGenerator",
    "secretGenerator",
    "generatorOptions",
    "openapi",
    "sortOptions",
    "buildMetadata",
    "transformers",
    "validators",
];
/// Lists of files and folders.
const LISTS: [&str; 8] = [
    "resources",
    "bases",
    "components",
    "crds",
    "configurations",
    "patchesStrategicMerge",
    "transformers",
    "validators",
];

/// The rendered manifests of a folder, as one text of YAML documents. An error is one sentence.
pub fn render(tree: &Path, folder: &str) -> Result<String, String> {
    check(tree, folder)?;
    let full = tree.join(folder);
    for (program, arguments) in [
        ("kustomize", &["build"][..]),
        ("kubectl", &["kustomize"][..]),
    ] {
        let Some(found) = config::program(program) else {
            continue;
        };
        // Without git and without a way out: a second wall, should the look above have missed an address.
        let spawned = Command::new(&found)
            .args(arguments)
            .arg(&full)
            .env_clear()
            .env("PATH", ABSENT)
            .env("HOME", ABSENT)
            .env("HTTP_PROXY", NOWHERE)
            .env("HTTPS_PROXY", NOWHERE)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let child = spawned.map_err(|error| format!("cannot run {}: {error}", found.display()))?;
        return output(child, program, folder);
    }
    Err(format!(
        "{folder} has a kustomization, and there is neither `kustomize` nor `kubectl` on the agent's machine to render it: install one, or commit what it renders"
    ))
}

fn output(mut child: Child, program: &str, folder: &str) -> Result<String, String> {
    let read = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(pipe) = pipe {
                let _ = pipe.take(BYTES_MAX as u64 + 1).read_to_end(&mut bytes);
            }
            bytes
        })
    };
    let out = read(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let err = read(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let begun = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if begun.elapsed() < LIMIT => std::thread::sleep(POLL),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!(
                    "{program} has not rendered {folder} within {} s",
                    LIMIT.as_secs()
                ));
            }
            Err(error) => return Err(format!("cannot wait for {program}: {error}")),
        }
    };
    let (out, err) = (
        out.join().unwrap_or_default(),
        err.join().unwrap_or_default(),
    );
    if !status.success() {
        let said: String = String::from_utf8_lossy(&err)
            .trim()
            .chars()
            .take(ERROR_CHARS_MAX)
            .collect();
        return Err(format!("{program} cannot render {folder}: {said}"));
    }
    if out.len() > BYTES_MAX {
        return Err(format!(
            "{folder}: what {program} renders is larger than {} MiB",
            BYTES_MAX >> 20
        ));
    }
    String::from_utf8(out).map_err(|_| format!("{folder}: what {program} renders is not UTF-8"))
}

/// Every kustomization that is led to, and every file that they name, without leaving the tree.
fn check(tree: &Path, folder: &str) -> Result<(), String> {
    let mut folders = vec![normal(folder, ".")?];
    let mut seen = 0;
    while let Some(folder) = folders.get(seen).cloned() {
        seen += 1;
        if seen > FOLDERS_MAX {
            return Err(format!(
                "more than {FOLDERS_MAX} kustomizations lead to each other"
            ));
        }
        let mut found = None;
        for name in NAMES {
            let path = join(&folder, name);
            if let Some(text) = read_file(tree, &path)? {
                found = Some((path, text));
                break;
            }
        }
        let Some((path, text)) = found else {
            continue;
        };
        let value: Value =
            serde_yaml::from_str(&text).map_err(|error| format!("{path}: {error}"))?;
        let mut members = value.as_object().into_iter().flatten();
        if let Some((key, _)) = members.find(|(key, _)| !KNOWN.contains(&key.as_str())) {
            return Err(format!(
                "{path}: `{key}` is not supported: what is not known might run or fetch something"
            ));
        }
        for target in targets(&value) {
            // Addresses of whatever kind: `https://`, `git@host:path`, `a@b:c`, `host/x?ref=y`.
            if target.contains([':', '@', '?']) || target.starts_with('/') {
                return Err(format!(
                    "{path} names {target:?}: only files and folders of the repository may be named"
                ));
            }
            let target = normal(&folder, target).map_err(|problem| format!("{path}: {problem}"))?;
            if read_file(tree, &target)?.is_some() {
                continue;
            }
            if !tree
                .join(&target)
                .symlink_metadata()
                .is_ok_and(|it| it.is_dir())
            {
                return Err(format!(
                    "{path} names {target}, which is not in the repository"
                ));
            }
            if !folders.contains(&target) {
                folders.push(target);
            }
        }
    }
    Ok(())
}

fn targets(kustomization: &Value) -> Vec<&str> {
    let list = |key: &str| {
        kustomization
            .get(key)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
    };
    let mut targets: Vec<&str> = LISTS
        .iter()
        .flat_map(|key| list(key))
        .filter_map(Value::as_str)
        .collect();
    for key in ["patches", "patchesJson6902", "replacements"] {
        targets.extend(list(key).filter_map(|one| one.get("path")?.as_str()));
    }
    for key in ["configMapGenerator", "secretGenerator"] {
        for one in list(key) {
            for files in ["files", "envs"] {
                let named = one
                    .get(files)
                    .and_then(Value::as_array)
                    .into_iter()
                    .flatten();
                targets.extend(
                    named
                        .filter_map(Value::as_str)
                        .map(|file| file.rsplit_once('=').map_or(file, |(_, path)| path)),
                );
            }
            targets.extend(one.get("env").and_then(Value::as_str));
        }
    }
    targets.extend(
        kustomization
            .pointer("/openapi/path")
            .and_then(Value::as_str),
    );
    // Inline patches are YAML, and no paths.
    targets.retain(|target| !target.contains('\n') && !target.is_empty());
    targets
}

fn join(folder: &str, name: &str) -> String {
    match folder {
        "" => name.to_owned(),
        folder => format!("{folder}/{name}"),
    }
}

/// `a/b` and `../c` are `a/c`; one that leads out of the tree is refused.
fn normal(folder: &str, path: &str) -> Result<String, String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in folder.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts
                    .pop()
                    .ok_or_else(|| format!("{path} leads out of the repository"))?;
            }
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn tree(kustomization: &str) -> tempfile::TempDir {
        let tree = tempfile::tempdir().unwrap();
        for folder in ["base", "overlay"] {
            fs::create_dir(tree.path().join(folder)).unwrap();
        }
        fs::write(
            tree.path().join("base/kustomization.yaml"),
            "resources: [settings.yaml]\n",
        )
        .unwrap();
        fs::write(tree.path().join("base/settings.yaml"), "kind: ConfigMap\n").unwrap();
        fs::write(
            tree.path().join("overlay/kustomization.yaml"),
            kustomization,
        )
        .unwrap();
        tree
    }

    #[test]
    fn what_a_kustomization_names_must_be_in_the_tree() {
        check(
            tree("resources: [../base]\npatches: [{patch: \"a: b\\n\"}]\n").path(),
            "overlay/",
        )
        .unwrap();
        for (text, says) in [
            (
                "resources: ['https://example.org/all.yaml']",
                "only files and folders of the repository",
            ),
            (
                "resources: ['github.com/a/b?ref=main']",
                "only files and folders",
            ),
            ("resources: [../../etc]", "leads out of the repository"),
            (
                "configMapGenerator: [{name: a, files: [b=/etc/passwd]}]",
                "only files and folders",
            ),
            ("helmCharts: [{name: a}]", "might run or fetch"),
            (
                "Resources: ['https://example.org/all.yaml']",
                "`Resources` is not supported",
            ),
            ("resources: ['a@b:c/d']", "only files and folders"),
            ("resources: [none.yaml]", "not in the repository"),
            ("a: [", "overlay/kustomization.yaml"),
        ] {
            let error = check(tree(text).path(), "overlay").unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn a_link_out_of_the_tree_is_never_read() {
        let tree = tree("resources: [link.yaml]\n");
        std::os::unix::fs::symlink("/etc/passwd", tree.path().join("overlay/link.yaml")).unwrap();
        let error = check(tree.path(), "overlay").unwrap_err();
        assert!(error.contains("symbolic link"), "{error}");
    }
}
