//! What one 64-bit seed picks: the sizes of the core, the requests, and which of the troubles
//! happen in this world.
//!
//! Each seed switches on another subset of the features, so that rare mixes are met: with
//! everything on at once, the loud troubles (failures, aborts) would end most requests before the
//! quiet ones could show.

use crate::model::VECTOR_SIZE;
use crate::toy_grammar::{Shared, Toy};
use _core::config::{
    Batching, CoreConfig, DecodeShape, PrefillGraphs, SchedulingPolicy, Speculation, SpeculationMethod,
};
use _core::grammar::Bounds;
use _core::policy::shares::Share;
use _core::request::{Pooling, PoolingKind, SamplingOptions, SamplingParams, SharedGrammar};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::sync::Arc;

/// A request before it is submitted.
#[derive(Clone, Debug)]
pub struct NewRequest {
    pub prompt: Vec<u32>,
    pub params: SamplingParams,
    pub priority: i32,
    /// The grammar among the parameters.
    pub toy: Option<Toy>,
    /// Whose it is, in worlds that share.
    pub share: Option<Share>,
    pub salt: Option<String>,
}

/// Chances and switches of one world.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub config: CoreConfig,
    /// Two steps in flight.
    pub overlap: bool,
    pub num_requests: usize,
    /// Requests submitted at once, at most.
    pub burst: usize,
    /// Chance, per turn, that a burst arrives.
    pub arrival: f64,
    /// Chances per turn; 0 where the feature is off.
    pub abort: f64,
    pub unknown_abort: f64,
    pub step_failure: f64,
    pub nan: f64,
    pub cache_reset: f64,
    pub clock_jump: f64,
    pub fail_all: f64,
    /// Chance that the executor is slow, so that the oldest step is not ready when the next is
    /// planned.
    pub slow_executor: f64,
    /// Chances per request.
    shared_prefix: f64,
    follow_up: f64,
    salted: f64,
    choices: f64,
    several_prompts: f64,
    random_sampling: f64,
    penalties: f64,
    biased: f64,
    min_tokens: f64,
    logprobs: f64,
    prioritised: f64,
    stop_tokens: f64,
    stop_strings: f64,
    open_ended: f64,
    ignore_eos: f64,
    prompt_logprobs: f64,
    embeddings: f64,
    pub grammars: f64,
    longest_prompt: usize,
    longest_output: u32,
    bases: Vec<Vec<u32>>,
}

impl Scenario {
    pub fn new(seed: u64) -> Self {
        let rng = &mut StdRng::seed_from_u64(seed);
        let mut config = core_config(rng);
        let max_len = config.max_model_len as usize;
        let mut longest_prompt = rng.random_range(1..max_len);
        let mut longest_output = rng.random_range(1..=(max_len as u32).min(48));
        let is_storm = rng.random_bool(0.25);
        if is_storm {
            // Many short prompts with long outputs in a pool for hardly more than one: preemption
            // after preemption.
            config.num_blocks = blocks_of_one(&config) + rng.random_range(2..=4);
            config.max_num_seqs = rng.random_range(2..=12);
            config.batching = Batching::Continuous;
            config.admits_by_growth = rng.random_bool(0.4);
            longest_prompt = rng.random_range(1..=max_len.div_ceil(4));
            longest_output = max_len as u32;
        }
        let bases = (0..3).map(|_| random_tokens(rng, max_len, config.vocab_size)).collect();
        let one_in_two = |rng: &mut StdRng, chance: f64| if rng.random_bool(0.5) { chance } else { 0.0 };
        let one_in_four = |rng: &mut StdRng, chance: f64| if rng.random_bool(0.25) { chance } else { 0.0 };
        Scenario {
            overlap: rng.random_bool(0.7),
            num_requests: rng.random_range(1..=50),
            burst: rng.random_range(1..=10),
            arrival: *[0.02, 0.2, 1.0].choose(rng).expect("not empty"),
            abort: one_in_four(rng, 0.05),
            unknown_abort: one_in_four(rng, 0.05),
            step_failure: one_in_four(rng, 0.02),
            nan: one_in_four(rng, 0.02),
            cache_reset: one_in_four(rng, 0.03),
            clock_jump: one_in_four(rng, 0.05),
            fail_all: if rng.random_bool(0.1) { 0.01 } else { 0.0 },
            slow_executor: one_in_two(rng, 0.3),
            shared_prefix: one_in_two(rng, 0.8),
            follow_up: one_in_two(rng, 0.3),
            salted: one_in_four(rng, 0.5),
            choices: one_in_two(rng, 0.4),
            several_prompts: one_in_two(rng, 0.3),
            random_sampling: one_in_two(rng, 0.5),
            penalties: one_in_four(rng, 0.5),
            biased: one_in_four(rng, 0.5),
            min_tokens: one_in_four(rng, 0.5),
            logprobs: one_in_four(rng, 0.5),
            prioritised: one_in_two(rng, 0.5),
            stop_tokens: one_in_four(rng, 0.5),
            stop_strings: one_in_four(rng, 0.5),
            open_ended: one_in_four(rng, 0.2),
            // The last draw: worlds without grammars stay the scenarios that they were.
            grammars: one_in_four(rng, 0.6),
            longest_prompt,
            longest_output,
            ignore_eos: if is_storm { 1.0 } else { 0.2 },
            bases,
            config,
            // The last draws: worlds without them stay what they were.
            prompt_logprobs: one_in_four(rng, 0.5),
            embeddings: one_in_four(rng, 0.6),
        }
    }

