//! A list of texts, one of which is the answer.

use llguidance::api::TopLevelGrammar;

use super::kind::ConstraintKind;
use crate::error::Result;

/// Most texts of a list.
const MAX_CHOICES: usize = 10_000;

/// The grammar of a JSON list of texts.
pub(super) fn grammar(text: &str) -> Result<TopLevelGrammar> {
    let kind = ConstraintKind::Choice;
    let choices: Vec<String> =
        serde_json::from_str(text).map_err(|error| kind.invalid(format!("must be a list of texts: {error}")))?;
    if choices.is_empty() {
        return Err(kind.invalid("is an empty list, but must hold at least one text"));
    }
    if choices.len() > MAX_CHOICES {
        return Err(kind.too_complex(format!("has {} texts, but at most {MAX_CHOICES} are allowed", choices.len())));
    }
    if let Some(place) = choices.iter().position(String::is_empty) {
        return Err(kind.invalid(format!("[{place}] is empty: an answer has at least one token")));
    }
    choices.iter().try_for_each(|choice| kind.check_literal(choice.len()))?;
    let mut rule = String::with_capacity(2 * text.len() + 16);
    rule.push_str("start: ");
    for (number, choice) in choices.iter().enumerate() {
        if number > 0 {
            rule.push_str("\n | ");
        }
        quote(choice, &mut rule);
    }
    Ok(TopLevelGrammar::from_lark(rule))
}

/// Appends a text as Lark writes one: as JSON does, but for DEL.
pub(super) fn quote(text: &str, out: &mut String) {
    let quoted = serde_json::to_string(text).expect("a text is JSON");
    out.push_str(&quoted.replace('\u{7f}', "\\u007f"));
}
