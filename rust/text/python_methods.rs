//! Methods of Python's strings, lists and dictionaries that templates call, where minijinja-contrib
//! has none or another meaning of whitespace and line ends.

use minijinja::value::{from_args, Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

/// Calls `method` of `value`.
pub(crate) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let result = match (value.as_str(), value.kind()) {
        (Some(text), _) if method == "format" => {
            pay_for_widths(state, text)?;
            None
        }
        (Some(text), _) => string_method(text, method, args)?,
        (None, ValueKind::Seq) => list_method(value, method, args)?,
        (None, ValueKind::Map) if method == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        _ => None,
    };
    match result {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// Pays in advance for the widths that the replacement fields of a `str.format` string ask for.
fn pay_for_widths(state: &State, text: &str) -> Result<(), Error> {
    text.split(|c: char| !c.is_ascii_digit())
        .filter(|digits| !digits.is_empty())
        .try_for_each(|digits| state.consume_fuel(digits.parse::<u64>().unwrap_or(u64::MAX) / 64))
}

/// What Python's `str.isspace` holds for: also the information separators.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || matches!(c, '\u{1c}'..='\u{1f}')
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            Value::from(match method {
                "strip" => text.trim_matches(strips),
                "lstrip" => text.trim_start_matches(strips),
                _ => text.trim_end_matches(strips),
            })
        }
        "split" | "rsplit" => {
            let (separator, limit): (Option<&str>, Option<i64>) = from_args(args)?;
            let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
            split(text, separator, limit, method == "rsplit")?.into_iter().map(Value::from).collect()
        }
        "splitlines" => {
            let (keep_ends,): (Option<bool>,) = from_args(args)?;
            split_lines(text, keep_ends.unwrap_or(false)).into_iter().map(Value::from).collect()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let found = if method == "partition" { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match (found, method) {
                (Some((before, after)), _) => [before, separator, after],
                (None, "partition") => [text, "", ""],
                (None, _) => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "index" => {
            let (part,): (&str,) = from_args(args)?;
            let at = text.find(part).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        "isspace" => {
            let () = from_args(args)?;
            Value::from(!text.is_empty() && text.chars().all(is_space))
        }
        _ => return Ok(None),
    }))
}

fn list_method(list: &Value, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(match method {
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let index = list.try_iter()?.position(|item| item == *wanted);
            Some(Value::from(index.ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "value is not in list"))?))
        }
        "copy" => {
            let () = from_args(args)?;
            Some(list.clone())
        }
        _ => None,
    })
}

/// `str.split` and `str.rsplit` with at most `limit` cuts.
fn split<'a>(text: &'a str, separator: Option<&str>, limit: usize, from_right: bool) -> Result<Vec<&'a str>, Error> {
    let mut parts = match (separator, from_right) {
        (Some(""), _) => return Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
        (Some(separator), false) => text.splitn(limit.saturating_add(1), separator).collect(),
        (Some(separator), true) => text.rsplitn(limit.saturating_add(1), separator).collect(),
        (None, _) => {
            let mut words = Vec::new();
            let mut rest = text;
            loop {
                rest = if from_right { rest.trim_end_matches(is_space) } else { rest.trim_start_matches(is_space) };
                if rest.is_empty() {
                    break words;
                }
                let cut = if from_right {
                    rest.char_indices().rev().find(|&(_, c)| is_space(c)).map(|(at, c)| at + c.len_utf8())
                } else {
                    rest.find(is_space)
                };
                let Some(cut) = cut.filter(|_| words.len() < limit) else {
                    // The last part keeps the spaces on its other side.
                    words.push(rest);
                    break words;
                };
                let (left, right) = rest.split_at(cut);
                words.push(if from_right { right } else { left });
                rest = if from_right { left } else { right };
            }
        }
    };
    if from_right {
        parts.reverse();
    }
    Ok(parts)
}

/// `str.splitlines`.
fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let is_end = |c: char| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(end) = rest.find(is_end) {
        let line_end =
            if rest[end..].starts_with("\r\n") { 2 } else { rest[end..].chars().next().map_or(0, char::len_utf8) };
        lines.push(&rest[..if keep_ends { end + line_end } else { end }]);
        rest = &rest[end + line_end..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}
