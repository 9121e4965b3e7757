//! The packed plan read a second time, straight from the tables of docs/plan.md: header and
//! sections as words, rows checked one by one.
//!
//! It uses none of the core's readers and writers, so a slip in them shows.

use _core::config::CoreConfig;

pub const SAMPLE: u32 = 1;
pub const PREFILL: u32 = 2;
pub const LOGPROBS: u32 = 4;
pub const PENALTIES: u32 = 8;
pub const PADDING: u32 = 16;

/// A broken rule, in words; the world adds seed and trace.
pub type Violation = String;

/// The sizes that the device was built for.
#[derive(Clone, Debug)]
pub struct Shape {
    pub num_blocks: u32,
    pub block_size: u32,
    /// One entry a KV group; 0: full attention.
    pub windows: Vec<u32>,
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
    pub max_model_len: u32,
    pub num_draft_tokens: u32,
    pub vocab_size: u32,
    /// A model on the device makes the drafts, of which the plan has only the places. It has keys and
    /// values of its own.
    pub drafts_itself: bool,
}

impl Shape {
    pub fn of(config: &CoreConfig) -> Self {
        Self {
            num_blocks: config.num_blocks,
            block_size: config.block_size,
            windows: config.kv_windows.clone(),
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_model_len: config.max_model_len,
            num_draft_tokens: config.num_draft_tokens,
            vocab_size: config.vocab_size,
            drafts_itself: config.speculation.is_some_and(|speculation| speculation.method.is_on_device()),
        }
    }

    /// Positions that a slot has room for; rejected drafts may lie past the longest sequence.
    pub fn max_positions(&self) -> u32 {
        self.max_model_len + self.num_draft_tokens
    }
}

/// One row of the plan.
#[derive(Clone, Copy)]
pub struct Row {
    pub slot: u32,
    pub query_start: u32,
    pub query_len: u32,
    pub flags: u32,
    pub num_drafts: u32,
    pub first_mask: Option<u32>,
    pub bias_start: u32,
    pub bias_len: u32,
}

impl Row {
    fn read(words: &[u32]) -> Self {
        Row {
            slot: words[0],
            query_start: words[1],
            query_len: words[2],
            flags: words[3],
            num_drafts: words[4],
            first_mask: u32::try_from(words[5] as i32).ok(),
            bias_start: words[6],
            bias_len: words[7],
        }
    }
}

macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}
pub(crate) use ensure;

/// The header: the fields that the device needs, and those that can be checked against the rows.
#[derive(Clone, Copy)]
pub struct Header {
    pub step_id: u64,
    pub num_rows: u32,
    pub padded_rows: u32,
    pub num_decodes: u32,
    pub padded_decodes: u32,
    pub decode_query_len: u32,
    pub num_decode_tokens: u32,
    pub num_prefill_tokens: u32,
    pub num_tokens: u32,
    pub max_query_len: u32,
    pub max_seq_len: u32,
    /// None: no row asks for log probabilities.
    pub max_logprobs: Option<u32>,
    pub num_mask_rows: u32,
    pub has_penalties: bool,
    pub all_greedy: bool,
    pub result_width: u32,
    pub num_bytes: u32,
    pub num_blocks: u32,
    pub num_enters: u32,
    pub num_copies: u32,
    pub num_bias: u32,
    pub num_drafts: u32,
    pub num_penalty_tokens: u32,
    /// None: there are no prompt targets.
    pub max_prompt_logprobs: Option<u32>,
    pub num_prompt_targets: u32,
    pub num_vectors: u32,
    pub vector_size: u32,
    has_wide_pools: bool,
    num_pools: u32,
    num_follow_rows: u32,
    num_follow_tokens: u32,
    max_follow_len: u32,
    /// In the order of the page's table of sections.
    pub offsets: [u32; 12],
}

impl Header {
    const WORDS: usize = 45;

