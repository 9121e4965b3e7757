//! A request arrives: it is refused, or waits; where the policy has batches, it waits for its batch
//! to open.

use std::collections::VecDeque;
use std::sync::Arc;

use super::masks::Following;
use super::waits::Spell;
use super::{Request, Scheduler, Sequence, State, Traits};
use crate::config::{Batching, CoreConfig, SchedulingPolicy};
use crate::error::Error;
use crate::policy::shares::Share;
use crate::policy::{Lane, Order};
use crate::request::{check_tokens, Progress, RequestId, SamplingParams, SeqRef};
use crate::timeline::Cause;

impl Scheduler {
    /// Adds a request for each prompt, or none of them. One of them stands in the waiting queue at a
    /// time; the next takes its place at the end when that one is admitted. Their ids follow one
    /// another; the first is returned. `now` is seconds of any clock that does not go back (one
    /// that does is taken to stand still).
    ///
    /// # Errors
    /// [`Error::InvalidValue`] without prompts, and with more than may ever wait;
    /// [`Error::EmptyPrompt`], [`Error::TokenOutOfRange`], [`Error::PromptTooLong`],
    /// [`Error::KvCapacity`], [`Error::QueueFull`]. A refused call leaves no trace.
    pub fn add_call(
        &mut self,
        prompts: &[Arc<[u32]>],
        params: SamplingParams,
        priority: i32,
        cache_salt: Option<&str>,
        now: f64,
    ) -> Result<RequestId, Error> {
        self.add_call_of(None, prompts, params, priority, cache_salt, now)
    }

    /// The same out of somebody's share of the engine: see [`shares`](crate::policy::shares). It counts
    /// where batching is continuous; calls without one go first.
    ///
    /// # Errors
    /// As [`Self::add_call`], and [`Error::InvalidValue`] for a weight that is none.
    pub fn add_call_of(
        &mut self,
        share: Option<Share>,
        prompts: &[Arc<[u32]>],
        mut params: SamplingParams,
        priority: i32,
        cache_salt: Option<&str>,
        now: f64,
    ) -> Result<RequestId, Error> {
        if prompts.is_empty() || prompts.len() > self.config.max_waiting {
            let limit = format!("from 1 to max_waiting = {} prompts", self.config.max_waiting);
            return Err(Error::invalid("prompt", format!("a list of {}", prompts.len()), limit));
        }
        if let Some(Share { weight, .. }) = share.filter(|share| !(share.weight > 0.0 && share.weight.is_finite())) {
            return Err(Error::invalid("share", weight, "a finite weight above 0"));
        }
        let max_tokens = prompts
            .iter()
            .enumerate()
            .map(|(before, prompt)| self.check_request(prompt, &params, before))
            .collect::<Result<Vec<u32>, Error>>()?;
        params.restrain(self.config.vocab_size);
        self.now = self.clock(now);
        let first = RequestId(self.next_request);
        let params = Arc::new(params);
        let root = self.hasher.root(cache_salt);
        let share = share.filter(|_| self.config.batching == Batching::Continuous);
        let share = share.map_or(0, |share| self.ready.shares().number(share));
        for (prompt, max_tokens) in prompts.iter().zip(max_tokens) {
            let request = self.keep(prompt, &params, priority, root, max_tokens);
            self.requests[request].share = share;
        }
        self.num_behind += prompts.len();
        self.next_of_call((first.0..self.next_request).map(RequestId).collect());
        Ok(first)
    }

    /// The next of a call's requests that are still there takes its place in the queue, behind all
    /// that wait: one call of many prompts is served like many calls of one, one after another.
    pub(super) fn next_of_call(&mut self, mut behind: VecDeque<RequestId>) {
        while let Some(id) = behind.pop_front() {
            let Some(request) = self.by_id.get(&id).copied() else { continue };
            self.requests[request].behind = behind;
            self.num_behind -= 1;
            self.take_turn(request);
            return;
        }
    }

    /// Puts a request into the waiting queue.
    fn take_turn(&mut self, request: u32) {
        let turn = self.next_turn;
        self.next_turn += 1;
        let share = self.requests[request].share;
        for index in 0..self.requests[request].sequences.len() {
            let number = self.requests[request].sequences[index];
            let sequence = &mut self.sequences[number];
            let order = Order::new(&self.config, turn, index as u32, sequence.priority, self.now);
            sequence.order = if share > 0 { order.in_share(share) } else { order };
            sequence.state = if index == 0 { State::Waiting } else { State::Forming };
        }
        let first = self.requests[request].sequences[0];
        if self.config.batching == Batching::Continuous {
            self.make_ready(first);
        } else {
            self.sequences[first].spell.before = Cause::Batch;
            self.gated.insert(self.sequences[first].order, Lane::Short, first);
        }
    }

