//! What a terminal may be sent, and who hears what: data on stdout, talk on stderr.
//!
//! The line: text of a log → `Cleaner` → stdout. Colours pass where there is a terminal that wants them; no other
//! escape ever does, for a log is written by whoever can push. A closed pipe is an error here and never a panic.

use std::io::{self, IsTerminal, Write};

use crate::builds::Status;
use crate::config;

/// A longer escape is none.
const ESCAPE_BYTES_MAX: usize = 64;

/// Says something to the person, on stderr; whether anybody hears it does not matter.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($text)*);
    }};
}
pub(super) use say;

/// Whether a person looks at stdout and wants colours.
pub fn colors() -> bool {
    io::stdout().is_terminal() && !config::no_color()
}

/// Writes data, at once.
pub fn print(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Writes a JSON document.
pub fn print_json(value: &serde_json::Value) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    Ok(print(&format!("{text}\n"))?)
}

/// A word with the colour of a status.
pub fn painted(status: Status, width: usize) -> String {
    let color = match status {
        Status::Passed => 32,
        Status::Failed | Status::Errored => 31,
        Status::Running | Status::Queued => 33,
        Status::Canceled | Status::Superseded | Status::Skipped => 2,
    };
    match colors() {
        true => format!("\x1b[{color}m{status:width$}\x1b[0m"),
        false => format!("{status:width$}"),
    }
}

/// One line of somebody else's text, without anything but characters that show.
pub fn plain(text: &str) -> String {
    let mut cleaner = Cleaner::new(false);
    let clean = cleaner.clean(text);
    clean.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Makes a log fit for a terminal, piece by piece.
pub struct Cleaner {
    colors: bool,
    state: State,
    /// Parameters of the escape that is being read.
    escape: String,
    /// A colour is on, and must not outlive its line.
    is_painted: bool,
    /// The last character was a carriage return.
    is_returned: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Text,
    Escape,
    /// After `ESC [`.
    Sequence,
    /// A title, a link or the like: up to BEL or `ESC \`, and never over the end of the line.
    Words,
}

impl Cleaner {
    pub fn new(colors: bool) -> Self {
        Self {
            colors,
            state: State::Text,
            escape: String::new(),
            is_painted: false,
            is_returned: false,
        }
    }

    pub fn clean(&mut self, text: &str) -> String {
        let mut clean = String::with_capacity(text.len());
        for c in text.chars() {
            self.take(c, &mut clean);
        }
        clean
    }

    /// What is left to say when the log has ended.
    pub fn end(&mut self) -> &'static str {
        match std::mem::take(&mut self.is_painted) {
            true => "\x1b[0m",
            false => "",
        }
    }

    fn take(&mut self, c: char, clean: &mut String) {
        if c == '\n' {
            self.state = State::Text;
            clean.push_str(self.end());
            self.is_returned = false;
            return clean.push('\n');
        }
        match self.state {
            State::Text => self.text(c, clean),
            State::Escape => {
                self.state = match c {
                    '[' => State::Sequence,
                    ']' | 'P' | 'X' | '^' | '_' => State::Words,
                    ' '..='/' | '\x1b' => State::Escape,
                    _ => State::Text,
                };
            }
            State::Sequence if c == '\x1b' => self.begin(State::Escape),
            State::Sequence => self.sequence(c, clean),
            State::Words if c == '\x1b' => self.state = State::Escape,
            State::Words if matches!(c, '\x07' | '\u{9c}') => self.state = State::Text,
            State::Words => {}
        }
    }

    fn text(&mut self, c: char, clean: &mut String) {
        match c {
            '\x1b' => self.begin(State::Escape),
            '\u{9b}' => self.begin(State::Sequence),
            '\u{90}' | '\u{98}' | '\u{9d}' | '\u{9e}' | '\u{9f}' => self.begin(State::Words),
            // A progress bar that draws over itself becomes lines: nothing that was shown can be drawn over.
            '\r' => self.is_returned = true,
            c if (c.is_control() && c != '\t') || is_reordering(c) => {}
            c => {
                if std::mem::take(&mut self.is_returned) {
                    clean.push_str(self.end());
                    clean.push('\n');
                }
                clean.push(c);
            }
        }
    }

    fn begin(&mut self, state: State) {
        self.state = state;
        self.escape.clear();
    }

    fn sequence(&mut self, c: char, clean: &mut String) {
        match c {
            '@'..='~' => {
                if c == 'm' && self.colors && is_color(&self.escape) {
                    clean.push_str("\x1b[");
                    clean.push_str(&self.escape);
                    clean.push('m');
                    self.is_painted = !matches!(self.escape.as_str(), "" | "0");
                }
                self.state = State::Text;
            }
            ' '..='?' if self.escape.len() < ESCAPE_BYTES_MAX => self.escape.push(c),
            _ => self.state = State::Text,
        }
    }
}

