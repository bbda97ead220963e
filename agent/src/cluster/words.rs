//! The words of others: events of Kubernetes and the last lines of programs, as far as our sentences repeat them.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;

const WORDS_CHARS_MAX: usize = 300;

/// Of an error in connecting the network's own words, without what each layer between adds; any other as it is.
pub fn of_the_network(error: anyhow::Error) -> anyhow::Error {
    let mut layers = error.chain();
    if !layers.any(|layer| layer.to_string().contains("(Connect)")) {
        return error;
    }
    match error.root_cause().to_string().as_str() {
        // Tokio's own, of its clock.
        "deadline has elapsed" => anyhow::anyhow!("no connection in time"),
        told => anyhow::anyhow!("{told}"),
    }
}

pub(super) fn is_about(event: &Event, container: &str) -> bool {
    let path = event
        .involved_object
        .field_path
        .as_deref()
        .unwrap_or_default();
    path.is_empty() || path.ends_with(&format!("{{{container}}}"))
}

pub fn message(event: &Event) -> &str {
    event.message.as_deref().unwrap_or_default()
}

/// When it was last counted; None where the event names no time.
pub fn last_seen(event: &Event) -> Option<Timestamp> {
    let series = event
        .series
        .as_ref()
        .and_then(|series| series.last_observed_time.as_ref())
        .map(|time| time.0);
    let last = event.last_timestamp.as_ref().map(|time| time.0);
    let first = event.event_time.as_ref().map(|time| time.0);
    let made = event
        .metadata
        .creation_timestamp
        .as_ref()
        .map(|time| time.0);
    series.max(last).or(first).or(made)
}

/// The line of a program's last words that tells most. It need not be the last: stdout and stderr overtake each other,
/// and a trace or a shell's "Killed" may follow.
pub fn last_line(words: &str) -> Option<String> {
    const LOUD: [&str; 3] = ["fatal", "panic", "uncaught"];
    const CLEAR: [&str; 8] = [
        "error",
        "exception",
        "cannot",
        "could not",
        "failed",
        "denied",
        "missing",
        "not found",
    ];
    let lines: Vec<&str> = words
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    let with = |marks: &[&str]| {
        lines.iter().rposition(|line| {
            let line = line.to_lowercase();
            marks.iter().any(|mark| line.contains(mark))
        })
    };
    let at = with(&LOUD)
        .or_else(|| with(&CLEAR))
        .or(lines.len().checked_sub(1))?;
    let line = lines.get(at)?;
    // A Rust panic says where first, and what on the next line.
    let goes_on = line.ends_with(':').then(|| lines.get(at + 1)).flatten();
    Some(shortened(&goes_on.map_or_else(
        || (*line).to_owned(),
        |next| format!("{line} {next}"),
    )))
}

/// One line of bounded length: messages of others end up in our sentences.
pub fn shortened(text: &str) -> String {
    let line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(WORDS_CHARS_MAX + 1)
        .collect();
    let line = line.trim().trim_end_matches('.');
    match line.char_indices().nth(WORDS_CHARS_MAX) {
        Some((cut, _)) => format!("{}…", line.get(..cut).unwrap_or(line)),
        None => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_telling_line_is_told() {
        for (words, line) in [
            (
                "fatal: DATABASE_URL is not set\nstarting\n",
                "fatal: DATABASE_URL is not set",
            ),
            ("listening\nbye\n\n", "bye"),
            (
                "Traceback (most recent call last):\n  File \"a.py\"\nValueError: bad port",
                "ValueError: bad port",
            ),
            (
                "thread 'main' (7) panicked at src/main.rs:5:1:\nno port\nnote: run with RUST_BACKTRACE=1",
                "thread 'main' (7) panicked at src/main.rs:5:1: no port",
            ),
            (
                "panic: nil map\n\ngoroutine 1 [running]:\nmain.main()\n\t/a/main.go:5 +0x1",
                "panic: nil map",
            ),
            ("panicked\nKilled", "panicked"),
        ] {
            assert_eq!(last_line(words).unwrap(), line);
        }
        assert_eq!(last_line(" \n\n"), None);
        assert!(shortened(&"é\u{7}".repeat(1000)).chars().count() <= WORDS_CHARS_MAX + 1);
    }
}
