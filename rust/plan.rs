//! The packed plan of a step and the result that comes back: the format that `docs/plan.md` has.
//!
//! [`words`] names every word. [`PlanWriter`] gathers the sections of one step and lays them out
//! behind the header; [`PlanView`] reads them again, for the tests. [`PlanCapacity`] bounds a
//! configuration's plans; [`ResultLayout`] knows where a row's tokens lie. All of this knows words
//! and offsets, nothing of requests.
//!
//! All words are 32-bit little-endian; every section begins at a multiple of 16 bytes, the header
//! at 0.

use crate::error::Error;
use crate::request::BlockId;

mod capacity;
mod result;
pub mod words;

use words::{bias, block, copy, enter, follow, penalty, pool, row, target, HEADER, NONE, SECTION_ALIGNMENT};

pub use capacity::PlanCapacity;
pub use result::{ResultLayout, ResultWriter, RowResult, TargetLayout, TokenLogprobs, VectorLayout};
pub use words::{
    PlanInfo, ROW_LOGPROBS, ROW_PADDING, ROW_PENALTIES, ROW_PREFILL, ROW_SAMPLE, STATUS_MASKED, STATUS_NAN,
    STATUS_NO_TOKEN, STATUS_OK,
};

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
    /// Its first row of the grammar masks; None where no grammar bounds it.
    pub mask_row: Option<u32>,
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

/// Tokens of one row whose hidden states are part of an embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// Request slot, which keeps the sum.
    pub slot: u32,
    /// Its row of the step.
    pub row: u32,
    /// First of the tokens, among those of the step.
    pub start: u32,
    /// How many they are.
    pub len: u32,
    /// They are the first ones of the sum.
    pub begins: bool,
    /// Tokens of the whole sum.
    pub count: u32,
    /// Which vector of the result they complete; None where more tokens will come.
    pub vector: Option<u32>,
}

/// Tokens of one slot that the model which drafts computes before it drafts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Follow {
    /// Request slot.
    pub slot: u32,
    /// First of them among `follow_tokens`.
    pub query_start: u32,
    /// How many they are.
    pub query_len: u32,
    /// Position of the first in its sequence.
    pub start: u32,
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

impl PlanInfo {
    /// The header of a plan. Panics where `plan` is shorter than it.
    pub fn read(plan: &[u8]) -> Self {
        Self::from_words(std::array::from_fn(|index| word(plan, index)))
    }

    /// Where the parts of a result record lie.
    pub fn result_layout(&self) -> ResultLayout {
        ResultLayout {
            query_len: self.decode_query_len.max(1) as usize,
            top: self.max_logprobs.map(|top| top as usize),
        }
    }

    /// Where the results of the prompt targets lie.
    pub fn target_layout(&self) -> TargetLayout {
        TargetLayout {
            start: self.result_layout().bytes(self.padded_rows as usize),
            top: self.max_prompt_logprobs.unwrap_or(0) as usize,
        }
    }

    /// Where the vectors lie.
    pub fn vector_layout(&self) -> VectorLayout {
        VectorLayout {
            start: self.target_layout().end(self.num_prompt_targets as usize),
            size: self.vector_size as usize,
        }
    }
}

fn align(bytes: usize) -> usize {
    bytes.next_multiple_of(SECTION_ALIGNMENT)
}

