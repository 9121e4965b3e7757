//! The scheduler against a scripted device, event by event. The seeded simulation has the exact
//! model and the mixes.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::config::{DecodeShape, PrefillGraphs, SchedulingPolicy, Speculation, SpeculationMethod};
use crate::output::{FinishReason, OutputSink, PromptToken, SampledToken, SequenceError};
use crate::plan::{
    PlanInfo, PlanView, ResultWriter, Row, ROW_PADDING, ROW_PREFILL, ROW_SAMPLE, STATUS_NAN, STATUS_NO_TOKEN, STATUS_OK,
};
use crate::request::{Progress, SamplingOptions, SamplingParams};

/// Notes what it is told.
#[derive(Debug, Default)]
struct Told {
    tokens: Vec<(SeqRef, u32)>,
    /// Request, place, token and number of top ones.
    prompt: Vec<(RequestId, u32, u32, usize)>,
    finished: Vec<(SeqRef, FinishReason)>,
    progress: Progress,
    /// Ends a sequence by its stop string 0 when this token comes.
    stop_string_at: Option<u32>,
}

impl OutputSink for Told {
    fn on_vector(&mut self, _: RequestId, _: &[f32]) {}

    fn on_prompt_token(&mut self, request: RequestId, token: &PromptToken<'_>) {
        self.prompt.push((request, token.place, token.id, token.logprobs.top().len()));
    }

    fn on_token(&mut self, seq: SeqRef, token: &SampledToken<'_>, progress: &Progress) -> Option<u32> {
        self.tokens.push((seq, token.id));
        self.progress = *progress;
        (Some(token.id) == self.stop_string_at).then_some(0)
    }

    fn on_finish(&mut self, seq: SeqRef, reason: FinishReason, _: &Progress) {
        self.finished.push((seq, reason));
    }
}

/// A scheduler with its plan buffer and what it has told.
struct Bench {
    scheduler: Scheduler,
    plan: Vec<u8>,
    told: Told,
    now: f64,
}

/// A planned step, with its rows read back from the plan.
#[derive(Debug)]
struct Planned {
    info: PlanInfo,
    rows: Vec<Row>,
    plan: Vec<u8>,
}

impl Bench {
    fn new(config: CoreConfig) -> Self {
        let scheduler = Scheduler::new(config).expect("a good configuration");
        Self { plan: vec![0; scheduler.plan_bytes()], scheduler, told: Told::default(), now: 0.0 }
    }

    fn add(&mut self, prompt: &[u32], options: SamplingOptions) -> RequestId {
        self.try_add(prompt, options).expect("an admissible request")
    }

    fn try_add(&mut self, prompt: &[u32], options: SamplingOptions) -> Result<RequestId, Error> {
        let params = SamplingParams::new(options).expect("good parameters");
        self.scheduler.add_call(&[Arc::from(prompt)], params, 0, None, self.now)
    }

    fn schedule(&mut self) -> Option<Planned> {
        let info = self.scheduler.schedule(&mut self.plan, self.now).expect("fewer than two steps are in flight")?;
        assert_eq!(self.scheduler.check_integrity(), Ok(()));
        let rows = PlanView::new(&self.plan).rows().collect();
        Some(Planned { info, rows, plan: self.plan.clone() })
    }

    /// Commits a step in which every sampling row draws `token`.
    fn commit(&mut self, step: &Planned, token: u32) {
        self.commit_with(step, |_| (STATUS_OK, vec![token]));
    }

    fn commit_with(&mut self, step: &Planned, draw: impl Fn(&Row) -> (u32, Vec<u32>)) {
        let layout = step.info.result_layout();
        let mut result = vec![0; step.info.target_layout().end(step.info.num_prompt_targets as usize)];
        for (index, row) in step.rows.iter().enumerate() {
            let (status, tokens) = if row.flags & ROW_SAMPLE == 0 { (STATUS_NO_TOKEN, Vec::new()) } else { draw(row) };
            ResultWriter::new(layout, &mut result, index).tokens(status, &tokens);
        }
        self.scheduler.commit(step.info.step_id, &result, self.now, &mut self.told).expect("the oldest step");
        assert_eq!(self.scheduler.check_integrity(), Ok(()));
    }

    /// Runs one step at a time until nothing is left; returns the number of steps.
    fn run(&mut self, token: u32) -> usize {
        let mut steps = 0;
        while self.scheduler.has_unfinished() {
            let step = self.schedule().expect("something can run while nothing is in flight");
            self.commit(&step, token);
            steps += 1;
            assert!(steps < 100_000, "it does not end");
        }
        steps
    }

    fn assert_empty(&self) {
        let stats = self.scheduler.stats();
        assert_eq!((stats.blocks_used, stats.blocks_held, stats.num_running, stats.num_waiting), (0, 0, 0, 0));
        assert!(self.scheduler.sequences.iter().next().is_none(), "sequences are left over");
        assert!(self.scheduler.requests.iter().next().is_none(), "requests are left over");
    }

    fn lens(step: &Planned) -> Vec<u32> {
        step.rows.iter().map(|row| row.query_len).collect()
    }
}

fn small() -> CoreConfig {
    CoreConfig { num_blocks: 17, block_size: 4, max_num_batched_tokens: 16, max_model_len: 64, ..CoreConfig::default() }
}

/// 8 blocks, and whoever fits now is let in.
fn greedy_for_blocks() -> CoreConfig {
    CoreConfig { num_blocks: 9, max_num_batched_tokens: 32, admits_by_growth: false, ..small() }
}

fn max_tokens(count: i64) -> SamplingOptions {
    SamplingOptions { max_tokens: Some(count), ..SamplingOptions::default() }
}

fn counted(len: u32) -> Vec<u32> {
    (1..=len).collect()
}

