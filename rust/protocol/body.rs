//! What the JSON body of a request holds, measured before anything of it becomes an object.
//!
//! Objects are many times as large as their text and are made under the interpreter's lock, so a
//! body of a few megabytes could stop every stream for seconds. One pass over the bytes, which
//! makes nothing, counts what it would become. It finds brackets and ends of strings and leaves the
//! rest of the grammar to whoever decodes the body.

use std::ops::Range;

use crate::error::{Error, Result};

/// What a body may hold.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Brackets within brackets; at most 64.
    pub depth: usize,
    /// Fields of the object that the body is.
    pub fields: usize,
    /// Keys and values, all but the names of the fields.
    pub values: usize,
}

/// A field of the object that the body is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Field {
    /// Where its name stands, in its quotes and with its escapes.
    pub name: Range<usize>,
    /// Where its value stands, with the blanks around it.
    pub value: Range<usize>,
    /// Characters of its strings, keys included, and bytes of its numbers and words.
    pub text: usize,
}

/// What a body holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measure {
    /// Its fields in order; none where it is no object.
    pub fields: Vec<Field>,
    /// Keys and values, all but the names of the fields.
    pub values: usize,
}

/// Measures a body.
///
/// The values of a field called `uncounted` are not counted: its own reader bounds them.
///
/// # Errors
/// [`Error::Body`]: it is over a limit, it is no UTF-8, or its brackets or strings do not end.
pub fn measure(body: &[u8], limits: &Limits, uncounted: Option<&str>) -> Result<Measure> {
    if let Err(error) = std::str::from_utf8(body) {
        return Err(malformed("it is not UTF-8", error.valid_up_to()));
    }
    Measurement { body, limits, uncounted, open: Vec::new(), fields: Vec::new(), name: None, field: None, values: 0 }
        .run()
}

struct Measurement<'a> {
    body: &'a [u8],
    limits: &'a Limits,
    uncounted: Option<&'a str>,
    /// The closing brackets that are awaited, the outermost first.
    open: Vec<u8>,
    fields: Vec<Field>,
    /// A string of the outermost object that may be a field's name.
    name: Option<Range<usize>>,
    /// The field whose value is being read.
    field: Option<Field>,
    values: usize,
}

impl Measurement<'_> {
    fn run(mut self) -> Result<Measure> {
        let mut at = 0;
        while let Some(&byte) = self.body.get(at) {
            let start = at;
            at += 1;
            match byte {
                b' ' | b'\t' | b'\n' | b'\r' => {}
                b'"' => {
                    let string = skip_string(self.body, start)?;
                    at = string.end;
                    if self.field.is_none() && self.open == b"}" {
                        self.name = Some(start..at);
                    } else {
                        self.add(string.characters)?;
                    }
                }
                b'{' | b'[' => {
                    self.add(0)?;
                    self.open.push(if byte == b'{' { b'}' } else { b']' });
                    if self.open.len() > self.limits.depth {
                        let message = format!("The JSON is nested more than {} deep.", self.limits.depth);
                        return Err(Error::body("json_too_deep", None, message));
                    }
                }
                b'}' | b']' => {
                    if self.open.pop() != Some(byte) {
                        return Err(malformed("unexpected bracket", start));
                    }
                    if self.open.is_empty() {
                        self.finish_field(start)?;
                    }
                }
                b',' => {
                    if self.open.len() == 1 {
                        self.finish_field(start)?;
                    }
                }
                b':' => {
                    if let (None, b"}", Some(name)) = (&self.field, self.open.as_slice(), self.name.take()) {
                        self.field = Some(Field { name, value: at..at, text: 0 });
                    }
                }
                _ => {
                    let more = |byte: &u8| {
                        !matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | b'"' | b',' | b':' | b'[' | b']' | b'{' | b'}')
                    };
                    at += self.body[at..].iter().take_while(|byte| more(byte)).count();
                    self.add(at - start)?;
                }
            }
        }
        if self.open.is_empty() {
            Ok(Measure { fields: self.fields, values: self.values })
        } else {
            Err(malformed("it ends too early", self.body.len()))
        }
    }

    /// Counts a value, or a key below the fields.
    fn add(&mut self, characters: usize) -> Result<()> {
        if let Some(field) = &mut self.field {
            field.text += characters;
            if self.uncounted.is_some_and(|name| is_called(self.body, field, name)) {
                return Ok(());
            }
        }
        self.values += 1;
        if self.values <= self.limits.values {
            return Ok(());
        }
        let name = self.field.as_ref().map(|field| shown_name(self.body, field));
        let shown = name.as_deref().unwrap_or("body");
        let message =
            format!("{shown}: the body holds more JSON values than the {} that are allowed.", self.limits.values);
        Err(Error::body("too_many_values", name, message))
    }

    fn finish_field(&mut self, end: usize) -> Result<()> {
        let Some(mut field) = self.field.take() else { return Ok(()) };
        field.value.end = end;
        self.fields.push(field);
        if self.fields.len() > self.limits.fields {
            let message = format!("The object may have at most {} fields.", self.limits.fields);
            return Err(Error::body("too_many_values", None, message));
        }
        Ok(())
    }
}

