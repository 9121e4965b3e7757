//! Whole loads on a modelled card, and what the scheduler must make of them.
//!
//! | file | one idea |
//! | --- | --- |
//! | `model.rs` | a device with a clock, and a core that runs on it |
//! | `workloads.rs` | the loads |
//!
//! `bench/scheduler_loads.rs` prints the figures of the same loads. Nothing here is timed: the model
//! gives the same on every machine.

#[allow(dead_code)] // Some of it is for the bench alone.
mod model;
mod workloads;

use _core::config::{CoreConfig, SchedulingPolicy};
use _core::request::RequestId;
use model::{Asked, Machine, Outcome, H100_7B};
use workloads::{card, prompt};

fn outcome(config: &CoreConfig, requests: &[Asked]) -> Outcome {
    let mut machine = Machine::new(config.clone());
    for asked in requests {
        machine.add(asked);
    }
    machine.run(&H100_7B);
    machine.outcome()
}

/// Against the plainest rule: let in whoever fits now, and have the newest give way.
#[test]
fn no_load_loses_by_what_admission_foresees() {
    for (name, config, requests) in workloads::all() {
        let plain = outcome(&CoreConfig { admits_by_growth: false, ..config.clone() }, &requests);
        let ours = outcome(&config, &requests);
        let kept = ours.tokens_per_second / plain.tokens_per_second;
        assert!(kept > 0.99, "{name}: {ours:?}\nthe plain rule: {plain:?}");
        assert!(ours.few_running < plain.few_running + 0.01, "{name}: {ours:?}\nthe plain rule: {plain:?}");
        let allowed = plain.preemptions / 2 + 50;
        assert!(ours.preemptions <= allowed, "{name}: {ours:?}\nthe plain rule: {plain:?}");
    }
}

/// What is foreseen costs a twentieth at most where it helps least: a pool for forty, and one answer
/// in ten of 2,000 tokens. Elsewhere it gains as much, with a small part of the preemptions.
#[test]
fn loads_that_nothing_was_tuned_on_keep_their_throughput() {
    let mut gained = 1.0;
    let loads = workloads::held_out();
    for (name, config, requests) in &loads {
        let plain = outcome(&CoreConfig { admits_by_growth: false, ..config.clone() }, requests);
        let ours = outcome(config, requests);
        let kept = ours.tokens_per_second / plain.tokens_per_second;
        gained *= kept;
        assert!(kept > 0.95, "{name}: {ours:?}\nthe plain rule: {plain:?}");
        assert!(ours.preemptions <= plain.preemptions / 2, "{name}: {ours:?}\nthe plain rule: {plain:?}");
    }
    let mean = f64::powf(gained, 1.0 / loads.len() as f64);
    assert!(mean > 1.0, "{mean}");
}

/// The plain rule preempts a hundred and computes a fifth of the prompt tokens again.
#[test]
fn known_lengths_are_never_preempted() {
    for (max_tokens, prefix_caching) in [(256, false), (256, true), (700, false)] {
        let config = CoreConfig { enable_prefix_caching: prefix_caching, ..card() };
        let mut requests = workloads::uniform();
        for (asked, extra) in requests.iter_mut().zip((0..5).cycle()) {
            asked.max_tokens = Some(max_tokens + extra * max_tokens / 8);
        }
        let plain = outcome(&CoreConfig { admits_by_growth: false, ..config.clone() }, &requests);
        let ours = outcome(&config, &requests);
        assert_eq!(ours.preemptions, 0, "{ours:?}");
        assert!(
            plain.preemptions > 50 && ours.tokens_per_second > 1.02 * plain.tokens_per_second,
            "{ours:?} {plain:?}"
        );
    }
}

