//! Seeded simulation of the core on an exact model of the device: the proof that requests do not
//! disturb one another.
//!
//! | file | one idea |
//! | --- | --- |
//! | `model.rs` | the hash model: what takes the place of a neural network |
//! | `packed.rs` | reads the packed plan from docs/plan.md's tables alone |
//! | `device.rs` | executes plans on paged memory, and distrusts them |
//! | `oracle.rs` | the stream a request must output, computed alone |
//! | `toy_grammar.rs` | what bounds some requests' tokens |
//! | `scenario.rs` | what a seed picks |
//! | `ledger.rs` | what was asked and what came out |
//! | `checks.rs` | the rules, recounted after every turn |
//! | `fairness.rs` | equal clients are served equally |
//! | `shares.rs` | keys that share the engine are served by their weights |
//! | `story.rs` | whether a request's story is what happened |
//! | `world.rs` | drives core and device through a scenario |
//! | `trace.rs` | events and counts for the reader |
//! | `planted_faults.py` | breaks the core in known ways and shows that each is found |
//!
//! `OCTAVO_SIM_SECONDS=60 cargo test --release --test simulation --
//! --nocapture` runs fresh seeds for a minute; `OCTAVO_SIM_SEED=n` runs that one and prints its
//! whole trace. A seed that ever failed goes into `kept_seeds.txt`.

mod checks;
mod device;
mod fairness;
mod ledger;
mod model;
mod oracle;
mod packed;
mod scenario;
mod shares;
mod story;
mod toy_grammar;
mod trace;
mod world;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use trace::Totals;
use world::World;

/// Runs one seed; on failure prints what happened last and fails the test with the seed.
fn run_seed(seed: u64, whole_trace: bool) -> Totals {
    let mut world = World::new(seed);
    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
    if whole_trace {
        world.print_trace(usize::MAX);
    }
    let failure = match outcome {
        Ok(Ok(())) => return world.totals(),
        Ok(Err(violation)) => violation,
        Err(panic) => match panic.downcast_ref::<String>() {
            Some(text) => format!("the core panicked: {text}"),
            None => "the core panicked".to_string(),
        },
    };
    if !whole_trace {
        world.print_trace(40);
    }
    panic!("simulation seed {seed}: {failure}\n  replay: OCTAVO_SIM_SEED={seed} cargo test --release --test simulation replay -- --nocapture");
}

/// Each failure ever met, and the fixed seeds that every test run starts with.
#[test]
fn kept_seeds() {
    let kept = include_str!("kept_seeds.txt").lines().filter_map(|line| line.split_whitespace().next());
    for seed in kept.filter(|word| !word.starts_with('#')) {
        run_seed(seed.parse().expect("kept_seeds.txt has a number first on each line"), false);
    }
    for seed in 0..200 {
        run_seed(seed, false);
    }
}

/// One seed from `OCTAVO_SIM_SEED`, with its whole trace.
#[test]
fn replay() {
    if let Ok(seed) = std::env::var("OCTAVO_SIM_SEED") {
        run_seed(seed.parse().expect("OCTAVO_SIM_SEED is a number"), true);
    }
}

/// Fresh seeds for `OCTAVO_SIM_SECONDS` (without it: none), on all cores.
#[test]
fn fresh_seeds() {
    let Some(seconds) = std::env::var("OCTAVO_SIM_SECONDS").ok() else { return };
    let budget = Duration::from_secs(seconds.parse().expect("OCTAVO_SIM_SECONDS is a whole number"));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is past 1970");
    let next_seed = AtomicU64::new(model::mix(now.as_nanos() as u64) >> 1);
    let start = Instant::now();
    println!("fresh seeds from {}", next_seed.load(Ordering::Relaxed));
    let run_until_done = || {
        let mut totals = Totals::default();
        while start.elapsed() < budget {
            totals.add(&run_seed(next_seed.fetch_add(1, Ordering::Relaxed), false));
        }
        totals
    };
    let totals = std::thread::scope(|scope| {
        let num_threads = std::thread::available_parallelism().map_or(1, usize::from);
        let threads: Vec<_> = (0..num_threads).map(|_| scope.spawn(run_until_done)).collect();
        let mut sum = Totals::default();
        for thread in threads {
            match thread.join() {
                Ok(totals) => sum.add(&totals),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        sum
    });
    println!("{totals}");
}
