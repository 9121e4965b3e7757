//! The packed plan of a step and the result that comes back: the boundary's format, as the table in `DESIGN.md` has it.
//!
//! [`PlanWriter`] gathers the sections of one step and lays them out; [`PlanView`] reads them again, for the simulation
//! and the tests. [`PlanCapacity`] bounds a configuration's plans; [`ResultLayout`] knows where a row's tokens lie. All of
//! this knows words and offsets, nothing of requests.
//!
//! All words are 32-bit little-endian; every section begins at a multiple of 16 bytes.

use crate::error::Error;
use crate::request::BlockId;

mod capacity;
mod result;

pub use capacity::PlanCapacity;
pub use result::{
    ResultLayout, ResultWriter, RowResult, TokenLogprobs, STATUS_MASKED, STATUS_NAN, STATUS_NO_TOKEN, STATUS_OK,
};

/// A token is drawn at the row's last position.
pub const ROW_SAMPLE: u32 = 1;
/// The row's tokens are in `prefill_tokens`.
pub const ROW_PREFILL: u32 = 2;
/// Log probabilities are wanted.
pub const ROW_LOGPROBS: u32 = 4;
/// The slot's penalties apply.
pub const ROW_PENALTIES: u32 = 8;
/// A padding row of the reserved slot.
pub const ROW_PADDING: u32 = 16;

/// Words of one record of `rows`.
const ROW_WORDS: usize = 8;
/// Words of one record of `blocks`.
const BLOCK_WORDS: usize = 4;
/// Words of one record of `enters`.
const ENTER_WORDS: usize = 16;
/// Words of one record of `copies`, `bias` and `penalty_tokens`.
const PAIR_WORDS: usize = 2;
/// Stands for "none" in `mask_row`, `num_logprobs` and `drafts`.
const NONE: u32 = u32::MAX;

/// One row of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Request slot.
    pub slot: u32,
    /// First token of the row among the step's tokens.
    pub query_start: u32,
    /// Tokens of the row.
    pub query_len: u32,
    /// `ROW_*` bits.
    pub flags: u32,
    /// Draft tokens of the row, at most `query_len - 1`.
    pub num_drafts: u32,
    /// Its records in `bias`: the first, and how many.
    pub bias: (u32, u32),
}

/// A block that a slot's table gains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockEntry {
    /// KV group.
    pub group: u32,
    /// Request slot.
    pub slot: u32,
    /// Index in the slot's block table.
    pub index: u32,
    /// The block.
    pub block: BlockId,
}

/// A sequence that takes a slot in this step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Enter {
    /// Request slot.
    pub slot: u32,
    /// Tokens whose keys and values its blocks hold already.
    pub computed_len: u32,
    /// Output tokens so far; the random draw is a function of seed and output index.
    pub output_index: u32,
    /// 0: greedy.
    pub temperature: f32,
    /// 0: off.
    pub top_k: u32,
    /// 1.0: off.
    pub top_p: f32,
    /// 0.0: off.
    pub min_p: f32,
    /// 1.0: off.
    pub repetition_penalty: f32,
    /// 0.0: off.
    pub presence_penalty: f32,
    /// 0.0: off.
    pub frequency_penalty: f32,
    /// Seed of the sequence.
    pub seed: u64,
    /// Top log probabilities wanted; None: no log probabilities at all.
    pub num_logprobs: Option<u32>,
    /// Its records in `penalty_tokens`: the first, and how many.
    pub penalty: (u32, u32),
}

