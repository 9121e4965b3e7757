//! A step is planned: rows for running sequences, oldest first, then admissions; then it is written
//! down.

use std::ops::Range;

use super::budget::PromptBudget;
use super::masks::MaskedRow;
use super::{PlannedRow, Scheduler, State, Step, StepRow, Targets, MAX_STEPS_IN_FLIGHT};
use crate::error::Error;
use crate::plan::{BlockEntry, Enter, PlanInfo, Pool, Row, ROW_LOGPROBS, ROW_PENALTIES, ROW_PREFILL};
use crate::request::PoolingKind;

/// What came of asking for blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Blocks {
    /// They are free.
    Granted,
    /// They will be, once a step in flight is committed: no row in this step.
    Later,
    /// The sequence that asked has been preempted itself, being the last.
    Preempted,
}

impl Scheduler {
    /// Plans a step into `plan`, or returns None where nothing can run before a commit, an arrival
    /// or a later `now`.
    ///
    /// # Errors
    /// [`Error::StepOrder`] while two steps are in flight, [`Error::BufferTooSmall`] where `plan`
    /// has fewer than [`Self::plan_bytes`] bytes; nothing changes then.
    pub fn schedule(&mut self, plan: &mut [u8], now: f64) -> Result<Option<PlanInfo>, Error> {
        if self.in_flight.len() == MAX_STEPS_IN_FLIGHT {
            return Err(Error::StepOrder { step_id: self.next_step, reason: "two steps are in flight already" });
        }
        if plan.len() < self.plan_bytes() {
            return Err(Error::BufferTooSmall { what: "plan", len: plan.len(), needed: self.plan_bytes() });
        }
        self.now = self.clock(now);
        if self.plan_drafts() {
            return Ok(None);
        }
        self.open_batch();
        let planned = &mut self.planned;
        planned.decodes.clear();
        planned.prefills.clear();
        planned.copies.clear();
        planned.num_decode_tokens = 0;
        planned.longest_decode = 1;
        planned.budget = self.config.max_num_batched_tokens;
        planned.entered_blocks = self.capacity.entered_blocks;
        planned.penalty_tokens = self.capacity.penalty_tokens;
        planned.preempted = false;
        planned.admits_before = None;
        self.make_way();
        let has_prompts = self.plan_running();
        self.admit();
        if has_prompts && self.planned.budget > 0 && !self.planned.preempted {
            self.spend_the_rest();
        }
        if has_prompts && self.planned.decodes.is_empty() && self.planned.prefills.is_empty() {
            // Those for whom tokens were set aside cannot join, as `admit` has found, and to get on takes
            // preempting. Where they can once a step in flight is committed, nobody takes their tokens.
            self.plan_running();
        }
        if self.planned.decodes.is_empty() && self.planned.prefills.is_empty() {
            return Ok(None);
        }
        Ok(Some(self.write(plan)))
    }

    /// Gives each running sequence a row, oldest first. Decode rows have their tokens set aside
    /// before prompts share the rest, so a long prompt does not hold up the others' next tokens.
    /// Says whether any of them computes a prompt.
    fn plan_running(&mut self) -> bool {
        let max_model_len = self.config.max_model_len;
        let running = self.running.iter().map(|number| &self.sequences[*number]);
        let (mut decode_tokens, mut has_prompts) = (0, false);
        for sequence in running {
            has_prompts |= !sequence.decoding;
            if sequence.wants_decode(max_model_len) {
                decode_tokens += sequence.decode_len(max_model_len);
            }
        }
        let mut prompts = self.share(self.planned.budget - decode_tokens, has_prompts);
        // What an older one leaves to a better rank that waits is not for those behind it either.
        let mut set_aside = 0;

        let mut place = 0;
        while let Some(number) = self.running.get(place).copied() {
            let sequence = &self.sequences[number];
            let is_prompt = !sequence.decoding;
            let len = if sequence.decoding {
                if sequence.wants_decode(max_model_len) {
                    sequence.decode_len(max_model_len)
                } else {
                    0
                }
            } else {
                set_aside = self.wanted_before(number, prompts.short + prompts.long).max(set_aside);
                self.chunk_len(number, prompts, set_aside)
            };
            if len == 0 {
                place += 1;
                continue;
            }
            let sequence = &mut self.sequences[number];
            let least = sequence.least_touched();
            self.kv.release_outside_window(&mut sequence.tables, least, sequence.last_step);
            let len = if is_prompt { self.fit_chunk(number, len) } else { len };
            let start = self.sequences[number].most_len;
            let is_long = is_prompt && self.is_long(number);
            match self.secure(place, start + len) {
                Blocks::Granted => {
                    self.extend(number, start + len);
                    self.push_row(number, start, len);
                    if is_prompt {
                        let part = if is_long { &mut prompts.long } else { &mut prompts.short };
                        *part -= len;
                    }
                    self.planned.budget -= len;
                    place += 1;
                }
                Blocks::Later => place += 1,
                Blocks::Preempted => {}
            }
        }
        self.planned.for_short = if prompts.has_long { prompts.short } else { 0 };
        has_prompts
    }

