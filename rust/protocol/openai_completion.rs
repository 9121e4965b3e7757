//! OpenAI's text completions: `text`, log probabilities as parallel lists.

use std::borrow::Cow;

use super::json::{write_escaped, write_integer, write_list, write_logprob, write_separated, write_string};
use super::openai::Shape;
use super::token_text::token_text;
use super::Delta;
use crate::output::TokenLogprob;
use crate::text::Tokenizer;

/// `/v1/completions`.
#[derive(Debug)]
pub(super) struct Completion;

impl Shape for Completion {
    const EVENT: &'static str = "text_completion";
    const BODY: &'static str = "text_completion";
    const PROMPT_IN_CHOICES: bool = true;

    fn write_delta(out: &mut Vec<u8>, delta: &Delta<'_>) {
        out.extend_from_slice(b",\"text\":\"");
        write_escaped(out, delta.text);
        out.push(b'"');
    }

    fn write_whole(out: &mut Vec<u8>, choice: &Delta<'_>) {
        Self::write_delta(out, choice);
    }

    fn write_logprobs(out: &mut Vec<u8>, delta: &Delta<'_>, tokenizer: Option<&Tokenizer>) {
        out.extend_from_slice(b"{\"tokens\":");
        write_list(out, delta.tokens, |out, token| write_string(out, &token_text(token.id, tokenizer)));
        out.extend_from_slice(b",\"token_logprobs\":");
        // The first token of a prompt has none: nothing comes before it.
        write_list(out, delta.logprobs, |out, position| match position.first() {
            Some(own) => write_logprob(out, own.logprob),
            None => out.extend_from_slice(b"null"),
        });
        out.extend_from_slice(b",\"top_logprobs\":");
        write_list(out, delta.logprobs, |out, position| match position.as_slice() {
            [] => out.extend_from_slice(b"null"),
            position => write_by_text(out, position, tokenizer),
        });
        out.extend_from_slice(b",\"text_offset\":");
        write_list(out, delta.tokens, |out, token| write_integer(out, token.text_offset.into()));
        out.push(b'}');
    }
}

/// Appends `{text: logprob}`. The drawn token is always in it: clients find out by it whether the
/// draw was the likeliest. Of tokens with the same text only the first is kept, since a JSON object
/// has each key once.
fn write_by_text(out: &mut Vec<u8>, position: &[TokenLogprob], tokenizer: Option<&Tokenizer>) {
    let mut entries: Vec<(Cow<'_, str>, f32)> = Vec::with_capacity(position.len());
    for token in position {
        let text = token_text(token.token, tokenizer);
        if entries.iter().all(|(known, _)| *known != text) {
            entries.push((text, token.logprob));
        }
    }
    out.push(b'{');
    write_separated(out, &entries, |out, (text, logprob)| {
        write_string(out, text);
        out.push(b':');
        write_logprob(out, *logprob);
    });
    out.push(b'}');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{Finish, FinishReason, Token};
    use crate::protocol::openai::tests::{event, written, HEAD};
    use crate::protocol::{ReplyFormat, StreamUsage, Usage};
    use serde_json::json;

    #[test]
    fn events_hold_text() {
        let finish = Finish { reason: FinishReason::StopToken(7), stop_text: None };
        let last = Delta { text: "é", finish: Some(&finish), first: true, ..Delta::default() };
        let protocol = ReplyFormat::openai_completion(&HEAD, Some(StreamUsage::default()), None, None, None).protocol;
        assert_eq!(
            event(&written(|out| protocol.delta(out, &last, Usage::default(), None))),
            json!({
                "id": "id-1", "object": "text_completion", "created": 17, "model": "a \"model\"",
                "choices": [{"index": 0, "text": "é", "logprobs": null, "finish_reason": "stop", "stop_reason": 7}],
            })
        );
    }

    #[test]
    fn log_probabilities_are_parallel_lists() {
        let token = |id, text_offset| Token { id, text_end: 0, text_offset };
        let entry = |token, logprob| TokenLogprob { token, logprob, rank: 1 };
        // Two halves of a character have the same text; the first of them is the drawn one.
        let logprobs = [
            vec![entry(0xC3, -0.5), entry(0xC3, -0.5), entry(0xC4, -1.5)],
            vec![entry(65, -0.25), entry(66, -0.125), entry(65, -0.25)],
        ];
        let delta = Delta { tokens: &[token(0xC3, 7), token(65, 8)], logprobs: &logprobs, ..Delta::default() };
        let text = written(|out| Completion::write_logprobs(out, &delta, Some(&Tokenizer::bytes_only(256))));
        assert_eq!(text.matches('\u{FFFD}').count(), 2); // serde_json would hide a key that comes twice
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&text).unwrap(),
            json!({
                "tokens": ["\u{FFFD}", "A"],
                "token_logprobs": [-0.5, -0.25],
                "top_logprobs": [{"\u{FFFD}": -0.5}, {"A": -0.25, "B": -0.125}],
                "text_offset": [7, 8],
            })
        );
    }
}
