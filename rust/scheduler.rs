//! The scheduler: who runs, in which blocks, with which tokens. See the crate's page for the life
//! of a request.
//!
//! Split by event: `arrive` (a request comes), `admit` (a waiting sequence joins, if `growth` says
//! that there will be room, by what `lengths` has seen), `schedule` (a step is planned; `budget` has
//! how prompts share it), `commit` (a step or a request ends). This file holds the state they share.
//!
//! # Why everybody gets on
//! Running sequences are kept, served and given blocks in one order ([`policy`](crate::policy)),
//! and preempted from its end, so the first always advances: everyone after it can be made to give
//! way, and alone it fits, which admission checked. At most `max_running` run, so each can have a
//! decode row in every step.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

use crate::config::{Batching, CoreConfig};
use crate::error::Error;
use crate::kv_cache::KvCache;
use crate::plan::{PlanCapacity, PlanWriter, ResultLayout, TargetLayout, VectorLayout};
use crate::policy::{Order, WaitingQueue, LOOKAHEAD};
use crate::prefix_cache::PrefixHasher;
use crate::request::{check_tokens, BlockId, Request, RequestId, SeqRef};
use crate::slab::Slab;
use crate::speculation::Speculator;
use crate::timeline::Timeline;

mod admit;
mod arrive;
mod budget;
mod commit;
mod draft;
mod follow;
mod growth;
mod integrity;
mod lengths;
mod masks;
mod padding;
mod schedule;
mod sequence;
mod waits;

use growth::Forecast;
use lengths::Lengths;
pub use masks::MaskWork;
use masks::MaskedRow;
use sequence::{Sequence, State, Traits};
use waits::Waits;

/// Events and requests that are kept of what happened: 3 MB.
const TIMELINE: (usize, usize) = (32_768, 8_192);

/// Most steps in flight.
pub const MAX_STEPS_IN_FLIGHT: usize = 2;

/// Counters and gauges. Counters only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Sequences that hold a place in the running batch.
    pub num_running: u64,
    /// Sequences that wait, preempted ones included.
    pub num_waiting: u64,
    /// Requests that have not been admitted: what `max_waiting` bounds.
    pub num_queued: u64,
    /// Steps planned and not committed.
    pub steps_in_flight: u64,
    /// Blocks of the pool, without the null block.
    pub blocks_total: u64,
    /// Blocks held by sequences.
    pub blocks_used: u64,
    /// Blocks given back that a step in flight may still touch.
    pub blocks_held: u64,
    /// Free blocks whose content can still be found.
    pub blocks_cached: u64,
    /// Free blocks without content.
    pub blocks_blank: u64,
    /// Counter: requests accepted.
    pub requests_added: u64,
    /// Counter: sequences ended by an end token, a stop token or a stop string.
    pub finished_stop: u64,
    /// Counter: sequences ended by length.
    pub finished_length: u64,
    /// Counter: sequences aborted.
    pub finished_abort: u64,
    /// Counter: sequences ended by an error.
    pub finished_error: u64,
    /// Counter: aborts of ids that were not there (any more).
    pub unknown_aborts: u64,
    /// Counter: preemptions.
    pub preemptions: u64,
    /// Counter: steps committed, failed ones included.
    pub steps: u64,
    /// Counter: prompt tokens of requests that were admitted.
    pub prompt_tokens: u64,
    /// Counter: prompt tokens computed, those computed again after a preemption included.
    pub computed_prompt_tokens: u64,
    /// Counter: output tokens.
    pub generation_tokens: u64,
    /// Counter: decode rows that had drafts.
    pub drafted_rows: u64,
    /// Counter: drafts verified.
    pub draft_tokens: u64,
    /// Counter: drafts that were right.
    pub accepted_tokens: u64,
    /// Counters: passes of a model that drafts, and the nanoseconds that they took, with what it computed
    /// before of tokens that it had missed.
    pub draft_passes: u64,
    /// See `draft_passes`.
    pub draft_nanoseconds: u64,
    /// Counter: tokens looked up in the prefix cache at admissions.
    pub prefix_cache_queries: u64,
    /// Counter: tokens found there.
    pub prefix_cache_hits: u64,
}

/// Prompt tokens of which a row of a step in flight brings log probabilities.
#[derive(Debug, Clone, Copy, Default)]
struct Targets {
    /// Of the first, among those of the step.
    record: u32,
    /// Its place in the prompt.
    first: u32,
    len: u32,
}

