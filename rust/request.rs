//! Requests: their names and their blocks' names, what the scheduler knows of one, the checked
//! sampling parameters.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::error::Error;
use crate::grammar::{Bounds, Grammar, ThinkingBudget};
use crate::text::StopPatterns;

/// Names one request for as long as the process lives; numbers are never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// One of a request's `n` sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqRef {
    /// The request.
    pub request: RequestId,
    /// Which of its choices, from 0.
    pub index: u32,
}

/// What the scheduler knows of one request, beside its sequences.
#[derive(Debug)]
pub(crate) struct Request {
    pub id: RequestId,
    /// Numbers of its sequences, by index; some may be gone.
    pub sequences: Vec<u32>,
    /// Sequences that have not finished.
    pub unfinished: u32,
    /// Number of the share that it is served for; 0: nobody's.
    pub share: u32,
    /// Its other choices wait for the first one.
    pub forming: bool,
    /// It has been admitted before.
    pub started: bool,
    /// It belongs to the batch that runs (policies other than continuous).
    pub in_batch: bool,
    /// Of the request of a call that stands in the queue: those that come after it, one by one. Some
    /// may be gone.
    pub behind: VecDeque<RequestId>,
    /// Where log probabilities of the prompt are wanted: tokens, its first included, of which they
    /// have been told or are in flight.
    pub prompt_asked: u32,
    pub progress: Progress,
}

/// Where a request stands, for usage counts and latency metrics. Times are seconds of the caller's
/// clock, 0.0 for what has not happened.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Progress {
    /// Tokens of the prompt.
    pub num_prompt_tokens: u32,
    /// Prompt tokens that the prefix cache held when the request was first scheduled.
    pub num_cached_tokens: u32,
    /// Output tokens of all choices so far.
    pub num_output_tokens: u32,
    /// Drafts that were right and became output, and drafts that were wrong, or came behind the end.
    pub num_accepted_tokens: u32,
    /// See `num_accepted_tokens`.
    pub num_rejected_tokens: u32,
    /// How often one of its choices gave its place back, to be computed again.
    pub num_preemptions: u32,
    /// When the request was added.
    pub added: f64,
    /// When it first got a place in a step.
    pub first_scheduled: f64,
    /// When its first token was committed.
    pub first_token: f64,
    /// When its latest token was committed.
    pub last_token: f64,
}

/// Index of a block in every pool tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// The block that is never handed out: padding rows write into it.
pub const NULL_BLOCK: BlockId = BlockId(0);

/// Most `n`.
pub const MAX_CHOICES: u32 = 128;
/// Most stop strings of a request.
pub const MAX_STOP_STRINGS: usize = 32;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 4096;
/// Most stop tokens of a request.
pub const MAX_STOP_TOKENS: usize = 128;
/// Most biased tokens of a request.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Most ways of writing bad words.
pub const MAX_BAD_WORDS: usize = 512;
/// Longest of them, in tokens.
pub const MAX_BAD_WORD_TOKENS: usize = 256;
/// Most top log probabilities a token.
pub const MAX_LOGPROBS: u32 = 20;
/// Temperatures below this are greedy: dividing logits by less overflows half precision.
const GREEDY_BELOW: f64 = 1e-5;

/// Of which of a prompt's hidden states an embedding is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolingKind {
    /// That of the last token, which has seen all of them.
    Last,
    /// The mean of all.
    Mean,
}

/// What an embedding is made of, and what becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pooling {
    /// Of which hidden states it is made.
    pub kind: PoolingKind,
    /// Whether it is brought to length 1.
    pub normalize: bool,
    /// How many of its first numbers are wanted; None: all.
    pub dimensions: Option<u32>,
}

/// A compiled grammar among the sampling parameters; equal to itself alone.
#[derive(Debug, Clone)]
pub struct SharedGrammar(pub Arc<dyn Grammar>);

