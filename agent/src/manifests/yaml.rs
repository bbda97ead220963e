//! YAML as kubectl reads it: text in, JSON values with their lines out, by the rules of the Go module sigs.k8s.io/yaml.
//!
//! The parser (granit, through serde-saphyr) knows YAML 1.2, where `yes` is text and `0644` decimal; kubectl knows
//! YAML 1.1. So scalars are resolved by `yaml_scalar.rs`, and `tests/it/yaml.rs` holds both against the Go module.
//! Stricter than that module on purpose: two equal keys in one mapping are an error. Pure: no IO.

use std::collections::HashMap;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer};
use serde_json::{Map, Value};
use serde_saphyr::granit_parser::{Event, Parser, ScalarStyle, Span, StrInput, Tag};

use super::yaml_scalar::{self as scalar, Scalar};

/// Deeper nesting is not a manifest but an attack.
pub const DEPTH_MAX: usize = 64;
/// Scalars, sequences and mappings of a whole set, with what aliases repeat.
pub const NODES_MAX: usize = 100_000;
/// Text of a whole set after aliases are written out.
pub const TEXT_BYTES_MAX: usize = 16 << 20;

/// One document that is not empty.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// From 1, empty ones counted.
    pub number: usize,
    /// Where it begins, from 1.
    pub line: usize,
    pub value: Value,
}

/// What is wrong, and where: both from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    pub line: usize,
    pub column: usize,
    pub message: String,
}

impl Problem {
    fn new(line: usize, column: usize, message: impl Into<String>) -> Self {
        let message = message.into();
        Self {
            line,
            column,
            message,
        }
    }

    fn at(span: Span, message: impl Into<String>) -> Self {
        Self::new(span.start.line(), span.start.col() + 1, message)
    }
}

/// What a set of files may still use; shared by its files, so that many small bombs are one bomb.
#[derive(Debug)]
pub struct Budget {
    nodes: usize,
    bytes: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            nodes: NODES_MAX,
            bytes: TEXT_BYTES_MAX,
        }
    }
}

impl Budget {
    fn take(&mut self, nodes: usize, bytes: usize) -> Result<(), String> {
        self.nodes = self
            .nodes
            .checked_sub(nodes)
            .ok_or_else(|| format!("has more than {NODES_MAX} values, aliases counted"))?;
        self.bytes = self.bytes.checked_sub(bytes).ok_or_else(|| {
            format!(
                "holds more than {} MiB of text, aliases counted",
                TEXT_BYTES_MAX >> 20
            )
        })?;
        Ok(())
    }
}