/// Gathers the sections of one step. Kept between steps, so that its vectors stay allocated.
#[derive(Debug, Default)]
pub struct PlanWriter {
    rows: Vec<[u32; row::WORDS]>,
    prefill_tokens: Vec<u32>,
    blocks: Vec<[u32; block::WORDS]>,
    enters: Vec<[u32; enter::WORDS]>,
    copies: Vec<[u32; copy::WORDS]>,
    bias: Vec<[u32; bias::WORDS]>,
    drafts: Vec<u32>,
    penalty_tokens: Vec<[u32; penalty::WORDS]>,
    prompt_targets: Vec<[u32; target::WORDS]>,
    pools: Vec<[u32; pool::WORDS]>,
    follow_rows: Vec<[u32; follow::WORDS]>,
    follow_tokens: Vec<u32>,
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
        self.prompt_targets.clear();
        self.pools.clear();
        self.follow_rows.clear();
        self.follow_tokens.clear();
    }

    /// Appends a row; decodes come first.
    pub fn push_row(&mut self, row: &Row) {
        let mut words = [0; row::WORDS];
        words[row::SLOT] = row.slot;
        words[row::QUERY_START] = row.query_start;
        words[row::QUERY_LEN] = row.query_len;
        words[row::FLAGS] = row.flags;
        words[row::NUM_DRAFTS] = row.num_drafts;
        words[row::MASK_ROW] = row.mask_row.unwrap_or(NONE);
        (words[row::BIAS_START], words[row::BIAS_LEN]) = row.bias;
        self.rows.push(words);
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
        let mut words = [0; block::WORDS];
        words[block::GROUP] = entry.group;
        words[block::SLOT] = entry.slot;
        words[block::INDEX] = entry.index;
        words[block::ID] = entry.block.0;
        self.blocks.push(words);
    }

    /// Appends a sequence that takes a slot.
    pub fn push_enter(&mut self, enter: &Enter) {
        let mut words = [0; enter::WORDS];
        words[enter::SLOT] = enter.slot;
        words[enter::COMPUTED_LEN] = enter.computed_len;
        words[enter::OUTPUT_INDEX] = enter.output_index;
        words[enter::TEMPERATURE] = enter.temperature.to_bits();
        words[enter::TOP_K] = enter.top_k;
        words[enter::TOP_P] = enter.top_p.to_bits();
        words[enter::MIN_P] = enter.min_p.to_bits();
        words[enter::REPETITION_PENALTY] = enter.repetition_penalty.to_bits();
        words[enter::PRESENCE_PENALTY] = enter.presence_penalty.to_bits();
        words[enter::FREQUENCY_PENALTY] = enter.frequency_penalty.to_bits();
        words[enter::SEED_LOW] = enter.seed as u32;
        words[enter::SEED_HIGH] = (enter.seed >> 32) as u32;
        words[enter::NUM_LOGPROBS] = enter.num_logprobs.unwrap_or(NONE);
        (words[enter::PENALTY_START], words[enter::PENALTY_LEN]) = enter.penalty;
        self.enters.push(words);
    }

    /// Appends a block copy, done before anything else of the step.
    pub fn push_copy(&mut self, source: BlockId, destination: BlockId) {
        let mut words = [0; copy::WORDS];
        (words[copy::SOURCE], words[copy::DESTINATION]) = (source.0, destination.0);
        self.copies.push(words);
    }

    /// Appends one biased token of the row that is being written.
    pub fn push_bias(&mut self, token: u32, value: f32) {
        let mut words = [0; bias::WORDS];
        (words[bias::TOKEN], words[bias::VALUE]) = (token, value.to_bits());
        self.bias.push(words);
    }

    /// Records of `bias` so far.
    pub fn num_bias(&self) -> u32 {
        self.bias.len() as u32
    }

    /// Appends the drafts of the decode row that is being written.
    pub fn push_drafts(&mut self, drafts: &[u32]) {
        self.drafts.extend_from_slice(drafts);
    }

    /// Appends a token the penalties must know: how often it was output, and whether the prompt
    /// holds it.
    pub fn push_penalty_token(&mut self, token: u32, times_output: u32, in_prompt: bool) {
        let mut words = [0; penalty::WORDS];
        words[penalty::TOKEN] = token;
        words[penalty::SEEN] = 2 * times_output + u32::from(in_prompt);
        self.penalty_tokens.push(words);
    }

    /// Records of `penalty_tokens` so far.
    pub fn num_penalty_tokens(&self) -> u32 {
        self.penalty_tokens.len() as u32
    }

    /// Appends a prompt token whose log probabilities are wanted, behind the token at `place` among
    /// the step's tokens.
    pub fn push_prompt_target(&mut self, place: u32, token: u32) {
        let mut words = [0; target::WORDS];
        (words[target::PLACE], words[target::TARGET]) = (place, token);
        self.prompt_targets.push(words);
    }

    /// Records of `prompt_targets` so far.
    pub fn num_prompt_targets(&self) -> u32 {
        self.prompt_targets.len() as u32
    }

    /// Appends tokens of a prefill row whose hidden states are part of an embedding.
    pub fn push_pool(&mut self, pool: &Pool) {
        let mut words = [0; pool::WORDS];
        words[pool::SLOT] = pool.slot;
        words[pool::ROW] = pool.row;
        words[pool::START] = pool.start;
        words[pool::LEN] = pool.len;
        words[pool::BEGINS] = u32::from(pool.begins);
        words[pool::COUNT] = pool.count;
        words[pool::VECTOR] = pool.vector.unwrap_or(NONE);
        self.pools.push(words);
    }

    /// Appends tokens that the model which drafts computes for itself; `push_follow_tokens` says which.
    pub fn push_follow_row(&mut self, row: &Follow) {
        let mut words = [0; follow::WORDS];
        words[follow::SLOT] = row.slot;
        words[follow::QUERY_START] = row.query_start;
        words[follow::QUERY_LEN] = row.query_len;
        words[follow::FLAGS] = ROW_PREFILL;
        words[follow::MASK_ROW] = NONE;
        words[follow::START] = row.start;
        self.follow_rows.push(words);
    }

    /// Appends tokens of the last of `follow_rows`.
    pub fn push_follow_tokens(&mut self, tokens: &[u32]) {
        self.follow_tokens.extend_from_slice(tokens);
    }

    /// Words of `follow_tokens` so far.
    pub fn num_follow_tokens(&self) -> u32 {
        self.follow_tokens.len() as u32
    }

    /// Rows so far, padding included.
    pub fn num_rows(&self) -> u32 {
        self.rows.len() as u32
    }

    /// Lays header and sections out in `buffer` and completes `info` (counts of sections, offsets,
    /// bytes, result width).
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
        info.num_drafts = self.drafts.len() as u32;
        info.num_penalty_tokens = self.penalty_tokens.len() as u32;
        info.num_prompt_targets = self.prompt_targets.len() as u32;
        info.num_pools = self.pools.len() as u32;
        info.num_follow_rows = self.follow_rows.len() as u32;
        info.num_follow_tokens = self.follow_tokens.len() as u32;
        info.max_follow_len = self.follow_rows.iter().map(|words| words[follow::QUERY_LEN]).max().unwrap_or(0);
        info.result_width = info.result_layout().width() as u32;

        let mut end = align(HEADER.len() * 4);
        let mut place = |words: usize| {
            let start = end;
            end = align(start + words * 4);
            start as u32
        };
        info.rows_offset = place(self.rows.len() * row::WORDS);
        info.prefill_tokens_offset = place(self.prefill_tokens.len());
        info.blocks_offset = place(self.blocks.len() * block::WORDS);
        info.enters_offset = place(self.enters.len() * enter::WORDS);
        info.copies_offset = place(self.copies.len() * copy::WORDS);
        info.bias_offset = place(self.bias.len() * bias::WORDS);
        info.drafts_offset = place(self.drafts.len());
        info.penalty_tokens_offset = place(self.penalty_tokens.len() * penalty::WORDS);
        info.prompt_targets_offset = place(self.prompt_targets.len() * target::WORDS);
        info.pools_offset = place(self.pools.len() * pool::WORDS);
        info.follow_rows_offset = place(self.follow_rows.len() * follow::WORDS);
        info.follow_tokens_offset = place(self.follow_tokens.len());
        info.num_bytes = end as u32;
        if buffer.len() < end {
            return Err(Error::BufferTooSmall { what: "plan", len: buffer.len(), needed: end });
        }
        put(buffer, 0, &info.to_words());
        put(buffer, info.rows_offset, self.rows.as_flattened());
        put(buffer, info.prefill_tokens_offset, &self.prefill_tokens);
        put(buffer, info.blocks_offset, self.blocks.as_flattened());
        put(buffer, info.enters_offset, self.enters.as_flattened());
        put(buffer, info.copies_offset, self.copies.as_flattened());
        put(buffer, info.bias_offset, self.bias.as_flattened());
        put(buffer, info.drafts_offset, &self.drafts);
        put(buffer, info.penalty_tokens_offset, self.penalty_tokens.as_flattened());
        put(buffer, info.prompt_targets_offset, self.prompt_targets.as_flattened());
        put(buffer, info.pools_offset, self.pools.as_flattened());
        put(buffer, info.follow_rows_offset, self.follow_rows.as_flattened());
        put(buffer, info.follow_tokens_offset, &self.follow_tokens);
        Ok(())
    }
}