/// The scalars of one planned step, and where its sections lie. Offsets are bytes from the plan's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)] // Counts of the sections below are named after them.
pub struct PlanInfo {
    /// Number of the step, from 1.
    pub step_id: u64,
    /// Rows without padding.
    pub num_rows: u32,
    /// Rows with padding: records of `rows` and of the result.
    pub padded_rows: u32,
    /// Decode rows without padding.
    pub num_decodes: u32,
    /// Decode rows with padding.
    pub padded_decodes: u32,
    /// Tokens of each decode row: 1 + draft tokens in use.
    pub decode_query_len: u32,
    /// Tokens of the step, those of padding rows included.
    pub num_tokens: u32,
    pub num_prefill_tokens: u32,
    /// Over all rows.
    pub max_query_len: u32,
    /// Upper bound of computed length + query length over all rows.
    pub max_seq_len: u32,
    /// Bytes of the plan.
    pub num_bytes: u32,
    pub num_blocks: u32,
    pub num_enters: u32,
    pub num_copies: u32,
    pub num_bias: u32,
    pub num_penalty_tokens: u32,
    pub rows_offset: u32,
    pub prefill_tokens_offset: u32,
    pub blocks_offset: u32,
    pub enters_offset: u32,
    pub copies_offset: u32,
    pub bias_offset: u32,
    pub drafts_offset: u32,
    pub penalty_tokens_offset: u32,
    /// Some row has a grammar mask.
    pub has_masks: bool,
    /// Some sampling row has penalties.
    pub has_penalties: bool,
    /// Every sampling row has temperature 0 and asks for nothing else.
    pub all_greedy: bool,
    /// Most top log probabilities a row asks for; None where no row asks for any.
    pub max_logprobs: Option<u32>,
    /// Words of one row's result record.
    pub result_width: u32,
}

impl PlanInfo {
    /// Where the parts of a result record lie.
    pub fn result_layout(&self) -> ResultLayout {
        ResultLayout {
            query_len: self.decode_query_len.max(1) as usize,
            top: self.max_logprobs.map(|top| top as usize),
        }
    }
}

fn align(bytes: usize) -> usize {
    bytes.next_multiple_of(16)
}

/// Gathers the sections of one step. Kept between steps, so that its vectors stay allocated.
#[derive(Debug, Default)]
pub struct PlanWriter {
    rows: Vec<[u32; ROW_WORDS]>,
    prefill_tokens: Vec<u32>,
    blocks: Vec<[u32; BLOCK_WORDS]>,
    enters: Vec<[u32; ENTER_WORDS]>,
    copies: Vec<[u32; PAIR_WORDS]>,
    bias: Vec<[u32; PAIR_WORDS]>,
    drafts: Vec<u32>,
    penalty_tokens: Vec<[u32; PAIR_WORDS]>,
}

