//! What of a schema, or of a grammar, must hold for one text at once. The library finds out whether some text fits
//! several expressions together by taking all their alternatives with one another, and counts none of that against
//! its limits: twenty patterns in an `allOf` take ten seconds, forty take centuries. So does a large `multipleOf`.

use std::collections::BTreeMap;
use std::rc::Rc;

use rustc_hash::FxHashMap;
use serde_json::{Map, Value};

use super::kind::ConstraintKind;
use crate::error::{Error, Result};

/// Most that the lengths of expressions come to which hold at once, multiplied with one another: no expression has
/// more alternatives than bytes.
const MAX_PRODUCT: f64 = (1 << 20) as f64;
/// A `format` counts as a pattern of so many bytes.
const FORMAT_BYTES: usize = 32;
/// Most that `multipleOf`s which hold at once come to, without their zeros at the end: as many states are made.
const MAX_MULTIPLE: f64 = 20_000.0;
/// Most places where parts of a schema that hold at once are put together.
const MAX_MEETINGS: usize = 100_000;
/// Deepest that references lead.
const MAX_DEPTH: usize = 2_000;

/// Names of what is in an object or list, beside properties, which begin with a point.
const OTHERS: &str = "*";
const ITEMS: &str = "[]";

/// What holds at one place of an answer, and inside of it.
#[derive(Debug, Clone, PartialEq)]
struct Held {
    product: f64,
    multiple: f64,
    inside: BTreeMap<String, Rc<Held>>,
}

impl Default for Held {
    fn default() -> Self {
        Self { product: 1.0, multiple: 1.0, inside: BTreeMap::new() }
    }
}

/// Checks a schema whose depth has been checked.
pub(super) fn check(schema: &Value) -> Result<()> {
    Walk { root: schema, known: FxHashMap::default(), meetings: 0, depth: 0 }.held(schema).map(drop)
}

struct Walk<'v> {
    root: &'v Value,
    /// By the address of the schema; None while it is looked at: a reference to it adds nothing.
    known: FxHashMap<*const Value, Option<Rc<Held>>>,
    meetings: usize,
    depth: usize,
}

impl<'v> Walk<'v> {
    fn held(&mut self, schema: &'v Value) -> Result<Rc<Held>> {
        let Value::Object(fields) = schema else { return Ok(Rc::default()) };
        let address = std::ptr::from_ref(schema);
        if let Some(known) = self.known.get(&address) {
            return Ok(known.clone().unwrap_or_default());
        }
        self.known.insert(address, None);
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(too_much(format!("has references that lead more than {MAX_DEPTH} levels deep")));
        }
        let mut held = Rc::new(self.own(fields)?);
        for part in list(fields, "allOf") {
            let part = self.held(part)?;
            held = self.both(&held, &part)?;
        }
        for key in ["anyOf", "oneOf"] {
            let chosen = self.any(list(fields, key))?;
            held = self.both(&held, &chosen)?;
        }
        if let Some(target) = fields.get("$ref").and_then(Value::as_str).and_then(|name| self.target(name)) {
            let target = self.held(target)?;
            held = self.both(&held, &target)?;
        }
        self.depth -= 1;
        self.known.insert(address, Some(Rc::clone(&held)));
        Ok(held)
    }

    /// What a schema says itself, without what it is put together of.
    fn own(&mut self, fields: &'v Map<String, Value>) -> Result<Held> {
        let pattern = fields.get("pattern").and_then(Value::as_str).map_or(1, str::len);
        let format = if fields.contains_key("format") { FORMAT_BYTES } else { 1 };
        let multiple = fields.get("multipleOf").map_or(1.0, multiple);
        let mut own = Held { product: (pattern.max(1) * format) as f64, multiple, inside: BTreeMap::new() };
        check_bounds(&own)?;
        let by_pattern = fields.get("patternProperties").and_then(Value::as_object);
        let by_pattern = self.any(by_pattern.into_iter().flat_map(Map::values))?;
        let others = self.any(fields.get("additionalProperties"))?;
        own.put(OTHERS, self.either(&by_pattern, &others)?);
        if let Some(Value::Object(properties)) = fields.get("properties") {
            for (name, part) in properties {
                let part = self.held(part)?;
                own.put(&format!(".{name}"), self.both(&part, &by_pattern)?);
            }
        }
        let items = ["items", "additionalItems"].into_iter().filter_map(|key| fields.get(key));
        own.put(ITEMS, self.any(items.chain(list(fields, "prefixItems")))?);
        Ok(own)
    }

    /// Of schemas of which one holds.
    fn any(&mut self, parts: impl IntoIterator<Item = &'v Value>) -> Result<Rc<Held>> {
        let mut held = Rc::default();
        for part in parts {
            let part = self.held(part)?;
            held = self.either(&held, &part)?;
        }
        Ok(held)
    }

    fn both(&mut self, one: &Rc<Held>, other: &Rc<Held>) -> Result<Rc<Held>> {
        self.meet(one, other, true)
    }

    fn either(&mut self, one: &Rc<Held>, other: &Rc<Held>) -> Result<Rc<Held>> {
        self.meet(one, other, false)
    }

    fn meet(&mut self, one: &Rc<Held>, other: &Rc<Held>, at_once: bool) -> Result<Rc<Held>> {
        if one.is_free() {
            return Ok(Rc::clone(other));
        }
        if other.is_free() {
            return Ok(Rc::clone(one));
        }
        self.meetings += 1 + one.inside.len() + other.inside.len();
        if self.meetings > MAX_MEETINGS {
            return Err(too_much("is put together of too many parts (allOf, anyOf, $ref)".to_owned()));
        }
        let put = |one: f64, other: f64| if at_once { one * other } else { one.max(other) };
        let mut held = Held {
            product: put(one.product, other.product),
            multiple: put(one.multiple, other.multiple),
            inside: BTreeMap::new(),
        };
        check_bounds(&held)?;
        for name in one.inside.keys().chain(other.inside.keys()) {
            if !held.inside.contains_key(name) {
                let met = self.meet(&one.at(name, at_once), &other.at(name, at_once), at_once)?;
                held.put(name, met);
            }
        }
        Ok(Rc::new(held))
    }

    /// What a reference leads to in this schema; others are refused where the schema is compiled.
    fn target(&self, name: &str) -> Option<&'v Value> {
        let pointer = name.strip_prefix('#')?;
        self.root.pointer(&pointer.replace("%25", "%").replace("%2F", "/"))
    }
}

