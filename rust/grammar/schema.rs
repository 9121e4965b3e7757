//! JSON schemas: their bounds before they are compiled, the white space between their parts, and
//! where the fault is in one that cannot be compiled.

use llguidance::api::TopLevelGrammar;
use llguidance::{JsonCompileOptions, ParserFactory};
use serde_json::{Map, Value};

use super::combined;
use super::kind::ConstraintKind;
use crate::error::Result;

/// Deepest a schema may be.
const MAX_DEPTH: usize = 100;
/// Most objects, lists, texts, numbers of a schema: compiling ten thousand takes a tenth of a
/// second.
const MAX_VALUES: usize = 16_384;
/// Most properties of one object: the time that they take grows with their square, where they may be left out.
const MAX_OF_AN_OBJECT: usize = 1_000;
/// Most properties of all objects: five thousand, each with a pattern, take two seconds at most.
const MAX_PROPERTIES: usize = 5_000;
/// Most properties that are named by patterns, of which each is compared with all others of its object: sixty-four
/// take a tenth of a second.
const MAX_BY_PATTERN: usize = 64;
/// Most parts of a schema that are compiled on their own to find the fault.
const MAX_LOOKS: usize = 100;

/// Keywords whose value is one schema, a list of them, or schemas by name.
const ONE: [&str; 3] = ["items", "additionalProperties", "additionalItems"];
const LIST: [&str; 4] = ["anyOf", "oneOf", "allOf", "prefixItems"];
const BY_NAME: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];

/// Which white space JSON may have between its parts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Whitespace {
    /// A space, or line breaks with up to twenty blanks. Without a bound, a model that is unsure
    /// writes blanks until its tokens run out.
    #[default]
    Bounded,
    /// None at all.
    Never,
    /// What matches this regular expression, or nothing.
    Pattern(String),
}

impl Whitespace {
    /// The regular expression; None: no white space.
    fn pattern(&self) -> Option<&str> {
        match self {
            Self::Bounded => Some(r" |\n\n?[ \t]{0,20}"),
            Self::Never => None,
            Self::Pattern(pattern) => Some(pattern),
        }
    }
}

/// Reads a schema's text and checks its bounds.
pub(super) fn read(text: &str) -> Result<Value> {
    let kind = ConstraintKind::Json;
    let schema: Value = serde_json::from_str(text).map_err(|error| {
        if error.to_string().contains("recursion limit") {
            kind.too_complex(format!("is more than {MAX_DEPTH} levels deep"))
        } else {
            kind.invalid(format!("is not JSON: {error}"))
        }
    })?;
    let schema = match schema {
        Value::Object(_) => schema,
        Value::Bool(true) => Value::Object(Map::new()),
        Value::Bool(false) => return Err(kind.invalid("is false: no answer would do")),
        _ => return Err(kind.invalid("must be a JSON schema, which is an object")),
    };
    check_bounds(&schema)?;
    Ok(schema)
}

/// Checks what compiling a schema costs.
pub(super) fn check_bounds(schema: &Value) -> Result<()> {
    let kind = ConstraintKind::Json;
    let (values, depth) = measure(schema);
    if depth > MAX_DEPTH {
        return Err(kind.too_complex(format!("is {depth} levels deep, but must be at most {MAX_DEPTH}")));
    }
    if values > MAX_VALUES {
        return Err(kind.too_complex(format!("has {values} values, but must have at most {MAX_VALUES}")));
    }
    let (properties, by_pattern) = check_parts(schema)?;
    for (count, most, what) in
        [(properties, MAX_PROPERTIES, "properties"), (by_pattern, MAX_BY_PATTERN, "patternProperties")]
    {
        if count > most {
            return Err(kind.too_complex(format!("has {count} {what}, but must have at most {most}")));
        }
    }
    combined::check(schema)
}

