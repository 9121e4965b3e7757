//! OpenAI's chats whose answers may hold reasoning and calls of tools: `reasoning_content`,
//! `tool_calls`.
//!
//! A token that makes nothing certain has an event with an empty delta, and one that makes several
//! things certain has several events: a call's first has its name and empty `arguments`, the
//! following ones pieces of them. Clients join entries of `tool_calls` by `index`, and some of them
//! break when one event has the same index twice.

use super::json::{write_integer, write_separated, write_string};
use super::openai::{OpenAi, StreamUsage};
use super::openai_chat::Chat;
use super::openai_prompt::TokenIds;
use super::split::{SplitReply, WholeAnswer};
use super::{CallHead, Delta, Protocol, Usage};
use crate::output::{Failure, Finish};
use crate::text::answer::{AnswerFormat, Piece};
use crate::text::Tokenizer;

/// `/v1/chat/completions` with an answer of parts.
#[derive(Debug)]
pub(super) struct ChatWithTools {
    chat: OpenAi<Chat>,
    split: SplitReply,
}

impl ChatWithTools {
    pub(super) fn new(
        call: &CallHead<'_>,
        stream: Option<StreamUsage>,
        token_ids: Option<TokenIds>,
        format: AnswerFormat,
    ) -> Self {
        Self { chat: OpenAi::new(call, stream).with_token_ids(token_ids), split: SplitReply::new(format, call.id) }
    }
}

impl Protocol for ChatWithTools {
    fn delta(&self, out: &mut Vec<u8>, delta: &Delta<'_>, usage: Usage, tokenizer: Option<&Tokenizer>) {
        let split = self.split.split(delta);
        let mut calls = split.calls_before;
        let begun = split.pieces.iter().filter(|piece| matches!(piece, Piece::Call(_))).count() as u32;
        let reason = finish_reason(delta.finish, calls + begun);
        let count = split.pieces.len().max(1);
        for number in 0..count {
            let piece = split.pieces.get(number);
            let (first, last) = (number == 0, number + 1 == count);
            let event = Delta {
                first: delta.first && first,
                tokens: if first { delta.tokens } else { &[] },
                logprobs: if first { delta.logprobs } else { &[] },
                finish: delta.finish.filter(|_| last),
                ..*delta
            };
            calls += u32::from(matches!(piece, Some(Piece::Call(_))));
            self.chat.event(out, &event, reason, usage, tokenizer, |out| {
                out.extend_from_slice(b",\"delta\":{");
                if event.first {
                    out.extend_from_slice(b"\"role\":\"assistant\"");
                }
                self.write_piece(out, delta.index, calls, piece, event.first);
                out.push(b'}');
            });
        }
    }

    fn close(&self, out: &mut Vec<u8>, usage: Usage) {
        self.chat.close(out, usage);
    }

    fn error(&self, out: &mut Vec<u8>, failure: &Failure) {
        self.chat.error(out, failure);
    }

    fn body(&self, out: &mut Vec<u8>, choices: &[Delta<'_>], usage: Usage, tokenizer: Option<&Tokenizer>) {
        self.chat.whole(out, choices, usage, tokenizer, |out, choice| {
            let answer = self.split.whole(choice);
            self.write_message(out, choice.index, &answer);
            finish_reason(choice.finish, answer.calls.len() as u32)
        });
    }
}

impl ChatWithTools {
    /// Appends the field of a piece. `calls`: how many have begun with it.
    fn write_piece(&self, out: &mut Vec<u8>, choice: u32, calls: u32, piece: Option<&Piece>, follows: bool) {
        if follows {
            out.push(b',');
        }
        match piece {
            Some(Piece::Reasoning(text)) => write_reasoning(out, text),
            Some(Piece::Content(text)) => write_field(out, b"content", text),
            Some(Piece::Call(name)) => {
                out.extend_from_slice(b"\"tool_calls\":[{\"index\":");
                write_integer(out, u64::from(calls.saturating_sub(1)));
                out.push(b',');
                self.write_call(out, choice, calls.saturating_sub(1), name, "");
                out.push(b']');
            }
            Some(Piece::Arguments(text)) => {
                out.extend_from_slice(b"\"tool_calls\":[{\"index\":");
                write_integer(out, u64::from(calls.saturating_sub(1)));
                out.extend_from_slice(b",\"function\":{");
                write_field(out, b"arguments", text);
                out.extend_from_slice(b"}}]");
            }
            None if follows => write_field(out, b"content", ""),
            None => {}
        }
    }

    fn write_message(&self, out: &mut Vec<u8>, choice: u32, answer: &WholeAnswer) {
        out.extend_from_slice(b",\"message\":{\"role\":\"assistant\",");
        match &answer.content {
            Some(text) => write_field(out, b"content", text),
            None if answer.calls.is_empty() && answer.reasoning.is_none() => write_field(out, b"content", ""),
            None => out.extend_from_slice(b"\"content\":null"),
        }
        if let Some(text) = &answer.reasoning {
            out.push(b',');
            write_reasoning(out, text);
        }
        if !answer.calls.is_empty() {
            out.extend_from_slice(b",\"tool_calls\":[");
            write_separated(out, (0..).zip(&answer.calls), |out, (number, (name, arguments))| {
                out.push(b'{');
                self.write_call(out, choice, number, name, arguments);
            });
            out.push(b']');
        }
        out.push(b'}');
    }

    /// Appends a call's fields, and the bracket that closes it.
    fn write_call(&self, out: &mut Vec<u8>, choice: u32, number: u32, name: &str, arguments: &str) {
        write_field(out, b"id", &self.split.call_id(choice, number));
        out.extend_from_slice(b",\"type\":\"function\",\"function\":{");
        write_field(out, b"name", name);
        out.push(b',');
        write_field(out, b"arguments", arguments);
        out.extend_from_slice(b"}}");
    }
}

/// A model that called a tool and stopped waits for the result.
fn finish_reason(finish: Option<&Finish>, calls: u32) -> Option<&'static str> {
    let reason = finish?.reason.as_str();
    Some(if calls > 0 && reason == "stop" { "tool_calls" } else { reason })
}

fn write_field(out: &mut Vec<u8>, name: &[u8], text: &str) {
    out.push(b'"');
    out.extend_from_slice(name);
    out.extend_from_slice(b"\":");
    write_string(out, text);
}

/// Under the name that clients have read for long, and under vLLM's newer one.
fn write_reasoning(out: &mut Vec<u8>, text: &str) {
    write_field(out, b"reasoning_content", text);
    out.push(b',');
    write_field(out, b"reasoning", text);
}