/// A row that has been decided on; its blocks are allocated.
#[derive(Debug, Clone, Copy)]
struct PlannedRow {
    sequence: u32,
    /// Tokens before it (at most, for a decode row).
    start: u32,
    len: u32,
    /// It ends with the last known token: one is drawn behind it, unless an embedding is wanted.
    sample: bool,
    /// The sequence takes its slot in this step.
    enters: bool,
}

/// One row of a step in flight.
#[derive(Debug, Clone, Copy)]
struct StepRow {
    sequence: u32,
    /// The sequence's `run` when the row was planned.
    run: u32,
    len: u32,
    num_drafts: u32,
    targets: Targets,
    /// The vector that it completes.
    vector: Option<u32>,
    /// What the model that drafts has missed of the sequence once the step has run: its last tokens.
    unfollowed: u32,
    prefill: bool,
    sample: bool,
}

/// A step in flight.
#[derive(Debug, Default)]
struct Step {
    id: u64,
    /// When it was planned.
    planned_at: f64,
    /// Tokens of its rows if all of them are decode rows; 0: there are prompts.
    decode_tokens: u32,
    /// Drafts that were expected to be right when it was planned, or held back for them.
    hoped: f64,
    /// What a model on the device took to make its drafts, and to follow its target before, and tokens
    /// that it computed for that.
    draft_seconds: f64,
    follow_seconds: f64,
    follow_tokens: u32,
    rows: Vec<StepRow>,
    /// Those that a grammar bounds.
    masked: Vec<MaskedRow>,
    layout: Option<ResultLayout>,
    targets: TargetLayout,
    num_targets: usize,
    vectors: VectorLayout,
    num_vectors: usize,
    /// Its rows' records of the result, padding included.
    num_records: usize,
    /// Decode rows, without and with the padding rows that stand between them and the prefill rows.
    num_decodes: usize,
    padded_decodes: usize,
    /// It did not run; its rows have been dropped.
    failed: bool,
}

impl Step {
    /// Drafts of the row that has most: as many passes of a model that drafts.
    fn most_drafts(&self) -> u32 {
        self.rows.iter().map(|row| row.num_drafts).max().unwrap_or(0)
    }

    /// Place of the result record of `rows[index]`: records are in the plan's row order, padding
    /// included.
    fn record_of(&self, index: usize) -> usize {
        if index < self.num_decodes {
            index
        } else {
            index - self.num_decodes + self.padded_decodes
        }
    }
}

/// What is decided of the step being planned, before it is written. Kept between steps for its
/// memory.
#[derive(Debug, Default)]
struct PlannedStep {
    decodes: Vec<PlannedRow>,
    prefills: Vec<PlannedRow>,
    copies: Vec<(BlockId, BlockId)>,
    /// Tokens of all decode rows, and of the longest: more than one where it has drafts.
    num_decode_tokens: u32,
    longest_decode: u32,
    /// Tokens left of the budget, and how many of them are for short prompts.
    budget: u32,
    for_short: u32,
    /// Left of the plan's room for blocks and penalty tokens of sequences that enter.
    entered_blocks: usize,
    penalty_tokens: usize,
    preempted: bool,
    /// Somebody gave way: only those that come before this are admitted.
    admits_before: Option<Order>,
}

/// The last look into the queue found nobody who fits.
#[derive(Debug, Clone, Copy)]
struct NothingFits {
    /// Blocks that were free then.
    free: usize,
    /// The step before which nobody looks again.
    until: u64,
}