impl PlanWriter {
    /// Forgets the last step.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.prefill_tokens.clear();
        self.blocks.clear();
        self.enters.clear();
        self.copies.clear();
        self.bias.clear();
        self.drafts.clear();
        self.penalty_tokens.clear();
    }

    /// Appends a row; decodes come first.
    pub fn push_row(&mut self, row: &Row) {
        let Row { slot, query_start, query_len, flags, num_drafts, bias } = *row;
        self.rows.push([slot, query_start, query_len, flags, num_drafts, NONE, bias.0, bias.1]);
    }

    /// Appends tokens of the prefill row that is being written.
    pub fn push_prefill_tokens(&mut self, tokens: &[u32]) {
        self.prefill_tokens.extend_from_slice(tokens);
    }

    /// Appends the tokens of a padding row behind the prefill rows.
    pub fn push_prefill_padding(&mut self, len: u32) {
        self.prefill_tokens.resize(self.prefill_tokens.len() + len as usize, 0);
    }

    /// Appends one block of a slot's table.
    pub fn push_block(&mut self, entry: &BlockEntry) {
        self.blocks.push([entry.group, entry.slot, entry.index, entry.block.0]);
    }

    /// Appends a sequence that takes a slot.
    pub fn push_enter(&mut self, enter: &Enter) {
        self.enters.push([
            enter.slot,
            enter.computed_len,
            enter.output_index,
            enter.temperature.to_bits(),
            enter.top_k,
            enter.top_p.to_bits(),
            enter.min_p.to_bits(),
            enter.repetition_penalty.to_bits(),
            enter.presence_penalty.to_bits(),
            enter.frequency_penalty.to_bits(),
            enter.seed as u32,
            (enter.seed >> 32) as u32,
            enter.num_logprobs.unwrap_or(NONE),
            enter.penalty.0,
            enter.penalty.1,
            0,
        ]);
    }

    /// Appends a block copy, done before anything else of the step.
    pub fn push_copy(&mut self, source: BlockId, destination: BlockId) {
        self.copies.push([source.0, destination.0]);
    }

    /// Appends one biased token of the row that is being written.
    pub fn push_bias(&mut self, token: u32, value: f32) {
        self.bias.push([token, value.to_bits()]);
    }

    /// Records of `bias` so far.
    pub fn num_bias(&self) -> u32 {
        self.bias.len() as u32
    }

    /// Appends the drafts of a decode row, filled up to `num_draft_tokens`.
    pub fn push_drafts(&mut self, drafts: &[u32], num_draft_tokens: u32) {
        self.drafts.extend_from_slice(drafts);
        self.drafts.extend((drafts.len()..num_draft_tokens as usize).map(|_| NONE));
    }

    /// Appends a token the penalties must know: how often it was output, and whether the prompt holds it.
    pub fn push_penalty_token(&mut self, token: u32, times_output: u32, in_prompt: bool) {
        self.penalty_tokens.push([token, 2 * times_output + u32::from(in_prompt)]);
    }

    /// Records of `penalty_tokens` so far.
    pub fn num_penalty_tokens(&self) -> u32 {
        self.penalty_tokens.len() as u32
    }

    /// Lays the sections out in `buffer` and completes `info` (counts of sections, offsets, bytes, result width).
    ///
    /// # Errors
    /// [`Error::BufferTooSmall`]; nothing is written then.
    pub fn finish(&self, buffer: &mut [u8], info: &mut PlanInfo) -> Result<(), Error> {
        info.padded_rows = self.rows.len() as u32;
        info.num_prefill_tokens = self.prefill_tokens.len() as u32;
        info.num_blocks = self.blocks.len() as u32;
        info.num_enters = self.enters.len() as u32;
        info.num_copies = self.copies.len() as u32;
        info.num_bias = self.bias.len() as u32;
        info.num_penalty_tokens = self.penalty_tokens.len() as u32;
        info.result_width = info.result_layout().width() as u32;

        let mut end = 0;
        let mut place = |words: usize| {
            let start = end;
            end = align(start + words * 4);
            start as u32
        };
        info.rows_offset = place(self.rows.len() * ROW_WORDS);
        info.prefill_tokens_offset = place(self.prefill_tokens.len());
        info.blocks_offset = place(self.blocks.len() * BLOCK_WORDS);
        info.enters_offset = place(self.enters.len() * ENTER_WORDS);
        info.copies_offset = place(self.copies.len() * PAIR_WORDS);
        info.bias_offset = place(self.bias.len() * PAIR_WORDS);
        info.drafts_offset = place(self.drafts.len());
        info.penalty_tokens_offset = place(self.penalty_tokens.len() * PAIR_WORDS);
        info.num_bytes = end as u32;
        if buffer.len() < end {
            return Err(Error::BufferTooSmall { what: "plan", len: buffer.len(), needed: end });
        }
        put(buffer, info.rows_offset, self.rows.as_flattened());
        put(buffer, info.prefill_tokens_offset, &self.prefill_tokens);
        put(buffer, info.blocks_offset, self.blocks.as_flattened());
        put(buffer, info.enters_offset, self.enters.as_flattened());
        put(buffer, info.copies_offset, self.copies.as_flattened());
        put(buffer, info.bias_offset, self.bias.as_flattened());
        put(buffer, info.drafts_offset, &self.drafts);
        put(buffer, info.penalty_tokens_offset, self.penalty_tokens.as_flattened());
        Ok(())
    }
}

fn put(buffer: &mut [u8], offset: u32, words: &[u32]) {
    let bytes = &mut buffer[offset as usize..offset as usize + words.len() * 4];
    for (target, word) in bytes.chunks_exact_mut(4).zip(words) {
        target.copy_from_slice(&word.to_le_bytes());
    }
}

