//! Answers as models write them, and as they break them.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;

fn format(calls: Calls) -> AnswerFormat {
    AnswerFormat { calls, tools: vec!["f".to_owned(), "g".to_owned()], ..AnswerFormat::default() }
}

fn written(format_: CallFormat) -> AnswerFormat {
    format(Calls::Written(format_))
}

fn thinking(format: AnswerFormat) -> AnswerFormat {
    AnswerFormat { reasoning: ReasoningTags::from_name("think"), ..format }
}

/// The pieces of a text that comes in these deltas, with neighbours of one kind joined.
fn split(format: &AnswerFormat, deltas: &[&str]) -> Vec<Piece> {
    let mut splitter = AnswerSplitter::new(Arc::new(format.clone()));
    let mut pieces = Pieces::default();
    for delta in deltas {
        splitter.push(delta).into_iter().for_each(|piece| pieces.add(piece));
    }
    splitter.finish().into_iter().for_each(|piece| pieces.add(piece));
    pieces.list
}

/// In short: `r` reasoning, `c` content, a call as `name(arguments)`.
fn shown(format: &AnswerFormat, text: &str) -> Vec<String> {
    let mut shown: Vec<String> = Vec::new();
    for piece in split(format, &[text]) {
        match piece {
            Piece::Reasoning(text) => shown.push(format!("r:{text}")),
            Piece::Content(text) => shown.push(format!("c:{text}")),
            Piece::Call(name) => shown.push(format!("{name}:")),
            Piece::Arguments(text) => shown.last_mut().unwrap().push_str(&text),
        }
    }
    shown
}