    /// A new call; its prompts share everything else.
    pub fn new_call(&self, rng: &mut StdRng, finished: Option<&[u32]>) -> Vec<NewRequest> {
        let first = self.new_request(rng, finished);
        let more = if rng.random_bool(self.several_prompts) { rng.random_range(1..=9) } else { 0 };
        let mut call = vec![first.clone()];
        for _ in 0..more {
            let NewRequest { mut prompt, .. } = self.new_request(rng, finished);
            // A limit that fits the first prompt fits this one too.
            prompt.truncate(first.prompt.len());
            call.push(NewRequest { prompt, ..first.clone() });
        }
        call
    }

    /// A new request; `finished` holds prompt and output of one that has ended, for follow-ups.
    fn new_request(&self, rng: &mut StdRng, finished: Option<&[u32]>) -> NewRequest {
        let vocab_size = self.config.vocab_size;
        let mut prompt = Vec::new();
        if let Some(history) = finished.filter(|_| rng.random_bool(self.follow_up)) {
            prompt.extend_from_slice(history);
        } else if rng.random_bool(self.shared_prefix) {
            let base = self.bases.choose(rng).expect("there are bases");
            prompt.extend_from_slice(&base[..self.near_block_border(rng, base.len())]);
        }
        if prompt.is_empty() || rng.random_bool(0.5) {
            let tail = rng.random_range(1..=self.longest_prompt);
            prompt.extend(random_tokens(rng, tail, vocab_size));
        }
        // Some are left too long, which the core must refuse.
        if !rng.random_bool(0.02) {
            prompt.truncate(self.longest_prompt);
        }
        let wants_vector = self.embeddings > 0.0 && rng.random_bool(self.embeddings);
        let mut params = if wants_vector { embedding(rng) } else { self.params(rng, prompt.len() as u32) };
        let priority = if rng.random_bool(self.prioritised) { rng.random_range(-2..=2) } else { 0 };
        let salt = rng.random_bool(self.salted).then(|| ["a", "b"].choose(rng).expect("not empty").to_string());
        let toy = (self.grammars > 0.0 && !wants_vector && rng.random_bool(self.grammars)).then(|| self.toy(rng));
        params.grammar =
            toy.map(|toy| SharedGrammar(Arc::new(Shared { toy, ends: self.config.eos_token_ids.clone() })));
        if self.grammars > 0.0 && !wants_vector && rng.random_bool(self.grammars / 2.0) {
            params.bounds = self.bounds(rng);
        }
        let share = ((self.config.seed >> 24).trailing_zeros() >= 2).then(|| share(&params));
        NewRequest { prompt, params, priority, toy, share, salt }
    }

    /// Leaves out about a quarter of the vocabulary, and pairs of tokens that models come upon.
    fn bounds(&self, rng: &mut StdRng) -> Bounds {
        let vocab_size = self.config.vocab_size;
        let allowed = rng.random_bool(0.5).then(|| (0..vocab_size).filter(|_| rng.random_bool(0.75)).collect());
        let bad_words = (0..rng.random_range(0..=200)).map(|_| random_tokens(rng, 2, vocab_size)).collect();
        Bounds { allowed, bad_words, thinking: None }
    }

    fn toy(&self, rng: &mut StdRng) -> Toy {
        let longest = rng.random_range(1..=self.longest_output);
        let fails_at = rng.random_bool(0.1).then(|| rng.random_range(0..=longest));
        Toy { seed: rng.random(), vocab_size: self.config.vocab_size, longest, fails_at }
    }

