//! Whether a request's story is what happened, by an account of its own: it sees plans, results and
//! phases, and knows neither queues nor sums.

use crate::ledger::Ledger;
use crate::packed::ensure;
use _core::config::{Batching, CoreConfig, SchedulingPolicy};
use _core::inspect::{Inspection, Phase};
use _core::output::FinishReason;
use _core::request::{RequestId, SeqRef};
use _core::scheduler::Scheduler;
use _core::timeline::{Cause, Event, Story};
use rustc_hash::FxHashMap;

/// Of 10^6 seconds (jumps of the clock) a float keeps a sixteenth; sums of them half a second.
const TOLERANCE: f64 = 1e-6;

/// A row of a step: whose, its tokens, whether it computed a prompt.
pub type Row = (SeqRef, u32, bool);

/// What happened to one sequence.
#[derive(Default)]
struct Account {
    /// Since it came, or was preempted; None while it runs.
    waits_since: Option<f64>,
    /// From, until, and how long every slot was taken meanwhile.
    waits: Vec<(f64, f64, f64)>,
    full: f64,
    chunks: Vec<(f64, f64, u32)>,
    decode_steps: u32,
    preemptions: u32,
    ended: Option<(f64, FinishReason)>,
}

/// What happened to all.
#[derive(Default)]
pub struct Accounts {
    by_seq: FxHashMap<SeqRef, Account>,
    /// The core's clock: it does not go back.
    pub now: f64,
    /// Since the last look all slots have been taken.
    was_full: bool,
    looked_at: f64,
}

impl Accounts {
    /// The core was told the time.
    pub fn clock(&mut self, now: f64) {
        self.now = self.now.max(now);
    }

    pub fn came(&mut self, seq: SeqRef) {
        self.by_seq.insert(seq, Account { waits_since: Some(self.now), ..Account::default() });
    }

    /// A step was planned, or was not.
    pub fn looked(&mut self, config: &CoreConfig, before: &Inspection, after: &Inspection) {
        let (now, past) = (self.now, self.now - self.looked_at);
        let phases = |seen: &Inspection| -> FxHashMap<SeqRef, Phase> {
            seen.sequences.iter().map(|sequence| (sequence.seq, sequence.phase)).collect()
        };
        let (before, after) = (phases(before), phases(after));
        for (seq, then) in &before {
            let account = self.by_seq.get_mut(seq).expect("it came");
            if let (Some(since), true) = (account.waits_since, self.was_full) {
                account.full += past.min(now - since);
            }
            let runs = after[seq] == Phase::Running;
            match (*then == Phase::Running, runs) {
                (true, false) => {
                    account.preemptions += 1;
                    account.waits_since = Some(now);
                }
                (false, true) => account.stops_waiting(now),
                _ => {}
            }
        }
        let running = after.values().filter(|phase| **phase == Phase::Running).count();
        // What is scarce is found out where somebody asks for it.
        let is_asked = after.values().any(|phase| *phase == Phase::Waiting);
        (self.was_full, self.looked_at) = (is_asked && running == config.max_running(), now);
    }

    /// The results of a step came that was planned at `planned_at`; `went_on`: sequences that had not
    /// ended before.
    pub fn committed(&mut self, planned_at: f64, rows: &[Row], went_on: impl Fn(SeqRef) -> bool) {
        for (seq, len, is_prompt) in rows.iter().filter(|(seq, ..)| went_on(*seq)) {
            let account = self.by_seq.get_mut(seq).expect("it came");
            if *is_prompt {
                account.chunks.push((planned_at, self.now, *len));
            } else {
                account.decode_steps += 1;
            }
        }
    }

    /// Notes who has ended by now.
    pub fn note_ends(&mut self, ledger: &Ledger) {
        for (seq, account) in self.by_seq.iter_mut().filter(|(_, account)| account.ended.is_none()) {
            let Some(reason) = ledger.requests[&seq.request].choices[seq.index as usize].ended else { continue };
            account.ended = Some((self.now, reason));
            // Nobody will look again.
            if let (Some(since), true) = (account.waits_since, self.was_full) {
                account.full += (self.now - since).min(self.now - self.looked_at);
            }
            account.stops_waiting(self.now);
        }
    }

    /// The story of every request, whether it has ended or not.
    pub fn hold(&self, core: &mut Scheduler, ledger: &Ledger, exact_slots: bool) -> Result<(), String> {
        let config = core.config().clone();
        let calls = |id: RequestId| ledger.requests.values().filter(|request| request.call == id).count();
        for (id, request) in &ledger.requests {
            let story = core.story(*id, self.now).ok_or(format!("S19: request {} has no story", id.0))?;
            ensure!(story.has_ended == request.has_ended(), "S19: the story of request {} has ended, or not", id.0);
            for index in 0..request.choices.len() as u32 {
                let seq = SeqRef { request: *id, index };
                let account = &self.by_seq[&seq];
                let causes = Causes {
                    share: request.asked.share.is_some() && config.batching == Batching::Continuous,
                    rank: config.scheduling_policy == SchedulingPolicy::Priority,
                    prompt: index > 0,
                    call: calls(request.call) > 1,
                    batch: config.batching != Batching::Continuous,
                    exact_slots,
                };
                let received = request.choices[index as usize].received.len();
                account.holds(&story, index, received, self.now, &causes).map_err(|wrong| {
                    format!("S19: the story of request {} choice {index}: {wrong}\n  {:?}", id.0, story.events)
                })?;
            }
            let preemptions: u32 = (0..request.choices.len() as u32)
                .map(|index| self.by_seq[&SeqRef { request: *id, index }].preemptions)
                .sum();
            ensure!(
                story.progress.num_preemptions == preemptions,
                "S19: request {} was preempted {preemptions} times, its story says {}",
                id.0,
                story.progress.num_preemptions
            );
        }
        Ok(())
    }
}

