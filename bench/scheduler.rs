//! Times one steady decode step's work in the core: commit of the last step and plan of the next.
//!
//! `cargo bench --bench scheduler`. The sequences are staggered, so that each step some of them
//! fill a block, as in a server. What is timed is the CPU time of this thread, so a busy machine
//! does not count: the median of the samples, and the fastest and slowest of them. The context
//! length is varied to show that the cost does not follow it, and overlap to show that it does not
//! add.

#[path = "thread_time.rs"]
mod thread_time;

use std::hint::black_box;
use std::sync::Arc;

use _core::config::CoreConfig;
use _core::output::{FinishReason, OutputSink, PromptToken, SampledToken};
use _core::plan::{PlanInfo, ResultWriter, STATUS_OK};
use _core::request::{Progress, RequestId, SamplingParams, SeqRef};
use _core::scheduler::Scheduler;
use thread_time::thread_time;

/// Takes what it is told and keeps nothing.
struct Nowhere;

impl OutputSink for Nowhere {
    fn on_vector(&mut self, _: RequestId, vector: &[f32]) {
        black_box(vector);
    }

    fn on_prompt_token(&mut self, _: RequestId, token: &PromptToken<'_>) {
        black_box(token.id);
    }

    fn on_token(&mut self, seq: SeqRef, token: &SampledToken<'_>, _: &Progress) -> Option<u32> {
        black_box((seq, token.id));
        None
    }

    fn on_finish(&mut self, seq: SeqRef, reason: FinishReason, _: &Progress) {
        panic!("{seq:?} ended: {reason:?}");
    }
}

/// Steps that a line takes in all, and that its sequences have room for.
const STEPS: u64 = 8192;

/// A scheduler whose sequences all decode, with `overlap` steps in flight.
struct Decoding {
    scheduler: Scheduler,
    plan: Vec<u8>,
    result: Vec<u8>,
    in_flight: std::collections::VecDeque<PlanInfo>,
}

impl Decoding {
    fn new(num_seqs: u32, context: u32, kv_windows: Vec<u32>) -> Self {
        // The first to be admitted decode while the last are still computing their prompts.
        let max_model_len = context + STEPS as u32 + num_seqs * context / 8192 + 64;
        let config = CoreConfig {
            num_blocks: 2 + num_seqs * max_model_len.div_ceil(16) * kv_windows.len() as u32,
            block_size: 16,
            kv_windows,
            max_num_seqs: num_seqs,
            max_num_batched_tokens: 8192,
            max_model_len,
            vocab_size: 32_000,
            eos_token_ids: vec![2],
            graph_sizes: (0..11).map(|power| 1 << power).collect(),
            ..CoreConfig::default()
        };
        let mut scheduler = Scheduler::new(config).expect("a good configuration");
        for number in 0..num_seqs {
            let prompt: Arc<[u32]> = (0..context + number % 16).map(|i| (i * 31 + number * 7919) % 32_000).collect();
            scheduler.add_call(&[prompt], SamplingParams::default(), 0, None, 0.0).expect("it fits");
        }
        let mut bench = Self {
            plan: vec![0; scheduler.plan_bytes()],
            result: vec![0; scheduler.result_bytes()],
            in_flight: std::collections::VecDeque::new(),
            scheduler,
        };
        bench.fill_results();
        loop {
            bench.schedule();
            let all_decode = bench.in_flight[0].num_decodes == num_seqs;
            bench.commit();
            if all_decode {
                return bench;
            }
        }
    }

    fn schedule(&mut self) {
        let info = self.scheduler.schedule(&mut self.plan, 1.0).expect("a step may be planned");
        self.in_flight.push_back(info.expect("all sequences decode"));
    }

    fn commit(&mut self) {
        let info = self.in_flight.pop_front().expect("a step is in flight");
        self.scheduler.commit(info.step_id, &self.result, 1.0, &mut Nowhere).expect("the oldest step");
    }

    /// What the device would write; the same for each step of decodes.
    fn fill_results(&mut self) {
        let layout = _core::plan::ResultLayout { query_len: 1, top: None };
        for row in 0..self.scheduler.config().max_num_seqs as usize {
            ResultWriter::new(layout, &mut self.result, row).tokens(STATUS_OK, &[1000 + row as u32]);
        }
    }
}

/// Steps a sample, and samples a line.
const STEPS_A_SAMPLE: u32 = 256;
const SAMPLES: u64 = STEPS / STEPS_A_SAMPLE as u64 - 4;

/// Microseconds a step of each sample, fastest first. The first four samples warm up.
fn samples(mut decoding: Decoding) -> Vec<f64> {
    let mut sample = || {
        let start = thread_time();
        for _ in 0..STEPS_A_SAMPLE {
            decoding.schedule();
            decoding.commit();
        }
        (thread_time().saturating_sub(start) / STEPS_A_SAMPLE).as_secs_f64() * 1e6
    };
    (0..4).for_each(|_| _ = sample());
    let mut times: Vec<f64> = (0..SAMPLES).map(|_| sample()).collect();
    times.sort_unstable_by(f64::total_cmp);
    times
}

fn main() {
    println!("{:60} {:>8} {:>8} {:>8}", "a steady decode step, microseconds", "median", "fastest", "slowest");
    for (num_seqs, context, kv_windows, overlap) in [
        (256, 64, vec![0], false),
        (256, 64, vec![0], true),
        (256, 4096, vec![0], true),
        (256, 4096, vec![0, 512], true),
        (1024, 64, vec![0], false),
        (1024, 64, vec![0], true),
        (1024, 1024, vec![0], true),
    ] {
        let name = format!("{num_seqs} sequences, context {context}, windows {kv_windows:?}, overlap {overlap}");
        let mut decoding = Decoding::new(num_seqs, context, kv_windows);
        if overlap {
            decoding.schedule();
        }
        let times = samples(decoding);
        let (fastest, slowest) = (times[0], times[times.len() - 1]);
        println!("{name:60} {:8.1} {fastest:8.1} {slowest:8.1}", times[times.len() / 2]);
    }
}
