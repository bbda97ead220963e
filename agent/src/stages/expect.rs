//! Whether an answer is the expected one, and what to say where it is not.
//!
//! Pure: an answer and pipeline.yaml's `expect` in, a judgement out.

use serde_json::Value;

use crate::builds::Cause;
use crate::cluster::proxy::{Answer, Asked};
use crate::pipeline::Expect;

/// Stands in `expect: json` for the commit that is built.
const COMMIT: &str = "$commit";
const BODY_CHARS_SHOWN: usize = 160;
const BODY_BYTES_KEPT: usize = 16 * 1024;

/// Why an answer is not good. The sentences go on after `GET /path of pod NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wrong {
    /// Believed when it stays so for a few seconds.
    Settled(Cause),
    /// May still come until the test's own limit.
    NotYet(Cause),
    /// Nothing was seen.
    Blind(String),
    Forbidden(String),
    /// The pod that was asked is no more.
    Gone,
}

/// Judges one request.
pub fn judge(expect: &Expect, commit: &str, asked: &Asked) -> Result<(), Wrong> {
    match asked {
        Asked::Answered(answer) => judge_answer(expect, commit, answer),
        Asked::NoEndpoints => Err(Wrong::Settled(
            Cause::new(
                "smoke_no_endpoint",
                "reached nobody: the Service leads to no pod that is ready",
            )
            .hint("compare the Service's selector and targetPort with the pods"),
        )),
        Asked::NobodyThere(why) => Err(Wrong::NotYet(
            Cause::new("smoke_no_answer", format!("was not answered: {why}")).hint(
                "does the program listen on this port, and on 0.0.0.0 rather than 127.0.0.1?",
            ),
        )),
        Asked::Gone => Err(Wrong::Gone),
        Asked::Unreached(why) | Asked::Blind(why) => Err(Wrong::Blind(why.clone())),
        Asked::Forbidden(why) => Err(Wrong::Forbidden(why.clone())),
    }
}

/// Whether only the release's own pods can answer so.
pub fn names_commit(expect: &Expect) -> bool {
    let mut wanted = expect.json.iter().flat_map(|members| members.values());
    wanted.any(mentions_commit)
}

fn mentions_commit(wanted: &Value) -> bool {
    wanted.to_string().contains(COMMIT)
}

fn judge_answer(expect: &Expect, commit: &str, answer: &Answer) -> Result<(), Wrong> {
    if answer.status != expect.status {
        let sentence = format!(
            "answered {} and not {}{}",
            answer.status,
            expect.status,
            shown(&answer.body)
        );
        let cause = Cause::new("smoke_wrong_status", sentence);
        // Programs and the balancers before them say so that they are not ready yet.
        let may_come = matches!(answer.status, 429 | 502 | 503 | 504);
        return Err(if may_come {
            Wrong::NotYet(cause)
        } else {
            Wrong::Settled(cause)
        });
    }
    if let Some(text) = &expect.body_contains
        && !String::from_utf8_lossy(&answer.body).contains(text.as_str())
    {
        let sentence = format!("answered without the text {text:?}{}", shown(&answer.body));
        return Err(Wrong::Settled(Cause::new("smoke_wrong_body", sentence)));
    }
    let Some(members) = &expect.json else {
        return Ok(());
    };
    let Ok(Value::Object(body)) = serde_json::from_slice(&answer.body) else {
        let sentence = format!("answered no JSON object{}", shown(&answer.body));
        return Err(Wrong::Settled(Cause::new("smoke_wrong_body", sentence)));
    };
    for (key, wanted) in members {
        let is_version = mentions_commit(wanted);
        let wanted = with_commit(wanted, commit);
        let got = body.get(key);
        if got == Some(&wanted) {
            continue;
        }
        let got = got.map_or_else(|| "nothing".to_owned(), Value::to_string);
        let id = if is_version {
            "smoke_wrong_version"
        } else {
            "smoke_wrong_body"
        };
        let sentence = format!("answered {key} = {} and not {wanted}", cut(&got));
        return Err(Wrong::Settled(Cause::new(id, sentence)));
    }
    Ok(())
}

fn with_commit(value: &Value, commit: &str) -> Value {
    match value {
        Value::String(text) => Value::String(text.replace(COMMIT, commit)),
        Value::Array(items) => items.iter().map(|item| with_commit(item, commit)).collect(),
        Value::Object(members) => Value::Object(
            members
                .iter()
                .map(|(key, value)| (key.clone(), with_commit(value, commit)))
                .collect(),
        ),
        other => other.clone(),
    }
}

/// What is kept of a request that failed: the status, and the beginning of the body as it came.
pub fn in_full(asked: &Asked) -> String {
    match asked {
        Asked::Answered(answer) => {
            let shown = answer.body.get(..BODY_BYTES_KEPT).unwrap_or(&answer.body);
            let cut = match answer.body.len() > shown.len() {
                true => format!("\n… ({} bytes)", answer.body.len()),
                false => String::new(),
            };
            format!(
                "{} in {} ms\n\n{}{cut}",
                answer.status,
                answer.took.as_millis(),
                String::from_utf8_lossy(shown)
            )
        }
        Asked::NoEndpoints => "the Service leads to no pod that is ready".to_owned(),
        Asked::Gone => "the pod is gone".to_owned(),
        Asked::NobodyThere(why)
        | Asked::Unreached(why)
        | Asked::Blind(why)
        | Asked::Forbidden(why) => why.clone(),
    }
}

