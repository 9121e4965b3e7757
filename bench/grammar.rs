//! What a grammar costs: the trie of a vocabulary, a schema's compilation, a row's mask.
//!
//! `cargo bench --bench grammar -- VOCABULARY.gguf`, or a `tokenizer.json`. Answers are random
//! walks: each token is drawn evenly from those that the mask allows, which is what a model at a
//! very high temperature would write, and harder than what one writes. Times are CPU time of this
//! thread.

#[path = "thread_time.rs"]
mod thread_time;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use _core::gguf::GgufFile;
use _core::grammar::{Compiler, Constraint, ConstraintKind, GrammarState, Whitespace};
use _core::text::Tokenizer;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use thread_time::thread_time;

const ANSWERS: usize = 50;
const LONGEST: usize = 300;

const CASES: [(&str, ConstraintKind, &str); 7] = [
    (
        "person",
        ConstraintKind::Json,
        r#"{"type": "object", "properties": {"name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5}},
            "required": ["name", "age", "tags"], "additionalProperties": false}"#,
    ),
    (
        "tree",
        ConstraintKind::Json,
        r##"{"$defs": {"node": {"type": "object", "properties": {"value": {"type": "number"},
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["value", "children"], "additionalProperties": false}}, "$ref": "#/$defs/node"}"##,
    ),
    (
        "union",
        ConstraintKind::Json,
        r#"{"type": "array", "items": {"anyOf": [{"type": "object", "properties": {"kind": {"const": "text"},
            "text": {"type": "string"}}, "required": ["kind", "text"]}, {"type": "object", "properties":
            {"kind": {"const": "point"}, "x": {"type": "number"}, "y": {"type": "number"}},
            "required": ["kind", "x", "y"]}, {"type": "string", "format": "date-time"}]}}"#,
    ),
    ("json_object", ConstraintKind::JsonObject, ""),
    (
        "long text",
        ConstraintKind::Json,
        r#"{"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}"#,
    ),
    ("regex", ConstraintKind::Regex, r"[A-Z][a-z]{2,12} [A-Z][a-z]{2,20}, (19|20)\d\d-\d\d-\d\d"),
    ("choice", ConstraintKind::Choice, r#"["positive", "negative", "neutral", "mixed"]"#),
];

fn main() {
    let Some(path) = std::env::args().skip(1).find(|argument| !argument.starts_with("--")) else {
        println!("usage: cargo bench --bench grammar -- VOCABULARY.gguf");
        return;
    };
    let path = Path::new(&path);
    let tokenizer = Arc::new(if path.extension().is_some_and(|name| name == "gguf") {
        Tokenizer::from_gguf(&GgufFile::open(path).expect("a GGUF file")).expect("a vocabulary")
    } else {
        Tokenizer::from_file(path).expect("a tokenizer")
    });
    let vocab_size = tokenizer.vocab_size() as u32;
    let end = tokenizer.eos_token_id().expect("a model with an end token");
    let compiler = Compiler::new(tokenizer, vocab_size, &[end]);
    let before = resident();
    let (warm_up, ()) = timed(|| {
        compiler.compile(&constraint(ConstraintKind::Regex, "a")).expect("a grammar");
    });
    println!("vocabulary of {vocab_size}: trie in {warm_up:.1?}, {} MiB", (resident() - before) >> 20);
    println!(
        "{:<12} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "", "compile", "start", "mask", "p99", "max", "push", "tokens"
    );
    let mut all = Vec::new();
    for (name, kind, text) in CASES {
        let (compile, grammar) = timed(|| compiler.compile(&constraint(kind, text)).expect("a grammar"));
        let (mut masks, mut pushes, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        for seed in 0..ANSWERS {
            let (start, mut state) = timed(|| grammar.start());
            starts.push(start);
            walk(&mut *state, vocab_size, end, &mut StdRng::seed_from_u64(seed as u64), &mut masks, &mut pushes);
        }
        all.extend_from_slice(&masks);
        let [start, mask, push] = [&starts, &masks, &pushes].map(|times| mean(times));
        let (p99, max) = tail(&mut masks);
        println!(
            "{name:<12} {compile:>10.1?} {start:>10.1?} {mask:>9.1?} {p99:>9.1?} {max:>9.1?} {push:>9.1?} {:>9}",
            masks.len()
        );
    }
    let mean = mean(&all);
    let (p99, max) = tail(&mut all);
    println!("{:<12} {:>10} {:>10} {mean:>9.1?} {p99:>9.1?} {max:>9.1?}", "all", "", "");
}

fn constraint(kind: ConstraintKind, text: &str) -> Constraint {
    Constraint { kind, text: text.to_owned(), whitespace: Whitespace::Bounded }
}

fn walk(
    state: &mut dyn GrammarState,
    vocab_size: u32,
    end: u32,
    rng: &mut StdRng,
    masks: &mut Vec<Duration>,
    pushes: &mut Vec<Duration>,
) {
    let mut row = vec![0_u32; vocab_size.div_ceil(32) as usize];
    for _ in 0..LONGEST {
        let (time, result) = timed(|| state.mask(&mut row));
        result.expect("a mask");
        masks.push(time);
        let allowed: Vec<u32> =
            (0..vocab_size).filter(|token| row[*token as usize / 32] >> (token % 32) & 1 == 1).collect();
        let token = allowed[rng.random_range(0..allowed.len())];
        if token == end {
            return;
        }
        let (time, result) = timed(|| state.push(token));
        result.expect("an allowed token");
        pushes.push(time);
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let before = thread_time();
    let result = work();
    (thread_time().saturating_sub(before), result)
}

fn mean(times: &[Duration]) -> Duration {
    times.iter().sum::<Duration>() / times.len().max(1) as u32
}

/// The 99th percentile and the longest.
fn tail(times: &mut [Duration]) -> (Duration, Duration) {
    times.sort_unstable();
    (times[times.len() * 99 / 100], times[times.len() - 1])
}

/// Bytes of memory in use.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: usize = status.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * 4096
}
