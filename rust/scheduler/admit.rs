//! A waiting sequence joins the running ones.

use super::{NothingFits, PlannedRow, Scheduler, State};
use crate::block_table::BlockTable;
use crate::policy::{Lane, HEAD_BYPASS_LIMIT, LOOKAHEAD};
use crate::request::{Pooling, PoolingKind};
use crate::timeline::Cause;

/// A look into the queue costs about as much as this many running sequences cost a step, so it is
/// taken again after as many steps as this fits into what runs: it costs a few percent of a plan,
/// and while few run every plan looks.
const RUNNING_PER_LOOK: usize = 16;

/// What came of trying to admit a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Admission {
    Admitted,
    /// It would fit once the steps in flight are committed, or in a plan with more room: nobody
    /// goes first.
    NextStep,
    /// It does not fit.
    TooBig,
    /// All that is left of the step's tokens is for shorter prompts.
    NoTokens,
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
    /// Admits waiting sequences, and notes what those who are left wait for.
    pub(super) fn admit(&mut self) {
        let Some(cause) = self.admit_in_order() else { return };
        let is_next = matches!(cause, Cause::Slots | Cause::Budget);
        let next = self.ready.first(None).filter(|_| is_next).map_or(0, |(order, _)| order.share());
        self.waits.found(cause, next, self.now);
    }

    /// Admits waiting sequences in order, as long as budget, slots and blocks last. Returns which of
    /// them did not; None: nobody looked.
    ///
    /// One that does not fit lets others pass, but only [`HEAD_BYPASS_LIMIT`] of them; then
    /// everything waits for it.
    fn admit_in_order(&mut self) -> Option<Cause> {
        if self.ready.is_empty() {
            return Some(Cause::Step);
        }
        // A step that took blocks away from someone does not give them to another.
        if self.planned.preempted {
            return Some(Cause::Blocks);
        }
        let free = self.kv.pool().num_free();
        let as_before = |seen: NothingFits| free <= seen.free && self.next_step < seen.until;
        if !self.running.is_empty() && self.nothing_fits.is_some_and(as_before) {
            return None;
        }
        self.too_big.clear();
        self.forecast.is_made = false;
        let mut promised: usize = self.running.iter().map(|number| self.promised(*number)).sum();
        let mut has_tokens_for_long = true;
        self.ready.start_look();
        while self.planned.budget > 0 && self.has_slot() {
            let lane = if has_tokens_for_long { None } else { Some(Lane::Short) };
            let Some((order, number)) = self.ready.next(lane) else { break };
            if self.planned.admits_before.is_some_and(|limit| order >= limit) {
                return Some(Cause::Rank);
            }
            match self.try_admit(number, promised) {
                Admission::Admitted => {
                    promised += self.promised(number);
                    self.grows_too(number);
                    for place in 0..self.too_big.len() {
                        if self.is_first_of_its_queue(place) {
                            self.sequences[self.too_big[place]].bypassed += 1;
                        }
                    }
                }
                Admission::NextStep => return Some(Cause::Step),
                Admission::NoTokens => {
                    self.ready.pass(order);
                    has_tokens_for_long = false;
                }
                Admission::TooBig => {
                    self.ready.pass(order);
                    self.too_big.push(number);
                }
            }
            let stop_for = |place: usize| {
                let passed = self.sequences[self.too_big[place]].bypassed;
                passed >= HEAD_BYPASS_LIMIT && self.is_first_of_its_queue(place)
            };
            if self.too_big.len() == LOOKAHEAD || (0..self.too_big.len()).any(stop_for) {
                break;
            }
        }
        if !self.too_big.is_empty() && self.planned.budget > 0 {
            let until = self.next_step + (self.running.len() / RUNNING_PER_LOOK) as u64;
            self.nothing_fits = Some(NothingFits { free: self.kv.pool().num_free(), until });
        }
        Some(if self.ready.is_empty() {
            Cause::Step
        } else if self.running.len() >= self.config.max_running() {
            Cause::Slots
        } else if self.free_slots.is_empty() {
            Cause::Step // those who have left their places are in a step still
        } else if self.planned.budget == 0 || self.too_big.is_empty() {
            Cause::Budget
        } else {
            Cause::Blocks
        })
    }

    fn has_slot(&self) -> bool {
        self.running.len() < self.config.max_running() && !self.free_slots.is_empty()
    }

    /// Whether `too_big[place]` is the head of its queue, of which there is one for each share.
    fn is_first_of_its_queue(&self, place: usize) -> bool {
        let queue = |number: &u32| self.sequences[*number].order.share();
        let (before, rest) = self.too_big.split_at(place);
        before.iter().all(|number| queue(number) != queue(&rest[0]))
    }

    /// Blocks that a running sequence was admitted with but has not taken yet: those of its later
    /// chunks.
    fn promised(&self, number: u32) -> usize {
        let sequence = &self.sequences[number];
        if sequence.decoding {
            return 0;
        }
        self.kv.footprint(sequence.known_len()).saturating_sub(sequence.num_live())
    }

    /// The same of all that come before a waiting sequence.
    fn promised_before(&self, number: u32) -> usize {
        let order = self.sequences[number].order;
        let before = self.running.iter().filter(|other| self.sequences[**other].order < order);
        before.map(|other| self.promised(*other)).sum()
    }

    /// Free blocks that a sequence takes that joins with `known_len` tokens.
    fn joining_blocks(&self, known_len: u32, brought: Brought) -> usize {
        self.kv.footprint(known_len).saturating_sub(brought.shared) + brought.free
    }

    /// Free blocks without which a waiting sequence cannot join, if those of a worse rank give way.
    pub(super) fn needed_to_join(&mut self, number: u32) -> usize {
        let start = self.find_start(number);
        let brought = self.brought(number, start);
        self.joining_blocks(self.sequences[number].known_len(), brought) + self.promised_before(number)
    }

    fn try_admit(&mut self, number: u32, promised: usize) -> Admission {
        // Its last row before a preemption may still bring a token that has to be computed again.
        if self.sequences[number].in_flight > 0 {
            return Admission::NextStep;
        }
        let start = self.find_start(number);
        let brought = self.brought(number, start);
        let sequence = &self.sequences[number];
        let known_len = sequence.known_len();
        let is_long = known_len - brought.len > self.long_above() && sequence.lane == Lane::Long;
        let for_others = if is_long { self.planned.for_short.min(self.planned.budget) } else { 0 };
        let len = (known_len - brought.len).min(self.planned.budget - for_others);
        if len == 0 {
            return Admission::NoTokens;
        }
        if len < known_len - brought.len && !self.config.enable_chunked_prefill {
            let alone = self.planned.prefills.is_empty();
            return if alone { Admission::TooBig } else { Admission::NextStep };
        }
        let penalty_tokens = if sequence.params.has_penalties() { known_len.min(self.config.vocab_size) } else { 0 };
        if brought.shared > self.planned.entered_blocks || penalty_tokens as usize > self.planned.penalty_tokens {
            return Admission::NextStep;
        }

        // Those of a worse rank give way later, should there be no room for all.
        let outranks = self.outranks_the_last(number);
        let promised = if outranks { self.promised_before(number) } else { promised };
        let needed = self.joining_blocks(known_len, brought) + promised;
        let pool = self.kv.pool();
        if needed > pool.num_free() {
            let soon = needed <= pool.num_free() + pool.num_held();
            return if soon { Admission::NextStep } else { Admission::TooBig };
        }
        let shared_in_use = brought.shared - brought.free;
        if !self.running.is_empty() && !outranks && !self.growth_fits(number, shared_in_use) {
            return Admission::TooBig;
        }

        self.planned.entered_blocks -= brought.shared;
        self.planned.penalty_tokens -= penalty_tokens as usize;
        self.planned.budget -= len;
        if !is_long {
            self.planned.for_short = self.planned.for_short.saturating_sub(len);
        }
        self.enter(number, start, brought.len);
        self.sequences[number].num_shared = shared_in_use;
        self.extend(number, brought.len + len);
        let sample = brought.len + len == known_len;
        let row = PlannedRow { sequence: number, start: brought.len, len, sample, enters: true };
        self.planned.prefills.push(row);
        Admission::Admitted
    }

    fn find_start(&mut self, number: u32) -> Start {
        if let Some(source) = self.find_fork(number) {
            return Start::Fork(source);
        }
        if !self.config.enable_prefix_caching {
            return Start::Cached(0);
        }
        // The last token is computed in any case: its logits are needed. So is every one whose logits
        // give the log probabilities of a prompt token that has not been told.
        let block_size = self.config.block_size as usize;
        let sequence = &mut self.sequences[number];
        let asked = self.requests[sequence.request].prompt_asked;
        let is_asked = sequence.traits.wants_prompt && asked < sequence.prompt.len() as u32;
        let findable = match sequence.traits.pooling {
            Some(Pooling { kind: PoolingKind::Mean, .. }) => 1, // the hidden states of all are needed
            _ if is_asked => asked,
            _ => sequence.known_len(),
        };
        let count = (findable as usize - 1) / block_size;
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
        self.tell_admission(number, len);
        let (num_groups, step, now) = (self.config.num_groups(), self.next_step, self.now);
        let follows = self.follows();
        let sequence = &mut self.sequences[number];
        let mut tables = std::mem::take(&mut sequence.tables);
        tables.resize_with(num_groups, BlockTable::default);
        match start {
            Start::Cached(blocks) => {
                self.kv.acquire(&mut tables, &sequence.hashes[..blocks]);
                sequence.num_registered = blocks;
                if follows {
                    sequence.num_followed = self.kv.followed(&tables);
                    sequence.unfollowed = len - sequence.num_followed as u32 * self.config.block_size;
                }
            }
            Start::Fork(source) => {
                let source = &mut self.sequences[source];
                self.kv.fork(&source.tables, &mut tables, len, &mut self.planned.copies);
                // Its blocks are read by this step's copies.
                source.last_step = step;
                let shared = (len / self.config.block_size) as usize;
                let hashes = source.hashes[..shared.min(source.hashes.len())].to_vec();
                let followed = source.most_len - source.unfollowed;
                let sequence = &mut self.sequences[number];
                sequence.hashes = hashes;
                sequence.num_registered = shared;
                sequence.unfollowed = len.saturating_sub(followed);
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
        if sequence.preemptions == 0 {
            self.ready.shares().charge_prompt(request.share, sequence.known_len() - len);
        }
        if !request.started {
            request.started = true;
            request.progress.first_scheduled = now;
            request.progress.num_cached_tokens = len;
            self.num_queued -= 1;
            self.stats.prompt_tokens += sequence.prompt.len() as u64;
            if request.share > 0 {
                for choice in &request.sequences {
                    let choice = &mut self.sequences[*choice];
                    choice.order = choice.order.admitted(self.next_turn);
                }
                self.next_turn += 1;
            }
            let behind = std::mem::take(&mut request.behind);
            self.next_of_call(behind);
        }
        let sequence = &self.sequences[number];
        if let Start::Cached(_) = start {
            self.stats.prefix_cache_queries += u64::from(sequence.known_len());
            self.stats.prefix_cache_hits += u64::from(len);
        }
        let order = sequence.order;
        let place = self.running.partition_point(|other| self.sequences[*other].order < order);
        self.running.insert(place, number);
    }
}
