//! One pattern of a .dockerignore: moby makes a regular expression of it, and what that happens to match is the rule.
//!
//! The line: text → regular expression (only the few constructs that moby's translation can give) → a program that is
//! run on all paths at once, so that no pattern of a hostile repository takes exponential time. Pure.

use super::{characters, decode};

/// More would come only from repetition counts made to hurt.
const STEPS_MAX: usize = 20_000;
/// Go's limit of a repetition count.
const REPEAT_MAX: u32 = 1000;

#[derive(Debug)]
pub(super) struct Pattern {
    text: Vec<u8>,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Exact,
    Prefix,
    Suffix,
    Expression,
}

#[derive(Debug)]
enum Kind {
    Plain(Shape),
    Program(Vec<Step>),
    /// Found out only when it is asked, as in Go.
    Bad(&'static str),
}

impl Pattern {
    pub(super) fn new(text: &[u8]) -> Self {
        let (shape, expression) = translate(text);
        let kind = match shape {
            Shape::Expression => match compile(&expression) {
                Ok(program) => Kind::Program(program),
                Err(problem) => Kind::Bad(problem),
            },
            shape => Kind::Plain(shape),
        };
        Self {
            text: text.to_vec(),
            kind,
        }
    }

    /// The one path that it matches, if it is that simple.
    pub(super) fn literal(&self) -> Option<&[u8]> {
        matches!(self.kind, Kind::Plain(Shape::Exact)).then_some(&self.text)
    }

    pub(super) fn matches(&self, path: &[u8]) -> Result<bool, &'static str> {
        let text = self.text.as_slice();
        Ok(match &self.kind {
            Kind::Plain(Shape::Prefix) => {
                path.starts_with(text.strip_suffix(b"**").unwrap_or(text))
            }
            Kind::Plain(Shape::Suffix) => {
                let suffix = text.strip_prefix(b"**").unwrap_or(text);
                path.ends_with(suffix) || suffix.strip_prefix(b"/") == Some(path)
            }
            Kind::Plain(_) => path == text,
            Kind::Program(program) => run(program, &characters(path)),
            Kind::Bad(problem) => return Err(problem),
        })
    }
}

/// Whether Go's `filepath.Match(text, ".")` would take the pattern: it looks only as far as it needs to.
pub(super) fn is_well_formed(text: &[u8]) -> bool {
    let (mut rest, mut dot_is_left) = (text, true);
    while !rest.is_empty() {
        let (star, chunk, after) = next_chunk(rest);
        rest = after;
        if star && chunk.is_empty() {
            return true;
        }
        match match_chunk(chunk, dot_is_left) {
            Err(Malformed) => return false,
            Ok(Some(left)) if !left || !rest.is_empty() => {
                dot_is_left = left;
                continue;
            }
            Ok(_) => {}
        }
        if !(star && dot_is_left) {
            return true;
        }
        match match_chunk(chunk, false) {
            Err(Malformed) => return false,
            Ok(Some(_)) => dot_is_left = false,
            Ok(None) => return true,
        }
    }
    true
}

/// Whether stars stand first, what follows up to the next star outside a class, and the rest.
fn next_chunk(text: &[u8]) -> (bool, &[u8], &[u8]) {
    let stars = text.iter().take_while(|byte| **byte == b'*').count();
    let text = text.get(stars..).unwrap_or_default();
    let (mut in_class, mut escaped) = (false, false);
    for (index, byte) in text.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'[' => in_class = true,
            b']' => in_class = false,
            b'*' if !in_class => {
                let (chunk, rest) = text.split_at(index);
                return (stars > 0, chunk, rest);
            }
            _ => {}
        }
    }
    (stars > 0, text, b"")
}

struct Malformed;