    /// What was set aside for prompts that could not join after all goes to those that run, as far
    /// as free blocks do.
    fn spend_the_rest(&mut self) {
        for place in 0..self.running.len() {
            let number = self.running[place];
            if self.sequences[number].decoding {
                continue;
            }
            let row = self.planned.prefills.iter().position(|row| row.sequence == number);
            let planned = row.map_or(0, |row| self.planned.prefills[row].len);
            let sequence = &self.sequences[number];
            let start = row.map_or(sequence.most_len, |row| self.planned.prefills[row].start);
            let covered = self.kv.coverable(&sequence.tables, self.kv.pool().num_free());
            let more = (sequence.known_len().min(covered) - start - planned).min(self.planned.budget);
            if more == 0 {
                continue;
            }
            self.extend(number, start + planned + more);
            self.planned.budget -= more;
            match row {
                None => self.push_row(number, start, more),
                Some(row) => {
                    let row = &mut self.planned.prefills[row];
                    row.len += more;
                    row.sample = row.start + row.len == self.sequences[number].known_len();
                }
            }
        }
    }

    /// Whether a running sequence has much left to compute.
    fn is_long(&self, number: u32) -> bool {
        let sequence = &self.sequences[number];
        sequence.known_len() - sequence.most_len > self.long_above()
    }

    /// Tokens of a prompt that are computed in this step, as far as the budget goes, but for those
    /// that are set aside for others.
    fn chunk_len(&self, number: u32, prompts: PromptBudget, set_aside: u32) -> u32 {
        let sequence = &self.sequences[number];
        let part = if self.is_long(number) { prompts.long } else { prompts.short };
        let left = (prompts.short + prompts.long).saturating_sub(set_aside);
        (sequence.known_len() - sequence.most_len).min(part).min(left)
    }

    fn push_row(&mut self, number: u32, start: u32, len: u32) {
        let sequence = &self.sequences[number];
        let sample = sequence.decoding || start + len == sequence.known_len();
        let row = PlannedRow { sequence: number, start, len, sample, enters: false };
        if sequence.decoding {
            self.planned.decodes.push(row);
            self.planned.num_decode_tokens += len;
            self.planned.longest_decode = self.planned.longest_decode.max(len);
        } else {
            self.planned.prefills.push(row);
        }
    }

    /// Shortens a chunk to what free blocks can take; where they can take none of it, to what one
    /// more block of each group can.
    fn fit_chunk(&self, number: u32, len: u32) -> u32 {
        let sequence = &self.sequences[number];
        let free = self.kv.pool().num_free();
        let coverable = |blocks| self.kv.coverable(&sequence.tables, blocks) - sequence.most_len;
        match coverable(free) {
            0 => len.min(coverable(sequence.tables.len())),
            room => len.min(room),
        }
    }

    /// Sees to it that the running sequence at `place` can get blocks for `len` tokens, by
    /// preempting from the end: L3.
    ///
    /// What a victim gives back may be held until a step in flight is committed. That counts as
    /// enough: preempting more would free nothing sooner.
    fn secure(&mut self, place: usize, len: u32) -> Blocks {
        let number = self.running[place];
        if len <= self.sequences[number].covered_len {
            return Blocks::Granted;
        }
        let missing = self.kv.missing(&self.sequences[number].tables, len);
        loop {
            if missing <= self.kv.pool().num_free() {
                return Blocks::Granted;
            }
            if missing <= self.kv.pool().num_free() + self.kv.pool().num_held() {
                return Blocks::Later;
            }
            self.preempt_last();
            if self.running.get(place) != Some(&number) {
                return Blocks::Preempted;
            }
        }
    }

    /// Sends the last running sequence back into the queue; it will be computed again.
    pub(super) fn preempt_last(&mut self) {
        let number = self.running.pop().expect("whoever preempts runs itself");
        self.give_back(number);
        self.tell_preemption(number);
        let sequence = &mut self.sequences[number];
        sequence.preemptions += 1;
        self.requests[sequence.request].progress.num_preemptions += 1;
        (sequence.computed_len, sequence.least_len, sequence.most_len) = (0, 0, 0);
        sequence.num_registered = 0;
        self.planned.preempted = true;
        self.stats.preemptions += 1;
        self.make_ready(number);
    }