/// A pool for 27k tokens and a model of 32k: the limits of such requests say nothing.
#[test]
fn the_first_open_ended_chats_run_together() {
    let config = CoreConfig { num_blocks: 430, max_model_len: 27_000, enable_prefix_caching: true, ..card() };
    let mut machine = Machine::new(config);
    for asked in workloads::chats(100, None) {
        machine.add(&asked);
    }
    for _ in 0..20 {
        machine.turn(&H100_7B);
    }
    let running = machine.seen.last().expect("steps ran").running;
    assert!(running >= 30, "{running} run");
    let long = Asked { prompt: prompt(20_000, 1), max_tokens: None, stops_after: Some(10), priority: 0 };
    machine.add(&long);
    machine.run(&H100_7B);
}

/// Eight prompts share 320 tokens, in a pool where a second one does not fit beside the first until those
/// are computed. Then it does, though nobody comes or leaves.
#[test]
fn waiting_prompts_enter_when_what_runs_has_made_them_cheap() {
    let config =
        CoreConfig { num_blocks: 41, block_size: 16, max_model_len: 512, enable_prefix_caching: true, ..card() };
    let mut machine = Machine::new(config);
    for number in 0..8 {
        let prompt = [prompt(320, 1), prompt(8, 50 + number)].concat();
        machine.add(&Asked { prompt, max_tokens: Some(33), stops_after: None, priority: 0 });
    }
    machine.run(&H100_7B);
    // The first runs alone while its prompt is computed: one step, and the one that was planned meanwhile. A
    // sequence takes 3 blocks of its own, so six run together, and the other two after them.
    let running: Vec<u64> = machine.seen.iter().map(|step| step.running).collect();
    assert!(running[2..].iter().take(30).all(|count| *count >= 5), "{running:?}");
    assert!(running.len() <= 2 * 33 + 10, "{} steps: {running:?}", running.len());
}

/// A machine for prompts of 100,000 tokens.
fn for_long_prompts(scheduling_policy: SchedulingPolicy) -> Machine {
    let config = CoreConfig { num_blocks: 8000, max_model_len: 131_072, max_num_seqs: 16, scheduling_policy, ..card() };
    Machine::new(config)
}

fn asked(len: u32, number: u32, max_tokens: i64, priority: i32) -> Asked {
    Asked { prompt: prompt(len, number), max_tokens: Some(max_tokens), stops_after: None, priority }
}

/// Steps that are committed from now on until the request has its first token, that one included.
fn steps_to_first_token(machine: &mut Machine, id: RequestId) -> u64 {
    let before = machine.seen.len() as u64;
    while machine.first_token(id).is_none() {
        assert!(machine.turn(&H100_7B), "it never comes");
    }
    machine.first_token(id).expect("it came").0 - before
}

#[test]
fn a_short_prompt_has_its_first_token_in_the_next_step_behind_a_long_one() {
    for long_ones in [1, 3, 30] {
        for turns_before in [0, 1, 4, 12] {
            let mut machine = for_long_prompts(SchedulingPolicy::Fcfs);
            for number in 0..long_ones {
                machine.add(&asked(if long_ones == 30 { 30_000 } else { 100_000 }, number, 4, 0));
            }
            for _ in 0..turns_before {
                machine.turn(&H100_7B);
            }
            let short = machine.add(&asked(20, 99, 4, 0));
            // One step is in flight, planned before it came.
            let steps = steps_to_first_token(&mut machine, short);
            assert!(steps <= 2, "{steps} steps behind {long_ones} long prompts, after {turns_before} turns");
        }
    }
}

/// Half of a step is the long prompt's, whoever comes.
#[test]
fn short_prompts_take_at_most_half_of_the_steps_from_a_long_one() {
    let mut machine = for_long_prompts(SchedulingPolicy::Fcfs);
    let long = machine.add(&asked(100_000, 0, 4, 0));
    let mut number = 0;
    while machine.first_token(long).is_none() {
        while machine.core.stats().num_waiting < 20 {
            number += 1;
            machine.add(&asked(3000, number, 1, 0));
        }
        machine.turn(&H100_7B);
    }
    let alone = 100_000_u64.div_ceil(8192);
    let (steps, _) = machine.first_token(long).expect("it came");
    assert!(steps <= 2 * alone + 2, "{steps} steps, {alone} alone");
    machine.run(&H100_7B);
}