    fn read(bytes: &[u8]) -> Result<Self, Violation> {
        ensure!(bytes.len() >= 4 * Self::WORDS, "{} bytes are too few for a header", bytes.len());
        let word = |index: usize| u32::from_le_bytes(std::array::from_fn(|byte| bytes[4 * index + byte]));
        let flag = |index: usize| match word(index) {
            0 | 1 => Ok(word(index) == 1),
            other => Err(format!("header word {index} is {other}, but must be 0 or 1")),
        };
        Ok(Header {
            step_id: u64::from(word(0)) + (u64::from(word(1)) << 32),
            num_rows: word(2),
            padded_rows: word(3),
            num_decodes: word(4),
            padded_decodes: word(5),
            decode_query_len: word(6),
            num_decode_tokens: word(7),
            num_prefill_tokens: word(8),
            num_tokens: word(9),
            max_query_len: word(10),
            max_seq_len: word(11),
            max_logprobs: u32::try_from(word(12) as i32).ok(),
            num_mask_rows: word(13),
            has_penalties: flag(14)?,
            all_greedy: flag(15)?,
            result_width: word(16),
            num_bytes: word(17),
            num_blocks: word(18),
            num_enters: word(19),
            num_copies: word(20),
            num_bias: word(21),
            num_drafts: word(22),
            num_penalty_tokens: word(23),
            max_prompt_logprobs: u32::try_from(word(32) as i32).ok(),
            num_prompt_targets: word(33),
            num_vectors: word(35),
            vector_size: word(36),
            has_wide_pools: flag(37)?,
            num_pools: word(38),
            num_follow_rows: word(40),
            num_follow_tokens: word(41),
            max_follow_len: word(42),
            offsets: std::array::from_fn(|section| match section {
                8 => word(34),
                9 => word(39),
                10 => word(43),
                11 => word(44),
                _ => word(24 + section),
            }),
        })
    }
}

/// A plan's header, and its sections as words.
pub struct View {
    pub header: Header,
    rows: Vec<u32>,
    pub prefill_tokens: Vec<u32>,
    pub blocks: Vec<u32>,
    pub enters: Vec<u32>,
    pub copies: Vec<u32>,
    pub bias: Vec<u32>,
    drafts: Vec<u32>,
    pub penalty_tokens: Vec<u32>,
    /// (place, target)
    pub prompt_targets: Vec<(u32, u32)>,
    pub pools: Vec<Pool>,
    pub follows: Vec<Follow>,
}

/// Tokens that the model which drafts computes before it does.
#[derive(Clone)]
pub struct Follow {
    pub slot: u32,
    pub start: u32,
    pub tokens: Vec<u32>,
}

/// Tokens whose hidden states are part of an embedding.
#[derive(Clone, Copy)]
pub struct Pool {
    pub slot: u32,
    pub row: u32,
    pub start: u32,
    pub len: u32,
    pub begins: bool,
    pub count: u32,
    pub vector: Option<u32>,
}

/// The records of `follow_rows` with their tokens.
fn follow(rows: &[u32], tokens: &[u32], longest: u32) -> Result<Vec<Follow>, Violation> {
    let (mut follows, mut next, mut most): (Vec<Follow>, u32, u32) = (Vec::new(), 0, 0);
    for (index, words) in rows.chunks_exact(8).enumerate() {
        let &[slot, first, len, flags, num_drafts, mask_row, start, _] = words else { unreachable!("chunks of eight") };
        ensure!(first == next && len > 0, "follow row {index}: {len} tokens from {first}, {next} is next");
        ensure!(flags == PREFILL && num_drafts == 0 && mask_row == u32::MAX, "follow row {index}: {words:?}");
        ensure!(follows.iter().all(|other| other.slot != slot), "S13: slot {slot} has two follow rows");
        let tokens = tokens.get(first as usize..(first + len) as usize);
        let tokens = tokens.ok_or(format!("follow row {index}: {len} tokens from {first}"))?.to_vec();
        follows.push(Follow { slot, start, tokens });
        (next, most) = (next + len, most.max(len));
    }
    ensure!(next as usize == tokens.len(), "{} follow tokens but rows hold {next}", tokens.len());
    ensure!(most == longest, "max_follow_len {longest} but {most}");
    Ok(follows)
}