    /// A length up to `limit`, half of the time within one token of a multiple of the block size.
    fn near_block_border(&self, rng: &mut StdRng, limit: usize) -> usize {
        let len = rng.random_range(1..=limit);
        if rng.random_bool(0.5) {
            return len;
        }
        let block_size = self.config.block_size as usize;
        (len.div_ceil(block_size) * block_size + rng.random_range(0..3)).saturating_sub(1).clamp(1, limit)
    }

    /// After how many tokens the simulated text of a request holds a stop string.
    pub fn stop_string_at(&self, rng: &mut StdRng, params: &SamplingParams) -> Option<u32> {
        (params.pooling.is_none() && rng.random_bool(self.stop_strings))
            .then(|| rng.random_range(params.min_tokens.max(1)..=self.longest_output.max(params.min_tokens)))
    }

    fn params(&self, rng: &mut StdRng, prompt_len: u32) -> SamplingParams {
        let vocab_size = i64::from(self.config.vocab_size);
        let room = self.config.max_model_len.saturating_sub(prompt_len).clamp(1, self.longest_output);
        let most = if rng.random_bool(0.95) { room } else { self.longest_output };
        let max_tokens = rng.random_range(1..=most);
        let mut options = SamplingOptions {
            temperature: 0.0,
            seed: Some(rng.random()),
            max_tokens: Some(i64::from(max_tokens)),
            ignore_eos: rng.random_bool(self.ignore_eos),
            ..SamplingOptions::default()
        };
        if rng.random_bool(self.choices) {
            options.n = rng.random_range(2..=4);
        }
        if rng.random_bool(self.random_sampling) {
            options.temperature = 0.7;
            options.top_k = rng.random_range(0..10);
            options.top_p = 0.9;
            options.min_p = 0.1;
        }
        if rng.random_bool(self.penalties) {
            options.repetition_penalty = if rng.random_bool(0.5) { 1.0 } else { 1.25 };
            options.presence_penalty = 0.5;
            options.frequency_penalty = f64::from(rng.random_range(0..3)) / 4.0;
        }
        if rng.random_bool(self.stop_tokens) {
            options.stop_token_ids = (0..3).map(|_| rng.random_range(0..vocab_size)).collect();
        }
        if rng.random_bool(self.biased) {
            // Not the tokens that `min_tokens` may ban: which of two entries of one token wins is
            // the device's affair.
            let free: Vec<i64> = (0..vocab_size)
                .filter(|token| !options.stop_token_ids.contains(token))
                .filter(|token| !self.config.eos_token_ids.contains(&(*token as u32)))
                .collect();
            let mut tokens: Vec<i64> = free.choose_multiple(rng, 4).copied().collect();
            tokens.sort_unstable();
            options.logit_bias = tokens.into_iter().map(|token| (token, token as f64 / 16.0 - 1.0)).collect();
        }
        if rng.random_bool(self.min_tokens) {
            options.min_tokens = i64::from(rng.random_range(0..=max_tokens));
        }
        if options.min_tokens == 0 && rng.random_bool(self.open_ended) {
            options.max_tokens = None;
        }
        if rng.random_bool(self.logprobs) {
            options.logprobs = Some(rng.random_range(0..4));
        }
        if self.prompt_logprobs > 0.0 && rng.random_bool(self.prompt_logprobs) {
            options.prompt_logprobs = Some(rng.random_range(0..4));
        }
        SamplingParams::new(options).expect("the scenario makes valid parameters")
    }
}

