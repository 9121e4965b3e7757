//! The prompts of a text completion, read from the bytes of their field.
//!
//! They may be millions of token ids, which become integers here and never objects of Python.

use std::ops::Range;

use super::body::{malformed, skip_string};
use crate::error::{Error, Result};

/// What the prompts of a call may be.
#[derive(Debug, Clone, Copy)]
pub struct PromptLimits {
    /// Prompts of one call.
    pub prompts: usize,
    /// Tokens of one prompt: the model's length.
    pub tokens: u32,
    /// Characters of one prompt.
    pub characters: usize,
}

/// One prompt as a client gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Given {
    /// To be tokenised.
    Text(String),
    /// Token ids.
    Ids(Vec<u32>),
}

/// Reads the value at `value` of a body: a text, a list of texts, a list of ids, or a list of lists
/// of ids.
///
/// # Errors
/// [`Error::Body`]: it is something else, or over a limit.
pub fn read_prompts(body: &[u8], value: Range<usize>, limits: &PromptLimits) -> Result<Vec<Given>> {
    let mut reader = Reader { body: &body[..value.end], at: value.start, limits };
    let prompts = reader.prompts()?;
    match reader.next() {
        None => Ok(prompts),
        Some(_) => Err(malformed("unexpected characters", reader.at)),
    }
}

/// That a prompt is too long, in the words by which clients recognise it.
fn too_long(max_model_len: u32, what: &str) -> String {
    format!("prompt is too long: this model's maximum context length is {max_model_len} tokens; {what}")
}

struct Reader<'a> {
    body: &'a [u8],
    at: usize,
    limits: &'a PromptLimits,
}

impl Reader<'_> {
    fn prompts(&mut self) -> Result<Vec<Given>> {
        match self.next() {
            Some(b'"') => Ok(vec![Given::Text(self.text("prompt")?)]),
            Some(b'[') => self.list(),
            _ => Err(self.wrong_type("prompt", "text or an array")),
        }
    }

    fn list(&mut self) -> Result<Vec<Given>> {
        let start = self.at;
        self.at += 1;
        let first = self.next();
        if let Some(b'-' | b'0'..=b'9') = first {
            self.at = start;
            return Ok(vec![Given::Ids(self.ids("prompt")?)]);
        }
        let mut prompts = Vec::new();
        self.items(|reader| {
            let name = format!("prompt[{}]", prompts.len());
            if prompts.len() == reader.limits.prompts {
                let message = format!("prompt: at most {} prompts are allowed in one call", reader.limits.prompts);
                return Err(refused("invalid_value", &message));
            }
            let next = reader.next();
            prompts.push(match next {
                Some(b'"') if next == first => Given::Text(reader.text(&name)?),
                Some(b'[') if next == first => Given::Ids(reader.ids(&name)?),
                Some(b'"' | b'[' | b'-' | b'0'..=b'9') => {
                    let message = "prompt: text and token ids cannot be mixed in one list";
                    return Err(refused("invalid_type", message));
                }
                _ => return Err(reader.wrong_type(&name, "text, a token id or an array of token ids")),
            });
            Ok(())
        })?;
        if prompts.is_empty() {
            return Err(refused("invalid_value", "prompt: must not be empty"));
        }
        Ok(prompts)
    }

    /// Reads the rest of an array behind its opening bracket.
    fn items(&mut self, mut read: impl FnMut(&mut Self) -> Result<()>) -> Result<()> {
        if self.next() == Some(b']') {
            self.at += 1;
            return Ok(());
        }
        loop {
            read(self)?;
            match self.next() {
                Some(b',') => self.at += 1,
                Some(b']') => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return Err(malformed("expected , or ]", self.at)),
            }
        }
    }

    fn ids(&mut self, name: &str) -> Result<Vec<u32>> {
        self.at += 1;
        let mut ids = Vec::new();
        self.items(|reader| {
            if ids.len() == reader.limits.tokens as usize {
                let what = format!("{name} has more");
                return Err(refused("context_length_exceeded", &too_long(reader.limits.tokens, &what)));
            }
            ids.push(reader.id(name, ids.len())?);
            Ok(())
        })?;
        Ok(ids)
    }

    fn id(&mut self, name: &str, index: usize) -> Result<u32> {
        let Some(b'-' | b'0'..=b'9') = self.next() else {
            return Err(self.wrong_type(&format!("{name}[{index}]"), "a token id"));
        };
        let start = self.at;
        let in_number = |byte: &u8| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
        self.at += self.body[start..].iter().take_while(|byte| in_number(byte)).count();
        let number = &self.body[start..self.at];
        let digits = number.strip_prefix(b"-").unwrap_or(number);
        match digits {
            [] | [b'0', b'0'..=b'9', ..] => return Err(malformed("not a number", start)),
            _ if !digits.iter().all(u8::is_ascii_digit) => {
                return Err(refused(
                    "invalid_type",
                    &format!("{name}[{index}]: expected a token id, got a number that is no integer"),
                ));
            }
            _ => {}
        }
        let id = std::str::from_utf8(number).ok().and_then(|number| number.parse::<i64>().ok());
        id.and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| refused("token_id_out_of_range", &format!("{name}[{index}]: token id out of range")))
    }

    fn text(&mut self, name: &str) -> Result<String> {
        let start = self.at;
        let string = skip_string(self.body, start)?;
        self.at = string.end;
        let PromptLimits { tokens, characters: most, .. } = *self.limits;
        if string.characters > most {
            let what = format!("{name} has {} characters, more than the {most} that are read", string.characters);
            return Err(refused("context_length_exceeded", &too_long(tokens, &what)));
        }
        serde_json::from_slice(&self.body[start..self.at]).map_err(|error| {
            let error = error.to_string();
            malformed(error.split(" at line ").next().unwrap_or(&error), start)
        })
    }

    /// The first byte of what comes next.
    fn next(&mut self) -> Option<u8> {
        self.at += self.body[self.at..].iter().take_while(|byte| byte.is_ascii_whitespace()).count();
        self.body.get(self.at).copied()
    }

    fn wrong_type(&mut self, name: &str, expected: &str) -> Error {
        let got = match self.next() {
            Some(b'"') => "text",
            Some(b'[') => "an array",
            Some(b'{') => "an object",
            Some(b't' | b'f') => "a boolean",
            Some(b'n') => "null",
            Some(b'-' | b'0'..=b'9') => "a number",
            _ => return malformed("a value is missing", self.at),
        };
        refused("invalid_type", &format!("{name}: expected {expected}, got {got}"))
    }
}

