//! Escapes that a body could have done without.
//!
//! `json.dumps` writes every letter beyond ASCII as `\u` and four digits. To read these takes a decoder
//! several times as long as letters, and it holds the interpreter's lock meanwhile; here nobody waits.

use std::borrow::Cow;

/// The same JSON, in which the letters of strings stand for themselves that were written as `\u....`. Quotes,
/// backslashes, control characters and halves of pairs stay as they are, and so does what is outside of
/// strings.
pub fn resolve(body: &[u8]) -> Cow<'_, [u8]> {
    if !body.windows(2).any(|two| two == b"\\u") {
        return Cow::Borrowed(body);
    }
    let mut plain = Vec::with_capacity(body.len());
    let (mut at, mut in_string) = (0, false);
    while let Some(next) = body[at..].iter().position(|byte| matches!(byte, b'"' | b'\\')) {
        plain.extend_from_slice(&body[at..at + next]);
        at += next;
        let (letter, len) = if body[at] == b'"' {
            in_string = !in_string;
            (None, 1)
        } else if in_string {
            letter(&body[at..]).map_or((None, 2), |(letter, len)| (Some(letter), len))
        } else {
            (None, 1)
        };
        match letter {
            Some(letter) => plain.extend_from_slice(letter.encode_utf8(&mut [0; 4]).as_bytes()),
            None => plain.extend_from_slice(&body[at..body.len().min(at + len)]),
        }
        at = body.len().min(at + len);
    }
    plain.extend_from_slice(&body[at..]);
    Cow::Owned(plain)
}

/// The letter whose escape a text begins with, and the bytes of the escape; None where it has to stay one.
fn letter(text: &[u8]) -> Option<(char, usize)> {
    let unit = unit(text)?;
    let (letter, len) = match unit {
        0xD800..=0xDBFF => {
            let pair = [unit, self::unit(&text[6..])?];
            (char::decode_utf16(pair).next()?.ok()?, 12)
        }
        _ => (char::from_u32(u32::from(unit))?, 6),
    };
    (letter >= ' ' && letter != '"' && letter != '\\').then_some((letter, len))
}

/// The number of the escape that a text begins with.
fn unit(text: &[u8]) -> Option<u16> {
    let [b'\\', b'u', digits @ ..] = text else { return None };
    let digits = digits.get(..4)?;
    let mut number = 0;
    for digit in digits {
        number = number * 16 + (*digit as char).to_digit(16)? as u16;
    }
    Some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::Value;

    fn resolved(body: &str) -> String {
        String::from_utf8(resolve(body.as_bytes()).into_owned()).unwrap()
    }

    proptest! {
        #[test]
        fn the_value_is_the_same(text in "[a\"\\\\\n\u{e9}\u{7f}\u{4e2d}\u{1F600}]{0,12}", other in any::<String>()) {
            let body = serde_json::to_string(&serde_json::json!({ &text: [&other, &text, 1.5, null] })).unwrap();
            let escape = |c: char| {
                let mut pair = [0; 2];
                let escaped = |unit: &u16| if c.is_ascii() { c.to_string() } else { format!("\\u{unit:04x}") };
                c.encode_utf16(&mut pair).iter().map(escaped).collect::<String>()
            };
            let dumped: String = body.chars().map(escape).collect();
            prop_assert_eq!(resolved(&dumped), body);
        }

        #[test]
        fn what_is_no_json_stays_so(body in "[a\"\\\\{}\\[\\],:ud8Cc0 9]{0,40}") {
            let before = serde_json::from_str::<Value>(&body).map_err(|_| ());
            prop_assert_eq!(serde_json::from_str::<Value>(&resolved(&body)).map_err(|_| ()), before);
        }
    }

    #[test]
    fn what_must_be_escaped_stays_escaped() {
        for body in [
            r#"["\u0022\u005c\u0000\u001f\n"]"#,
            r#"["\ud83d", "\ude00", "\ud83dx", "\ud83d\u0041"]"#, // halves of pairs
            r#"["\\u00e9", "\u00e", "\u00eg"]"#,
            r"[",
            r#"["\u00"#,
            r#"["\"#,
            r"[\u0031]", // which is no number either way
        ] {
            assert_eq!(resolved(body), body.replace(r"\u0041", "A"));
        }
        assert_eq!(resolved(r#"{"\u0061": "\uD83D\uDE00\u007f"}"#), "{\"a\": \"\u{1F600}\u{7f}\"}");
        assert!(matches!(resolve(b"[1]"), Cow::Borrowed(_)));
    }
}
