//! A device that executes packed plans on the hash model: block tables, KV pool and per-slot state
//! as docs/plan.md gives them.
//!
//! It reads nothing but the plan's bytes, so it is a second reading of the format, and it trusts
//! nothing: every index is checked (S12), and each block remembers which request wrote and read it
//! in which step, which shows
//!
//! * S5: a block written by one row and touched by another in the same step, or by another request
//!   in a step in flight;
//! * S6: a block read before the step that wrote it was fenced, by any request but the writer;
//! * S7: a block handed to a new owner while a step that touches it is still in flight;
//! * reads through table entries that this request was never given, and reads of the null block.
//!
//! What these checks miss, the hashes catch: see `model.rs`.

use crate::model::{
    attend, bias_term, first_visible, hidden, kv_value, logprob, mix2, penalty_term, vector, Logits, Sampling,
    VECTOR_SIZE,
};
use crate::packed::{
    ensure, Follow, Header, Row, Shape, View, Violation, LOGPROBS, PADDING, PENALTIES, PREFILL, SAMPLE,
};
use std::collections::BTreeMap;
use std::ops::Range;

const STATUS_OK: u32 = 0;
const STATUS_NAN: u32 = 1;
const STATUS_ALL_MASKED: u32 = 2;
const STATUS_NOT_SAMPLED: u32 = 3;

/// A table entry that the slot's present request was never given.
const UNSET: u32 = u32::MAX;
/// Whose keys and values: an index of `pools`.
const TARGET: usize = 0;
const DRAFT: usize = 1;
/// The model that drafts says something else than the target would once in so many drafts.
const DRAFTS_A_SLIP: u64 = 6;
/// Several requests touched the block in this step.
const MANY: u64 = u64::MAX;

/// What goes wrong in a step, by the world's choice.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// The step dies midway: what it would have written is garbage, and there is no result.
    pub lost: bool,
    /// Rows (by index) whose logits are NaN.
    pub nan_rows: Vec<u32>,
}

/// The grammar masks of a step.
#[derive(Default)]
pub struct Masks {
    pub words: Vec<u32>,
    pub width: usize,
}

impl Masks {
    fn row(&self, row: u32) -> Result<&[u32], Violation> {
        let words = self.words.get(row as usize * self.width..(row as usize + 1) * self.width);
        words.filter(|words| !words.is_empty()).ok_or(format!("S12: mask row {row}, which nobody made"))
    }
}

/// A use of a block: in which step, by which occupant of a slot.
#[derive(Clone, Copy, Default)]
struct Touch {
    step: u64,
    occupant: u64,
}

/// State of one request slot.
struct Slot {
    /// `[groups][max_blocks]`
    tables: Vec<Vec<u32>>,
    last_token: u32,
    computed_len: u32,
    output_index: u32,
    sampling: Sampling,
    num_logprobs: i32,
    /// Token to (times output, in the prompt).
    penalty_counts: BTreeMap<u32, (u32, bool)>,
    /// Sum of the hidden states that are part of an embedding, and how many they are.
    pooled: (u64, u32),
    /// Counts `enters`; tells the requests that held this slot apart. 0: none yet.
    occupant: u64,
    /// A step of its present request was lost, NaN or masked out: the request ends there. Until
    /// the core knows, rows in flight run one position too early, and touch what may be given back
    /// already. That is no broken rule by itself: steps run in order, so a later owner writes after
    /// them; if they harm anybody's data, the hashes show it.
    is_doomed: bool,
}

pub struct Device {
    shape: Shape,
    /// `[num_blocks * block_size]`; a block belongs to one group at a time, so one word a slot
    /// serves all groups. The target's, and where a model drafts, that model's beside it.
    pools: Vec<Vec<u64>>,
    written: Vec<Touch>,
    read: Vec<Touch>,
    slots: Vec<Slot>,
    /// Number of the step being executed; the core counts from 1.
    step: u64,
    /// All steps up to this one are fenced.
    fenced: u64,
    /// Steps after `fenced` that were settled before their turn.
    settled: Vec<u64>,
    /// Blocks that the last step wrote and read.
    touched: (Vec<u32>, Vec<u32>),
    /// Hidden states of the step's tokens; 0 for those of padding.
    states: Vec<u64>,
    occupants: u64,
    noise: u64,
}