#[test]
fn a_prompt_is_chunked_under_the_budget_and_then_decodes() {
    let mut bench = Bench::new(small());
    let id = bench.add(&counted(37), max_tokens(2));
    let step = bench.schedule().expect("a chunk");
    assert_eq!((Bench::lens(&step), step.rows[0].flags), (vec![16], ROW_PREFILL));
    let tokens: Vec<u32> = PlanView::new(&step.plan).prefill_tokens().collect();
    assert_eq!(tokens, counted(16));
    bench.commit(&step, 0);
    let step = bench.schedule().expect("a chunk");
    bench.commit(&step, 0);
    let step = bench.schedule().expect("the last chunk");
    assert_eq!((Bench::lens(&step), step.rows[0].flags), (vec![5], ROW_PREFILL | ROW_SAMPLE));
    bench.now = 3.0;
    bench.commit(&step, 9);
    let step = bench.schedule().expect("a decode");
    assert_eq!((Bench::lens(&step), step.rows[0].flags, step.info.max_seq_len), (vec![1], ROW_SAMPLE, 38));
    bench.commit(&step, 8);
    let seq = SeqRef { request: id, index: 0 };
    assert_eq!(bench.told.tokens, [(seq, 9), (seq, 8)]);
    assert_eq!(bench.told.finished, [(seq, FinishReason::Length)]);
    assert_eq!((bench.told.progress.first_token, bench.told.progress.num_output_tokens), (3.0, 2));
    bench.assert_empty();
}

#[test]
fn with_two_steps_in_flight_a_finished_sequence_has_one_wasted_row_and_its_blocks_wait_for_it() {
    let mut bench = Bench::new(CoreConfig { eos_token_ids: vec![7], ..small() });
    bench.add(&counted(5), max_tokens(10));
    let first = bench.schedule().expect("the prompt");
    let second = bench.schedule().expect("a decode with its token unknown");
    let refused = Error::StepOrder { step_id: 3, reason: "two steps are in flight already" };
    assert_eq!(bench.scheduler.schedule(&mut bench.plan, 0.0), Err(refused));
    bench.commit(&first, 7);
    assert_eq!(bench.told.finished.len(), 1);
    let stats = bench.scheduler.stats();
    assert_eq!((stats.blocks_used, stats.blocks_held), (0, 2));
    assert_eq!(bench.scheduler.free_slots.len(), 7);
    assert!(bench.schedule().is_none());
    bench.commit(&second, 3);
    assert_eq!((bench.told.tokens.len(), bench.scheduler.free_slots.len()), (1, 8));
    bench.assert_empty();
}

#[test]
fn no_row_is_planned_past_max_tokens() {
    let mut bench = Bench::new(small());
    bench.add(&counted(5), max_tokens(1));
    let first = bench.schedule().expect("the prompt");
    assert!(bench.schedule().is_none());
    bench.commit(&first, 1);
    bench.assert_empty();
}

#[test]
fn stop_rules() {
    let run = |options: SamplingOptions, tokens: &[u32]| {
        let mut bench = Bench::new(CoreConfig { eos_token_ids: vec![7], ..small() });
        bench.told.stop_string_at = Some(5);
        bench.add(&[1, 2], SamplingOptions { max_tokens: Some(4), ..options });
        for token in tokens {
            let step = bench.schedule().expect("a row");
            bench.commit(&step, *token);
        }
        bench.assert_empty();
        bench.told.finished[0].1
    };
    let plain = SamplingOptions::default;
    assert_eq!(run(plain(), &[1, 7]), FinishReason::Eos);
    assert_eq!(run(plain(), &[1, 1, 1, 1]), FinishReason::Length);
    assert_eq!(run(plain(), &[1, 5]), FinishReason::StopString(0));
    assert_eq!(run(SamplingOptions { stop_token_ids: vec![3], ..plain() }, &[3]), FinishReason::StopToken(3));
    assert_eq!(run(SamplingOptions { ignore_eos: true, ..plain() }, &[7, 7, 7, 7]), FinishReason::Length);
    assert_eq!(run(SamplingOptions { min_tokens: 2, ..plain() }, &[7, 7, 7]), FinishReason::Eos);
    assert_eq!(run(plain(), &[1024]), FinishReason::Error(SequenceError::BadResult));
}

#[test]
fn min_tokens_bans_end_tokens_by_bias_while_the_token_before_is_unknown() {
    let mut bench = Bench::new(CoreConfig { eos_token_ids: vec![7], ..small() });
    let options =
        SamplingOptions { min_tokens: 2, stop_token_ids: vec![3], logit_bias: vec![(9, 1.5)], ..max_tokens(5) };
    bench.add(&[1, 2], options);
    let bias = |step: &Planned| PlanView::new(&step.plan).bias().collect::<Vec<_>>();
    let first = bench.schedule().expect("the prompt");
    let second = bench.schedule().expect("a decode");
    let banned = [(9, 1.5), (7, f32::NEG_INFINITY), (3, f32::NEG_INFINITY)];
    assert_eq!((bias(&first), bias(&second)), (banned.to_vec(), banned.to_vec()));
    assert!(!first.info.all_greedy);
    bench.commit(&first, 1);
    let third = bench.schedule().expect("a decode");
    assert_eq!(bias(&third), [(9, 1.5)]);
}