impl Held {
    /// Nothing that counts is here or inside.
    fn is_free(&self) -> bool {
        self.product <= 1.0 && self.multiple <= 1.0 && self.inside.is_empty()
    }

    fn put(&mut self, name: &str, held: Rc<Held>) {
        if !held.is_free() {
            self.inside.insert(name.to_owned(), held);
        }
    }

    /// What holds of a property: what is said of all others as well, where several schemas meet.
    fn at(&self, name: &str, at_once: bool) -> Rc<Held> {
        let others = || (at_once && name.starts_with('.')).then(|| self.inside.get(OTHERS)).flatten();
        self.inside.get(name).or_else(others).cloned().unwrap_or_default()
    }
}

fn list<'v>(fields: &'v Map<String, Value>, key: &str) -> impl Iterator<Item = &'v Value> {
    fields.get(key).and_then(Value::as_array).into_iter().flatten()
}

/// The digits of a number, without zeros at either end.
fn multiple(value: &Value) -> f64 {
    let text = value.to_string();
    let digits: String = text.split(['e', 'E']).next().unwrap_or("").chars().filter(char::is_ascii_digit).collect();
    digits.trim_matches('0').parse().unwrap_or(1.0)
}

fn check_bounds(held: &Held) -> Result<()> {
    if held.product > MAX_PRODUCT {
        return Err(too_much(format!(
            "has patterns that must hold for one text at once, whose lengths multiplied come to {:.0}, but may come to \
             {MAX_PRODUCT:.0} at most: write them as one pattern",
            held.product
        )));
    }
    if held.multiple > MAX_MULTIPLE {
        return Err(too_much(format!(
            "has a multipleOf (or several at once) of {:.0}, but it may be {MAX_MULTIPLE:.0} at most, without the zeros \
             at its end",
            held.multiple
        )));
    }
    Ok(())
}

fn too_much(message: String) -> Error {
    ConstraintKind::Json.too_complex(message)
}

/// Checks what a grammar in Lark's form has of `&`, and the schemas inside of it.
pub(super) fn check_lark(text: &str) -> Result<()> {
    let mut rest = text;
    let mut joints = 0;
    while let Some(at) = rest.find(['"', '/', '&', '%', '#', '<']) {
        let (from, next) = (&rest[at..], &rest[at + 1..]);
        rest = match &from[..1] {
            "\"" => behind(next, '"'),
            "#" => next.split_once('\n').map_or("", |(_, rest)| rest),
            "/" if next.starts_with('/') => next.split_once('\n').map_or("", |(_, rest)| rest),
            "<" => match next.find(['<', '>', ' ', '\t', '\r', '\n']) {
                Some(end) if next[end..].starts_with('>') => &next[end + 1..], // a special token
                _ => next,
            },
            "/" => behind(next, '/'),
            "&" => {
                joints += 1;
                next
            }
            "%" if next.starts_with("json") => behind_schema(&next[4..])?,
            _ => next,
        };
    }
    let product = (text.len() as f64 / f64::from(joints + 1)).powi(joints + 1);
    if joints > 0 && product > MAX_PRODUCT {
        return Err(ConstraintKind::Grammar.too_complex(format!(
            "has {joints} times '&', which in {} bytes is too much: terminals that hold at once must be short",
            text.len()
        )));
    }
    Ok(())
}

/// What is behind the end of a text or expression.
fn behind(text: &str, end: char) -> &str {
    let mut escaped = false;
    for (at, letter) in text.char_indices() {
        match letter {
            '\\' if !escaped => escaped = true,
            _ if letter == end && !escaped => return &text[at + 1..],
            _ => escaped = false,
        }
    }
    ""
}

/// What is behind a schema, whose bounds are those of any.
fn behind_schema(text: &str) -> Result<&str> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let Some(Ok(schema)) = values.next() else { return Ok(text) };
    if schema.is_object() {
        super::schema::check_bounds(&schema).map_err(|error| match error {
            Error::Constraint { code, message, .. } => {
                Error::Constraint { code, field: ConstraintKind::Grammar.field(), message }
            }
            other => other,
        })?;
    }
    Ok(&text[values.byte_offset()..])
}
