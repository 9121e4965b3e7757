use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Compiler, Constraint, ConstraintKind, Grammar, Whitespace};
use crate::error::{Error, Result};
use crate::text::Tokenizer;

const VOCAB_SIZE: u32 = 260;
const ENDS: [u32; 2] = [256, 258];

/// Over one token a byte, with two end tokens and two that mean nothing.
fn compiler() -> Compiler {
    Compiler::new(Arc::new(Tokenizer::bytes_only(VOCAB_SIZE as usize)), VOCAB_SIZE, &ENDS)
}

fn constraint(kind: ConstraintKind, text: &str) -> Constraint {
    Constraint { kind, text: text.to_owned(), whitespace: Whitespace::Never }
}

/// Every answer that the masks allow, of a language that has few.
fn language(grammar: &dyn Grammar) -> BTreeSet<String> {
    let mut answers = BTreeSet::new();
    let mut waiting: Vec<Vec<u8>> = vec![Vec::new()];
    while let Some(text) = waiting.pop() {
        assert!(answers.len() + waiting.len() < 10_000, "not a small language");
        let mut state = grammar.start();
        for byte in &text {
            state.push(u32::from(*byte)).unwrap();
        }
        let mut row = [u32::MAX; VOCAB_SIZE.div_ceil(32) as usize + 1];
        state.mask(&mut row).unwrap();
        let allowed: Vec<u32> =
            (0..row.len() as u32 * 32).filter(|id| row[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
        let ends: Vec<u32> = allowed.iter().copied().filter(|id| *id > 255).collect();
        assert_eq!(ends, if state.may_end() { ENDS.to_vec() } else { Vec::new() }, "after {text:?}");
        if !ends.is_empty() {
            answers.insert(String::from_utf8(text.clone()).unwrap());
        }
        for id in allowed.into_iter().filter(|id| *id < 256) {
            waiting.push([&text[..], &[id as u8]].concat());
        }
    }
    answers
}

fn all(kind: ConstraintKind, text: &str) -> Vec<String> {
    language(&*compiler().compile(&constraint(kind, text)).unwrap()).into_iter().collect()
}

#[test]
fn masks_allow_the_language_and_nothing_else() {
    assert_eq!(all(ConstraintKind::Regex, "a{1,2}(b|ü)?"), ["a", "aa", "aab", "aaü", "ab", "aü"]);
    assert_eq!(all(ConstraintKind::Regex, "^(x/y)$"), ["x/y"]);
    let odd = ["say \"hi\"\n", "a", "a/b\\c", "\u{7f}\u{1}", "日本"];
    let mut expected: Vec<&str> = odd.to_vec();
    expected.sort_unstable();
    assert_eq!(all(ConstraintKind::Choice, &serde_json::to_string(&odd).unwrap()), expected);
    let gbnf = "root ::= greeting (\" \" name){0,1}\ngreeting ::= \"hi\" | [x-y]\nname ::= \"Bo\"";
    assert_eq!(all(ConstraintKind::Grammar, gbnf), ["hi", "hi Bo", "x", "x Bo", "y", "y Bo"]);
    assert_eq!(all(ConstraintKind::Grammar, "start: A | \"(\" A \")\"\nA: \"1\" | \"2\""), ["(1)", "(2)", "1", "2"]);
}

#[test]
fn schemas_mean_what_they_say() {
    let schema = r##"{"$defs": {"flag": {"type": "boolean"}}, "type": "object", "required": ["a"],
        "properties": {"a": {"anyOf": [{"const": 1}, {"enum": ["x", null]}]}, "b": {"$ref": "#/$defs/flag"}},
        "additionalProperties": false}"##;
    let expected = [
        r#"{"a":"x","b":false}"#,
        r#"{"a":"x","b":true}"#,
        r#"{"a":"x"}"#,
        r#"{"a":1,"b":false}"#,
        r#"{"a":1,"b":true}"#,
        r#"{"a":1}"#,
        r#"{"a":null,"b":false}"#,
        r#"{"a":null,"b":true}"#,
        r#"{"a":null}"#,
    ];
    assert_eq!(all(ConstraintKind::Json, schema), expected);
    assert_eq!(all(ConstraintKind::Json, r#"{"type": "integer", "minimum": 9, "maximum": 11}"#), ["10", "11", "9"]);
    let one_of = r#"{"oneOf": [{"const": "a"}, {"const": "b"}]}"#;
    assert_eq!(all(ConstraintKind::Json, one_of), [r#""a""#, r#""b""#]);
    let list = r#"{"type": "array", "items": {"const": 0}, "minItems": 1, "maxItems": 2}"#;
    assert_eq!(all(ConstraintKind::Json, list), ["[0,0]", "[0]"]);
    let spaced =
        Constraint { whitespace: Whitespace::Pattern(" ".to_owned()), ..constraint(ConstraintKind::Json, list) };
    let spaced = language(&*compiler().compile(&spaced).unwrap());
    assert!(spaced.contains("[ 0 , 0 ]") && spaced.contains("[0]") && !spaced.iter().any(|text| text.contains("  ")));
}

#[test]
fn objects_have_the_properties_that_are_listed_and_no_others() {
    let one = r#""properties": {"a": {"const": 1}}"#;
    for (schema, expected) in [
        (format!("{{{one}, \"type\": \"object\"}}"), vec!["{\"a\":1}", "{}"]),
        (format!("{{{one}, \"type\": \"object\", \"required\": [\"a\"]}}"), vec!["{\"a\":1}"]),
        (
            format!(
                r##"{{"$defs": {{"o": {{{one}, "type": "object", "required": ["a"]}}}}, "type": "array",
                "items": {{"anyOf": [{{"const": 0}}, {{"$ref": "#/$defs/o"}}]}}, "minItems": 1, "maxItems": 1}}"##
            ),
            vec!["[0]", "[{\"a\":1}]"],
        ),
        // Its properties make it an object, inside of others too, unless it says what else it may be.
        (format!("{{{one}, \"required\": [\"a\"]}}"), vec!["{\"a\":1}"]),
        (
            format!(r#"{{"properties": {{"b": {{{one}}}}}, "required": ["b"]}}"#),
            vec!["{\"b\":{\"a\":1}}", "{\"b\":{}}"],
        ),
        (
            r#"{"anyOf": [{"properties": {"a": {"const": 1}}, "required": ["a"]}, {"const": 2}]}"#.to_owned(),
            vec!["2", "{\"a\":1}"],
        ),
        (format!("{{{one}, \"type\": [\"null\", \"object\"], \"required\": [\"a\"]}}"), vec!["null", "{\"a\":1}"]),
        (format!("{{{one}, \"enum\": [3]}}"), vec!["3"]),
        // A property may have any name.
        (
            r#"{"type": "object", "required": ["properties"], "properties": {"properties": {"const": 2}}}"#.to_owned(),
            vec!["{\"properties\":2}"],
        ),
    ] {
        assert_eq!(all(ConstraintKind::Json, &schema), expected, "{schema}");
    }
    // Where others are allowed, or an object is put together, the schema is as it is written.
    for schema in [
        format!("{{{one}, \"type\": \"object\", \"additionalProperties\": {{\"const\": 2}}}}"),
        format!(
            r##"{{"$defs": {{"o": {{{one}, "type": "object"}}}}, "type": "object",
            "allOf": [{{"$ref": "#/$defs/o"}}, {{"properties": {{"b": {{"const": 2}}}}, "required": ["b"]}}]}}"##
        ),
        r#"{"type": "object", "properties": {"a": {"const": 1}}, "required": ["b"]}"#.to_owned(),
    ] {
        let grammar = compiler().compile(&constraint(ConstraintKind::Json, &schema)).unwrap();
        let mut state = grammar.start();
        for byte in br#"{"b":2"# {
            state.push(u32::from(*byte)).unwrap_or_else(|error| panic!("{schema}: {error:?}"));
        }
    }
}

#[test]
fn what_was_pushed_can_be_taken_back() {
    let grammar = compiler().compile(&constraint(ConstraintKind::Choice, r#"["abc", "abd", "x"]"#)).unwrap();
    let mut state = grammar.start();
    let (mut before, mut after) = ([0; 9], [0; 9]);
    state.mask(&mut before).unwrap();
    for text in ["abc", "x", "abd"] {
        for byte in text.bytes() {
            state.push(u32::from(byte)).unwrap();
        }
        state.pop(text.len()).unwrap();
        state.mask(&mut after).unwrap();
        assert_eq!(before, after);
    }
    assert!(state.push(u32::from(b'y')).is_err(), "it is not allowed");
}

fn refusal(kind: ConstraintKind, text: &str) -> (&'static str, String) {
    match compiler().compile(&constraint(kind, text)).map(drop) {
        Err(Error::Constraint { code, message, .. }) => (code, message),
        other => panic!("{text}: {other:?}"),
    }
}

#[test]
fn refusals_say_where() {
    use ConstraintKind::{Choice, Grammar, Json, Regex};
    for (kind, text, code, part) in [
        (Json, "{", "invalid_schema", "not JSON"),
        (Json, "[]", "invalid_schema", "must be a JSON schema"),
        (Json, "\"x\"", "invalid_schema", "must be a JSON schema"),
        (Json, "false", "invalid_schema", "no answer would do"),
        (Json, r#"{"type": "strin"}"#, "invalid_schema", "Invalid type: strin"),
        (
            Json,
            r#"{"properties": {"a/b": {"items": {"anyOf": [{}, {"type": "strin"}]}}}}"#,
            "invalid_schema",
            "at /properties/a~1b/items/anyOf/1: Invalid type: strin",
        ),
        (
            Json,
            r##"{"$defs": {"x": {"pattern": "("}}, "properties": {"a": {"$ref": "#/$defs/x"}}}"##,
            "invalid_schema",
            "at /properties/a: not a regular expression, at \"(\": unclosed group",
        ),
        (Json, r#"{"type": "integer", "minimum": 5, "maximum": 1}"#, "invalid_schema", "minimum (5) is greater"),
        (Json, r##"{"$ref": "#/$defs/none"}"##, "invalid_schema", "'/$defs/none' does not exist"),
        (Json, r##"{"$ref": "#"}"##, "invalid_schema", "no answer"),
        (Json, r#"{"$ref": "http://127.0.0.1/x"}"#, "invalid_schema", "does not fetch"),
        (Json, r#"{"$ref": "file:///etc/passwd"}"#, "invalid_schema", "does not fetch"),
        (Regex, "(a", "invalid_grammar", "not a regular expression, at \"(a"),
        (Regex, "(?=a)b", "invalid_grammar", "look-around"),
        (Regex, "", "invalid_grammar", "is empty"),
        (Choice, "[]", "invalid_grammar", "empty list"),
        (Choice, r#"["a", ""]"#, "invalid_grammar", "[1] is empty"),
        (Choice, r#"["a", 1]"#, "invalid_grammar", "must be a list of texts"),
        (Grammar, " ", "invalid_grammar", "is empty"),
        (Grammar, "start: foo", "invalid_grammar", "unknown name: \"foo\""),
        (Grammar, "start: \"a\n", "invalid_grammar", "1("),
        (Grammar, "root ::= foo", "invalid_grammar", "line 1: there is no rule \"foo\""),
    ] {
        let (found, message) = refusal(kind, text);
        assert!(message.contains(part) && !message.contains('\n'), "{text}: {message}");
        assert_eq!(found, code, "{text}: {message}");
    }
}

/// Small texts that ask for much: each is refused, or can be followed. How long that may take is
/// bounded by counts, so a slow machine passes too; without bounds this would run for hours.
#[test]
fn hostile_texts_cost_little() {
    use ConstraintKind::{Choice, Grammar, Json, Regex};
    let nested = |open: &str, close: &str, depth: usize| open.repeat(depth) + &close.repeat(depth);
    let deep = |depth| format!("{}{{}}{}", r#"{"properties": {"a": "#.repeat(depth), "}}".repeat(depth));
    let any_of = (0..10).fold("{\"const\": 1}".to_owned(), |inner, _| format!(r#"{{"anyOf": [{inner}, {inner}]}}"#));
    let listed = |count: usize| (0..count).map(|number| format!("\"v{number}\"")).collect::<Vec<_>>().join(",");
    let properties: Vec<String> = (0..20_000).map(|number| format!(r#""p{number}": {{}}"#)).collect();
    let options: Vec<String> = (0..500).map(|number| format!(r#"{{"const": {number}}}"#)).collect();
    let too_much = [
        (Json, deep(400)),
        (Json, deep(60)),
        (Json, format!(r#"{{"enum": [{}]}}"#, listed(100_000))),
        (Json, format!(r#"{{"enum": [{}]}}"#, listed(20_000))),
        (Json, format!(r#"{{"properties": {{{}}}}}"#, properties.join(","))),
        (Json, format!(r#"{{"const": "{}"}}"#, "x".repeat(256 * 1024))),
        (Json, format!(r#"{{"items": {{"enum": [1, "{}"]}}}}"#, "x".repeat(16 * 1024))),
        (Json, format!(r#"{{"anyOf": [{{"type": "string", "pattern": "{}"}}]}}"#, "x".repeat(16 * 1024))),
        (Json, format!(r#"{{"properties": {{"{}": true}}}}"#, "x".repeat(17 * 1024))),
        (Regex, format!("abcdefghijklmnopqrstuvwxyzabcdefghijklmnop{}", "x".repeat(16 * 1024))),
        (Choice, format!(r#"["abcdefghijklmnopqrstuvwxyzabcdefghijklmnop", "{}"]"#, "x".repeat(17 * 1024))),
        (Grammar, format!("start: \"abcdefghijklmnopqrstuvwxyzabcdefghijklmnop{}\"", "x".repeat(16 * 1024))),
        (Regex, nested("(", ")", 20_000)),
        (Grammar, format!("start: {}", nested("(", ")", 20_000))),
        (Grammar, format!("root ::= {}\"a\"{}", "(".repeat(20_000), ")".repeat(20_000))),
        (Choice, format!("[{}]", listed(20_000))),
    ];
    for (kind, text) in too_much {
        let (code, message) = refusal(kind, &text);
        assert_eq!(code, "grammar_too_complex", "{kind:?} {}: {message}", &text[..40]);
    }
    let much = [
        (Json, any_of),
        (Json, format!(r#"{{"oneOf": [{}]}}"#, options.join(","))),
        (Json, r#"{"type": "string", "minLength": 1000000}"#.to_owned()),
        (Json, r#"{"type": "string", "maxLength": 1000000000}"#.to_owned()),
        (Json, r#"{"type": "array", "items": {"const": 1}, "minItems": 1000000000}"#.to_owned()),
        (Json, format!(r#"{{"const": "{}"}}"#, "x".repeat(100_000))),
        (Regex, "(.{0,500}){0,20}".to_owned()),
        (Regex, "((((a{0,100}){0,100}){0,100}){0,100})".to_owned()),
        (Regex, "(a+)+b".to_owned()),
        (Regex, "(.*a.*b.*c.*d.*e.*f.*g.*h){5}".to_owned()),
        (Regex, ".{5000}".to_owned()),
        (Grammar, "start: start \"a\" | \"a\"".to_owned()),
    ];
    let compiler = compiler();
    for (kind, text) in much {
        let grammar = match compiler.compile(&constraint(kind, &text)) {
            Ok(grammar) => grammar,
            Err(Error::Constraint { .. }) => continue,
            Err(other) => panic!("{other}"),
        };
        let mut state = grammar.start();
        let mut row = [0; 9];
        for step in 0..40_u32 {
            if state.mask(&mut row).is_err() {
                break; // it ends this one request
            }
            let allowed: Vec<u32> = (0..256).filter(|id| row[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
            let Some(token) = allowed.get(step as usize % allowed.len().max(1)) else { break };
            if state.push(*token).is_err() {
                break;
            }
        }
    }
}

#[test]
fn one_compilation_serves_all_who_ask() {
    let compiler = compiler();
    let wanted = constraint(ConstraintKind::Regex, "[a-z]{1,30}");
    assert!(compiler.find(&wanted).is_none());
    let all: Vec<Result<Arc<dyn Grammar>>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| compiler.compile(&wanted))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(compiler.stats().compiled, 1);
    let first = compiler.find(&wanted).unwrap();
    assert!(all.into_iter().all(|grammar| Arc::ptr_eq(&grammar.unwrap(), &first)));
    assert!(compiler.find(&Constraint { whitespace: Whitespace::Bounded, ..wanted }).is_none());
}

#[test]
fn what_is_kept_is_bounded_and_faults_are_not_kept() {
    let compiler = compiler();
    let numbered = |number: u32| constraint(ConstraintKind::Regex, &format!("x{number}"));
    for number in 0..1000 {
        compiler.compile(&numbered(number)).unwrap();
        compiler.compile(&numbered(0)).unwrap(); // in use all the time
        assert!(compiler.compile(&constraint(ConstraintKind::Regex, &format!("({number}"))).is_err());
    }
    let stats = compiler.stats();
    assert_eq!((stats.compiled, stats.refused, stats.kept), (1000, 1000, 256));
    assert!(stats.kept_bytes < 64 << 20);
    assert!(compiler.find(&numbered(0)).is_some() && compiler.find(&numbered(1)).is_none());
    // Long texts take what a few hundred short ones do, and are kept in less number.
    for number in 0..60 {
        let text = format!("{number}{}", "x".repeat(16_000));
        compiler.compile(&constraint(ConstraintKind::Regex, &text)).unwrap();
    }
    let stats = compiler.stats();
    assert!((20..=42).contains(&stats.kept) && (128 << 20..=256 << 20).contains(&stats.kept_bytes), "{stats:?}");
}

/// Each of these kept a thread busy for more than a minute, most of them for ever.
#[test]
fn what_must_hold_at_once_is_bounded() {
    use ConstraintKind::{Grammar, Json};
    let pattern =
        |number: usize| format!(r#"{{"type": "string", "pattern": "[a-z]{{{}}}x{number}[0-9]+"}}"#, number % 7 + 1);
    let listed = |count: usize, write: &dyn Fn(usize) -> String| (0..count).map(write).collect::<Vec<_>>().join(", ");
    let patterns = listed(40, &pattern);
    let of_a = |part: String| format!(r#"{{"type": "object", "properties": {{"a": {part}}}}}"#);
    let texts = [
        (Json, format!(r#"{{"allOf": [{patterns}]}}"#)),
        (Json, format!(r#"{{"items": {{"allOf": [{patterns}]}}}}"#)),
        (Json, format!(r#"{{"allOf": [{}]}}"#, listed(40, &|number| of_a(pattern(number))))),
        (
            Json,
            format!(
                r#"{{"allOf": [{}, {}]}}"#,
                of_a("{}".to_owned()),
                listed(40, &|number| {
                    format!(r#"{{"type": "object", "additionalProperties": {}}}"#, pattern(number))
                })
            ),
        ),
        (
            Json,
            format!(
                r#"{{"allOf": [{}]}}"#,
                listed(40, &|number| format!(r#"{{"type": "array", "items": {}}}"#, pattern(number)))
            ),
        ),
        (
            Json,
            format!(
                r#"{{"allOf": [{}]}}"#,
                listed(40, &|number| { format!(r#"{{"anyOf": [{}, {{"type": "null"}}]}}"#, pattern(number)) })
            ),
        ),
        (
            Json,
            format!(
                r##"{{"$ref": "#/$defs/0", "$defs": {{{}, "40": {{"type": "string"}}}}}}"##,
                listed(40, &|number| format!(
                    r##""{number}": {{"$ref": "#/$defs/{}", "pattern": "[a-z]x{number}[0-9]"}}"##,
                    number + 1
                ))
            ),
        ),
        (
            Json,
            format!(r#"{{"patternProperties": {{{}}}}}"#, listed(1_000, &|number| format!(r#""^p{number}_": {{}}"#))),
        ),
        (Json, r#"{"type": "integer", "multipleOf": 10000007}"#.to_owned()),
        (Json, r#"{"type": "number", "multipleOf": 1.0000007e3}"#.to_owned()),
        (
            Json,
            r#"{"allOf": [{"type": "integer", "multipleOf": 10007}, {"type": "integer", "multipleOf": 10009}]}"#
                .to_owned(),
        ),
        (
            Json,
            format!(
                r#"{{"properties": {{{}}}}}"#,
                listed(3_000, &|number| format!(r#""p{number}": {}"#, pattern(number)))
            ),
        ),
        (Grammar, format!("start: T\nT: {}", vec!["/.*[a-z]x[0-9].*/"; 24].join(" & "))),
        (Grammar, format!("start: T\nT: /q/ | (/a/ ({}))", vec!["/.*[a-z]x[0-9].*/"; 24].join(" & "))),
        (Grammar, format!("start: %json {{\"allOf\": [{patterns}]}}")),
    ];
    for (kind, text) in texts {
        let Err(Error::Constraint { code, message, .. }) = compiler().compile(&constraint(kind, &text)) else {
            panic!("compiled {}", &text[..60]);
        };
        assert_eq!(code, "grammar_too_complex", "{}: {message}", &text[..60]);
    }
}

/// What people write is not near those bounds.
#[test]
fn what_is_put_together_of_a_few_parts_is_compiled() {
    let both = r#"{"allOf": [{"type": "string", "pattern": "^[a-z]{2,9}$"}, {"type": "string", "pattern": "^(a|b)"}]}"#;
    let recursive = r##"{"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
        "name": {"type": "string", "pattern": "^[a-z]+$"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}}}"##;
    let fields: Vec<String> =
        (0..60).map(|number| format!(r#""f{number}": {{"type": "string", "pattern": "^[a-f]{{8}}$"}}"#)).collect();
    let parts: Vec<String> = fields
        .chunks(10)
        .map(|some| format!(r#"{{"type": "object", "properties": {{{}}}}}"#, some.join(", ")))
        .collect();
    let composed = format!(r#"{{"allOf": [{}]}}"#, parts.join(", "));
    let union: Vec<String> =
        (0..40).map(|number| format!(r#"{{"type": "string", "pattern": "^k{number}[0-9]{{3}}$"}}"#)).collect();
    let union = format!(r#"{{"anyOf": [{}]}}"#, union.join(", "));
    let multiples = r#"{"type": "number", "multipleOf": 0.01}"#;
    for text in [both, recursive, &composed, &union, multiples, r#"{"type": "integer", "multipleOf": 1000000}"#] {
        compiler().compile(&constraint(ConstraintKind::Json, text)).unwrap();
    }
    let text = "start: T \"&\" \"/\" // a & \"b\nT: /[a-z]&/ & /q.*/ # & &";
    compiler().compile(&constraint(ConstraintKind::Grammar, text)).unwrap();
}