/// Sizes of the core: block sizes from 1, budgets from 1, pools from barely one request up.
fn core_config(rng: &mut StdRng) -> CoreConfig {
    let block_size = if rng.random_bool(0.5) { rng.random_range(1..=4) } else { rng.random_range(1..=32) };
    let max_model_len: u32 = rng.random_range(4..=160);
    let window = |rng: &mut StdRng| rng.random_range(1..=max_model_len.min(40));
    let kv_windows = match rng.random_range(0..6) {
        0..=2 => vec![0],
        3 => vec![window(rng)],
        4 => vec![0, window(rng)],
        _ => vec![0, window(rng), window(rng)],
    };
    let config =
        CoreConfig { block_size, max_model_len, kv_windows, vector_size: VECTOR_SIZE, ..CoreConfig::default() };
    let blocks_of_one = blocks_of_one(&config);
    let num_blocks = match rng.random_range(0..4) {
        0 => rng.random_range(2..=blocks_of_one + 2),
        1 => blocks_of_one + rng.random_range(1..=3),
        2 => rng.random_range(blocks_of_one + 1..=2 * blocks_of_one + 2),
        _ => rng.random_range(blocks_of_one + 1..=8 * blocks_of_one + 8),
    };
    let num_draft_tokens = if rng.random_bool(0.3) { rng.random_range(1..=3) } else { 0 };
    let enable_chunked_prefill = rng.random_bool(0.85);
    let budget = match rng.random_range(0..3) {
        0 => rng.random_range(1 + num_draft_tokens..=8),
        1 => rng.random_range(1 + num_draft_tokens..=64),
        _ => rng.random_range(64..=512),
    };
    let max_num_seqs = if rng.random_bool(0.5) { rng.random_range(1..=4) } else { rng.random_range(1..=24) };
    let eos_token_ids = (0..rng.random_range(0..3)).collect();
    let config = CoreConfig {
        num_blocks,
        max_num_seqs,
        max_num_batched_tokens: if enable_chunked_prefill { budget } else { budget.max(max_model_len) },
        vocab_size: *[24, 64, 64, 1000].choose(rng).expect("not empty"),
        eos_token_ids,
        max_waiting: if rng.random_bool(0.3) { rng.random_range(1..=8) } else { 1024 },
        batching: match rng.random_range(0..8) {
            0 => Batching::Static,
            1 => Batching::None,
            _ => Batching::Continuous,
        },
        scheduling_policy: if rng.random_bool(0.3) { SchedulingPolicy::Priority } else { SchedulingPolicy::Fcfs },
        enable_prefix_caching: rng.random_bool(0.8),
        enable_chunked_prefill,
        graph_sizes: if rng.random_bool(0.4) { vec![1, 2, 4, 8, 16, 24] } else { Vec::new() },
        num_draft_tokens,
        max_preemptions: rng.random_range(0..=3),
        admits_by_growth: rng.random_bool(0.6),
        priority_aging: *[0.05, 1.0, 60.0].choose(rng).expect("not empty"),
        static_batch_wait: 0.1,
        hash_secret: rng.random(),
        seed: rng.random(),
        ..config
    };
    // Without draws of their own: the kept seeds stay the scenarios that they were.
    let config = CoreConfig { speculation: speculation(&config), ..config };
    if config.graph_sizes.is_empty() {
        return config;
    }
    let shape = |tokens: u32| DecodeShape { tokens, rows: tokens.min(config.max_num_seqs) + 1 };
    let draft_graphs = vec![shape(2), shape(5), shape(12), shape(40), shape(100)];
    let draft_decodes = vec![shape(6), shape(30)];
    let prefill_graphs =
        PrefillGraphs { tokens: vec![1, 4, 16, 48, 200], decodes: vec![0, 1, 4, 16], draft_decodes, rows: 4 };
    CoreConfig { draft_graphs, prefill_graphs, ..config }
}

/// Half of the worlds with drafts have the core foretell them, or a model on the device in one of four
/// of these. The core's text has no order, so most of its drafts are wrong; the others are mostly right.
fn speculation(config: &CoreConfig) -> Option<Speculation> {
    let draw = config.seed;
    let by_model = draw >> 21 & 3;
    (config.num_draft_tokens > 0 && draw & 1 == 1).then(|| Speculation {
        method: match (draw & 2, by_model) {
            (_, 0) => SpeculationMethod::Model,
            (0, _) => SpeculationMethod::Ngram,
            _ => SpeculationMethod::Suffix,
        },
        lookup_min: 1,
        lookup_max: 1 + (draw >> 2) as u32 % 4,
        max_spec_factor: 4.0,
        max_cached_tokens: (draw >> 4) as u32 % 500,
        adaptive: draw & (1 << 20) == 0,
        follows: by_model == 0,
        ..Speculation::default()
    })
}

/// One of four, of which one has more weight. Without a draw, as above.
fn share(params: &SamplingParams) -> Share {
    let key = (params.seed.unwrap_or_default() >> 8) as u32 % 4;
    Share { key, weight: if key == 0 { 2.5 } else { 1.0 } }
}

/// Blocks of one sequence of the model's full length.
fn blocks_of_one(config: &CoreConfig) -> u32 {
    config.max_model_len.div_ceil(config.block_size) * config.kv_windows.len() as u32
}

fn embedding(rng: &mut StdRng) -> SamplingParams {
    let kind = *[PoolingKind::Last, PoolingKind::Mean].choose(rng).expect("not empty");
    SamplingParams::embedding(Pooling { kind, normalize: false, dimensions: None })
}

fn random_tokens(rng: &mut StdRng, len: usize, vocab_size: u32) -> Vec<u32> {
    (0..len).map(|_| rng.random_range(0..vocab_size)).collect()
}
