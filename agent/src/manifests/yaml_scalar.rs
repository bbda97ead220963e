//! What a YAML 1.1 scalar means to kubectl: bool, null, number or text; and which text a key becomes.
//!
//! The rules are those of go.yaml.in/yaml/v2 as sigs.k8s.io/yaml uses it; `tests/it/yaml.rs` compares. Pure: no IO.

use base64::Engine;
use serde_json::{Number, Value};

/// A scalar before it becomes JSON: keys and values are written differently.
#[derive(Debug, Clone, PartialEq)]
pub enum Scalar {
    Null,
    Bool(bool),
    Int(i64),
    /// Greater than `i64::MAX`.
    Uint(u64),
    Float(f64),
    Text(String),
}

/// A scalar without quotes and without a tag.
pub fn plain(text: &str) -> Scalar {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Scalar::Null,
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => {
            Scalar::Bool(true)
        }
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            Scalar::Bool(false)
        }
        ".nan" | ".NaN" | ".NAN" => Scalar::Float(f64::NAN),
        ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" => Scalar::Float(f64::INFINITY),
        "-.inf" | "-.Inf" | "-.INF" => Scalar::Float(f64::NEG_INFINITY),
        _ => number(text).unwrap_or_else(|| Scalar::Text(text.to_owned())),
    }
}

/// A scalar with one of YAML's own tags, `!!int` and so on; quotes do not matter then.
pub fn tagged(kind: &str, text: &str) -> Result<Scalar, String> {
    let scalar = match kind {
        "str" => Scalar::Text(text.to_owned()),
        "binary" => {
            let digits: String = text.split_ascii_whitespace().collect();
            let bytes = base64::engine::general_purpose::STANDARD
                .decode(digits)
                .map_err(|_| "!!binary holds something that is not base64".to_owned())?;
            Scalar::Text(
                String::from_utf8(bytes)
                    .map_err(|_| "!!binary holds something that is not text".to_owned())?,
            )
        }
        "int" | "float" | "bool" | "null" | "timestamp" => plain(text),
        _ => Scalar::Text(text.to_owned()),
    };
    let fits = match (kind, &scalar) {
        ("int", Scalar::Int(_) | Scalar::Uint(_))
        | ("float", Scalar::Float(_) | Scalar::Int(_))
        | ("bool", Scalar::Bool(_))
        | ("null", Scalar::Null) => true,
        (known, _) => !matches!(known, "int" | "float" | "bool" | "null"),
    };
    if fits {
        Ok(scalar)
    } else {
        Err(format!("{text:?} is not of the type !!{kind}"))
    }
}

fn number(text: &str) -> Option<Scalar> {
    if !text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.')) {
        return None;
    }
    let text = text.replace('_', "");
    integer(&text).or_else(|| float(&text))
}

/// As Go's `strconv.ParseInt(text, 0, 64)`: `0x`, `0b`, `0o`, and octal after a leading zero.
fn integer(text: &str) -> Option<Scalar> {
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    let lower = unsigned.to_ascii_lowercase();
    let (radix, digits) = if let Some(digits) = lower.strip_prefix("0x") {
        (16, digits)
    } else if let Some(digits) = lower.strip_prefix("0b") {
        (2, digits)
    } else if let Some(digits) = lower.strip_prefix("0o") {
        (8, digits)
    } else if lower.len() > 1 && lower.starts_with('0') {
        (8, lower.get(1..)?)
    } else {
        (10, lower.as_str())
    };
    // `from_str_radix` would take a second sign.
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return None;
    }
    let magnitude = u64::from_str_radix(digits, radix).ok()?;
    if text.starts_with('-') {
        return 0_i64.checked_sub_unsigned(magnitude).map(Scalar::Int);
    }
    match i64::try_from(magnitude) {
        Ok(value) => Some(Scalar::Int(value)),
        Err(_) if text.starts_with('+') => None,
        Err(_) => Some(Scalar::Uint(magnitude)),
    }
}

fn float(text: &str) -> Option<Scalar> {
    // Rust reads `inf` and `nan` too; here only digits, one dot and an exponent count.
    let known = |c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '.' | 'e' | 'E');
    let value: f64 = text.chars().all(known).then(|| text.parse().ok())??;
    // Out of range is text, as in Go.
    value.is_finite().then_some(Scalar::Float(value))
}

impl Scalar {
    pub fn into_value(self) -> Result<Value, String> {
        Ok(match self {
            Self::Null => Value::Null,
            Self::Bool(value) => Value::Bool(value),
            Self::Int(value) => Value::from(value),
            Self::Uint(value) => Value::from(value),
            Self::Text(text) => Value::String(text),
            Self::Float(value) => {
                Value::Number(json_number(value).ok_or("infinity and NaN are not values of JSON")?)
            }
        })
    }

    pub fn into_key(self) -> Result<String, String> {
        Ok(match self {
            Self::Text(text) => text,
            Self::Bool(value) => value.to_string(),
            Self::Int(value) => value.to_string(),
            Self::Float(value) => float_key(value),
            Self::Null => return Err("a key is empty (null)".to_owned()),
            Self::Uint(value) => return Err(format!("the number {value} is too great for a key")),
        })
    }
}

/// As Go writes it: a float without fraction is written as an integer, and read back as one. None where not finite.
pub fn json_number(value: f64) -> Option<Number> {
    if value.abs() < 1e21 && !(value == 0.0 && value.is_sign_negative()) {
        // The shortest digits that mean this value, filled up with zeros: not the exact value.
        let digits = format!("{value}");
        if let Ok(integer) = digits.parse::<i64>() {
            return Some(integer.into());
        }
        if let Ok(integer) = digits.parse::<u64>() {
            return Some(integer.into());
        }
    }
    Number::from_f64(value)
}

/// As Go's `strconv.FormatFloat(value, 'g', -1, 32)`, with YAML's words for what is not finite.
fn float_key(value: f64) -> String {
    if value.is_nan() {
        return ".nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { ".inf" } else { "-.inf" }.to_owned();
    }
    #[allow(clippy::cast_possible_truncation)] // Go does the same.
    let value = value as f32;
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>().unwrap_or_default() {
        -4..=5 => format!("{value}"),
        exponent => format!(
            "{digits}e{}{:02}",
            if exponent < 0 { '-' } else { '+' },
            exponent.abs()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leading_zero_means_octal_and_words_are_booleans() {
        assert_eq!(plain("0644"), Scalar::Int(420));
        assert_eq!(plain("yes"), Scalar::Bool(true));
        assert_eq!(plain("OFF"), Scalar::Bool(false));
        assert_eq!(plain("0888"), Scalar::Float(888.0));
        assert_eq!(plain("1e400"), Scalar::Text("1e400".to_owned()));
        assert_eq!(plain("--5"), Scalar::Text("--5".to_owned()));
        assert_eq!(plain("12:30"), Scalar::Text("12:30".to_owned()));
        assert_eq!(plain("-9223372036854775808"), Scalar::Int(i64::MIN));
    }

    #[test]
    fn a_tag_that_does_not_fit_is_an_error() {
        assert_eq!(tagged("int", "5"), Ok(Scalar::Int(5)));
        assert!(tagged("int", "five").is_err());
        assert!(tagged("binary", "%%").is_err());
    }
}