/// Matches a chunk with what is left of the name "."; Some says whether the dot is still left.
fn match_chunk(chunk: &[u8], mut dot_is_left: bool) -> Result<Option<bool>, Malformed> {
    let (mut rest, mut failed) = (chunk, false);
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        failed = failed || !dot_is_left;
        let fits = match byte {
            b'[' => {
                let (fits, after) = match_class(rest, if failed { '\0' } else { '.' })?;
                rest = after;
                fits
            }
            b'?' => true,
            b'\\' => {
                let (escaped, after) = rest.split_first().ok_or(Malformed)?;
                rest = after;
                *escaped == b'.'
            }
            literal => *literal == b'.',
        };
        dot_is_left = false;
        failed = failed || !fits;
    }
    Ok((!failed).then_some(dot_is_left))
}

fn match_class(text: &[u8], character: char) -> Result<(bool, &[u8]), Malformed> {
    let mut rest = text.strip_prefix(b"^").unwrap_or(text);
    let negated = rest.len() < text.len();
    let (mut fits, mut first) = (false, true);
    loop {
        if !first && let Some(after) = rest.strip_prefix(b"]") {
            return Ok((fits != negated, after));
        }
        first = false;
        let (low, after) = class_character(rest)?;
        let (high, after) = match after.strip_prefix(b"-") {
            Some(range) => class_character(range)?,
            None => (low, after),
        };
        rest = after;
        fits = fits || (low..=high).contains(&character);
    }
}

fn class_character(text: &[u8]) -> Result<(char, &[u8]), Malformed> {
    if matches!(text.first(), None | Some(b'-' | b']')) {
        return Err(Malformed);
    }
    let text = text.strip_prefix(b"\\").unwrap_or(text);
    let (character, length) = decode(text).ok_or(Malformed)?;
    let rest = text.get(length..).unwrap_or_default();
    let is_no_utf8 = character == char::REPLACEMENT_CHARACTER && length == 1;
    if is_no_utf8 || rest.is_empty() {
        return Err(Malformed);
    }
    Ok((character, rest))
}

/// moby's `Pattern.compile`, step by step: which characters it escapes, and when it thinks that it needs no expression.
fn translate(text: &[u8]) -> (Shape, Vec<char>) {
    let all = characters(text);
    let mut rest = all
        .strip_prefix(&['\u{feff}'])
        .unwrap_or(&all)
        .iter()
        .copied()
        .peekable();
    let mut expression = vec!['^'];
    let mut shape = Shape::Exact;
    let mut first = true;
    while let Some(character) = rest.next() {
        match character {
            '*' if rest.next_if_eq(&'*').is_some() => {
                rest.next_if_eq(&'/');
                if rest.peek().is_some() {
                    expression.extend("(.*/)?".chars());
                    shape = Shape::Expression;
                } else if shape == Shape::Exact {
                    shape = Shape::Prefix;
                } else {
                    expression.extend(".*".chars());
                    shape = Shape::Expression;
                }
                if first {
                    shape = Shape::Suffix;
                }
            }
            '*' => {
                expression.extend("[^/]*".chars());
                shape = Shape::Expression;
            }
            '?' => {
                expression.extend("[^/]".chars());
                shape = Shape::Expression;
            }
            // `{`, `|` and `}` are meant to be here too, but moby's bitmap has bytes of eight bits.
            '.' | '+' | '(' | ')' | '$' => expression.extend(['\\', character]),
            '\\' => {
                expression.push('\\');
                if let Some(escaped) = rest.next() {
                    expression.push(escaped);
                    shape = Shape::Expression;
                }
            }
            '[' | ']' => {
                expression.push(character);
                shape = Shape::Expression;
            }
            _ => expression.push(character),
        }
        first = false;
    }
    expression.push('$');
    (shape, expression)
}

#[derive(Debug, Clone)]
enum Step {
    One(Set),
    Assert(Assertion),
    /// Goes on at both.
    Split(usize, usize),
    Match,
}

#[derive(Debug, Clone, Copy)]
enum Assertion {
    Begin,
    End,
    WordBoundary,
    NoWordBoundary,
}

