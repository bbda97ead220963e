//! What `doctor` and `validate` find: a line each, with its fix, and the exit code that follows.

use std::fmt::Write;

use serde::Serialize;
use serde_json::json;

use super::terminal;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    Ok,
    Warn,
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    pub level: Level,
    /// What was looked at: `docker`, `hello: registry`, `pipeline.yaml`.
    pub check: String,
    pub says: String,
    /// What to do, where something is to be done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Finding {
    pub fn ok(check: impl Into<String>, says: impl Into<String>) -> Self {
        Self {
            level: Level::Ok,
            check: check.into(),
            says: says.into(),
            fix: None,
        }
    }

    pub fn warn(check: impl Into<String>, says: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            level: Level::Warn,
            check: check.into(),
            says: says.into(),
            fix: Some(fix.into()),
        }
    }

    pub fn fail(check: impl Into<String>, says: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            level: Level::Fail,
            check: check.into(),
            says: says.into(),
            fix: Some(fix.into()),
        }
    }
}

pub fn any_failed(findings: &[Finding]) -> bool {
    findings.iter().any(|finding| finding.level == Level::Fail)
}

pub fn print(findings: &[Finding], is_json: bool) -> anyhow::Result<()> {
    if is_json {
        return terminal::print_json(&json!({ "ok": !any_failed(findings), "findings": findings }));
    }
    Ok(terminal::print(&lines(findings, terminal::colors()))?)
}

fn lines(findings: &[Finding], is_colored: bool) -> String {
    let width = findings
        .iter()
        .map(|finding| finding.check.chars().count())
        .max()
        .unwrap_or(0);
    let indent = " ".repeat(width + 8);
    let mut text = String::new();
    for finding in findings {
        let (word, color) = match finding.level {
            Level::Ok => ("ok  ", 32),
            Level::Warn => ("warn", 33),
            Level::Fail => ("FAIL", 31),
        };
        let word = if is_colored {
            format!("\x1b[{color}m{word}\x1b[0m")
        } else {
            word.to_owned()
        };
        let says = clean(&finding.says).replace('\n', &format!("\n{indent}"));
        let _ = writeln!(text, "{word}  {:width$}  {says}", finding.check);
        if let Some(fix) = &finding.fix {
            let _ = writeln!(
                text,
                "{indent}fix: {}",
                clean(fix).replace('\n', &format!("\n{indent}     "))
            );
        }
    }
    text
}

/// Names and errors come from outside.
fn clean(text: &str) -> String {
    terminal::Cleaner::new(false).clean(text.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_aligned_and_fit_for_a_terminal() {
        let findings = [
            Finding::ok("docker", "24.0.7"),
            Finding::warn("github", "no \x1b[2Jtoken", "set one"),
            Finding::fail("pipeline.yaml", "line\n  ^", "mend it"),
        ];
        let expected = "ok    docker         24.0.7\nwarn  github         no token\n                     fix: set one\n\
                        FAIL  pipeline.yaml  line\n                       ^\n                     fix: mend it\n";
        assert_eq!(lines(&findings, false), expected);
        assert!(any_failed(&findings) && !any_failed(&findings[..2]));
    }
}