/// A string of the body.
pub(super) struct SkippedString {
    /// Just behind its closing quote.
    pub end: usize,
    /// What it would hold, with escapes taken as one character each.
    pub characters: usize,
}

/// Finds the end of the string whose opening quote is at `start`.
pub(super) fn skip_string(body: &[u8], start: usize) -> Result<SkippedString> {
    let mut at = start + 1;
    let mut characters = 0;
    loop {
        let plain = body[at..].iter().position(|byte| matches!(byte, b'"' | b'\\'));
        let Some(plain) = plain else { return Err(malformed("a string does not end", start)) };
        // All bytes but those that continue a character.
        characters += body[at..at + plain].iter().filter(|byte| **byte & 0xC0 != 0x80).count();
        at += plain;
        match body[at..] {
            [b'"', ..] => return Ok(SkippedString { end: at + 1, characters }),
            [b'\\', b'u', a, b, _, _, ..] => {
                at += 6;
                // The second half of a pair is one character with the first.
                characters += usize::from(!matches!((a, b), (b'd' | b'D', b'c'..=b'f' | b'C'..=b'F')));
            }
            [b'\\', _, ..] => {
                at += 2;
                characters += 1;
            }
            _ => return Err(malformed("a string does not end", start)),
        }
    }
}

/// Refuses a body whose JSON is wrong at a byte.
pub(super) fn malformed(what: &str, at: usize) -> Error {
    Error::body("json_invalid", None, format!("The body is not valid JSON: {what} (byte {at})."))
}

fn is_called(body: &[u8], field: &Field, name: &str) -> bool {
    let quoted = &body[field.name.clone()];
    quoted.len() == name.len() + 2 && &quoted[1..quoted.len() - 1] == name.as_bytes()
}