#[test]
fn refusals_are_typed_and_leave_no_trace() {
    let mut bench = Bench::new(CoreConfig { max_waiting: 1, num_blocks: 9, ..small() });
    let error = |bench: &mut Bench, prompt: &[u32], count| bench.try_add(prompt, max_tokens(count)).expect_err("bad");
    assert_eq!(error(&mut bench, &[], 1), Error::EmptyPrompt);
    assert_eq!(error(&mut bench, &[1, 1024], 1).code(), "token_id_out_of_range");
    assert_eq!(error(&mut bench, &counted(60), 5).code(), "context_length_exceeded");
    assert_eq!(error(&mut bench, &counted(30), 4).code(), "kv_capacity_exceeded");
    assert_eq!(error(&mut bench, &counted(1), 1 << 31).code(), "context_length_exceeded");
    bench.assert_empty();
    bench.add(&counted(30), max_tokens(3));
    assert_eq!(error(&mut bench, &[1], 1), Error::QueueFull { limit: 1 });
    bench.run(1);
    // Left open, the length is what model and pool allow: 8 blocks of 4 tokens, and the last token
    // needs no place.
    bench.add(&counted(30), SamplingOptions::default());
    bench.run(1);
    assert_eq!(bench.told.tokens.len(), 3 + 3);
    bench.assert_empty();
}

#[test]
fn a_call_is_admitted_whole_or_not_at_all() {
    let mut bench = Bench::new(CoreConfig { max_waiting: 3, num_blocks: 9, ..small() });
    let mut add = |prompts: &[&[u32]]| {
        let prompts: Vec<Arc<[u32]>> = prompts.iter().map(|prompt| Arc::from(*prompt)).collect();
        let params = SamplingParams::new(max_tokens(1)).expect("good parameters");
        let before = bench.scheduler.stats();
        let added = bench.scheduler.add_call(&prompts, params, 0, None, bench.now);
        assert!(added.is_ok() || bench.scheduler.stats() == before);
        added
    };
    let refused =
        |count: usize| Err(Error::invalid("prompt", format!("a list of {count}"), "from 1 to max_waiting = 3 prompts"));
    assert_eq!(add(&[]), refused(0));
    assert_eq!(add(&[&[1], &[]]), Err(Error::EmptyPrompt));
    assert_eq!(add(&[&[1], &[2], &[1024]]).map_err(|error| error.code()), Err("token_id_out_of_range"));
    assert_eq!(add(&[&[1], &[2], &[3], &[4]]), refused(4));
    assert_eq!(add(&[&[1], &[2]]), Ok(RequestId(1)));
    assert_eq!(add(&[&[3], &[4]]), Err(Error::QueueFull { limit: 3 }));
    assert_eq!(add(&[&[3]]), Ok(RequestId(3)));
    assert_eq!(bench.scheduler.check_queue(0), Err(Error::QueueFull { limit: 3 }));
    bench.run(1);
    assert_eq!((bench.scheduler.check_queue(2), bench.scheduler.check_queue(3).is_ok()), (Ok(()), false));
    // The second prompt of a call takes its place behind whoever waits when the first is admitted.
    assert_eq!(bench.told.tokens.iter().map(|(seq, _)| seq.request.0).collect::<Vec<_>>(), [1, 3, 2]);
    bench.assert_empty();
}

#[test]
fn a_second_request_finds_the_first_ones_blocks_but_computes_the_last_token() {
    let mut bench = Bench::new(small());
    bench.add(&counted(12), max_tokens(1));
    bench.run(1);
    bench.add(&counted(12), max_tokens(1));
    let step = bench.schedule().expect("the rest of the prompt");
    assert_eq!(Bench::lens(&step), [4]);
    let enters: Vec<_> = PlanView::new(&step.plan).enters().collect();
    assert_eq!((enters[0].computed_len, step.info.num_blocks), (8, 3));
    bench.commit(&step, 1);
    assert_eq!(bench.told.progress.num_cached_tokens, 8);
    bench.scheduler.reset_prefix_cache();
    assert_eq!(bench.scheduler.stats().blocks_cached, 0);
    bench.add(&counted(12), max_tokens(1));
    assert_eq!(Bench::lens(&bench.schedule().expect("all of it")), [12]);
}

#[test]
fn blocks_are_findable_only_after_their_step_is_committed() {
    let mut bench = Bench::new(small());
    bench.add(&counted(9), max_tokens(2));
    let first = bench.schedule().expect("the prompt");
    bench.add(&counted(9), max_tokens(2));
    let second = bench.schedule().expect("a decode and a whole prompt");
    assert_eq!(Bench::lens(&second), [1, 9]);
    bench.commit(&first, 1);
    bench.add(&counted(9), max_tokens(2));
    assert_eq!(Bench::lens(&bench.schedule().expect("a prompt with a hit")), [1, 1]);
}

#[test]
fn choices_share_the_prompt_and_draw_their_own_first_token() {
    let mut bench = Bench::new(small());
    let id = bench.add(&counted(6), SamplingOptions { n: 3, seed: Some(5), ..max_tokens(2) });
    let step = bench.schedule().expect("the first choice");
    assert_eq!(Bench::lens(&step), [6]);
    bench.commit(&step, 1);
    let step = bench.schedule().expect("a decode and two forks");
    let view = PlanView::new(&step.plan);
    assert_eq!(Bench::lens(&step), [1, 1, 1]);
    assert_eq!(view.prefill_tokens().collect::<Vec<_>>(), [6, 6]);
    assert_eq!(view.copies().count(), 2);
    assert_eq!(view.enters().map(|enter| (enter.computed_len, enter.seed)).collect::<Vec<_>>(), [(5, 6), (5, 7)]);
    // One full block shared by three, a second one for each.
    assert_eq!(bench.scheduler.stats().blocks_used, 4);
    bench.commit(&step, 1);
    bench.run(1);
    let finished: Vec<u32> = bench.told.finished.iter().map(|(seq, _)| seq.index).collect();
    assert_eq!((finished, bench.told.tokens.len()), (vec![0, 1, 2], 6));
    assert!(bench.told.finished.iter().all(|(seq, _)| seq.request == id));
    bench.assert_empty();
}

