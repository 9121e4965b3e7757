//! Drives the core and the device through a scenario as the engine would, and checks the rules
//! after every turn.
//!
//! A step is executed when it is planned, in the order of planning; its result is delivered when it
//! is committed. So the core sees what it would see of a real device: up to two steps in flight,
//! and no word of them until they are done. Where there are grammars it is executed when it is
//! settled, since its masks depend on the tokens of the step before.

use crate::checks::{calls_stand_in_turn, recount, step_blocks, Fairness};
use crate::device::{Device, Faults, Masks};
use crate::ledger::{Call, Ledger, PoolNeed};
use crate::model::mix;
use crate::packed::{ensure, Header, Shape, View, PADDING, PREFILL, SAMPLE};
use crate::scenario::{NewRequest, Scenario};
use crate::story::{self, Accounts};
use crate::trace::{Event, Totals};
use _core::config::{Batching, CoreConfig, DecodeShape, SchedulingPolicy};
use _core::error::Error;
use _core::inspect::Inspection;
use _core::output::{FinishReason, SequenceError};
use _core::request::{RequestId, SeqRef};
use _core::scheduler::Scheduler;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use rand::{Rng, SeedableRng};
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::VecDeque;
use std::sync::Arc;

/// A step that was planned and executed, and not yet delivered.
struct InFlight {
    step_id: u64,
    plan: Vec<u8>,
    faults: Faults,
    /// What the core said after it was planned.
    after: Inspection,
    /// None until it was executed.
    result: Option<Vec<u8>>,
    seqs: Vec<SeqRef>,
    planned_at: f64,
    rows: Vec<story::Row>,
    /// Of each row that draws a token: whose it is, and how many drafts it has.
    draws: Vec<(SeqRef, u64)>,
}

/// A row of a plan, by whose it is.
pub struct PlannedRow {
    pub seq: SeqRef,
    /// Its place among the rows.
    index: u32,
    pub query_len: u32,
    samples: bool,
    /// It completes an embedding.
    completes: bool,
    /// Of a decode row.
    drafts: Option<Vec<u32>>,
}

impl PlannedRow {
    /// Whether it computes prompt tokens.
    pub fn is_prompt(&self) -> bool {
        self.drafts.is_none()
    }
}

/// Whether admission can tell exactly what will be needed: each sequence has its own blocks, grows by
/// a token a step, and has its whole prompt in the next step or two.
fn foresees_exactly(config: &CoreConfig) -> bool {
    config.admits_by_growth
        && config.scheduling_policy == SchedulingPolicy::Fcfs
        && !config.enable_prefix_caching
        && config.num_draft_tokens == 0
        && config.max_num_batched_tokens >= config.max_num_seqs + 2 * config.max_model_len
}