impl View {
    /// Cuts the sections out of the plan's bytes.
    pub fn new(bytes: &[u8]) -> Result<Self, Violation> {
        let plan = Header::read(bytes)?;
        ensure!(plan.num_bytes as usize <= bytes.len(), "the plan says {} bytes of {}", plan.num_bytes, bytes.len());
        let section = |name: &str, offset: u32, num_words: u32| -> Result<Vec<u32>, Violation> {
            if num_words == 0 {
                return Ok(Vec::new());
            }
            let end = u64::from(offset) + 4 * u64::from(num_words);
            ensure!(offset.is_multiple_of(16), "section {name} begins at {offset}, no multiple of 16");
            ensure!(end <= u64::from(plan.num_bytes), "section {name} ends at {end} of {}", plan.num_bytes);
            let words = bytes[offset as usize..end as usize].chunks_exact(4);
            Ok(words.map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect())
        };
        let [rows, prefill_tokens, blocks, enters, copies, bias, drafts, penalty_tokens, targets, pools, follow_rows, follow_tokens] =
            plan.offsets;
        let follow_rows = section("follow_rows", follow_rows, plan.num_follow_rows * 8)?;
        let follow_tokens = section("follow_tokens", follow_tokens, plan.num_follow_tokens)?;
        let follows = follow(&follow_rows, &follow_tokens, plan.max_follow_len)?;
        let targets = section("prompt_targets", targets, plan.num_prompt_targets * 2)?;
        let pools = section("pools", pools, plan.num_pools * 7)?;
        let pool = |words: &[u32]| Pool {
            slot: words[0],
            row: words[1],
            start: words[2],
            len: words[3],
            begins: words[4] != 0,
            count: words[5],
            vector: u32::try_from(words[6] as i32).ok(),
        };
        Ok(View {
            rows: section("rows", rows, plan.padded_rows * 8)?,
            prefill_tokens: section("prefill_tokens", prefill_tokens, plan.num_prefill_tokens)?,
            blocks: section("blocks", blocks, plan.num_blocks * 4)?,
            enters: section("enters", enters, plan.num_enters * 16)?,
            copies: section("copies", copies, plan.num_copies * 2)?,
            bias: section("bias", bias, plan.num_bias * 2)?,
            drafts: section("drafts", drafts, plan.num_drafts)?,
            penalty_tokens: section("penalty_tokens", penalty_tokens, plan.num_penalty_tokens * 2)?,
            prompt_targets: targets.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect(),
            pools: pools.chunks_exact(7).map(pool).collect(),
            follows,
            header: plan,
        })
    }

    /// The drafts of the decode row at `index`: each row before it has one token that is no draft.
    pub fn drafts_of(&self, index: usize, row: &Row) -> Result<&[u32], Violation> {
        let first = row.query_start as usize - index;
        let drafts = self.drafts.get(first..first + row.num_drafts as usize);
        drafts.ok_or(format!("row {index}: {} drafts from {first}, of {}", row.num_drafts, self.drafts.len()))
    }