    /// Keeps a request that was checked, behind the others of its call.
    fn keep(
        &mut self,
        prompt: &Arc<[u32]>,
        params: &Arc<SamplingParams>,
        priority: i32,
        root: u128,
        max_tokens: u32,
    ) -> u32 {
        let id = RequestId(self.next_request);
        self.next_request += 1;
        self.stats.requests_added += 1;
        self.num_queued += 1;

        let seed = params.seed.unwrap_or_else(|| derived_seed(self.config.seed, id.0));
        let progress = Progress { num_prompt_tokens: prompt.len() as u32, added: self.now, ..Progress::default() };
        let request = self.requests.insert(Request {
            id,
            sequences: Vec::with_capacity(params.n as usize),
            unfinished: params.n,
            share: 0,
            forming: params.n > 1,
            started: false,
            in_batch: false,
            behind: VecDeque::new(),
            prompt_asked: 1,
            progress,
        });
        self.by_id.insert(id, request);
        self.timeline.begin(id);
        for index in 0..params.n {
            let sequence = self.sequences.insert(Sequence {
                name: SeqRef { request: id, index },
                request,
                order: Order::default(),
                priority: if self.config.scheduling_policy == SchedulingPolicy::Priority { priority } else { 0 },
                params: Arc::clone(params),
                traits: Traits::new(params, self.config.has_ends()),
                seed: seed.wrapping_add(u64::from(index)),
                prompt: Arc::clone(prompt),
                outputs: Vec::new(),
                max_tokens,
                state: State::Behind,
                lane: Lane::Short,
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
                num_shared: 0,
                length_bin: 0,
                bin_end: self.lengths.last_of(0),
                spell: Spell::new(if index == 0 { Cause::Call } else { Cause::Prompt }, self.now),
                bypassed: 0,
                drafts: Vec::new(),
                unfollowed: 0,
                follow_len: 0,
                num_followed: 0,
                drafter: None,
                following: params.grammar.clone().map(|grammar| Following::new(grammar.0)),
            });
            self.requests[request].sequences.push(sequence);
        }
        request
    }

    /// Prompt and output tokens of the longest request that can ever be served.
    pub fn longest_request(&self) -> u32 {
        let CoreConfig { max_model_len, num_draft_tokens, .. } = self.config;
        if self.longest_sequence == max_model_len {
            return max_model_len;
        }
        // The last output token is never computed, so it needs no place in a block; drafts tried at
        // the end do.
        (self.longest_sequence + 1).saturating_sub(2 * num_draft_tokens)
    }

    /// Tokens of the longest prompt that may have an embedding. That computes its last token too, which
    /// the last of an answer is not, and tries no drafts.
    pub fn longest_embedding(&self) -> u32 {
        self.longest_sequence
    }

    /// Whether a request may wait, behind `before` others that are about to be added.
    ///
    /// # Errors
    /// [`Error::QueueFull`].
    pub fn check_queue(&self, before: usize) -> Result<(), Error> {
        let limit = self.config.max_waiting;
        if self.num_queued + before < limit {
            Ok(())
        } else {
            Err(Error::QueueFull { limit })
        }
    }

    /// Refuses what would fail later; returns how many tokens the request may output. `before`:
    /// requests of the same call that will wait before it.
    fn check_request(&self, prompt: &[u32], params: &SamplingParams, before: usize) -> Result<u32, Error> {
        let CoreConfig { vocab_size, max_model_len, .. } = self.config;
        self.check_queue(before)?;
        if prompt.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let prompt_len = prompt.len();
        let limit = if params.pooling.is_some() { self.longest_embedding() } else { self.longest_request() };
        let given = params.max_tokens_in(limit.saturating_sub(prompt_len as u32));
        let max_tokens = u64::from(given.unwrap_or(1));
        if prompt_len as u64 + max_tokens > u64::from(max_model_len) {
            return Err(Error::PromptTooLong { prompt_len, max_tokens, max_model_len });
        }
        check_tokens("prompt", prompt.iter().copied(), vocab_size)?;
        params.check_tokens(vocab_size)?;
        self.check_pooling(params)?;
        if prompt_len as u64 + max_tokens > u64::from(limit) {
            return Err(Error::KvCapacity { prompt_len, max_tokens, limit });
        }
        let most = limit - prompt_len as u32;
        let max_tokens = given.unwrap_or(most);
        if params.min_tokens > max_tokens {
            return Err(Error::invalid("min_tokens", params.min_tokens, format!("at most {max_tokens}, what fits")));
        }
        Ok(max_tokens)
    }

    fn check_pooling(&self, params: &SamplingParams) -> Result<(), Error> {
        let Some(pooling) = params.pooling else { return Ok(()) };
        let size = self.config.vector_size;
        if size == 0 {
            return Err(Error::invalid("pooling", "an embedding", "none: this engine has no embeddings"));
        }
        match pooling.dimensions {
            Some(dimensions) if !(1..=size).contains(&dimensions) => {
                Err(Error::invalid("dimensions", dimensions, format!("from 1 to {size}")))
            }
            _ => Ok(()),
        }
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
        while let Some((order, number)) = self.gated.first(None).filter(|_| places > 0) {
            self.gated.remove(order);
            self.make_ready(number);
            let request = self.sequences[number].request;
            self.requests[request].in_batch = true;
            let behind = std::mem::take(&mut self.requests[request].behind);
            self.next_of_call(behind);
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
                let waits = |number| {
                    let sequence: &Sequence = &self.sequences[number];
                    let behind = self.requests[sequence.request].behind.iter();
                    let requests = 1 + behind.filter(|id| self.by_id.contains_key(id)).count() as u64;
                    requests * u64::from(sequence.params.n)
                };
                let waiting: u64 = self.gated.iter().map(waits).sum();
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
}

/// The seed of a request that gives none: `SplitMix64` of the configured seed and the request's
/// number.
fn derived_seed(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
