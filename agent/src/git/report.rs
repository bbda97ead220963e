//! What the git process tells the agent on its way, and why it could not do what was asked.

use std::cell::Cell;
use std::io::Write;
use std::time::{Duration, Instant};

use super::process::{Line, Trouble};
use super::tree::Refusal;

/// A sign of life this often, at most.
const ALIVE_EVERY: Duration = Duration::from_millis(500);

pub struct Report {
    alive: Cell<Instant>,
}

impl Report {
    pub fn new() -> Self {
        Self {
            alive: Cell::new(Instant::now()),
        }
    }

    pub fn line(&self, line: &Line) {
        let mut text = serde_json::to_vec(line).unwrap_or_default();
        text.push(b'\n');
        let mut out = std::io::stdout().lock();
        if out.write_all(&text).and_then(|()| out.flush()).is_err() {
            std::process::exit(1);
        }
    }

    pub fn note(&self, text: String) {
        self.line(&Line::Note(text));
    }

    pub fn alive(&self) {
        if self.alive.get().elapsed() >= ALIVE_EVERY {
            self.alive.set(Instant::now());
            self.line(&Line::Alive);
        }
    }
}

pub enum Failure {
    Trouble(Trouble),
    /// The mirror cannot be read: clone it anew.
    Broken(String),
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

/// What git2 says about anything but the server is about the mirror.
impl From<git2::Error> for Failure {
    fn from(error: git2::Error) -> Self {
        Self::Broken(error.message().to_owned())
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Trouble(match refusal {
            Refusal::Cause(cause) => Trouble::Cause(cause),
            Refusal::Io(error) => Trouble::Agent(format!("{error:#}")),
        })
    }
}