/// The outcome of one row, before it is packed.
struct Drawn {
    status: u32,
    /// (token, logprob)
    tokens: Vec<(u32, f32)>,
}

impl Device {
    pub fn new(shape: Shape, seed: u64) -> Self {
        let max_blocks = shape.max_positions().div_ceil(shape.block_size) as usize;
        let slots = (0..=shape.max_num_seqs)
            .map(|_| Slot {
                tables: vec![vec![UNSET; max_blocks]; shape.windows.len()],
                last_token: 0,
                computed_len: 0,
                output_index: 0,
                sampling: Sampling {
                    temperature: 0.0,
                    top_k: 0,
                    top_p: 1.0,
                    min_p: 0.0,
                    penalties: [1.0, 0.0, 0.0],
                    seed: 0,
                },
                num_logprobs: -1,
                penalty_counts: BTreeMap::new(),
                pooled: (mix2(seed, 1), 1),
                occupant: 0,
                is_doomed: false,
            })
            .collect();
        let num_blocks = shape.num_blocks as usize;
        let mut device = Device {
            pools: vec![vec![0; num_blocks * shape.block_size as usize]; 1 + usize::from(shape.drafts_itself)],
            written: vec![Touch::default(); num_blocks],
            read: vec![Touch::default(); num_blocks],
            slots,
            shape,
            step: 0,
            fenced: 0,
            settled: Vec::new(),
            touched: (Vec::new(), Vec::new()),
            states: Vec::new(),
            occupants: 0,
            noise: seed,
        };
        (0..device.shape.num_blocks).for_each(|block| device.poison(block));
        device
    }

    /// Overwrites a block with random values; a block that changes hands holds garbage in between.
    fn poison(&mut self, block: u32) {
        let (start, len) = (self.first_slot(block), self.shape.block_size as usize);
        for slot in start..start + len {
            for pool in &mut self.pools {
                self.noise = mix2(self.noise, slot as u64);
                pool[slot] = self.noise;
            }
        }
    }

    /// Step `step` has completed, or failed: once all steps before it have too, its effects are
    /// settled.
    pub fn fence(&mut self, step: u64) {
        self.settled.push(step);
        while let Some(place) = self.settled.iter().position(|&settled| settled == self.fenced + 1) {
            self.settled.swap_remove(place);
            self.fenced += 1;
        }
    }

    /// Blocks that the last executed step wrote, and those that it read.
    pub fn touched_blocks(&self) -> (&[u32], &[u32]) {
        (&self.touched.0, &self.touched.1)
    }

