//! A step is padded to the size of a captured one, so that the device can replay that instead of
//! launching anew.
//!
//! Padding rows are of the reserved slot, whose block table is all null block: what they write goes
//! where nobody reads.

use super::{PlannedStep, Scheduler};
use crate::config::DecodeShape;
use crate::plan::{PlanInfo, Row, ROW_PADDING};

/// What a step lacks to a captured size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Padding {
    pub decode_rows: u32,
    decode_tokens: u32,
    /// Some row of the step has drafts.
    has_drafts: bool,
    pub prefill_rows: u32,
    prefill_tokens: u32,
}

impl Padding {
    /// Tokens of one of the `decode_rows`: one, unless some row of the step has drafts. Then the
    /// first has all that are missing: it has no keys, so that attention does not care how many
    /// they are.
    pub fn decode_row_len(&self, row: u32) -> u32 {
        match (self.has_drafts, row) {
            (false, _) => 1,
            (true, 0) => self.decode_tokens,
            (true, _) => 0,
        }
    }

    /// Tokens of one of the `prefill_rows`: the first has all of them.
    pub fn prefill_row_len(&self, row: u32) -> u32 {
        if row == 0 {
            self.prefill_tokens
        } else {
            0
        }
    }
}

/// The smallest of `sizes`, which rise, that holds `least`.
fn at_least(sizes: &[u32], least: u32) -> Option<u32> {
    sizes.iter().copied().find(|size| *size >= least)
}

impl Scheduler {
    /// The padding of the step in `planned`: none where no captured size holds it, and where hidden
    /// states are wanted that a captured step does not keep, for log probabilities of prompts or for
    /// embeddings.
    pub(super) fn padding(&self, planned: &PlannedStep) -> Padding {
        if planned.prefills.iter().any(|row| !self.prompt_targets(row).is_empty() || self.pooled(row).len() > 1) {
            return Padding::default();
        }
        self.captured_size(planned).unwrap_or_default()
    }

    fn captured_size(&self, planned: &PlannedStep) -> Option<Padding> {
        let (config, graphs) = (&self.config, &self.config.prefill_graphs);
        let num_prefills = planned.prefills.len() as u32;
        let decodes = if num_prefills == 0 {
            self.decode_shape(planned, &config.graph_sizes, &config.draft_graphs)?
        } else {
            self.decode_shape(planned, &graphs.decodes, &graphs.draft_decodes)?
        };
        let mut padding = Padding {
            decode_rows: decodes.rows - planned.decodes.len() as u32,
            decode_tokens: decodes.tokens - planned.num_decode_tokens,
            has_drafts: planned.longest_decode > 1,
            ..Padding::default()
        };
        let mut num_tokens = decodes.tokens;
        if num_prefills > 0 {
            let prompt_tokens = planned.prefills.iter().map(|row| row.len).sum();
            let padded_tokens = at_least(&graphs.tokens, prompt_tokens)?;
            num_tokens += padded_tokens;
            padding.prefill_tokens = padded_tokens - prompt_tokens;
            // One row has all of the padding's tokens, which its block table must be able to hold.
            if num_prefills >= graphs.rows || padding.prefill_tokens > config.max_model_len {
                return None;
            }
            padding.prefill_rows = graphs.rows - num_prefills;
        }
        (num_tokens <= config.max_num_batched_tokens).then_some(padding)
    }

    /// The smallest captured decode rows that hold those of the step: `sizes` rows of one token, or
    /// of `shapes` where some row has drafts.
    fn decode_shape(&self, planned: &PlannedStep, sizes: &[u32], shapes: &[DecodeShape]) -> Option<DecodeShape> {
        let num_decodes = planned.decodes.len() as u32;
        if planned.longest_decode > 1 {
            // One row at least is padding, which takes the tokens that are missing.
            let holds = |shape: &&DecodeShape| shape.tokens >= planned.num_decode_tokens && shape.rows > num_decodes;
            shapes.iter().find(holds).copied()
        } else {
            let rows = at_least(sizes, num_decodes).filter(|rows| *rows <= self.config.max_num_seqs)?;
            Some(DecodeShape { tokens: rows, rows })
        }
    }

    /// A padding row behind the prefill rows. It is not flagged as one: its slot must not seem to
    /// move on.
    pub(super) fn write_prefill_padding(&mut self, query_len: u32, info: &mut PlanInfo) {
        self.write_decode_padding(query_len, info);
        self.writer.push_prefill_padding(query_len);
        info.max_seq_len = info.max_seq_len.max(query_len);
    }

    pub(super) fn write_decode_padding(&mut self, query_len: u32, info: &mut PlanInfo) {
        self.writer.push_row(&Row {
            slot: self.config.max_num_seqs,
            query_start: info.num_tokens,
            query_len,
            flags: ROW_PADDING,
            num_drafts: 0,
            mask_row: None,
            bias: (0, 0),
        });
        info.num_tokens += query_len;
        info.max_query_len = info.max_query_len.max(query_len);
    }
}
