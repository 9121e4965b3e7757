//! What was asked of the core and what came out, request by request: each token is held against the
//! oracle as it arrives.
//!
//! Knows no blocks and no steps in detail: a step is the list of sequences that have a row in it.

use crate::model::{Sampling, VECTOR_SIZE};
use crate::oracle::{self, End, Expected};
use crate::scenario::NewRequest;
use _core::config::CoreConfig;
use _core::output::{FinishReason, OutputSink, PromptToken, SampledToken, SequenceError};
use _core::plan::TokenLogprobs;
use _core::request::{Pooling, PoolingKind, Progress, RequestId, SeqRef};
use rustc_hash::FxHashMap;
use std::hash::BuildHasher;

/// One of the `n` sequences of a request.
pub struct Choice {
    expected: Expected,
    /// The simulated text holds a stop string once this many tokens are out.
    stop_string_at: Option<u32>,
    pub received: Vec<u32>,
    pub ended: Option<FinishReason>,
    /// Logits of this sequence were NaN in the step with this number.
    pub nan_in_step: Option<u64>,
}

/// A request that the core accepted.
pub struct Request {
    pub asked: NewRequest,
    /// The first request of its call.
    pub call: RequestId,
    pub choices: Vec<Choice>,
    /// Log probabilities of its prompt, where it asks for them, and how many have come.
    prompt: Vec<f32>,
    prompt_told: usize,
    /// The embedding of its prompt, where it asks for one, until it has come.
    vector: Option<[f32; VECTOR_SIZE as usize]>,
    is_cache_checked: bool,
}

impl Request {
    pub fn has_ended(&self) -> bool {
        self.choices.iter().all(|choice| choice.ended.is_some())
    }
}

/// What the core is doing when it speaks to the ledger: which endings and tokens are in order now.
#[derive(Clone, Debug)]
pub enum Call {
    /// The results of a step with rows of these sequences.
    Commit {
        step_id: u64,
        seqs: Vec<SeqRef>,
    },
    /// A step with rows of these sequences failed.
    Fail {
        seqs: Vec<SeqRef>,
    },
    FailAll,
    Abort(RequestId),
    /// The grammar masks of a step are made.
    Masks,
}

/// All requests of a world. It is the core's `OutputSink`.
pub struct Ledger {
    pub requests: FxHashMap<RequestId, Request>,
    /// Prompt and output of sequences that ended by themselves.
    pub histories: Vec<Vec<u32>>,
    pub call: Call,
    /// First thing that was wrong.
    pub violation: Option<String>,
    pub num_ended: [u64; 4],
    pub num_tokens: u64,
    windows: Vec<u32>,
    config: CoreConfig,
    /// How many sequences have this prefix under this salt (S8); keyed by a hash of both.
    prefixes: FxHashMap<u64, u32>,
}

impl Ledger {
    pub fn new(config: &CoreConfig) -> Self {
        Ledger {
            requests: FxHashMap::default(),
            histories: Vec::new(),
            call: Call::FailAll,
            violation: None,
            num_ended: [0; 4],
            num_tokens: 0,
            windows: config.kv_windows.clone(),
            config: config.clone(),
            prefixes: FxHashMap::default(),
        }
    }

    /// Enters an accepted request, and computes what must come out of it.
    pub fn accept(&mut self, id: RequestId, call: RequestId, asked: NewRequest, stop_string_at: Option<u32>) {
        let params = &asked.params;
        let mut stop_tokens = params.stop_token_ids.clone();
        if !params.ignore_eos {
            stop_tokens.extend(&self.config.eos_token_ids);
        }
        let room = self.config.max_model_len - asked.prompt.len() as u32;
        let vector =
            params.pooling.map(|Pooling { kind, .. }| oracle::expect_vector(&asked.prompt, &self.windows, kind));
        let expect = |index: u32| {
            let request = oracle::Request {
                prompt: &asked.prompt,
                sampling: Sampling {
                    temperature: params.temperature,
                    top_k: params.top_k,
                    top_p: params.top_p,
                    min_p: params.min_p,
                    penalties: [params.repetition_penalty, params.presence_penalty, params.frequency_penalty],
                    seed: params.seed.unwrap_or(0).wrapping_add(u64::from(index)),
                },
                bias: &params.logit_bias,
                max_tokens: params.max_tokens.unwrap_or(room),
                min_tokens: params.min_tokens,
                stop_tokens: &stop_tokens,
                bounds: &asked.params.bounds,
                grammar: asked.toy.map(|toy| (toy, &self.config.eos_token_ids[..])),
                ignores_end_tokens: params.ignore_eos,
            };
            oracle::expect(&request, &self.windows, self.config.vocab_size)
        };
        let choices = (0..params.n)
            .map(|index| Choice {
                expected: expect(index),
                stop_string_at,
                received: Vec::new(),
                ended: None,
                nan_in_step: None,
            })
            .collect();
        for len in 1..=asked.prompt.len() {
            *self.prefixes.entry(prefix_key(asked.salt.as_deref(), &asked.prompt[..len])).or_default() += 1;
        }
        let prompt = match params.prompt_logprobs {
            Some(_) => oracle::expect_prompt(&asked.prompt, &self.windows),
            None => Vec::new(),
        };
        let request = Request { asked, call, choices, prompt, prompt_told: 0, vector, is_cache_checked: false };
        self.requests.insert(id, request);
    }