    /// Runs one step and returns its packed result: `padded_rows` records of `result_width` words,
    /// then one a prompt target, then the vectors. `masks`: the step's grammar masks.
    pub fn execute(&mut self, bytes: &[u8], faults: &Faults, masks: &Masks) -> Result<Vec<u32>, Violation> {
        self.step += 1;
        let view = View::new(bytes)?;
        let plan = &view.header;
        ensure!(plan.step_id == self.step, "step {} is planned after step {}", plan.step_id, self.step - 1);
        self.touched.0.clear();
        self.touched.1.clear();
        let rows = view.rows(&self.shape)?;
        self.poison_new_blocks(&view)?;
        self.apply_copies(&view)?;
        self.apply_enters(&view)?;
        self.apply_blocks(&view)?;
        self.record_copies(&view)?;
        let width = plan.result_width as usize;
        let mut result = vec![0xdead_beef; plan.padded_rows as usize * width];
        self.states.clear();
        for follow in &view.follows {
            self.follow(follow, faults)?;
        }
        for (index, row) in rows.iter().enumerate() {
            let drawn = self.run_row(&view, index, row, faults, masks)?;
            self.states.resize((row.query_start + row.query_len) as usize, 0);
            pack(plan, row, &drawn, self.shape.vocab_size, &mut result[index * width..(index + 1) * width]);
        }
        for &(place, target) in &view.prompt_targets {
            let logprob = logprob(self.states[place as usize], target);
            let top = plan.max_prompt_logprobs.unwrap_or(0);
            result.extend([logprob.to_bits(), target % 5 + 1]);
            result.extend((0..top).map(|top| (target + top) % self.shape.vocab_size));
            result.extend((0..top).map(|top| (logprob - top as f32).to_bits()));
        }
        for pool in &view.pools {
            let pooled = &mut self.slots[pool.slot as usize].pooled;
            if pool.begins {
                *pooled = (0, 0);
            }
            for place in pool.start..pool.start + pool.len {
                *pooled = (pooled.0.wrapping_add(self.states[place as usize]), pooled.1 + 1);
            }
            if pool.vector.is_some() {
                ensure!(pool.count == pooled.1, "S18: {} tokens make a vector of {}", pooled.1, pool.count);
                ensure!(plan.vector_size == VECTOR_SIZE, "vectors of {} numbers", plan.vector_size);
                let is_nan = faults.nan_rows.contains(&pool.row);
                result
                    .extend(vector(pooled.0, pooled.1).map(|number| if is_nan { f32::NAN } else { number }.to_bits()));
            }
        }
        Ok(result)
    }

    fn first_slot(&self, block: u32) -> usize {
        block as usize * self.shape.block_size as usize
    }

    /// A block that comes to be written holds garbage until it is: what it held before is nobody's
    /// business.
    fn poison_new_blocks(&mut self, view: &View) -> Result<(), Violation> {
        for words in view.blocks.chunks_exact(4) {
            ensure!(words[1] < self.shape.max_num_seqs, "S12: blocks: slot {}", words[1]);
            ensure!(words[3] < self.shape.num_blocks, "S12: blocks: block {}", words[3]);
            let enter = view.enters.chunks_exact(16).find(|enter| enter[0] == words[1]);
            let computed = enter.map_or(self.slots[words[1] as usize].computed_len, |enter| enter[1]);
            if u64::from(words[2] + 1) * u64::from(self.shape.block_size) > u64::from(computed) {
                self.poison(words[3]);
            }
        }
        Ok(())
    }

    fn apply_copies(&mut self, view: &View) -> Result<(), Violation> {
        for pair in view.copies.chunks_exact(2) {
            for &block in pair {
                ensure!(block > 0 && block < self.shape.num_blocks, "S12: copy names block {block}");
            }
            let (source, target) = (self.first_slot(pair[0]), self.first_slot(pair[1]));
            for pool in &mut self.pools {
                pool.copy_within(source..source + self.shape.block_size as usize, target);
            }
        }
        Ok(())
    }

    fn apply_enters(&mut self, view: &View) -> Result<(), Violation> {
        for words in view.enters.chunks_exact(16) {
            let slot = words[0];
            ensure!(slot < self.shape.max_num_seqs, "S12: enters slot {slot}");
            ensure!(words[1] < self.shape.max_model_len, "S12: enters with computed_len {}", words[1]);
            let (start, len) = (words[13] as usize, words[14] as usize);
            let penalties = view.penalty_tokens.get(start * 2..(start + len) * 2).unwrap_or_default();
            ensure!(penalties.len() == len * 2, "S12: slot {slot}: penalty range {start} + {len}");
            self.occupants += 1;
            let state = &mut self.slots[slot as usize];
            state.tables.iter_mut().for_each(|table| table.fill(UNSET));
            state.occupant = self.occupants;
            state.is_doomed = false;
            state.computed_len = words[1];
            state.output_index = words[2];
            state.sampling = Sampling {
                temperature: f32::from_bits(words[3]),
                top_k: words[4],
                top_p: f32::from_bits(words[5]),
                min_p: f32::from_bits(words[6]),
                penalties: [7, 8, 9].map(|word| f32::from_bits(words[word])),
                seed: u64::from(words[10]) | u64::from(words[11]) << 32,
            };
            state.num_logprobs = words[12] as i32;
            state.penalty_counts.clear();
            for pair in penalties.chunks_exact(2) {
                ensure!(pair[0] < self.shape.vocab_size, "S12: penalty token {}", pair[0]);
                let earlier = state.penalty_counts.insert(pair[0], (pair[1] >> 1, pair[1] & 1 == 1));
                ensure!(earlier.is_none(), "slot {slot}: penalty token {} listed twice", pair[0]);
            }
        }
        Ok(())
    }

