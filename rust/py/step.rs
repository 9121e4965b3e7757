//! What a CPU does of a step beside the model.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::cpu::pool;
use crate::plan::words::{PlanInfo, HEADER};
use crate::plan::PlanView;
use crate::py::tensor::{width, Tensor};
use crate::step::prepare::{prepare, Inputs, Tables};
use crate::step::sample::{sample, Wide};
use crate::step::State;

/// header: the words of the plan's header in order, as Python has them.
fn view<'a>(header: &Bound<'_, PyAny>, bytes: &'a Tensor<'_, u8>) -> PyResult<PlanView<'a>> {
    let words: [i64; HEADER.len()] = header.extract()?;
    let info = PlanInfo::from_words(words.map(|word| word as u32));
    if info.num_bytes as usize > bytes.len() {
        return Err(PyValueError::new_err(format!("plan: {} bytes of {}", bytes.len(), info.num_bytes)));
    }
    Ok(PlanView::with_header(info, bytes.read()))
}

/// Fills the inputs of a step; gives slots and tables what the plan has for them.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn prepare_step(
    py: Python<'_>,
    header: &Bound<'_, PyAny>,
    plan: &Bound<'_, PyAny>,
    block_size: usize,
    records: &Bound<'_, PyAny>,
    last_token: &Bound<'_, PyAny>,
    penalty_counts: Option<&Bound<'_, PyAny>>,
    block_table: &Bound<'_, PyAny>,
    token_ids: &Bound<'_, PyAny>,
    positions: &Bound<'_, PyAny>,
    slot_mappings: &Bound<'_, PyAny>,
    row_slots: &Bound<'_, PyAny>,
    seq_lens: &Bound<'_, PyAny>,
    query_start_loc: &Bound<'_, PyAny>,
    sample_index: &Bound<'_, PyAny>,
    sample_rows: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let bytes = Tensor::of(plan, "plan")?;
    let plan = view(header, &bytes)?;
    let vocab_size = penalty_counts.map_or(Ok(0), width)?;
    let mut state = state_of(records, last_token, vocab_size, penalty_counts)?;
    let mut tables = Tables {
        groups: block_table.len()?,
        width: width(block_table)?,
        blocks: Tensor::of(block_table, "block_table")?.write(),
        block_size,
    };
    let mut inputs = Inputs {
        token_ids: Tensor::of(token_ids, "token_ids")?.write(),
        positions: Tensor::of(positions, "positions")?.write(),
        slot_mappings: Tensor::of(slot_mappings, "slot_mappings")?.write(),
        row_slots: Tensor::of(row_slots, "row_slots")?.write(),
        seq_lens: Tensor::of(seq_lens, "seq_lens")?.write(),
        query_start_loc: Tensor::of(query_start_loc, "query_start_loc")?.write(),
        sample_index: Tensor::of(sample_index, "sample_index")?.write(),
        sample_rows: Tensor::of(sample_rows, "sample_rows")?.write(),
    };
    py.detach(|| prepare(&plan, &mut state, &mut tables, &mut inputs));
    Ok(())
}

/// Draws the tokens of a step into `result`, and advances the slots.
#[pyfunction]
#[pyo3(signature = (header, plan, logits, records, last_token, vocab_size, penalty_counts, result, masks = None))]
#[allow(clippy::too_many_arguments)]
pub(super) fn sample_step(
    py: Python<'_>,
    header: &Bound<'_, PyAny>,
    plan: &Bound<'_, PyAny>,
    logits: &Bound<'_, PyAny>,
    records: &Bound<'_, PyAny>,
    last_token: &Bound<'_, PyAny>,
    vocab_size: usize,
    penalty_counts: Option<&Bound<'_, PyAny>>,
    result: &Bound<'_, PyAny>,
    masks: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let bytes = Tensor::of(plan, "plan")?;
    let plan = view(header, &bytes)?;
    let mut state = state_of(records, last_token, vocab_size, penalty_counts)?;
    let logits = Wide { width: width(logits)?, numbers: Tensor::<f32>::of(logits, "logits")?.read() };
    let masks = masks
        .map(|masks| Ok::<_, PyErr>(Wide { width: width(masks)?, numbers: Tensor::<i32>::of(masks, "masks")?.read() }))
        .transpose()?;
    if vocab_size > logits.width {
        return Err(PyValueError::new_err(format!("logits: rows of {} for {vocab_size} tokens", logits.width)));
    }
    let result = Tensor::of(result, "result")?.write();
    py.detach(|| sample(&pool::shared(), &plan, logits, masks, &mut state, result));
    Ok(())
}

/// What request slots remember, out of its tensors.
fn state_of<'a>(
    records: &'a Bound<'_, PyAny>,
    last_token: &'a Bound<'_, PyAny>,
    vocab_size: usize,
    penalty_counts: Option<&'a Bound<'_, PyAny>>,
) -> PyResult<State<'a>> {
    let counts = penalty_counts.map(|counts| Ok::<_, PyErr>(Tensor::of(counts, "penalty_counts")?.write()));
    Ok(State {
        records: Tensor::of(records, "records")?.write(),
        last_token: Tensor::of(last_token, "last_token")?.write(),
        penalty_counts: counts.transpose()?,
        vocab_size,
    })
}
