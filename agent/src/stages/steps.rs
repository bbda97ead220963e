//! BuildKit's stream of vertices as lines for people: which step began, what it prints, whether it was cached, how long.
//!
//! Vertices come again and again with more fields; only what is new becomes a line. Pure.

use std::collections::HashMap;

use bollard::moby::buildkit::v1::{StatusResponse, Vertex};

/// A line of a step without an end is passed on at this length.
const PARTIAL_BYTES_MAX: usize = 16 * 1024;

/// The steps of one build so far.
#[derive(Default)]
pub struct Steps {
    by_digest: HashMap<String, Step>,
    last_number: usize,
}

#[derive(Default)]
struct Step {
    /// In the order in which steps are shown; 0 for what is not the user's.
    number: usize,
    name: String,
    begun: bool,
    ended: bool,
    problem: String,
    /// Output that is no whole line yet.
    partial: Vec<u8>,
}

impl Steps {
    /// What is new, as log lines.
    pub fn update(&mut self, status: &StatusResponse) -> Vec<u8> {
        let mut text = Vec::new();
        for vertex in &status.vertexes {
            self.see(vertex, &mut text);
        }
        for log in &status.logs {
            if let Some(step) = self.by_digest.get_mut(&log.vertex) {
                step.print(&log.msg, &mut text);
            }
        }
        // Ends are told after the last output, which may come in the same piece.
        for vertex in &status.vertexes {
            self.see_end(vertex, &mut text);
        }
        text
    }

    /// What was left without a newline.
    pub fn flush(&mut self) -> Vec<u8> {
        let mut text = Vec::new();
        for step in self.by_digest.values_mut() {
            step.flush(&mut text);
        }
        text
    }

    /// The name and the problem of the step that failed first.
    pub fn failed(&self) -> Option<(&str, &str)> {
        self.by_digest
            .values()
            .filter(|step| !step.problem.is_empty() && !step.problem.contains("context canceled"))
            .min_by_key(|step| step.number)
            .map(|step| (step.name.as_str(), step.problem.as_str()))
    }

    fn see(&mut self, vertex: &Vertex, text: &mut Vec<u8>) {
        let step = self.by_digest.entry(vertex.digest.clone()).or_default();
        if step.name.is_empty() {
            step.name = one_line(&vertex.name);
            if is_for_people(&vertex.name) {
                self.last_number += 1;
                step.number = self.last_number;
            }
        }
        let begins = vertex.cached || vertex.started.is_some();
        if step.number > 0 && begins && !step.begun {
            step.begun = true;
            let cached = if vertex.cached { " CACHED" } else { "" };
            text.extend_from_slice(format!("#{} {}{cached}\n", step.number, step.name).as_bytes());
            step.ended = vertex.cached;
        }
    }

    fn see_end(&mut self, vertex: &Vertex, text: &mut Vec<u8>) {
        let Some(step) = self.by_digest.get_mut(&vertex.digest) else {
            return;
        };
        if !vertex.error.is_empty() {
            step.problem.clone_from(&vertex.error);
        }
        let (Some(started), Some(completed)) = (&vertex.started, &vertex.completed) else {
            return;
        };
        if step.number == 0 || step.ended {
            return;
        }
        step.ended = true;
        step.flush(text);
        let nanos = i64::from(completed.nanos) - i64::from(started.nanos);
        let millis = (completed.seconds - started.seconds) * 1000 + nanos / 1_000_000;
        let took = crate::builds::human_duration(millis);
        let line = match (vertex.cached, vertex.error.is_empty()) {
            (true, _) => format!("#{} CACHED\n", step.number),
            (false, true) => format!("#{} done in {took}\n", step.number),
            (false, false) => format!("#{} failed after {took}\n", step.number),
        };
        text.extend_from_slice(line.as_bytes());
    }
}

impl Step {
    /// Each line with the step's number, since several steps may print at once.
    fn print(&mut self, bytes: &[u8], text: &mut Vec<u8>) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.partial.extend_from_slice(piece);
            if piece.ends_with(b"\n") || self.partial.len() > PARTIAL_BYTES_MAX {
                self.flush(text);
            }
        }
    }

    fn flush(&mut self, text: &mut Vec<u8>) {
        if self.partial.is_empty() {
            return;
        }
        text.extend_from_slice(format!("#{} ", self.number).as_bytes());
        text.append(&mut self.partial);
        if !text.ends_with(b"\n") {
            text.push(b'\n');
        }
    }
}

/// Whether the author of the Dockerfile knows the step.
fn is_for_people(name: &str) -> bool {
    let ours = [
        "[internal]",
        "load remote build context",
        "copy /context",
        "load build context",
    ];
    !ours.iter().any(|prefix| name.starts_with(prefix))
}

fn one_line(name: &str) -> String {
    name.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use bollard::moby::buildkit::v1::VertexLog;

    use super::*;

    fn vertex(name: &str, started: bool, completed: bool) -> Vertex {
        let mut vertex = Vertex {
            digest: name.to_owned(),
            name: name.to_owned(),
            ..Vertex::default()
        };
        vertex.started = started.then(Default::default);
        vertex.completed = completed.then(Default::default);
        if let Some(completed) = &mut vertex.completed {
            completed.seconds = 3;
            completed.nanos = 250_000_000;
        }
        vertex
    }

    fn log(vertex: &str, text: &str) -> VertexLog {
        VertexLog {
            vertex: vertex.to_owned(),
            msg: text.as_bytes().to_vec(),
            ..VertexLog::default()
        }
    }

    #[test]
    fn a_step_is_told_once_with_its_output_and_its_time() {
        let mut steps = Steps::default();
        let mut text = String::new();
        for (vertexes, logs) in [
            (
                vec![vertex("[internal] load build definition", true, true)],
                vec![],
            ),
            (
                vec![vertex("[1/2] RUN  a", true, false)],
                vec![log("[1/2] RUN  a", "one\ntw")],
            ),
            (
                vec![vertex("[1/2] RUN  a", true, false)],
                vec![log("[1/2] RUN  a", "o\nend")],
            ),
            (vec![vertex("[1/2] RUN  a", true, true)], vec![]),
        ] {
            let status = StatusResponse {
                vertexes,
                logs,
                ..StatusResponse::default()
            };
            text += &String::from_utf8(steps.update(&status)).unwrap();
        }
        assert_eq!(
            text,
            "#1 [1/2] RUN a\n#1 one\n#1 two\n#1 end\n#1 done in 3.2 s\n"
        );
    }

    #[test]
    fn a_cached_step_is_one_line() {
        let mut steps = Steps::default();
        let mut cached = vertex("[1/2] RUN a", true, true);
        cached.cached = true;
        let status = StatusResponse {
            vertexes: vec![cached],
            ..StatusResponse::default()
        };
        assert_eq!(steps.update(&status), b"#1 [1/2] RUN a CACHED\n");
        assert_eq!(steps.update(&status), b"");
    }
}
