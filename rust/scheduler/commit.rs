//! A step or a request ends: tokens are appended, stop rules applied, blocks registered and given
//! back.

use super::{Scheduler, Sequence, State, Step, StepRow};
use crate::error::Error;
use crate::output::{FinishReason, OutputSink, PromptToken, SampledToken, SequenceError};
use crate::plan::{RowResult, ROW_LOGPROBS, STATUS_MASKED, STATUS_NAN, STATUS_OK};
use crate::request::RequestId;
use crate::timeline::Event;

impl Scheduler {
    /// Takes the result of the oldest step in flight.
    ///
    /// # Errors
    /// [`Error::StepOrder`] where `step_id` is not that step, [`Error::BufferTooSmall`]; nothing
    /// changes then.
    pub fn commit(&mut self, step_id: u64, result: &[u8], now: f64, sink: &mut impl OutputSink) -> Result<(), Error> {
        let Some(step) = self.in_flight.front().filter(|step| step.id == step_id) else {
            return Err(Error::StepOrder { step_id, reason: "it is not the oldest step in flight" });
        };
        let layout = step.layout.expect("a step in flight has been written");
        let rows = layout.bytes(step.num_records);
        let needed = rows.max(step.targets.end(step.num_targets)).max(step.vectors.end(step.num_vectors));
        if result.len() < needed {
            return Err(Error::BufferTooSmall { what: "result", len: result.len(), needed });
        }
        self.now = self.clock(now);
        let step = self.in_flight.pop_front().expect("it was looked at above");
        self.fence(step.id);
        for (index, row) in step.rows.iter().enumerate() {
            let told = self.tell_prompt(&step, row, result, sink);
            let told = told.and_then(|()| self.tell_vector(&step, row, result, sink));
            self.commit_row(row, step.planned_at, &layout.row(result, step.record_of(index)), told, sink);
        }
        self.retire_failed();
        self.drop_left_running();
        self.measure_step(&step);
        self.spare_steps.push(step);
        Ok(())
    }

    /// A step in flight (either of them) did not run: every request with a row in it ends with
    /// [`SequenceError::StepFailed`], and the step counts as committed as soon as those before it
    /// are.
    ///
    /// # Errors
    /// [`Error::StepOrder`] where `step_id` is not in flight.
    pub fn fail_step(&mut self, step_id: u64, sink: &mut impl OutputSink) -> Result<(), Error> {
        let Some(step) = self.in_flight.iter_mut().find(|step| step.id == step_id && !step.failed) else {
            return Err(Error::StepOrder { step_id, reason: "it is not in flight" });
        };
        step.failed = true;
        let rows = std::mem::take(&mut step.rows);
        step.masked.clear();
        for row in &rows {
            let request = self.sequences[row.sequence].request;
            if self.sequences[row.sequence].state != State::Finished {
                self.end_request(request, FinishReason::Error(SequenceError::StepFailed), sink);
            }
        }
        self.drop_left_running();
        for row in &rows {
            self.leave_step(row);
        }
        self.doubt_followed();
        self.retire_failed();
        Ok(())
    }

    /// Ends every request with [`SequenceError::StepFailed`], and takes all steps in flight as
    /// committed: nothing runs any more.
    pub fn fail_all(&mut self, sink: &mut impl OutputSink) {
        let mut requests: Vec<(RequestId, u32)> = self.by_id.iter().map(|(id, request)| (*id, *request)).collect();
        requests.sort_unstable();
        for (_, request) in requests {
            self.end_request(request, FinishReason::Error(SequenceError::StepFailed), sink);
        }
        self.drop_left_running();
        self.doubt_followed();
        while let Some(step) = self.in_flight.pop_front() {
            self.fence(step.id);
            for row in &step.rows {
                self.leave_step(row);
            }
            self.spare_steps.push(step);
        }
    }

    /// Ends a request in any state; each sequence that has not finished is told to the sink with
    /// [`FinishReason::Abort`]. Unknown ids are counted and otherwise ignored.
    pub fn abort(&mut self, id: RequestId, sink: &mut impl OutputSink) {
        if let Some(request) = self.by_id.get(&id).copied() {
            self.end_request(request, FinishReason::Abort, sink);
            self.drop_left_running();
        } else {
            self.stats.unknown_aborts += 1;
        }
    }

    /// Step `step` has been committed: what was held for it is free.
    fn fence(&mut self, step: u64) {
        self.committed_step = step;
        self.stats.steps += 1;
        self.kv.fence(step);
        self.free_slots.append(&mut self.held_slots[(step % 2) as usize]);
    }