    fn apply_blocks(&mut self, view: &View) -> Result<(), Violation> {
        for words in view.blocks.chunks_exact(4) {
            let &[group, slot, index, block] = words else { unreachable!("chunks of four") };
            ensure!((group as usize) < self.shape.windows.len(), "S12: blocks: group {group}");
            ensure!(slot < self.shape.max_num_seqs, "S12: blocks: slot {slot}");
            ensure!(block < self.shape.num_blocks, "S12: blocks: block {block}");
            let state = &mut self.slots[slot as usize];
            ensure!(state.occupant > 0, "blocks for slot {slot}, which nobody entered");
            let table = &mut state.tables[group as usize];
            ensure!((index as usize) < table.len(), "S12: blocks: index {index} of slot {slot}");
            table[index as usize] = block;
        }
        Ok(())
    }

    /// A copy reads its source for the source's owner and writes its target for the request that
    /// was given it.
    fn record_copies(&mut self, view: &View) -> Result<(), Violation> {
        for pair in view.copies.chunks_exact(2) {
            let (source, target) = (pair[0] as usize, pair[1] as usize);
            let given = view.blocks.chunks_exact(4).find(|words| words[3] == pair[1]);
            let Some(given) = given else { return Err(format!("copy into block {target}, which no slot is given")) };
            let occupant = self.slots[given[1] as usize].occupant;
            self.record_write(pair[1], occupant)?;
            self.read[source] = Touch { step: self.step, occupant: self.written[source].occupant };
        }
        Ok(())
    }

    /// Runs the tokens of one row in order, and draws.
    fn run_row(
        &mut self,
        view: &View,
        index: usize,
        row: &Row,
        faults: &Faults,
        masks: &Masks,
    ) -> Result<Drawn, Violation> {
        if row.flags & PADDING != 0 {
            self.poison(0);
            return Ok(Drawn { status: STATUS_NOT_SAMPLED, tokens: Vec::new() });
        }
        let slot = row.slot as usize;
        ensure!(self.slots[slot].occupant > 0, "row {index}: nobody entered slot {slot}");
        ensure!(
            row.flags & LOGPROBS == 0 || self.slots[slot].num_logprobs >= 0,
            "slot {slot}: LOGPROBS, though it entered without"
        );
        let asks_more = row.flags & (LOGPROBS | PENALTIES) != 0 || row.bias_len > 0 || row.first_mask.is_some();
        let is_greedy = self.slots[slot].sampling.temperature == 0.0 && !asks_more;
        ensure!(
            !view.header.all_greedy || row.flags & SAMPLE == 0 || is_greedy,
            "row {index}: the plan says all_greedy, but slot {slot} is not"
        );
        let start = self.slots[slot].computed_len;
        let end = start + row.query_len;
        ensure!(
            end <= self.shape.max_positions(),
            "S12: slot {slot}: position {} of {}",
            end - 1,
            self.shape.max_positions()
        );
        let bound = view.header.max_seq_len;
        ensure!(end <= bound, "slot {slot}: {end} tokens over the plan's max_seq_len {bound}");

        let (proposed, num_right) = if self.shape.drafts_itself { self.propose(row, faults)? } else { (Vec::new(), 0) };
        let tokens = self.row_tokens(view, index, row, &proposed)?;
        let mut states = Vec::with_capacity(tokens.len());
        for (position, &token) in (start..).zip(&tokens) {
            ensure!(token < self.shape.vocab_size, "S12: slot {slot}: token {token} at position {position}");
            states.push(self.run_token(TARGET, slot, token, position, faults.lost)?);
        }

        self.states.extend_from_slice(&states);
        let is_nan = faults.nan_rows.contains(&(index as u32));
        let drawn = if row.flags & SAMPLE == 0 {
            Drawn { status: STATUS_NOT_SAMPLED, tokens: Vec::new() }
        } else if is_nan || faults.lost {
            Drawn { status: STATUS_NAN, tokens: Vec::new() }
        } else {
            self.draw(view, row, &tokens, &states, masks)?
        };
        // The twin knows neither bias nor penalties.
        let is_plain = row.bias_len == 0 && row.flags & PENALTIES == 0 && !self.slots[slot].is_doomed;
        if row.num_drafts > 0 && self.shape.drafts_itself && is_plain && drawn.status == STATUS_OK {
            let accepted = drawn.tokens.len() - 1;
            ensure!(
                accepted == num_right,
                "slot {slot}: {accepted} drafts are right, of a twin whose first {num_right} are"
            );
        }
        let state = &mut self.slots[slot];
        state.is_doomed |= is_nan || faults.lost || drawn.status == STATUS_ALL_MASKED && drawn.tokens.is_empty();
        state.computed_len += if row.flags & PREFILL != 0 { row.query_len } else { drawn.tokens.len() as u32 };
        state.output_index += drawn.tokens.len() as u32;
        if let Some(&(token, _)) = drawn.tokens.last() {
            state.last_token = token;
        }
        Ok(drawn)
    }