    pub fn choice(&mut self, seq: SeqRef) -> Option<&mut Choice> {
        self.requests.get_mut(&seq.request)?.choices.get_mut(seq.index as usize)
    }

    /// Tokens that the sequence should output next; a speculator with foresight.
    pub fn upcoming(&self, seq: SeqRef) -> &[u32] {
        let choice = self.requests.get(&seq.request).and_then(|request| request.choices.get(seq.index as usize));
        choice.map_or(&[], |choice| choice.expected.tokens.get(choice.received.len()..).unwrap_or_default())
    }

    pub fn has_unfinished(&self) -> bool {
        self.requests.values().any(|request| !request.has_ended())
    }

    fn token_is_right(&mut self, seq: SeqRef, token: &SampledToken, progress: &Progress) -> Result<(), String> {
        let Call::Commit { step_id, seqs } = &self.call else {
            return Err(format!("a token comes out of {:?}", self.call));
        };
        if !seqs.contains(&seq) {
            return Err(format!("a token, but no row in step {step_id}"));
        }
        let request = self.requests.get_mut(&seq.request).ok_or("a token of an unknown request")?;
        if !request.is_cache_checked {
            request.is_cache_checked = true;
            if request.prompt_told < request.prompt.len() {
                let (told, all) = (request.prompt_told, request.prompt.len());
                return Err(format!("S16: the first token comes after {told} of the prompt's {all} log probabilities"));
            }
            let cached = progress.num_cached_tokens as usize;
            let found = request.asked.prompt.get(..cached).ok_or("S8: more cached tokens than the prompt has")?;
            let key = prefix_key(request.asked.salt.as_deref(), found);
            // With windows of 1 only, nothing before a block's border is ever seen: any length can
            // be skipped.
            let sees_back = self.windows.iter().any(|window| *window != 1);
            if cached > 0 && sees_back && self.prefixes.get(&key).copied().unwrap_or_default() < 2 {
                return Err(format!("S8: {cached} tokens found in the cache that nobody computed under this salt"));
            }
        }
        let wants_logprobs = request.asked.params.logprobs;
        let prompt_len = request.asked.prompt.len();
        let choice = request.choices.get_mut(seq.index as usize).ok_or("a token of an unknown choice")?;
        if choice.ended.is_some() {
            return Err("a token after the end".to_string());
        }
        if choice.nan_in_step.is_some_and(|nan| nan <= *step_id) {
            return Err("a token from NaN logits".to_string());
        }
        let place = choice.received.len();
        if token.output_index as usize != place {
            return Err(format!("token number {place} says it is number {}", token.output_index));
        }
        if choice.expected.tokens.get(place) != Some(&token.id) {
            return Err(format!(
                "E1-E8: output token {place} after {prompt_len} prompt tokens is {}, expected {:?}",
                token.id,
                choice.expected.tokens.get(place)
            ));
        }
        match (&token.logprobs, wants_logprobs) {
            (None, None) => {}
            (Some(found), Some(wanted)) => {
                let right = choice.expected.logprobs[place];
                logprobs_are_right(found, token.id, right, wanted, self.config.vocab_size)
                    .map_err(|wrong| format!("output token {place} {wrong}"))?;
            }
            (found, wanted) => return Err(format!("logprobs {:?}, wanted {wanted:?}", found.is_some())),
        }
        choice.received.push(token.id);
        self.num_tokens += 1;
        let history: Vec<u32> = request.asked.prompt.iter().chain(&choice.received).copied().collect();
        *self.prefixes.entry(prefix_key(request.asked.salt.as_deref(), &history)).or_default() += 1;
        Ok(())
    }

