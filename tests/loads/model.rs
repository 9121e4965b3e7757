//! A device with a clock: what a step costs on one H100 with a 7B (`H100_7B`), and a core that
//! runs on it.
//!
//! Deterministic, so two runs of a load give the same figures to the last digit. Nothing is
//! computed: every row that samples draws the same token, and the load says after how many tokens a
//! sequence stops.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use _core::config::CoreConfig;
use _core::output::{FinishReason, OutputSink, PromptToken, SampledToken};
use _core::plan::{PlanInfo, PlanView, ResultWriter, ROW_PADDING, ROW_PREFILL, ROW_SAMPLE, STATUS_NO_TOKEN, STATUS_OK};
use _core::request::{Progress, RequestId, SamplingOptions, SamplingParams, SeqRef};
use _core::scheduler::Scheduler;

/// What a step costs, in seconds.
pub struct Cost {
    /// Reading the weights once.
    pub weights: f64,
    /// The arithmetic of one token.
    pub per_token: f64,
    /// Reading the keys and values of one token.
    pub per_key: f64,
}

/// Llama-2-7B in bfloat16: fitted to `bench/RESULTS.md`.
pub const H100_7B: Cost = Cost { weights: 4.7e-3, per_token: 22.4e-6, per_key: 524_288.0 / 2.9e12 };

/// One request of a load.
#[derive(Clone)]
pub struct Asked {
    pub prompt: Vec<u32>,
    pub max_tokens: Option<i64>,
    /// It stops by itself after this many tokens.
    pub stops_after: Option<u32>,
    pub priority: i32,
}

/// What came out, by request.
#[derive(Default)]
struct Told {
    now: f64,
    step: u64,
    stops_after: HashMap<RequestId, u32>,
    output: HashMap<SeqRef, (u32, f64)>,
    first: HashMap<RequestId, (u64, f64)>,
    ended: HashSet<RequestId>,
    longest_gap: f64,
    num_tokens: u64,
}

impl OutputSink for Told {
    fn on_prompt_token(&mut self, _: RequestId, _: &PromptToken<'_>) {}

    fn on_vector(&mut self, _: RequestId, _: &[f32]) {}

    fn on_token(&mut self, seq: SeqRef, _: &SampledToken<'_>, _: &Progress) -> Option<u32> {
        self.num_tokens += 1;
        self.first.entry(seq.request).or_insert((self.step, self.now));
        let (count, last) = self.output.entry(seq).or_insert((0, self.now));
        *count += 1;
        self.longest_gap = self.longest_gap.max(self.now - *last);
        *last = self.now;
        self.stops_after.get(&seq.request).is_some_and(|limit| *count >= *limit).then_some(0)
    }

    fn on_finish(&mut self, seq: SeqRef, reason: FinishReason, _: &Progress) {
        self.ended.insert(seq.request);
        assert!(!matches!(reason, FinishReason::Error(_)), "{seq:?} ended: {reason:?}");
    }
}

/// What is to be known of one step.
#[derive(Clone, Copy)]
pub struct StepSeen {
    pub done: f64,
    pub seconds: f64,
    pub running: u64,
}

/// A core at work on the device.
pub struct Machine {
    pub core: Scheduler,
    plans: [Vec<u8>; 2],
    told: Told,
    in_flight: VecDeque<(PlanInfo, Vec<u8>, StepSeen)>,
    device_free: f64,
    lens: HashMap<u32, u32>,
    prompt_tokens: u64,
    pub computed_prompt_tokens: u64,
    pub seen: Vec<StepSeen>,
}

impl Machine {
    pub fn new(config: CoreConfig) -> Self {
        let core = Scheduler::new(config).expect("a good configuration");
        let bytes = core.plan_bytes();
        Self {
            core,
            plans: [vec![0; bytes], vec![0; bytes]],
            told: Told::default(),
            in_flight: VecDeque::new(),
            device_free: 0.0,
            lens: HashMap::new(),
            prompt_tokens: 0,
            computed_prompt_tokens: 0,
            seen: Vec::new(),
        }
    }

    /// One call of one prompt.
    pub fn add(&mut self, asked: &Asked) -> RequestId {
        self.add_call(std::slice::from_ref(asked))
    }

