//! OpenAI's `/v1/responses`: items of output, each added, filled and done; events with names and
//! numbers.
//!
//! Reasoning, messages and calls of functions are items of their own, in the order in which the
//! model wrote them, streamed or whole. Nothing is stored: what a client wants remembered it sends
//! again.

use std::io::Write;
use std::sync::{Mutex, PoisonError};

use super::json::{write_integer, write_one_line, write_separated, write_string};
use super::openai::{failure_type, write_error_fields};
use super::split::SplitReply;
use super::{CallHead, Delta, Protocol, Usage};
use crate::output::{Failure, FinishReason};
use crate::text::answer::{AnswerFormat, Piece};
use crate::text::Tokenizer;

/// One call of the API, which has one choice.
#[derive(Debug)]
pub(super) struct Responses {
    id: Box<str>,
    created: u64,
    model: Box<str>,
    timing: bool,
    /// What the response says of its request: fields of an object, without its brackets.
    request: Box<[u8]>,
    split: SplitReply,
    streamed: Mutex<Streamed>,
}

/// Where a stream stands.
#[derive(Debug, Default)]
struct Streamed {
    /// Events that were written.
    events: u64,
    items: Items,
    is_cut: bool,
    reasoning_tokens: u64,
}

/// What an answer is made of.
#[derive(Debug, Default)]
struct Items(Vec<Item>);

#[derive(Debug)]
struct Item {
    kind: Kind,
    /// So far.
    text: String,
}

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Message,
    Reasoning,
    /// Of the function with this name, as that of the answer's calls.
    Call(String, u32),
}

/// How far a response or an item is, as they say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    InProgress,
    Completed,
    Incomplete,
    Failed,
}

impl Status {
    fn as_str(self) -> &'static str {
        match self {
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Failed => "failed",
        }
    }
}

impl Items {
    /// Begins an item where this piece is not more of the last one.
    fn begin(&mut self, piece: &Piece) -> bool {
        let kind = match piece {
            Piece::Content(_) => Kind::Message,
            Piece::Reasoning(_) => Kind::Reasoning,
            Piece::Call(name) => {
                let calls = self.0.iter().filter(|item| matches!(item.kind, Kind::Call(..))).count();
                Kind::Call(name.clone(), calls as u32)
            }
            Piece::Arguments(_) => return false,
        };
        let begins = self.0.last().is_none_or(|last| last.kind != kind);
        if begins {
            self.0.push(Item { kind, text: String::new() });
        }
        begins
    }

    /// Adds the text of a piece to the last item.
    fn fill<'a>(&mut self, piece: &'a Piece) -> &'a str {
        let text = match piece {
            Piece::Content(text) | Piece::Reasoning(text) | Piece::Arguments(text) => text,
            Piece::Call(_) => "",
        };
        if let Some(item) = self.0.last_mut() {
            item.text.push_str(text);
        }
        text
    }

    /// An answer of nothing is a message without text.
    fn nothing(&self) -> Option<Piece> {
        self.0.is_empty().then(|| Piece::Content(String::new()))
    }
}

impl Responses {
    pub(super) fn new(head: &CallHead<'_>, request: &str, answer: AnswerFormat) -> Self {
        let mut fields = Vec::with_capacity(request.len());
        let inside = request.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
        write_one_line(&mut fields, inside.unwrap_or_default());
        Self {
            id: head.id.into(),
            created: head.created,
            model: head.model.into(),
            timing: head.timing,
            request: fields.into(),
            split: SplitReply::new(answer, head.id),
            streamed: Mutex::default(),
        }
    }