    /// S16: each token of the prompt is told once, in order.
    fn prompt_token_is_right(&mut self, id: RequestId, token: &PromptToken) -> Result<(), String> {
        let Call::Commit { step_id, seqs } = &self.call else {
            return Err(format!("a prompt's log probability comes out of {:?}", self.call));
        };
        if !seqs.iter().any(|seq| seq.request == id) {
            return Err(format!("a prompt's log probability, but no row in step {step_id}"));
        }
        let request = self.requests.get_mut(&id).ok_or("a log probability of an unknown request")?;
        let Some(wanted) = request.asked.params.prompt_logprobs else {
            return Err("S16: log probabilities of a prompt that asked for none".to_string());
        };
        if request.has_ended() {
            return Err("S16: a log probability of the prompt after the end".to_string());
        }
        request.prompt_told += 1;
        let place = request.prompt_told;
        if token.place as usize != place || request.asked.prompt.get(place) != Some(&token.id) {
            let (found, id) = (token.place, token.id);
            return Err(format!("S16: prompt token {place} is to be told, but {found} comes, which is {id}"));
        }
        logprobs_are_right(&token.logprobs, token.id, request.prompt[place - 1], wanted, self.config.vocab_size)
            .map_err(|wrong| format!("S16: prompt token {place} {wrong}"))
    }

    /// S18: a request that asks for an embedding is told one, of exactly its tokens.
    fn vector_is_right(&mut self, id: RequestId, found: &[f32]) -> Result<(), String> {
        let Call::Commit { step_id, seqs } = &self.call else {
            return Err(format!("an embedding comes out of {:?}", self.call));
        };
        if !seqs.iter().any(|seq| seq.request == id) {
            return Err(format!("an embedding, but no row in step {step_id}"));
        }
        let request = self.requests.get_mut(&id).ok_or("an embedding of an unknown request")?;
        if request.has_ended() {
            return Err("S18: an embedding after the end".to_string());
        }
        if request.choices[0].nan_in_step.is_some_and(|nan| nan <= *step_id) {
            return Err("S18: an embedding of NaN".to_string());
        }
        let right = request.vector.take().ok_or("S18: an embedding that nobody asked for, or a second one")?;
        let bits = |vector: &[f32]| vector.iter().map(|number| number.to_bits()).collect::<Vec<u32>>();
        if bits(found) == bits(&right) {
            return Ok(());
        }
        Err(format!("S18: embedding {found:?} of {} tokens, expected {right:?}", request.asked.prompt.len()))
    }

    fn end_is_right(&mut self, seq: SeqRef, reason: FinishReason, progress: &Progress) -> Result<(), String> {
        let call = &self.call;
        let request = self.requests.get_mut(&seq.request).ok_or("the end of an unknown request")?;
        let pooling = request.asked.params.pooling;
        if pooling.is_some_and(|pooling| pooling.kind == PoolingKind::Mean) && progress.num_cached_tokens > 0 {
            return Err("S18: a mean over tokens that were not computed".to_string());
        }
        let prompt_len = request.asked.prompt.len();
        let choice = request.choices.get_mut(seq.index as usize).ok_or("the end of an unknown choice")?;
        if let Some(earlier) = choice.ended.replace(reason) {
            return Err(format!("S13: ends as {reason:?} after it ended as {earlier:?}"));
        }
        let place = choice.received.len();
        let whole = &choice.expected;
        let has_all = place == whole.tokens.len();
        // A grammar's own end comes behind the last token.
        let ends_with_token = matches!(whole.end, End::Stop | End::Length);
        let stop_string_hit = choice.stop_string_at.is_some_and(|at| at as usize == place);
        let (kind, is_right) = match reason {
            FinishReason::StopString(index) => (0, index == 0 && stop_string_hit),
            FinishReason::Eos | FinishReason::StopToken(_) => {
                (0, has_all && whole.end == End::Stop && !stop_string_hit)
            }
            FinishReason::Length if request.asked.params.max_tokens.is_none() && !(has_all && ends_with_token) => {
                (1, self.config.pool_is_full_with(prompt_len + place))
            }
            FinishReason::Pooled => {
                (0, pooling.is_some() && request.vector.is_none() && matches!(call, Call::Commit { .. }))
            }
            FinishReason::Length if pooling.is_some() => (1, false),
            FinishReason::Length => (1, has_all && whole.end == End::Length && !stop_string_hit),
            FinishReason::Abort => (2, matches!(call, Call::Abort(id) if *id == seq.request)),
            FinishReason::Error(SequenceError::StepFailed) => (
                3,
                match call {
                    Call::Fail { seqs } => seqs.iter().any(|failed| failed.request == seq.request),
                    Call::FailAll => true,
                    Call::Commit { .. } | Call::Abort(_) | Call::Masks => false,
                },
            ),
            FinishReason::Complete => (0, has_all && whole.end == End::Complete && matches!(call, Call::Masks)),
            FinishReason::Error(SequenceError::Grammar) => {
                (3, has_all && whole.end == End::Fault && matches!(call, Call::Masks))
            }
            // Behind a draft a fault shows in the draw.
            FinishReason::Error(SequenceError::AllMasked) => {
                let in_reach = place + self.config.num_draft_tokens as usize >= whole.tokens.len();
                (3, whole.end == End::Fault && !has_all && in_reach)
            }
            FinishReason::Error(SequenceError::Numerical) => (3, choice.nan_in_step.is_some()),
            FinishReason::Error(_) => (3, false),
        };
        self.num_ended[kind] += 1;
        if !is_right {
            return Err(format!(
                "ends as {reason:?} after {place} tokens, expected {} tokens and {:?} (in {call:?})",
                whole.tokens.len(),
                whole.end
            ));
        }
        if kind < 2 {
            let history = request.asked.prompt.iter().chain(&choice.received).copied().collect();
            self.histories.push(history);
        }
        Ok(())
    }

