//! The inputs of a forward pass.

use super::State;
use crate::plan::words::enter;
use crate::plan::{PlanView, ROW_PADDING};

/// What a forward pass reads. Only its leading part is written.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// [tokens]
    pub token_ids: &'a mut [i32],
    /// [tokens]
    pub positions: &'a mut [i64],
    /// [groups, most tokens]: block * block size + place in it
    pub slot_mappings: &'a mut [i64],
    /// [rows]
    pub row_slots: &'a mut [i32],
    /// [rows]: keys, the new ones included
    pub seq_lens: &'a mut [i32],
    /// [rows + 1]
    pub query_start_loc: &'a mut [i32],
    /// [rows of logits]: the token of each
    pub sample_index: &'a mut [i64],
    /// [rows of logits]: the row of each; written where rows have drafts
    pub sample_rows: &'a mut [i32],
}

/// The block tables of all slots.
#[derive(Debug)]
pub struct Tables<'a> {
    /// [groups, slots, most blocks]
    pub blocks: &'a mut [i32],
    /// KV groups.
    pub groups: usize,
    /// Most blocks of a slot.
    pub width: usize,
    /// Tokens of a block.
    pub block_size: usize,
}

impl Tables<'_> {
    fn slots(&self) -> usize {
        self.blocks.len() / (self.groups * self.width).max(1)
    }

    fn at(&self, group: usize, slot: usize, index: usize) -> usize {
        (group * self.slots() + slot) * self.width + index
    }
}

/// Has the plan's sequences enter, gives tables their blocks, and fills the inputs of all rows and tokens.
///
/// # Panics
/// The plan names a slot, block or token that is not there.
pub fn prepare(plan: &PlanView<'_>, state: &mut State<'_>, tables: &mut Tables<'_>, inputs: &mut Inputs<'_>) {
    enter(plan, state);
    for entry in plan.blocks() {
        let place = tables.at(entry.group as usize, entry.slot as usize, entry.index as usize);
        tables.blocks[place] = entry.block.0 as i32;
    }
    let info = plan.info();
    let (decodes, decode_tokens) = (info.padded_decodes as usize, info.num_decode_tokens as usize);
    let (mut drafts, mut prompts) = (plan.drafts(), plan.prefill_tokens());
    for (index, row) in plan.rows().enumerate() {
        let (slot, start, len) = (row.slot as usize, row.query_start as usize, row.query_len as usize);
        let computed = state.record(slot)[enter::COMPUTED_LEN];
        let has_keys = index >= decodes || row.flags & ROW_PADDING == 0; // nobody attends to padding's
        inputs.row_slots[index] = row.slot as i32;
        inputs.seq_lens[index] = if has_keys { computed + len as i32 } else { 0 };
        inputs.query_start_loc[index] = row.query_start as i32;
        for place in 0..len {
            // What is missing has the null block, so that it can harm nobody.
            let id = if index >= decodes {
                prompts.next().map(|id| id as i32)
            } else if place == 0 {
                Some(state.last_token[slot])
            } else if place <= row.num_drafts as usize {
                drafts.next().map(|id| id as i32)
            } else {
                None
            };
            let position = computed as usize + place;
            let id = id.filter(|_| position < tables.width * tables.block_size);
            let (token, position) = (start + place, id.map_or(0, |_| position));
            inputs.token_ids[token] = id.unwrap_or(0);
            inputs.positions[token] = position as i64;
            let most_tokens = inputs.slot_mappings.len() / tables.groups.max(1);
            for group in 0..tables.groups {
                let block = tables.blocks[tables.at(group, slot, position / tables.block_size)] as usize;
                let place = block * tables.block_size + position % tables.block_size;
                inputs.slot_mappings[group * most_tokens + token] = id.map_or(0, |_| place as i64);
            }
        }
        // Every token of a decode row has logits, and the last one of a prefill row.
        let (first, of) =
            if index < decodes { (start, start) } else { (decode_tokens + index - decodes, start + len - 1) };
        for place in 0..if index < decodes { len } else { 1 } {
            inputs.sample_index[first + place] = (of + place) as i64;
            if info.decode_query_len > 1 {
                inputs.sample_rows[first + place] = index as i32;
            }
        }
    }
    inputs.query_start_loc[info.padded_rows as usize] = info.num_tokens as i32;
}

fn enter(plan: &PlanView<'_>, state: &mut State<'_>) {
    let tokens: Vec<_> = plan.penalty_tokens().collect();
    for (enter, words) in plan.enters().zip(plan.enter_words()) {
        let slot = enter.slot as usize;
        state.record(slot).copy_from_slice(&words.map(u32::cast_signed));
        // Also where the newcomer has no penalties: whoever held the slot before may have left counts behind.
        if let Some(counts) = state.counts(slot) {
            counts.fill(0);
            for &(token, times, in_prompt) in &tokens[enter.penalty.0 as usize..][..enter.penalty.1 as usize] {
                counts[token as usize] = 2 * times as i32 + i32::from(in_prompt);
            }
        }
    }
}