    /// Appends a response, whose last item is as far as itself.
    fn write_response(
        &self,
        out: &mut Vec<u8>,
        status: Status,
        items: &Items,
        usage: Option<(Usage, u64)>,
        failure: Option<&Failure>,
    ) {
        out.extend_from_slice(b"{\"id\":");
        write_string(out, &self.id);
        out.extend_from_slice(b",\"object\":\"response\",\"created_at\":");
        write_integer(out, self.created);
        write_text(out, "status", status.as_str());
        out.extend_from_slice(b",\"error\":");
        match failure {
            Some(failure) => {
                out.extend_from_slice(b"{\"code\":");
                write_string(out, &failure.code);
                write_text(out, "message", &failure.message);
                out.push(b'}');
            }
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(match status {
            Status::Incomplete => b",\"incomplete_details\":{\"reason\":\"max_output_tokens\"}",
            _ => b",\"incomplete_details\":null",
        });
        write_text(out, "model", &self.model);
        out.extend_from_slice(b",\"output\":[");
        write_separated(out, (0..).zip(&items.0), |out, (number, item)| {
            let is_last = number + 1 == items.0.len();
            self.write_item(out, number, item, if is_last { status } else { Status::Completed });
        });
        out.extend_from_slice(b"],");
        out.extend_from_slice(&self.request);
        out.extend_from_slice(b",\"usage\":");
        match usage {
            Some((usage, reasoning)) => {
                let timing = usage.timing.filter(|_| self.timing);
                write_usage(out, Usage { timing, ..usage }, reasoning);
            }
            None => out.extend_from_slice(b"null"),
        }
        out.push(b'}');
    }

    /// Appends an item; one that has just begun has no part yet.
    fn write_item(&self, out: &mut Vec<u8>, number: usize, item: &Item, status: Status) {
        // Items know of no failure.
        let status = if status == Status::Failed { Status::Incomplete } else { status };
        out.extend_from_slice(b"{\"id\":");
        self.write_item_id(out, number, item);
        match &item.kind {
            Kind::Message => {
                out.extend_from_slice(b",\"type\":\"message\",\"role\":\"assistant\",\"content\":[");
                if status != Status::InProgress {
                    item.write_part(out);
                }
                out.push(b']');
            }
            Kind::Reasoning => {
                out.extend_from_slice(b",\"type\":\"reasoning\",\"summary\":[],\"content\":[");
                if status != Status::InProgress {
                    item.write_part(out);
                }
                out.extend_from_slice(b"],\"encrypted_content\":null");
            }
            Kind::Call(name, call) => {
                out.extend_from_slice(b",\"type\":\"function_call\"");
                write_text(out, "call_id", &self.split.call_id(0, *call));
                write_text(out, "name", name);
                write_text(out, "arguments", &item.text);
            }
        }
        write_text(out, "status", status.as_str());
        out.push(b'}');
    }

    fn write_item_id(&self, out: &mut Vec<u8>, number: usize, item: &Item) {
        let head = match item.kind {
            Kind::Message => "msg",
            Kind::Reasoning => "rs",
            Kind::Call(..) => "fc",
        };
        let of_response = self.id.strip_prefix("resp_").unwrap_or(&self.id);
        write_string(out, &format!("{head}_{of_response}_{number}"));
    }

    /// Writes the events of a piece.
    fn tell(&self, out: &mut Vec<u8>, streamed: &mut Streamed, piece: &Piece) {
        let before = streamed.items.0.len();
        if streamed.items.begin(piece) {
            if before > 0 {
                self.tell_done(out, streamed, before - 1, Status::Completed);
            }
            self.tell_added(out, streamed);
        }
        let text = streamed.items.fill(piece);
        let Streamed { events, items, .. } = streamed;
        let Some(item) = items.0.last().filter(|_| !text.is_empty()) else { return };
        let (kind, rest): (_, &[u8]) = match item.kind {
            Kind::Message => ("response.output_text.delta", b",\"logprobs\":[]"),
            Kind::Reasoning => ("response.reasoning_text.delta", b""),
            Kind::Call(..) => ("response.function_call_arguments.delta", b""),
        };
        event(out, events, kind, |out| {
            self.write_place(out, items.0.len() - 1, item);
            write_text(out, "delta", text);
            out.extend_from_slice(rest);
        });
    }

    /// The last item is new.
    fn tell_added(&self, out: &mut Vec<u8>, streamed: &mut Streamed) {
        let Streamed { events, items, .. } = streamed;
        let Some((item, number)) = items.0.last().zip(items.0.len().checked_sub(1)) else { return };
        event(out, events, "response.output_item.added", |out| {
            out.extend_from_slice(b",\"output_index\":");
            write_integer(out, number as u64);
            out.extend_from_slice(b",\"item\":");
            self.write_item(out, number, item, Status::InProgress);
        });
        if !matches!(item.kind, Kind::Call(..)) {
            event(out, events, "response.content_part.added", |out| {
                self.write_place(out, number, item);
                out.extend_from_slice(b",\"part\":");
                item.write_part(out);
            });
        }
    }

    /// Nothing more comes of an item.
    fn tell_done(&self, out: &mut Vec<u8>, streamed: &mut Streamed, number: usize, status: Status) {
        let Streamed { events, items, .. } = streamed;
        let Some(item) = items.0.get(number) else { return };
        if let Kind::Call(name, _) = &item.kind {
            event(out, events, "response.function_call_arguments.done", |out| {
                self.write_place(out, number, item);
                write_text(out, "name", name);
                write_text(out, "arguments", &item.text);
            });
        } else {
            let (kind, rest): (_, &[u8]) = match item.kind {
                Kind::Message => ("response.output_text.done", b",\"logprobs\":[]"),
                _ => ("response.reasoning_text.done", b""),
            };
            event(out, events, kind, |out| {
                self.write_place(out, number, item);
                write_text(out, "text", &item.text);
                out.extend_from_slice(rest);
            });
            event(out, events, "response.content_part.done", |out| {
                self.write_place(out, number, item);
                out.extend_from_slice(b",\"part\":");
                item.write_part(out);
            });
        }
        event(out, events, "response.output_item.done", |out| {
            out.extend_from_slice(b",\"output_index\":");
            write_integer(out, number as u64);
            out.extend_from_slice(b",\"item\":");
            self.write_item(out, number, item, status);
        });
    }

    /// Appends the fields that say of which item an event is.
    fn write_place(&self, out: &mut Vec<u8>, number: usize, item: &Item) {
        out.extend_from_slice(b",\"item_id\":");
        self.write_item_id(out, number, item);
        out.extend_from_slice(b",\"output_index\":");
        write_integer(out, number as u64);
        if !matches!(item.kind, Kind::Call(..)) {
            out.extend_from_slice(b",\"content_index\":0");
        }
    }

    /// Writes an event that holds all of the response.
    fn tell_response(
        &self,
        out: &mut Vec<u8>,
        streamed: &mut Streamed,
        kind: &str,
        (status, usage, failure): (Status, Option<Usage>, Option<&Failure>),
    ) {
        let Streamed { events, items, reasoning_tokens, .. } = streamed;
        event(out, events, kind, |out| {
            out.extend_from_slice(b",\"response\":");
            self.write_response(out, status, items, usage.map(|usage| (usage, *reasoning_tokens)), failure);
        });
    }
}

impl Item {
    /// Appends the one part of a message or of reasoning.
    fn write_part(&self, out: &mut Vec<u8>) {
        if self.kind == Kind::Reasoning {
            out.extend_from_slice(b"{\"type\":\"reasoning_text\"");
            write_text(out, "text", &self.text);
            out.push(b'}');
        } else {
            out.extend_from_slice(b"{\"type\":\"output_text\"");
            write_text(out, "text", &self.text);
            out.extend_from_slice(b",\"annotations\":[],\"logprobs\":[]}");
        }
    }
}

impl Protocol for Responses {
    fn open(&self, out: &mut Vec<u8>, _: Usage) {
        let mut streamed = self.streamed.lock().unwrap_or_else(PoisonError::into_inner);
        for kind in ["response.created", "response.in_progress"] {
            self.tell_response(out, &mut streamed, kind, (Status::InProgress, None, None));
        }
    }