impl PartialEq for SharedGrammar {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Sampling parameters as a user gave them: any numbers. [`SamplingParams::new`] checks them.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::struct_excessive_bools)] // They are separate switches of the API.
#[allow(missing_docs)] // The fields are those of `SamplingParams` in `_core.pyi`.
pub struct SamplingOptions {
    pub n: i64,
    pub temperature: f64,
    pub top_k: i64,
    pub top_p: f64,
    pub min_p: f64,
    pub repetition_penalty: f64,
    pub presence_penalty: f64,
    pub frequency_penalty: f64,
    pub seed: Option<u64>,
    pub max_tokens: Option<i64>,
    pub max_tokens_is_default: bool,
    pub min_tokens: i64,
    pub ignore_eos: bool,
    pub stop: Vec<String>,
    pub stop_token_ids: Vec<i64>,
    pub include_stop_str_in_output: bool,
    pub skip_special_tokens: bool,
    pub detokenize: bool,
    pub logprobs: Option<i64>,
    pub prompt_logprobs: Option<i64>,
    pub logit_bias: Vec<(i64, f64)>,
    pub allowed_token_ids: Option<Vec<i64>>,
    pub bad_words: Vec<Vec<u32>>,
    pub thinking: Option<Arc<ThinkingBudget>>,
    pub grammar: Option<SharedGrammar>,
}

impl Default for SamplingOptions {
    fn default() -> Self {
        Self {
            n: 1,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            max_tokens: None,
            max_tokens_is_default: false,
            min_tokens: 0,
            ignore_eos: false,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop_str_in_output: false,
            skip_special_tokens: true,
            detokenize: true,
            logprobs: None,
            prompt_logprobs: None,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            thinking: None,
            grammar: None,
        }
    }
}

/// Sampling parameters whose ranges hold. Token ids are checked against the vocabulary when a
/// request is added.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::struct_excessive_bools)] // They are separate switches of the API.
pub struct SamplingParams {
    /// Sequences to produce, 1 to [`MAX_CHOICES`].
    pub n: u32,
    /// 0 (greedy) to 2.
    pub temperature: f32,
    /// Keep the k likeliest tokens; 0: all.
    pub top_k: u32,
    /// Keep the likeliest tokens up to this probability, in (0, 1].
    pub top_p: f32,
    /// Keep tokens at least this likely relative to the likeliest, in \[0, 1\].
    pub min_p: f32,
    /// Divides (or, if negative, multiplies) logits of tokens seen in prompt or output, in \[0.01,
    /// 100\]: less would make infinities of them.
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens that were output, in \[-2, 2\].
    pub presence_penalty: f32,
    /// Subtracted once for each time a token was output, in \[-2, 2\].
    pub frequency_penalty: f32,
    /// Seed of choice 0; choice i draws with `seed + i` (wrapping). None: derived from the
    /// configuration's seed.
    pub seed: Option<u64>,
    /// Output tokens at most; None: as many as the model's length and the KV pool allow.
    pub max_tokens: Option<u32>,
    /// Nobody asked for `max_tokens`: it gives way to what fits.
    pub max_tokens_is_default: bool,
    /// Output tokens before which no stop rule may end the sequence.
    pub min_tokens: u32,
    /// Whether the model's own end tokens are ordinary.
    pub ignore_eos: bool,
    /// Strings that end the text. Matched by the [`OutputSink`](crate::output::OutputSink).
    pub stop: StopPatterns,
    /// Tokens that end the sequence, in ascending order.
    pub stop_token_ids: Vec<u32>,
    /// Whether a matched stop string stays in the text. The sink's affair.
    pub include_stop_str_in_output: bool,
    /// Whether special tokens are left out of the text. The sink's affair.
    pub skip_special_tokens: bool,
    /// Whether text is wanted at all. The sink's affair.
    pub detokenize: bool,
    /// None: no log probabilities; else those of the sampled token and of this many top ones.
    pub logprobs: Option<u32>,
    /// The same of each prompt token but the first, which nothing comes before.
    pub prompt_logprobs: Option<u32>,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// What the output must follow.
    pub grammar: Option<SharedGrammar>,
    /// An embedding of the prompt is wanted, and no output.
    pub pooling: Option<Pooling>,
    /// What bounds it besides; [`restrain`](Self::restrain) makes it a part of the grammar.
    pub bounds: Bounds,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self::new(SamplingOptions::default()).expect("the defaults are in range")
    }
}

