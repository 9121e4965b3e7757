//! What a world remembers for the reader: its events, and its counts.

use crate::device::Faults;
use _core::error::Error;
use std::fmt;

/// What happened, for the trace of a failure.
#[derive(Debug)]
#[allow(dead_code)] // Read through `Debug` only.
pub enum Event {
    Submit {
        id: u64,
        call: u64,
        prompt_len: usize,
        n: u32,
        max_tokens: Option<u32>,
        priority: i32,
    },
    Refuse(Error),
    Abort(u64),
    Plan {
        step_id: u64,
        /// Request, choice, query length.
        rows: Vec<(u64, u32, u32)>,
        enters: u32,
        copies: u32,
        faults: Faults,
    },
    NoPlan,
    Commit(u64),
    Fail(u64),
    FailAll,
    ResetCache,
    Clock(f64),
}

/// Counts over one or many worlds.
#[derive(Default, Debug, Clone)]
pub struct Totals {
    pub worlds: u64,
    pub steps: u64,
    pub tokens: u64,
    pub requests: u64,
    pub refused: u64,
    /// Endings: stop, length, abort, error.
    pub ended: [u64; 4],
    pub preemptions: u64,
    pub cached_tokens: u64,
    pub copies: u64,
    /// Rows of grammar masks.
    pub masks: u64,
}

impl Totals {
    pub fn add(&mut self, other: &Totals) {
        self.worlds += other.worlds;
        self.steps += other.steps;
        self.tokens += other.tokens;
        self.requests += other.requests;
        self.refused += other.refused;
        self.ended.iter_mut().zip(other.ended).for_each(|(sum, count)| *sum += count);
        self.preemptions += other.preemptions;
        self.cached_tokens += other.cached_tokens;
        self.copies += other.copies;
        self.masks += other.masks;
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [stop, length, abort, error] = self.ended;
        write!(
            f,
            "{} seeds, {} steps, {} output tokens, {} requests ({} refused), sequences ended: {stop} stop, {length} length, \
             {abort} abort, {error} error; {} preemptions, {} cached tokens, {} block copies, {} masks",
            self.worlds, self.steps, self.tokens, self.requests, self.refused, self.preemptions, self.cached_tokens, self.copies, self.masks
        )
    }
}