    /// Token ids of a row: from the plan for a prefill, from the slot and the drafts for a decode.
    /// proposed: stands for those of the plan where a model on the device drafts.
    fn row_tokens(&self, view: &View, index: usize, row: &Row, proposed: &[u32]) -> Result<Vec<u32>, Violation> {
        if row.flags & PREFILL != 0 {
            let start = (row.query_start - view.header.num_decode_tokens) as usize;
            return Ok(view.prefill_tokens[start..start + row.query_len as usize].to_vec());
        }
        let mut tokens = vec![self.slots[row.slot as usize].last_token];
        let places = view.drafts_of(index, row)?;
        if self.shape.drafts_itself {
            ensure!(places.iter().all(|&token| token == 0), "row {index}: drafts of the core's own");
            tokens.extend_from_slice(proposed);
        } else {
            tokens.extend_from_slice(places);
        }
        Ok(tokens)
    }

    /// The model that drafts for a row: a twin of the target over keys and values of its own, which
    /// says something else now and then. Its drafts, and how many before the first such slip: that many
    /// are right, if it has followed every token that the target has computed.
    fn propose(&mut self, row: &Row, faults: &Faults) -> Result<(Vec<u32>, usize), Violation> {
        let slot = row.slot as usize;
        let start = self.slots[slot].computed_len;
        let (mut token, mut num_right, mut slipped) = (self.slots[slot].last_token, 0, false);
        let mut drafts = Vec::new();
        for place in 0..row.num_drafts {
            let state = self.run_token(DRAFT, slot, token, start + place, faults.lost)?;
            let own = &self.slots[slot];
            let (sampling, output_index) = (&own.sampling, own.output_index + place);
            let logits = Logits { state, extras: 0, sampling, output_index, vocab_size: self.shape.vocab_size };
            token = logits.draw(|_| false).unwrap_or(0);
            self.noise = mix2(self.noise, u64::from(token));
            if self.noise.is_multiple_of(DRAFTS_A_SLIP) {
                token = (token + 1) % self.shape.vocab_size;
                slipped = true;
            }
            num_right += usize::from(!slipped);
            drafts.push(token);
        }
        if row.num_drafts > 0 {
            self.run_token(DRAFT, slot, token, start + row.num_drafts, faults.lost)?;
            // for the next step's drafts
        }
        Ok((drafts, num_right))
    }