impl SamplingParams {
    /// `max_tokens` behind a prompt that leaves room for `room` tokens: as it is, unless it is a
    /// default that can give way.
    pub(crate) fn max_tokens_in(&self, room: u32) -> Option<u32> {
        let gives_way = self.max_tokens_is_default && room >= self.min_tokens.max(1);
        self.max_tokens.map(|most| if gives_way { most.min(room) } else { most })
    }

    /// Checks every range.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] that names the field, its value and its limit.
    pub fn new(options: SamplingOptions) -> Result<Self, Error> {
        let max_tokens = match options.max_tokens {
            Some(value) => Some(integer("max_tokens", value, 1, i64::from(u32::MAX))?),
            None => None,
        };
        let min_tokens = integer("min_tokens", options.min_tokens, 0, i64::from(u32::MAX))?;
        if let Some(limit) = max_tokens.filter(|limit| min_tokens > *limit) {
            return Err(Error::invalid("min_tokens", min_tokens, format!("at most max_tokens = {limit}")));
        }
        let list = |field, len: usize, limit: usize| {
            if len <= limit {
                Ok(())
            } else {
                Err(Error::invalid(field, format!("a list of {len}"), format!("at most {limit} entries")))
            }
        };
        list("stop", options.stop.len(), MAX_STOP_STRINGS)?;
        list("stop_token_ids", options.stop_token_ids.len(), MAX_STOP_TOKENS)?;
        list("logit_bias", options.logit_bias.len(), MAX_LOGIT_BIAS)?;
        if options.stop.iter().any(String::is_empty) {
            return Err(Error::invalid("stop", "\"\"", "not empty"));
        }
        if let Some(long) = options.stop.iter().find(|stop| stop.len() > MAX_STOP_BYTES) {
            let limit = format!("at most {MAX_STOP_BYTES} bytes");
            return Err(Error::invalid("stop", format!("a string of {} bytes", long.len()), limit));
        }
        let token = |field, value| integer(field, value, 0, i64::from(u32::MAX));
        let mut stop_token_ids = Vec::with_capacity(options.stop_token_ids.len());
        for value in options.stop_token_ids {
            stop_token_ids.push(token("stop_token_ids", value)?);
        }
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        let mut logit_bias = Vec::with_capacity(options.logit_bias.len());
        for (id, value) in options.logit_bias {
            logit_bias.push((token("logit_bias", id)?, number("logit_bias", value, -100.0, 100.0)?));
        }
        let allowed = match options.allowed_token_ids {
            Some(tokens) if tokens.is_empty() => {
                return Err(Error::invalid("allowed_token_ids", "an empty list", "at least one token id"));
            }
            Some(tokens) => {
                Some(tokens.into_iter().map(|id| token("allowed_token_ids", id)).collect::<Result<Vec<u32>, Error>>()?)
            }
            None => None,
        };
        list("bad_words", options.bad_words.len(), MAX_BAD_WORDS)?;
        if let Some(word) = options.bad_words.iter().find(|word| !(1..=MAX_BAD_WORD_TOKENS).contains(&word.len())) {
            let limit = format!("from 1 to {MAX_BAD_WORD_TOKENS} tokens");
            return Err(Error::invalid("bad_words", format!("a word of {} tokens", word.len()), limit));
        }
        let temperature = number("temperature", options.temperature, 0.0, 2.0)?;
        let top_k = integer("top_k", options.top_k, -1, i64::from(i32::MAX))?;
        Ok(Self {
            n: integer("n", options.n, 1, i64::from(MAX_CHOICES))?,
            temperature: if options.temperature < GREEDY_BELOW { 0.0 } else { temperature },
            top_k,
            top_p: above_zero("top_p", options.top_p, 1.0)?,
            min_p: number("min_p", options.min_p, 0.0, 1.0)?,
            repetition_penalty: number("repetition_penalty", options.repetition_penalty, 0.01, 100.0)?,
            presence_penalty: number("presence_penalty", options.presence_penalty, -2.0, 2.0)?,
            frequency_penalty: number("frequency_penalty", options.frequency_penalty, -2.0, 2.0)?,
            seed: options.seed,
            max_tokens,
            max_tokens_is_default: options.max_tokens_is_default,
            min_tokens,
            ignore_eos: options.ignore_eos,
            stop: StopPatterns::new(&options.stop),
            stop_token_ids,
            include_stop_str_in_output: options.include_stop_str_in_output,
            skip_special_tokens: options.skip_special_tokens,
            detokenize: options.detokenize,
            logprobs: num_logprobs("logprobs", options.logprobs)?,
            prompt_logprobs: num_logprobs("prompt_logprobs", options.prompt_logprobs)?,
            logit_bias,
            grammar: options.grammar,
            pooling: None,
            bounds: Bounds { allowed, bad_words: options.bad_words, thinking: options.thinking },
        })
    }

