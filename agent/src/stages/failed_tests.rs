//! The names of the tests that failed, read from a test program's output as it passes by. Pure.

use std::fmt;

/// A longer line names no test.
const LINE_BYTES_MAX: usize = 4 * 1024;
/// More names do not fit in a sentence; the rest is counted.
const NAMES_MAX: usize = 5;

/// What cargo's test harness says: `test queue::tests::a_push … FAILED`.
#[derive(Debug, Default)]
pub struct FailedTests {
    line: Vec<u8>,
    names: Vec<String>,
    more: usize,
}

impl FailedTests {
    pub fn see(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.line.len() + piece.len() <= LINE_BYTES_MAX {
                self.line.extend_from_slice(piece);
            }
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                self.see_line(&String::from_utf8_lossy(&line));
            }
        }
    }

    fn see_line(&mut self, line: &str) {
        let name = line
            .trim()
            .strip_prefix("test ")
            .and_then(|rest| rest.strip_suffix(" ... FAILED"))
            .map(|name| name.split(" - should panic").next().unwrap_or(name));
        match name {
            Some(name) if self.names.len() < NAMES_MAX => self.names.push(name.to_owned()),
            Some(_) => self.more += 1,
            None => {}
        }
    }
}

/// `: a, b and 3 more`, or nothing.
impl fmt::Display for FailedTests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.names.is_empty() {
            return Ok(());
        }
        write!(f, ": {}", self.names.join(", "))?;
        match self.more {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_across_pieces() {
        let mut failed = FailedTests::default();
        for piece in [
            "test a::b ... ok\ntest a::c ... FA",
            "ILED\r\n",
            "test d - should panic ... FAILED\n",
            "FAILED\n",
        ] {
            failed.see(piece.as_bytes());
        }
        assert_eq!(failed.to_string(), ": a::c, d");
    }

    #[test]
    fn a_flood_is_counted_and_not_kept() {
        let mut failed = FailedTests::default();
        failed.see("x".repeat(100_000).as_bytes());
        failed.see(b"\n");
        for number in 0..1000 {
            failed.see(format!("test t{number} ... FAILED\n").as_bytes());
        }
        assert_eq!(failed.to_string(), ": t0, t1, t2, t3, t4 and 995 more");
        assert!(failed.line.capacity() <= 2 * LINE_BYTES_MAX);
    }
}
