//! What is wrong with a YAML file, where, and what was meant: the report that `landfall validate` and a build print.
//!
//! Wraps the typed reading of serde-saphyr; `yaml.rs` uses its parser for manifests. Pure: no IO.

use std::fmt;

use serde::de::DeserializeOwned;

/// A problem in a file, ready to be shown: first line `FILE:LINE:COLUMN: problem`, then the snippet with a caret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    pub path: String,
    /// Line and column, both from 1, where they are known.
    pub position: Option<(usize, usize)>,
    pub problem: String,
    /// The line of the file, for the caret.
    snippet: Option<String>,
}

impl std::error::Error for Diagnostic {}

impl Diagnostic {
    pub fn plain(path: &str, problem: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            position: None,
            problem: problem.into(),
            snippet: None,
        }
    }

    pub fn at(
        path: &str,
        text: &str,
        (line, column): (usize, usize),
        problem: impl Into<String>,
    ) -> Self {
        let snippet = text
            .lines()
            .nth(line.saturating_sub(1))
            .map(|line| line.chars().take(200).collect());
        Self {
            path: path.to_owned(),
            position: Some((line, column)),
            problem: problem.into(),
            snippet,
        }
    }

    /// For a file that may hold secrets: neither its line nor a value is shown.
    #[must_use]
    pub fn without_values(mut self) -> Self {
        self.snippet = None;
        self.problem = self
            .problem
            .split('"')
            .enumerate()
            .map(|(index, part)| if index % 2 == 0 { part } else { "\"…\"" })
            .collect();
        self
    }

    /// Points at the first line of the text whose key this is.
    pub fn at_key(path: &str, text: &str, key: &str, problem: impl Into<String>) -> Self {
        let found = text.lines().enumerate().find_map(|(index, line)| {
            let indent = line.len() - line.trim_start_matches([' ', '-']).len();
            line.get(indent..)?
                .strip_prefix(key)?
                .starts_with(':')
                .then_some((index + 1, indent + 1))
        });
        match found {
            Some(position) => Self::at(path, text, position, problem),
            None => Self::plain(path, problem),
        }
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            path,
            position,
            problem,
            snippet,
        } = self;
        let Some((line, column)) = position else {
            return write!(f, "{path}: {problem}");
        };
        write!(f, "{path}:{line}:{column}: {problem}")?;
        if let Some(snippet) = snippet {
            let margin = line.to_string().len();
            write!(
                f,
                "\n{:margin$} |\n{line} | {snippet}\n{:margin$} | {:>column$}",
                "", "", "^"
            )?;
        }
        Ok(())
    }
}

/// Reads YAML with serde-saphyr (budgets against bombs, positions) and names what was meant where a key is misspelt.
pub fn parse_yaml<T: DeserializeOwned>(path: &str, text: &str) -> Result<T, Diagnostic> {
    serde_saphyr::from_str(text).map_err(|error| {
        let location = error
            .location()
            .map(|at| (at.line() as usize, at.column() as usize));
        let problem = first_line(&error.without_snippet().to_string());
        let problem = with_suggestion(problem);
        match location {
            Some(position) => Diagnostic::at(path, text, position, problem),
            None => Diagnostic::plain(path, problem),
        }
    })
}

fn first_line(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    let line = line.strip_prefix("error: ").unwrap_or(line);
    // The position stands before the problem and is shown by us.
    match line.split_once(": ") {
        Some((position, rest)) if position.starts_with("line ") => rest.to_owned(),
        _ => line.to_owned(),
    }
}

/// `unknown field `timout`, expected one of name, timeout` gains `; did you mean `timeout`?`.
fn with_suggestion(problem: String) -> String {
    let Some((unknown, expected)) = problem
        .strip_prefix("unknown field `")
        .and_then(|rest| rest.split_once("`, expected "))
    else {
        return problem;
    };
    let best = expected
        .trim_start_matches("one of ")
        .split([',', ' '])
        .map(|word| word.trim_matches('`'))
        .filter(|word| !word.is_empty() && *word != "or")
        .map(|word| (strsim::damerau_levenshtein(unknown, word), word))
        .min();
    match best {
        Some((distance, word)) if distance <= 3 && distance < word.len() => {
            format!("{problem}; did you mean `{word}`?")
        }
        _ => problem,
    }
}
