//! A line to the store and to everyone watching; masks secrets.
//!
//! Stages write to a bounded buffer (`StageLog`); one task a build drains it, masks it and stores chunks. The page and
//! the live log read the store only, so nobody sees a line that a restart would lose. This log is for the author of
//! the push; `tracing` is for the operator. Never mixed.

use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use aho_corasick::AhoCorasick;
use base64::Engine;
use tokio::sync::Notify;

use crate::builds::{Millis, Stage, now};

/// A longer line is stored as continuation lines with numbers of their own.
pub const LINE_BYTES_MAX: usize = 16 * 1024;
/// One row of the store.
pub const CHUNK_BYTES_MAX: usize = 64 * 1024;
/// What a program may be ahead of the store before it is made to wait.
const BUFFER_BYTES_MAX: usize = 512 * 1024;
/// How long a line waits for company; also how late a viewer sees it.
pub const FLUSH_EVERY: Duration = Duration::from_millis(80);
/// Shorter values would mask half of every log.
const SECRET_BYTES_MIN: usize = 4;

/// One line: its bytes (with the newline, where it had one) as they are stored, already masked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    pub stage: Stage,
    pub at: Millis,
    pub bytes: Vec<u8>,
}

/// Where stages write: bounded, cheap to clone.
#[derive(Clone)]
pub struct BuildLog {
    shared: Arc<Shared>,
}

struct Shared {
    buffer: Mutex<Buffer>,
    /// A line came, or the log was closed.
    filled: Notify,
    /// The buffer was drained.
    drained: Notify,
    masker: RwLock<Masker>,
    bytes_max: u64,
}

#[derive(Default)]
struct Buffer {
    lines: Vec<LogLine>,
    bytes: usize,
    /// Bytes of one stage that are no whole line yet.
    partial: Option<(Stage, Vec<u8>)>,
    total: u64,
    cut: bool,
    closed: bool,
}

impl BuildLog {
    /// `bytes_max` is the hard limit of one build's log; `written` what an earlier attempt stored already.
    pub fn new(masker: Masker, bytes_max: u64, written: u64) -> Self {
        let buffer = Mutex::new(Buffer {
            total: written,
            ..Buffer::default()
        });
        Self {
            shared: Arc::new(Shared {
                buffer,
                filled: Notify::new(),
                drained: Notify::new(),
                masker: RwLock::new(masker),
                bytes_max,
            }),
        }
    }

    pub fn stage(&self, stage: Stage) -> StageLog {
        StageLog {
            log: self.clone(),
            stage,
        }
    }

    /// Whole lines since the last call; waits until there are some. None once the log is closed and empty.
    pub async fn drain(&self) -> Option<Vec<LogLine>> {
        loop {
            let filled = self.shared.filled.notified();
            {
                let mut buffer = self.lock();
                if buffer.closed {
                    self.flush_partial(&mut buffer);
                }
                if !buffer.lines.is_empty() {
                    buffer.bytes = 0;
                    self.shared.drained.notify_waiters();
                    return Some(std::mem::take(&mut buffer.lines));
                }
                if buffer.closed {
                    return None;
                }
            }
            filled.await;
        }
    }

    /// No more lines will come: `drain` gives what is left, then None.
    pub fn close(&self) {
        self.lock().closed = true;
        self.shared.filled.notify_one();
    }

    fn write(&self, stage: Stage, mut bytes: &[u8]) {
        let mut buffer = self.lock();
        if buffer.partial.as_ref().is_some_and(|(of, _)| *of != stage) {
            self.flush_partial(&mut buffer);
        }
        while let Some(end) = bytes.iter().position(|b| *b == b'\n') {
            let (line, rest) = bytes.split_at(end + 1);
            bytes = rest;
            let (_, mut whole) = buffer.partial.take().unwrap_or((stage, Vec::new()));
            whole.extend_from_slice(line);
            self.push(&mut buffer, stage, &whole);
        }
        if !bytes.is_empty() {
            let (_, partial) = buffer.partial.get_or_insert_with(|| (stage, Vec::new()));
            partial.extend_from_slice(bytes);
            if partial.len() > 2 * LINE_BYTES_MAX {
                let cut = self.masker().safe_cut(partial);
                let rest = partial.split_off(cut);
                let whole = std::mem::replace(partial, rest);
                self.push(&mut buffer, stage, &whole);
            }
        }
        drop(buffer);
        self.shared.filled.notify_one();
    }