    /// Writes the plan and notes the step as in flight.
    fn write(&mut self, plan: &mut [u8]) -> PlanInfo {
        let planned = std::mem::take(&mut self.planned);
        let mut step = self.spare_steps.pop().unwrap_or_default();
        self.writer.clear();
        let num_decodes = planned.decodes.len() as u32;
        let padding = self.padding(&planned);
        let mut info = PlanInfo {
            step_id: self.next_step,
            num_rows: num_decodes + planned.prefills.len() as u32,
            num_decodes,
            padded_decodes: num_decodes + padding.decode_rows,
            decode_query_len: planned.longest_decode,
            all_greedy: true,
            vector_size: self.config.vector_size,
            ..PlanInfo::default()
        };
        step.id = info.step_id;
        step.planned_at = self.now;
        step.hoped = std::mem::take(&mut self.hoped);
        (step.draft_seconds, step.follow_seconds) = (0.0, 0.0);
        step.decode_tokens = if planned.prefills.is_empty() { planned.num_decode_tokens } else { 0 };
        step.failed = false;
        step.rows.clear();
        step.masked.clear();
        for (source, destination) in &planned.copies {
            self.writer.push_copy(*source, *destination);
        }
        for row in &planned.decodes {
            self.write_row(row, false, &mut info, &mut step);
        }
        for row in 0..padding.decode_rows {
            self.write_decode_padding(padding.decode_row_len(row), &mut info);
        }
        info.num_decode_tokens = info.num_tokens;
        for row in &planned.prefills {
            self.write_row(row, true, &mut info, &mut step);
        }
        for row in 0..padding.prefill_rows {
            self.write_prefill_padding(padding.prefill_row_len(row), &mut info);
        }
        self.planned = planned;
        self.writer.finish(plan, &mut info).expect("the buffer has plan_bytes, and no plan is larger");
        step.layout = Some(info.result_layout());
        step.targets = info.target_layout();
        step.num_targets = info.num_prompt_targets as usize;
        step.vectors = info.vector_layout();
        step.num_vectors = info.num_vectors as usize;
        step.follow_tokens = info.num_follow_tokens;
        step.num_records = info.padded_rows as usize;
        (step.num_decodes, step.padded_decodes) = (num_decodes as usize, info.padded_decodes as usize);
        self.in_flight.push_back(step);
        self.next_step += 1;
        info
    }

    /// Places in the prompt of the tokens whose log probabilities a row brings: those that stand
    /// behind its own tokens, as far as they were not told before a preemption.
    pub(super) fn prompt_targets(&self, row: &PlannedRow) -> Range<u32> {
        let sequence = &self.sequences[row.sequence];
        if !sequence.traits.wants_prompt {
            return 0..0;
        }
        let end = (row.start + row.len + 1).min(sequence.prompt.len() as u32);
        self.requests[sequence.request].prompt_asked.max(row.start + 1)..end
    }

    /// Places in the sequence of the row's tokens whose hidden states are part of an embedding.
    pub(super) fn pooled(&self, row: &PlannedRow) -> Range<u32> {
        let end = row.start + row.len;
        match self.sequences[row.sequence].traits.pooling.map(|pooling| pooling.kind) {
            Some(PoolingKind::Mean) => row.start..end,
            Some(PoolingKind::Last) if row.sample => end - 1..end,
            _ => 0..0,
        }
    }

    /// Names the row's part of an embedding, and returns which vector it completes.
    fn write_pool(&mut self, row: &PlannedRow, info: &mut PlanInfo) -> Option<u32> {
        let pooled = self.pooled(row);
        if pooled.is_empty() {
            return None;
        }
        let sequence = &self.sequences[row.sequence];
        let is_mean = sequence.traits.pooling.is_some_and(|pooling| pooling.kind == PoolingKind::Mean);
        let vector = row.sample.then_some(info.num_vectors);
        info.num_vectors += u32::from(row.sample);
        info.has_wide_pools |= pooled.len() > 1;
        self.writer.push_pool(&Pool {
            slot: sequence.slot,
            row: self.writer.num_rows(),
            start: info.num_tokens + pooled.start - row.start,
            len: pooled.len() as u32,
            begins: !is_mean || pooled.start == 0,
            count: if is_mean { sequence.prompt.len() as u32 } else { 1 },
            vector,
        });
        vector
    }