/// Reads a plan back. Panics where the buffer is shorter than `info` says.
#[derive(Debug, Clone, Copy)]
pub struct PlanView<'a> {
    info: &'a PlanInfo,
    bytes: &'a [u8],
}

impl<'a> PlanView<'a> {
    /// A view of the plan that `info` describes, at the start of `bytes`.
    pub fn new(info: &'a PlanInfo, bytes: &'a [u8]) -> Self {
        Self { info, bytes: &bytes[..info.num_bytes as usize] }
    }

    /// All rows, padding included.
    pub fn rows(&self) -> impl Iterator<Item = Row> + 'a {
        records::<ROW_WORDS>(self.bytes, self.info.rows_offset, self.info.padded_rows).map(|w| Row {
            slot: w[0],
            query_start: w[1],
            query_len: w[2],
            flags: w[3],
            num_drafts: w[4],
            bias: (w[6], w[7]),
        })
    }

    /// Tokens of the prefill rows, in row order.
    pub fn prefill_tokens(&self) -> impl Iterator<Item = u32> + 'a {
        records::<1>(self.bytes, self.info.prefill_tokens_offset, self.info.num_prefill_tokens).map(|[token]| token)
    }

    /// Blocks that tables gain.
    pub fn blocks(&self) -> impl Iterator<Item = BlockEntry> + 'a {
        records::<BLOCK_WORDS>(self.bytes, self.info.blocks_offset, self.info.num_blocks)
            .map(|[group, slot, index, block]| BlockEntry { group, slot, index, block: BlockId(block) })
    }

    /// Sequences that take a slot.
    pub fn enters(&self) -> impl Iterator<Item = Enter> + 'a {
        records::<ENTER_WORDS>(self.bytes, self.info.enters_offset, self.info.num_enters).map(|w| Enter {
            slot: w[0],
            computed_len: w[1],
            output_index: w[2],
            temperature: f32::from_bits(w[3]),
            top_k: w[4],
            top_p: f32::from_bits(w[5]),
            min_p: f32::from_bits(w[6]),
            repetition_penalty: f32::from_bits(w[7]),
            presence_penalty: f32::from_bits(w[8]),
            frequency_penalty: f32::from_bits(w[9]),
            seed: u64::from(w[10]) | u64::from(w[11]) << 32,
            num_logprobs: (w[12] != NONE).then_some(w[12]),
            penalty: (w[13], w[14]),
        })
    }

    /// Block copies: (source, destination).
    pub fn copies(&self) -> impl Iterator<Item = (BlockId, BlockId)> + 'a {
        records::<PAIR_WORDS>(self.bytes, self.info.copies_offset, self.info.num_copies)
            .map(|[source, destination]| (BlockId(source), BlockId(destination)))
    }

    /// Biased tokens: (token, value). Rows point at their ranges.
    pub fn bias(&self) -> impl Iterator<Item = (u32, f32)> + 'a {
        records::<PAIR_WORDS>(self.bytes, self.info.bias_offset, self.info.num_bias)
            .map(|[token, value]| (token, f32::from_bits(value)))
    }

    /// Draft tokens: `decode_query_len - 1` words for each decode row, None where a row has fewer.
    pub fn drafts(&self) -> impl Iterator<Item = Option<u32>> + 'a {
        let count = self.info.padded_decodes * self.info.decode_query_len.saturating_sub(1);
        records::<1>(self.bytes, self.info.drafts_offset, count).map(|[token]| (token != NONE).then_some(token))
    }

    /// Tokens for the penalties: (token, times output, in the prompt). `enters` records point at their ranges.
    pub fn penalty_tokens(&self) -> impl Iterator<Item = (u32, u32, bool)> + 'a {
        records::<PAIR_WORDS>(self.bytes, self.info.penalty_tokens_offset, self.info.num_penalty_tokens)
            .map(|[token, seen]| (token, seen / 2, seen % 2 == 1))
    }
}