/// Characters as ranges, both ends included.
#[derive(Debug, Clone, Default)]
struct Set {
    negated: bool,
    ranges: Vec<(char, char)>,
}

impl Set {
    fn of(ranges: &[(char, char)], negated: bool) -> Self {
        Self {
            negated,
            ranges: ranges.to_vec(),
        }
    }

    fn has(&self, character: char) -> bool {
        let inside = self
            .ranges
            .iter()
            .any(|(low, high)| (*low..=*high).contains(&character));
        inside != self.negated
    }

    fn add(&mut self, other: &Self) {
        if !other.negated {
            self.ranges.extend(&other.ranges);
            return;
        }
        let mut sorted = other.ranges.clone();
        sorted.sort_unstable();
        let mut low = Some('\0');
        for (from, to) in sorted {
            if let (Some(low), Some(high)) = (low, ('\0'..from).next_back())
                && low <= high
            {
                self.ranges.push((low, high));
            }
            low = (to..=char::MAX).nth(1);
        }
        self.ranges.extend(low.map(|low| (low, char::MAX)));
    }
}

#[derive(Debug, Clone)]
enum Node {
    One(Set),
    Assert(Assertion),
    Group(Vec<Node>),
    Repeat(Box<Node>, u32, Option<u32>),
}

type Parsed<T> = Result<T, &'static str>;

fn compile(expression: &[char]) -> Parsed<Vec<Step>> {
    let mut parser = Parser { rest: expression };
    let mut program = Vec::new();
    loop {
        let branch = parser.sequence()?;
        let more = parser.take('|');
        // Split to this branch and to the next one, whose place is known only afterwards.
        let split = program.len();
        if more {
            program.push(Step::Split(split + 1, 0));
        }
        emit(&mut program, &branch)?;
        program.push(Step::Match);
        if !more {
            return Ok(program);
        }
        let next = program.len();
        if let Some(place) = program.get_mut(split) {
            *place = Step::Split(split + 1, next);
        }
    }
}

fn emit(program: &mut Vec<Step>, nodes: &[Node]) -> Parsed<()> {
    for node in nodes {
        if program.len() > STEPS_MAX {
            return Err("it is too large");
        }
        match node {
            Node::One(set) => program.push(Step::One(set.clone())),
            Node::Assert(assertion) => program.push(Step::Assert(*assertion)),
            Node::Group(nodes) => emit(program, nodes)?,
            Node::Repeat(node, min, max) => emit_repeat(program, node, *min, *max)?,
        }
    }
    Ok(())
}

fn emit_repeat(program: &mut Vec<Step>, node: &Node, min: u32, max: Option<u32>) -> Parsed<()> {
    let one = std::slice::from_ref(node);
    for _ in 0..min {
        emit(program, one)?;
    }
    let optional = max.map_or(1, |max| max.saturating_sub(min));
    for _ in 0..optional {
        let split = program.len();
        program.push(Step::Split(split + 1, 0));
        emit(program, one)?;
        if max.is_none() {
            let back = program.len();
            program.push(Step::Split(split, back + 1));
        }
        let after = program.len();
        if let Some(place) = program.get_mut(split) {
            *place = Step::Split(split + 1, after);
        }
    }
    Ok(())
}

/// Go's syntax, as far as `translate` can give it.
struct Parser<'a> {
    rest: &'a [char],
}