/// What the log says of one request: `200 in 4 ms`.
pub fn outcome(asked: &Asked, judged: &Result<(), Wrong>) -> String {
    let answer = match asked {
        Asked::Answered(answer) => {
            let way = if answer.forwarded {
                ", by a port-forward"
            } else {
                ""
            };
            format!("{} in {} ms{way}", answer.status, answer.took.as_millis())
        }
        _ => String::new(),
    };
    let trouble = match judged {
        Ok(()) => String::new(),
        Err(Wrong::Settled(cause) | Wrong::NotYet(cause)) => cause.sentence.clone(),
        Err(Wrong::Blind(why)) => format!("the cluster cannot pass it on just now: {why}"),
        Err(Wrong::Forbidden(why)) => why.clone(),
        Err(Wrong::Gone) => "the pod is gone".to_owned(),
    };
    match (answer.is_empty(), trouble.is_empty()) {
        (_, true) => answer,
        (true, false) => trouble,
        (false, false) => format!("{answer}: {trouble}"),
    }
}

/// The line less its milliseconds: two that differ in them only say the same.
pub fn without_time(line: &str) -> &str {
    line.split_once(" in ").map_or(line, |(before, _)| before)
}

fn shown(body: &[u8]) -> String {
    let text =
        String::from_utf8_lossy(body.get(..4 * BODY_CHARS_SHOWN).unwrap_or(body)).into_owned();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if text.is_empty() {
        String::new()
    } else {
        format!(": {}", cut(&text))
    }
}

fn cut(text: &str) -> String {
    let clean: String = text.chars().filter(|c| !c.is_control()).collect();
    match clean.char_indices().nth(BODY_CHARS_SHOWN) {
        Some((end, _)) => format!("{}…", clean.get(..end).unwrap_or_default()),
        None => clean,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn judged(expect: Value, status: u16, body: &str) -> Result<(), String> {
        let expect: Expect = serde_json::from_value(expect).unwrap();
        let asked = Asked::Answered(Answer {
            status,
            body: body.as_bytes().to_vec(),
            took: Duration::ZERO,
            forwarded: false,
        });
        judge(&expect, "abc123", &asked).map_err(|wrong| match wrong {
            Wrong::Settled(cause) => format!("{}: {}", cause.id, cause.sentence),
            other => format!("{other:?}"),
        })
    }

    #[test]
    fn what_is_expected_is_good() {
        assert_eq!(judged(json!({}), 200, ""), Ok(()));
        assert_eq!(judged(json!({"status": 204}), 204, ""), Ok(()));
        assert_eq!(
            judged(
                json!({"json": {"status": "healthy"}}),
                200,
                r#"{"status":"healthy","more":1}"#
            ),
            Ok(())
        );
        assert_eq!(
            judged(
                json!({"json": {"commit": "$commit", "n": 1}}),
                200,
                r#"{"n":1,"commit":"abc123"}"#
            ),
            Ok(())
        );
        assert_eq!(
            judged(json!({"body_contains": "Hello"}), 200, "Hello, World!"),
            Ok(())
        );
    }

    #[test]
    fn each_wrong_answer_has_its_cause() {
        let said = |expect, status, body| judged(expect, status, body).unwrap_err();
        assert_eq!(
            said(json!({}), 500, "boom\nat line 3"),
            "smoke_wrong_status: answered 500 and not 200: boom at line 3"
        );
        assert!(said(json!({}), 503, "").starts_with("NotYet"));
        assert_eq!(
            said(
                json!({"json": {"commit": "$commit"}}),
                200,
                r#"{"commit":"old"}"#
            ),
            "smoke_wrong_version: answered commit = \"old\" and not \"abc123\""
        );
        assert_eq!(
            said(json!({"json": {"a": true}}), 200, "{}"),
            "smoke_wrong_body: answered a = nothing and not true"
        );
        assert!(
            said(json!({"json": {"a": true}}), 200, "[1]")
                .starts_with("smoke_wrong_body: answered no JSON object: [1]")
        );
        assert!(
            said(
                json!({"body_contains": "x"}),
                200,
                &"é\u{1b}[31m".repeat(5000)
            )
            .len()
                < 600
        );
    }

    #[test]
    fn blindness_is_no_wrong_answer() {
        let judged = |asked: Asked| judge(&Expect::default(), "abc", &asked).unwrap_err();
        assert!(matches!(
            judged(Asked::Blind("etcdserver: request timed out".to_owned())),
            Wrong::Blind(_)
        ));
        assert!(matches!(
            judged(Asked::Unreached("i/o timeout".to_owned())),
            Wrong::Blind(_)
        ));
        assert_eq!(judged(Asked::Gone), Wrong::Gone);
        assert!(
            matches!(judged(Asked::NoEndpoints), Wrong::Settled(cause) if cause.id == "smoke_no_endpoint")
        );
        assert!(
            matches!(judged(Asked::NobodyThere(String::new())), Wrong::NotYet(cause) if cause.id == "smoke_no_answer")
        );
    }
}