#[test]
fn aborts_reach_every_state_and_unknown_ids_are_counted() {
    let mut bench = Bench::new(CoreConfig { max_num_seqs: 1, ..small() });
    let running = bench.add(&counted(6), SamplingOptions { n: 2, ..max_tokens(5) });
    let waiting = bench.add(&counted(6), max_tokens(5));
    let step = bench.schedule().expect("the first");
    bench.scheduler.abort(waiting, &mut bench.told);
    bench.scheduler.abort(running, &mut bench.told);
    assert_eq!(bench.scheduler.check_integrity(), Ok(()));
    assert_eq!(bench.told.finished.len(), 3);
    assert_eq!(bench.scheduler.stats().blocks_held, 2);
    bench.scheduler.abort(running, &mut bench.told);
    bench.commit(&step, 1);
    assert_eq!((bench.told.tokens.len(), bench.scheduler.stats().unknown_aborts), (0, 1));
    bench.assert_empty();
}

#[test]
fn a_bad_row_ends_one_request_and_a_failed_step_those_in_it() {
    let mut bench = Bench::new(small());
    bench.add(&[1, 2, 3], max_tokens(5));
    let good = bench.add(&[4, 5], max_tokens(5));
    let step = bench.schedule().expect("both prompts");
    bench.commit_with(&step, |row| if row.query_len == 3 { (STATUS_NAN, vec![]) } else { (STATUS_OK, vec![6]) });
    assert_eq!(bench.told.finished[0].1, FinishReason::Error(SequenceError::Numerical));
    let first = bench.schedule().expect("the good one");
    let late = bench.add(&[7], max_tokens(5));
    let second = bench.schedule().expect("both");
    bench.scheduler.fail_step(second.info.step_id, &mut bench.told).expect("it is in flight");
    assert_eq!(bench.scheduler.check_integrity(), Ok(()));
    let failed: Vec<RequestId> = bench.told.finished[1..].iter().map(|(seq, _)| seq.request).collect();
    assert_eq!(failed, [good, late]);
    bench.commit(&first, 1);
    bench.assert_empty();
    bench.add(&[1], max_tokens(1));
    assert_eq!(bench.run(1), 1);
    bench.add(&[1], max_tokens(3));
    bench.schedule().expect("a step");
    bench.scheduler.fail_all(&mut bench.told);
    assert_eq!(bench.scheduler.check_integrity(), Ok(()));
    bench.assert_empty();
}

#[test]
fn the_newest_gives_way_and_is_computed_again() {
    // 8 blocks of 4: two sequences of 12 + 8 need 10.
    let mut bench = Bench::new(greedy_for_blocks());
    let old = bench.add(&counted(12), max_tokens(8));
    let prompt: Vec<u32> = (100..112).collect();
    let new = bench.add(&prompt, max_tokens(8));
    bench.run(1);
    assert!(bench.scheduler.stats().preemptions > 0);
    let finished: Vec<RequestId> = bench.told.finished.iter().map(|(seq, _)| seq.request).collect();
    assert_eq!((finished, bench.told.tokens.len()), (vec![old, new], 16));
    bench.assert_empty();
}

#[test]
fn a_prompt_is_told_once_over_chunks_and_a_preemption() {
    let mut bench = Bench::new(CoreConfig { max_num_batched_tokens: 8, ..greedy_for_blocks() });
    let wants = |top| SamplingOptions { prompt_logprobs: Some(top), ..max_tokens(8) };
    bench.add(&counted(12), max_tokens(8));
    bench.run(1);
    // Both begin with what the cache holds, and who wants log probabilities computes it again.
    bench.add(&counted(12), max_tokens(8));
    let id = bench.add(&counted(15), wants(2));
    let asked = |step: &Planned| PlanView::new(&step.plan).prompt_targets().collect::<Vec<_>>();
    let first = bench.schedule().expect("a prompt and a chunk");
    assert_eq!((Bench::lens(&first), first.info.max_prompt_logprobs), (vec![4, 4], Some(2)));
    assert_eq!(asked(&first), [(4, 2), (5, 3), (6, 4), (7, 5)]);
    let second = bench.schedule().expect("a decode and a chunk");
    assert_eq!(asked(&second)[..2], [(1, 6), (2, 7)]);
    bench.commit(&first, 1);
    bench.commit(&second, 1);
    bench.run(1);
    assert!(bench.scheduler.stats().preemptions > 0);
    let told: Vec<_> = (1..15).map(|place| (id, place, place + 1, 2)).collect();
    assert_eq!(bench.told.prompt, told);
    bench.add(&[5], wants(0));
    bench.run(1);
    assert_eq!((bench.told.prompt.len(), bench.told.finished.len()), (14, 4));
    bench.assert_empty();
}

#[test]
fn however_often_the_newest_give_way_everybody_ends() {
    let mut bench = Bench::new(greedy_for_blocks());
    for first in 0..20 {
        bench.add(&[first, 1, 2, 3, 4], max_tokens(24));
    }
    bench.run(1);
    assert!(bench.scheduler.stats().preemptions > 20);
    assert_eq!(bench.told.tokens.len(), 20 * 24);
    bench.assert_empty();
}

#[test]
fn a_big_head_is_passed_a_bounded_number_of_times() {
    let mut bench = Bench::new(CoreConfig { max_num_batched_tokens: 128, ..small() });
    bench.add(&counted(8), max_tokens(40));
    let step = bench.schedule().expect("a small one");
    bench.commit(&step, 1);
    let prompt: Vec<u32> = (500..558).collect();
    let big = bench.add(&prompt, max_tokens(2));
    let mut admitted_before = 0;
    for small in 0..1000 {
        bench.add(&[small, small], max_tokens(1));
        let step = bench.schedule().expect("something runs");
        bench.commit(&step, 1);
        if bench.told.tokens.iter().any(|(seq, _)| seq.request == big) {
            break;
        }
        admitted_before = bench.told.finished.iter().filter(|(seq, _)| seq.request > big).count();
    }
    assert_eq!(admitted_before, crate::policy::HEAD_BYPASS_LIMIT as usize);
    bench.run(1);
    bench.assert_empty();
}