/// For what a sequence may have waited.
#[allow(clippy::struct_excessive_bools)] // Independent answers.
struct Causes {
    share: bool,
    rank: bool,
    prompt: bool,
    call: bool,
    batch: bool,
    /// When all slots were taken is known exactly.
    exact_slots: bool,
}

impl Causes {
    fn may_be(&self, cause: Cause) -> bool {
        match cause {
            Cause::Share => self.share,
            Cause::Rank => self.rank,
            Cause::Prompt => self.prompt,
            Cause::Call => self.call,
            Cause::Batch => self.batch,
            Cause::Step | Cause::Slots | Cause::Blocks | Cause::Budget => true,
        }
    }
}

impl Account {
    fn stops_waiting(&mut self, now: f64) {
        if let Some(since) = self.waits_since.take() {
            self.waits.push((since, now, std::mem::take(&mut self.full)));
        }
    }

    #[allow(clippy::float_cmp)] // A wait is known by when it began, which both have from one clock.
    fn holds(&self, story: &Story, index: u32, received: usize, now: f64, causes: &Causes) -> Result<(), String> {
        let (mut chunks, mut waits) = (Vec::new(), Vec::new());
        let (mut steps, mut tokens, mut preempted, mut ended) = (0, 0, 0, None);
        for (_, event) in story.events.iter().filter(|(choice, _)| *choice == index) {
            ensure!(ended.is_none(), "{event:?} comes behind the end");
            match *event {
                Event::Queued { from, until, by, .. } => {
                    waits.push((from, until));
                    let scale = (until - from).max(1.0);
                    let sum: f64 = by.iter().map(|seconds| f64::from(*seconds)).sum();
                    let right = (sum - (until - from)).abs() <= TOLERANCE * scale;
                    ensure!(right && by.iter().all(|seconds| *seconds >= -1e-3), "{sum} s in {event:?}");
                    let odd = |cause: &Cause| f64::from(by[*cause as usize]) > TOLERANCE * scale;
                    if let Some(cause) = Cause::ALL.into_iter().find(|cause| odd(cause) && !causes.may_be(*cause)) {
                        return Err(format!("it cannot have waited for {cause:?}: {event:?}"));
                    }
                    // Where the clock stands still several begin at once.
                    let is_it = |wait: &&(f64, f64, f64)| wait.0 == from && wait.1 == until;
                    let full = self.waits.iter().find(is_it).map_or(self.full, |wait| wait.2);
                    let told = f64::from(by[Cause::Slots as usize] + by[Cause::Share as usize]);
                    if causes.exact_slots && self.waits.iter().any(|wait| is_it(&wait)) {
                        let early = [Cause::Prompt, Cause::Call, Cause::Batch].map(|cause| by[cause as usize]);
                        let early = f64::from(early.iter().sum::<f32>());
                        let is_right = told <= full + TOLERANCE * scale && full <= told + early + TOLERANCE * scale;
                        ensure!(is_right || causes.share, "all slots were taken for {full} s of {event:?}");
                    }
                }
                Event::Computed { from, until, tokens: computed, drawn } => {
                    chunks.push((from, until, computed));
                    tokens += drawn;
                }
                Event::Decoded { from, until, steps: some, tokens: drawn } => {
                    ensure!(from <= until && until <= now, "{event:?} at {now}");
                    steps += some;
                    tokens += drawn;
                }
                Event::Preempted { .. } => preempted += 1,
                Event::Ended { at, reason } => ended = Some((at, reason)),
            }
        }
        let mut right: Vec<(f64, f64)> = self.waits.iter().map(|(from, until, _)| (*from, *until)).collect();
        right.extend(self.waits_since.map(|since| (since, now)));
        ensure!(waits == right, "it waited {right:?}, told are {waits:?}");
        ensure!(ended == self.ended, "it ended {:?}, told is {ended:?}", self.ended);
        ensure!(preempted == self.preemptions, "{} preemptions, told are {preempted}", self.preemptions);
        ensure!(tokens as usize == received, "{received} tokens came, told are {tokens}");
        // A row that ended it by an error is not told.
        let error = u32::from(matches!(self.ended, Some((_, FinishReason::Error(_)))));
        let most = self.chunks.len();
        ensure!(
            chunks[..] == self.chunks[..chunks.len().min(most)] && chunks.len() + error as usize >= most,
            "chunks {:?}, told are {chunks:?}",
            self.chunks
        );
        ensure!(
            (steps..=steps + error).contains(&self.decode_steps),
            "{} decode steps, told are {steps}",
            self.decode_steps
        );
        Ok(())
    }
}
