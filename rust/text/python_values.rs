//! Values as Python writes them: `str`, `repr` and `json.dumps` for what templates print.
//!
//! minijinja is close to Python here but not equal (floats, quoting, JSON options), and chat
//! formats are byte-exact. Every item written is paid for in fuel, since a lazy list can be longer
//! than memory.

use std::fmt::{self, Write};
use std::sync::Arc;

use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Deepest nesting that is written. Deeper values can only be built by a hostile template.
const MAX_DEPTH: usize = 128;

type Written = Result<(), Error>;

/// An integer that is only written out again: minijinja's have 128 bits.
#[derive(Debug)]
struct LongInteger(Box<str>);

impl Object for LongInteger {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// An integer beyond 128 bits, by its digits.
pub(crate) fn long_integer(digits: &str) -> Value {
    Value::from_object(LongInteger(digits.into()))
}

/// Python's `str(value)`; an undefined value is the empty string, as in jinja2.
pub(crate) fn to_str(state: &State, value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    match value.as_str() {
        Some(text) => out.push_str(text),
        None if value.is_undefined() => {}
        None => write_repr(&mut out, state, value, 0)?,
    }
    Ok(out)
}

fn write_repr(out: &mut String, state: &State, value: &Value, depth: usize) -> Written {
    pay(state, value, depth)?;
    match value.kind() {
        ValueKind::String => write_quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Number => write_number(out, value, ["nan", "inf"]),
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Map => {
            out.push('{');
            for (index, (key, item)) in pairs(value)?.iter().enumerate() {
                out.push_str(if index == 0 { "" } else { ", " });
                write_repr(out, state, key, depth + 1)?;
                out.push_str(": ");
                write_repr(out, state, item, depth + 1)?;
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let is_tuple = value.is_tuple();
            out.push(if is_tuple { '(' } else { '[' });
            let mut len = 0;
            for item in value.try_iter()?.checked() {
                out.push_str(if len == 0 { "" } else { ", " });
                write_repr(out, state, &item?, depth + 1)?;
                len += 1;
            }
            out.push_str(match (is_tuple, len) {
                (true, 1) => ",)",
                (true, _) => ")",
                (false, _) => "]",
            });
        }
        _ => push(out, format_args!("{value}")),
    }
    Ok(())
}

fn push(out: &mut String, text: std::fmt::Arguments) {
    out.write_fmt(text).expect("writing to a String cannot fail");
}

/// A string literal as Python's `repr` chooses it.
fn write_quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        let code = c as u32;
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if c == quote => out.extend(['\\', c]),
            _ if is_printable(c) => out.push(c),
            _ if code <= 0xFF => push(out, format_args!("\\x{code:02x}")),
            _ if code <= 0xFFFF => push(out, format_args!("\\u{code:04x}")),
            _ => push(out, format_args!("\\U{code:08x}")),
        }
    }
    out.push(quote);
}

/// Whether `repr` shows the character itself: not control, format, surrogate, private, separator.
/// Unassigned code points, which change with each Unicode version, are shown.
fn is_printable(c: char) -> bool {
    !(c.is_control()
        || (c.is_whitespace() && c != ' ')
        || matches!(c as u32,
            0xAD | 0x600..=0x605 | 0x61C | 0x6DD | 0x70F | 0x8E2 | 0x180E | 0x200B..=0x200F | 0x202A..=0x202E
            | 0x2060..=0x206F | 0xE000..=0xF8FF | 0xFEFF | 0xFFF9..=0xFFFB | 0xE0001..=0xE007F | 0xF0000..))
}

/// Integers in full; floats in the shortest form that reads back, with an exponent where Python has
/// one.
fn write_number(out: &mut String, value: &Value, [nan, infinity]: [&str; 2]) {
    let float = (!value.is_integer()).then(|| f64::try_from(value.clone()).ok()).flatten();
    let Some(float) = float else {
        out.push_str(&value.to_string());
        return;
    };
    if float.is_nan() {
        out.push_str(nan);
    } else if float.is_infinite() {
        out.push_str(if float < 0.0 { "-" } else { "" });
        out.push_str(infinity);
    } else {
        let scientific = format!("{float:e}");
        let (digits, exponent) = scientific.split_once('e').expect("`{:e}` writes an exponent");
        let exponent: i32 = exponent.parse().expect("`{:e}` writes a decimal exponent");
        if (-4..16).contains(&exponent) {
            let plain = float.to_string();
            out.push_str(&plain);
            out.push_str(if plain.contains('.') { "" } else { ".0" });
        } else {
            let sign = if exponent < 0 { '-' } else { '+' };
            push(out, format_args!("{digits}e{sign}{:02}", exponent.abs()));
        }
    }
}

/// `escape` as `markupsafe` writes it.
pub(crate) fn escape(state: &State, value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    for c in to_str(state, value)?.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            _ => out.push(c),
        }
    }
    Ok(out)
}

