//! .dockerignore as moby reads it (`patternmatcher` and its `ignorefile`), accidents included.
//!
//! Patterns are anchored at the root of the context, `**` crosses folders, `!` takes back, the last match wins. A folder's
//! verdict is handed down to what is in it. Paths are bytes, separated by `/`. Pure; tests compare with the Go module.

mod pattern;

use std::fmt;

use pattern::Pattern;

/// A longer file is no list of patterns; also what Go's reader takes of one line.
pub const BYTES_MAX: usize = 256 * 1024;
const LINE_BYTES_MAX: usize = 64 * 1024;

/// The rules of one file, in its order.
#[derive(Debug, Default)]
pub struct Ignore {
    rules: Vec<Rule>,
}

#[derive(Debug)]
struct Rule {
    /// Line of the file, from 1.
    line: usize,
    /// The pattern stood behind a `!`.
    takes_back: bool,
    pattern: Pattern,
}

/// Which rules matched a folder: what is inside it inherits them.
#[derive(Debug, Clone, Default)]
pub struct Matched(Vec<bool>);

/// A line that Docker would refuse too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadPattern {
    pub line: usize,
    pub problem: String,
}

impl fmt::Display for BadPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.problem)
    }
}

impl Ignore {
    /// Reads the file's bytes.
    pub fn parse(text: &[u8]) -> Result<Self, BadPattern> {
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        let mut rules = Vec::new();
        for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let bad = |problem: &str| BadPattern {
                line: index + 1,
                problem: problem.to_owned(),
            };
            if line.len() >= LINE_BYTES_MAX {
                return Err(bad("the line is too long"));
            }
            let Some(text) = normalised(line) else {
                continue;
            };
            let (takes_back, text) = match text.split_first() {
                Some((b'!', [])) => return Err(bad("`!` takes back nothing")),
                Some((b'!', rest)) => (true, rest),
                _ => (false, text.as_slice()),
            };
            if !pattern::is_well_formed(text) {
                return Err(bad(&format!(
                    "{:?} is not a pattern",
                    String::from_utf8_lossy(text)
                )));
            }
            rules.push(Rule {
                line: index + 1,
                takes_back,
                pattern: Pattern::new(text),
            });
        }
        Ok(Self { rules })
    }

    /// Whether the path is left out, and which rules said so. `above` is its folder's answer (default at the root).
    pub fn judge(&self, path: &[u8], above: &Matched) -> Result<(bool, Matched), BadPattern> {
        let mut left_out = false;
        let mut matched = Vec::with_capacity(self.rules.len());
        for (index, rule) in self.rules.iter().enumerate() {
            let inherited = above.0.get(index).copied().unwrap_or(false);
            // A rule that could change nothing is not asked: what it would have said is not handed down either.
            let hit = inherited
                || (rule.takes_back == left_out
                    && rule
                        .pattern
                        .matches(path)
                        .map_err(|problem| rule.bad(problem))?);
            matched.push(hit);
            if hit {
                left_out = !rule.takes_back;
            }
        }
        Ok((left_out, Matched(matched)))
    }

    /// Whether something below a folder that is left out could be taken back: else it need not be read at all.
    pub fn may_take_back_below(&self, folder: &[u8]) -> bool {
        self.rules
            .iter()
            .filter(|rule| rule.takes_back)
            .any(|rule| match rule.pattern.literal() {
                None => true,
                Some(path) => path
                    .strip_prefix(folder)
                    .is_some_and(|rest| rest.starts_with(b"/")),
            })
    }
}

impl Rule {
    fn bad(&self, problem: &str) -> BadPattern {
        BadPattern {
            line: self.line,
            problem: format!("the pattern cannot be used: {problem}"),
        }
    }
}