    /// One call of several prompts, which share the parameters of the first.
    pub fn add_call(&mut self, asked: &[Asked]) -> RequestId {
        let options =
            SamplingOptions { max_tokens: asked[0].max_tokens, ignore_eos: true, ..SamplingOptions::default() };
        let params = SamplingParams::new(options).expect("good parameters");
        let prompts: Vec<Arc<[u32]>> = asked.iter().map(|one| Arc::from(one.prompt.as_slice())).collect();
        let first = self.core.add_call(&prompts, params, asked[0].priority, None, self.told.now).expect("it fits");
        for (id, one) in (first.0..).map(RequestId).zip(asked) {
            self.prompt_tokens += one.prompt.len() as u64;
            if let Some(count) = one.stops_after {
                self.told.stops_after.insert(id, count);
            }
        }
        first
    }

    /// Plans up to two steps ahead and finishes the oldest. False: nothing is to be done.
    pub fn turn(&mut self, cost: &Cost) -> bool {
        while self.in_flight.len() < 2 && self.plan(cost) {}
        let Some((info, result, seen)) = self.in_flight.pop_front() else { return false };
        self.told.now = self.told.now.max(seen.done);
        self.told.step += 1;
        self.core.commit(info.step_id, &result, self.told.now, &mut self.told).expect("the oldest step");
        self.seen.push(seen);
        true
    }

    pub fn run(&mut self, cost: &Cost) {
        while self.turn(cost) {}
        assert!(!self.core.has_unfinished(), "requests are left, and nothing runs");
    }

    fn plan(&mut self, cost: &Cost) -> bool {
        let plan = &mut self.plans[(self.core.stats().steps + self.in_flight.len() as u64) as usize % 2];
        let Some(info) = self.core.schedule(plan, self.told.now).expect("fewer than two in flight") else {
            return false;
        };
        let view = PlanView::new(plan);
        for enter in view.enters() {
            self.lens.insert(enter.slot, enter.computed_len);
        }
        let layout = info.result_layout();
        let mut result = vec![0; layout.bytes(info.padded_rows as usize)];
        let mut keys = 0;
        for (index, row) in view.rows().enumerate() {
            let samples = row.flags & ROW_SAMPLE != 0;
            let (status, tokens): (u32, &[u32]) = if samples { (STATUS_OK, &[7]) } else { (STATUS_NO_TOKEN, &[]) };
            ResultWriter::new(layout, &mut result, index).tokens(status, tokens);
            if row.flags & ROW_PADDING != 0 {
                continue;
            }
            let len = self.lens.entry(row.slot).or_default();
            *len += row.query_len;
            if row.flags & ROW_PREFILL == 0 {
                keys += u64::from(*len);
            } else {
                self.computed_prompt_tokens += u64::from(row.query_len);
            }
        }
        let seconds = cost.weights.max(cost.per_token * f64::from(info.num_tokens)) + cost.per_key * keys as f64;
        self.device_free = self.device_free.max(self.told.now) + seconds;
        let seen = StepSeen { done: self.device_free, seconds, running: self.core.stats().num_running };
        self.in_flight.push_back((info, result, seen));
        true
    }

    /// Seconds so far.
    pub fn now(&self) -> f64 {
        self.told.now
    }

    /// Steps committed so far, and the time, when the request's first token came.
    pub fn first_token(&self, id: RequestId) -> Option<(u64, f64)> {
        self.told.first.get(&id).copied()
    }

    pub fn has_ended(&self, id: RequestId) -> bool {
        self.told.ended.contains(&id)
    }

    pub fn outcome(&self) -> Outcome {
        let time = self.told.now;
        let weighed =
            |value: fn(&StepSeen) -> f64| self.seen.iter().map(|step| step.seconds * value(step)).sum::<f64>() / time;
        Outcome {
            seconds: time,
            tokens_per_second: self.told.num_tokens as f64 / time,
            steps: self.seen.len(),
            preemptions: self.core.stats().preemptions,
            recomputed: self.computed_prompt_tokens as f64 / self.prompt_tokens as f64 - 1.0,
            mean_running: weighed(|step| step.running as f64),
            few_running: weighed(|step| f64::from(u8::from(step.running <= 4))),
            longest_gap: self.told.longest_gap,
        }
    }
}

/// Figures of a whole load.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    pub seconds: f64,
    pub tokens_per_second: f64,
    pub steps: usize,
    pub preemptions: u64,
    /// Prompt tokens computed beyond those of the prompts, as a part of them.
    pub recomputed: f64,
    pub mean_running: f64,
    /// Part of the time in which at most four ran.
    pub few_running: f64,
    /// Longest pause of a stream, in seconds.
    pub longest_gap: f64,
}