/// Every document of the text that is not empty.
pub fn documents(text: &str, budget: &mut Budget) -> Result<Vec<Document>, Problem> {
    if let Some(line) = text.lines().position(|line| line.contains('\0')) {
        return Err(Problem::new(line + 1, 1, "holds a NUL character"));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    // As kubectl: what begins with a brace is JSON, and YAML only where it is not JSON.
    if text.trim_start().starts_with('{')
        && let Some(documents) = json_documents(text)
    {
        for document in &documents {
            let (nodes, bytes) = weigh(&document.value);
            let problem = |message| Problem::new(document.line, 1, message);
            budget.take(nodes, bytes).map_err(problem)?;
            if depth(&document.value) > DEPTH_MAX {
                return Err(problem(format!("is nested deeper than {DEPTH_MAX}")));
            }
        }
        return Ok(documents);
    }
    let mut reader = Reader {
        events: Parser::new_from_str(text),
        anchors: HashMap::new(),
        budget,
    };
    reader.stream()
}

struct Reader<'t, 'b> {
    events: Parser<'t, StrInput<'t>>,
    /// Finished nodes only, so that a node which holds itself is unknown.
    anchors: HashMap<usize, Value>,
    budget: &'b mut Budget,
}

impl<'t> Reader<'t, '_> {
    fn stream(&mut self) -> Result<Vec<Document>, Problem> {
        let mut documents = Vec::new();
        let mut number = 0;
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamEnd => return Ok(documents),
                Event::DocumentStart(..) => {
                    number += 1;
                    self.anchors.clear();
                }
                Event::StreamStart | Event::DocumentEnd => {}
                node => {
                    let line = span.start.line();
                    let value = self.node(node, span, 0)?;
                    if !value.is_null() {
                        documents.push(Document {
                            number,
                            line,
                            value,
                        });
                    }
                }
            }
        }
    }

    /// The next event that is not a comment.
    fn next(&mut self) -> Result<(Event<'t>, Span), Problem> {
        loop {
            match self.events.next_event() {
                Some(Ok((Event::Comment(..), _))) => {}
                Some(Ok(event)) => return Ok(event),
                None => return Ok((Event::StreamEnd, Span::default())),
                Some(Err(error)) => {
                    let at = error.marker();
                    return Err(Problem::new(at.line(), at.col() + 1, error.info()));
                }
            }
        }
    }

    fn node(&mut self, event: Event<'t>, span: Span, depth: usize) -> Result<Value, Problem> {
        if depth > DEPTH_MAX {
            return Err(Problem::at(
                span,
                format!("is nested deeper than {DEPTH_MAX}"),
            ));
        }
        let (anchor, value) = match event {
            Event::Alias(id) => return self.alias(id, span),
            Event::Scalar(text, style, anchor, tag) => {
                let scalar = self.scalar(&text, style, tag.as_deref(), span)?;
                (
                    anchor,
                    scalar
                        .into_value()
                        .map_err(|message| Problem::at(span, message))?,
                )
            }
            Event::SequenceStart(_, anchor, _) => {
                self.take(1, 0, span)?;
                (anchor, self.sequence(depth)?)
            }
            Event::MappingStart(_, anchor, _) => {
                self.take(1, 0, span)?;
                (anchor, self.mapping(depth)?)
            }
            _ => return Err(Problem::at(span, "ends in the middle of a value")),
        };
        if anchor != 0 {
            let (nodes, bytes) = weigh(&value);
            self.take(nodes, bytes, span)?;
            self.anchors.insert(anchor, value.clone());
        }
        Ok(value)
    }

    fn sequence(&mut self, depth: usize) -> Result<Value, Problem> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(Value::Array(items)),
                (event, span) => items.push(self.node(event, span, depth + 1)?),
            }
        }
    }

    fn mapping(&mut self, depth: usize) -> Result<Value, Problem> {
        let mut members = Map::new();
        let mut merged = Vec::new();
        loop {
            let (event, span) = match self.next()? {
                (Event::MappingEnd, _) => return Ok(Value::Object(members)),
                other => other,
            };
            let is_merge =
                matches!(&event, Event::Scalar(text, ScalarStyle::Plain, _, None) if text == "<<");
            let key = self.key(event, span)?;
            let (event, value_span) = self.next()?;
            let value = self.node(event, value_span, depth + 1)?;
            if is_merge {
                merge(&mut members, &mut merged, value)
                    .map_err(|message| Problem::at(value_span, message))?;
            } else if members.contains_key(&key) && !merged.contains(&key) {
                return Err(Problem::at(
                    span,
                    format!("the key {key:?} stands here twice"),
                ));
            } else {
                merged.retain(|name| *name != key);
                members.insert(key, value);
            }
        }
    }

    fn key(&mut self, event: Event<'t>, span: Span) -> Result<String, Problem> {
        let at = |message| Problem::at(span, message);
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let scalar = self.scalar(&text, style, tag.as_deref(), span)?;
                if anchor != 0 {
                    self.take(1, text.len(), span)?;
                    self.anchors
                        .insert(anchor, Value::String(text.into_owned()));
                }
                scalar.into_key().map_err(at)
            }
            Event::Alias(id) => match self.alias(id, span)? {
                Value::String(text) => Ok(text),
                Value::Number(number) => Ok(number.to_string()),
                Value::Bool(value) => Ok(value.to_string()),
                _ => Err(at(
                    "a key must be one word, not a mapping or a list".to_owned()
                )),
            },
            _ => Err(at(
                "a key must be one word, not a mapping or a list".to_owned()
            )),
        }
    }

    fn scalar(
        &mut self,
        text: &str,
        style: ScalarStyle,
        tag: Option<&Tag>,
        span: Span,
    ) -> Result<Scalar, Problem> {
        self.take(1, text.len(), span)?;
        match tag {
            None if style == ScalarStyle::Plain => Ok(scalar::plain(text)),
            None => Ok(Scalar::Text(text.to_owned())),
            Some(tag) => match core_kind(tag) {
                Some(kind) => {
                    scalar::tagged(&kind, text).map_err(|message| Problem::at(span, message))
                }
                None => Ok(Scalar::Text(text.to_owned())),
            },
        }
    }

    fn alias(&mut self, id: usize, span: Span) -> Result<Value, Problem> {
        let Some(value) = self.anchors.get(&id) else {
            return Err(Problem::at(span, "this alias stands inside what it names"));
        };
        let (nodes, bytes) = weigh(value);
        self.budget
            .take(nodes, bytes)
            .map_err(|message| Problem::at(span, message))?;
        Ok(value.clone())
    }

    fn take(&mut self, nodes: usize, bytes: usize, span: Span) -> Result<(), Problem> {
        self.budget
            .take(nodes, bytes)
            .map_err(|message| Problem::at(span, message))
    }
}

/// `<<`: later explicit keys win over it, and it wins over earlier ones, as in the Go module.
fn merge(
    members: &mut Map<String, Value>,
    merged: &mut Vec<String>,
    value: Value,
) -> Result<(), String> {
    const WRONG: &str = "`<<` takes a mapping, or a list of mappings";
    let maps = match value {
        Value::Object(map) => vec![map],
        Value::Array(items) => items
            .into_iter()
            .map(|item| match item {
                Value::Object(map) => Ok(map),
                _ => Err(WRONG.to_owned()),
            })
            .collect::<Result<_, _>>()?,
        _ => return Err(WRONG.to_owned()),
    };
    // Of several the first wins.
    for (key, value) in maps.into_iter().rev().flatten() {
        if !merged.contains(&key) {
            merged.push(key.clone());
        }
        members.insert(key, value);
    }
    Ok(())
}