    fn delta(&self, out: &mut Vec<u8>, delta: &Delta<'_>, _: Usage, _: Option<&Tokenizer>) {
        let mut streamed = self.streamed.lock().unwrap_or_else(PoisonError::into_inner);
        let split = self.split.split(delta);
        streamed.reasoning_tokens += split.reasoning_tokens;
        for piece in &split.pieces {
            self.tell(out, &mut streamed, piece);
        }
        streamed.is_cut |= is_cut(delta);
    }

    fn close(&self, out: &mut Vec<u8>, usage: Usage) {
        let mut streamed = self.streamed.lock().unwrap_or_else(PoisonError::into_inner);
        let (status, kind) = if streamed.is_cut {
            (Status::Incomplete, "response.incomplete")
        } else {
            (Status::Completed, "response.completed")
        };
        if let Some(piece) = streamed.items.nothing() {
            self.tell(out, &mut streamed, &piece);
        }
        let last = streamed.items.0.len() - 1;
        self.tell_done(out, &mut streamed, last, status);
        self.tell_response(out, &mut streamed, kind, (status, Some(usage), None));
    }

    fn error(&self, out: &mut Vec<u8>, failure: &Failure) {
        let mut streamed = self.streamed.lock().unwrap_or_else(PoisonError::into_inner);
        event(out, &mut streamed.events, "error", |out| {
            out.push(b',');
            write_error_fields(out, &failure.message, None, failure.param(), &failure.code);
            // Clients of OpenAI's raise on this key, and on no other.
            out.extend_from_slice(b",\"error\":{");
            write_error_fields(out, &failure.message, Some(failure_type(failure)), failure.param(), &failure.code);
            out.push(b'}');
        });
        self.tell_response(out, &mut streamed, "response.failed", (Status::Failed, None, Some(failure)));
    }