impl Parser<'_> {
    fn next(&mut self) -> Option<char> {
        let (first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*first)
    }

    fn take(&mut self, character: char) -> bool {
        let found = self.rest.first() == Some(&character);
        if found {
            self.next();
        }
        found
    }

    /// Up to the next `|`, `)` or the end.
    fn sequence(&mut self) -> Parsed<Vec<Node>> {
        let mut nodes: Vec<Node> = Vec::new();
        let mut repeated = false;
        loop {
            if matches!(self.rest.first(), None | Some('|' | ')')) {
                return Ok(nodes);
            }
            let Some(character) = self.next() else {
                return Ok(nodes);
            };
            let counts = match character {
                '*' => Some((0, None)),
                '?' => Some((0, Some(1))),
                '{' => self.counts()?,
                _ => None,
            };
            let Some((min, max)) = counts else {
                nodes.push(self.atom(character)?);
                repeated = false;
                continue;
            };
            let argument = nodes.pop().ok_or("nothing stands before its repetition")?;
            if repeated {
                return Err("a repetition is repeated");
            }
            nodes.push(Node::Repeat(Box::new(argument), min, max));
            repeated = true;
        }
    }

    fn atom(&mut self, character: char) -> Parsed<Node> {
        Ok(match character {
            '^' => Node::Assert(Assertion::Begin),
            '$' => Node::Assert(Assertion::End),
            '.' => Node::One(Set::of(&[('\n', '\n')], true)),
            '(' => {
                let nodes = self.sequence()?;
                self.take(')');
                Node::Group(nodes)
            }
            '[' => Node::One(self.class()?),
            '\\' => match self.next() {
                Some('A') => Node::Assert(Assertion::Begin),
                Some('z') => Node::Assert(Assertion::End),
                Some('b') => Node::Assert(Assertion::WordBoundary),
                Some('B') => Node::Assert(Assertion::NoWordBoundary),
                escaped => match escape(escaped)? {
                    Member::One(literal) => Node::One(Set::of(&[(literal, literal)], false)),
                    Member::Class(class) => Node::One(class),
                },
            },
            literal => Node::One(Set::of(&[(literal, literal)], false)),
        })
    }

    /// After `{`: the counts, or None where it is a brace and nothing else.
    fn counts(&mut self) -> Parsed<Option<(u32, Option<u32>)>> {
        let Some(end) = self.rest.iter().position(|character| *character == '}') else {
            return Ok(None);
        };
        let inside: String = self.rest.iter().take(end).collect();
        let (min, max) = inside.split_once(',').unwrap_or((&inside, &inside));
        let is_number = |text: &str| {
            !text.is_empty()
                && text.bytes().all(|byte| byte.is_ascii_digit())
                && (text.len() == 1 || !text.starts_with('0'))
        };
        if !is_number(min) || !(max.is_empty() || is_number(max)) {
            return Ok(None);
        }
        self.rest = self.rest.get(end + 1..).unwrap_or_default();
        let count = |text: &str| {
            let count = text.parse().ok().filter(|count| *count <= REPEAT_MAX);
            count.ok_or("its repetition count is too large")
        };
        let min = count(min)?;
        let max = if max.is_empty() {
            None
        } else {
            Some(count(max)?)
        };
        if max.is_some_and(|max| max < min) {
            return Err("its repetition counts are the wrong way round");
        }
        Ok(Some((min, max)))
    }

    /// After `[`.
    fn class(&mut self) -> Parsed<Set> {
        let mut set = Set::of(&[], self.take('^'));
        let mut first = true;
        while first || self.rest.first() != Some(&']') {
            first = false;
            if self.rest.starts_with(&['[', ':'])
                && self.rest.windows(2).any(|two| two == [':', ']'])
            {
                return Err("named classes are not supported");
            }
            let low = match self.member()? {
                Member::Class(class) => {
                    set.add(&class);
                    continue;
                }
                Member::One(low) => low,
            };
            let high = match self.rest {
                ['-', high, ..] if *high != ']' => {
                    self.next();
                    match self.member()? {
                        Member::One(high) if low <= high => high,
                        _ => return Err("a range is the wrong way round"),
                    }
                }
                _ => low,
            };
            set.ranges.push((low, high));
        }
        self.next();
        Ok(set)
    }

    fn member(&mut self) -> Parsed<Member> {
        match self.next() {
            Some('\\') => escape(self.next()),
            Some(character) => Ok(Member::One(character)),
            None => Err("a class is not closed"),
        }
    }
}

