//! What a terminal would show of one log line: text in spans with classes.
//!
//! The line: `bytes → cells → spans`. Knows the 16 colours, bold, dim, italic, underline, carriage return and "erase
//! line"; every other escape is dropped. Each line stands for itself, so that a page may begin with any of them.
//! Never writes markup: whoever shows a span escapes its text.

use std::iter::Peekable;
use std::str::Chars;

use serde::Serialize;

/// A run of characters that look the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Span {
    /// Any of `f0`…`f15` (text), `g0`…`g15` (ground), `b`, `d`, `i`, `u`, separated by spaces; often empty.
    pub class: String,
    pub text: String,
}

/// Whether a line needs `spans` at all, or shows as it is.
pub fn is_plain(line: &str) -> bool {
    !line.chars().any(|c| c.is_control() && c != '\t')
}

/// The last state of a line that a program may have overwritten.
pub fn spans(line: &str) -> Vec<Span> {
    let mut screen = Screen::default();
    let mut rest = line.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '\x1b' => escape(&mut rest, &mut screen),
            '\u{9b}' => control_sequence(&mut rest, &mut screen),
            '\r' => screen.cursor = 0,
            '\x08' => screen.cursor = screen.cursor.saturating_sub(1),
            c if c.is_control() && c != '\t' => {}
            c => screen.put(c),
        }
    }
    screen.spans()
}

#[derive(Default)]
struct Screen {
    cells: Vec<(char, Style)>,
    cursor: usize,
    style: Style,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Style {
    text: Option<u8>,
    ground: Option<u8>,
    bold: bool,
    dim: bool,
    italic: bool,
    underline: bool,
}

impl Screen {
    fn put(&mut self, c: char) {
        let cell = (c, self.style);
        match self.cells.get_mut(self.cursor) {
            Some(old) => *old = cell,
            None => self.cells.push(cell),
        }
        self.cursor += 1;
    }

    fn erase(&mut self, parameters: &str) {
        let blank = (' ', Style::default());
        match parameters {
            "" | "0" => self.cells.truncate(self.cursor),
            "1" => self
                .cells
                .iter_mut()
                .take(self.cursor + 1)
                .for_each(|cell| *cell = blank),
            "2" => {
                self.cells.clear();
                self.cells.resize(self.cursor, blank);
            }
            _ => {}
        }
    }