/// Checks the texts that answers must have, and the size of each object. Gives the number of properties, and of
/// those that a pattern names.
fn check_parts(schema: &Value) -> Result<(usize, usize)> {
    let by_pattern = schema.get("patternProperties").and_then(Value::as_object).map_or(0, Map::len);
    let mut here = (0, by_pattern);
    let check = |value: &Value| ConstraintKind::Json.check_literal(value.to_string().len());
    for key in ["const", "pattern"] {
        schema.get(key).map_or(Ok(()), check)?;
    }
    schema.get("enum").and_then(Value::as_array).map_or(Ok(()), |list| list.iter().try_for_each(check))?;
    if let Some(Value::Object(properties)) = schema.get("properties") {
        properties.keys().try_for_each(|name| ConstraintKind::Json.check_literal(name.len()))?;
        if properties.len() > MAX_OF_AN_OBJECT {
            return Err(ConstraintKind::Json.too_complex(format!(
                "has an object of {} properties, but one may have at most {MAX_OF_AN_OBJECT}",
                properties.len()
            )));
        }
        here.0 = properties.len();
    }
    parts(schema).iter().try_fold(here, |sum, (_, part)| {
        let inside = check_parts(part)?;
        Ok((sum.0 + inside.0, sum.1 + inside.1))
    })
}

/// Number of values, and levels. The reader has bounded the levels, so this may go down by
/// recursion.
fn measure(value: &Value) -> (usize, usize) {
    let parts: Vec<(usize, usize)> = match value {
        Value::Array(items) => items.iter().map(measure).collect(),
        Value::Object(fields) => fields.values().map(measure).collect(),
        _ => return (1, 1),
    };
    let values = parts.iter().map(|part| part.0).sum::<usize>();
    (1 + values, 1 + parts.iter().map(|part| part.1).max().unwrap_or(0))
}

/// The schema with what the library is to do about white space and `oneOf` (which it can only treat
/// as `anyOf`). A schema that brings such options itself keeps them. Objects are closed ([`close`]).
pub(super) fn with_options(mut schema: Value, whitespace: &Whitespace) -> Value {
    name_objects(&mut schema);
    if !is_combined(&schema) {
        close(&mut schema);
    }
    let options = JsonCompileOptions {
        whitespace_flexible: whitespace.pattern().is_some(),
        whitespace_pattern: whitespace.pattern().map(str::to_owned),
        coerce_one_of: true,
        ..JsonCompileOptions::default()
    };
    if schema.get("x-guidance").is_none() {
        options.apply_to(&mut schema);
    }
    schema
}

/// Keywords that put an object together out of several schemas, where properties are listed beside them.
const COMBINE: [&str; 4] = ["allOf", "anyOf", "oneOf", "$ref"];
/// Keywords that always do.
const CONDITION: [&str; 4] = ["if", "not", "dependentSchemas", "unevaluatedProperties"];

/// Whether a schema puts objects together, so that a part of it does not know all properties.
fn is_combined(schema: &Value) -> bool {
    let has = |keys: &[&str]| keys.iter().any(|key| schema.get(*key).is_some());
    let of_several = schema.get("allOf").and_then(Value::as_array).is_some_and(|parts| parts.len() > 1);
    of_several
        || has(&CONDITION)
        || (has(&["properties"]) && has(&COMBINE))
        || parts(schema).iter().any(|(_, part)| is_combined(part))
}

/// What has properties is an object, though its type is left out, as TGI's documents have it: to JSON Schema a
/// list would do, too.
fn name_objects(schema: &mut Value) {
    let Value::Object(fields) = schema else { return };
    let says_more = ["type", "enum", "const"].iter().chain(&COMBINE).any(|key| fields.contains_key(*key));
    if !says_more && fields.get("properties").is_some_and(Value::is_object) {
        fields.insert("type".to_owned(), Value::from("object"));
    }
    inside(fields, name_objects);
}