/// `int` for `!!int`; None for a tag of somebody's own, which kubectl takes for text.
fn core_kind(tag: &Tag) -> Option<String> {
    format!("{}{}", tag.handle(), tag.suffix())
        .strip_prefix("tag:yaml.org,2002:")
        .map(str::to_owned)
}

/// Values and bytes of text in it.
fn weigh(value: &Value) -> (usize, usize) {
    let sum = |(nodes, bytes): (usize, usize), (more, longer): (usize, usize)| {
        (nodes + more, bytes + longer)
    };
    match value {
        Value::String(text) => (1, text.len()),
        Value::Array(items) => items.iter().map(weigh).fold((1, 0), sum),
        Value::Object(members) => members
            .iter()
            .map(|(key, value)| sum((1, key.len()), weigh(value)))
            .fold((1, 0), sum),
        _ => (1, 0),
    }
}

/// The parser of JSON has a limit of its own, so that this cannot recurse far.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(members) => 1 + members.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// None where the text is not JSON.
fn json_documents(text: &str) -> Option<Vec<Document>> {
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<Unique>();
    let mut documents = Vec::new();
    loop {
        let rest = text.get(stream.byte_offset()..)?;
        let begin = text.len() - rest.trim_start().len();
        let Some(read) = stream.next() else {
            return Some(documents);
        };
        let line = text.get(..begin)?.matches('\n').count() + 1;
        documents.push(Document {
            number: documents.len() + 1,
            line,
            value: read.ok()?.0,
        });
    }
}

/// A JSON value without equal keys, its numbers as the Go module writes them.
struct Unique(Value);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UniqueVisitor).map(Unique)
    }
}

struct UniqueVisitor;

impl<'de> de::Visitor<'de> for UniqueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(scalar::json_number(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: de::MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some((key, Unique(value))) = members.next_entry::<String, Unique>()? {
            if map.contains_key(&key) {
                // Read again as YAML, this is reported with its line.
                return Err(de::Error::custom("equal keys"));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Result<Vec<Document>, Problem> {
        documents(text, &mut Budget::default())
    }

    #[test]
    fn documents_know_their_number_and_line() {
        let read = read("# first\na: 1\n---\n\n---\n# third\nb:\n  - 2\n---\n# nothing\n").unwrap();
        let places: Vec<_> = read
            .iter()
            .map(|document| (document.number, document.line))
            .collect();
        assert_eq!(places, [(1, 2), (3, 7)]);
        assert_eq!(read[1].value, json!({"b": [2]}));
    }

    #[test]
    fn the_same_key_twice_is_an_error_with_its_line() {
        let problem = read("a: 1\nb: 2\na: 3\n").unwrap_err();
        assert_eq!((problem.line, problem.column), (3, 1));
        assert!(problem.message.contains("\"a\""), "{problem:?}");
        let problem = read("{\"a\": 1,\n \"a\": 2}").unwrap_err();
        assert_eq!(problem.line, 2);
    }

    #[test]
    fn json_is_read_as_json() {
        let read = read("{\"a\": \"\\ud83d\\ude00 \\/\", \"b\": 1.0}\n{\"c\": yes}").unwrap_err();
        assert!(!read.message.is_empty());
        let read = documents(
            "{\"a\": \"\\ud83d\\ude00 \\/\", \"b\": 1.0}\n{\"c\": 2}",
            &mut Budget::default(),
        )
        .unwrap();
        assert_eq!(read[0].value, json!({"a": "😀 /", "b": 1}));
        assert_eq!((read[1].number, read[1].line), (2, 2));
    }

    #[test]
    fn bombs_are_refused_quickly() {
        let mut laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let names = vec![format!("*a{}", level - 1); 10].join(", ");
            laughs += &format!("a{level}: &a{level} [{names}]\n");
        }
        let long = format!(
            "a: &a {}\nb: [{}]\n",
            "x".repeat(1 << 20),
            vec!["*a"; 20_000].join(", ")
        );
        let quadratic = format!(
            "a: &a [{}]\nb: [{}]\n",
            "1, ".repeat(30_000),
            "*a, ".repeat(30_000)
        );
        let deep_json = format!("{{\"a\": {}1{}}}", "[".repeat(100), "]".repeat(100));
        let deep_blocks = (0..100)
            .map(|level| format!("{}a:\n", " ".repeat(level)))
            .collect::<String>();
        let bombs = [
            laughs,
            long,
            quadratic,
            "[".repeat(100_000),
            "{".repeat(100_000),
            "a: &a [*a]\n".to_owned(),
            "a: &a {b: *a}\n".to_owned(),
            "- - - - ".repeat(50_000),
            "? ".repeat(100_000),
            deep_json,
            deep_blocks,
            "a: \0".to_owned(),
        ];
        for bomb in bombs {
            let begun = Instant::now();
            let start: String = bomb.chars().take(40).collect();
            assert!(read(&bomb).is_err(), "{start}");
            assert!(
                begun.elapsed() < Duration::from_secs(2),
                "{start}: {:?}",
                begun.elapsed()
            );
        }
    }
}
