//! JSON as Python reads it: integers of any size, floats to their last digit, keys in their order.
//!
//! What clients send reaches a chat template through this; `serde_json` would make floats of
//! integers that 64 bits do not hold. Its feature `arbitrary_precision` keeps them, but for all
//! crates at once, `tokenizers` among them; and its `RawValue` reads a value once for each level
//! that it lies deep.

/// Deepest nesting, as in `serde_json`.
const MAX_DEPTH: usize = 128;

/// A JSON value. An object may have a key twice: the last one counts, in the place of the first.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    /// As it is written.
    Number(Box<str>),
    Text(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// Reads one value. The error says what is wrong and at which byte.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parser = Parser { text, at: 0 };
        let value = parser.value(0);
        let value = value.and_then(|value| match parser.peek() {
            None => Ok(value),
            Some(_) => Err("nothing more is allowed"),
        });
        value.map_err(|what| format!("{what} at byte {}", parser.at))
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

type Parsed<T> = Result<T, &'static str>;

impl Parser<'_> {
    /// The next byte that is no space.
    fn peek(&mut self) -> Option<u8> {
        let rest = &self.text.as_bytes()[self.at..];
        self.at += rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t' | b'\n' | b'\r')).count();
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip(&mut self, wanted: u8) -> bool {
        let found = self.peek() == Some(wanted);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, wanted: u8, otherwise: &'static str) -> Parsed<()> {
        if self.skip(wanted) {
            Ok(())
        } else {
            Err(otherwise)
        }
    }

    fn value(&mut self, depth: usize) -> Parsed<Json> {
        if depth > MAX_DEPTH {
            return Err("the nesting is too deep");
        }
        match self.peek().ok_or("a value is missing")? {
            b'"' => self.string().map(Json::Text),
            b'[' => self.array(depth),
            b'{' => self.object(depth),
            b'-' | b'0'..=b'9' => self.number(),
            _ => {
                let words = [("null", Json::Null), ("true", Json::Bool(true)), ("false", Json::Bool(false))];
                let rest = &self.text[self.at..];
                let (word, value) = words.into_iter().find(|(word, _)| rest.starts_with(word)).ok_or("no JSON")?;
                self.at += word.len();
                Ok(value)
            }
        }
    }

    fn array(&mut self, depth: usize) -> Parsed<Json> {
        let mut items = Vec::new();
        self.at += 1;
        if !self.skip(b']') {
            loop {
                items.push(self.value(depth + 1)?);
                if self.skip(b']') {
                    break;
                }
                self.expect(b',', "a comma or ] is missing")?;
            }
        }
        Ok(Json::Array(items))
    }

    fn object(&mut self, depth: usize) -> Parsed<Json> {
        let mut pairs = Vec::new();
        self.at += 1;
        if !self.skip(b'}') {
            loop {
                if self.peek() != Some(b'"') {
                    return Err("a key is missing");
                }
                let key = self.string()?;
                self.expect(b':', "a colon is missing")?;
                pairs.push((key, self.value(depth + 1)?));
                if self.skip(b'}') {
                    break;
                }
                self.expect(b',', "a comma or } is missing")?;
            }
        }
        Ok(Json::Object(pairs))
    }

    fn number(&mut self) -> Parsed<Json> {
        let bytes = self.text.as_bytes();
        let start = self.at;
        let digits = |from: usize| bytes[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += usize::from(bytes[self.at] == b'-');
        let whole = digits(self.at);
        if whole == 0 || (whole > 1 && bytes[self.at] == b'0') {
            return Err("no number");
        }
        self.at += whole;
        if bytes.get(self.at) == Some(&b'.') {
            let fraction = digits(self.at + 1);
            self.at += 1 + fraction;
            if fraction == 0 {
                return Err("no number");
            }
        }
        if matches!(bytes.get(self.at), Some(b'e' | b'E')) {
            self.at += 1 + usize::from(matches!(bytes.get(self.at + 1), Some(b'+' | b'-')));
            let exponent = digits(self.at);
            self.at += exponent;
            if exponent == 0 {
                return Err("no number");
            }
        }
        Ok(Json::Number(self.text[start..self.at].into()))
    }

    /// The string that begins here, behind which `at` comes to stand.
    fn string(&mut self) -> Parsed<String> {
        let mut out = String::new();
        self.at += 1;
        loop {
            let rest = &self.text[self.at..];
            let plain = rest.bytes().position(|byte| byte < b' ' || byte == b'"' || byte == b'\\');
            let plain = plain.ok_or("a string does not end")?;
            out.push_str(&rest[..plain]);
            self.at += plain + 1;
            match rest.as_bytes()[plain] {
                b'"' => return Ok(out),
                b'\\' => out.push(self.escape()?),
                _ => return Err("a control character stands in a string"),
            }
        }
    }

    /// The character that is written behind a backslash.
    fn escape(&mut self) -> Parsed<char> {
        let byte = *self.text.as_bytes().get(self.at).ok_or("a string does not end")?;
        self.at += 1;
        Ok(match byte {
            b'"' | b'\\' | b'/' => char::from(byte),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let mut unit = self.hex()?;
                if (0xD800..0xDC00).contains(&unit) && self.text[self.at..].starts_with("\\u") {
                    self.at += 2;
                    let low = self.hex()?;
                    if !(0xDC00..0xE000).contains(&low) {
                        return Err("half a surrogate pair is no character");
                    }
                    unit = 0x1_0000 + ((unit - 0xD800) << 10) + (low - 0xDC00);
                }
                char::from_u32(unit).ok_or("half a surrogate pair is no character")?
            }
            _ => return Err("no such escape in a string"),
        })
    }

    fn hex(&mut self) -> Parsed<u32> {
        let digits = self.text.get(self.at..self.at + 4).filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()));
        self.at += 4;
        digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()).ok_or("\\u needs four hexadecimal digits")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn same(ours: &Json, theirs: &serde_json::Value) -> bool {
        use serde_json::Value;
        match (ours, theirs) {
            (Json::Null, Value::Null) => true,
            (Json::Bool(ours), Value::Bool(theirs)) => ours == theirs,
            (Json::Number(ours), Value::Number(theirs)) => **ours == theirs.to_string(),
            (Json::Text(ours), Value::String(theirs)) => ours == theirs,
            (Json::Array(ours), Value::Array(theirs)) => {
                ours.len() == theirs.len() && ours.iter().zip(theirs).all(|(ours, theirs)| same(ours, theirs))
            }
            (Json::Object(ours), Value::Object(theirs)) => {
                ours.len() == theirs.len()
                    && ours.iter().zip(theirs).all(|((key, ours), (name, theirs))| key == name && same(ours, theirs))
            }
            _ => false,
        }
    }

    fn values() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<u64>().prop_map(Into::into),
            any::<String>().prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                prop::collection::hash_map(any::<String>(), inner, 0..4)
                    .prop_map(|pairs| serde_json::Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_serde_json_writes_is_read(value in values(), pretty: bool) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let text = text.expect("values can be written");
            prop_assert!(same(&Json::parse(&text).expect("it is JSON"), &value), "{text}");
        }

        #[test]
        fn what_serde_json_refuses_is_refused(text in r#"[\[\]{}:,"\\u0-9dDaebtrnflsu.+ \-]{0,12}"#) {
            let theirs = serde_json::from_str::<serde_json::Value>(&text);
            let too_large = theirs.as_ref().is_err_and(|error| error.to_string().contains("out of range"));
            prop_assert_eq!(Json::parse(&text).is_ok(), theirs.is_ok() || too_large, "{}", text);
        }
    }

    #[test]
    fn escapes_and_depth() {
        let read = |text: &str| Json::parse(text);
        assert_eq!(read(r#""\ud83d\ude00\u00e9\n\/""#), Ok(Json::Text("😀é\n/".to_owned())));
        for bad in [r#""\ud83d""#, r#""\ude00""#, r#""\ud83dx""#, r#""\ud83d\u0041""#, r#""\u12"#, r#""\x""#, "\"\n\""]
        {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert!(read(&("[".repeat(129) + &"]".repeat(129))).is_ok());
        assert!(read(&("[".repeat(130) + &"]".repeat(130))).is_err());
        assert_eq!(read("[1 2]"), Err("a comma or ] is missing at byte 3".to_owned()));
    }
}