/// Objects whose properties are listed, and which say nothing of others, have no others: a model that
/// may write more often does, without end. vLLM, TGI and llama.cpp have it so.
fn close(schema: &mut Value) {
    let Value::Object(fields) = schema else { return };
    if let Some(Value::Object(properties)) = fields.get("properties") {
        let required = fields.get("required").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let listed = required.iter().all(|name| name.as_str().is_some_and(|name| properties.contains_key(name)));
        let others = ["patternProperties", "minProperties"].iter().any(|key| fields.contains_key(*key));
        if listed && !others && !properties.is_empty() {
            fields.entry("additionalProperties").or_insert(Value::Bool(false));
        }
    }
    inside(fields, close);
}

/// Does something to the schemas right inside of one.
fn inside(fields: &mut Map<String, Value>, change: fn(&mut Value)) {
    for key in BY_NAME {
        if let Some(Value::Object(named)) = fields.get_mut(key) {
            named.values_mut().for_each(change);
        }
    }
    for key in LIST {
        if let Some(Value::Array(list)) = fields.get_mut(key) {
            list.iter_mut().for_each(change);
        }
    }
    for key in ONE {
        if let Some(part) = fields.get_mut(key) {
            change(part);
        }
    }
}

/// The place of the fault in a schema that does not compile, as a JSON pointer: the smallest part
/// that fails for the same reason when it stands alone. None where no part does.
pub(super) fn locate(text: &str, factory: &ParserFactory) -> Option<String> {
    let root = read(text).ok()?;
    let reason = fault(&root, factory)?;
    let definitions: Map<String, Value> =
        ["$defs", "definitions"].iter().filter_map(|key| Some(((*key).to_owned(), root.get(*key)?.clone()))).collect();
    let mut search = Search { definitions, reason, factory, looks: MAX_LOOKS };
    let mut place = String::new();
    let mut part = &root;
    while let Some((name, inner)) = search.failing_part(part) {
        place.push('/');
        place.push_str(&name);
        part = inner;
    }
    (!place.is_empty()).then_some(place)
}

struct Search<'a> {
    /// Of the root, so that references in a part lead somewhere.
    definitions: Map<String, Value>,
    reason: String,
    factory: &'a ParserFactory,
    /// Parts that may still be compiled.
    looks: usize,
}

impl Search<'_> {
    fn failing_part<'v>(&mut self, schema: &'v Value) -> Option<(String, &'v Value)> {
        parts(schema).into_iter().find(|(_, part)| self.fails(part))
    }

    fn fails(&mut self, part: &Value) -> bool {
        let Value::Object(fields) = part else { return false };
        if self.looks == 0 {
            return false;
        }
        self.looks -= 1;
        let mut alone = fields.clone();
        for (key, value) in &self.definitions {
            alone.entry(key.clone()).or_insert_with(|| value.clone());
        }
        fault(&Value::Object(alone), self.factory).is_some_and(|reason| reason == self.reason)
    }
}

/// The schemas right inside of a schema, with their places.
fn parts(schema: &Value) -> Vec<(String, &Value)> {
    let mut parts = Vec::new();
    for key in BY_NAME {
        if let Some(Value::Object(named)) = schema.get(key) {
            parts.extend(named.iter().map(|(name, part)| (format!("{key}/{}", escaped(name)), part)));
        }
    }
    for key in LIST {
        if let Some(Value::Array(list)) = schema.get(key) {
            parts.extend(list.iter().enumerate().map(|(index, part)| (format!("{key}/{index}"), part)));
        }
    }
    parts.extend(ONE.iter().filter_map(|key| Some(((*key).to_owned(), schema.get(*key)?))));
    parts
}

/// A name in a JSON pointer, cut where it is long.
fn escaped(name: &str) -> String {
    name.chars().take(50).collect::<String>().replace('~', "~0").replace('/', "~1")
}

/// Why a schema does not compile.
fn fault(schema: &Value, factory: &ParserFactory) -> Option<String> {
    let schema = with_options(schema.clone(), &Whitespace::Bounded);
    factory.create_parser(TopLevelGrammar::from_json_schema(schema)).err().map(|error| error.to_string())
}
