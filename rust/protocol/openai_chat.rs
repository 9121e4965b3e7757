//! OpenAI's chat completions: `message` or `delta` with a role, log probabilities token by token.

use super::json::{write_escaped, write_integer, write_list, write_logprob, write_string};
use super::openai::Shape;
use super::token_text::token_text;
use super::Delta;
use crate::output::TokenLogprob;
use crate::text::Tokenizer;

/// `/v1/chat/completions`.
#[derive(Debug)]
pub(super) struct Chat;

impl Shape for Chat {
    const EVENT: &'static str = "chat.completion.chunk";
    const BODY: &'static str = "chat.completion";
    const PROMPT_IN_CHOICES: bool = false;

    fn write_delta(out: &mut Vec<u8>, delta: &Delta<'_>) {
        out.extend_from_slice(b",\"delta\":{");
        if delta.first {
            out.extend_from_slice(b"\"role\":\"assistant\",");
        }
        write_content(out, delta.text);
    }

    fn write_whole(out: &mut Vec<u8>, choice: &Delta<'_>) {
        out.extend_from_slice(b",\"message\":{\"role\":\"assistant\",");
        write_content(out, choice.text);
    }

    fn write_logprobs(out: &mut Vec<u8>, delta: &Delta<'_>, tokenizer: Option<&Tokenizer>) {
        out.extend_from_slice(b"{\"content\":");
        write_list(out, delta.logprobs, |out, position| {
            let (drawn, top) = position.split_first().expect("every position has its drawn token");
            write_token(out, *drawn, tokenizer);
            out.extend_from_slice(b",\"top_logprobs\":");
            write_list(out, top, |out, token| {
                write_token(out, *token, tokenizer);
                out.push(b'}');
            });
            out.push(b'}');
        });
        out.push(b'}');
    }
}

fn write_content(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(b"\"content\":\"");
    write_escaped(out, text);
    out.extend_from_slice(b"\"}");
}

/// Appends a token's object but for its closing brace.
pub(super) fn write_token(out: &mut Vec<u8>, token: TokenLogprob, tokenizer: Option<&Tokenizer>) {
    out.extend_from_slice(b"{\"token\":");
    write_string(out, &token_text(token.token, tokenizer));
    out.extend_from_slice(b",\"logprob\":");
    write_logprob(out, token.logprob);
    out.extend_from_slice(b",\"bytes\":");
    match tokenizer {
        Some(tokenizer) => {
            write_list(out, tokenizer.token_bytes(token.token), |out, byte| write_integer(out, (*byte).into()));
        }
        None => out.extend_from_slice(b"null"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{Finish, FinishReason};
    use crate::protocol::openai::tests::{event, written, HEAD};
    use crate::protocol::{ReplyFormat, StreamUsage, Usage};
    use crate::text::answer::AnswerFormat;
    use serde_json::json;

    #[test]
    fn events_carry_the_role_with_the_first_text() {
        let stream = Some(StreamUsage { at_end: true, in_every_event: false });
        let protocol = ReplyFormat::openai_chat(&HEAD, stream, None, AnswerFormat::default()).protocol;
        let first = Delta { index: 1, text: "H\n", first: true, ..Delta::default() };
        assert_eq!(
            event(&written(|out| protocol.delta(out, &first, Usage::default(), None))),
            json!({
                "id": "id-1", "object": "chat.completion.chunk", "created": 17, "model": "a \"model\"",
                "choices": [{"index": 1, "delta": {"role": "assistant", "content": "H\n"}, "logprobs": null,
                    "finish_reason": null}],
                "usage": null,
            })
        );
        let finish = Finish { reason: FinishReason::StopString(0), stop_text: Some("\"".to_owned()) };
        let last = Delta { finish: Some(&finish), ..Delta::default() };
        assert_eq!(
            event(&written(|out| protocol.delta(out, &last, Usage::default(), None)))["choices"],
            json!([{"index": 0, "delta": {"content": ""}, "logprobs": null, "finish_reason": "stop",
                "stop_reason": "\""}])
        );
    }

    #[test]
    fn whole_answers_have_messages() {
        let finish = Finish { reason: FinishReason::Length, stop_text: None };
        let choice = |index, text| Delta { index, text, first: true, finish: Some(&finish), ..Delta::default() };
        let protocol = ReplyFormat::openai_chat(&HEAD, None, None, AnswerFormat::default()).protocol;
        let usage = Usage { prompt_tokens: 1, completion_tokens: 2, ..Usage::default() };
        let body = written(|out| protocol.body(out, &[choice(0, "é"), choice(1, "")], usage, None));
        let expected = |index: u32, text: &str| {
            json!({"index": index, "message": {"role": "assistant", "content": text}, "logprobs": null,
                "finish_reason": "length", "stop_reason": null})
        };
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&body).unwrap(),
            json!({
                "id": "id-1", "object": "chat.completion", "created": 17, "model": "a \"model\"",
                "choices": [expected(0, "é"), expected(1, "")],
                "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3,
                    "prompt_tokens_details": {"cached_tokens": 0}},
            })
        );
    }

    #[test]
    fn log_probabilities_name_text_and_bytes() {
        let banned = TokenLogprob { token: 66, logprob: f32::NEG_INFINITY, rank: 9 };
        let half = TokenLogprob { token: 0xC3, logprob: -0.1, rank: 1 };
        let logprobs = [vec![half, half, banned], vec![banned]];
        let delta = Delta { logprobs: &logprobs, ..Delta::default() };
        let tokenizer = Tokenizer::bytes_only(256);
        let object = |token: &str, logprob: f64, bytes: serde_json::Value| json!({"token": token, "logprob": logprob, "bytes": bytes});
        let with_top = |mut token: serde_json::Value, top: serde_json::Value| {
            token["top_logprobs"] = top;
            token
        };
        let (half, banned) = (object("\u{FFFD}", -0.1, json!([195])), object("B", -9999.0, json!([66])));
        let read = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap();
        // -9999 is written as an integer.
        assert_eq!(
            read(written(|out| Chat::write_logprobs(out, &delta, Some(&tokenizer))).replace("-9999", "-9999.0")),
            json!({"content": [
                with_top(half.clone(), json!([half, banned])), with_top(banned, json!([])),
            ]})
        );
        let unknown = read(written(|out| Chat::write_logprobs(out, &delta, None)));
        assert_eq!(unknown["content"][0]["token"], "token_id:195");
        assert!(unknown["content"][0]["bytes"].is_null());
    }
}