/// The core. Events come in by its methods, with the time in seconds where it matters; plans come
/// out.
#[derive(Debug)]
pub struct Scheduler {
    config: CoreConfig,
    capacity: PlanCapacity,
    kv: KvCache,
    hasher: PrefixHasher,
    requests: Slab<Request>,
    by_id: FxHashMap<RequestId, u32>,
    sequences: Slab<Sequence>,
    /// By order.
    running: Vec<u32>,
    /// Somebody in `running` has finished.
    left_running: bool,
    /// May be admitted.
    ready: WaitingQueue,
    /// Wait for their batch to be opened (policies other than continuous).
    gated: WaitingQueue,
    /// Requests of the open batch that have not finished.
    batch_left: usize,
    free_slots: Vec<u32>,
    /// Slots given back that a step in flight may still use, by the parity of that step.
    held_slots: [Vec<u32>; 2],
    /// What the last look into the queue found, while nothing has changed for the better since.
    nothing_fits: Option<NothingFits>,
    /// The sequences that did not fit then.
    too_big: Vec<u32>,
    waits: Waits,
    timeline: Timeline,
    lengths: Lengths,
    forecast: Forecast,
    speculator: Option<Speculator>,
    /// By place behind a row's first token: drafts that were right. Counters.
    accepted_by_place: Vec<u64>,
    /// Of the step being planned, or held back: drafts that should be right.
    hoped: f64,
    /// Of the step being committed: drafts that were.
    accepted_in_step: u32,
    /// When the last step was committed, if it left somebody running.
    busy_since: Option<f64>,
    /// Requests that have not been admitted yet.
    num_queued: usize,
    /// Of these, requests that wait behind others of their call.
    num_behind: usize,
    /// Longest sequence that the pool holds.
    longest_sequence: u32,
    next_request: u64,
    next_turn: u64,
    next_step: u64,
    committed_step: u64,
    in_flight: VecDeque<Step>,
    /// Emptied steps, for their memory.
    spare_steps: Vec<Step>,
    planned: PlannedStep,
    writer: PlanWriter,
    /// For one block's tokens, one embedding, and the counts of one sequence's penalty tokens.
    token_scratch: Vec<u32>,
    vector_scratch: Vec<f32>,
    penalty_scratch: FxHashMap<u32, u32>,
    now: f64,
    stats: Stats,
}

impl Scheduler {
    /// # Errors
    /// [`Error::InvalidValue`] for a configuration that is out of range.
    pub fn new(config: CoreConfig) -> Result<Self, Error> {
        let config = config.checked()?;
        let kv = KvCache::new(&config);
        Ok(Self {
            capacity: PlanCapacity::new(&config),
            hasher: PrefixHasher::new(config.hash_secret),
            requests: Slab::new(),
            by_id: FxHashMap::default(),
            sequences: Slab::new(),
            running: Vec::with_capacity(config.max_num_seqs as usize),
            left_running: false,
            ready: WaitingQueue::new(config.priority_aging),
            gated: WaitingQueue::new(config.priority_aging),
            batch_left: 0,
            free_slots: (0..config.max_num_seqs).rev().collect(),
            held_slots: [Vec::new(), Vec::new()],
            nothing_fits: None,
            too_big: Vec::with_capacity(LOOKAHEAD),
            waits: Waits::default(),
            timeline: Timeline::new(TIMELINE.0, TIMELINE.1),
            lengths: Lengths::new(config.max_model_len),
            forecast: Forecast::default(),
            speculator: config
                .speculation
                .map(|speculation| Speculator::new(speculation, config.num_draft_tokens as usize)),
            accepted_by_place: vec![0; config.num_draft_tokens as usize],
            hoped: 0.0,
            accepted_in_step: 0,
            busy_since: None,
            num_queued: 0,
            num_behind: 0,
            longest_sequence: kv.longest_sequence(config.max_model_len),
            next_request: 1,
            next_turn: 1,
            next_step: 1,
            committed_step: 0,
            in_flight: VecDeque::with_capacity(MAX_STEPS_IN_FLIGHT),
            spare_steps: Vec::with_capacity(MAX_STEPS_IN_FLIGHT),
            planned: PlannedStep::default(),
            writer: PlanWriter::default(),
            token_scratch: Vec::with_capacity(config.block_size as usize),
            vector_scratch: Vec::with_capacity(config.vector_size as usize),
            penalty_scratch: FxHashMap::default(),
            now: 0.0,
            stats: Stats::default(),
            kv,
            config,
        })
    }

    /// The checked configuration.
    pub fn config(&self) -> &CoreConfig {
        &self.config
    }

    /// Bytes of the largest plan.
    pub fn plan_bytes(&self) -> usize {
        self.capacity.plan_bytes()
    }

    /// Bytes of the largest result.
    pub fn result_bytes(&self) -> usize {
        self.capacity.result_bytes(self.config.num_draft_tokens)
    }

