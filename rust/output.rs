//! What leaves the core at a commit: tokens and endings of sequences, told one by one to an [`OutputSink`].

use crate::plan::TokenLogprobs;
use crate::request::SeqRef;

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// One of the model's own end tokens.
    Eos,
    /// A token of `stop_token_ids`.
    StopToken(u32),
    /// The sink matched this entry of `stop`.
    StopString(u32),
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
    /// NaN among the logits.
    Numerical,
    /// Bias and bans left no token to draw.
    AllMasked,
    /// The result of the step makes no sense for this row: no token, too many, or an id outside the vocabulary.
    BadResult,
    /// The step did not run, or the engine gave up.
    StepFailed,
}

impl FinishReason {
    /// The word of the wire: `stop`, `length`, `abort` or `error`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Eos | Self::StopToken(_) | Self::StopString(_) => "stop",
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
            Self::BadResult => "bad_result",
            Self::StepFailed => "step_failed",
        }
    }
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
    /// Set where the token itself ends the sequence (end or stop token, length); `on_finish` follows at once.
    pub finish: Option<FinishReason>,
}

/// Where a request stands, for usage counts and latency metrics. Times are seconds of the caller's clock, 0.0 for what
/// has not happened.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Progress {
    /// Tokens of the prompt.
    pub num_prompt_tokens: u32,
    /// Prompt tokens that the prefix cache held when the request was first scheduled.
    pub num_cached_tokens: u32,
    /// Output tokens of all choices so far.
    pub num_output_tokens: u32,
    /// When the request was added.
    pub added: f64,
    /// When it first got a place in a step.
    pub first_scheduled: f64,
    /// When its first token was committed.
    pub first_token: f64,
    /// When its latest token was committed.
    pub last_token: f64,
}

/// Receives what a commit brings. The owner of the text implements it: it detokenises and knows the stop strings.
pub trait OutputSink {
    /// A token was added to a sequence. Returns the index in `stop` of a stop string that the text now holds; the
    /// sequence then ends with [`FinishReason::StopString`], whatever `token.finish` says.
    fn on_token(&mut self, seq: SeqRef, token: &SampledToken<'_>, progress: &Progress) -> Option<u32>;

    /// A sequence ended. It is told once for each sequence, and nothing about that sequence follows.
    fn on_finish(&mut self, seq: SeqRef, reason: FinishReason, progress: &Progress);
}