/// A pool of 30 blocks: 21 for the first, and 1 more for whoever shares its 20 full blocks.
#[test]
fn nobody_runs_alone_while_a_shared_prefix_makes_two_fit() {
    let config = CoreConfig { num_blocks: 31, block_size: 16, max_num_batched_tokens: 512, ..CoreConfig::default() };
    let mut bench = Bench::new(config);
    for own in 0..8 {
        let prompt: Vec<u32> = counted(320).into_iter().chain([900 + own; 5]).collect();
        bench.add(&prompt, max_tokens(30));
    }
    let first = bench.schedule().expect("the first prompt");
    bench.commit(&first, 1);
    let mut steps = 1;
    while bench.scheduler.stats().num_waiting > 0 {
        let step = bench.schedule().expect("a step");
        assert!(step.rows.len() > 1, "step {steps} has one row");
        bench.commit(&step, 1);
        steps += 1;
    }
    bench.run(1);
    assert_eq!(bench.scheduler.stats().preemptions, 0);
    bench.assert_empty();
}

/// While many run, the queue is looked into now and then only; but at once when a block that
/// somebody in it shares was registered.
#[test]
fn a_block_that_makes_a_waiting_prompt_cheap_lets_it_in_at_once() {
    let config = CoreConfig {
        num_blocks: 41 + 5 + 3,
        block_size: 16,
        max_num_seqs: 64,
        max_num_batched_tokens: 512,
        ..CoreConfig::default()
    };
    let mut bench = Bench::new(config);
    for first in 0..40 {
        bench.add(&[first], max_tokens(14));
    }
    bench.add(&counted(65), max_tokens(8));
    let first = bench.schedule().expect("all prompts");
    assert_eq!(first.rows.len(), 41);
    bench.add(&counted(65), max_tokens(8));
    let second = bench.schedule().expect("decodes");
    assert_eq!(second.rows.len(), 41, "5 blocks are not free");
    bench.commit(&first, 1);
    assert_eq!(bench.schedule().expect("decodes, and a prompt").rows.len(), 42);
}

#[test]
fn window_blocks_come_back_while_the_sequence_runs() {
    let mut bench = Bench::new(CoreConfig { kv_windows: vec![0, 8], num_blocks: 64, ..small() });
    bench.add(&counted(8), max_tokens(50));
    let mut most = 0;
    let first = bench.schedule().expect("the prompt");
    let mut in_flight = std::collections::VecDeque::from([first]);
    while bench.scheduler.has_unfinished() {
        in_flight.extend(bench.schedule());
        most = most.max(bench.scheduler.stats().blocks_used);
        let done = in_flight.pop_front().expect("a step is in flight");
        bench.commit(&done, 1);
    }
    // 57 tokens lie in blocks: 15 blocks of the full group, and a window of 8 touches at most 3.
    assert_eq!(most, 15 + 3);
    bench.assert_empty();
}

#[test]
fn decode_steps_are_padded_to_a_captured_size() {
    let mut bench = Bench::new(CoreConfig { graph_sizes: vec![4, 1, 8], ..small() });
    for first in 0..3 {
        bench.add(&[first], max_tokens(2));
    }
    let step = bench.schedule().expect("prompts");
    assert_eq!(step.info.padded_rows, 3);
    bench.commit(&step, 1);
    let step = bench.schedule().expect("decodes");
    assert_eq!((step.info.num_decodes, step.info.padded_decodes, step.info.num_tokens), (3, 4, 4));
    assert_eq!((step.rows[3].slot, step.rows[3].flags), (8, ROW_PADDING));
    bench.commit(&step, 1);
    bench.assert_empty();
}

#[test]
fn steps_with_prompts_are_padded_to_a_captured_size() {
    let prefill_graphs =
        PrefillGraphs { tokens: vec![14, 4], decodes: vec![2, 0], rows: 3, ..PrefillGraphs::default() };
    let mut bench = Bench::new(CoreConfig { prefill_graphs, ..small() });
    bench.add(&counted(3), max_tokens(3));
    let step = bench.schedule().expect("a prompt");
    let shape = |info: &PlanInfo| (info.num_decodes, info.padded_decodes, info.num_rows, info.padded_rows);
    assert_eq!(shape(&step.info), (0, 0, 1, 3));
    assert_eq!((step.info.num_tokens, step.info.num_prefill_tokens), (4, 4));
    let padding: Vec<_> = step.rows[1..].iter().map(|row| (row.slot, row.flags, row.query_len)).collect();
    assert_eq!(padding, [(8, ROW_PADDING, 1), (8, ROW_PADDING, 0)]);
    bench.commit(&step, 1);

    bench.add(&counted(9), max_tokens(1));
    bench.add(&counted(5), max_tokens(1));
    let step = bench.schedule().expect("a decode and two prompts");
    assert_eq!(shape(&step.info), (1, 2, 3, 5));
    assert_eq!((step.info.num_tokens, step.info.max_query_len), (2 + 14, 9));
    bench.commit(&step, 1); // each row reads its own record, the prompts' behind the padding

    for _ in 0..3 {
        bench.add(&counted(3), max_tokens(1));
    }
    let step = bench.schedule().expect("more prompts than a captured step has rows for");
    assert_eq!(shape(&step.info), (1, 1, 4, 4));
    bench.commit(&step, 1);
    bench.assert_empty();
}