    /// Offers draft tokens for the sequence's next decode row. They are dropped where the sequence
    /// is gone or does not decode now.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] for more than `num_draft_tokens`, [`Error::TokenOutOfRange`].
    pub fn set_drafts(&mut self, seq: SeqRef, drafts: &[u32]) -> Result<(), Error> {
        let limit = self.config.num_draft_tokens;
        if drafts.len() > limit as usize {
            let limit = format!("at most num_draft_tokens = {limit} tokens");
            return Err(Error::invalid("drafts", format!("a list of {}", drafts.len()), limit));
        }
        check_tokens("drafts", drafts.iter().copied(), self.config.vocab_size)?;
        let Some(request) = self.by_id.get(&seq.request) else { return Ok(()) };
        let Some(number) = self.requests[*request].sequences.get(seq.index as usize) else { return Ok(()) };
        match self.sequences.get_mut(*number) {
            Some(sequence) if sequence.name == seq && sequence.state == State::Running && sequence.decoding => {
                sequence.drafts.clear();
                sequence.drafts.extend_from_slice(drafts);
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether any request has not finished.
    pub fn has_unfinished(&self) -> bool {
        !self.by_id.is_empty()
    }

    /// Whether `schedule` is worth a call at `now`: something runs or may be admitted. A static
    /// batch that is still forming is no work before [`Self::next_wake`].
    pub fn has_work(&self, now: f64) -> bool {
        !self.running.is_empty() || !self.ready.is_empty() || self.batch_may_open(self.clock(now))
    }

    /// When a forming static batch will start without further arrivals.
    pub fn next_wake(&self) -> Option<f64> {
        if self.config.batching != Batching::Static || self.batch_left > 0 {
            return None;
        }
        self.oldest_gated().map(|added| added + self.config.static_batch_wait)
    }

    /// Counters and gauges.
    pub fn stats(&self) -> Stats {
        let pool = self.kv.pool();
        Stats {
            num_running: self.running.len() as u64,
            num_waiting: (self.ready.len() + self.gated.len() + self.num_behind) as u64,
            num_queued: self.num_queued as u64,
            steps_in_flight: self.in_flight.len() as u64,
            blocks_total: pool.num_blocks() as u64,
            blocks_used: (pool.num_blocks() - pool.num_free() - pool.num_held()) as u64,
            blocks_held: pool.num_held() as u64,
            blocks_cached: pool.num_cached() as u64,
            blocks_blank: (pool.num_free() - pool.num_cached()) as u64,
            ..self.stats
        }
    }

    /// Forgets the content of all blocks. Running sequences keep theirs.
    pub fn reset_prefix_cache(&mut self) {
        self.kv.forget();
    }

    /// The caller's time, made to never go back and always be a number.
    fn clock(&self, now: f64) -> f64 {
        if now.is_finite() {
            now.max(self.now)
        } else {
            self.now
        }
    }

    /// How many drafts were right, by their place behind a row's first token. Counters.
    pub fn accepted_by_place(&self) -> &[u64] {
        &self.accepted_by_place
    }

    /// Gives a running sequence blocks for `len` tokens.
    fn extend(&mut self, number: u32, len: u32) {
        let sequence = &mut self.sequences[number];
        if len <= sequence.covered_len {
            return;
        }
        self.kv.extend(&mut sequence.tables, len);
        sequence.covered_len = self.kv.covered(&sequence.tables);
        sequence.has_unsent = true;
    }

    /// Takes blocks and slot from a running sequence. What a step in flight may still touch is held.
    fn give_back(&mut self, number: u32) {
        let sequence = &mut self.sequences[number];
        self.kv.release_all(&mut sequence.tables, sequence.last_step);
        if sequence.last_step > self.committed_step {
            self.held_slots[(sequence.last_step % 2) as usize].push(sequence.slot);
        } else {
            self.free_slots.push(sequence.slot);
        }
        sequence.covered_len = 0;
        sequence.decoding = false;
        sequence.drafts.clear();
        sequence.drafter = None;
        (sequence.unfollowed, sequence.follow_len, sequence.num_followed) = (0, 0, 0);
        self.nothing_fits = None;
    }

    /// Puts a sequence into the queue of those that may be admitted.
    fn make_ready(&mut self, number: u32) {
        let lane = self.lane(number);
        let sequence = &mut self.sequences[number];
        sequence.state = State::Waiting;
        sequence.lane = lane;
        self.ready.insert(sequence.order, lane, number);
        self.nothing_fits = None;
        self.begins_to_wait(number);
    }
}

#[cfg(test)]
mod tests;
