//! What is said, to whom it waits, and how long: the rules of `github.rs` without a network.

use super::*;
use crate::builds::{BuildKind, Cause};

const SHA: &str = "0123456789012345678901234567890123456789";

fn build(status: Status) -> Build {
    Build {
        id: 42,
        environment: "hello".to_owned(),
        repository: "acme/hello".to_owned(),
        branch: "main".to_owned(),
        commit: SHA.to_owned(),
        title: String::new(),
        by: String::new(),
        kind: BuildKind::Push,
        status,
        outcome: Outcome::Unchanged,
        cause: None,
        stage: None,
        attempt: 1,
        fence: 1,
        image: None,
        release_id: None,
        queued_at: 0,
        started_at: Some(1_000),
        finished_at: status.is_terminal().then_some(43_000),
        cancel_requested: false,
        superseded_by: None,
        restored_release: None,
    }
}

fn said(build: &Build, is_pending: bool, siblings: Siblings) -> Option<String> {
    match next(build, is_pending, siblings, 50_000) {
        Next::Say(word) => Some(format!("{}: {}", word.state, word.description)),
        Next::Silence => Some("silence".to_owned()),
        Next::Wait => None,
    }
}

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    pairs
        .iter()
        .map(|(name, value)| {
            (
                hyper::header::HeaderName::from_static(name),
                value.parse().unwrap(),
            )
        })
        .collect()
}

#[test]
fn every_status_has_its_word() {
    let alone = Siblings::default();
    let word = |status| said(&build(status), false, alone).unwrap();
    assert_eq!(word(Status::Queued), "pending: in progress");
    assert_eq!(
        word(Status::Passed),
        "success: nothing to change, after 42.0 s"
    );
    assert_eq!(word(Status::Failed), "failure: failed");
    assert_eq!(word(Status::Canceled), "failure: canceled");
    assert_eq!(word(Status::Errored), "error: errored");
    assert_eq!(word(Status::Skipped), "success: not built: skipped");
    let mut superseded = build(Status::Superseded);
    superseded.superseded_by = Some(43);
    assert_eq!(
        said(&superseded, true, alone).unwrap(),
        "success: not built: superseded by build #43"
    );
}

#[test]
fn a_commit_that_was_judged_never_turns_green_by_being_skipped() {
    let judged = Siblings {
        finished: 1,
        ..Siblings::default()
    };
    let coming = Siblings {
        coming: 1,
        ..judged
    };
    let live = Siblings {
        live: 1,
        ..Siblings::default()
    };
    let shown = Siblings { shown: 1, ..judged };
    // What was sent, and of which nobody heard whether it came, is followed by no pending; but silence relies on what is known.
    let attempted = Siblings {
        attempted: 1,
        ..Siblings::default()
    };
    assert_eq!(said(&build(Status::Running), false, attempted), None);
    assert!(said(&build(Status::Superseded), true, attempted).is_some());
    for status in [Status::Skipped, Status::Superseded] {
        for (siblings, is_pending) in [(judged, false), (live, true), (shown, true)] {
            let said = said(&build(status), is_pending, siblings);
            assert_eq!(said.unwrap(), "silence");
        }
        assert_eq!(said(&build(status), true, coming), None);
        // Nothing else would ever end what GitHub shows as pending.
        let said = said(&build(status), true, judged).unwrap();
        assert!(said.starts_with("error: not built: "), "{said}");
    }
}

#[test]
fn what_is_pending_is_brought_to_its_end_however_old_it_is() {
    let late = 43_000 + millis(AGE_MAX) + 1;
    let passed = build(Status::Passed);
    let alone = Siblings::default();
    let judged = Siblings {
        finished: 1,
        ..alone
    };
    let said = |is_pending, siblings| match next(&passed, is_pending, siblings, late) {
        Next::Say(word) => word.state,
        _ => "nothing",
    };
    assert_eq!(said(false, alone), "nothing");
    assert_eq!(said(true, alone), "success");
    // A later judgement that was never told may have been a bad one.
    assert_eq!(said(true, judged), "error");
}

#[test]
fn pending_is_said_once_and_never_over_a_final_state() {
    let shown = Siblings {
        shown: 1,
        finished: 1,
        ..Siblings::default()
    };
    assert_eq!(
        said(&build(Status::Running), true, Siblings::default()),
        None
    );
    assert_eq!(said(&build(Status::Running), false, shown), None);
    assert!(said(&build(Status::Failed), true, shown).is_some());
}

