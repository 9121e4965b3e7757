//! Anthropic's `/v1/messages`: content blocks, each opened, filled and closed; events with names.

use std::io::Write;
use std::sync::{Mutex, PoisonError};

use super::json::{write_integer, write_optional_string, write_string};
use super::split::{write_object, SplitReply};
use super::{CallHead, Delta, Protocol, Usage};
use crate::output::{Failure, Finish, FinishReason};
use crate::text::answer::{AnswerFormat, Piece};
use crate::text::Tokenizer;

/// One call of Anthropic's API, which has one choice.
#[derive(Debug)]
pub(super) struct Anthropic {
    id: Box<str>,
    model: Box<str>,
    timing: bool,
    split: SplitReply,
    streamed: Mutex<Streamed>,
}

/// Where a stream stands.
#[derive(Debug, Default)]
struct Streamed {
    open: Option<Block>,
    /// Blocks that were opened.
    blocks: u64,
    /// Of them calls of tools.
    calls: u32,
    /// How the choice ended: reason and stop sequence.
    end: Option<(&'static str, Option<String>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Text,
    Thinking,
    ToolUse,
}

impl Anthropic {
    pub(super) fn new(head: &CallHead<'_>, answer: AnswerFormat) -> Self {
        let CallHead { id, model, timing, .. } = *head;
        let split = SplitReply::new(answer, id);
        Self { id: id.into(), model: model.into(), timing, split, streamed: Mutex::default() }
    }

    /// What the client is told of the usage.
    fn shown(&self, usage: Usage) -> Usage {
        Usage { timing: usage.timing.filter(|_| self.timing), ..usage }
    }

    /// Appends the message's fields up to the inside of its content.
    fn write_head(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"id\":");
        write_string(out, &self.id);
        out.extend_from_slice(b",\"type\":\"message\",\"role\":\"assistant\",\"model\":");
        write_string(out, &self.model);
        out.extend_from_slice(b",\"content\":[");
    }

    /// Appends a block of a call, but for its input.
    fn write_tool_use(&self, out: &mut Vec<u8>, number: u32, name: &str) {
        out.extend_from_slice(b"{\"type\":\"tool_use\",\"id\":");
        write_string(out, &self.split.call_id(0, number).replacen("call_", "toolu_", 1));
        out.extend_from_slice(b",\"name\":");
        write_string(out, name);
        out.extend_from_slice(b",\"input\":");
    }

    fn write_piece(&self, out: &mut Vec<u8>, streamed: &mut Streamed, piece: &Piece) {
        match piece {
            Piece::Content(text) => {
                streamed.enter(out, Block::Text, |out| out.extend_from_slice(b"{\"type\":\"text\",\"text\":\"\"}"));
                streamed.write_delta(out, b"{\"type\":\"text_delta\",\"text\":", text);
            }
            Piece::Reasoning(text) => {
                streamed.enter(out, Block::Thinking, |out| {
                    out.extend_from_slice(b"{\"type\":\"thinking\",\"thinking\":\"\",\"signature\":\"\"}");
                });
                streamed.write_delta(out, b"{\"type\":\"thinking_delta\",\"thinking\":", text);
            }
            Piece::Call(name) => {
                let number = streamed.calls;
                streamed.calls += 1;
                streamed.close(out);
                streamed.enter(out, Block::ToolUse, |out| {
                    self.write_tool_use(out, number, name);
                    out.extend_from_slice(b"{}}");
                });
            }
            Piece::Arguments(text) => {
                streamed.write_delta(out, b"{\"type\":\"input_json_delta\",\"partial_json\":", text);
            }
        }
    }
}

impl Streamed {
    /// Opens a block of this kind unless it is open.
    fn enter(&mut self, out: &mut Vec<u8>, block: Block, write: impl FnOnce(&mut Vec<u8>)) {
        if self.open == Some(block) {
            return;
        }
        self.close(out);
        self.open = Some(block);
        event(out, "content_block_start", |out| {
            out.extend_from_slice(b",\"index\":");
            write_integer(out, self.blocks);
            out.extend_from_slice(b",\"content_block\":");
            write(out);
        });
        self.blocks += 1;
    }

    fn close(&mut self, out: &mut Vec<u8>) {
        let Some(block) = self.open.take() else { return };
        let index = self.blocks.saturating_sub(1);
        if block == Block::Thinking {
            // Clients that send the block back need one.
            self.write_raw_delta(out, b"{\"type\":\"signature_delta\",\"signature\":\"\"}");
        }
        event(out, "content_block_stop", |out| {
            out.extend_from_slice(b",\"index\":");
            write_integer(out, index);
        });
    }

    fn write_delta(&self, out: &mut Vec<u8>, head: &[u8], text: &str) {
        let mut delta = head.to_vec();
        write_string(&mut delta, text);
        delta.push(b'}');
        self.write_raw_delta(out, &delta);
    }

    fn write_raw_delta(&self, out: &mut Vec<u8>, delta: &[u8]) {
        event(out, "content_block_delta", |out| {
            out.extend_from_slice(b",\"index\":");
            write_integer(out, self.blocks.saturating_sub(1));
            out.extend_from_slice(b",\"delta\":");
            out.extend_from_slice(delta);
        });
    }
}