    /// The model that drafts computes tokens that its target has computed without it.
    fn follow(&mut self, follow: &Follow, faults: &Faults) -> Result<(), Violation> {
        let slot = follow.slot as usize;
        ensure!(follow.slot < self.shape.max_num_seqs && self.slots[slot].occupant > 0, "S12: slot {slot} follows");
        for (position, &token) in (follow.start..).zip(&follow.tokens) {
            ensure!(token < self.shape.vocab_size, "S12: slot {slot} follows token {token} at {position}");
            ensure!(position < self.shape.max_positions(), "S12: slot {slot} follows position {position}");
            self.run_token(DRAFT, slot, token, position, faults.lost)?;
        }
        Ok(())
    }

    /// Writes a token's KV slots and returns its hidden state after attention over the slots, its
    /// own included.
    fn run_token(
        &mut self,
        whose: usize,
        slot: usize,
        token: u32,
        position: u32,
        is_lost: bool,
    ) -> Result<u64, Violation> {
        let num_groups = self.shape.windows.len();
        let mut sums = [0u64; 8];
        let sums = &mut sums[..num_groups];
        for (group, sum) in sums.iter_mut().enumerate() {
            let first = first_visible(position, self.shape.windows[group]);
            *sum = self.attend_range(whose, slot, group, first..position)?;
        }
        let state = hidden(token, position, sums);
        for (group, sum) in sums.iter_mut().enumerate() {
            let block = self.block_at(slot, group, position)?;
            if !self.slots[slot].is_doomed {
                // Of a block that several share the model that drafts may write its part: the same for all.
                if whose == DRAFT {
                    self.record_read(block, self.slots[slot].occupant)?;
                } else {
                    self.record_write(block, self.slots[slot].occupant)?;
                }
            }
            let target = self.first_slot(block) + (position % self.shape.block_size) as usize;
            let value = if is_lost { mix2(self.noise, state) } else { kv_value(state, group) };
            self.pools[whose][target] = value;
            *sum = attend(*sum, position, value);
        }
        Ok(hidden(0, position, sums))
    }

    /// Sum of the attention reads of some positions of a group, through the block table.
    fn attend_range(&mut self, whose: usize, slot: usize, group: usize, range: Range<u32>) -> Result<u64, Violation> {
        let block_size = self.shape.block_size;
        let (mut sum, mut position, to) = (0, range.start, range.end);
        while position < to {
            let block = self.block_at(slot, group, position)?;
            if !self.slots[slot].is_doomed {
                self.record_read(block, self.slots[slot].occupant)?;
            }
            let end = to.min((position / block_size + 1) * block_size);
            let first = self.first_slot(block);
            for at in position..end {
                sum = attend(sum, at, self.pools[whose][first + (at % block_size) as usize]);
            }
            position = end;
        }
        Ok(sum)
    }

    fn block_at(&self, slot: usize, group: usize, position: u32) -> Result<u32, Violation> {
        let block = self.slots[slot].tables[group][(position / self.shape.block_size) as usize];
        ensure!(block != UNSET, "S11: slot {slot}, group {group}: no block for position {position}");
        ensure!(block != 0, "S12: slot {slot}, group {group}: position {position} is in the null block");
        Ok(block)
    }

    fn record_read(&mut self, block: u32, occupant: u64) -> Result<(), Violation> {
        let written = self.written[block as usize];
        ensure!(
            written.step <= self.fenced || written.occupant == occupant,
            "S6: block {block} is read by another request before step {} that wrote it is fenced",
            written.step
        );
        let read = &mut self.read[block as usize];
        if read.step != self.step {
            self.touched.1.push(block);
        }
        let is_shared = read.step == self.step && read.occupant != occupant;
        *read = Touch { step: self.step, occupant: if is_shared { MANY } else { occupant } };
        Ok(())
    }