#[test]
fn an_urgent_request_goes_before_the_chunks_of_background_prompts() {
    for urgent_len in [20, 3000, 20_000] {
        let mut machine = for_long_prompts(SchedulingPolicy::Priority);
        for number in 0..4 {
            machine.add(&asked(100_000, number, 4, 1));
        }
        for _ in 0..5 {
            machine.turn(&H100_7B);
        }
        let urgent = machine.add(&asked(urgent_len, 99, 4, 0));
        let steps = steps_to_first_token(&mut machine, urgent);
        let own = u64::from(urgent_len.div_ceil(8192));
        assert!(steps <= own + 1, "{steps} steps for {urgent_len} tokens");
        machine.run(&H100_7B);
    }
}

/// Background work decodes for a thousand steps, in all places or in all blocks.
#[test]
fn an_urgent_request_takes_the_place_of_a_background_one() {
    for (num_blocks, max_num_seqs, urgent_ones) in [(1720, 8, 1), (1720, 8, 5), (102, 64, 1)] {
        let config = CoreConfig { num_blocks, max_num_seqs, scheduling_policy: SchedulingPolicy::Priority, ..card() };
        let mut machine = Machine::new(config);
        for number in 0..8 {
            machine.add(&asked(300, number, 1000 - 520 * i64::from(num_blocks == 102), 1));
        }
        for _ in 0..5 {
            machine.turn(&H100_7B);
        }
        let urgent: Vec<RequestId> =
            (0..urgent_ones).map(|number| machine.add(&asked(600, 99 + number, 4, 0))).collect();
        for id in urgent {
            let steps = steps_to_first_token(&mut machine, id);
            assert!(steps <= 4, "{steps} steps with {num_blocks} blocks");
        }
        machine.run(&H100_7B);
    }
}

/// However many urgent requests come, background work gives way `max_preemptions` times at most, and
/// waiting makes up for its rank.
#[test]
fn background_work_ends_beside_a_stream_of_urgent_requests() {
    let config =
        CoreConfig { max_num_seqs: 2, scheduling_policy: SchedulingPolicy::Priority, priority_aging: 2.0, ..card() };
    let mut machine = Machine::new(config);
    let background = [0, 1].map(|number| machine.add(&asked(300, number, 200, 1)));
    let mut number = 2;
    while background.iter().any(|id| machine.first_token(*id).is_none()) || machine.now() < 20.0 {
        while machine.core.stats().num_waiting < 3 {
            machine.add(&asked(100, number, 50, 0));
            number += 1;
        }
        machine.turn(&H100_7B);
    }
    let stats = machine.core.stats();
    assert!((1..=2 * 3).contains(&stats.preemptions), "{stats:?}");
    assert!(background.iter().all(|id| machine.has_ended(*id)), "background work waits for ever");
}

/// One call of a thousand prompts of 1,500 tokens: whoever comes after it takes the next place.
#[test]
fn a_call_of_many_prompts_lets_others_in_between() {
    for policy in [SchedulingPolicy::Fcfs, SchedulingPolicy::Priority] {
        let config = CoreConfig { scheduling_policy: policy, max_num_seqs: 16, ..card() };
        let mut machine = Machine::new(config);
        let call: Vec<Asked> = (0..1000).map(|number| asked(1500, number, 16, 0)).collect();
        machine.add_call(&call);
        for _ in 0..10 {
            machine.turn(&H100_7B);
        }
        let other = machine.add_call(&[asked(1, 5000, 1, 0), asked(1, 5001, 1, 0)]);
        let waited = machine.now();
        let last = RequestId(other.0 + 1);
        let steps = steps_to_first_token(&mut machine, last);
        let seconds = machine.first_token(last).expect("it came").1 - waited;
        assert!(steps < 30 && seconds < 2.0, "{steps} steps, {seconds} s under {policy:?}");
        machine.run(&H100_7B);
    }
}