    /// The rows, with everything checked that the plan says about them.
    pub fn rows(&self, shape: &Shape) -> Result<Vec<Row>, Violation> {
        let plan = &self.header;
        ensure!(
            plan.num_rows <= shape.max_num_seqs,
            "S10: {} rows, max_num_seqs {}",
            plan.num_rows,
            shape.max_num_seqs
        );
        let num_prefills = plan.num_rows - plan.num_decodes;
        let prefills_end = plan.padded_decodes + num_prefills;
        ensure!(plan.padded_rows >= prefills_end, "padded_rows is less than padded_decodes + prefills");
        ensure!(
            plan.padded_rows == prefills_end || num_prefills > 0,
            "padding behind the prefill rows of a step without any"
        );
        let mut rows = Vec::with_capacity(plan.padded_rows as usize);
        let mut any_penalties = false;
        let mut mask_rows = 0;
        let (mut decode_tokens, mut num_drafts, mut longest_decode) = (0, 0, 1);
        let mut slot_seen = vec![false; shape.max_num_seqs as usize];
        let (mut num_tokens, mut real_tokens, mut prefill_tokens, mut longest) = (0, 0u64, 0, 0);
        for (index, words) in self.rows.chunks_exact(8).enumerate() {
            let index = index as u32;
            let row = Row::read(words);
            if let Some(first) = row.first_mask {
                ensure!(row.flags & SAMPLE != 0, "row {index}: a mask, though it draws nothing");
                ensure!(first == mask_rows, "row {index}: mask row {first}, expected {mask_rows}");
                mask_rows += 1 + row.num_drafts;
            }
            ensure!(
                row.query_start == num_tokens,
                "row {index}: query_start {} after {num_tokens} tokens",
                row.query_start
            );
            let is_padding = row.flags & PADDING != 0;
            let pads = (index >= plan.num_decodes && index < plan.padded_decodes) || index >= prefills_end;
            ensure!(is_padding == pads, "row {index}: PADDING flag {is_padding}, in padding {pads}");
            ensure!(row.query_len > 0 || is_padding, "row {index}: no tokens");
            num_tokens += row.query_len;
            longest = longest.max(row.query_len);
            let is_prefill = index >= plan.padded_decodes;
            let moves_on = is_prefill && index < prefills_end;
            ensure!((row.flags & PREFILL != 0) == moves_on, "row {index}: decodes come first, then prefills");
            any_penalties |= row.flags & PENALTIES != 0;
            if is_prefill {
                prefill_tokens += row.query_len;
                ensure!(row.num_drafts == 0, "row {index}: a prefill row with drafts");
            } else {
                decode_tokens += row.query_len;
                num_drafts += row.num_drafts;
                if is_padding {
                    let uniform = plan.decode_query_len > 1 || row.query_len == 1;
                    ensure!(uniform, "row {index}: {} tokens of padding in a step without drafts", row.query_len);
                    ensure!(row.num_drafts == 0, "row {index}: padding with drafts");
                } else {
                    let len = 1 + row.num_drafts;
                    ensure!(row.query_len == len, "row {index}: {} tokens, {len} with drafts", row.query_len);
                    longest_decode = longest_decode.max(len);
                }
            }
            if is_padding {
                ensure!(
                    row.query_len <= shape.max_positions() || !is_prefill,
                    "row {index}: {} padding tokens",
                    row.query_len
                );
                ensure!(row.slot == shape.max_num_seqs, "row {index}: padding in slot {}", row.slot);
                ensure!(row.flags & SAMPLE == 0, "row {index}: padding must not sample");
            } else {
                ensure!(row.slot < shape.max_num_seqs, "S12: row {index}: slot {}", row.slot);
                let seen = &mut slot_seen[row.slot as usize];
                ensure!(!*seen, "S13: slot {} has two rows in one step", row.slot);
                *seen = true;
                real_tokens += u64::from(row.query_len);
            }
            let bias_end = row.bias_start.checked_add(row.bias_len);
            ensure!(row.bias_len == 0 || bias_end <= Some(plan.num_bias), "S12: row {index}: bias range");
            rows.push(row);
        }
        ensure!(mask_rows == plan.num_mask_rows, "num_mask_rows {} but {mask_rows}", plan.num_mask_rows);
        ensure!(any_penalties == plan.has_penalties, "has_penalties {} but {any_penalties}", plan.has_penalties);
        ensure!(
            longest_decode == plan.decode_query_len,
            "decode_query_len {}: {longest_decode}",
            plan.decode_query_len
        );
        ensure!(num_drafts == plan.num_drafts, "num_drafts {} but rows have {num_drafts}", plan.num_drafts);
        ensure!(decode_tokens == plan.num_decode_tokens, "num_decode_tokens but rows hold {decode_tokens}");
        ensure!(num_tokens == plan.num_tokens, "num_tokens {} but rows hold {num_tokens}", plan.num_tokens);
        ensure!(prefill_tokens == plan.num_prefill_tokens, "num_prefill_tokens but rows hold {prefill_tokens}");
        ensure!(longest == plan.max_query_len, "max_query_len {} but {longest}", plan.max_query_len);
        ensure!(
            real_tokens <= u64::from(shape.max_num_batched_tokens),
            "S10: {real_tokens} tokens over the budget {}",
            shape.max_num_batched_tokens
        );
        self.follows_are_of_rows(shape, &rows)?;
        self.targets_are_prefill_tokens(shape, &rows)?;
        self.pools_are_prefill_tokens(&rows)?;
        Ok(rows)
    }