    fn write_row(&mut self, row: &PlannedRow, prefill: bool, info: &mut PlanInfo, step: &mut Step) {
        if row.enters {
            self.write_enter(row);
        }
        let vector = self.write_pool(row, info);
        self.write_follow(row, prefill);
        let wanted = self.prompt_targets(row);
        let sequence = &mut self.sequences[row.sequence];
        let (mut flags, mut num_drafts, mut mask_row) = (0, 0, None);
        let mut targets = Targets::default();
        if prefill {
            flags |= ROW_PREFILL;
            if !wanted.is_empty() {
                targets =
                    Targets { record: self.writer.num_prompt_targets(), first: wanted.start, len: wanted.len() as u32 };
                for place in wanted.clone() {
                    let before = info.num_tokens + place - 1 - row.start;
                    self.writer.push_prompt_target(before, sequence.prompt[place as usize]);
                }
                info.max_prompt_logprobs = info.max_prompt_logprobs.max(sequence.params.prompt_logprobs);
                self.requests[sequence.request].prompt_asked = wanted.end;
            }
            let writer = &mut self.writer;
            sequence.with_tokens(row.start as usize, (row.start + row.len) as usize, |tokens| {
                writer.push_prefill_tokens(tokens);
            });
        } else {
            num_drafts = row.len - 1;
            self.writer.push_drafts(&sequence.drafts[..num_drafts as usize]);
        }
        let bias_start = self.writer.num_bias();
        if row.sample {
            let traits = sequence.traits;
            flags |= traits.row_flags;
            if flags & ROW_LOGPROBS > 0 {
                info.max_logprobs = info.max_logprobs.max(sequence.params.logprobs);
            }
            info.has_penalties |= flags & ROW_PENALTIES > 0;
            if traits.has_bias {
                for (token, value) in &sequence.params.logit_bias {
                    self.writer.push_bias(*token, *value);
                }
            }
            if sequence.below_min_tokens() {
                let eos: &[u32] = if traits.ignore_eos { &[] } else { &self.config.eos_token_ids };
                for token in eos.iter().chain(&sequence.params.stop_token_ids) {
                    self.writer.push_bias(*token, f32::NEG_INFINITY);
                }
            }
            if traits.has_grammar {
                mask_row = Some(info.num_mask_rows);
                info.num_mask_rows += 1 + num_drafts;
                let drafts = sequence.drafts[..num_drafts as usize].to_vec();
                step.masked.push(MaskedRow {
                    row: step.rows.len(),
                    mask_row: info.num_mask_rows - 1 - num_drafts,
                    drafts,
                });
            }
            let has_bias = self.writer.num_bias() > bias_start;
            let asks_more = flags & (ROW_LOGPROBS | ROW_PENALTIES) > 0 || has_bias || traits.has_grammar;
            info.all_greedy &= traits.greedy && !asks_more;
        }
        if std::mem::take(&mut sequence.has_unsent) {
            for (group, table) in (0..).zip(&mut sequence.tables) {
                for (index, block) in table.take_unsent() {
                    self.writer.push_block(&BlockEntry { group, slot: sequence.slot, index: index as u32, block });
                }
            }
        }
        self.writer.push_row(&Row {
            slot: sequence.slot,
            query_start: info.num_tokens,
            query_len: row.len,
            flags,
            num_drafts,
            mask_row,
            bias: (bias_start, self.writer.num_bias() - bias_start),
        });
        info.num_tokens += row.len;
        info.max_query_len = info.max_query_len.max(row.len);
        info.max_seq_len = info.max_seq_len.max(row.start + row.len);

        // From here on the sequence counts the row as run; the commit corrects what drafts leave
        // open.
        sequence.least_len += if prefill { row.len } else { 1 };
        sequence.most_len += row.len;
        sequence.pending += u32::from(row.sample);
        sequence.decoding |= row.sample;
        sequence.in_flight += 1;
        sequence.last_step = step.id;
        sequence.drafts.clear();
        debug_assert_eq!(sequence.state, State::Running);
        step.rows.push(StepRow {
            sequence: row.sequence,
            run: sequence.run,
            len: row.len,
            num_drafts,
            targets,
            vector,
            unfollowed: sequence.unfollowed,
            prefill,
            sample: row.sample,
        });
    }

    fn write_enter(&mut self, row: &PlannedRow) {
        let sequence = &self.sequences[row.sequence];
        let params = &sequence.params;
        let penalty_start = self.writer.num_penalty_tokens();
        if params.has_penalties() {
            // By token: 2 x times output + 1 if the prompt holds it.
            let counts = &mut self.penalty_scratch;
            counts.clear();
            for token in &sequence.outputs {
                *counts.entry(*token).or_default() += 2;
            }
            for token in sequence.prompt.iter() {
                *counts.entry(*token).or_default() |= 1;
            }
            for (token, seen) in counts {
                self.writer.push_penalty_token(*token, *seen / 2, *seen % 2 == 1);
            }
        }
        self.writer.push_enter(&Enter {
            slot: sequence.slot,
            computed_len: row.start,
            output_index: sequence.outputs.len() as u32,
            temperature: params.temperature,
            top_k: if params.top_k < self.config.vocab_size { params.top_k } else { 0 },
            top_p: params.top_p,
            min_p: params.min_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            seed: sequence.seed,
            num_logprobs: params.logprobs,
            penalty: (penalty_start, self.writer.num_penalty_tokens() - penalty_start),
        });
    }
}