#[test]
fn accepted_drafts_move_the_sequence_on_and_rejected_ones_do_not() {
    let mut bench = Bench::new(CoreConfig { num_draft_tokens: 3, num_blocks: 33, ..small() });
    let seq = SeqRef { request: bench.add(&counted(5), max_tokens(12)), index: 0 };
    let step = bench.schedule().expect("the prompt");
    bench.commit(&step, 20);
    bench.scheduler.set_drafts(seq, &[21, 22]).expect("good drafts");
    let step = bench.schedule().expect("a row with drafts");
    assert_eq!((step.info.decode_query_len, step.rows[0].num_drafts, step.info.result_width), (3, 2, 5));
    let drafts: Vec<_> = PlanView::new(&step.plan).drafts().collect();
    assert_eq!(drafts, [21, 22]);
    let next = bench.schedule().expect("a row behind undecided drafts");
    assert_eq!((next.info.decode_query_len, next.info.max_seq_len), (1, 5 + 3 + 1));
    bench.commit_with(&step, |_| (STATUS_OK, vec![21, 30]));
    bench.commit(&next, 31);
    let sequence = &bench.scheduler.sequences[0];
    assert_eq!((sequence.computed_len, sequence.least_len, sequence.most_len), (8, 8, 8));
    assert_eq!(sequence.outputs, [20, 21, 30, 31]);
    assert!(bench.scheduler.set_drafts(seq, &[1, 2, 3, 4]).is_err());
    bench.run(1);
    bench.assert_empty();
}

/// Sequences that decode, by (length of the prompt, `max_tokens`); the first has number 0.
fn decoding(bench: &mut Bench, requests: &[(u32, i64)]) -> Vec<SeqRef> {
    let add = |(len, most): &(u32, i64)| SeqRef { request: bench.add(&counted(*len), max_tokens(*most)), index: 0 };
    let seqs = requests.iter().map(add).collect();
    let step = bench.schedule().expect("all prompts");
    assert_eq!(step.info.num_rows as usize, requests.len());
    bench.commit(&step, 20);
    seqs
}

#[test]
fn each_row_has_its_own_drafts_and_no_more() {
    let config = CoreConfig { num_draft_tokens: 3, num_blocks: 65, max_num_batched_tokens: 128, ..small() };
    let mut bench = Bench::new(config);
    // The third has room for two drafts before max_model_len: that is its own affair.
    let seqs = decoding(&mut bench, &[(5, 12), (6, 12), (61, 3)]);
    bench.scheduler.set_drafts(seqs[1], &[31, 32, 33]).expect("good drafts");
    bench.scheduler.set_drafts(seqs[2], &[41, 42, 43]).expect("good drafts");
    let step = bench.schedule().expect("three rows");
    let rows: Vec<_> = step.rows.iter().map(|row| (row.query_start, row.query_len, row.num_drafts)).collect();
    assert_eq!(rows, [(0, 1, 0), (1, 4, 3), (5, 3, 2)]);
    let PlanInfo { decode_query_len, num_decode_tokens, num_tokens, num_drafts, max_seq_len, .. } = step.info;
    assert_eq!((decode_query_len, num_decode_tokens, num_tokens, num_drafts, max_seq_len), (4, 8, 8, 5, 64));
    let drafts: Vec<_> = PlanView::new(&step.plan).drafts().collect();
    assert_eq!(drafts, [31, 32, 33, 41, 42]);
    bench.commit_with(&step, |row| (STATUS_OK, if row.num_drafts == 3 { vec![31, 32, 7] } else { vec![9] }));
    let lens: Vec<_> = (0..3).map(|number| bench.scheduler.sequences[number].most_len).collect();
    assert_eq!(lens, [6, 9, 62]);
    bench.run(1);
    bench.assert_empty();
}

/// A model drafts two tokens of each row, over keys and values of its own, and rests for nobody.
fn followed() -> CoreConfig {
    let speculation =
        Speculation { method: SpeculationMethod::Model, adaptive: false, follows: true, ..Speculation::default() };
    CoreConfig {
        num_draft_tokens: 2,
        num_blocks: 65,
        max_num_seqs: 4,
        speculation: Some(speculation),
        enable_prefix_caching: true,
        ..small()
    }
}

/// What the model that drafts computes before: the first position of each row, and the tokens.
fn to_follow(step: &Planned) -> Vec<(u32, Vec<u32>)> {
    let view = PlanView::new(&step.plan);
    let tokens: Vec<u32> = view.follow_tokens().collect();
    let own = |start: u32, len: u32| tokens[start as usize..][..len as usize].to_vec();
    view.follow_rows().map(|row| (row.start, own(row.query_start, row.query_len))).collect()
}

#[test]
fn a_model_that_drafts_computes_what_it_has_missed_once() {
    let mut bench = Bench::new(CoreConfig { max_num_batched_tokens: 64, ..followed() });
    let prompt: Vec<u32> = (1..=10).collect();
    let next = |bench: &mut Bench| {
        let step = bench.schedule().expect("there is something to do");
        let seen = (to_follow(&step), step.info.num_drafts);
        bench.commit(&step, 99);
        seen
    };
    bench.add(&prompt, max_tokens(40));
    assert_eq!(next(&mut bench), (vec![], 0));
    assert_eq!(next(&mut bench), (vec![(0, prompt.clone())], 2));
    assert_eq!(next(&mut bench), (vec![], 2));
    // Who finds its blocks finds what it has computed of them; two of three are full.
    bench.add(&prompt, max_tokens(40));
    assert_eq!(next(&mut bench), (vec![], 2));
    assert_eq!(next(&mut bench), (vec![(8, vec![9, 10])], 4));
    // Nothing of that is believed once a step has failed.
    let lost = bench.schedule().expect("two rows");
    bench.scheduler.fail_step(lost.info.step_id, &mut bench.told).expect("it is in flight");
    bench.add(&prompt, max_tokens(4));
    assert_eq!(next(&mut bench), (vec![], 0));
    assert_eq!(next(&mut bench), (vec![(0, prompt)], 2));
}

