//! Whether there will be blocks for everybody who runs, and for one more, until they end.
//!
//! Looks at points of time that lie further apart the further off they are. At each, every sequence
//! is held to hold what its length makes then, times the chance that it still runs. Where lengths
//! are known the sum is what will be; where they are guessed, it may be more, by its deviation.
//!
//! Peers: vLLM looks at what is known of the candidate only, and preempts; TensorRT-LLM's default
//! keeps `max_tokens` free for everyone; `SGLang` keeps a part of that free, which it adapts by what it
//! had to take back; `LightLLM` draws lengths from the last requests.

use super::lengths::{Ending, Lengths};
use super::{Scheduler, Sequence, MAX_STEPS_IN_FLIGHT};
use crate::kv_cache::KvCache;

/// Deviations of the sum that are kept free. More saves preemptions and has fewer run; recomputing a
/// prompt is cheap beside an empty place (`bench/notes/scheduler.md`).
const SLACK: f64 = 2.0;

/// Below this chance a sequence counts as gone.
const GONE: f64 = 0.01;

/// The blocks that will be held, by points of time. Kept between steps for its memory.
#[derive(Debug, Default)]
pub(super) struct Forecast {
    mean: Vec<f64>,
    variance: Vec<f64>,
    /// Blocks that there are for those who run and for who joins.
    capacity: f64,
    /// It holds for the plan being made.
    pub is_made: bool,
}

/// One sequence, as far as its growth depends on it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Growing {
    ending: Ending,
    bin: usize,
    outputs: u32,
    /// Tokens that it will still output, at most.
    left: u32,
    /// Steps by which its end comes later than that many steps: those of its prompt, and those in
    /// flight when its last token is known.
    delay: u32,
    /// Tokens that lie in blocks, before its next output token.
    len: u32,
    /// Blocks that others hold as well.
    shared: usize,
}

impl Growing {
    pub fn new(sequence: &Sequence, shared: usize, budget: u32) -> Self {
        let outputs = sequence.outputs.len() as u32;
        let prompt_left = if sequence.decoding { 0 } else { sequence.known_len() - sequence.most_len };
        Self {
            ending: sequence.traits.ending,
            bin: sequence.length_bin as usize,
            outputs,
            // An embedding has no output, and holds its blocks for as long as one token takes.
            left: (sequence.max_tokens - outputs).max(1),
            delay: prompt_left.div_ceil(budget) + MAX_STEPS_IN_FLIGHT as u32,
            len: sequence.known_len() - 1,
            shared,
        }
    }

    /// Calls `visit` with (point of time, chance that it still runs, blocks it holds then), while it
    /// may run.
    fn visit(&self, lengths: &Lengths, kv: &KvCache, mut visit: impl FnMut(usize, f64, f64)) {
        let is_certain = lengths.is_certain(self.ending);
        let (now, mut bin) = lengths.survival(self.ending, self.bin, self.outputs);
        let times = lengths.edges();
        for point in 1..times.len() {
            if self.left + self.delay <= times[point - 1] {
                return;
            }
            let time = times[point].min(self.left);
            let mut chance = 1.0;
            if !is_certain {
                // At its last moment it has all its blocks, whether it stops there or is cut.
                let (then, its_bin) = lengths.survival(self.ending, bin, self.outputs + time - 1);
                bin = its_bin;
                chance = then / now;
                if chance < GONE {
                    return;
                }
            }
            let blocks = kv.decode_footprint(self.len + time).saturating_sub(self.shared);
            visit(point, chance, blocks as f64);
        }
    }
}

impl Scheduler {
    /// Whether a sequence may join by what it will hold: there is room for its growth and that of
    /// all who run. `shared`: blocks of it that others hold.
    pub(super) fn growth_fits(&mut self, number: u32, shared: usize) -> bool {
        if !self.config.admits_by_growth {
            return true;
        }
        if !self.forecast.is_made {
            self.make_forecast();
        }
        let Forecast { mean, variance, capacity, .. } = &self.forecast;
        let mut fits = true;
        let budget = self.config.max_num_batched_tokens;
        Growing::new(&self.sequences[number], shared, budget).visit(
            &self.lengths,
            &self.kv,
            |point, chance, blocks| {
                let mean = mean[point] + chance * blocks;
                let variance = variance[point] + chance * (1.0 - chance) * blocks * blocks;
                fits &= mean + SLACK * variance.sqrt() <= *capacity;
            },
        );
        fits
    }

    /// Counts a sequence that has joined, with what it holds by itself.
    pub(super) fn grows_too(&mut self, number: u32) {
        if self.forecast.is_made {
            self.forecast_one(number);
        }
    }

    fn make_forecast(&mut self) {
        self.lengths.refresh();
        let (points, pool) = (self.lengths.edges().len(), self.kv.pool());
        let forecast = &mut self.forecast;
        forecast.is_made = true;
        forecast.capacity = (pool.num_free() + pool.num_held()) as f64;
        for sums in [&mut forecast.mean, &mut forecast.variance] {
            sums.clear();
            sums.resize(points, 0.0);
        }
        for place in 0..self.running.len() {
            let number = self.running[place];
            let sequence = &self.sequences[number];
            // What it gives back when it ends.
            self.forecast.capacity += sequence.num_live().saturating_sub(sequence.num_shared) as f64;
            self.forecast_one(number);
        }
    }

    fn forecast_one(&mut self, number: u32) {
        let Forecast { mean, variance, .. } = &mut self.forecast;
        let sequence = &self.sequences[number];
        let budget = self.config.max_num_batched_tokens;
        Growing::new(sequence, sequence.num_shared, budget).visit(&self.lengths, &self.kv, |point, chance, blocks| {
            mean[point] += chance * blocks;
            variance[point] += chance * (1.0 - chance) * blocks * blocks;
        });
    }
}