enum Member {
    One(char),
    Class(Set),
}

const DIGITS: &[(char, char)] = &[('0', '9')];
const SPACES: &[(char, char)] = &[('\t', '\n'), ('\u{c}', '\r'), (' ', ' ')];
const WORDS: &[(char, char)] = &[('0', '9'), ('A', 'Z'), ('_', '_'), ('a', 'z')];

/// What stands behind a backslash, in Go's syntax; what nobody means in a path is refused.
fn escape(escaped: Option<char>) -> Parsed<Member> {
    Ok(match escaped {
        Some('d') => Member::Class(Set::of(DIGITS, false)),
        Some('D') => Member::Class(Set::of(DIGITS, true)),
        Some('s') => Member::Class(Set::of(SPACES, false)),
        Some('S') => Member::Class(Set::of(SPACES, true)),
        Some('w') => Member::Class(Set::of(WORDS, false)),
        Some('W') => Member::Class(Set::of(WORDS, true)),
        Some('a') => Member::One('\u{7}'),
        Some('f') => Member::One('\u{c}'),
        Some('n') => Member::One('\n'),
        Some('r') => Member::One('\r'),
        Some('t') => Member::One('\t'),
        Some('v') => Member::One('\u{b}'),
        Some(character) if character.is_ascii() && !character.is_ascii_alphanumeric() => {
            Member::One(character)
        }
        _ => return Err("it escapes a letter or digit"),
    })
}

/// Whether the program matches anywhere in the text: all ways at once, so in time text × program.
fn run(program: &[Step], text: &[char]) -> bool {
    let mut here = Threads::new(program.len());
    let mut there = Threads::new(program.len());
    for at in 0..=text.len() {
        if here.add(program, text, 0, at) {
            return true;
        }
        let Some(character) = text.get(at) else {
            return false;
        };
        there.clear();
        for place in &here.waiting {
            let goes_on =
                matches!(program.get(*place), Some(Step::One(set)) if set.has(*character));
            if goes_on && there.add(program, text, place + 1, at + 1) {
                return true;
            }
        }
        std::mem::swap(&mut here, &mut there);
    }
    false
}

/// The places of the program that wait for the next character.
struct Threads {
    waiting: Vec<usize>,
    seen: Vec<bool>,
}

impl Threads {
    fn new(places: usize) -> Self {
        Self {
            waiting: Vec::new(),
            seen: vec![false; places],
        }
    }

    fn clear(&mut self) {
        self.waiting.clear();
        self.seen.fill(false);
    }

    /// Follows the program from a place without taking a character; true where it has matched.
    fn add(&mut self, program: &[Step], text: &[char], place: usize, at: usize) -> bool {
        let mut open = vec![place];
        while let Some(place) = open.pop() {
            let Some(seen) = self.seen.get_mut(place) else {
                continue;
            };
            if std::mem::replace(seen, true) {
                continue;
            }
            match program.get(place) {
                Some(Step::Match) => return true,
                Some(Step::One(_)) => self.waiting.push(place),
                Some(Step::Split(one, other)) => open.extend([*one, *other]),
                Some(Step::Assert(assertion)) if holds(*assertion, text, at) => {
                    open.push(place + 1)
                }
                Some(Step::Assert(_)) | None => {}
            }
        }
        false
    }
}

fn holds(assertion: Assertion, text: &[char], at: usize) -> bool {
    let is_word = |at: Option<usize>| {
        let character = at.and_then(|at| text.get(at));
        character.is_some_and(|character| character.is_ascii_alphanumeric() || *character == '_')
    };
    let at_boundary = is_word(at.checked_sub(1)) != is_word(Some(at));
    match assertion {
        Assertion::Begin => at == 0,
        Assertion::End => at == text.len(),
        Assertion::WordBoundary => at_boundary,
        Assertion::NoWordBoundary => !at_boundary,
    }
}
