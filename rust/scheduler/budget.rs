//! How a step's tokens are shared among prompts, and who gives way to a better rank.
//!
//! Every running sequence that decodes has its tokens first. Prompts share the rest in order, but a
//! *long* one, which has more to compute than half a step, leaves up to half of its part to the short
//! ones behind it: they have their first token in the next step, and it takes at most twice as long. Under
//! [`SchedulingPolicy::Priority`] whoever waits with a better rank comes before the chunks of all
//! that are worse. What nobody wants goes to the long one.
//!
//! Peers: vLLM caps every chunk (`long_prefill_token_threshold`) and the number of long prompts at
//! work, whether anybody waits or not.

use super::Scheduler;
use crate::config::SchedulingPolicy;
use crate::policy::Lane;

/// The tokens of a step that are for prompts.
#[derive(Debug, Clone, Copy)]
pub(super) struct PromptBudget {
    /// Set aside for short prompts: those that run, and those that wait and may be admitted.
    pub short: u32,
    /// For the others.
    pub long: u32,
    /// There are others: long ones that run or wait.
    pub has_long: bool,
}

impl Scheduler {
    /// Tokens to compute from which on a prompt is long.
    pub(super) fn long_above(&self) -> u32 {
        if self.config.enable_chunked_prefill {
            self.config.max_num_batched_tokens / 2
        } else {
            u32::MAX
        }
    }

    /// Where a sequence waits, by what it has to compute if the prefix cache has none of it.
    pub(super) fn lane(&self, number: u32) -> Lane {
        if self.to_compute(number) > self.long_above() {
            Lane::Long
        } else {
            Lane::Short
        }
    }

    /// Tokens that a waiting sequence has to compute: a choice beside the first takes over the prompt.
    fn to_compute(&self, number: u32) -> u32 {
        let sequence = &self.sequences[number];
        if sequence.name.index > 0 && sequence.outputs.is_empty() {
            1
        } else {
            sequence.known_len()
        }
    }

    /// Shares the `tokens` that are for prompts, of which some may run.
    pub(super) fn share(&self, tokens: u32, some_run: bool) -> PromptBudget {
        if !some_run && self.ready.first(Some(Lane::Long)).is_none() {
            return PromptBudget { short: tokens, long: 0, has_long: false };
        }
        let is_prompt = |number: &&u32| !self.sequences[**number].decoding;
        let left = |number: &u32| self.sequences[*number].known_len() - self.sequences[*number].most_len;
        let prompts = || self.running.iter().filter(is_prompt);
        let running = prompts().find(|number| left(number) > self.long_above()).copied();
        let may_admit = self.may_admit();
        let waiting = self.ready.first(Some(Lane::Long)).filter(|_| may_admit).map(|(_, number)| number);
        let first = running.into_iter().chain(waiting).min_by_key(|number| self.sequences[*number].order);
        let Some(first) = first else { return PromptBudget { short: tokens, long: 0, has_long: false } };
        let (rank, order) = (self.sequences[first].priority, self.sequences[first].order);
        let (mut before, mut behind) = (0, 0);
        let mut count = |number: u32, wanted: u32| {
            let part = if self.sequences[number].order < order { &mut before } else { &mut behind };
            *part += wanted;
            before < tokens && behind < tokens
        };
        for number in prompts().filter(|number| left(number) <= self.long_above()) {
            count(*number, left(number));
        }
        if may_admit {
            let places = self.config.max_running() - self.running.len();
            let waiting = self.ready.lane(Lane::Short).take(places).map(|(_, number)| number);
            for number in waiting.filter(|number| self.sequences[*number].priority <= rank) {
                if !count(number, self.to_compute(number)) {
                    break;
                }
            }
        }
        let before = before.min(tokens);
        let short = before + behind.min((tokens - before) / 2);
        PromptBudget { short, long: tokens - short, has_long: true }
    }

