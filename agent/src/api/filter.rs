//! Which builds a list shows: `?environment=&branch=&status=&limit=&before=`, for pages and API alike.
//!
//! The line: `query → Filter → one page of builds`. Never guesses: what it does not know it names.

use std::borrow::Cow;

use crate::builds::{Build, Status};
use crate::store::{Filter, Store};

/// More than this in one answer is refused.
pub const LIMIT_MAX: i64 = 200;

/// Reads `?environment=&branch=&status=&limit=&before=`; empty values count as absent. The error is a sentence that
/// names what is wrong.
pub fn parse(query: Option<&str>) -> Result<Filter, String> {
    let mut filter = Filter::default();
    let mut seen: Vec<Cow<'_, str>> = Vec::new();
    for (key, value) in url::form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        if seen.contains(&key) {
            return Err(format!("the parameter {key:?} is given twice"));
        }
        seen.push(key.clone());
        let value = (!value.is_empty()).then(|| value.into_owned());
        match (key.as_ref(), value) {
            ("environment", value) => filter.environment = value,
            ("branch", value) => filter.branch = value,
            ("status", value) => {
                filter.status = value.as_deref().map(status).transpose()?;
            }
            ("limit", value) => {
                filter.limit = value
                    .map(|value| number("limit", &value, LIMIT_MAX))
                    .transpose()?;
            }
            ("before", value) => {
                filter.before = value
                    .map(|value| number("before", &value, i64::MAX))
                    .transpose()?;
            }
            (key, _) => {
                return Err(format!(
                    "unknown parameter {key:?}; known are environment, branch, status, limit, before"
                ));
            }
        }
    }
    Ok(filter)
}

fn status(text: &str) -> Result<Status, String> {
    text.parse().map_err(|_| {
        let known: Vec<&str> = Status::ALL.iter().map(|status| status.as_str()).collect();
        format!("unknown status {text:?}; known are {}", known.join(", "))
    })
}

fn number(name: &str, text: &str, max: i64) -> Result<i64, String> {
    text.parse()
        .ok()
        .filter(|number| (1..=max).contains(number))
        .ok_or_else(|| format!("{name} is {text:?}, and must be a number from 1 to {max}"))
}

/// One page of builds, newest first, and the `before` of the next page where there is one.
pub async fn page(store: &Store, filter: &Filter) -> anyhow::Result<(Vec<Build>, Option<i64>)> {
    let builds = store.builds(filter).await?;
    let Some(last) = builds.last().map(|build| build.id) else {
        return Ok((builds, None));
    };
    let further = Filter {
        before: Some(last),
        limit: Some(1),
        ..filter.clone()
    };
    let has_more = !store.builds(&further).await?.is_empty();
    Ok((builds, has_more.then_some(last)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_becomes_a_filter() {
        let filter = parse(Some(
            "environment=hello&branch=feature%2Fx+y&status=failed&limit=200&before=7",
        ))
        .unwrap();
        assert_eq!(filter.environment.as_deref(), Some("hello"));
        assert_eq!(filter.branch.as_deref(), Some("feature/x y"));
        assert_eq!(filter.status, Some(Status::Failed));
        assert_eq!((filter.limit, filter.before), (Some(200), Some(7)));
    }

    #[test]
    fn empty_values_are_absent() {
        let filter = parse(Some("environment=&branch=&status=&limit=&before=")).unwrap();
        assert!(filter.environment.is_none() && filter.status.is_none() && filter.limit.is_none());
        assert!(parse(None).is_ok() && parse(Some("")).is_ok());
    }

    #[test]
    fn what_is_unknown_is_named() {
        for (query, named) in [
            ("status=green", "green"),
            ("stauts=failed", "stauts"),
            ("limit=0", "limit"),
            ("limit=201", "200"),
            ("limit=-1", "limit"),
            ("before=x", "before"),
            ("before=99999999999999999999", "before"),
            ("status=failed&status=passed", "twice"),
        ] {
            let problem = parse(Some(query)).unwrap_err();
            assert!(problem.contains(named), "{query}: {problem}");
        }
    }
}