impl Protocol for Anthropic {
    fn open(&self, out: &mut Vec<u8>, usage: Usage) {
        event(out, "message_start", |out| {
            out.extend_from_slice(b",\"message\":");
            self.write_head(out);
            out.extend_from_slice(b"],\"stop_reason\":null,\"stop_sequence\":null,");
            write_usage(out, Usage { completion_tokens: 0, timing: None, ..usage });
            out.push(b'}');
        });
    }

    fn delta(&self, out: &mut Vec<u8>, delta: &Delta<'_>, _: Usage, _: Option<&Tokenizer>) {
        let mut streamed = self.streamed.lock().unwrap_or_else(PoisonError::into_inner);
        for piece in self.split.split(delta).pieces {
            self.write_piece(out, &mut streamed, &piece);
        }
        if let Some(finish) = delta.finish {
            streamed.end = Some((stop_reason(finish, streamed.calls), finish.stop_text.clone()));
        }
    }

    fn close(&self, out: &mut Vec<u8>, usage: Usage) {
        let mut streamed = self.streamed.lock().unwrap_or_else(PoisonError::into_inner);
        streamed.close(out);
        event(out, "message_delta", |out| {
            out.extend_from_slice(b",\"delta\":{");
            let (reason, stop) = streamed.end.take().unwrap_or(("end_turn", None));
            write_end(out, reason, stop.as_deref());
            out.extend_from_slice(b"},");
            write_usage(out, self.shown(usage));
        });
        event(out, "message_stop", |_| {});
    }

    fn error(&self, out: &mut Vec<u8>, failure: &Failure) {
        let kind = match failure.param() {
            Some(_) => "invalid_request_error",
            None if failure.is_of_the_server() => "overloaded_error",
            None => "api_error",
        };
        out.extend_from_slice(b"event: error\ndata: ");
        write_error(out, &failure.message, kind);
        out.extend_from_slice(b"\n\n");
    }

    fn body(&self, out: &mut Vec<u8>, choices: &[Delta<'_>], usage: Usage, _: Option<&Tokenizer>) {
        let Some(choice) = choices.first() else { return };
        let answer = self.split.whole(choice);
        self.write_head(out);
        let mut separator: &[u8] = b"";
        if let Some(text) = &answer.reasoning {
            out.extend_from_slice(b"{\"type\":\"thinking\",\"thinking\":");
            write_string(out, text);
            out.extend_from_slice(b",\"signature\":\"\"}");
            separator = b",";
        }
        if let Some(text) = &answer.content {
            out.extend_from_slice(separator);
            out.extend_from_slice(b"{\"type\":\"text\",\"text\":");
            write_string(out, text);
            out.push(b'}');
            separator = b",";
        }
        for (number, (name, arguments)) in (0..).zip(&answer.calls) {
            out.extend_from_slice(separator);
            self.write_tool_use(out, number, name);
            write_object(out, arguments);
            out.push(b'}');
            separator = b",";
        }
        out.extend_from_slice(b"],");
        match choice.finish {
            Some(finish) => {
                let reason = stop_reason(finish, answer.calls.len() as u32);
                write_end(out, reason, finish.stop_text.as_deref());
            }
            None => write_end(out, "end_turn", None),
        }
        out.push(b',');
        write_usage(out, self.shown(usage));
        out.push(b'}');
    }
}

/// Appends Anthropic's error object.
pub fn write_error(out: &mut Vec<u8>, message: &str, kind: &str) {
    out.extend_from_slice(b"{\"type\":\"error\",\"error\":{\"type\":");
    write_string(out, kind);
    out.extend_from_slice(b",\"message\":");
    write_string(out, message);
    out.extend_from_slice(b"}}");
}

/// Appends an event with its name, whose object's further fields are written by `write`.
fn event(out: &mut Vec<u8>, name: &str, write: impl FnOnce(&mut Vec<u8>)) {
    write!(out, "event: {name}\ndata: {{\"type\":\"{name}\"").expect("writing to a Vec cannot fail");
    write(out);
    out.extend_from_slice(b"}\n\n");
}

fn stop_reason(finish: &Finish, calls: u32) -> &'static str {
    match finish.reason {
        FinishReason::Length => "max_tokens",
        _ if calls > 0 => "tool_use",
        FinishReason::StopString(_) => "stop_sequence",
        _ => "end_turn",
    }
}

fn write_end(out: &mut Vec<u8>, reason: &str, stop: Option<&str>) {
    out.extend_from_slice(b"\"stop_reason\":");
    write_string(out, reason);
    out.extend_from_slice(b",\"stop_sequence\":");
    write_optional_string(out, stop);
}

/// Appends `"usage":{...}`. Anthropic counts cached tokens beside the others.
fn write_usage(out: &mut Vec<u8>, usage: Usage) {
    let Usage { prompt_tokens, completion_tokens, cached_tokens, timing, .. } = usage;
    let computed = prompt_tokens.saturating_sub(cached_tokens);
    write!(
        out,
        "\"usage\":{{\"input_tokens\":{computed},\"cache_creation_input_tokens\":0,\
         \"cache_read_input_tokens\":{cached_tokens},\"output_tokens\":{completion_tokens}"
    )
    .expect("writing to a Vec cannot fail");
    if let Some(timing) = timing {
        timing.write(out);
    }
    out.push(b'}');
}