/// Characters that make text read otherwise than it is written.
fn is_reordering(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Whether these parameters of SGR only paint: no blinking, no hiding.
fn is_color(parameters: &str) -> bool {
    let mut codes = parameters.split([';', ':']).map(|code| match code {
        "" => Some(0),
        code => code.parse::<u16>().ok(),
    });
    while let Some(code) = codes.next() {
        match code {
            Some(38 | 48) => {
                let colors = match codes.next() {
                    Some(Some(5)) => 1,
                    Some(Some(2)) => 3,
                    _ => return false,
                };
                if codes.by_ref().take(colors).flatten().count() != colors {
                    return false;
                }
            }
            Some(0..=4 | 7 | 22..=25 | 27 | 30..=37 | 39..=47 | 49 | 90..=97 | 100..=107) => {}
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &str) {
        let mut whole = Cleaner::new(true);
        let clean = whole.clean(text) + whole.end();
        assert_eq!(clean, expected, "{text:?}");
        let mut pieces = Cleaner::new(true);
        let clean: String = text.chars().map(|c| pieces.clean(&c.to_string())).collect();
        assert_eq!(clean + pieces.end(), expected, "in pieces: {text:?}");
    }

    #[test]
    fn colours_pass_and_end_with_their_line() {
        check("\x1b[1;31mred\x1b[0m\n", "\x1b[1;31mred\x1b[0m\n");
        check("\x1b[32mgreen\nplain\n", "\x1b[32mgreen\x1b[0m\nplain\n");
        check(
            "\x1b[38;5;9ma\x1b[48;2;1;2;3mb",
            "\x1b[38;5;9ma\x1b[48;2;1;2;3mb\x1b[0m",
        );
    }

    #[test]
    fn no_other_escape_reaches_a_terminal() {
        for escape in [
            "\x1b[2J",
            "\x1b[10;1H",
            "\x1b[1A",
            "\x1b[2K",
            "\x1b[?1049h",
            "\x1b]0;title\x07",
            "\x1b]52;c;aGk=\x1b\\",
            "\x1bP+q\x1b\\",
            "\x1b]8;;http://x\x1b\\",
            "\x1bc",
            "\x1b(0",
            "\x1b[5m",
            "\x1b[8m",
            "\x1b[38;5m",
            "\x1b[38;2;1;2m",
            "\x1b[99999m",
            "\x1b[>1m",
            "\u{9b}2J",
            "\u{9d}0;t\u{9c}",
            "\x07",
            "\x08",
            "\x7f",
            "\0",
            "\u{202e}",
            "\u{2066}",
            "\u{85}",
        ] {
            check(&format!("a{escape}b\n"), "ab\n");
        }
        check("a\x1b]never ends\nb\n", "a\nb\n");
        check(
            &format!("a\x1b[{}mb\n", "1;".repeat(60)),
            &format!("a{}mb\n", "1;".repeat(60).split_at(65).1),
        );
    }

    #[test]
    fn a_line_cannot_be_drawn_over() {
        check("10%\r50%\r100%\r\n", "10%\n50%\n100%\n");
        check("passed\r\r\rfailed", "passed\nfailed");
    }

    #[test]
    fn without_colours_only_text_is_left() {
        let mut cleaner = Cleaner::new(false);
        assert_eq!(cleaner.clean("\x1b[31mred\x1b[0m\tü\n"), "red\tü\n");
        assert_eq!(plain("a\n\tb \x1b[2Jc"), "a b c");
    }
}
