//! JSON written by hand: replies are built without an object in between.

use std::io::Write;

/// Appends `text` as a JSON string with its quotes.
pub(super) fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    write_escaped(out, text);
    out.push(b'"');
}

/// Appends `text` as the inside of a JSON string.
///
/// Besides what JSON demands, U+0085, U+2028 and U+2029 are escaped: some clients split a stream's
/// lines as Python's `str.splitlines` does.
pub(super) fn write_escaped(out: &mut Vec<u8>, text: &str) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let bytes = text.as_bytes();
    let mut start = 0;
    let mut at = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        let length = match (byte, &bytes[at + 1..]) {
            (b'"' | b'\\' | ..0x20, _) => 1,
            (0xC2, [0x85, ..]) => 2,
            (0xE2, [0x80, 0xA8 | 0xA9, ..]) => 3,
            _ => {
                at += 1;
                continue;
            }
        };
        out.extend_from_slice(&bytes[start..at]);
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            0xC2 => out.extend_from_slice(b"\\u0085"),
            0xE2 if bytes[at + 2] == 0xA8 => out.extend_from_slice(b"\\u2028"),
            0xE2 => out.extend_from_slice(b"\\u2029"),
            control => {
                out.extend_from_slice(b"\\u00");
                out.extend_from_slice(&[HEX[usize::from(control >> 4)], HEX[usize::from(control & 15)]]);
            }
        }
        at += length;
        start = at;
    }
    out.extend_from_slice(&bytes[start..]);
}

/// Appends JSON that somebody else wrote, with nothing in it that ends a line: what does is white
/// space, or can be escaped.
pub(super) fn write_one_line(out: &mut Vec<u8>, json: &str) {
    for c in json.chars() {
        match c {
            '\n' | '\r' => out.push(b' '),
            '\u{85}' => out.extend_from_slice(b"\\u0085"),
            '\u{2028}' => out.extend_from_slice(b"\\u2028"),
            '\u{2029}' => out.extend_from_slice(b"\\u2029"),
            _ => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

/// Appends a string, or `null`.
pub(super) fn write_optional_string(out: &mut Vec<u8>, text: Option<&str>) {
    match text {
        Some(text) => write_string(out, text),
        None => out.extend_from_slice(b"null"),
    }
}

/// Appends an integer.
pub(super) fn write_integer(out: &mut Vec<u8>, number: u64) {
    write!(out, "{number}").expect("writing to a Vec cannot fail");
}

/// Appends a log probability. JSON has no infinities: that of a banned token is written as -9999,
/// as vLLM does.
pub(super) fn write_logprob(out: &mut Vec<u8>, logprob: f32) {
    let finite = if logprob.is_finite() { logprob } else { -9999.0 };
    write!(out, "{finite}").expect("writing to a Vec cannot fail");
}

/// Appends `[...]` with an entry for each item.
pub(super) fn write_list<T>(out: &mut Vec<u8>, items: impl IntoIterator<Item = T>, write: impl FnMut(&mut Vec<u8>, T)) {
    out.push(b'[');
    write_separated(out, items, write);
    out.push(b']');
}

/// Appends an entry for each item, with commas between them.
pub(super) fn write_separated<T>(
    out: &mut Vec<u8>,
    items: impl IntoIterator<Item = T>,
    mut write: impl FnMut(&mut Vec<u8>, T),
) {
    for (number, item) in items.into_iter().enumerate() {
        if number > 0 {
            out.push(b',');
        }
        write(out, item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn escaped_text_is_one_line_of_json(
            text in prop_oneof![any::<String>(), "[a\"\\\\\n\r\t\u{1f}\u{84}-\u{86}\u{2027}-\u{202a}]{0,8}"],
        ) {
            let mut out = Vec::new();
            write_string(&mut out, &text);
            let line_breaks = ['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}'];
            prop_assert!(!String::from_utf8_lossy(&out).contains(line_breaks));
            prop_assert_eq!(serde_json::from_slice::<String>(&out).unwrap(), text);
        }

        #[test]
        #[allow(clippy::float_cmp)] // The digits that are written make the same float again.
        fn log_probabilities_come_back_as_they_were(logprob in any::<f32>()) {
            let mut out = Vec::new();
            write_logprob(&mut out, logprob);
            let read: f64 = serde_json::from_slice(&out).unwrap();
            let expected = if logprob.is_finite() { logprob } else { -9999.0 };
            prop_assert_eq!(read as f32, expected);
        }
    }
}
