//! What the scheduler makes of whole loads, on a modelled H100 with a 7B: `cargo bench --bench
//! scheduler_loads`. The same on every machine, and as fast as it may be: nothing here is timed.
//! `tests/loads` asserts on the same loads.

#[path = "../tests/loads/model.rs"]
#[allow(dead_code)] // Some of it is for the tests alone.
mod model;
#[path = "../tests/loads/workloads.rs"]
#[allow(dead_code)]
mod workloads;

use model::{Machine, H100_7B};

fn main() {
    let heads = ["tok/s", "seconds", "steps", "preempted", "recomputed", "running", "few", "gap s"];
    println!("{:44}{}", "load", heads.map(|head| format!("{head:>11}")).concat());
    for (name, config, requests) in workloads::all().into_iter().chain(workloads::held_out()) {
        let mut machine = Machine::new(config);
        for asked in &requests {
            machine.add(asked);
        }
        machine.run(&H100_7B);
        let out = machine.outcome();
        println!(
            "{name:44}{:11.0}{:11.1}{:11}{:11}{:10.1}%{:11.0}{:10.1}%{:11.2}",
            out.tokens_per_second,
            out.seconds,
            out.steps,
            out.preemptions,
            100.0 * out.recomputed,
            out.mean_running,
            100.0 * out.few_running,
            out.longest_gap
        );
    }
}