    /// Failed steps count as committed once they are the oldest.
    fn retire_failed(&mut self) {
        while self.in_flight.front().is_some_and(|step| step.failed) {
            let step = self.in_flight.pop_front().expect("it was looked at");
            self.fence(step.id);
            self.spare_steps.push(step);
        }
    }

    /// A row of the sequence is no longer in flight.
    fn leave_step(&mut self, row: &StepRow) {
        let sequence = &mut self.sequences[row.sequence];
        sequence.in_flight -= 1;
        sequence.pending -= u32::from(row.sample);
        if sequence.state == State::Finished && sequence.in_flight == 0 {
            self.sequences.remove(row.sequence);
        }
    }

    /// Tells the log probabilities of the prompt tokens that the row was asked for. Also where the
    /// sequence was preempted meanwhile: nobody asks for them again.
    fn tell_prompt(
        &self,
        step: &Step,
        row: &StepRow,
        result: &[u8],
        sink: &mut impl OutputSink,
    ) -> Result<(), SequenceError> {
        let sequence = &self.sequences[row.sequence];
        let Some(wanted) = sequence.params.prompt_logprobs.filter(|_| row.targets.len > 0) else { return Ok(()) };
        if sequence.state == State::Finished {
            return Ok(());
        }
        for number in 0..row.targets.len {
            let logprobs = step.targets.logprobs(result, (row.targets.record + number) as usize).limited(wanted);
            if logprobs.logprob().is_nan() {
                return Err(SequenceError::Numerical);
            }
            let place = row.targets.first + number;
            let token = PromptToken { id: sequence.prompt[place as usize], place, logprobs };
            sink.on_prompt_token(sequence.name.request, &token);
        }
        Ok(())
    }

    /// Tells the embedding that the row completes, which then ends its request. Also where the
    /// sequence was preempted meanwhile: it is complete.
    fn tell_vector(
        &mut self,
        step: &Step,
        row: &StepRow,
        result: &[u8],
        sink: &mut impl OutputSink,
    ) -> Result<Option<FinishReason>, SequenceError> {
        let sequence = &self.sequences[row.sequence];
        let Some(vector) = row.vector.filter(|_| sequence.state != State::Finished) else { return Ok(None) };
        self.vector_scratch.clear();
        self.vector_scratch.extend(step.vectors.vector(result, vector as usize));
        if !self.vector_scratch.iter().all(|number| number.is_finite()) {
            return Err(SequenceError::Numerical);
        }
        let progress = &mut self.requests[sequence.request].progress;
        (progress.first_token, progress.last_token) = (self.now, self.now); // when all of its output came
        sink.on_vector(sequence.name.request, &self.vector_scratch);
        Ok(Some(FinishReason::Pooled))
    }

    /// told: what came of telling the prompt's log probabilities and its embedding.
    fn commit_row(
        &mut self,
        row: &StepRow,
        planned_at: f64,
        result: &RowResult<'_>,
        told: Result<Option<FinishReason>, SequenceError>,
        sink: &mut impl OutputSink,
    ) {
        let finished = self.sequences[row.sequence].state == State::Finished;
        self.leave_step(row);
        if finished {
            return;
        }
        let status = match result.status() {
            _ if told.is_err() => told.map(|_| 0),
            _ if !row.sample || row.vector.is_some() => Ok(0), // it draws nothing
            STATUS_NAN => Err(SequenceError::Numerical),
            // Behind a draft that ends its grammar there is nothing to draw; what came before holds.
            STATUS_MASKED if (1..=row.num_drafts).contains(&result.num_valid()) => Ok(result.num_valid()),
            STATUS_MASKED => Err(SequenceError::AllMasked),
            STATUS_OK if (1..=1 + row.num_drafts).contains(&result.num_valid()) => Ok(result.num_valid()),
            _ => Err(SequenceError::BadResult),
        };
        let num_valid = match status {
            Ok(num_valid) => num_valid,
            Err(error) => {
                self.release_choices(row.sequence);
                self.finish(row.sequence, FinishReason::Error(error), sink);
                return;
            }
        };
        if row.prefill {
            self.stats.computed_prompt_tokens += u64::from(row.len);
        }
        let sequence = &mut self.sequences[row.sequence];
        // Rows from before a preemption still bring their token, but its blocks are gone.
        let still_there = sequence.state == State::Running && sequence.run == row.run;
        if still_there {
            if row.prefill {
                sequence.computed_len += row.len;
            } else {
                sequence.computed_len += num_valid;
                sequence.least_len += num_valid - 1;
                sequence.most_len -= row.len - num_valid;
            }
        }
        let before = sequence.outputs.len();
        let (mut finish, mut appended) = (told.ok().flatten(), 0);
        while appended < num_valid && finish.is_none() {
            finish = self.append(row.sequence, result, appended as usize, sink);
            appended += 1;
        }
        self.tell_row(row, planned_at, before);
        self.count_drafts(row.sequence, row.num_drafts, appended.min(num_valid.saturating_sub(1)));
        if still_there {
            self.register_filled(row.sequence);
            self.note_followed(row);
            if row.sample && finish.is_none() {
                self.foretell(row.sequence, appended as usize);
            }
        }
        if row.sample {
            self.release_choices(row.sequence);
        }
        if row.prefill && self.sequences[row.sequence].traits.has_choices {
            self.nothing_fits = None; // the other choices may share its blocks
        }
        if let Some(reason) = finish {
            self.finish(row.sequence, reason, sink);
        }
    }