#[test]
fn a_build_waits_until_its_commit_is_known() {
    let mut manual = build(Status::Queued);
    manual.commit = String::new();
    assert_eq!(said(&manual, false, Siblings::default()), None);
    manual.status = Status::Errored;
    assert_eq!(
        said(&manual, false, Siblings::default()).unwrap(),
        "silence"
    );
}

#[test]
fn a_description_has_one_line_of_140_characters_that_github_takes() {
    let mut failed = build(Status::Failed);
    failed.outcome = Outcome::RolledBack;
    let sentence = format!("tests\n\tfailed \u{1b}[31m 🚀 {}", "ü".repeat(300));
    failed.cause = Some(Cause::new("tests_failed", sentence));
    let Next::Say(word) = next(&failed, false, Siblings::default(), 0) else {
        panic!("nothing is said")
    };
    assert_eq!(word.description.chars().count(), DESCRIPTION_CHARS_MAX);
    assert!(
        word.description
            .starts_with("rolled back: tests failed [31m \u{fffd} üü"),
        "{}",
        word.description
    );
    assert!(word.description.ends_with("ü…"));
    assert!(
        word.description
            .chars()
            .all(|c| c <= '\u{ffff}' && !c.is_control())
    );
    assert_eq!(shorten(&"x".repeat(140)), "x".repeat(140));
}

#[test]
fn limits_are_kept_to_the_second() {
    let until = |code, pairs: &[(&'static str, &str)], message: &str| match judge(
        code,
        &headers(pairs),
        message,
        0,
        1_000_000,
    ) {
        Sent::Later {
            whom: Whom::Everyone,
            at,
            ..
        } => at,
        other => panic!("{other:?}"),
    };
    assert_eq!(until(403, &[("retry-after", "30")], ""), 1_030_000);
    assert_eq!(until(429, &[("retry-after", "7")], ""), 1_007_000);
    let used_up = [
        ("x-ratelimit-remaining", "0"),
        ("x-ratelimit-reset", "1100"),
    ];
    assert_eq!(until(403, &used_up, ""), 1_101_000);
    assert_eq!(
        until(403, &[], "You have exceeded a secondary rate limit"),
        1_060_000
    );
    assert_eq!(
        until(429, &[("retry-after", "99999999999")], ""),
        1_000_000 + millis(LIMIT_MAX)
    );
}

#[test]
fn answers_make_those_wait_whom_they_concern() {
    let whom = |code, tries| match judge(code, &HeaderMap::new(), "", tries, 0) {
        Sent::Later { whom, .. } => Some(whom),
        _ => None,
    };
    assert_eq!(whom(401, 1000), Some(Whom::Everyone));
    for code in [500, 502, 503] {
        assert_eq!(whom(code, 0), Some(Whom::Everyone), "{code}");
        assert_eq!(whom(code, ALONE_AFTER), Some(Whom::Repository), "{code}");
    }
    for code in [200, 301, 403, 404] {
        assert_eq!(whom(code, 1000), Some(Whom::Repository), "{code}");
    }
    assert_eq!(whom(422, 0), Some(Whom::Commit));
    assert_eq!(whom(422, REFUSALS_MAX), None);
    assert_eq!(judge(201, &HeaderMap::new(), "", 0, 0), Sent::Told);
    for one in Whom::ALL {
        assert_eq!(Whom::of(&format!("{}: 404 x", one.as_str())), one);
    }
}

#[test]
fn backoff_grows_to_its_limit_and_no_further() {
    assert!(backoff(0) <= BACKOFF_FIRST && backoff(0) >= BACKOFF_FIRST / 2);
    for tries in [20, 1_000_000, -1] {
        assert!(backoff(tries) <= BACKOFF_MAX, "{tries}");
    }
    assert!(backoff(20) >= BACKOFF_MAX / 2);
}

#[test]
fn names_cannot_leave_their_place_in_the_address() {
    assert_eq!(
        repository_path("acme/he llo?x").unwrap(),
        "/repos/acme/he%20llo%3Fx"
    );
    for odd in ["", "acme", "/x", "a/", "a/b/c"] {
        assert!(repository_path(odd).is_none(), "{odd}");
    }
}