pub struct World {
    scenario: Scenario,
    rng: StdRng,
    core: Scheduler,
    device: Device,
    shape: Shape,
    ledger: Ledger,
    fairness: Fairness,
    accounts: Accounts,
    in_flight: VecDeque<InFlight>,
    plan_bytes: Vec<u8>,
    now: f64,
    submitted: usize,
    /// Upper bound on the steps that all accepted requests can take, preemptions included.
    work: u64,
    unknown_aborts: u64,
    /// Committed rows that drew tokens for a sequence that had not ended, and their drafts.
    num_draws: u64,
    num_drafts: u64,
    /// Requests that have had a row.
    begun: FxHashSet<RequestId>,
    totals: Totals,
    trace: Vec<Event>,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let scenario = Scenario::new(seed);
        let core = Scheduler::new(scenario.config.clone()).expect("the scenario makes valid configurations");
        let config = core.config();
        let shape = Shape::of(config);
        World {
            rng: StdRng::seed_from_u64(mix(seed)),
            device: Device::new(shape.clone(), seed),
            shape,
            ledger: Ledger::new(config),
            fairness: Fairness::new(foresees_exactly(config)),
            accounts: Accounts::default(),
            in_flight: VecDeque::new(),
            plan_bytes: vec![0xee; core.plan_bytes()],
            now: 1000.0,
            submitted: 0,
            work: 0,
            unknown_aborts: 0,
            num_draws: 0,
            num_drafts: 0,
            begun: FxHashSet::default(),
            totals: Totals { worlds: 1, ..Totals::default() },
            trace: Vec::new(),
            core,
            scenario,
        }
    }

    /// What happened so far, without the world itself.
    pub fn totals(&self) -> Totals {
        let stats = self.core.stats();
        Totals {
            ended: self.ledger.num_ended,
            tokens: self.ledger.num_tokens,
            preemptions: stats.preemptions,
            cached_tokens: stats.prefix_cache_hits,
            ..self.totals.clone()
        }
    }

    /// Prints the scenario and the last events.
    pub fn print_trace(&self, last: usize) {
        println!("{:?}", self.scenario);
        for event in &self.trace[self.trace.len().saturating_sub(last)..] {
            println!("  {event:?}");
        }
    }

    /// Runs until every request has ended; the error says which rule was broken.
    pub fn run(&mut self) -> Result<(), String> {
        while self.submitted < self.scenario.num_requests || self.ledger.has_unfinished() || !self.in_flight.is_empty()
        {
            self.outside_events()?;
            let depth = if self.scenario.overlap { 2 } else { 1 };
            // A step that failed before its elder was committed still counts as in flight.
            let has_room = |world: &Self| world.core.stats().steps_in_flight < depth;
            let planned = has_room(self) && self.plan_step()?;
            let may_wait = planned && has_room(self);
            if !may_wait || !self.rng.random_bool(self.scenario.slow_executor) {
                self.settle_oldest()?;
            }
            self.check_state()?;
            if self.totals.steps % 64 == 9 {
                self.stories_hold()?;
            }
            if self.totals.steps > self.work + 100 {
                return Err(format!("L1, L3: no end after {} steps", self.totals.steps));
            }
        }
        self.check_end()
    }

    /// Arrivals, aborts, cache resets, jumps of the clock.
    fn outside_events(&mut self) -> Result<(), String> {
        self.now += 0.001;
        if self.rng.random_bool(self.scenario.clock_jump) {
            let jump = *[-1000.0, -0.5, 0.5, 1e6].iter().choose(&mut self.rng).expect("not empty");
            self.now += jump;
            self.trace.push(Event::Clock(jump));
        }
        let is_idle = !self.ledger.has_unfinished();
        if self.submitted < self.scenario.num_requests && (is_idle || self.rng.random_bool(self.scenario.arrival)) {
            for _ in 0..self.rng.random_range(1..=self.scenario.burst) {
                self.submit()?;
            }
        }
        if self.rng.random_bool(self.scenario.abort) {
            let unfinished = self.ledger.requests.iter().filter(|(_, request)| !request.has_ended());
            // By id, since the order of a hash map is not the seed's.
            let ids: Vec<RequestId> = unfinished.map(|(id, _)| *id).collect();
            if let Some(id) = ids.into_iter().choose(&mut self.rng) {
                self.abort(id)?;
            }
        }
        if self.rng.random_bool(self.scenario.unknown_abort) {
            // S15: ids never given, and ids that have ended.
            let ended = self.ledger.requests.iter().filter(|(_, request)| request.has_ended()).map(|(id, _)| *id).min();
            self.unknown_aborts += 1;
            self.abort(ended.unwrap_or(RequestId(u64::MAX)))?;
        }
        if self.rng.random_bool(self.scenario.cache_reset) {
            self.trace.push(Event::ResetCache);
            self.core.reset_prefix_cache();
        }
        if self.rng.random_bool(self.scenario.fail_all) {
            self.trace.push(Event::FailAll);
            for step in self.in_flight.iter().filter(|step| step.result.is_none()) {
                self.device.execute(&step.plan, &Faults { lost: true, ..Faults::default() }, &Masks::default())?;
            }
            self.ledger.call = Call::FailAll;
            self.core.fail_all(&mut self.ledger);
            for step in self.in_flight.drain(..) {
                self.device.fence(step.step_id);
            }
            self.told()?;
            self.stories_hold()?;
            if self.ledger.has_unfinished() {
                return Err("fail_all left a request without an end".to_string());
            }
        }
        Ok(())
    }

    fn submit(&mut self) -> Result<(), String> {
        let history = self.ledger.histories.iter().choose(&mut self.rng).map(Vec::as_slice);
        let call = self.scenario.new_call(&mut self.rng, history);
        self.submitted += call.len();
        self.totals.requests += call.len() as u64;
        let stats = self.core.stats();
        let prompts: Vec<Arc<[u32]>> = call.iter().map(|asked| Arc::from(asked.prompt.as_slice())).collect();
        let NewRequest { params, priority, salt, share, .. } = call[0].clone();
        match self.core.add_call_of(share, &prompts, params, priority, salt.as_deref(), self.now) {
            Ok(first) => {
                self.accounts.clock(self.now);
                for (id, asked) in (first.0..).map(RequestId).zip(call) {
                    self.accept(id, first, asked);
                }
                Ok(())
            }
            Err(error) => {
                self.totals.refused += call.len() as u64;
                let verdict = self.refusal_is_right(&call, &error, stats.num_queued);
                self.trace.push(Event::Refuse(error));
                verdict
            }
        }
    }

    fn accept(&mut self, id: RequestId, call: RequestId, asked: NewRequest) {
        self.trace.push(Event::Submit {
            id: id.0,
            call: call.0,
            prompt_len: asked.prompt.len(),
            n: asked.params.n,
            max_tokens: asked.params.max_tokens,
            priority: asked.priority,
        });
        let (config, stats) = (self.core.config(), self.core.stats());
        let tokens = asked.params.max_tokens.map_or(config.max_model_len, |max| max + asked.prompt.len() as u32);
        // The first that runs gets on, and whoever has k before it begins anew at most as often as
        // one of these comes before it.
        let before = stats.num_running + stats.num_waiting;
        self.work += u64::from(asked.params.n) * u64::from(tokens + 2) * (before + 2);
        let stop_string_at = self.scenario.stop_string_at(&mut self.rng, &asked.params);
        let params = &asked.params;
        let ends_at_max_tokens = params.grammar.is_none()
            && params.ignore_eos
            && params.stop_token_ids.is_empty()
            && stop_string_at.is_none();
        self.fairness.all_lengths_known &= ends_at_max_tokens && params.max_tokens.is_some() && params.n == 1;
        for index in 0..asked.params.n {
            self.accounts.came(SeqRef { request: id, index });
        }
        self.ledger.accept(id, call, asked, stop_string_at);
    }

    /// L2 from the other side: nothing is refused that could be served.
    fn refusal_is_right(&self, call: &[NewRequest], error: &Error, queued: u64) -> Result<(), String> {
        let config = self.core.config();
        let lens = call.iter().map(|asked| asked.prompt.len() + asked.params.max_tokens.unwrap_or(1) as usize);
        let longest = lens.max().expect("a call has a prompt");
        let is_right = match error {
            Error::PromptTooLong { .. } => longest > config.max_model_len as usize,
            Error::KvCapacity { .. } => config.pool_is_full_with(longest),
            Error::QueueFull { .. } => queued + call.len() as u64 > config.max_waiting as u64,
            Error::InvalidValue { field: "prompt", .. } => call.len() > config.max_waiting,
            _ => false,
        };
        if is_right {
            Ok(())
        } else {
            Err(format!("L2: refused {} prompts, {longest} tokens at most: {error}", call.len()))
        }
    }

    fn abort(&mut self, id: RequestId) -> Result<(), String> {
        self.trace.push(Event::Abort(id.0));
        self.ledger.call = Call::Abort(id);
        self.core.abort(id, &mut self.ledger);
        self.told()?;
        // L6: it is gone at once, and `recount` sees that its blocks are held no longer than the
        // steps in flight.
        let is_left = self.core.inspect().sequences.iter().any(|sequence| sequence.seq.request == id);
        match self.ledger.requests.get(&id) {
            Some(request) if is_left || !request.has_ended() => Err(format!("L6: request {} outlives its abort", id.0)),
            _ => Ok(()),
        }
    }

    /// Plans a step and lets the device run it. False where the core plans none.
    fn plan_step(&mut self) -> Result<bool, String> {
        let offered = self.offer_drafts()?;
        let before = self.core.inspect();
        let queues = self.queues(&before);
        let has_work = self.core.has_work(self.now);
        self.accounts.clock(self.now);
        let plan = self.core.schedule(&mut self.plan_bytes, self.now).map_err(|error| error.to_string())?;
        self.accounts.looked(self.core.config(), &before, &self.core.inspect());
        let Some(step_id) = plan.map(|plan| plan.step_id) else {
            self.trace.push(Event::NoPlan);
            self.fairness.preempted(&before, &self.core.inspect(), &self.core.stats())?;
            return self.nothing_to_do().map(|()| false);
        };
        if !has_work {
            return Err("has_work was false, but a step was planned".to_string());
        }
        let after = self.core.inspect();
        let view = View::new(&self.plan_bytes)?;
        let plan = &view.header;
        let rows = self.rows_of(&view, &after)?;
        self.drafts_are_the_rows_own(&rows, &offered, &after)?;
        self.padding_is_to_a_captured_size(plan)?;
        let faults = self.choose_faults(plan, &rows);
        let seqs: Vec<SeqRef> = rows.iter().map(|row| row.seq).collect();
        self.trace.push(Event::Plan {
            step_id,
            rows: rows.iter().map(|row| (row.seq.request.0, row.seq.index, row.query_len)).collect(),
            enters: plan.num_enters,
            copies: plan.num_copies,
            faults: faults.clone(),
        });
        let draws = rows.iter().filter(|row| row.samples && !faults.nan_rows.contains(&row.index));
        let draws = draws.map(|row| (row.seq, row.drafts.as_ref().map_or(0, Vec::len) as u64)).collect();
        self.begun.extend(seqs.iter().map(|seq| seq.request));
        self.totals.steps += 1;
        self.totals.copies += u64::from(plan.num_copies);
        self.totals.masks += u64::from(plan.num_mask_rows);
        self.in_flight.push_back(InFlight {
            step_id,
            plan: self.plan_bytes[..plan.num_bytes as usize].to_vec(),
            faults,
            after: after.clone(),
            result: None,
            seqs,
            planned_at: self.accounts.now,
            rows: rows.iter().map(|row| (row.seq, row.query_len, row.is_prompt())).collect(),
            draws,
        });
        if self.scenario.grammars == 0.0 {
            self.execute_up_to(self.in_flight.len() - 1)?;
        }
        self.fairness.preempted(&before, &after, &self.core.stats())?;
        self.fairness.step_planned(self.core.config(), &before, &after, &rows, &queues, plan)?;
        Ok(true)
    }

    /// In which queue each sequence stands, or would: 0 is everybody's, of those that have begun where
    /// there are others, one for each share.
    fn queues(&self, seen: &Inspection) -> FxHashMap<SeqRef, u32> {
        let is_continuous = self.core.config().batching == Batching::Continuous;
        let queue = |seq: SeqRef| match self.ledger.requests[&seq.request].asked.share {
            Some(share) if is_continuous && !self.begun.contains(&seq.request) => 1 + share.key,
            _ => 0,
        };
        seen.sequences.iter().map(|sequence| (sequence.seq, queue(sequence.seq))).collect()
    }

    /// Executes what has not been of the steps in flight up to the one at `last`.
    fn execute_up_to(&mut self, last: usize) -> Result<(), String> {
        for place in 0..=last {
            let step = &self.in_flight[place];
            if step.result.is_some() {
                continue;
            }
            let num_mask_rows = View::new(&step.plan)?.header.num_mask_rows as usize;
            let mut masks = Masks { words: Vec::new(), width: self.shape.vocab_size.div_ceil(32) as usize + 1 };
            if num_mask_rows > 0 && !step.faults.lost {
                // What nobody writes would allow everything.
                masks.words = vec![u32::MAX; num_mask_rows * masks.width];
                self.ledger.call = Call::Masks;
                let mut work = self.core.take_masks(step.step_id).map_err(|error| error.to_string())?;
                work.fill(&mut masks.words, masks.width);
                self.core.return_masks(work, &mut self.ledger);
                self.told()?;
            }
            let step = &mut self.in_flight[place];
            let result = self.device.execute(&step.plan, &step.faults, &masks)?;
            step.result = Some(result.iter().flat_map(|word| word.to_le_bytes()).collect());
            let (written, read) = self.device.touched_blocks();
            step_blocks(&step.after, written, read)?;
        }
        Ok(())
    }

    /// L1: with nothing in flight, no plan means no work, or a static batch that is still forming.
    fn nothing_to_do(&mut self) -> Result<(), String> {
        if !self.in_flight.is_empty() || !self.ledger.has_unfinished() {
            return Ok(());
        }
        match self.core.next_wake() {
            Some(wake) if self.core.config().batching == Batching::Static => {
                self.now = wake;
                if self.core.has_work(wake) {
                    Ok(())
                } else {
                    Err(format!("L1: the batch was to start at {wake}, but there is no work then"))
                }
            }
            wake => Err(format!("L1: requests wait, nothing runs, and no step is planned (next_wake {wake:?})")),
        }
    }

    /// The sequence of each row, padding left out, with its query length and flags.
    fn rows_of(&self, view: &View, after: &Inspection) -> Result<Vec<PlannedRow>, String> {
        let running = |slot| after.sequences.iter().find(|sequence| sequence.slot == Some(slot));
        let rows = view.rows(&self.shape)?;
        let real = (0..).zip(rows).filter(|(_, row)| row.flags & PADDING == 0);
        real.map(|(index, row)| {
            let owner = running(row.slot).ok_or(format!("row {index} is in slot {}, which nobody holds", row.slot))?;
            let samples = row.flags & SAMPLE != 0;
            let completes = view.pools.iter().any(|pool| pool.row == index && pool.vector.is_some());
            let is_decode = row.flags & PREFILL == 0;
            let drafts = if is_decode { Some(view.drafts_of(index as usize, &row)?.to_vec()) } else { None };
            Ok(PlannedRow { seq: owner.seq, index, query_len: row.query_len, samples, completes, drafts })
        })
        .collect()
    }

    /// A row carries what was offered for it, however many the others have: all of it, unless its
    /// sequence ends before, or must not stop yet. A wrong draft would cost nothing but its place,
    /// so the streams would not show it.
    fn drafts_are_the_rows_own(
        &self,
        rows: &[PlannedRow],
        offered: &FxHashMap<SeqRef, Vec<u32>>,
        after: &Inspection,
    ) -> Result<(), String> {
        if self.core.config().speculation.is_some() {
            return Ok(());
        }
        let is_full = |seq| {
            let planned = after.sequences.iter().find(|sequence| sequence.seq == seq).map(|view| view.num_planned);
            planned == Some(self.core.config().max_model_len)
        };
        for row in rows {
            let Some(drafts) = &row.drafts else { continue };
            let offered = offered.get(&row.seq).map_or(&[][..], Vec::as_slice);
            let params = &self.ledger.requests[&row.seq.request].asked.params;
            let may_stop = params.min_tokens == 0;
            let may_be_complete = params.grammar.is_some() && (params.ignore_eos || !self.core.config().has_ends());
            let is_whole = drafts.len() == offered.len() || !may_stop || may_be_complete || is_full(row.seq);
            if !offered.starts_with(drafts) || !is_whole {
                return Err(format!("{:?} was offered {offered:?}, its row has {drafts:?}", row.seq));
            }
        }
        Ok(())
    }

    fn padding_is_to_a_captured_size(&self, plan: &Header) -> Result<(), String> {
        let config = self.core.config();
        let has_prompts = plan.num_rows > plan.num_decodes;
        let (rows, tokens) = (plan.padded_decodes, plan.num_decode_tokens);
        let (sizes, shapes) = if has_prompts {
            (&config.prefill_graphs.decodes, &config.prefill_graphs.draft_decodes)
        } else {
            (&config.graph_sizes, &config.draft_graphs)
        };
        let decodes_fit = if plan.decode_query_len > 1 {
            shapes.contains(&DecodeShape { tokens, rows })
        } else {
            rows == tokens && sizes.contains(&rows)
        };
        let prompts_fit = !has_prompts
            || plan.padded_rows - rows == config.prefill_graphs.rows
                && config.prefill_graphs.tokens.contains(&plan.num_prefill_tokens);
        let is_padded = plan.padded_rows > plan.num_rows;
        ensure!(
            !is_padded || decodes_fit && prompts_fit,
            "padded to {rows} decode rows of {tokens} tokens and {} prompt tokens, which nobody captured",
            plan.num_prefill_tokens
        );
        Ok(())
    }

    fn choose_faults(&mut self, plan: &Header, rows: &[PlannedRow]) -> Faults {
        let mut faults = Faults { lost: self.rng.random_bool(self.scenario.step_failure), ..Faults::default() };
        if !faults.lost && self.rng.random_bool(self.scenario.nan) {
            if let Some(row) = rows.iter().filter(|row| row.samples || row.completes).choose(&mut self.rng) {
                faults.nan_rows.push(row.index);
                if let Some(choice) = self.ledger.choice(row.seq) {
                    choice.nan_in_step.get_or_insert(plan.step_id);
                }
            }
        }
        faults
    }

    /// Speculation: drafts that are right, wrong from some place on, or stale.
    fn offer_drafts(&mut self) -> Result<FxHashMap<SeqRef, Vec<u32>>, String> {
        let most = self.core.config().num_draft_tokens as usize;
        let mut offered = FxHashMap::default();
        if most == 0 || self.core.config().speculation.is_some() {
            return Ok(offered);
        }
        for sequence in self.core.inspect().sequences {
            let mut drafts: Vec<u32> = self.ledger.upcoming(sequence.seq).iter().take(most).copied().collect();
            if self.rng.random_bool(0.5) {
                drafts.truncate(self.rng.random_range(0..=most));
            }
            if let Some(draft) = drafts.iter_mut().choose(&mut self.rng).filter(|_| self.rng.random_bool(0.5)) {
                *draft = (*draft + 1) % self.core.config().vocab_size;
            }
            self.core.set_drafts(sequence.seq, &drafts).map_err(|error| error.to_string())?;
            offered.insert(sequence.seq, drafts);
        }
        Ok(offered)
    }

    /// Delivers the result of the oldest step, or its failure; a failure may also come before older
    /// results.
    fn settle_oldest(&mut self) -> Result<(), String> {
        let newest_is_lost = self.in_flight.back().is_some_and(|step| step.faults.lost);
        let Some(last) = self.in_flight.len().checked_sub(1) else { return Ok(()) };
        let place = if newest_is_lost && self.rng.random_bool(0.5) { last } else { 0 };
        self.execute_up_to(place)?;
        let step = self.in_flight.remove(place).expect("it is in flight");
        if step.faults.lost {
            self.trace.push(Event::Fail(step.step_id));
            // A sequence that had ended before has a wasted row here, which takes nobody along.
            let mut hit = step.seqs.clone();
            hit.retain(|seq| self.ledger.choice(*seq).is_some_and(|choice| choice.ended.is_none()));
            self.ledger.call = Call::Fail { seqs: hit.clone() };
            self.core.fail_step(step.step_id, &mut self.ledger).map_err(|error| error.to_string())?;
            self.told()?;
            if let Some(left) = hit.iter().find(|seq| !self.ledger.requests[&seq.request].has_ended()) {
                return Err(format!("request {} lives on after its step {} failed", left.request.0, step.step_id));
            }
        } else {
            self.trace.push(Event::Commit(step.step_id));
            let mut draws = step.draws;
            draws.retain(|(seq, _)| self.ledger.choice(*seq).is_some_and(|choice| choice.ended.is_none()));
            self.accounts.clock(self.now);
            let ledger = &self.ledger;
            let went_on = |seq: SeqRef| ledger.requests[&seq.request].choices[seq.index as usize].ended.is_none();
            self.accounts.committed(step.planned_at, &step.rows, went_on);
            self.ledger.call = Call::Commit { step_id: step.step_id, seqs: step.seqs };
            // Of another length each time, so that a model sometimes drafts and sometimes rests.
            let drafting = (step.step_id % 8) as f64 * 1e-4;
            self.core.note_drafting(step.step_id, drafting, drafting);
            self.core
                .commit(step.step_id, &step.result.expect("it was executed"), self.now, &mut self.ledger)
                .map_err(|error| error.to_string())?;
            self.told()?;
            // What a row drew before its grammar failed behind a draft counts for nothing.
            let masked_out = Some(FinishReason::Error(SequenceError::AllMasked));
            draws.retain(|(seq, _)| self.ledger.choice(*seq).is_some_and(|choice| choice.ended != masked_out));
            self.num_draws += draws.len() as u64;
            self.num_drafts += draws.iter().map(|(_, drafts)| drafts).sum::<u64>();
        }
        self.device.fence(step.step_id);
        Ok(())
    }

    fn told(&mut self) -> Result<(), String> {
        self.accounts.note_ends(&self.ledger);
        self.ledger.violation.take().map_or(Ok(()), Err)
    }

    /// In every world some stories are read while they go on.
    fn stories_hold(&mut self) -> Result<(), String> {
        let config = self.core.config();
        let is_continuous = config.batching == Batching::Continuous;
        let exact_slots = is_continuous && !self.scenario.overlap && config.speculation.is_none();
        self.accounts.hold(&mut self.core, &self.ledger, exact_slots)
    }

    fn check_state(&mut self) -> Result<(), String> {
        self.core.check_integrity()?;
        let (seen, stats) = (self.core.inspect(), self.core.stats());
        recount(self.core.config(), &seen, &stats)?;
        calls_stand_in_turn(self.core.config(), &seen, |seq| {
            let request = &self.ledger.requests[&seq.request];
            (request.call, self.begun.contains(&seq.request))
        })?;
        for sequence in &seen.sequences {
            let is_known = self.ledger.choice(sequence.seq).is_some_and(|choice| choice.ended.is_none());
            if !is_known {
                return Err(format!("S13: {:?} has ended, but is {:?}", sequence.seq, sequence.phase));
            }
        }
        Ok(())
    }

    /// S14, and that all counts agree.
    fn check_end(&mut self) -> Result<(), String> {
        self.stories_hold()?;
        let stats = self.core.stats();
        let [stop, length, abort, error] = self.ledger.num_ended;
        let counted = [stop, length, abort, error, self.unknown_aborts, self.ledger.num_tokens];
        let stated = [
            stats.finished_stop,
            stats.finished_length,
            stats.finished_abort,
            stats.finished_error,
            stats.unknown_aborts,
            stats.generation_tokens,
        ];
        if counted != stated {
            return Err(format!(
                "stop, length, abort, error, unknown aborts, tokens: {counted:?}; the core says {stated:?}"
            ));
        }
        // A row brings one token that is no draft, unless its sequence ended among the accepted ones.
        let most = self.num_draws + stats.accepted_tokens;
        let least = most - (stop + length).min(most);
        if stats.draft_tokens != self.num_drafts || !(least..=most).contains(&self.ledger.num_tokens) {
            return Err(format!(
                "{} rows with {} drafts brought {} tokens; the core says {} drafts, {} of them accepted",
                self.num_draws, self.num_drafts, self.ledger.num_tokens, stats.draft_tokens, stats.accepted_tokens
            ));
        }
        let by_place = self.core.accepted_by_place();
        if by_place.iter().sum::<u64>() != stats.accepted_tokens || !by_place.is_sorted_by(|left, right| left >= right)
        {
            return Err(format!("{} drafts were accepted, by place {by_place:?}", stats.accepted_tokens));
        }
        if self.core.has_unfinished()
            || stats.num_running + stats.num_waiting + stats.blocks_used + stats.blocks_held > 0
        {
            return Err(format!("S14: all requests have ended, and there is {stats:?}"));
        }
        self.core.reset_prefix_cache();
        let stats = self.core.stats();
        if stats.blocks_cached > 0 || stats.blocks_blank != stats.blocks_total {
            return Err(format!("S14: after a cache reset there is {stats:?}"));
        }
        self.check_state()
    }
}