#[test]
fn drafts_that_no_model_follows_for_come_behind_a_cached_prompt_too() {
    let speculation = Speculation { follows: false, ..followed().speculation.expect("it has one") };
    let mut bench = Bench::new(CoreConfig { speculation: Some(speculation), ..followed() });
    for _ in 0..2 {
        bench.add(&counted(10), max_tokens(4));
        let prompt = bench.schedule().expect("a prompt");
        bench.scheduler.check_integrity().expect("nothing is waited for");
        bench.commit(&prompt, 99);
        let step = bench.schedule().expect("a decode");
        assert_eq!((to_follow(&step), step.info.num_drafts), (vec![], 2));
        bench.commit(&step, 99);
        bench.run(99);
    }
    assert!(bench.scheduler.stats().prefix_cache_hits > 0);
}

#[test]
fn what_a_step_has_no_tokens_for_is_followed_in_the_next() {
    let mut bench = Bench::new(CoreConfig { max_num_batched_tokens: 12, ..followed() });
    let prompt: Vec<u32> = (1..=20).collect();
    bench.add(&prompt, max_tokens(40));
    for expected in [(vec![], 0), (vec![], 0), (vec![(0, prompt[..12].to_vec())], 0)] {
        let step = bench.schedule().expect("one row");
        assert_eq!((to_follow(&step), step.info.num_drafts), expected);
        bench.commit(&step, 99);
    }
    let step = bench.schedule().expect("a row with drafts");
    assert_eq!((to_follow(&step), step.info.num_drafts), (vec![(12, [&prompt[12..], &[99]].concat())], 2));
}

#[test]
fn steps_with_drafts_are_padded_to_a_captured_size() {
    let shape = |rows, tokens| DecodeShape { tokens, rows };
    let prefill_graphs =
        PrefillGraphs { tokens: vec![8], decodes: vec![0, 4], draft_decodes: vec![shape(5, 6), shape(9, 16)], rows: 2 };
    let mut bench = Bench::new(CoreConfig {
        num_draft_tokens: 3,
        num_blocks: 65,
        max_num_batched_tokens: 64,
        graph_sizes: vec![1, 2, 4],
        draft_graphs: vec![shape(9, 16), shape(3, 2), shape(5, 6)],
        prefill_graphs,
        ..small()
    });
    let seqs = decoding(&mut bench, &[(5, 40), (6, 40)]);
    let shape_of = |info: &PlanInfo| {
        (info.num_decodes, info.padded_decodes, info.num_decode_tokens, info.padded_rows, info.num_tokens)
    };
    bench.scheduler.set_drafts(seqs[0], &[31, 32]).expect("good drafts");
    let step = bench.schedule().expect("four tokens");
    assert_eq!(shape_of(&step.info), (2, 5, 6, 5, 6));
    let padding: Vec<_> = step.rows[2..].iter().map(|row| (row.slot, row.flags, row.query_len)).collect();
    assert_eq!(padding, [(8, ROW_PADDING, 2), (8, ROW_PADDING, 0), (8, ROW_PADDING, 0)]);
    assert_eq!(step.info.decode_query_len, 3);
    bench.commit(&step, 20);

    // Nobody has drafts: a token a row, as ever.
    let step = bench.schedule().expect("two tokens");
    assert_eq!(shape_of(&step.info), (2, 2, 2, 2, 2));
    bench.commit(&step, 20);

    // All tokens are there, rows are not; and beside a prompt.
    bench.scheduler.set_drafts(seqs[0], &[31, 32, 33]).expect("good drafts");
    bench.scheduler.set_drafts(seqs[1], &[31]).expect("good drafts");
    bench.add(&counted(5), max_tokens(1));
    let step = bench.schedule().expect("six tokens beside a prompt");
    assert_eq!(shape_of(&step.info), (2, 5, 6, 7, 14));
    assert_eq!((step.info.num_prefill_tokens, step.rows[5].query_start), (8, 6));
    bench.commit(&step, 20);
    bench.run(1);
    bench.assert_empty();
}

#[test]
fn static_batches_form_run_to_their_end_and_only_then_let_others_in() {
    let config = CoreConfig { batching: Batching::Static, max_num_seqs: 2, static_batch_wait: 1.0, ..small() };
    let mut bench = Bench::new(config);
    bench.add(&[1], max_tokens(3));
    assert!(bench.schedule().is_none());
    assert_eq!((bench.scheduler.has_work(0.5), bench.scheduler.next_wake()), (false, Some(1.0)));
    bench.add(&[2], max_tokens(1));
    bench.add(&[3], max_tokens(1));
    for expected in [2, 1, 1] {
        let step = bench.schedule().expect("the batch");
        assert_eq!(step.rows.len(), expected);
        bench.commit(&step, 1);
    }
    assert!(bench.schedule().is_none());
    bench.now = 1.0;
    assert!(bench.scheduler.has_work(1.0));
    bench.run(1);
    bench.assert_empty();
}

#[test]
fn without_batching_one_request_runs_at_a_time() {
    let mut bench = Bench::new(CoreConfig { batching: Batching::None, ..small() });
    bench.add(&[1], SamplingOptions { n: 2, ..max_tokens(2) });
    bench.add(&[2], max_tokens(1));
    let rows: Vec<usize> = (0..4)
        .map(|_| {
            let step = bench.schedule().expect("a row");
            bench.commit(&step, 1);
            step.rows.len()
        })
        .collect();
    assert_eq!(rows, [1, 2, 1, 1]);
    bench.assert_empty();
}