    /// What the model that drafts computes before is of slots with a row, and no more than a step may have.
    fn follows_are_of_rows(&self, shape: &Shape, rows: &[Row]) -> Result<(), Violation> {
        let followed: usize = self.follows.iter().map(|follow| follow.tokens.len()).sum();
        let most = if shape.drafts_itself { shape.max_num_batched_tokens as usize } else { 0 };
        ensure!(followed <= most, "S10: {followed} tokens to follow, of {most}");
        for follow in &self.follows {
            ensure!(rows.iter().any(|row| row.slot == follow.slot), "slot {} follows without a row", follow.slot);
        }
        Ok(())
    }

    /// Pools: a prefill row has one at most, of its own tokens; vectors are numbered from 0; only a
    /// step without padding has others than last tokens.
    fn pools_are_prefill_tokens(&self, rows: &[Row]) -> Result<(), Violation> {
        let plan = &self.header;
        let (mut vectors, mut after, mut has_wide) = (0, 0, false);
        for pool in &self.pools {
            ensure!(pool.row >= after, "S18: row {} has two pools, or they are out of order", pool.row);
            after = pool.row + 1;
            let row = rows.get(pool.row as usize).ok_or(format!("S12: a pool of row {}", pool.row))?;
            let (start, end) = (pool.start, pool.start + pool.len);
            let row_end = row.query_start + row.query_len;
            let is_inside = pool.len > 0 && row.query_start <= start && end <= row_end;
            ensure!(row.flags & PREFILL != 0 && row.slot == pool.slot && is_inside, "S12: a pool of {start}..{end}");
            ensure!(pool.len > 1 || end == row_end, "S18: a pool of one token, which is not row {after}'s last");
            ensure!(row.flags & SAMPLE == 0, "S18: row {} has a pool and draws a token", pool.row);
            has_wide |= pool.len > 1;
            if let Some(vector) = pool.vector {
                ensure!(vector == vectors, "S18: vector {vector} where {vectors} is next");
                vectors += 1;
            }
        }
        ensure!(vectors == plan.num_vectors, "num_vectors {} but {vectors}", plan.num_vectors);
        ensure!(has_wide == plan.has_wide_pools, "has_wide_pools {} but {has_wide}", plan.has_wide_pools);
        ensure!(!has_wide || plan.padded_rows == plan.num_rows, "padding in a step with wide pools");
        Ok(())
    }

    /// Prompt targets: a token of a prefill row has one at most, and no captured step has any.
    fn targets_are_prefill_tokens(&self, shape: &Shape, rows: &[Row]) -> Result<(), Violation> {
        let plan = &self.header;
        let has_any = !self.prompt_targets.is_empty();
        ensure!(has_any == plan.max_prompt_logprobs.is_some(), "max_prompt_logprobs {:?}", plan.max_prompt_logprobs);
        ensure!(!has_any || plan.padded_rows == plan.num_rows, "padding in a step with prompt targets");
        let mut after = 0;
        for &(place, target) in &self.prompt_targets {
            ensure!(target < shape.vocab_size, "S12: prompt target {target}");
            ensure!(place >= after, "S16: the prompt target behind token {place} comes twice, or out of order");
            after = place + 1;
            let is_in = |row: &&Row| (row.query_start..row.query_start + row.query_len).contains(&place);
            let is_prefill = rows.iter().find(is_in).is_some_and(|row| row.flags & PREFILL != 0);
            ensure!(is_prefill, "S12: a prompt target behind token {place}, which no prefill row has");
        }
        Ok(())
    }
}
