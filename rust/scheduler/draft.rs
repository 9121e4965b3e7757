//! Drafts for the step being planned: foretold at each commit, verified as far as it pays.
//!
//! What comes next can be foretold only of a sequence whose last token is known here, so with drafts
//! of the core one step is in flight and not two: the next is planned when the one before has been
//! committed. That costs the device a pause a step, which the controller sees in the steps' times.
//! Where a model on the device makes the drafts, it finds the last token there, and two steps are in
//! flight as ever.

use super::{Scheduler, Step};

impl Scheduler {
    /// Gives the decode rows of the step being planned the drafts that pay. True where some would,
    /// but first the steps in flight must be committed.
    pub(super) fn plan_drafts(&mut self) -> bool {
        let Some(speculator) = &mut self.speculator else { return false };
        for number in &self.running {
            let sequence = &mut self.sequences[*number]; // it may have had no blocks in the step before
            sequence.drafts.clear();
            sequence.follow_len = 0;
        }
        // Drafts take blocks that others may be counting on, if only for a step.
        let scarce = self.kv.pool().num_free() < 2 * self.running.len() * self.config.num_groups();
        if scarce {
            return false;
        }
        let max_model_len = self.config.max_model_len;
        let on_device = speculator.config.method.is_on_device();
        let controller = &mut speculator.controller;
        controller.open();
        for number in &self.running {
            let sequence = &self.sequences[*number];
            if !sequence.wants_decode(max_model_len) {
                continue;
            }
            let left = sequence.max_tokens - sequence.outputs.len() as u32 - sequence.pending - 1;
            // The masks of a bounded row follow its drafts, so the core must know them.
            let unknown = on_device && sequence.traits.has_grammar;
            let to_follow = sequence.to_follow(&self.kv);
            let takes_none =
                unknown || to_follow.is_none() || sequence.below_min_tokens() || sequence.traits.ends_unasked;
            let room = if takes_none { 0 } else { left.min(max_model_len - sequence.most_len - 1) };
            let chances = sequence.drafter.iter().flat_map(|drafter| drafter.chances(room as usize));
            controller.offer(chances, to_follow.unwrap_or(0), room);
        }
        let chosen = if speculator.config.adaptive { controller.choose(self.next_step) } else { controller.all() };
        let Some((lens, hoped)) = chosen else { return false };
        self.hoped = self.hoped.max(hoped);
        if !self.in_flight.is_empty() && !on_device {
            return true;
        }
        let mut lens = lens.iter();
        // What the model that drafts computes before it does is bounded as a step is.
        let mut tokens_left = self.config.max_num_batched_tokens;
        for number in &self.running {
            let sequence = &mut self.sequences[*number];
            if !sequence.wants_decode(max_model_len) {
                continue;
            }
            let len = *lens.next().expect("each was offered");
            let Some(drafter) = sequence.drafter.as_ref().filter(|_| len > 0) else { continue };
            sequence.follow_len = sequence.unfollowed.min(tokens_left);
            tokens_left -= sequence.follow_len;
            if sequence.follow_len == sequence.unfollowed {
                sequence.drafts.extend_from_slice(drafter.foretold(len as usize));
            } // else it goes on from there in the next step
        }
        false
    }

    /// Step `step_id`, which is in flight, spent so long on making drafts, and before on following the
    /// target: the controller holds that against them. Of another step nothing is noted.
    pub fn note_drafting(&mut self, step_id: u64, drafting: f64, following: f64) {
        let closing = self.speculator.as_ref().map_or(0, |speculator| speculator.controller.closing_passes());
        if let Some(step) = self.in_flight.iter_mut().find(|step| step.id == step_id) {
            (step.draft_seconds, step.follow_seconds) = (drafting.max(0.0), following.max(0.0));
            self.stats.draft_nanoseconds += ((step.draft_seconds + step.follow_seconds) * 1e9) as u64;
            let most = step.most_drafts();
            self.stats.draft_passes += if most > 0 && drafting > 0.0 { u64::from(most + closing) } else { 0 };
        }
    }

    /// The sequence has `count` new tokens, and goes on: what comes next is foretold.
    pub(super) fn foretell(&mut self, number: u32, count: usize) {
        let Some(speculator) = &self.speculator else { return };
        let sequence = &mut self.sequences[number];
        if !sequence.decoding {
            return;
        }
        let reads_text = !speculator.config.method.is_on_device();
        if let Some(drafter) = &mut sequence.drafter {
            if reads_text {
                drafter.follow(&sequence.outputs[sequence.outputs.len() - count..]);
            }
        } else {
            let drafter = sequence.drafter.insert(Box::new(speculator.new_drafter(sequence.root)));
            if reads_text {
                drafter.read(&sequence.prompt);
                drafter.read(&sequence.outputs);
            }
        }
        if let Some(drafter) = &mut sequence.drafter {
            speculator.foretell(drafter);
        }
    }

    /// A decode row has been committed: so many of its drafts were right, and became output.
    pub(super) fn count_drafts(&mut self, number: u32, num_drafts: u32, num_accepted: u32) {
        if let Some(speculator) = self.speculator.as_mut().filter(|one| one.config.method.is_on_device()) {
            if let Some(drafter) = &mut self.sequences[number].drafter {
                speculator.tested(drafter, num_drafts, num_accepted);
            }
        }
        if num_drafts == 0 {
            return;
        }
        self.stats.drafted_rows += 1;
        self.stats.draft_tokens += u64::from(num_drafts);
        self.stats.accepted_tokens += u64::from(num_accepted);
        self.accepted_in_step += num_accepted;
        for count in &mut self.accepted_by_place[..num_accepted as usize] {
            *count += 1;
        }
        let progress = &mut self.requests[self.sequences[number].request].progress;
        progress.num_accepted_tokens += num_accepted;
        progress.num_rejected_tokens += num_drafts - num_accepted;
    }

    /// A step of decodes has been committed. It has taken from the commit before it until now, what
    /// the host does between two steps included, or from its plan if nobody ran before. One that was
    /// held back for drafts and got none is of neither kind: it would make steps with few drafts look
    /// as short as itself. That its hopes came to nothing is noted.
    pub(super) fn measure_step(&mut self, step: &Step) {
        let accepted = std::mem::take(&mut self.accepted_in_step);
        if let (Some(speculator), true) = (&mut self.speculator, step.decode_tokens > 0) {
            let began = self.busy_since.unwrap_or(step.planned_at);
            let has_drafts = step.decode_tokens > step.rows.len() as u32;
            let seconds = self.now - began;
            let (rows, controller) = (step.rows.len() as u32, &mut speculator.controller);
            let (drafting, following) = (step.draft_seconds.min(seconds), step.follow_seconds.min(seconds));
            if has_drafts || step.hoped == 0.0 {
                let own = (seconds - drafting - following).max(0.0);
                controller.measured(step.decode_tokens, has_drafts, own, step.id);
            }
            controller.drafted(rows, step.most_drafts(), drafting, step.id);
            controller.followed(rows, step.follow_tokens, following);
            controller.came_to(step.hoped, accepted);
        }
        self.busy_since = (!self.running.is_empty()).then_some(self.now);
    }
}
