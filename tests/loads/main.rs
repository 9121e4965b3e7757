//! Whole loads on a modelled card, and what the scheduler must make of them.
//!
//! | file | one idea |
//! | --- | --- |
//! | `model.rs` | a device with a clock, and a core that runs on it |
//! | `workloads.rs` | the loads |
//!
//! `bench/scheduler_loads.rs` prints the figures of the same loads. Nothing here is timed: the model
//! gives the same on every machine.

mod model;
mod workloads;

use _core::config::CoreConfig;
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