fn records<const N: usize>(bytes: &[u8], offset: u32, count: u32) -> impl Iterator<Item = [u32; N]> + '_ {
    let start = offset as usize;
    bytes[start..start + count as usize * N * 4]
        .chunks_exact(N * 4)
        .map(|record| std::array::from_fn(|i| word(record, i)))
}

fn word(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(bytes[index * 4..index * 4 + 4].try_into().expect("a slice of four bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter() -> Enter {
        Enter {
            slot: 3,
            computed_len: 16,
            output_index: 2,
            temperature: 0.7,
            top_k: 40,
            top_p: 0.9,
            min_p: 0.1,
            repetition_penalty: 1.1,
            presence_penalty: -0.5,
            frequency_penalty: 0.25,
            seed: 0x0123_4567_89ab_cdef,
            num_logprobs: None,
            penalty: (0, 2),
        }
    }

    #[test]
    fn words_lie_where_the_table_says() {
        let mut writer = PlanWriter::default();
        let row =
            Row { slot: 3, query_start: 0, query_len: 5, flags: ROW_PREFILL | ROW_SAMPLE, num_drafts: 0, bias: (0, 1) };
        writer.push_row(&row);
        writer.push_prefill_tokens(&[10, 11, 12, 13, 14]);
        writer.push_block(&BlockEntry { group: 1, slot: 3, index: 7, block: BlockId(9) });
        writer.push_enter(&enter());
        writer.push_copy(BlockId(4), BlockId(9));
        writer.push_bias(8, f32::NEG_INFINITY);
        writer.push_penalty_token(10, 0, true);
        writer.push_penalty_token(5, 2, false);
        let mut info = PlanInfo { decode_query_len: 1, ..PlanInfo::default() };
        let mut buffer = vec![0xee; 1024];
        writer.finish(&mut buffer, &mut info).expect("it fits");

        let at = |offset: u32, index| word(&buffer[offset as usize..], index);
        let words = |offset, count| (0..count).map(|i| at(offset, i)).collect::<Vec<_>>();
        assert_eq!(words(info.rows_offset, 8), [3, 0, 5, 3, 0, u32::MAX, 0, 1]);
        assert_eq!(words(info.prefill_tokens_offset, 5), [10, 11, 12, 13, 14]);
        assert_eq!(words(info.blocks_offset, 4), [1, 3, 7, 9]);
        assert_eq!(words(info.enters_offset, 3), [3, 16, 2]);
        assert_eq!(words(info.enters_offset + 10 * 4, 6), [0x89ab_cdef, 0x0123_4567, u32::MAX, 0, 2, 0]);
        assert_eq!(words(info.copies_offset, 2), [4, 9]);
        assert_eq!(words(info.bias_offset, 2), [8, 0xff80_0000]);
        assert_eq!(words(info.penalty_tokens_offset, 4), [10, 1, 5, 4]);
        let offsets = [info.rows_offset, info.blocks_offset, info.enters_offset, info.bias_offset, info.num_bytes];
        assert!(offsets.iter().all(|offset| offset % 16 == 0));

        let view = PlanView::new(&info, &buffer);
        assert_eq!(view.rows().collect::<Vec<_>>(), [row]);
        assert_eq!(view.enters().collect::<Vec<_>>(), [enter()]);
        assert_eq!(view.penalty_tokens().collect::<Vec<_>>(), [(10, 0, true), (5, 2, false)]);
        assert_eq!(view.bias().collect::<Vec<_>>(), [(8, f32::NEG_INFINITY)]);
    }

    #[test]
    fn a_short_buffer_is_refused() {
        let mut writer = PlanWriter::default();
        writer.push_prefill_tokens(&[1; 100]);
        let mut info = PlanInfo::default();
        let refused = Error::BufferTooSmall { what: "plan", len: 16, needed: 400 };
        assert_eq!(writer.finish(&mut [0; 16], &mut info), Err(refused));
    }
}
