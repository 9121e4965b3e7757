//! Ollama's `/api/chat` and `/api/generate`: a line of JSON for each delta, the last with counts
//! and times.

use std::io::Write;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use super::json::{write_integer, write_list, write_separated, write_string};
use super::openai_chat::write_token;
use super::split::{write_object, SplitReply, WholeAnswer};
use super::{Delta, Protocol, Timing, Usage};
use crate::output::{Failure, FinishReason};
use crate::text::answer::{AnswerFormat, Piece};
use crate::text::Tokenizer;

/// One call of Ollama's API, which has one choice.
#[derive(Debug)]
pub(super) struct Ollama {
    /// `{"model":...,"created_at":...`
    head: Box<[u8]>,
    is_chat: bool,
    split: SplitReply,
    arrived: Instant,
    streamed: Mutex<Streamed>,
}

/// What the last line of a stream tells of those before it.
#[derive(Debug, Default)]
struct Streamed {
    /// A call is told whole: its name and arguments so far.
    call: Option<(String, String)>,
    /// Calls told.
    calls: u32,
    reason: &'static str,
}

impl Ollama {
    /// `created_at` is a time as RFC 3339 writes it. `is_chat`: answers are messages.
    pub(super) fn new(id: &str, model: &str, created_at: &str, is_chat: bool, answer: AnswerFormat) -> Self {
        let mut head = b"{\"model\":".to_vec();
        write_string(&mut head, model);
        head.extend_from_slice(b",\"created_at\":");
        write_string(&mut head, created_at);
        let split = SplitReply::new(answer, id);
        Self { head: head.into(), is_chat, split, arrived: Instant::now(), streamed: Mutex::default() }
    }

    /// Appends a line up to `"done"`; `calls_before` were told in earlier lines.
    fn write_part(&self, out: &mut Vec<u8>, part: &WholeAnswer, calls_before: u32) {
        out.extend_from_slice(&self.head);
        let content = part.content.as_deref().unwrap_or_default();
        if self.is_chat {
            out.extend_from_slice(b",\"message\":{\"role\":\"assistant\",\"content\":");
        } else {
            out.extend_from_slice(b",\"response\":");
        }
        write_string(out, content);
        if let Some(text) = &part.reasoning {
            out.extend_from_slice(b",\"thinking\":");
            write_string(out, text);
        }
        if self.is_chat {
            if !part.calls.is_empty() {
                out.extend_from_slice(b",\"tool_calls\":[");
                write_separated(out, (calls_before..).zip(&part.calls), |out, (number, (name, arguments))| {
                    out.extend_from_slice(b"{\"id\":");
                    write_string(out, &self.split.call_id(0, number));
                    out.extend_from_slice(b",\"function\":{\"index\":");
                    write_integer(out, number.into());
                    out.extend_from_slice(b",\"name\":");
                    write_string(out, name);
                    out.extend_from_slice(b",\"arguments\":");
                    write_object(out, arguments);
                    out.extend_from_slice(b"}}");
                });
                out.push(b']');
            }
            out.push(b'}');
        }
        out.extend_from_slice(b",\"done\":");
    }

    /// Appends the end of the last line, from `"done"`'s value on. Chats have log probabilities before the times,
    /// completions behind them, as Ollama writes its fields.
    fn write_end(&self, out: &mut Vec<u8>, reason: &str, usage: Usage, logprobs: &[u8]) {
        let total = self.arrived.elapsed().as_nanos();
        let Usage { prompt_tokens, completion_tokens, timing, .. } = usage;
        let Timing { prompt, completion, .. } = timing.unwrap_or_default();
        let (prompt, completion) = (1000 * prompt, 1000 * completion);
        write!(out, "true,\"done_reason\":\"{reason}\"").expect("writing to a Vec cannot fail");
        let (before, behind) = if self.is_chat { (logprobs, &[][..]) } else { (&[][..], logprobs) };
        out.extend_from_slice(before);
        write!(
            out,
            ",\"total_duration\":{total},\"load_duration\":0,\
             \"prompt_eval_count\":{prompt_tokens},\"prompt_eval_duration\":{prompt},\"eval_count\":{completion_tokens},\
             \"eval_duration\":{completion}"
        )
        .expect("writing to a Vec cannot fail");
        out.extend_from_slice(behind);
        out.push(b'}');
    }
}

