//! `Plan`: the numbers of a planned step.

use pyo3::prelude::*;

use crate::plan::PlanInfo;

/// The scalars of one planned step.
#[pyclass(frozen, module = "octavo._core")]
pub struct Plan(pub(super) PlanInfo);

/// Getters that hand on a field of the same name.
macro_rules! plan_getters {
    ($($field:ident: $kind:ty),* $(,)?) => {
        #[pymethods]
        impl Plan {
            $(#[getter]
            fn $field(&self) -> $kind {
                self.0.$field
            })*

            /// -1 where no row asks for logprobs.
            #[getter]
            fn max_logprobs(&self) -> i64 {
                self.0.max_logprobs.map_or(-1, i64::from)
            }

            fn __repr__(&self) -> String {
                let PlanInfo { step_id, num_rows, num_decodes, num_tokens, .. } = self.0;
                format!("Plan(step_id={step_id}, num_rows={num_rows}, num_decodes={num_decodes}, num_tokens={num_tokens})")
            }
        }
    };
}

plan_getters! {
    step_id: u64, num_rows: u32, padded_rows: u32, num_decodes: u32, padded_decodes: u32, decode_query_len: u32,
    num_tokens: u32, num_prefill_tokens: u32, max_query_len: u32, max_seq_len: u32, num_bytes: u32, num_blocks: u32,
    num_enters: u32, num_copies: u32, num_bias: u32, num_penalty_tokens: u32, rows_offset: u32,
    prefill_tokens_offset: u32, blocks_offset: u32, enters_offset: u32, copies_offset: u32, bias_offset: u32,
    drafts_offset: u32, penalty_tokens_offset: u32, has_masks: bool, has_penalties: bool, all_greedy: bool,
    result_width: u32,
}
