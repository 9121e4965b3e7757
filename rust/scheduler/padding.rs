//! A step is padded to the size of a captured one, so that the device can replay that instead of launching anew.
//!
//! Padding rows are of the reserved slot, whose block table is all null block: what they write goes where nobody reads.

use super::{PlannedStep, Scheduler};
use crate::plan::{PlanInfo, Row, ROW_PADDING};

/// What a step lacks to a captured size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Padding {
    pub decode_rows: u32,
    pub prefill_rows: u32,
    /// Tokens of the first of the `prefill_rows`.
    pub prefill_tokens: u32,
}

/// The smallest of `sizes`, which rise, that holds `least`.
fn at_least(sizes: &[u32], least: u32) -> Option<u32> {
    sizes.iter().copied().find(|size| *size >= least)
}

impl Scheduler {
    /// The padding of the step in `planned`: none where no captured size holds it.
    pub(super) fn padding(&self, planned: &PlannedStep) -> Padding {
        let num_decodes = planned.decodes.len() as u32;
        let padding = if planned.prefills.is_empty() {
            self.decode_padding(num_decodes, 1 + planned.num_draft_tokens)
        } else if planned.num_draft_tokens == 0 {
            let tokens = planned.prefills.iter().map(|row| row.len).sum();
            self.prefill_padding(num_decodes, planned.prefills.len() as u32, tokens)
        } else {
            None
        };
        padding.unwrap_or_default()
    }

    fn decode_padding(&self, num_decodes: u32, query_len: u32) -> Option<Padding> {
        let bound = self.config.max_num_seqs.min(self.config.max_num_batched_tokens / query_len);
        let padded = at_least(&self.config.graph_sizes, num_decodes).filter(|size| *size <= bound)?;
        Some(Padding { decode_rows: padded - num_decodes, ..Padding::default() })
    }

    fn prefill_padding(&self, num_decodes: u32, num_prefills: u32, num_tokens: u32) -> Option<Padding> {
        let graphs = &self.config.prefill_graphs;
        let decodes = at_least(&graphs.decodes, num_decodes).filter(|size| *size <= self.config.max_num_seqs)?;
        let tokens = at_least(&graphs.tokens, num_tokens)
            .filter(|tokens| decodes + tokens <= self.config.max_num_batched_tokens)?;
        // One row has all of the padding's tokens, which its block table must be able to hold.
        if num_prefills >= graphs.rows || tokens - num_tokens > self.config.max_model_len {
            return None;
        }
        Some(Padding {
            decode_rows: decodes - num_decodes,
            prefill_rows: graphs.rows - num_prefills,
            prefill_tokens: tokens - num_tokens,
        })
    }

    pub(super) fn write_decode_padding(&mut self, info: &mut PlanInfo) {
        let query_len = info.decode_query_len;
        self.push_padding(query_len, info);
        if query_len > 1 {
            self.writer.push_drafts(&[], query_len - 1);
        }
    }

    /// A padding row behind the prefill rows. It is not flagged as one: its slot must not seem to move on.
    pub(super) fn write_prefill_padding(&mut self, query_len: u32, info: &mut PlanInfo) {
        self.push_padding(query_len, info);
        self.writer.push_prefill_padding(query_len);
        info.max_query_len = info.max_query_len.max(query_len);
        info.max_seq_len = info.max_seq_len.max(query_len);
    }

    fn push_padding(&mut self, query_len: u32, info: &mut PlanInfo) {
        self.writer.push_row(&Row {
            slot: self.config.max_num_seqs,
            query_start: info.num_tokens,
            query_len,
            flags: ROW_PADDING,
            num_drafts: 0,
            bias: (0, 0),
        });
        info.num_tokens += query_len;
    }
}