    fn spans(self) -> Vec<Span> {
        let mut spans: Vec<Span> = Vec::new();
        let mut last = None;
        for (c, style) in self.cells {
            match spans.last_mut().filter(|_| last == Some(style)) {
                Some(span) => span.text.push(c),
                None => spans.push(Span {
                    class: style.class(),
                    text: c.to_string(),
                }),
            }
            last = Some(style);
        }
        spans
    }
}

impl Style {
    fn class(self) -> String {
        let text = self.text.map(|colour| format!("f{colour}"));
        let ground = self.ground.map(|colour| format!("g{colour}"));
        let flags = [
            (self.bold, "b"),
            (self.dim, "d"),
            (self.italic, "i"),
            (self.underline, "u"),
        ];
        let flags = flags
            .into_iter()
            .filter(|(is_set, _)| *is_set)
            .map(|(_, name)| name.to_owned());
        text.into_iter()
            .chain(ground)
            .chain(flags)
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Select Graphic Rendition: the numbers between `ESC [` and `m`.
    fn select(&mut self, parameters: &str) {
        let mut codes = parameters
            .split([';', ':'])
            .map(|code| code.parse::<u16>().unwrap_or(0));
        while let Some(code) = codes.next() {
            match code {
                0 => *self = Self::default(),
                1 => self.bold = true,
                2 => self.dim = true,
                3 => self.italic = true,
                4 => self.underline = true,
                22 => (self.bold, self.dim) = (false, false),
                23 => self.italic = false,
                24 => self.underline = false,
                30..=37 => self.text = colour(code - 30),
                38 => self.text = extended_colour(&mut codes),
                39 => self.text = None,
                40..=47 => self.ground = colour(code - 40),
                48 => self.ground = extended_colour(&mut codes),
                49 => self.ground = None,
                90..=97 => self.text = colour(code - 90 + 8),
                100..=107 => self.ground = colour(code - 100 + 8),
                _ => {}
            }
        }
    }
}

fn colour(code: u16) -> Option<u8> {
    u8::try_from(code).ok()
}

/// `5;N` or `2;R;G;B` as the nearest of the 16, so that a page stays readable on dark and light ground.
fn extended_colour(codes: &mut impl Iterator<Item = u16>) -> Option<u8> {
    let (red, green, blue) = match codes.next()? {
        5 => match codes.next()? {
            code @ 0..16 => return colour(code),
            code @ 16..232 => {
                let cube = code - 16;
                (cube / 36 * 51, cube / 6 % 6 * 51, cube % 6 * 51)
            }
            code => {
                let gray = code.min(255).saturating_sub(232) * 10 + 8;
                (gray, gray, gray)
            }
        },
        2 => (codes.next()?, codes.next()?, codes.next()?),
        _ => return None,
    };
    let strongest = red.max(green).max(blue);
    let bit = |part: u16, value: u16| {
        if strongest > 40 && part * 2 > strongest {
            value
        } else {
            0
        }
    };
    let bright = if strongest > 190 { 8 } else { 0 };
    colour(bit(red, 1) + bit(green, 2) + bit(blue, 4) + bright)
}

fn escape(rest: &mut Peekable<Chars<'_>>, screen: &mut Screen) {
    match rest.peek() {
        Some('[') => {
            rest.next();
            control_sequence(rest, screen);
        }
        // Titles, hyperlinks and the like: a text of their own, up to BEL or ESC \.
        Some(']' | 'P' | 'X' | '^' | '_') => {
            while let Some(c) = rest.next() {
                if c == '\x07' || c == '\u{9c}' || (c == '\x1b' && rest.next_if_eq(&'\\').is_some())
                {
                    return;
                }
            }
        }
        _ => {
            while rest.next_if(|c| (' '..='/').contains(c)).is_some() {}
            rest.next_if(|c| ('0'..='~').contains(c));
        }
    }
}

fn control_sequence(rest: &mut Peekable<Chars<'_>>, screen: &mut Screen) {
    let mut parameters = String::new();
    while let Some(c) = rest.next_if(|c| ('0'..='?').contains(c)) {
        parameters.push(c);
    }
    while rest.next_if(|c| (' '..='/').contains(c)).is_some() {}
    match rest.next_if(|c| ('@'..='~').contains(c)) {
        Some('m') if !parameters.starts_with(['<', '=', '>', '?']) => {
            screen.style.select(&parameters);
        }
        Some('K') => screen.erase(&parameters),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expected: &[(&str, &str)]) {
        let seen = spans(line);
        let seen: Vec<(&str, &str)> = seen
            .iter()
            .map(|span| (span.class.as_str(), span.text.as_str()))
            .collect();
        assert_eq!(seen, expected, "{line:?}");
    }

    #[test]
    fn colours_and_bold_become_classes() {
        check(
            "\x1b[1;31merror\x1b[0m: \x1b[4mno\x1b[24m",
            &[("f1 b", "error"), ("", ": "), ("u", "no")],
        );
        check(
            "\x1b[92;41mok\x1b[39;49m \x1b[mend",
            &[("f10 g1", "ok"), ("", " end")],
        );
    }

    #[test]
    fn many_colours_become_the_nearest_of_sixteen() {
        check("\x1b[38;5;9ma", &[("f9", "a")]);
        check(
            "\x1b[38;2;250;20;20ma\x1b[38;2;0;0;0;1mb",
            &[("f9", "a"), ("f0 b", "b")],
        );
        check(
            "\x1b[38;5;244mgray\x1b[48;5;21mblue",
            &[("f7", "gray"), ("f7 g12", "blue")],
        );
        check(
            "\x1b[38;5mx\x1b[38mx\x1b[38;9;1mx",
            &[("", "xx"), ("b", "x")],
        );
    }

    #[test]
    fn a_progress_line_shows_its_last_state() {
        check("10%\r50%\r100%\r\n", &[("", "100%")]);
        check("downloading\r\x1b[Kdone", &[("", "done")]);
        check("downloading\x1b[2K\rdone", &[("", "done       ")]);
        check("abc\x08\x08X", &[("", "aXc")]);
    }

    #[test]
    fn other_escapes_are_dropped_and_text_is_kept() {
        check(
            "\x1b]0;title\x07a\x1b]8;;https://x\x1b\\link\x1b]8;;\x1b\\b",
            &[("", "alinkb")],
        );
        check(
            "\x1b[2J\x1b[?25l\x1b[10;4Ha\x1b(Bb\x1bMc\0\x07d\x7f",
            &[("", "abcd")],
        );
        check("\u{9b}31mred", &[("f1", "red")]);
        check("\x1b", &[]);
        check("\x1b[", &[]);
        check("\x1b[31", &[]);
        check("\x1b]never ends", &[]);
        check("\x1b[99999999999999mx", &[("", "x")]);
        check("<b>\t&", &[("", "<b>\t&")]);
    }

    #[test]
    fn classes_come_from_a_closed_list() {
        let mut seed = 1_u64;
        for _ in 0..2_000 {
            let line: String = (0..60)
                .map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let pick = usize::try_from(seed >> 33).unwrap_or(0);
                    *[
                        '\x1b', '[', 'm', ';', '3', '8', '5', '1', 'K', '\r', '<', 'é', ']',
                        '\x07', '\u{9b}',
                    ]
                    .get(pick % 15)
                    .unwrap()
                })
                .collect();
            for span in spans(&line) {
                assert!(
                    !span.text.contains(|c: char| c.is_control() && c != '\t'),
                    "{line:?}"
                );
                assert!(
                    span.class
                        .split_whitespace()
                        .all(|name| ["b", "d", "i", "u"].contains(&name)
                            || name[1..].parse::<u8>().is_ok_and(|n| n < 16)
                                && name.starts_with(['f', 'g'])),
                    "{:?}",
                    span.class
                );
            }
        }
    }

    #[test]
    fn plain_lines_need_no_spans() {
        assert!(is_plain("as it is, é\t"));
        assert!(!is_plain("\x1b[1mbold") && !is_plain("a\rb") && !is_plain("\u{9b}"));
    }
}