    fn record_write(&mut self, block: u32, occupant: u64) -> Result<(), Violation> {
        for (touch, verb) in [(self.read[block as usize], "read"), (self.written[block as usize], "written")] {
            ensure!(
                touch.occupant == occupant || touch.step <= self.fenced,
                "{}: block {block} is written while another request's step {} in flight has {verb} it (this is step {})",
                if touch.step == self.step { "S5" } else { "S7" },
                touch.step,
                self.step
            );
        }
        let written = &mut self.written[block as usize];
        if written.step != self.step {
            self.touched.0.push(block);
        }
        *written = Touch { step: self.step, occupant };
        Ok(())
    }

    /// Draws a row's tokens: one, and one more for each draft that equals the token drawn before
    /// it.
    fn draw(
        &mut self,
        view: &View,
        row: &Row,
        tokens: &[u32],
        states: &[u64],
        masks: &Masks,
    ) -> Result<Drawn, Violation> {
        let (start, len) = (row.bias_start as usize, row.bias_len as usize);
        let biases: Vec<(u32, f32)> = view.bias[start * 2..(start + len) * 2]
            .chunks_exact(2)
            .map(|pair| (pair[0], f32::from_bits(pair[1])))
            .collect();
        ensure!(biases.iter().all(|&(token, _)| token < self.shape.vocab_size), "S12: bias token");
        let is_banned = |token: u32| biases.contains(&(token, f32::NEG_INFINITY));
        let bias_sum = biases
            .iter()
            .filter(|(_, bias)| *bias != f32::NEG_INFINITY)
            .fold(0u64, |sum, &(token, bias)| sum.wrapping_add(bias_term(token, bias)));

        let first_place = if row.flags & PREFILL != 0 { row.query_len as usize - 1 } else { 0 };
        let last = first_place + row.num_drafts as usize;
        let state = &mut self.slots[row.slot as usize];
        let mut drawn = Drawn { status: STATUS_OK, tokens: Vec::new() };
        for place in first_place..=last {
            let mut extras = bias_sum;
            if row.flags & PENALTIES != 0 {
                for (&token, &(times, in_prompt)) in &state.penalty_counts {
                    extras = extras.wrapping_add(penalty_term(token, times, in_prompt));
                }
            }
            let logits = Logits {
                state: states[place],
                extras,
                sampling: &state.sampling,
                output_index: state.output_index + (place - first_place) as u32,
                vocab_size: self.shape.vocab_size,
            };
            let mask = row.first_mask.map(|first| masks.row(first + (place - first_place) as u32)).transpose()?;
            let is_masked = |token: u32| mask.is_some_and(|words| words[token as usize / 32] >> (token % 32) & 1 == 0);
            let Some(token) = logits.draw(|token| is_banned(token) || is_masked(token)) else {
                drawn.status = STATUS_ALL_MASKED;
                break;
            };
            drawn.tokens.push((token, logits.logprob(token)));
            if state.sampling.has_penalties() {
                state.penalty_counts.entry(token).or_default().0 += 1;
            }
            if place < last && tokens[place + 1] != token {
                break;
            }
        }
        Ok(drawn)
    }
}

/// Writes a row's record of the result.
fn pack(plan: &Header, row: &Row, drawn: &Drawn, vocab_size: u32, record: &mut [u32]) {
    let query = plan.decode_query_len.max(1) as usize;
    record[0] = drawn.status;
    record[1] = drawn.tokens.len() as u32;
    for (place, &(token, _)) in drawn.tokens.iter().enumerate() {
        record[2 + place] = token;
    }
    let Some(num_top) = plan.max_logprobs.map(|top| top as usize).filter(|_| row.flags & LOGPROBS != 0) else {
        return;
    };
    for (place, &(token, logprob)) in drawn.tokens.iter().enumerate() {
        record[2 + query + place] = logprob.to_bits();
        record[2 + 2 * query + place] = token % 5 + 1;
        for top in 0..num_top {
            let at = 2 + 3 * query + place * num_top + top;
            record[at] = (token + top as u32) % vocab_size;
            record[at + query * num_top] = (logprob - top as f32).to_bits();
        }
    }
}