    /// Tokens, up to `limit`, that are wanted by those who wait with a better rank than a running
    /// sequence.
    pub(super) fn wanted_before(&self, number: u32, limit: u32) -> u32 {
        if self.config.scheduling_policy == SchedulingPolicy::Fcfs || !self.may_admit() {
            return 0;
        }
        let sequence = &self.sequences[number];
        // Where keys share, those of another share than the next would not get the tokens.
        let next_share = self.ready.first(None).map_or(0, |(order, _)| order.share());
        let mut wanted = 0;
        for lane in [Lane::Short, Lane::Long] {
            for (order, waiting) in self.ready.lane_before(lane, sequence.order) {
                if wanted >= limit {
                    break;
                }
                if order.share() == next_share && self.sequences[waiting].priority < sequence.priority {
                    wanted = limit.min(wanted + self.to_compute(waiting));
                }
            }
        }
        wanted
    }

    /// Whether somebody may be admitted in this step, by what is known before it is tried: there are
    /// places, and the last look has not shown that nothing fits.
    fn may_admit(&self) -> bool {
        let free = self.kv.pool().num_free();
        self.running.len() < self.config.max_running()
            && !self.free_slots.is_empty()
            && self.nothing_fits.is_none_or(|seen| free > seen.free)
    }

    /// Whether a waiting sequence comes before the last one that runs, by order and by priority.
    pub(super) fn outranks_the_last(&self, number: u32) -> bool {
        self.running.last().is_some_and(|last| self.outranks(number, *last))
    }

    fn outranks(&self, number: u32, other: u32) -> bool {
        let (sequence, other) = (&self.sequences[number], &self.sequences[other]);
        sequence.priority < other.priority && sequence.order < other.order
    }

    /// Whether a running sequence gives its place to one that waits: that has a better rank, waiting
    /// has not made up for it yet, and it has not been preempted too often.
    fn gives_way(&self, running: u32, waiting: u32) -> bool {
        self.outranks(waiting, running) && self.sequences[running].preemptions < self.config.max_preemptions
    }

    /// Preempts from the end, where those who wait have a better rank and lack a place, or the first
    /// of them lacks blocks.
    pub(super) fn make_way(&mut self) {
        if self.config.scheduling_policy == SchedulingPolicy::Fcfs {
            return;
        }
        let mut places = self.config.max_running() - self.running.len();
        self.ready.start_look();
        while let Some((order, waiting)) = self.ready.next(None) {
            let Some(last) = self.running.last().copied() else { break };
            if places == 0 {
                if !self.gives_way(last, waiting) {
                    break;
                }
                self.give_way();
                places += 1;
            } else if !self.outranks(waiting, last) {
                break;
            }
            places -= 1;
            self.ready.pass(order);
        }
        if let Some((_, first)) = self.ready.first(None) {
            if self.outranks_the_last(first) {
                self.make_way_in_the_pool(first);
            }
        }
        self.planned.preempted = false;
    }

    fn make_way_in_the_pool(&mut self, waiting: u32) {
        if self.sequences[waiting].in_flight > 0 {
            return;
        }
        let needed = self.needed_to_join(waiting);
        let pool = self.kv.pool();
        let there = pool.num_free() + pool.num_held();
        let mut would_be_there = there;
        let mut victims = 0;
        for running in self.running.iter().rev() {
            if would_be_there >= needed || !self.gives_way(*running, waiting) {
                break;
            }
            let sequence = &self.sequences[*running];
            would_be_there += sequence.num_live().saturating_sub(sequence.num_shared);
            victims += 1;
        }
        if would_be_there >= needed {
            for _ in 0..victims {
                self.give_way();
            }
        }
    }

    /// Preempts the last one, which is not to come back in the same step.
    fn give_way(&mut self) {
        self.planned.admits_before = self.running.last().map(|last| self.sequences[*last].order);
        self.preempt_last();
    }
}
