//! What leaves the core: tokens and endings of sequences, told one by one to an [`OutputSink`] at a
//! commit, and what becomes of them on their way to a client.

use crate::plan::TokenLogprobs;
use crate::request::{Progress, RequestId, SeqRef};

mod prompt;

pub(crate) use prompt::entries_of;
pub use prompt::PromptLogprobs;

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// One of the model's own end tokens.
    Eos,
    /// A token of `stop_token_ids`.
    StopToken(u32),
    /// The sink matched this entry of `stop`.
    StopString(u32),
    /// Its grammar allows nothing more, and end tokens are not drawn.
    Complete,
    /// Its embedding has been told, which is all that was asked for.
    Pooled,
    /// `max_tokens`, or the model's length.
    Length,
    /// The caller took it back.
    Abort,
    /// It failed; its neighbours go on.
    Error(SequenceError),
}

/// What went wrong with one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SequenceError {
    /// NaN among the logits, or in an embedding.
    Numerical,
    /// Bias, bans and grammar left no token to draw.
    AllMasked,
    /// The grammar that bounds it cannot be followed any further.
    Grammar,
    /// The result of the step makes no sense for this row: no token, too many, or an id outside the
    /// vocabulary.
    BadResult,
    /// The step did not run, or the engine gave up.
    StepFailed,
}

impl FinishReason {
    /// The word of the wire: `stop`, `length`, `abort` or `error`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Eos | Self::StopToken(_) | Self::StopString(_) | Self::Complete | Self::Pooled => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error(_) => "error",
        }
    }
}

impl SequenceError {
    /// Stable name, for error events and metrics.
    pub fn code(self) -> &'static str {
        match self {
            Self::Numerical => "numerical_error",
            Self::AllMasked => "all_tokens_masked",
            Self::Grammar => "grammar_error",
            Self::BadResult => "bad_result",
            Self::StepFailed => "step_failed",
        }
    }
}

/// How a choice ended.
#[derive(Debug, Clone)]
pub struct Finish {
    /// Why.
    pub reason: FinishReason,
    /// The stop string that matched.
    pub stop_text: Option<String>,
}

/// What made a choice stop, where it was not the end of the model's turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason<'a> {
    /// This stop string.
    Text(&'a str),
    /// This stop token id.
    Token(u32),
}

impl Finish {
    /// The stop string or stop token that ended it.
    pub fn stop_reason(&self) -> Option<StopReason<'_>> {
        match (&self.stop_text, self.reason) {
            (Some(text), _) => Some(StopReason::Text(text)),
            (None, FinishReason::StopToken(token)) => Some(StopReason::Token(token)),
            _ => None,
        }
    }
}

/// What ended a reply that had been accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Failure {
    /// Stable name, for clients and metrics.
    pub code: String,
    /// For people; clients see it.
    pub message: String,
}

impl Failure {
    /// The code of all replies of an engine that was lost.
    pub const ENGINE_DEAD: &str = "engine_dead";
    /// The code of replies that a shutdown has ended.
    pub const SERVER_SHUTTING_DOWN: &str = "server_shutting_down";

    /// A failure with a code and an explanation.
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into() }
    }

    /// Nothing is served any more, or not for now: it is not about this reply.
    pub fn is_of_the_server(&self) -> bool {
        matches!(self.code.as_str(), Self::ENGINE_DEAD | Self::SERVER_SHUTTING_DOWN)
    }

    /// The field of the request that caused it, which would do so again.
    pub fn param(&self) -> Option<&'static str> {
        match self.code.as_str() {
            "all_tokens_masked" => Some("logit_bias"),
            "grammar_error" => Some("structured_outputs"),
            _ => None,
        }
    }
}

impl From<SequenceError> for Failure {
    fn from(error: SequenceError) -> Self {
        let message = match error {
            SequenceError::AllMasked => {
                "no token is left to draw: logit_bias, min_tokens with stop_token_ids, and structured_outputs rule out all \
                 of them"
            }
            SequenceError::Grammar => {
                "the answer's grammar cannot be followed any further: at this place it grows over its limits, or no token \
                 of the vocabulary fits it; make the schema, expression or grammar simpler"
            }
            _ => "the model's output for this request could not be used",
        };
        Self::new(error.code(), message)
    }
}

/// One token of a choice's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Bytes of the text that was certain once it had come, counted from what was last taken.
    pub text_end: u32,
    /// Characters of the output's text before it. Text that is held back, or that a stop string
    /// cuts off, counts as well.
    pub text_offset: u32,
}

/// A token's log probability, with its rank from 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token: u32,
    /// Natural logarithm of its probability, before temperature and filters.
    pub logprob: f32,
    /// 1 for the likeliest token of the vocabulary.
    pub rank: u32,
}

/// One new token of a sequence.
#[derive(Debug, Clone, Copy)]
pub struct SampledToken<'a> {
    /// Its id, below the vocabulary's size.
    pub id: u32,
    /// Its place in the output, from 0.
    pub output_index: u32,
    /// Present where the request asked for log probabilities.
    pub logprobs: Option<TokenLogprobs<'a>>,
    /// Set where the token itself ends the sequence (end or stop token, length); `on_finish`
    /// follows at once.
    pub finish: Option<FinishReason>,
}

/// One token of a prompt whose log probabilities were asked for.
#[derive(Debug, Clone, Copy)]
pub struct PromptToken<'a> {
    /// Its id.
    pub id: u32,
    /// Its place in the prompt, from 1: nothing comes before the first token.
    pub place: u32,
    /// Its log probabilities, given all before it.
    pub logprobs: TokenLogprobs<'a>,
}

/// Receives what a commit brings. The owner of the text implements it: it detokenises and knows the
/// stop strings.
pub trait OutputSink {
    /// Log probabilities of a prompt token, where they were asked for: each once, in order, all of
    /// them before the request's first output token.
    fn on_prompt_token(&mut self, request: RequestId, token: &PromptToken<'_>);

    /// A token was added to a sequence. Returns the index in `stop` of a stop string that the text
    /// now holds; the sequence then ends with [`FinishReason::StopString`], whatever `token.finish`
    /// says.
    fn on_token(&mut self, seq: SeqRef, token: &SampledToken<'_>, progress: &Progress) -> Option<u32>;

    /// The embedding of a request's prompt, where that was asked for: once, as the model made it;
    /// `on_finish` follows at once.
    fn on_vector(&mut self, request: RequestId, vector: &[f32]);

    /// A sequence ended. It is told once for each sequence, and nothing about that sequence
    /// follows.
    fn on_finish(&mut self, seq: SeqRef, reason: FinishReason, progress: &Progress);
}
