//! How replies are written for clients: a [`Protocol`] for each API that is spoken. Beside it what
//! is read of a request before Python does: the measure of its [`body`], and its [`prompts`].
//!
//! The outbox says when something is written and what a choice gained; a protocol knows how it
//! looks. It sees neither the core's lock nor a socket: what it writes is bytes, made after the
//! news has been taken out of the outbox.

pub mod body;
mod json;
mod openai;
mod openai_chat;
mod openai_completion;
pub mod prompts;

use std::sync::Arc;

use crate::output::{Failure, Finish, Token, TokenLogprob};
use crate::text::Tokenizer;

pub use openai::{write_error, CallHead, StreamUsage};

/// One API's form of a reply. A call's prompts, each with its `n` choices, are answered by one
/// reply.
///
/// A stream is `open`, any number of `delta`, then `close` or `error`; an answer in one piece is
/// `body`. An error that is the whole answer comes with an HTTP status and looks like the refusal
/// of a call: the server writes both.
pub trait Protocol: std::fmt::Debug + Send + Sync {
    /// Begins a stream, before its first delta; `usage` has the tokens of the prompts.
    fn open(&self, _out: &mut Vec<u8>, _usage: Usage) {}

    /// What a choice gained: one token, or several where the client reads slowly. `usage` counts up
    /// to this delta.
    fn delta(&self, out: &mut Vec<u8>, delta: &Delta<'_>, usage: Usage, tokenizer: Option<&Tokenizer>);

    /// Ends a stream whose choices have all ended.
    fn close(&self, out: &mut Vec<u8>, usage: Usage);

    /// Ends a stream that failed, maybe in the middle: its HTTP status is long sent.
    fn error(&self, out: &mut Vec<u8>, failure: &Failure);

    /// A whole answer: all of every choice, in order.
    fn body(&self, out: &mut Vec<u8>, choices: &[Delta<'_>], usage: Usage, tokenizer: Option<&Tokenizer>);
}

/// What a choice gained, or all of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Delta<'a> {
    /// The choice: number of the prompt x n + number among the prompt's choices.
    pub index: u32,
    /// Nothing of the choice has left before.
    pub first: bool,
    /// New text; may be empty.
    pub text: &'a str,
    /// Its tokens.
    pub tokens: &'a [Token],
    /// Per token the drawn one first, then the top ones; empty unless asked for.
    pub logprobs: &'a [Vec<TokenLogprob>],
    /// Set with the choice's last delta, unless it failed.
    pub finish: Option<&'a Finish>,
}

/// Token counts of a call so far, over all its prompts and choices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompts.
    pub prompt_tokens: u64,
    /// Tokens put out.
    pub completion_tokens: u64,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u64,
}

/// How the reply to one call is written.
#[derive(Debug, Clone)]
pub struct ReplyFormat {
    /// By whom; it holds what is particular to the call.
    pub protocol: Arc<dyn Protocol>,
    /// As a stream, or else in one piece at its end.
    pub streamed: bool,
}

impl ReplyFormat {
    /// OpenAI's chat completions, streamed where `stream` says what of the usage the client wants
    /// to see.
    pub fn openai_chat(head: &CallHead<'_>, stream: Option<StreamUsage>) -> Self {
        Self { protocol: Arc::new(openai::OpenAi::<openai_chat::Chat>::new(head, stream)), streamed: stream.is_some() }
    }

    /// OpenAI's text completions.
    pub fn openai_completion(head: &CallHead<'_>, stream: Option<StreamUsage>) -> Self {
        let protocol = openai::OpenAi::<openai_completion::Completion>::new(head, stream);
        Self { protocol: Arc::new(protocol), streamed: stream.is_some() }
    }
}