    /// The parameters of a request for an embedding of its prompt.
    pub fn embedding(pooling: Pooling) -> Self {
        let output = Self { temperature: 0.0, max_tokens: Some(0), ignore_eos: true, ..Self::default() };
        Self { pooling: Some(pooling), detokenize: false, ..output }
    }

    /// Whether any penalty is on, so that the device must count this sequence's tokens.
    #[allow(clippy::float_cmp)] // "Off" is exactly the default.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Checks the token ids against the vocabulary.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`] for the first id at or above `vocab_size`.
    pub fn check_tokens(&self, vocab_size: u32) -> Result<(), Error> {
        check_tokens("stop_token_ids", self.stop_token_ids.iter().copied(), vocab_size)?;
        check_tokens("logit_bias", self.logit_bias.iter().map(|(token, _)| *token), vocab_size)?;
        check_tokens("allowed_token_ids", self.bounds.allowed.iter().flatten().copied(), vocab_size)?;
        check_tokens("bad_words", self.bounds.bad_words.iter().flatten().copied(), vocab_size)
    }

    /// Makes the bounds a part of the grammar, which is all that is asked then. The token ids are
    /// checked.
    pub(crate) fn restrain(&mut self, vocab_size: u32) {
        let bounds = std::mem::take(&mut self.bounds);
        if !bounds.is_empty() {
            let grammar = self.grammar.take().map(|grammar| grammar.0);
            self.grammar = Some(SharedGrammar(bounds.around(grammar, vocab_size)));
        }
    }
}

/// Refuses the first id at or above `vocab_size`.
pub(crate) fn check_tokens(
    field: &'static str,
    mut tokens: impl Iterator<Item = u32>,
    vocab_size: u32,
) -> Result<(), Error> {
    match tokens.by_ref().enumerate().find(|(_, token)| *token >= vocab_size) {
        Some((index, token)) => Err(Error::TokenOutOfRange { field, index, token, vocab_size }),
        None => Ok(()),
    }
}

/// An integer in `least..=most` as `u32`; -1, where it is allowed, means "off" and becomes 0.
fn integer(field: &'static str, value: i64, least: i64, most: i64) -> Result<u32, Error> {
    if (least..=most).contains(&value) {
        Ok(value.max(0) as u32)
    } else {
        Err(Error::invalid(field, value, format!("from {least} to {most}")))
    }
}

fn num_logprobs(field: &'static str, value: Option<i64>) -> Result<Option<u32>, Error> {
    value.map(|value| integer(field, value, 0, i64::from(MAX_LOGPROBS))).transpose()
}

fn number(field: &'static str, value: f64, least: f64, most: f64) -> Result<f32, Error> {
    if (least..=most).contains(&value) {
        Ok(value as f32)
    } else {
        Err(Error::invalid(field, value, format!("from {least} to {most}")))
    }
}