/// `tojson` with the signature Hugging Face gives it:
/// `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, which is
/// `json.dumps` and escapes nothing for HTML.
#[allow(clippy::needless_pass_by_value)] // minijinja's calling convention
pub(crate) fn to_json(state: &State, value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let mut positional = positional.0.into_iter();
    let mut argument = |name: &str| -> Result<Value, Error> {
        Ok(match positional.next() {
            Some(value) => value,
            None => kwargs.get::<Option<Value>>(name)?.unwrap_or_default(),
        })
    };
    let ensure_ascii = argument("ensure_ascii")?.is_true();
    let indent = argument("indent")?;
    let separators = argument("separators")?;
    let sort_keys = argument("sort_keys")?.is_true();
    kwargs.assert_all_used()?;

    let indent = match (indent.as_str(), indent.as_i64()) {
        (Some(text), _) => Some(text.to_owned()),
        (None, Some(spaces)) if spaces <= 64 => Some(" ".repeat(spaces.max(0) as usize)),
        (None, None) if indent.is_none() || indent.is_undefined() => None,
        _ => {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: indent must be at most 64 spaces or a string"))
        }
    };
    let (item, key) = if separators.is_none() || separators.is_undefined() {
        (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned())
    } else {
        let parts: Vec<String> = separators.try_iter()?.map(|part| to_str(state, &part)).collect::<Result<_, _>>()?;
        <[String; 2]>::try_from(parts)
            .map(|[item, key]| (item, key))
            .map_err(|_| Error::new(ErrorKind::InvalidOperation, "tojson: separators must be two strings"))?
    };
    let mut writer = JsonWriter { state, out: String::new(), ensure_ascii, indent, item, key, sort_keys };
    writer.write(value, 0)?;
    Ok(writer.out)
}

struct JsonWriter<'a, 'b> {
    state: &'a State<'b, 'b>,
    out: String,
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

impl JsonWriter<'_, '_> {
    fn write(&mut self, value: &Value, depth: usize) -> Written {
        pay(self.state, value, depth)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => write_number(&mut self.out, value, ["NaN", "Infinity"]),
            ValueKind::String => self.write_string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push('[');
                let mut len = 0;
                for item in value.try_iter()?.checked() {
                    self.begin_item(len, depth + 1);
                    self.write(&item?, depth + 1)?;
                    len += 1;
                }
                self.end_items(len, depth);
                self.out.push(']');
            }
            ValueKind::Map => {
                let mut pairs = pairs(value)?;
                if self.sort_keys {
                    pairs.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.out.push('{');
                for (index, (key, item)) in pairs.iter().enumerate() {
                    self.begin_item(index, depth + 1);
                    self.write_key(key)?;
                    self.write(item, depth + 1)?;
                }
                self.end_items(pairs.len(), depth);
                self.out.push('}');
            }
            _ if value.downcast_object_ref::<LongInteger>().is_some() => push(&mut self.out, format_args!("{value}")),
            kind => return Err(not_serializable(&kind.to_string())),
        }
        Ok(())
    }

    /// Keys are strings; Python makes them of numbers, booleans and None.
    fn write_key(&mut self, key: &Value) -> Written {
        match key.kind() {
            ValueKind::String => self.write_string(key.as_str().unwrap_or_default()),
            ValueKind::Number | ValueKind::Bool | ValueKind::None => {
                self.out.push('"');
                self.write(key, 0)?;
                self.out.push('"');
            }
            kind => return Err(not_serializable(&format!("{kind} key"))),
        }
        self.out.push_str(&self.key);
        Ok(())
    }

    fn begin_item(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push_str(&self.item);
        }
        self.new_line(depth);
    }

    fn end_items(&mut self, len: usize, depth: usize) {
        if len > 0 {
            self.new_line(depth);
        }
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            for _ in 0..depth {
                self.out.push_str(indent);
            }
        }
    }

    fn write_string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                ..='\u{1f}' => push(&mut self.out, format_args!("\\u{:04x}", c as u32)),
                // DEL is ASCII. Noncharacters are `encode_chat`'s stand-ins for ASCII.
                _ if self.ensure_ascii && c > '\u{7f}' && !is_noncharacter(c) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        push(&mut self.out, format_args!("\\u{unit:04x}"));
                    }
                }
                _ => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A code point that Unicode sets aside for use inside programs.
pub(crate) fn is_noncharacter(c: char) -> bool {
    matches!(c, '\u{FDD0}'..='\u{FDEF}') || (c as u32 & 0xFFFE) == 0xFFFE
}

fn pairs(map: &Value) -> Result<Vec<(Value, Value)>, Error> {
    map.try_iter()?.map(|key| map.get_item(&key).map(|item| (key, item))).collect()
}

/// What is kept of a value that is given a name: the value itself, paid for, but with lists in
/// place of whatever is lazy. Refuses deep nesting, which could overflow the stack when the value
/// is dropped.
pub(crate) fn bounded(state: &State, value: Value) -> Result<Value, Error> {
    Ok(settled(state, &value, 0)?.unwrap_or(value))
}

/// The value without lazy parts, where it has any.
fn settled(state: &State, value: &Value, depth: usize) -> Result<Option<Value>, Error> {
    pay(state, value, depth)?;
    let mut changed = value.kind() == ValueKind::Iterable;
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let mut items = Vec::new();
            for item in value.try_iter()?.checked() {
                let item = item?;
                let new = settled(state, &item, depth + 1)?;
                changed |= new.is_some();
                items.push(new.unwrap_or(item));
            }
            let new = || if value.is_tuple() { Value::from(Tuple::from(items)) } else { Value::from(items) };
            Ok(changed.then(new))
        }
        ValueKind::Map => {
            let mut new = Vec::new();
            for (key, item) in pairs(value)? {
                let settled = settled(state, &item, depth + 1)?;
                changed |= settled.is_some();
                new.push((key, settled.unwrap_or(item)));
            }
            Ok(changed.then(|| new.into_iter().collect()))
        }
        _ => Ok(None),
    }
}

/// Pays for writing `value`, which is `depth` values deep.
fn pay(state: &State, value: &Value, depth: usize) -> Written {
    if depth > MAX_DEPTH {
        return Err(Error::new(ErrorKind::InvalidOperation, format!("value is nested deeper than {MAX_DEPTH}")));
    }
    let num_bytes = value.as_str().map_or(0, str::len);
    state.consume_fuel(1 + num_bytes as u64 / 64)
}

fn not_serializable(what: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("{what} is not JSON serializable"))
}