impl Streamed {
    /// The call that has come, once another piece shows that it has ended.
    fn take_call(&mut self, part: &mut WholeAnswer) {
        part.calls.extend(self.call.take());
    }
}

impl Protocol for Ollama {
    fn delta(&self, out: &mut Vec<u8>, delta: &Delta<'_>, _: Usage, tokenizer: Option<&Tokenizer>) {
        let mut streamed = self.streamed.lock().unwrap_or_else(PoisonError::into_inner);
        let mut part = WholeAnswer::default();
        for piece in self.split.split(delta).pieces {
            match piece {
                Piece::Reasoning(text) => part.reasoning.get_or_insert_default().push_str(&text),
                Piece::Content(text) => {
                    streamed.take_call(&mut part);
                    part.content.get_or_insert_default().push_str(&text);
                }
                Piece::Call(name) => {
                    streamed.take_call(&mut part);
                    streamed.call = Some((name, String::new()));
                }
                Piece::Arguments(text) => {
                    if let Some((_, arguments)) = &mut streamed.call {
                        arguments.push_str(&text);
                    }
                }
            }
        }
        if let Some(finish) = delta.finish {
            streamed.take_call(&mut part);
            streamed.reason = done_reason(finish.reason);
        }
        if part != WholeAnswer::default() || !delta.logprobs.is_empty() {
            self.write_part(out, &part, streamed.calls);
            streamed.calls += part.calls.len() as u32;
            out.extend_from_slice(b"false");
            write_logprobs(out, delta, tokenizer);
            out.extend_from_slice(b"}\n");
        }
    }

    fn close(&self, out: &mut Vec<u8>, usage: Usage) {
        let streamed = self.streamed.lock().unwrap_or_else(PoisonError::into_inner);
        self.write_part(out, &WholeAnswer::default(), 0);
        self.write_end(out, streamed.reason, usage, &[]);
        out.push(b'\n');
    }

    fn error(&self, out: &mut Vec<u8>, failure: &Failure) {
        write_error(out, &failure.message);
        out.push(b'\n');
    }

    fn body(&self, out: &mut Vec<u8>, choices: &[Delta<'_>], usage: Usage, tokenizer: Option<&Tokenizer>) {
        let Some(choice) = choices.first() else { return };
        self.write_part(out, &self.split.whole(choice), 0);
        let reason = choice.finish.map_or("stop", |finish| done_reason(finish.reason));
        let mut logprobs = Vec::new();
        write_logprobs(&mut logprobs, choice, tokenizer);
        self.write_end(out, reason, usage, &logprobs);
    }
}

/// Appends `,"logprobs":[...]`, where there are any.
fn write_logprobs(out: &mut Vec<u8>, delta: &Delta<'_>, tokenizer: Option<&Tokenizer>) {
    if delta.logprobs.is_empty() {
        return;
    }
    out.extend_from_slice(b",\"logprobs\":");
    write_list(out, delta.logprobs, |out, position| {
        let (drawn, top) = position.split_first().expect("every position has its drawn token");
        write_token(out, *drawn, tokenizer);
        if !top.is_empty() {
            out.extend_from_slice(b",\"top_logprobs\":");
            write_list(out, top, |out, token| {
                write_token(out, *token, tokenizer);
                out.push(b'}');
            });
        }
        out.push(b'}');
    });
}

/// Appends Ollama's error object.
pub fn write_error(out: &mut Vec<u8>, message: &str) {
    out.extend_from_slice(b"{\"error\":");
    write_string(out, message);
    out.push(b'}');
}

fn done_reason(reason: FinishReason) -> &'static str {
    if reason == FinishReason::Length {
        "length"
    } else {
        "stop"
    }
}