/// A number in `(0, most]`, still above 0 as `f32`.
fn above_zero(field: &'static str, value: f64, most: f64) -> Result<f32, Error> {
    if value > 0.0 && value <= most {
        Ok((value as f32).max(f32::MIN_POSITIVE))
    } else {
        Err(Error::invalid(field, value, format!("above 0 and at most {most}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> SamplingOptions {
        SamplingOptions::default()
    }

    #[test]
    fn each_bad_value_names_its_field() {
        for (field, bad) in [
            ("n", SamplingOptions { n: 0, ..options() }),
            ("n", SamplingOptions { n: 129, ..options() }),
            ("temperature", SamplingOptions { temperature: -0.1, ..options() }),
            ("temperature", SamplingOptions { temperature: 2.1, ..options() }),
            ("temperature", SamplingOptions { temperature: f64::NAN, ..options() }),
            ("top_k", SamplingOptions { top_k: -2, ..options() }),
            ("top_k", SamplingOptions { top_k: 1 << 31, ..options() }),
            ("top_p", SamplingOptions { top_p: 0.0, ..options() }),
            ("top_p", SamplingOptions { top_p: 1.1, ..options() }),
            ("min_p", SamplingOptions { min_p: 1.1, ..options() }),
            ("repetition_penalty", SamplingOptions { repetition_penalty: 0.0, ..options() }),
            ("repetition_penalty", SamplingOptions { repetition_penalty: 1e-38, ..options() }),
            ("presence_penalty", SamplingOptions { presence_penalty: -2.1, ..options() }),
            ("frequency_penalty", SamplingOptions { frequency_penalty: 2.1, ..options() }),
            ("max_tokens", SamplingOptions { max_tokens: Some(0), ..options() }),
            ("min_tokens", SamplingOptions { min_tokens: -1, ..options() }),
            ("min_tokens", SamplingOptions { min_tokens: 3, max_tokens: Some(2), ..options() }),
            ("stop", SamplingOptions { stop: vec![String::new()], ..options() }),
            ("stop", SamplingOptions { stop: vec!["x".into(); 33], ..options() }),
            ("stop", SamplingOptions { stop: vec!["x".repeat(1 << 20)], ..options() }),
            ("stop_token_ids", SamplingOptions { stop_token_ids: vec![-1], ..options() }),
            ("stop_token_ids", SamplingOptions { stop_token_ids: vec![1; 100_000], ..options() }),
            ("logprobs", SamplingOptions { logprobs: Some(21), ..options() }),
            ("prompt_logprobs", SamplingOptions { prompt_logprobs: Some(-1), ..options() }),
            ("prompt_logprobs", SamplingOptions { prompt_logprobs: Some(21), ..options() }),
            ("logit_bias", SamplingOptions { logit_bias: vec![(0, 100.5)], ..options() }),
            ("logit_bias", SamplingOptions { logit_bias: vec![(0, 1.0); 1025], ..options() }),
        ] {
            match SamplingParams::new(bad) {
                Err(Error::InvalidValue { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn values_are_brought_into_one_form() {
        let params = SamplingParams::new(SamplingOptions {
            temperature: 1e-9,
            top_k: -1,
            top_p: 1e-60,
            stop_token_ids: vec![5, 2, 5],
            ..options()
        })
        .expect("in range");
        assert_eq!((params.temperature, params.top_k, params.stop_token_ids), (0.0, 0, vec![2, 5]));
        assert!(params.top_p > 0.0);
    }

    #[test]
    fn token_ids_are_held_against_the_vocabulary() {
        let params = SamplingParams { logit_bias: vec![(3, 1.0), (10, 1.0)], ..SamplingParams::default() };
        assert!(params.check_tokens(11).is_ok());
        let refused = Error::TokenOutOfRange { field: "logit_bias", index: 1, token: 10, vocab_size: 10 };
        assert_eq!(params.check_tokens(10), Err(refused));
    }
}