fn refused(code: &'static str, message: &str) -> Error {
    Error::body(code, Some("prompt".to_owned()), format!("{message}."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    const LIMITS: PromptLimits = PromptLimits { prompts: 3, tokens: 4, characters: 5 };

    fn read(text: &str) -> Result<Vec<Given>> {
        read_prompts(text.as_bytes(), 0..text.len(), &LIMITS)
    }

    #[test]
    fn the_four_forms() {
        let texts = |texts: &[&str]| texts.iter().map(|text| Given::Text((*text).to_owned())).collect::<Vec<_>>();
        assert_eq!(read(r#" "a\nb" "#).unwrap(), texts(&["a\nb"]));
        assert_eq!(read(r#"["a", "", "\ud83d\ude00"]"#).unwrap(), texts(&["a", "", "\u{1F600}"]));
        assert_eq!(read("[1, 0 ,4294967295]").unwrap(), [Given::Ids(vec![1, 0, u32::MAX])]);
        assert_eq!(read("[[1],[2,3],[]]").unwrap(), [vec![1], vec![2, 3], vec![]].map(Given::Ids));
    }

    #[test]
    fn refusals_name_what_is_wrong() {
        for (text, code) in [
            ("", "json_invalid"),
            ("5", "invalid_type"),
            ("null", "invalid_type"),
            ("{}", "invalid_type"),
            ("[]", "invalid_value"),
            ("[1, \"a\"]", "invalid_type"),
            ("[\"a\", 1]", "invalid_type"),
            ("[[1], \"a\"]", "invalid_type"),
            ("[[\"a\"]]", "invalid_type"),
            ("[[[1]]]", "invalid_type"),
            ("[1.5]", "invalid_type"),
            ("[1e2]", "invalid_type"),
            ("[true]", "invalid_type"),
            ("[null]", "invalid_type"),
            ("[01]", "json_invalid"),
            ("[-]", "json_invalid"),
            ("[1 2]", "json_invalid"),
            ("[1,]", "json_invalid"),
            ("[1] 2", "json_invalid"),
            ("[-1]", "token_id_out_of_range"),
            ("[4294967296]", "token_id_out_of_range"),
            ("[18446744073709551616]", "token_id_out_of_range"),
            ("[1, 2, 3, 4, 5", "context_length_exceeded"),
            ("\"123456\"", "context_length_exceeded"),
            ("[\"a\", \"123456\"]", "context_length_exceeded"),
            ("[\"a\",\"a\",\"a\",\"a\"]", "invalid_value"),
            ("\"\\ud800\"", "json_invalid"),
            ("\"\x01\"", "json_invalid"),
        ] {
            assert_eq!(read(text).unwrap_err().code(), code, "{text}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_what_a_json_parser_reads(text in "[\\[\\]\"\\\\, 0-9a.\\-]{0,12}") {
            if let Ok(given) = read(&text) {
                let same = |given: &Given, value: &Value| match given {
                    Given::Text(text) => value == text,
                    Given::Ids(ids) => *value == Value::from(ids.clone()),
                };
                let parsed: Value = serde_json::from_str(&text).unwrap();
                let read_the_same = match &given[..] {
                    [one] if same(one, &parsed) => true,
                    several => {
                        let parsed = parsed.as_array().unwrap();
                        parsed.len() == several.len() && several.iter().zip(parsed).all(|(a, b)| same(a, b))
                    }
                };
                prop_assert!(read_the_same);
            }
        }
    }
}