fn put(buffer: &mut [u8], offset: u32, words: &[u32]) {
    let bytes = &mut buffer[offset as usize..offset as usize + words.len() * 4];
    for (target, word) in bytes.chunks_exact_mut(4).zip(words) {
        target.copy_from_slice(&word.to_le_bytes());
    }
}

/// Reads a plan back. Panics where the buffer is shorter than its header says.
#[derive(Debug, Clone, Copy)]
pub struct PlanView<'a> {
    info: PlanInfo,
    bytes: &'a [u8],
}

impl<'a> PlanView<'a> {
    /// A view of the plan at the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self::with_header(PlanInfo::read(bytes), bytes)
    }

    /// A view of the sections of `bytes` that `info` says are there.
    pub fn with_header(info: PlanInfo, bytes: &'a [u8]) -> Self {
        Self { info, bytes: &bytes[..info.num_bytes as usize] }
    }

    /// The header.
    pub fn info(&self) -> PlanInfo {
        self.info
    }

    /// All rows, padding included.
    pub fn rows(&self) -> impl Iterator<Item = Row> + 'a {
        records::<{ row::WORDS }>(self.bytes, self.info.rows_offset, self.info.padded_rows).map(|w| Row {
            slot: w[row::SLOT],
            query_start: w[row::QUERY_START],
            query_len: w[row::QUERY_LEN],
            flags: w[row::FLAGS],
            num_drafts: w[row::NUM_DRAFTS],
            mask_row: (w[row::MASK_ROW] != NONE).then_some(w[row::MASK_ROW]),
            bias: (w[row::BIAS_START], w[row::BIAS_LEN]),
        })
    }

    /// Tokens of the prefill rows, in row order.
    pub fn prefill_tokens(&self) -> impl Iterator<Item = u32> + 'a {
        records::<1>(self.bytes, self.info.prefill_tokens_offset, self.info.num_prefill_tokens).map(|[token]| token)
    }

    /// Blocks that tables gain.
    pub fn blocks(&self) -> impl Iterator<Item = BlockEntry> + 'a {
        records::<{ block::WORDS }>(self.bytes, self.info.blocks_offset, self.info.num_blocks).map(|w| BlockEntry {
            group: w[block::GROUP],
            slot: w[block::SLOT],
            index: w[block::INDEX],
            block: BlockId(w[block::ID]),
        })
    }

    /// The records of sequences that take a slot, as they are.
    pub fn enter_words(&self) -> impl Iterator<Item = [u32; enter::WORDS]> + 'a {
        records(self.bytes, self.info.enters_offset, self.info.num_enters)
    }

    /// Sequences that take a slot.
    pub fn enters(&self) -> impl Iterator<Item = Enter> + 'a {
        self.enter_words().map(|w| Enter {
            slot: w[enter::SLOT],
            computed_len: w[enter::COMPUTED_LEN],
            output_index: w[enter::OUTPUT_INDEX],
            temperature: f32::from_bits(w[enter::TEMPERATURE]),
            top_k: w[enter::TOP_K],
            top_p: f32::from_bits(w[enter::TOP_P]),
            min_p: f32::from_bits(w[enter::MIN_P]),
            repetition_penalty: f32::from_bits(w[enter::REPETITION_PENALTY]),
            presence_penalty: f32::from_bits(w[enter::PRESENCE_PENALTY]),
            frequency_penalty: f32::from_bits(w[enter::FREQUENCY_PENALTY]),
            seed: u64::from(w[enter::SEED_LOW]) | u64::from(w[enter::SEED_HIGH]) << 32,
            num_logprobs: (w[enter::NUM_LOGPROBS] != NONE).then_some(w[enter::NUM_LOGPROBS]),
            penalty: (w[enter::PENALTY_START], w[enter::PENALTY_LEN]),
        })
    }

    /// Block copies: (source, destination).
    pub fn copies(&self) -> impl Iterator<Item = (BlockId, BlockId)> + 'a {
        records::<{ copy::WORDS }>(self.bytes, self.info.copies_offset, self.info.num_copies)
            .map(|w| (BlockId(w[copy::SOURCE]), BlockId(w[copy::DESTINATION])))
    }

    /// Biased tokens: (token, value). Rows point at their ranges.
    pub fn bias(&self) -> impl Iterator<Item = (u32, f32)> + 'a {
        records::<{ bias::WORDS }>(self.bytes, self.info.bias_offset, self.info.num_bias)
            .map(|w| (w[bias::TOKEN], f32::from_bits(w[bias::VALUE])))
    }

    /// Draft tokens of the decode rows, in row order.
    pub fn drafts(&self) -> impl Iterator<Item = u32> + 'a {
        records::<1>(self.bytes, self.info.drafts_offset, self.info.num_drafts).map(|[token]| token)
    }

    /// Tokens for the penalties: (token, times output, in the prompt). `enters` records point at
    /// their ranges.
    pub fn penalty_tokens(&self) -> impl Iterator<Item = (u32, u32, bool)> + 'a {
        records::<{ penalty::WORDS }>(self.bytes, self.info.penalty_tokens_offset, self.info.num_penalty_tokens)
            .map(|w| (w[penalty::TOKEN], w[penalty::SEEN] / 2, w[penalty::SEEN] % 2 == 1))
    }

    /// Prompt tokens whose log probabilities are wanted: (place of the token before, token).
    pub fn prompt_targets(&self) -> impl Iterator<Item = (u32, u32)> + 'a {
        records::<{ target::WORDS }>(self.bytes, self.info.prompt_targets_offset, self.info.num_prompt_targets)
            .map(|w| (w[target::PLACE], w[target::TARGET]))
    }

    /// Tokens that the model which drafts computes before it drafts.
    pub fn follow_rows(&self) -> impl Iterator<Item = Follow> + 'a {
        records::<{ follow::WORDS }>(self.bytes, self.info.follow_rows_offset, self.info.num_follow_rows).map(|w| {
            Follow {
                slot: w[follow::SLOT],
                query_start: w[follow::QUERY_START],
                query_len: w[follow::QUERY_LEN],
                start: w[follow::START],
            }
        })
    }

    /// Their ids, in row order.
    pub fn follow_tokens(&self) -> impl Iterator<Item = u32> + 'a {
        records::<1>(self.bytes, self.info.follow_tokens_offset, self.info.num_follow_tokens).map(|[token]| token)
    }

    /// Tokens whose hidden states are part of embeddings.
    pub fn pools(&self) -> impl Iterator<Item = Pool> + 'a {
        records::<{ pool::WORDS }>(self.bytes, self.info.pools_offset, self.info.num_pools).map(|w| Pool {
            slot: w[pool::SLOT],
            row: w[pool::ROW],
            start: w[pool::START],
            len: w[pool::LEN],
            begins: w[pool::BEGINS] != 0,
            count: w[pool::COUNT],
            vector: (w[pool::VECTOR] != NONE).then_some(w[pool::VECTOR]),
        })
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
        let row = Row {
            slot: 3,
            query_start: 0,
            query_len: 5,
            flags: ROW_PREFILL | ROW_SAMPLE,
            num_drafts: 0,
            mask_row: Some(2),
            bias: (0, 1),
        };
        writer.push_row(&row);
        writer.push_prefill_tokens(&[10, 11, 12, 13, 14]);
        writer.push_block(&BlockEntry { group: 1, slot: 3, index: 7, block: BlockId(9) });
        writer.push_enter(&enter());
        writer.push_copy(BlockId(4), BlockId(9));
        writer.push_bias(8, f32::NEG_INFINITY);
        writer.push_drafts(&[30, 31]);
        writer.push_penalty_token(10, 0, true);
        writer.push_penalty_token(5, 2, false);
        writer.push_prompt_target(3, 14);
        let pool = Pool { slot: 3, row: 0, start: 0, len: 5, begins: true, count: 9, vector: None };
        writer.push_pool(&pool);
        let follow = Follow { slot: 2, query_start: 0, query_len: 3, start: 7 };
        writer.push_follow_row(&follow);
        writer.push_follow_tokens(&[20, 21, 22]);
        let mut info = PlanInfo { step_id: 1 << 40 | 7, decode_query_len: 1, all_greedy: true, ..PlanInfo::default() };
        let mut buffer = vec![0xee; 1024];
        writer.finish(&mut buffer, &mut info).expect("it fits");

        let at = |offset: u32, index| word(&buffer[offset as usize..], index);
        let words = |offset, count| (0..count).map(|i| at(offset, i)).collect::<Vec<_>>();
        assert_eq!(words(0, 8), [7, 1 << 8, 0, 1, 0, 0, 1, 0]);
        assert_eq!(words(12 * 4, 5), [u32::MAX, 0, 0, 1, 3]);
        assert_eq!((info.rows_offset, info.num_bytes, info.num_drafts), (192, at(0, 17), at(0, 22)));
        assert_eq!(words(32 * 4, 3), [u32::MAX, 1, info.prompt_targets_offset]);
        assert_eq!(words(info.rows_offset, 8), [3, 0, 5, 3, 0, 2, 0, 1]);
        assert_eq!(words(info.prefill_tokens_offset, 5), [10, 11, 12, 13, 14]);
        assert_eq!(words(info.blocks_offset, 4), [1, 3, 7, 9]);
        assert_eq!(words(info.enters_offset, 3), [3, 16, 2]);
        assert_eq!(words(info.enters_offset + 10 * 4, 6), [0x89ab_cdef, 0x0123_4567, u32::MAX, 0, 2, 0]);
        assert_eq!(words(info.copies_offset, 2), [4, 9]);
        assert_eq!(words(info.bias_offset, 2), [8, 0xff80_0000]);
        assert_eq!(words(info.penalty_tokens_offset, 4), [10, 1, 5, 4]);
        assert_eq!(words(info.prompt_targets_offset, 2), [3, 14]);
        assert_eq!(words(35 * 4, 5), [0, 0, 0, 1, info.pools_offset]);
        assert_eq!(words(info.pools_offset, 7), [3, 0, 0, 5, 1, 9, u32::MAX]);
        assert_eq!(words(40 * 4, 5), [1, 3, 3, info.follow_rows_offset, info.follow_tokens_offset]);
        assert_eq!(words(info.follow_rows_offset, 8), [2, 0, 3, ROW_PREFILL, 0, u32::MAX, 7, 0]);
        assert_eq!(words(info.follow_tokens_offset, 3), [20, 21, 22]);
        let offsets = [info.rows_offset, info.blocks_offset, info.enters_offset, info.bias_offset, info.num_bytes];
        assert!(offsets.iter().all(|offset| offset % 16 == 0));

        let view = PlanView::new(&buffer);
        assert_eq!(view.info(), info);
        assert_eq!(view.rows().collect::<Vec<_>>(), [row]);
        assert_eq!(view.enters().collect::<Vec<_>>(), [enter()]);
        assert_eq!(view.penalty_tokens().collect::<Vec<_>>(), [(10, 0, true), (5, 2, false)]);
        assert_eq!(view.bias().collect::<Vec<_>>(), [(8, f32::NEG_INFINITY)]);
        assert_eq!(view.drafts().collect::<Vec<_>>(), [30, 31]);
        assert_eq!(view.prompt_targets().collect::<Vec<_>>(), [(3, 14)]);
        assert_eq!(view.pools().collect::<Vec<_>>(), [pool]);
        assert_eq!(view.follow_rows().collect::<Vec<_>>(), [follow]);
        assert_eq!(view.follow_tokens().collect::<Vec<_>>(), [20, 21, 22]);
    }

    #[test]
    fn a_short_buffer_is_refused() {
        let mut writer = PlanWriter::default();
        writer.push_prefill_tokens(&[1; 100]);
        let mut info = PlanInfo::default();
        let needed = align(HEADER.len() * 4) + 400;
        let refused = Error::BufferTooSmall { what: "plan", len: 16, needed };
        assert_eq!(writer.finish(&mut [0; 16], &mut info), Err(refused));
    }
}