/// The cleaned pattern of a line, its `!` kept; None for comments and empty lines.
fn normalised(line: &[u8]) -> Option<Vec<u8>> {
    if line.starts_with(b"#") {
        return None;
    }
    let line = trim(line);
    let (bang, body): (&[u8], _) = match line.strip_prefix(b"!") {
        Some(body) => (b"!", trim(body)),
        None => (b"", line),
    };
    if line.is_empty() {
        return None;
    }
    let mut body = if body.is_empty() {
        Vec::new()
    } else {
        clean(body)
    };
    if body.len() > 1 && body.starts_with(b"/") {
        body.remove(0);
    }
    let whole = [bang, &body].concat();
    let whole = trim(&whole);
    (!whole.is_empty()).then(|| clean(whole))
}

/// The shortest path that means the same, as Go's `filepath.Clean`.
fn clean(path: &[u8]) -> Vec<u8> {
    let rooted = path.starts_with(b"/");
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => match parts.last() {
                Some(last) if *last != b".." => drop(parts.pop()),
                _ if rooted => {}
                _ => parts.push(part),
            },
            _ => parts.push(part),
        }
    }
    let joined = parts.join(&b'/');
    match (rooted, joined.is_empty()) {
        (true, _) => [b"/", joined.as_slice()].concat(),
        (false, true) => b".".to_vec(),
        (false, false) => joined,
    }
}

/// Without Unicode's white space at both ends; bytes that are no UTF-8 are no space.
fn trim(mut bytes: &[u8]) -> &[u8] {
    while let Some((first, length)) = decode(bytes) {
        if !first.is_whitespace() {
            break;
        }
        bytes = bytes.get(length..).unwrap_or_default();
    }
    'end: loop {
        for length in 1..=bytes.len().min(4) {
            let (rest, last) = bytes.split_at(bytes.len() - length);
            if std::str::from_utf8(last).is_ok_and(|last| last.chars().all(char::is_whitespace)) {
                bytes = rest;
                continue 'end;
            }
        }
        return bytes;
    }
}

/// The first character and its length; a byte that begins none is U+FFFD, as in Go.
fn decode(bytes: &[u8]) -> Option<(char, usize)> {
    for length in 1..=bytes.len().min(4) {
        let valid = bytes
            .get(..length)
            .and_then(|head| std::str::from_utf8(head).ok());
        if let Some(first) = valid.and_then(|head| head.chars().next()) {
            return Some((first, length));
        }
    }
    (!bytes.is_empty()).then_some((char::REPLACEMENT_CHARACTER, 1))
}

/// All characters of some bytes, decoded as `decode` does.
fn characters(mut bytes: &[u8]) -> Vec<char> {
    let mut all = Vec::with_capacity(bytes.len());
    while let Some((first, length)) = decode(bytes) {
        all.push(first);
        bytes = bytes.get(length..).unwrap_or_default();
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left_out(rules: &str, path: &str) -> bool {
        let ignore = Ignore::parse(rules.as_bytes()).unwrap();
        let mut matched = Matched::default();
        let mut out = false;
        for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
            (out, matched) = ignore.judge(&path.as_bytes()[..end], &matched).unwrap();
        }
        out
    }

    #[test]
    fn patterns_are_anchored_at_the_root() {
        assert!(left_out("target", "target/debug/x"));
        assert!(!left_out("target", "app/target"));
        assert!(left_out("**/target", "app/target"));
        assert!(left_out("/target/", "target"));
    }

    #[test]
    fn what_is_below_a_folder_that_is_left_out_can_be_taken_back() {
        let rules = "# all but the app\n*\n!app/src\n";
        assert!(left_out(rules, "agent/src/lib.rs"));
        assert!(left_out(rules, "app/Cargo.toml"));
        assert!(!left_out(rules, "app/src/main.rs"));
    }

    #[test]
    fn the_last_match_wins() {
        assert!(left_out("*.md\n!README.md\nREADME*", "README.md"));
        assert!(!left_out("README*\n*.md\n!README.md", "README.md"));
    }

    #[test]
    fn a_bad_line_is_named() {
        assert_eq!(Ignore::parse(b"ok\n\n[").unwrap_err().line, 3);
        assert_eq!(Ignore::parse(b"ok\n!").unwrap_err().line, 2);
    }
}