#[test]
fn hermes_calls() {
    let hermes = written(CallFormat::Hermes);
    for (text, expected) in [
        ("Hello {\"name\": 1}", vec!["c:Hello {\"name\": 1}"]),
        (
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1, \"}\"]}}\n</tool_call>",
            vec!["f:{\"a\": [1, \"}\"]}"],
        ),
        (
            "Let me see.\n\n<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>\n<tool_call>\n\
             {\"arguments\": {\"x\":1}, \"name\": \"other\"}\n</tool_call>\nDone.",
            vec!["c:Let me see.", "f:{}", "other:{\"x\":1}", "c:Done."],
        ),
        ("<tool_call>[{\"name\": \"f\"}, {\"name\": \"g\", \"arguments\": null}]</tool_call>", vec!["f:{}", "g:{}"]),
        // JSON in a string, with its escapes undone; a half of a pair stays as it was written.
        (
            r#"<tool_call>{"name": "f", "arguments": "{\"a\": \"\u00e9\ud83d\ude00\\n\"}"}</tool_call>"#,
            vec![r#"f:{"a": "é😀\n"}"#],
        ),
        (r#"<tool_call>{"name": "f", "arguments": "\ud83d"}</tool_call>"#, vec![r"f:\ud83d"]),
        // No call, so content as it was written.
        ("a <tool_call>maybe</tool_call>", vec!["c:a <tool_call>maybe</tool_call>"]),
        ("<tool_call>{'name': 'f'}</tool_call>", vec!["c:<tool_call>{'name': 'f'}</tool_call>"]),
        ("<tool_call>{\"arguments\": {}}</tool_call>", vec!["c:<tool_call>{\"arguments\": {}}</tool_call>"]),
        (" <tool_call>{\"na", vec!["c: <tool_call>{\"na"]),
        ("x <tool_ca", vec!["c:x <tool_ca"]),
        ("<tool_call>{\"name\": \"\"}", vec!["c:<tool_call>{\"name\": \"\"}"]),
        // A call whose arguments break off, or are broken.
        ("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"b", vec!["f:{\"a\": \"b"]),
        ("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}\n</tool_call> ok", vec!["f:{\"a\": 1}", "c:ok"]),
        ("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1\n</tool_call>", vec!["f:{\"a\": 1\n"]),
        ("<tool_call>{\"name\": \"f\", \"arguments\": 12}</tool_call>\n", vec!["f:12"]),
        ("", vec![]),
        ("  \n", vec!["c:  \n"]),
    ] {
        assert_eq!(shown(&hermes, text), expected, "{text}");
    }
}

#[test]
fn llama_calls_begin_the_answer_and_name_a_tool() {
    let llama = written(CallFormat::Llama3);
    for (text, expected) in [
        ("{\"name\": \"f\", \"parameters\": {\"a\": 1}}", vec!["f:{\"a\": 1}"]),
        ("\n<|python_tag|>{\"type\": \"function\", \"name\": \"f\", \"parameters\": {}}", vec!["f:{}"]),
        ("{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {}}", vec!["f:{}", "g:{}"]),
        ("{\"name\": \"John\", \"parameters\": {}}", vec!["c:{\"name\": \"John\", \"parameters\": {}}"]),
        ("{\"answer\": 42}", vec!["c:{\"answer\": 42}"]),
        ("Use {\"name\": \"f\"}", vec!["c:Use {\"name\": \"f\"}"]),
        ("[1, 2]", vec!["c:[1, 2]"]),
    ] {
        assert_eq!(shown(&llama, text), expected, "{text}");
    }
}

#[test]
fn mistral_and_gemma_calls() {
    let mistral = written(CallFormat::Mistral);
    for (text, expected) in [
        (
            "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": 1}}, {\"name\": \"g\", \"arguments\": {}}]",
            vec!["f:{\"a\": 1}", "g:{}"],
        ),
        ("[TOOL_CALLS]f[ARGS]{\"a\": 1}[TOOL_CALLS]g{}", vec!["f:{\"a\": 1}", "g:{}"]),
        ("[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{\"a\": {}} ", vec!["f:{\"a\": {}}"]),
        ("So [TOOL_CALLS] hm?", vec!["c:So [TOOL_CALLS] hm?"]),
        ("[1]", vec!["c:[1]"]),
    ] {
        assert_eq!(shown(&mistral, text), expected, "{text}");
    }
    let gemma = written(CallFormat::Gemma);
    for (text, expected) in [
        ("```tool_code\n{\"name\": \"f\", \"parameters\": {\"a\": 1}}\n```", vec!["f:{\"a\": 1}"]),
        ("[{\"name\": \"f\", \"parameters\": {}}, {\"name\": \"g\", \"parameters\": {}}]", vec!["f:{}", "g:{}"]),
        ("Sure:\n```json\n{\"a\": 1}\n```\nok", vec!["c:Sure:\n```json\n{\"a\": 1}\n```\nok"]),
    ] {
        assert_eq!(shown(&gemma, text), expected, "{text}");
    }
}

#[test]
fn forced_calls() {
    let named = format(Calls::Named("f".to_owned()));
    assert_eq!(shown(&named, " {\"a\": \"<tool_call>\"}"), ["f:{\"a\": \"<tool_call>\"}"]);
    assert_eq!(shown(&thinking(named), "<think>\nhm\n</think>\n{}"), ["r:hm", "f:{}"]);
    let required = format(Calls::Required);
    assert_eq!(
        shown(&required, "[{\"name\": \"f\", \"parameters\": {\"a\": 1}}, {\"name\": \"g\", \"parameters\": {}}]"),
        ["f:{\"a\": 1}", "g:{}"]
    );
}

#[test]
fn only_the_first_of_calls_that_may_not_be_parallel() {
    let single = AnswerFormat { single_call: true, ..written(CallFormat::Hermes) };
    let call = |name| format!("<tool_call>{{\"name\": \"{name}\", \"arguments\": {{\"a\": 1}}}}</tool_call>");
    assert_eq!(shown(&single, &format!("{}{}", call("f"), call("g"))), ["f:{\"a\": 1}"]);
}

#[test]
fn reasoning_is_told_from_content() {
    let plain = thinking(AnswerFormat::default());
    let within = AnswerFormat { begins_in_reasoning: true, ..plain.clone() };
    let hermes = thinking(written(CallFormat::Hermes));
    let call = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    for (format, text, expected) in [
        (
            &plain,
            "<think>\nSo a < b,\n\n</th.\n</think>\n\nYes <think>.",
            vec!["r:So a < b,\n\n</th.", "c:Yes <think>."],
        ),
        (&plain, "No <think>hm</think>", vec!["c:No <think>hm</think>"]),
        (&plain, "\n<think></think>Yes\n", vec!["c:Yes\n"]),
        (&plain, "<think>cut ", vec!["r:cut"]),
        (&plain, "<thin", vec!["c:<thin"]),
        (&within, "hm</think> Yes", vec!["r:hm", "c:Yes"]),
        (&within, "\nnever closed </thi", vec!["r:never closed </thi"]),
        (&hermes, &format!("<think>hm</think>\n\n{call}"), vec!["r:hm", "f:{}"]),
        (&hermes, call, vec!["f:{}"]),
    ] {
        assert_eq!(shown(format, text), expected, "{text}");
    }
    let dropped = AnswerFormat { drops_reasoning: true, ..plain };
    assert_eq!(shown(&dropped, "<think>hm</think>Yes"), ["c:Yes"]);
}

#[test]
fn what_is_certain_leaves_at_once() {
    let mut splitter = AnswerSplitter::new(Arc::new(written(CallFormat::Hermes)));
    assert_eq!(splitter.push("Hi "), [Piece::Content("Hi".to_owned())]);
    assert_eq!(splitter.push("<tool"), []);
    assert_eq!(splitter.push("_call>{\"name\":"), []);
    assert_eq!(splitter.push("\"f\""), [Piece::Call("f".to_owned())]);
    assert_eq!(splitter.push(",\"arguments\":{\"a\""), [Piece::Arguments("{\"a\"".to_owned())]);
    assert_eq!(splitter.push(":1}"), [Piece::Arguments(":1}".to_owned())]);
    assert_eq!(splitter.push("}</tool_call>"), []);
}

#[test]
fn markers_can_be_told_apart() {
    for format in CallFormat::ALL {
        assert_eq!(CallFormat::from_name(format.name()), Some(format));
        for marker in format.opens().iter().chain(format.closes()) {
            assert!(!marker.contains(char::is_whitespace));
            assert!(format
                .opens()
                .iter()
                .all(|other| other == marker || !other.starts_with(marker) || *marker == "```"));
        }
    }
}

proptest! {
    #[test]
    fn cuts_change_nothing(
        fragments in prop::collection::vec(prop::sample::select(vec![
            "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "```json",
            "```", "{\"name\": \"f\", ", "{\"name\": \"x\", ", "\"arguments\": ", "\"parameters\": ", "{\"a\": \"é\\\"\"}",
            "{", "}", "[", "]", ",", ";", "\n", " ", "word", "\"\\ud83d\\ude00\"", "null", "\"name\": \"g\"", "\\",
        ]), 0..14),
        cuts in prop::collection::vec(0usize..200, 0..8),
        calls in 0usize..7,
        reasons in any::<bool>(),
        begins in any::<bool>(),
        single_call in any::<bool>(),
    ) {
        let text: String = fragments.concat();
        let calls = match calls {
            0 => Calls::None,
            1 => Calls::Required,
            2 => Calls::Named("f".to_owned()),
            other => Calls::Written(CallFormat::ALL[other - 3]),
        };
        let format = AnswerFormat {
            reasoning: ReasoningTags::from_name("think").filter(|_| reasons),
            begins_in_reasoning: begins,
            single_call,
            ..format(calls)
        };
        let mut at: Vec<usize> = cuts.into_iter().filter(|cut| text.is_char_boundary(*cut)).collect();
        at.sort_unstable();
        let mut deltas = Vec::new();
        let mut start = 0;
        for cut in at.into_iter().chain([text.len()]) {
            deltas.push(&text[start..cut.max(start)]);
            start = cut.max(start);
        }
        let whole = split(&format, &[&text]);
        prop_assert_eq!(&split(&format, &deltas), &whole);
        // Without calls and reasoning nothing is looked for.
        if format.is_plain() {
            prop_assert_eq!(whole, if text.is_empty() { vec![] } else { vec![Piece::Content(text)] });
        }
    }
}