    /// Notes for the sequence's story what a row brought behind the `before` tokens that were out.
    fn tell_row(&mut self, row: &StepRow, planned_at: f64, before: usize) {
        let sequence = &mut self.sequences[row.sequence];
        let drawn = (sequence.outputs.len() - before) as u32;
        if row.prefill {
            let event = Event::Computed { from: planned_at, until: self.now, tokens: row.len, drawn };
            self.tell(row.sequence, event);
            return;
        }
        let spell = &mut sequence.spell;
        if spell.steps == 0 {
            spell.since = planned_at;
        }
        spell.steps += 1;
        spell.tokens += drawn;
        spell.until = self.now;
    }

    /// Appends a token and says whether it ends the sequence.
    fn append(
        &mut self,
        number: u32,
        result: &RowResult<'_>,
        index: usize,
        sink: &mut impl OutputSink,
    ) -> Option<FinishReason> {
        let id = result.token(index);
        if id >= self.config.vocab_size {
            return Some(FinishReason::Error(SequenceError::BadResult));
        }
        let sequence = &mut self.sequences[number];
        let traits = sequence.traits;
        let output_index = sequence.outputs.len() as u32;
        sequence.outputs.push(id);
        let may_stop = output_index >= traits.min_tokens;
        let finish = if may_stop && !traits.ignore_eos && self.config.eos_token_ids.contains(&id) {
            Some(FinishReason::Eos)
        } else if may_stop && traits.has_stop_tokens && sequence.params.stop_token_ids.binary_search(&id).is_ok() {
            Some(FinishReason::StopToken(id))
        } else if output_index + 1 == sequence.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        };
        let super::Request { share, progress, .. } = &mut self.requests[sequence.request];
        self.ready.shares().charge_output(*share);
        if progress.num_output_tokens == 0 {
            progress.first_token = self.now;
        }
        progress.last_token = self.now;
        progress.num_output_tokens += 1;
        self.stats.generation_tokens += 1;
        let logprobs = if traits.row_flags & ROW_LOGPROBS > 0 {
            sequence.params.logprobs.and_then(|wanted| Some(result.logprobs(index)?.limited(wanted)))
        } else {
            None
        };
        let token = SampledToken { id, output_index, logprobs, finish };
        let finish = sink.on_token(sequence.name, &token, progress).map(FinishReason::StopString).or(finish);
        match finish {
            Some(FinishReason::Eos | FinishReason::StopToken(_) | FinishReason::StopString(_)) => {
                self.lengths.stopped(traits.ending, sequence.length_bin);
            }
            None if output_index + 1 == sequence.bin_end => {
                self.lengths.went_on(traits.ending, sequence.length_bin);
                sequence.length_bin += 1;
                sequence.bin_end = self.lengths.last_of(sequence.length_bin);
            }
            _ => {}
        }
        finish
    }

    /// Makes the blocks findable that the steps committed so far have filled with known tokens.
    fn register_filled(&mut self, number: u32) {
        let sequence = &mut self.sequences[number];
        let block_size = self.config.block_size as usize;
        let known = sequence.computed_len.min(sequence.known_len()) as usize;
        if known < (sequence.num_registered + 1) * block_size || !self.config.enable_prefix_caching {
            return;
        }
        let filled = known / block_size;
        sequence.hash_blocks(&self.hasher, block_size, filled, &mut self.token_scratch);
        let registered = std::mem::replace(&mut sequence.num_registered, filled);
        for index in registered..filled {
            let sequence = &self.sequences[number];
            let hash = sequence.hashes[index];
            self.kv.register(&sequence.tables, index, hash);
            // Who shares this block needs one less of its own now.
            let shares = |waiting: &u32| self.sequences[*waiting].hashes.get(index) == Some(&hash);
            if self.nothing_fits.is_some() && self.too_big.iter().any(shares) {
                self.nothing_fits = None;
            }
        }
    }

    /// The first choice has computed the prompt: the others may come.
    pub(super) fn release_choices(&mut self, number: u32) {
        let Sequence { request, traits, .. } = self.sequences[number];
        if !traits.has_choices || !std::mem::take(&mut self.requests[request].forming) {
            return;
        }
        for index in 1..self.requests[request].sequences.len() {
            let choice = self.requests[request].sequences[index];
            self.make_ready(choice);
        }
    }

    /// Notes a length at which a sequence stopped by itself.
    pub(super) fn lengths_stopped(&mut self, number: u32) {
        let sequence = &self.sequences[number];
        self.lengths.stopped(sequence.traits.ending, sequence.length_bin);
    }

    fn end_request(&mut self, request: u32, reason: FinishReason, sink: &mut impl OutputSink) {
        let id = self.requests[request].id;
        for number in self.requests[request].sequences.clone() {
            let sequence = self.sequences.get(number).filter(|sequence| sequence.name.request == id);
            if sequence.is_some_and(|sequence| sequence.state != State::Finished) {
                self.finish(number, reason, sink);
            }
        }
    }

    /// Ends one sequence, and its request with the last one. It stays in `running` until
    /// [`drop_left_running`](Self::drop_left_running).
    pub(super) fn finish(&mut self, number: u32, reason: FinishReason, sink: &mut impl OutputSink) {
        let sequence = &mut self.sequences[number];
        let (state, order, request, name) = (sequence.state, sequence.order, sequence.request, sequence.name);
        self.tell_decoded(number);
        match state {
            State::Forming | State::Behind => self.tell_waiting(number),
            State::Waiting => {
                let queued = self.ready.remove(order) || self.gated.remove(order);
                assert!(queued, "sequence {name:?} waits in no queue");
                self.tell_waiting(number);
                self.nothing_fits = None;
            }
            State::Running => {
                self.give_back(number);
                self.left_running = true;
            }
            State::Finished => unreachable!("sequence {name:?} finishes twice"),
        }
        self.tell(number, Event::Ended { at: self.now, reason });
        let sequence = &mut self.sequences[number];
        sequence.state = State::Finished;
        let in_flight = sequence.in_flight;
        if let (
            Some(speculator),
            FinishReason::Eos | FinishReason::StopToken(_) | FinishReason::StopString(_) | FinishReason::Length,
        ) = (&mut self.speculator, reason)
        {
            speculator.remember(sequence.root, &sequence.outputs);
        }
        match reason {
            FinishReason::Eos
            | FinishReason::StopToken(_)
            | FinishReason::StopString(_)
            | FinishReason::Complete
            | FinishReason::Pooled => self.stats.finished_stop += 1,
            FinishReason::Length => self.stats.finished_length += 1,
            FinishReason::Abort => self.stats.finished_abort += 1,
            FinishReason::Error(_) => self.stats.finished_error += 1,
        }
        let entry = &mut self.requests[request];
        sink.on_finish(name, reason, &entry.progress);
        entry.unfinished -= 1;
        if entry.unfinished == 0 {
            self.num_queued -= usize::from(!entry.started);
            self.num_behind -= usize::from(state == State::Behind);
            self.batch_left -= usize::from(entry.in_batch);
            self.timeline.end(name.request, entry.progress);
            self.by_id.remove(&name.request);
            let behind = self.requests.remove(request).behind;
            self.next_of_call(behind);
        }
        if in_flight == 0 && state != State::Running {
            self.sequences.remove(number);
        }
    }

    /// Takes those that have finished out of `running`.
    pub(super) fn drop_left_running(&mut self) {
        if !std::mem::take(&mut self.left_running) {
            return;
        }
        let sequences = &mut self.sequences;
        self.running.retain(|number| {
            let sequence = &sequences[*number];
            let stays = sequence.state == State::Running;
            if !stays && sequence.in_flight == 0 {
                sequences.remove(*number);
            }
            stays
        });
    }
}