/// A field's name for a message; a client's name may be long.
fn shown_name(body: &[u8], field: &Field) -> String {
    let quoted = &body[field.name.clone()];
    String::from_utf8_lossy(&quoted[1..quoted.len() - 1]).chars().take(100).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{json, Value};

    const LIMITS: Limits = Limits { depth: 8, fields: 4, values: 10 };

    fn code(body: &str) -> &'static str {
        measure(body.as_bytes(), &LIMITS, Some("prompt")).unwrap_err().code()
    }

    /// Keys and values below the fields, and their text, counted on the decoded object.
    fn count(value: &Value) -> (usize, usize) {
        let add = |(a, b): (usize, usize), (c, d): (usize, usize)| (a + c, b + d);
        match value {
            Value::String(text) => (1, text.chars().count()),
            Value::Array(items) => items.iter().map(count).fold((1, 0), add),
            Value::Object(pairs) => {
                let pair = |(key, value): (&String, &Value)| add((1, key.chars().count()), count(value));
                pairs.iter().map(pair).fold((1, 0), add)
            }
            other => (1, other.to_string().len()),
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let text = "[a\"\\\\{}\\[\\],:\n\u{e9}\u{1F600}]{0,5}";
        let leaf = prop_oneof![Just(Value::Null), any::<i32>().prop_map(Value::from), text.prop_map(Value::from)];
        leaf.prop_recursive(4, 40, 4, move |inner| {
            let pairs = proptest::collection::btree_map(text, inner.clone(), 0..4);
            prop_oneof![
                proptest::collection::vec(inner, 0..4).prop_map(Value::from),
                pairs.prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn counts_are_those_of_the_decoded_object(a in any_json(), b in any_json(), spaced in any::<bool>(), ascii in any::<bool>()) {
            let object = json!({"a": a, "prompt": b});
            let mut body = if spaced { serde_json::to_string_pretty(&object) } else { serde_json::to_string(&object) }.unwrap();
            if ascii {
                // As `json.dumps` writes it.
                body = body.chars().flat_map(|c| {
                    let mut pair = [0; 2];
                    let escaped = |unit: &u16| if c.is_ascii() { c.to_string() } else { format!("\\u{unit:04x}") };
                    c.encode_utf16(&mut pair).iter().map(escaped).collect::<Vec<_>>()
                }).collect();
            }
            let (values, text) = count(&a);
            // The outermost object is a value too.
            let limits = Limits { depth: 64, fields: 2, values: values + 1 };
            let measured = measure(body.as_bytes(), &limits, Some("prompt")).unwrap();
            prop_assert_eq!(measured.values, values + 1);
            let fields = measured.fields;
            prop_assert_eq!(fields.len(), 2);
            prop_assert_eq!(fields[0].text, text);
            prop_assert_eq!(fields[1].text, count(&b).1);
            for (field, (name, value)) in fields.iter().zip([("a", &a), ("prompt", &b)]) {
                prop_assert_eq!(&body[field.name.clone()], &format!("\"{name}\""));
                prop_assert_eq!(&serde_json::from_str::<Value>(&body[field.value.clone()]).unwrap(), value);
            }
            let fewer = Limits { values, ..limits };
            prop_assert_eq!(measure(body.as_bytes(), &fewer, Some("prompt")).unwrap_err().code(), "too_many_values");
        }

        #[test]
        fn anything_is_measured_without_a_panic(body in "[a\"\\\\{}\\[\\],:u0d ]{0,40}") {
            let _ = measure(body.as_bytes(), &LIMITS, Some("prompt"));
        }
    }

    #[test]
    fn limits_are_seen_where_they_are_passed() {
        assert_eq!(code(&"[".repeat(1_000_000)), "json_too_deep");
        assert_eq!(code(r#"{"a": [1, 2, 3, 4, 5, 6, 7, 8, 9"#), "too_many_values"); // before the fault behind it
        assert_eq!(code(r#"{"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}"#), "too_many_values");
        assert!(measure(br#"{"prompt": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]}"#, &LIMITS, Some("prompt")).is_ok());
        let error = measure(br#"{"tools": [[],[],[],[],[],[],[],[],[],[]]}"#, &LIMITS, Some("prompt")).unwrap_err();
        assert_eq!(error.param(), Some("tools"));
    }

    #[test]
    fn what_does_not_end_is_malformed() {
        for body in ["{", "[1}", "]", "{\"a\": \"b", "{\"a\": \"b\\", "\"", "\"\\u12"] {
            assert_eq!(code(body), "json_invalid", "{body}");
        }
        assert_eq!(measure(b"{\"a\": \"\xc0\xaf\"}", &LIMITS, None).unwrap_err().code(), "json_invalid");
        assert_eq!(measure(b"", &LIMITS, Some("prompt")).unwrap().fields, []);
        assert_eq!(measure(b"[1, 2]", &LIMITS, Some("prompt")).unwrap().fields, []);
    }
}
