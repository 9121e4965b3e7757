//! A request arrives; a waiting sequence joins the running ones.

use std::sync::Arc;

use super::schedule::PlannedRow;
use super::{Request, Scheduler, Sequence, State, Traits};
use crate::block_table::BlockTable;
use crate::config::{Batching, CoreConfig};
use crate::error::Error;
use crate::output::Progress;
use crate::policy::{Order, HEAD_BYPASS_LIMIT, LOOKAHEAD};
use crate::request::{check_tokens, RequestId, SamplingParams, SeqRef};

/// What came of trying to admit a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Admission {
    Admitted,
    /// It would fit once the steps in flight are committed, or in a plan with more room: nobody goes first.
    NextStep,
    /// It does not fit.
    TooBig,
}

/// Where a sequence starts from.
#[derive(Debug, Clone, Copy)]
enum Start {
    /// This many blocks of its own hashes are in the prefix cache.
    Cached(usize),
    /// This sequence of the same request has computed the prompt.
    Fork(u32),
}

/// The blocks that a candidate starts from.
#[derive(Debug, Clone, Copy)]
struct Brought {
    len: u32,
    /// Blocks it shares.
    shared: usize,
    /// Of these, blocks that are free now: they count against what is free.
    free: usize,
}

impl Scheduler {
    /// Adds a request to the waiting queue. `now` is seconds of any clock that does not go back (one that does is
    /// taken to stand still).
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`], [`Error::TokenOutOfRange`], [`Error::PromptTooLong`], [`Error::KvCapacity`],
    /// [`Error::QueueFull`]. A refused request leaves no trace.
    #[allow(clippy::needless_pass_by_value)] // The request keeps the prompt.
    pub fn add_request(
        &mut self,
        prompt: Arc<[u32]>,
        params: SamplingParams,
        priority: i32,
        cache_salt: Option<&str>,
        now: f64,
    ) -> Result<RequestId, Error> {
        let max_tokens = self.check_request(&prompt, &params)?;
        self.now = self.clock(now);
        let id = RequestId(self.next_request);
        self.next_request += 1;
        self.stats.requests_added += 1;
        self.num_queued += 1;

        let params = Arc::new(params);
        let seed = params.seed.unwrap_or_else(|| derived_seed(self.config.seed, id.0));
        let root = self.hasher.root(cache_salt);
        let progress = Progress { num_prompt_tokens: prompt.len() as u32, added: self.now, ..Progress::default() };
        let request = self.requests.insert(Request {
            id,
            sequences: Vec::with_capacity(params.n as usize),
            unfinished: params.n,
            forming: params.n > 1,
            started: false,
            in_batch: false,
            progress,
        });
        self.by_id.insert(id, request);
        for index in 0..params.n {
            let sequence = self.sequences.insert(Sequence {
                name: SeqRef { request: id, index },
                request,
                order: Order::new(&self.config, id.0, index, priority, self.now),
                params: Arc::clone(&params),
                traits: Traits::new(&params),
                seed: seed.wrapping_add(u64::from(index)),
                prompt: Arc::clone(&prompt),
                outputs: Vec::new(),
                max_tokens,
                state: State::Forming,
                slot: 0,
                tables: Vec::new(),
                covered_len: 0,
                has_unsent: false,
                hashes: Vec::new(),
                root,
                num_registered: 0,
                computed_len: 0,
                least_len: 0,
                most_len: 0,
                pending: 0,
                in_flight: 0,
                last_step: 0,
                run: 0,
                decoding: false,
                preemptions: 0,
                reservation: None,
                bypassed: 0,
                drafts: Vec::new(),
            });
            self.requests[request].sequences.push(sequence);
        }
        let first = self.requests[request].sequences[0];
        if self.config.batching == Batching::Continuous {
            self.make_ready(first);
        } else {
            self.sequences[first].state = State::Waiting;
            self.gated.insert(self.sequences[first].order, first);
        }
        Ok(id)
    }

    /// Prompt and output tokens of the longest request that can ever be served.
    pub fn longest_request(&self) -> u32 {
        let CoreConfig { max_model_len, num_draft_tokens, .. } = self.config;
        if self.longest_sequence == max_model_len {
            return max_model_len;
        }
        // The last output token is never computed, so it needs no place in a block; drafts tried at the end do.
        (self.longest_sequence + 1).saturating_sub(2 * num_draft_tokens)
    }

    /// Refuses what would fail later; returns how many tokens the request may output.
    fn check_request(&self, prompt: &[u32], params: &SamplingParams) -> Result<u32, Error> {
        let CoreConfig { vocab_size, max_model_len, max_waiting, .. } = self.config;
        if self.num_queued >= max_waiting {
            return Err(Error::QueueFull { limit: max_waiting });
        }
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let prompt_len = prompt.len();
        let max_tokens = u64::from(params.max_tokens.unwrap_or(1));
        if prompt_len as u64 + max_tokens > u64::from(max_model_len) {
            return Err(Error::PromptTooLong { prompt_len, max_tokens, max_model_len });
        }
        check_tokens("prompt", prompt.iter().copied(), vocab_size)?;
        params.check_tokens(vocab_size)?;
        let limit = self.longest_request();
        if prompt_len as u64 + max_tokens > u64::from(limit) {
            return Err(Error::KvCapacity { prompt_len, max_tokens, limit });
        }
        let most = limit - prompt_len as u32;
        let max_tokens = params.max_tokens.unwrap_or(most);
        if params.min_tokens > max_tokens {
            return Err(Error::invalid("min_tokens", params.min_tokens, format!("at most {max_tokens}, what fits")));
        }
        Ok(max_tokens)
    }

    /// Opens the next batch, where the policy has batches and it is time for one.
    pub(super) fn open_batch(&mut self) {
        if !self.batch_may_open(self.now) {
            return;
        }
        let mut places = match self.config.batching {
            Batching::None => 1,
            _ => self.config.max_running(),
        };
        while let Some((order, number)) = self.gated.next_after(None).filter(|_| places > 0) {
            self.gated.remove(order);
            self.make_ready(number);
            self.requests[self.sequences[number].request].in_batch = true;
            self.batch_left += 1;
            places = places.saturating_sub(self.sequences[number].params.n as usize);
        }
    }

    pub(super) fn batch_may_open(&self, now: f64) -> bool {
        if self.batch_left > 0 || self.gated.is_empty() {
            return false;
        }
        match self.config.batching {
            Batching::Continuous => false,
            Batching::None => true,
            Batching::Static => {
                let waiting: u64 = self.gated.iter().map(|number| u64::from(self.sequences[number].params.n)).sum();
                let is_due = self.next_wake().is_some_and(|wake| now >= wake);
                waiting >= u64::from(self.config.max_num_seqs) || is_due
            }
        }
    }

    /// When the oldest request that waits for a batch was added.
    pub(super) fn oldest_gated(&self) -> Option<f64> {
        let added = |number| self.requests[self.sequences[number].request].progress.added;
        self.gated.iter().map(added).reduce(f64::min)
    }

    /// Admits waiting sequences in order, as long as budget, slots and blocks last.
    ///
    /// One that does not fit lets others pass, but only [`HEAD_BYPASS_LIMIT`] of them; then everything waits for it.
    pub(super) fn admit(&mut self) {
        // A step that took blocks away from someone does not give them to another.
        if self.draft.preempted || self.ready.is_empty() {
            return;
        }
        let free = self.kv.pool().num_free();
        if !self.running.is_empty() && self.nothing_fits_in.is_some_and(|before| free <= before) {
            return;
        }
        let mut promised: usize = self.running.iter().map(|number| self.promised(*number)).sum();
        let mut cursor = None;
        let mut first_too_big = None;
        let mut num_too_big = 0;
        while self.draft.budget > 0 && self.running.len() < self.config.max_running() && !self.free_slots.is_empty() {
            let Some((order, number)) = self.ready.next_after(cursor) else { break };
            match self.try_admit(number, promised) {
                Admission::Admitted => {
                    promised += self.promised(number);
                    if let Some(passed) = first_too_big {
                        self.sequences[passed].bypassed += 1;
                    }
                }
                Admission::NextStep => return,
                Admission::TooBig => {
                    cursor = Some(order);
                    first_too_big.get_or_insert(number);
                    num_too_big += 1;
                }
            }
            let stop_for = |passed: u32| self.sequences[passed].bypassed >= HEAD_BYPASS_LIMIT;
            if num_too_big == LOOKAHEAD || first_too_big.is_some_and(stop_for) {
                break;
            }
        }
        if first_too_big.is_some() && self.draft.budget > 0 {
            self.nothing_fits_in = Some(self.kv.pool().num_free());
        }
    }

    /// Blocks that a running sequence was admitted with but has not taken yet: those of its later chunks.
    fn promised(&self, number: u32) -> usize {
        let sequence = &self.sequences[number];
        if sequence.decoding || sequence.reservation.is_some() {
            return 0;
        }
        self.kv.footprint(sequence.known_len()).saturating_sub(num_live(&sequence.tables))
    }

    fn try_admit(&mut self, number: u32, promised: usize) -> Admission {
        // Its last row before a preemption may still bring a token that has to be computed again.
        if self.sequences[number].in_flight > 0 {
            return Admission::NextStep;
        }
        // Blocks of a window can be given back without becoming free (they may be shared), so no reservation can be
        // counted out there: with windows, who has one runs alone.
        if self.num_reservations > 0 && self.kv.has_windows() {
            return Admission::NextStep;
        }
        let start = self.find_start(number);
        let brought = self.brought(number, start);
        let sequence = &self.sequences[number];
        let known_len = sequence.known_len();
        let len = (known_len - brought.len).min(self.draft.budget);
        if len < known_len - brought.len && !self.config.enable_chunked_prefill {
            let alone = self.draft.prefills.is_empty();
            return if alone { Admission::TooBig } else { Admission::NextStep };
        }
        let penalty_tokens = if sequence.params.has_penalties() { known_len.min(self.config.vocab_size) } else { 0 };
        if brought.shared > self.draft.entered_blocks || penalty_tokens as usize > self.draft.penalty_tokens {
            return Admission::NextStep;
        }

        let mut needed = self.kv.footprint(known_len).saturating_sub(brought.shared) + brought.free;
        needed += self.reserved_blocks + promised;
        if !self.running.is_empty() {
            needed += self.watermark();
        }
        let reserving = self.reserving_to_admit(number);
        if let Some(others) = &reserving {
            if self.kv.has_windows() && !self.running.is_empty() {
                return Admission::TooBig;
            }
            let others: usize = others.iter().map(|other| self.still_to_come(*other)).sum();
            let own = self.still_to_come(number).saturating_sub(brought.shared) + brought.free;
            needed = needed.max(self.reserved_blocks + others + own);
        }
        let pool = self.kv.pool();
        if needed > pool.num_free() {
            let soon = needed <= pool.num_free() + pool.num_held();
            return if soon { Admission::NextStep } else { Admission::TooBig };
        }

        self.draft.entered_blocks -= brought.shared;
        self.draft.penalty_tokens -= penalty_tokens as usize;
        self.draft.budget -= len;
        self.enter(number, start, brought.len);
        if let Some(others) = reserving {
            self.reserve(number);
            for other in others {
                self.reserve(other);
            }
        }
        self.extend(number, brought.len + len);
        let sample = brought.len + len == known_len;
        let row = PlannedRow { sequence: number, start: brought.len, len, sample, enters: true };
        self.draft.prefills.push(row);
        Admission::Admitted
    }

    /// None if this sequence may join without a reservation; else the others that must get one with it.
    ///
    /// It must have one if it has been preempted often enough, or if it would stand before one that has one; and then
    /// everyone before it must, so that whoever is first can advance.
    fn reserving_to_admit(&self, number: u32) -> Option<Vec<u32>> {
        let sequence = &self.sequences[number];
        let order = sequence.order;
        let stands_before = |other: &u32| {
            let other = &self.sequences[*other];
            other.reservation.is_some() && other.order > order
        };
        let protected = sequence.preemptions >= self.config.max_preemptions;
        if !protected && (self.num_reservations == 0 || !self.running.iter().any(stands_before)) {
            return None;
        }
        let must_reserve = |other: &u32| {
            let other = &self.sequences[*other];
            other.reservation.is_none() && other.order < order
        };
        Some(self.running.iter().copied().filter(must_reserve).collect())
    }

    /// Blocks kept free at admissions for the growth of what runs: one hundredth of the pool.
    fn watermark(&self) -> usize {
        self.kv.pool().num_blocks().div_ceil(100)
    }

    fn find_start(&mut self, number: u32) -> Start {
        if let Some(source) = self.find_fork(number) {
            return Start::Fork(source);
        }
        if !self.config.enable_prefix_caching {
            return Start::Cached(0);
        }
        // The last token is computed in any case: its logits are needed.
        let block_size = self.config.block_size as usize;
        let sequence = &mut self.sequences[number];
        let count = (sequence.known_len() as usize - 1) / block_size;
        sequence.hash_blocks(&self.hasher, block_size, count, &mut self.token_scratch);
        Start::Cached(self.kv.find(&sequence.hashes[..count]))
    }

    /// A running sequence of the same request, with the prompt computed, to fork a new choice from.
    fn find_fork(&self, number: u32) -> Option<u32> {
        let sequence = &self.sequences[number];
        if sequence.params.n == 1 || !sequence.outputs.is_empty() {
            return None;
        }
        let prompt_len = sequence.prompt.len() as u32;
        let siblings = self.requests[sequence.request].sequences.iter().copied();
        let mut unfinished = siblings.filter(|sibling| *sibling != number);
        unfinished.find(|sibling| {
            let source = self.sequences.get(*sibling).filter(|source| source.request == sequence.request);
            source.is_some_and(|source| {
                source.state == State::Running
                    && source.computed_len >= prompt_len
                    && self.kv.can_fork(&source.tables, prompt_len - 1)
            })
        })
    }

    fn brought(&self, number: u32, start: Start) -> Brought {
        let sequence = &self.sequences[number];
        match start {
            Start::Cached(blocks) => {
                let (shared, free) = self.kv.hit_size(&sequence.hashes[..blocks]);
                Brought { len: blocks as u32 * self.config.block_size, shared, free }
            }
            Start::Fork(source) => {
                let len = sequence.prompt.len() as u32 - 1;
                Brought { len, shared: self.kv.fork_size(&self.sequences[source].tables, len), free: 0 }
            }
        }
    }

    /// Moves a sequence from the queue into a slot, with the blocks it starts from.
    fn enter(&mut self, number: u32, start: Start, len: u32) {
        let (num_groups, step, now) = (self.config.num_groups(), self.next_step, self.now);
        let sequence = &mut self.sequences[number];
        let mut tables = std::mem::take(&mut sequence.tables);
        tables.resize_with(num_groups, BlockTable::default);
        match start {
            Start::Cached(blocks) => {
                self.kv.acquire(&mut tables, &sequence.hashes[..blocks]);
                sequence.num_registered = blocks;
            }
            Start::Fork(source) => {
                let source = &mut self.sequences[source];
                self.kv.fork(&source.tables, &mut tables, len, &mut self.draft.copies);
                // Its blocks are read by this step's copies.
                source.last_step = step;
                let shared = (len / self.config.block_size) as usize;
                let hashes = source.hashes[..shared.min(source.hashes.len())].to_vec();
                let sequence = &mut self.sequences[number];
                sequence.hashes = hashes;
                sequence.num_registered = shared;
            }
        }
        let sequence = &mut self.sequences[number];
        sequence.covered_len = self.kv.covered(&tables);
        sequence.has_unsent = true;
        sequence.tables = tables;
        sequence.slot = self.free_slots.pop().expect("admit has looked for a free slot");
        sequence.state = State::Running;
        sequence.run += 1;
        sequence.bypassed = 0;
        (sequence.computed_len, sequence.least_len, sequence.most_len) = (len, len, len);
        self.ready.remove(sequence.order);
        let request = &mut self.requests[sequence.request];
        if !request.started {
            request.started = true;
            request.progress.first_scheduled = now;
            request.progress.num_cached_tokens = len;
            self.num_queued -= 1;
            self.stats.prompt_tokens += sequence.prompt.len() as u64;
        }
        if let Start::Cached(_) = start {
            self.stats.prefix_cache_queries += u64::from(sequence.known_len());
            self.stats.prefix_cache_hits += u64::from(len);
        }
        let order = sequence.order;
        let place = self.running.partition_point(|other| self.sequences[*other].order < order);
        self.running.insert(place, number);
    }
}

/// The seed of a request that gives none: `SplitMix64` of the configured seed and the request's number.
fn derived_seed(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

pub(super) fn num_live(tables: &[BlockTable]) -> usize {
    tables.iter().map(BlockTable::num_live).sum()
}
