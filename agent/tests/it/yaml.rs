//! Our reading of YAML against kubectl's: the Go module sigs.k8s.io/yaml, run by `go run` in `tests/oracle/yaml`.

use std::io::Write;
use std::process::{Command, Stdio};

use landfall::manifests::yaml::{self, Budget};
use serde_json::Value;

/// What the Go module makes of each text.
fn oracle(texts: &[String]) -> Vec<Result<Value, String>> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/oracle/yaml");
    let mut child = Command::new("go")
        .args(["run", "-mod=readonly", "."])
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this test needs Go: it compares with the module that kubectl uses");
    let mut stdin = child.stdin.take().unwrap();
    stdin
        .write_all(serde_json::to_string(texts).unwrap().as_bytes())
        .unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "the oracle ended with {}",
        output.status
    );
    let answers: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    answers
        .into_iter()
        .map(
            |answer| match answer["error"].as_str().unwrap_or_default() {
                "" => Ok(answer["json"].clone()),
                error => Err(error.to_owned()),
            },
        )
        .collect()
}

fn ours(text: &str) -> Result<Value, String> {
    let mut documents =
        yaml::documents(text, &mut Budget::default()).map_err(|problem| problem.message)?;
    match documents.len() {
        0 => Ok(Value::Null),
        1 => Ok(documents.remove(0).value),
        more => Err(format!("{more} documents")),
    }
}

/// Plain scalars whose meaning differs between YAML 1.1, 1.2 and what people expect.
const SCALARS: &str = "y Y yes Yes YES yEs n N no No NO on On ON off OFF oFF true True TRUE tRue false False ~ null Null NULL nUll \
0 00 -0 +0 0644 -0644 +0644 0888 08 0o644 0O17 0o7_7 0x1F 0X1f -0x1F 0x 0xZ 0b11 0B1 -0b11 0b12 1_000 _1 1_ 0_7 1__2 +12 --1 +-1 - + \
1e3 1E3 1e+3 1e-3 1. .5 -.5 +.5 .5e3 .5E+3 . .. .1_0 1_2.5 0.1 1.0 -1.0 -0.0 1.5 1.10 1e400 -1e400 1e21 1e20 123456789.0 \
18446744073709551615 18446744073709551616 9223372036854775807 9223372036854775808 -9223372036854775808 -9223372036854775809 \
+18446744073709551615 123456789012345678901234567890 07777777777777777777777 1234567890123456789.0 0.30000000000000004 \
12:30:45 190:20:30 2001-01-01 2001-01-01T00:00:00Z 1.2.3 1-2 5m 100m 128Mi 1e 1e+ e3 0e0 infinity nan NaN inf Inf <<x =x \
!!str_5 a#b a:b @x `x %x *x !x";

/// Whole documents.
const DOCUMENTS: [&str; 52] = [
    "",
    "---\n",
    "# only\n",
    "5",
    "- 1\n- yes\n",
    "a:",
    "yes: 1",
    "\"yes\": 1",
    "!!str yes: 1",
    "1: a",
    "-1: a",
    "0644: a",
    "1.5: a",
    "1.0: a",
    "1e3: x",
    "1.0e+30: x",
    "123456789.0: x",
    "0.00001: x",
    "0.0001: x",
    "1000000.0: x",
    "999999.0: x",
    ".inf: x",
    "-.inf: x",
    ".nan: x",
    "~: a",
    "? [a]\n: b",
    "18446744073709551615: x",
    "2001-01-01: x",
    "a: .inf",
    "a: .nan",
    "a: !!str 5",
    "a: !!int '5'",
    "a: !!int five",
    "a: !!float 1",
    "a: !!float 'x'",
    "a: !!bool 'yes'",
    "a: !!null ''",
    "a: !!binary aGVsbG8=",
    "a: !foo 5",
    "a: ! 5",
    "b: &b {a: 1}\nc: {<<: *b, a: 2}",
    "b: &b {a: 1}\nc: {a: 2, <<: *b}",
    "b: &b {a: 1, c: 1}\nz: &d {a: 5, d: 1}\ng: {<<: [*b, *d], e: 2}",
    "<<: 1",
    "b: &b [1, {x: on}]\nc: *b\nd: *b",
    "a: \"yes\"\nb: '0644'\nc: |\n  yes\nd: >-\n  f\n  g\ne: |+\n  x\n\n",
    "a: \"\\x41\\u00e9\\t\\e\"\nb: 'it''s'\nc: \"x\\\n  y\"\nd: 'x\n  y'\n",
    "a: {b: [1, yes, '2'], c: {d: }}",
    "a: {b:1}\nc: [a:1]\nd: [b,c,]",
    "a: b # c\nd:\t1\n",
    "\u{feff}a: 1",
    "%YAML 1.1\n---\na: 0644\n",
];

/// Where both must find an error.
const BROKEN: [&str; 12] = [
    "a: [1, 2",
    "a: b: c",
    "a: *x",
    "a: - b",
    "a: \n\t- b",
    "- a\n-b",
    "a: @b",
    "a: `b`",
    "a: %b",
    "a: \0",
    "{a: 1",
    "a: 'x",
];

#[test]
fn yaml_means_what_it_means_to_kubectl() {
    let scalars = SCALARS
        .split_whitespace()
        .map(|scalar| format!("a: {scalar}\n"));
    let quoted = SCALARS
        .split_whitespace()
        .map(|scalar| format!("a: \"{scalar}\"\n"));
    let keys = SCALARS
        .split_whitespace()
        .map(|scalar| format!("{scalar}: a\n"));
    let documents = DOCUMENTS.iter().map(ToString::to_string);
    let texts: Vec<String> = scalars.chain(quoted).chain(keys).chain(documents).collect();
    let mut different = Vec::new();
    for (text, theirs) in texts.iter().zip(oracle(&texts)) {
        let ours = ours(text);
        match (&ours, &theirs) {
            (Ok(ours), Ok(theirs)) if ours == theirs => {}
            (Err(_), Err(_)) => {}
            _ => different.push(format!("{text:?}: ours {ours:?}, kubectl's {theirs:?}")),
        }
    }
    assert!(
        different.is_empty(),
        "{} of {}:\n{}",
        different.len(),
        texts.len(),
        different.join("\n")
    );
    assert!(texts.len() > 300, "{}", texts.len());
}

/// YAML 1.2 that kubectl refuses: read here, and meaning what it looks like.
#[test]
fn where_we_read_more_than_kubectl_it_means_what_it_says() {
    let texts = ["\ta: 1", "%YAML 1.2\n---\na: 1\n", "a: 1\n# \\/\n"];
    for text in texts {
        assert_eq!(ours(text).unwrap(), serde_json::json!({"a": 1}), "{text:?}");
    }
    assert_eq!(ours("a: \"\\/\"").unwrap(), serde_json::json!({"a": "/"}));
}

#[test]
fn what_kubectl_cannot_read_we_cannot_read_either() {
    let texts: Vec<String> = BROKEN.iter().map(ToString::to_string).collect();
    for (text, theirs) in texts.iter().zip(oracle(&texts)) {
        assert!(theirs.is_err(), "kubectl reads {text:?}");
        assert!(ours(text).is_err(), "we read {text:?} as {:?}", ours(text));
    }
}
