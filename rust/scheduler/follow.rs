//! The model that drafts follows its target where it has keys and values of its own: not step by step,
//! but when drafts are wanted.
//!
//! Beside drafting it computes nothing, so one that does not pay costs nothing. What it has missed of a
//! sequence are always its last tokens, `unfollowed` of them. Before it drafts behind them they are
//! named in the plan, as many as a step may have tokens, and it computes them then (docs/plan.md,
//! `follow_rows`). They are known here, although steps may be in flight: a step that drafts leaves
//! nothing missed, however many of its drafts turn out right, and what a step without drafts computes
//! is the token before.
//!
//! By block the pool knows whether that model has its part of it, for those who find the block in the
//! prefix cache. Its part of a block that several hold may be written by each of them, since all write
//! the same.

use super::{PlannedRow, Scheduler, Sequence, StepRow};
use crate::kv_cache::KvCache;
use crate::plan::Follow;

impl Sequence {
    /// Tokens that the model which drafts has to compute before it drafts; None where it cannot any more,
    /// or not now. Its keys and values are where the target's are, so what a window has let go is lost
    /// to it as well.
    pub(super) fn to_follow(&self, kv: &KvCache) -> Option<u32> {
        let are_known = self.most_len <= self.known_len();
        let is_there = |start| kv.sees_from(&self.tables, start);
        (self.unfollowed == 0 || are_known && is_there(self.most_len - self.unfollowed)).then_some(self.unfollowed)
    }

    /// The first position that the step being planned reads or writes: what lies further back than
    /// its window may be given back.
    pub(super) fn least_touched(&self) -> u32 {
        if self.follow_len > 0 {
            self.most_len - self.unfollowed
        } else {
            self.least_len
        }
    }
}

impl Scheduler {
    /// Whether the model that drafts has keys and values of its own.
    pub(super) fn follows(&self) -> bool {
        self.speculator.as_ref().is_some_and(|speculator| speculator.config.follows)
    }

    /// Names what the model that drafts computes for a row that is being written, and notes what it has
    /// missed once the step has run.
    pub(super) fn write_follow(&mut self, row: &PlannedRow, prefill: bool) {
        if !self.follows() {
            return;
        }
        let at = self.writer.num_follow_tokens();
        let len = if prefill { self.prompt_to_follow(row, at) } else { self.sequences[row.sequence].follow_len };
        let sequence = &mut self.sequences[row.sequence];
        if len > 0 {
            let start = row.start - sequence.unfollowed;
            self.writer.push_follow_row(&Follow { slot: sequence.slot, query_start: at, query_len: len, start });
            let writer = &mut self.writer;
            sequence.with_tokens(start as usize, (start + len) as usize, |tokens| writer.push_follow_tokens(tokens));
        }
        let drafts = !prefill && row.len > 1;
        debug_assert!(!drafts || len == sequence.unfollowed, "drafts over a hole");
        sequence.unfollowed += if drafts { 0 } else { row.len };
        sequence.unfollowed -= len;
        sequence.follow_len = 0;
    }

    /// How much of a prompt is followed in the step that computes it: all, where layers have windows and
    /// drafts pay at present. What a window lets go of a long prompt could not be followed later. `others`:
    /// tokens that the step has for other rows.
    fn prompt_to_follow(&self, row: &PlannedRow, others: u32) -> u32 {
        let sequence = &self.sequences[row.sequence];
        let pays = self.speculator.as_ref().is_some_and(|one| !one.config.adaptive || one.controller.is_drafting());
        let drafts = sequence.traits.pooling.is_none() && !sequence.traits.has_grammar;
        let len = sequence.unfollowed + row.len;
        let fits = others + len <= self.config.max_num_batched_tokens;
        let is_there = self.kv.sees_from(&sequence.tables, row.start - sequence.unfollowed);
        if self.kv.has_windows() && pays && drafts && fits && is_there {
            len
        } else {
            0
        }
    }

    /// A row has been committed, and its sequence runs: the blocks that the model which drafts has filled
    /// are of use to others.
    pub(super) fn note_followed(&mut self, row: &StepRow) {
        if !self.follows() {
            return;
        }
        let sequence = &mut self.sequences[row.sequence];
        sequence.unfollowed = sequence.unfollowed.min(sequence.most_len); // after a step that failed
        let Some(followed) = sequence.computed_len.checked_sub(row.unfollowed) else { return };
        let blocks = (followed / self.config.block_size) as usize;
        for index in sequence.num_followed..blocks {
            self.kv.note_followed(&sequence.tables, index);
        }
        sequence.num_followed = sequence.num_followed.max(blocks);
    }

    /// A step has failed, and may have left anything where the model that drafts writes, also in blocks
    /// that others hold: it begins anew.
    pub(super) fn doubt_followed(&mut self) {
        if !self.follows() {
            return;
        }
        self.kv.doubt_followed();
        for number in &self.running {
            let sequence = &mut self.sequences[*number];
            (sequence.unfollowed, sequence.num_followed) = (sequence.most_len, 0);
        }
        for row in self.in_flight.iter_mut().flat_map(|step| &mut step.rows) {
            row.unfollowed = u32::MAX;
        }
    }
}