#[test]
fn penalties_tell_the_device_what_was_seen() {
    let mut bench = Bench::new(small());
    bench.add(&[5, 6, 5], SamplingOptions { presence_penalty: 1.0, ..max_tokens(2) });
    let step = bench.schedule().expect("the prompt");
    let view = PlanView::new(&step.plan);
    let mut seen: Vec<_> = view.penalty_tokens().collect();
    seen.sort_unstable();
    assert_eq!(seen, [(5, 0, true), (6, 0, true)]);
    assert_eq!(view.enters().next().expect("it enters").penalty, (0, 2));
    assert!(step.info.has_penalties && !step.info.all_greedy);
}

/// One event of a random history.
#[derive(Debug, Clone)]
enum Event {
    Add { len: usize, family: u32, max_tokens: i64, n: i64 },
    Abort(usize),
    Schedule,
    Commit { accept: usize },
    Fail,
    Drafts(usize),
    Wait,
    Reset,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => (1..30usize, 0..3u32, 1..20i64, prop_oneof![3 => Just(1), 1 => 2..4i64])
            .prop_map(|(len, family, max_tokens, n)| Event::Add { len, family, max_tokens, n }),
        1 => (0..20usize).prop_map(Event::Abort),
        12 => Just(Event::Schedule),
        12 => (0..3usize).prop_map(|accept| Event::Commit { accept }),
        1 => Just(Event::Fail),
        2 => (0..20usize).prop_map(Event::Drafts),
        1 => Just(Event::Wait),
        1 => Just(Event::Reset),
    ]
}

fn config() -> impl Strategy<Value = CoreConfig> {
    let sizes = (2..40u32, 1..6u32, 1..6u32, 1..40u32);
    let windows = prop::collection::vec(prop_oneof![Just(0u32), 1..12u32], 1..3);
    let batching = prop_oneof![3 => Just(Batching::Continuous), 1 => Just(Batching::Static), 1 => Just(Batching::None)];
    (sizes, windows, batching, any::<[bool; 4]>(), 0..3u32, 0..3u32).prop_map(
        |((num_blocks, block_size, max_num_seqs, budget), kv_windows, batching, flags, drafts, max_preemptions)| {
            let [caching, chunked, priority, admits_by_growth] = flags;
            CoreConfig {
                num_blocks,
                block_size,
                max_num_seqs,
                max_num_batched_tokens: if chunked { budget.max(1 + drafts) } else { 48 },
                max_model_len: 48,
                kv_windows,
                batching,
                enable_prefix_caching: caching,
                enable_chunked_prefill: chunked,
                scheduling_policy: if priority { SchedulingPolicy::Priority } else { SchedulingPolicy::Fcfs },
                num_draft_tokens: drafts,
                max_preemptions,
                admits_by_growth,
                eos_token_ids: vec![0],
                graph_sizes: vec![2, 4],
                draft_graphs: [2, 8].map(|tokens| DecodeShape { tokens, rows: max_num_seqs + 1 }).to_vec(),
                ..CoreConfig::default()
            }
        },
    )
}

proptest! {
    /// Whatever happens in whatever order: the books balance after each event, and afterwards
    /// everything drains.
    #[test]
    fn any_history_keeps_the_books_and_drains(config in config(), events in prop::collection::vec(event(), 1..120)) {
        let mut bench = Bench::new(config);
        let limit = bench.scheduler.config.max_num_batched_tokens;
        let mut in_flight = std::collections::VecDeque::new();
        let mut ids = Vec::new();
        let mut sequences = 0;
        for (number, event) in events.into_iter().enumerate() {
            match event {
                Event::Add { len, family, max_tokens, n } => {
                    let prompt: Vec<u32> = (0..len as u32).map(|i| i % 5 + family).collect();
                    let options = SamplingOptions { n, max_tokens: Some(max_tokens), ..SamplingOptions::default() };
                    if let Ok(id) = bench.try_add(&prompt, options) {
                        ids.push(id);
                        sequences += n as usize;
                    }
                }
                Event::Abort(index) if index < ids.len() => bench.scheduler.abort(ids[index], &mut bench.told),
                // A failed step behind one that runs still counts.
                Event::Schedule if bench.scheduler.stats().steps_in_flight < 2 => {
                    let step = bench.schedule();
                    prop_assert!(step.as_ref().is_none_or(|step| step.info.num_tokens <= limit));
                    in_flight.extend(step);
                }
                Event::Commit { accept } => {
                    if let Some(step) = in_flight.pop_front() {
                        bench.commit_with(&step, |row| {
                            let count = 1 + accept.min(row.num_drafts as usize);
                            (STATUS_OK, (0..count as u32).map(|i| (number as u32 + i) % 7).collect())
                        });
                    }
                }
                Event::Fail => {
                    if let Some(step) = in_flight.pop_back() {
                        bench.scheduler.fail_step(step.info.step_id, &mut bench.told).expect("it is in flight");
                    }
                }
                Event::Drafts(index) if index < ids.len() => {
                    let drafts = vec![1; bench.scheduler.config.num_draft_tokens as usize];
                    bench.scheduler.set_drafts(SeqRef { request: ids[index], index: 0 }, &drafts).expect("good drafts");
                }
                Event::Wait => bench.now += 0.06,
                Event::Reset => bench.scheduler.reset_prefix_cache(),
                Event::Abort(_) | Event::Schedule | Event::Drafts(_) => {}
            }
            prop_assert_eq!(bench.scheduler.check_integrity(), Ok(()));
        }
        for step in in_flight {
            bench.commit(&step, 1);
        }
        bench.now += 1.0;
        bench.run(1);
        bench.assert_empty();
        prop_assert_eq!(bench.told.finished.len(), sequences);
        bench.scheduler.reset_prefix_cache();
        prop_assert_eq!(bench.scheduler.stats().blocks_blank, bench.scheduler.stats().blocks_total);
    }
}