    fn flush_partial(&self, buffer: &mut Buffer) {
        if let Some((stage, partial)) = buffer.partial.take() {
            self.push(buffer, stage, &partial);
        }
    }

    fn push(&self, buffer: &mut Buffer, stage: Stage, bytes: &[u8]) {
        if buffer.cut {
            return;
        }
        let at = now();
        for piece in self.masker().mask(bytes).chunks(LINE_BYTES_MAX) {
            buffer.total += piece.len() as u64;
            buffer.bytes += piece.len();
            buffer.lines.push(LogLine {
                stage,
                at,
                bytes: piece.to_vec(),
            });
        }
        if buffer.total > self.shared.bytes_max {
            buffer.cut = true;
            let notice = format!(
                "[the log ends here: it reached its limit of {} bytes]\n",
                self.shared.bytes_max
            );
            buffer.lines.push(LogLine {
                stage,
                at,
                bytes: notice.into_bytes(),
            });
        }
    }

    fn masker(&self) -> Masker {
        let masker = self.shared.masker.read();
        masker.unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Buffer> {
        self.shared
            .buffer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A build's log under one stage's title.
#[derive(Clone)]
pub struct StageLog {
    log: BuildLog,
    stage: Stage,
}

impl StageLog {
    /// Our own words: one line, or several.
    pub fn line(&self, text: impl AsRef<str>) {
        let text = text.as_ref();
        let end = if text.ends_with('\n') { "" } else { "\n" };
        // At once: two tasks of a stage may speak, and their lines must not mix.
        self.log
            .write(self.stage, format!("{text}{end}").as_bytes());
    }

    /// The text as the log would show it: for sentences that leave the log, such as a cause.
    pub fn masked(&self, text: &str) -> String {
        self.log.masker().mask_text(text)
    }

    /// Masks these too from here on, in the whole log.
    pub fn also_mask(&self, secrets: &[String]) {
        let masker = self.log.shared.masker.write();
        let mut masker = masker.unwrap_or_else(PoisonError::into_inner);
        if !secrets.iter().all(|secret| masker.secrets.contains(secret)) {
            let all = masker.secrets.iter().chain(secrets).map(String::as_str);
            *masker = Masker::new(all);
        }
    }

    /// What a program wrote, byte for byte; waits while the store is behind.
    pub async fn output(&self, bytes: &[u8]) {
        self.log.write(self.stage, bytes);
        loop {
            let drained = self.log.shared.drained.notified();
            if self.log.lock().bytes <= BUFFER_BYTES_MAX {
                return;
            }
            drained.await;
        }
    }
}

/// Replaces secrets by `***`: as they are, line by line, and in base64, URL and JSON form.
#[derive(Clone, Default)]
pub struct Masker {
    secrets: Arc<Vec<String>>,
    patterns: Option<Arc<AhoCorasick>>,
    longest: usize,
}

impl Masker {
    pub fn new<'a>(secrets: impl IntoIterator<Item = &'a str>) -> Self {
        let secrets: Vec<String> = secrets.into_iter().map(str::to_owned).collect();
        let mut patterns: Vec<Vec<u8>> = secrets
            .iter()
            .flat_map(|secret| forms(secret))
            .filter(|form| form.len() >= SECRET_BYTES_MIN)
            .collect();
        patterns.sort_unstable();
        patterns.dedup();
        let longest = patterns.iter().map(Vec::len).max().unwrap_or(0);
        // The other kinds may take thousands of bytes for each byte of a secret.
        let automaton = AhoCorasick::builder()
            .kind(Some(aho_corasick::AhoCorasickKind::ContiguousNFA))
            .match_kind(aho_corasick::MatchKind::LeftmostLongest)
            .build(&patterns)
            .ok();
        Self {
            secrets: Arc::new(secrets),
            patterns: automaton.filter(|_| longest > 0).map(Arc::new),
            longest,
        }
    }

    pub fn mask(&self, bytes: &[u8]) -> Vec<u8> {
        let Some(patterns) = &self.patterns else {
            return bytes.to_vec();
        };
        let mut masked = Vec::with_capacity(bytes.len());
        patterns.replace_all_with_bytes(bytes, &mut masked, |_, _, masked| {
            masked.extend_from_slice(b"***");
            true
        });
        masked
    }

    pub fn mask_text(&self, text: &str) -> String {
        String::from_utf8_lossy(&self.mask(text.as_bytes())).into_owned()
    }

    /// Where bytes may be cut so that no secret that goes on after them is cut in two.
    fn safe_cut(&self, bytes: &[u8]) -> usize {
        let Some(patterns) = &self.patterns else {
            return bytes.len();
        };
        let cut = bytes.len().saturating_sub(self.longest.saturating_sub(1));
        patterns
            .find_iter(bytes)
            .find(|found| found.start() < cut && found.end() > cut)
            .map_or(cut, |found| found.start())
    }
}

fn forms(secret: &str) -> Vec<Vec<u8>> {
    use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
    let mut forms: Vec<Vec<u8>> = secret
        .lines()
        .map(|line| line.trim().as_bytes().to_vec())
        .collect();
    // In base64 of a longer text the secret may begin at any of three offsets; the digits that its neighbours share are left out.
    for offset in 0..3 {
        let mut padded = vec![0; offset];
        padded.extend_from_slice(secret.as_bytes());
        let skip = [0, 2, 3].get(offset).copied().unwrap_or(0);
        let keep = secret.len() * 8 / 6;
        for engine in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
            let encoded = engine.encode(&padded);
            let kept: Vec<u8> = encoded
                .bytes()
                .skip(skip)
                .take(keep.saturating_sub(1))
                .collect();
            if kept.len() >= 8 {
                forms.push(kept);
            }
        }
    }
    forms.push(
        percent_encoding::utf8_percent_encode(secret, percent_encoding::NON_ALPHANUMERIC)
            .to_string()
            .into_bytes(),
    );
    forms.push(
        serde_json::Value::from(secret)
            .to_string()
            .trim_matches('"')
            .as_bytes()
            .to_vec(),
    );
    forms
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn written(log: &BuildLog) -> Vec<u8> {
        log.close();
        let mut bytes = Vec::new();
        while let Some(lines) = log.drain().await {
            lines
                .iter()
                .for_each(|line| bytes.extend_from_slice(&line.bytes));
        }
        bytes
    }

    #[tokio::test]
    async fn bytes_come_out_as_they_went_in() {
        let log = BuildLog::new(Masker::default(), 1 << 20, 0);
        let program = log.stage(Stage::Test);
        let odd = b"one\r50%\r100%\n\xff\xfe\0two\nno newline at the end";
        program.output(odd).await;
        assert_eq!(written(&log).await, odd);
    }

    #[tokio::test]
    async fn a_secret_is_masked_in_every_form_and_across_pieces() {
        let secret = "correct-horse-battery";
        let log = BuildLog::new(Masker::new([secret]), 1 << 20, 0);
        let program = log.stage(Stage::Test);
        let base64 = base64::engine::general_purpose::STANDARD.encode(format!("user:{secret}!"));
        program.output(b"token correct-ho").await;
        program.output(b"rse-battery end\n").await;
        program.output(format!("Basic {base64}\n").as_bytes()).await;
        program
            .output("x".repeat(3 * LINE_BYTES_MAX).as_bytes())
            .await;
        program.output(secret.as_bytes()).await;
        let text = String::from_utf8(written(&log).await).unwrap();
        assert!(!text.contains("correct-horse"), "{text}");
        assert!(text.contains("token *** end"), "{text}");
        assert!(!text.contains(&base64[10..24]), "{text}");
    }

    #[tokio::test]
    async fn what_becomes_known_as_a_secret_is_masked_from_then_on() {
        let log = BuildLog::new(Masker::new(["first-secret"]), 1 << 20, 0);
        let stage = log.stage(Stage::Deploy);
        stage.also_mask(&["second-secret".to_owned()]);
        log.stage(Stage::Verify).line("first-secret second-secret");
        assert_eq!(written(&log).await, b"*** ***\n");
    }

    #[tokio::test]
    async fn the_log_ends_at_its_limit_with_a_notice() {
        let log = BuildLog::new(Masker::default(), 100, 0);
        let program = log.stage(Stage::Test);
        for _ in 0..20 {
            program.output(b"0123456789\n").await;
        }
        let text = String::from_utf8(written(&log).await).unwrap();
        assert!(text.contains("reached its limit of 100 bytes"));
        assert!(text.len() < 250, "{}", text.len());
    }
}