    fn body(&self, out: &mut Vec<u8>, choices: &[Delta<'_>], usage: Usage, _: Option<&Tokenizer>) {
        let Some(choice) = choices.first() else { return };
        let split = self.split.split(choice);
        let mut items = Items::default();
        for piece in &split.pieces {
            items.begin(piece);
            items.fill(piece);
        }
        if let Some(piece) = items.nothing() {
            items.begin(&piece);
        }
        let status = if is_cut(choice) { Status::Incomplete } else { Status::Completed };
        self.write_response(out, status, &items, Some((usage, split.reasoning_tokens)), None);
    }
}

fn is_cut(delta: &Delta<'_>) -> bool {
    delta.finish.is_some_and(|finish| finish.reason == FinishReason::Length)
}

/// Appends an event with its name and the next number, whose object's further fields are written
/// by `write`.
fn event(out: &mut Vec<u8>, events: &mut u64, name: &str, write: impl FnOnce(&mut Vec<u8>)) {
    write!(out, "event: {name}\ndata: {{\"type\":\"{name}\",\"sequence_number\":{events}")
        .expect("writing to a Vec cannot fail");
    *events += 1;
    write(out);
    out.extend_from_slice(b"}\n\n");
}

/// Appends `,"name":"text"`.
fn write_text(out: &mut Vec<u8>, name: &str, text: &str) {
    write!(out, ",\"{name}\":").expect("writing to a Vec cannot fail");
    write_string(out, text);
}

/// Appends the usage's object. `reasoning`: tokens of the output that were reasoning.
fn write_usage(out: &mut Vec<u8>, usage: Usage, reasoning: u64) {
    let Usage { prompt_tokens, completion_tokens, cached_tokens, timing, .. } = usage;
    let total = prompt_tokens + completion_tokens;
    write!(
        out,
        "{{\"input_tokens\":{prompt_tokens},\"input_tokens_details\":{{\"cached_tokens\":{cached_tokens},\
         \"cache_write_tokens\":0}},\"output_tokens\":{completion_tokens},\
         \"output_tokens_details\":{{\"reasoning_tokens\":{reasoning}}},\"total_tokens\":{total}"
    )
    .expect("writing to a Vec cannot fail");
    if let Some(timing) = timing {
        timing.write(out);
    }
    out.push(b'}');
}
