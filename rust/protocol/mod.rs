//! How replies are written for clients: a [`Protocol`] for each API that is spoken. Beside it what
//! is read of a request before Python does: the measure of its [`body`], [`escapes`] and [`prompts`].
//!
//! The outbox says when something is written and what a choice gained; a protocol knows how it
//! looks. It sees neither the core's lock nor a socket: what it writes is bytes, made after the
//! news has been taken out of the outbox.

mod anthropic;
pub mod body;
mod embedding;
pub mod escapes;
mod json;
mod ollama;
mod openai;
mod openai_chat;
mod openai_completion;
mod openai_prompt;
mod openai_tools;
pub mod prompts;
mod responses;
mod split;
mod tgi;
mod token_text;

use std::io::Write;
use std::sync::Arc;

use crate::output::{Failure, Finish, PromptLogprobs, Token, TokenLogprob};
use crate::text::answer::AnswerFormat;
use crate::text::Tokenizer;

pub use anthropic::write_error as write_anthropic_error;
pub use embedding::{EmbeddingForm, VectorForm};
pub use ollama::write_error as write_ollama_error;
pub use openai::{write_error, CallHead, StreamUsage};
pub use openai_prompt::{Echo, TokenIds};
pub use split::WholeAnswer;
pub use tgi::{write_error as write_tgi_error, TgiCall};

/// One API's form of a reply. A call's prompts, each with its `n` choices, are answered by one
/// reply.
///
/// A stream is `open`, any number of `delta`, then `close` or `error`, one after another; an answer
/// in one piece is `body`. An error that is the whole answer comes with an HTTP status and looks like the refusal
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
    /// Log probabilities of the choice's prompt, where they were asked for; with its first delta.
    pub prompt: Option<&'a PromptLogprobs>,
    /// The embedding of the choice's prompt, where that was asked for.
    pub vector: Option<&'a [f32]>,
}

impl Delta<'_> {
    /// Of its tokens; by this the best of several choices is found.
    fn mean_logprob(&self) -> f64 {
        let sum: f64 = self.logprobs.iter().filter_map(|position| Some(f64::from(position.first()?.logprob))).sum();
        sum / self.tokens.len().max(1) as f64
    }
}

/// More choices of each prompt are made than are answered: those with the highest mean log probability
/// count, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BestOf {
    /// Choices made of each prompt.
    pub made: u32,
    /// Choices answered.
    pub answered: u32,
    /// The client asked for log probabilities, too.
    pub shows_logprobs: bool,
}

impl BestOf {
    /// The choices to answer, with their new numbers.
    fn of<'a>(self, choices: &[Delta<'a>]) -> Vec<Delta<'a>> {
        let mut best = Vec::new();
        for (prompt, made) in (0..).zip(choices.chunks(self.made.max(1) as usize)) {
            let mut ranked = made.to_vec();
            ranked.sort_by(|one, other| other.mean_logprob().total_cmp(&one.mean_logprob())); // stable
            best.extend((0..self.answered).zip(ranked).map(|(rank, choice)| Delta {
                index: prompt * self.answered + rank,
                logprobs: if self.shows_logprobs { choice.logprobs } else { &[] },
                ..choice
            }));
        }
        best
    }
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
    /// Drafts of speculative decoding that became output, and those that did not.
    pub accepted_tokens: u64,
    /// See `accepted_tokens`.
    pub rejected_tokens: u64,
    /// Where the time went; those whose head asks for it tell it.
    pub timing: Option<Timing>,
}

/// Where the time of a call went, in microseconds. The three follow one another, from the moment when
/// the engine took the call to its latest token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timing {
    /// Until the first of its prompts was admitted.
    pub queued: u64,
    /// From then until its first token.
    pub prompt: u64,
    /// From then until its latest token.
    pub completion: u64,
    /// How often a choice gave its place back, to be computed again.
    pub preemptions: u64,
}

impl Timing {
    /// Appends `,"timing":{...}` to the fields of a usage, in seconds.
    pub(crate) fn write(self, out: &mut Vec<u8>) {
        let Self { queued, prompt, completion, preemptions } = self;
        let seconds = |microseconds: u64| microseconds as f64 * 1e-6;
        write!(
            out,
            ",\"timing\":{{\"queue_time\":{:.6},\"prompt_time\":{:.6},\"completion_time\":{:.6},\"total_time\":{:.6},\
             \"preemptions\":{preemptions}}}",
            seconds(queued),
            seconds(prompt),
            seconds(completion),
            seconds(queued + prompt + completion),
        )
        .expect("writing to a Vec cannot fail");
    }
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
    /// to see. `token_ids`: it wants those, too. `answer`: what may be in the answers besides content.
    pub fn openai_chat(
        head: &CallHead<'_>,
        stream: Option<StreamUsage>,
        token_ids: Option<TokenIds>,
        answer: AnswerFormat,
    ) -> Self {
        let protocol: Arc<dyn Protocol> = if answer.is_plain() {
            Arc::new(openai::OpenAi::<openai_chat::Chat>::new(head, stream).with_token_ids(token_ids))
        } else {
            Arc::new(openai_tools::ChatWithTools::new(head, stream, token_ids, answer))
        };
        Self { protocol, streamed: stream.is_some() }
    }

    /// OpenAI's text completions, with their prompts before them where there is an `echo`. `best_of` is of
    /// whole answers alone.
    pub fn openai_completion(
        head: &CallHead<'_>,
        stream: Option<StreamUsage>,
        token_ids: Option<TokenIds>,
        echo: Option<Echo>,
        best_of: Option<BestOf>,
    ) -> Self {
        let protocol = openai::OpenAi::<openai_completion::Completion>::new(head, stream);
        let protocol = protocol.with_token_ids(token_ids).with_echo(echo).with_best_of(best_of);
        Self { protocol: Arc::new(protocol), streamed: stream.is_some() }
    }

    /// Embeddings, which are never streamed.
    pub fn embeddings(head: &CallHead<'_>, form: EmbeddingForm) -> Self {
        Self { protocol: Arc::new(embedding::Embeddings::new(head, form)), streamed: false }
    }

    /// TGI's `/generate` and `/generate_stream`.
    pub fn tgi(call: TgiCall, streamed: bool) -> Self {
        Self { protocol: Arc::new(tgi::Tgi::new(call)), streamed }
    }

    /// Anthropic's messages.
    pub fn anthropic(head: &CallHead<'_>, streamed: bool, answer: AnswerFormat) -> Self {
        Self { protocol: Arc::new(anthropic::Anthropic::new(head, answer)), streamed }
    }

    /// OpenAI's responses. `request`: an object of JSON, not empty, with what a response says of its
    /// request.
    pub fn responses(head: &CallHead<'_>, request: &str, streamed: bool, answer: AnswerFormat) -> Self {
        Self { protocol: Arc::new(responses::Responses::new(head, request, answer)), streamed }
    }

    /// Ollama's chats, or its completions.
    pub fn ollama(head: &CallHead<'_>, created_at: &str, is_chat: bool, streamed: bool, answer: AnswerFormat) -> Self {
        let protocol = ollama::Ollama::new(head.id, head.model, created_at, is_chat, answer);
        Self { protocol: Arc::new(protocol), streamed }
    }
}