    fn note(&mut self, seq: SeqRef, outcome: Result<(), String>) {
        if let Err(violation) = outcome {
            self.violation
                .get_or_insert_with(|| format!("request {} choice {}: {violation}", seq.request.0, seq.index));
        }
    }
}

/// What the device says of a token whose log probability is to be `right`.
fn logprobs_are_right(
    found: &TokenLogprobs,
    token: u32,
    right: f32,
    wanted: u32,
    vocab_size: u32,
) -> Result<(), String> {
    if found.logprob().to_bits() != right.to_bits() || found.rank() != token % 5 + 1 {
        return Err(format!("has logprob {} of rank {}, expected {right}", found.logprob(), found.rank()));
    }
    let top: Vec<u32> = found.top().map(|(id, _)| id).collect();
    let expected: Vec<u32> = (0..wanted).map(|top| (token + top) % vocab_size).collect();
    if top != expected {
        return Err(format!("has top tokens {top:?}, expected {expected:?}"));
    }
    Ok(())
}

impl OutputSink for Ledger {
    fn on_prompt_token(&mut self, request: RequestId, token: &PromptToken<'_>) {
        let outcome = self.prompt_token_is_right(request, token);
        self.note(SeqRef { request, index: 0 }, outcome);
    }

    fn on_token(&mut self, seq: SeqRef, token: &SampledToken<'_>, progress: &Progress) -> Option<u32> {
        let outcome = self.token_is_right(seq, token, progress);
        self.note(seq, outcome);
        let choice = self.choice(seq)?;
        (choice.stop_string_at == Some(choice.received.len() as u32)).then_some(0)
    }

    fn on_vector(&mut self, request: RequestId, vector: &[f32]) {
        let outcome = self.vector_is_right(request, vector);
        self.note(SeqRef { request, index: 0 }, outcome);
    }

    fn on_finish(&mut self, seq: SeqRef, reason: FinishReason, progress: &Progress) {
        let outcome = self.end_is_right(seq, reason, progress);
        self.note(seq, outcome);
    }
}

/// How much of the pool one sequence needs, at most.
pub trait PoolNeed {
    /// Whether a sequence of this many tokens leaves no block for another token, or might; drafts
    /// tried at its end need places too, and those of two steps may be undecided at once.
    fn pool_is_full_with(&self, num_tokens: usize) -> bool;
}

impl PoolNeed for CoreConfig {
    fn pool_is_full_with(&self, num_tokens: usize) -> bool {
        let places = num_tokens + 1 + 2 * self.num_draft_tokens as usize;
        let blocks = places.div_ceil(self.block_size as usize) * self.kv_windows.len();
        blocks > self.num_blocks as usize - 1
    }
}

fn prefix_key(salt: Option<&str>, tokens: &[u32]) -> u64 {
    rustc_hash::FxBuildHasher.hash_one((salt, tokens))
}
