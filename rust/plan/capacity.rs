//! How large the plans and results of one configuration can become: the size of the buffers that
//! cross the boundary.

use super::words::{bias, block, copy, enter, follow, penalty, pool, row, target, HEADER};
use super::{align, ResultLayout, TargetLayout, VectorLayout};
use crate::config::CoreConfig;
use crate::request::{MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKENS};

/// The largest sections that one configuration can produce; the scheduler stops admitting before it
/// would pass them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanCapacity {
    /// Records of `rows`, padding included.
    pub rows: usize,
    /// Words of `prefill_tokens`.
    pub prefill_tokens: usize,
    /// Records of `blocks` that sequences may bring along when they enter, from prefix hits and
    /// forks.
    pub entered_blocks: usize,
    /// Records of `blocks` in all.
    pub blocks: usize,
    /// Records of `copies`.
    pub copies: usize,
    /// Records of `bias`.
    pub bias: usize,
    /// Words of `drafts`.
    pub drafts: usize,
    /// Records of `penalty_tokens`.
    pub penalty_tokens: usize,
    /// Records of `prompt_targets`: each is of a token of the step.
    pub prompt_targets: usize,
    /// Records of `pools`, and vectors: one a sequence.
    pub pools: usize,
    /// Numbers of a vector.
    pub vector_size: usize,
    /// Records of `follow_rows`: one a sequence; and words of `follow_tokens`.
    pub follow_rows: usize,
    /// See `follow_rows`.
    pub follow_tokens: usize,
}

impl PlanCapacity {
    /// Sequences with a prefix hit of the longest kind that may enter in one step.
    const LONG_HITS: usize = 16;

    /// The bounds of a checked configuration.
    pub fn new(config: &CoreConfig) -> Self {
        let rows = config.max_rows() as usize;
        let tokens = config.max_num_batched_tokens as usize;
        let block_size = config.block_size as usize;
        let entered_blocks = config.num_groups() * config.max_blocks_per_seq() * Self::LONG_HITS.min(rows);
        // Beyond what it brings along, a row of q tokens touches at most q / block_size + 1 new
        // blocks of each group.
        let new_blocks = config.num_groups() * (tokens / block_size + rows);
        let follows = config.speculation.is_some_and(|speculation| speculation.follows);
        Self {
            rows,
            prefill_tokens: tokens,
            entered_blocks,
            blocks: entered_blocks + new_blocks,
            copies: config.num_groups() * rows,
            bias: rows * (MAX_LOGIT_BIAS + MAX_STOP_TOKENS + config.eos_token_ids.len()),
            drafts: rows * config.num_draft_tokens as usize,
            penalty_tokens: config.vocab_size.min(config.max_model_len) as usize + tokens,
            prompt_targets: tokens,
            pools: if config.vector_size > 0 { config.max_num_seqs as usize } else { 0 },
            vector_size: config.vector_size as usize,
            follow_rows: if follows { config.max_num_seqs as usize } else { 0 },
            follow_tokens: if follows { tokens } else { 0 },
        }
    }

    /// Bytes of the largest plan.
    pub fn plan_bytes(&self) -> usize {
        let sections = [
            HEADER.len(),
            self.rows * row::WORDS,
            self.prefill_tokens,
            self.blocks * block::WORDS,
            self.rows * enter::WORDS,
            self.copies * copy::WORDS,
            self.bias * bias::WORDS,
            self.drafts,
            self.penalty_tokens * penalty::WORDS,
            self.prompt_targets * target::WORDS,
            self.pools * pool::WORDS,
            self.follow_rows * follow::WORDS,
            self.follow_tokens,
        ];
        sections.iter().map(|words| align(words * 4)).sum()
    }

    /// Bytes of the largest result.
    pub fn result_bytes(&self, num_draft_tokens: u32) -> usize {
        let top = MAX_LOGPROBS as usize;
        let layout = ResultLayout { query_len: 1 + num_draft_tokens as usize, top: Some(top) };
        let start = TargetLayout { start: layout.bytes(self.rows), top }.end(self.prompt_targets);
        VectorLayout { start, size: self.vector_size }.end(self.pools)
    }
}
