//! How long answers get: what was seen of those that were given, and what that says of the ones
//! that are being given.
//!
//! Lengths fall into bins that grow by a quarter each. Of each bin it is counted how many sequences
//! stopped in it and how many went on, so that those that still run count too, as far as they got:
//! the short ones end first, and alone they would say that all are short (the estimate of Kaplan
//! and Meier, 1958). Old counts lose weight.

/// Answers of which nothing is known are thought to reach this length, and of those that do one in
/// four twice, one in sixteen four times as much: 256 tokens on average.
const UNKNOWN: u32 = 128;

/// A bin that has seen this many is halved: what was long ago counts less.
const MEMORY: f64 = 1024.0;

/// No chance is smaller than this, so that they can be divided by one another.
const LEAST: f64 = 1e-9;

/// Whether an answer may end before `max_tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// It has `max_tokens`, ignores end tokens and has nothing to stop at: its length is known, until
    /// one of its kind stops all the same.
    Known,
    /// It may stop any time.
    Open,
}

#[derive(Debug)]
struct History {
    stopped: Vec<f64>,
    went_on: Vec<f64>,
    /// What is thought of lengths that nobody reached yet is that they are reached.
    is_certain: bool,
    /// By bin: the chance to get longer than where it begins.
    survival: Vec<f64>,
    is_stale: bool,
}

/// The history of lengths.
#[derive(Debug)]
pub(super) struct Lengths {
    /// Bin k holds the lengths above `edges[k]`, up to `edges[k + 1]`.
    edges: Vec<u32>,
    known: History,
    open: History,
}

impl Lengths {
    /// Of answers up to `longest` tokens.
    pub fn new(longest: u32) -> Self {
        let mut edges = vec![0];
        let mut last = 0;
        while last < longest {
            last = (last + 1).max(last + last / 4);
            edges.push(last);
        }
        let history = |is_certain| History {
            stopped: vec![0.0; edges.len()],
            went_on: vec![0.0; edges.len()],
            is_certain,
            survival: vec![1.0; edges.len()],
            is_stale: !is_certain,
        };
        Self { known: history(true), open: history(false), edges }
    }

    /// Where the bins begin; they serve as points of time as well.
    pub fn edges(&self) -> &[u32] {
        &self.edges
    }

    /// The last length of a bin.
    pub fn last_of(&self, bin: u32) -> u32 {
        self.edges.get(bin as usize + 1).copied().unwrap_or(u32::MAX)
    }

    /// A sequence stopped by itself in `bin`.
    pub fn stopped(&mut self, ending: Ending, bin: u32) {
        let history = self.of(ending);
        history.is_certain = false;
        history.stopped[bin as usize] += 1.0;
        history.seen(bin as usize);
    }

    /// A sequence got beyond `bin`.
    pub fn went_on(&mut self, ending: Ending, bin: u32) {
        let history = self.of(ending);
        history.went_on[bin as usize] += 1.0;
        history.seen(bin as usize);
    }

    /// Brings the chances up to date.
    pub fn refresh(&mut self) {
        for history in [&mut self.known, &mut self.open] {
            history.refresh(&self.edges);
        }
    }

    /// The chance to get beyond `len`, which is in `bin` or in one after it, and the bin it is in. By
    /// the last [`refresh`](Self::refresh).
    pub fn survival(&self, ending: Ending, mut bin: usize, len: u32) -> (f64, usize) {
        let history = match ending {
            Ending::Known => &self.known,
            Ending::Open => &self.open,
        };
        while bin + 1 < self.edges.len() && self.edges[bin + 1] <= len {
            bin += 1;
        }
        let here = history.survival[bin];
        let Some(next) = history.survival.get(bin + 1) else { return (here, bin) };
        let (start, end) = (self.edges[bin], self.edges[bin + 1]);
        (here + (next - here) * f64::from(len - start) / f64::from(end - start), bin)
    }

    /// Whether every sequence of this kind is thought to reach its `max_tokens`.
    pub fn is_certain(&self, ending: Ending) -> bool {
        ending == Ending::Known && self.known.is_certain
    }

    fn of(&mut self, ending: Ending) -> &mut History {
        match ending {
            Ending::Known => &mut self.known,
            Ending::Open => &mut self.open,
        }
    }
}

impl History {
    fn seen(&mut self, bin: usize) {
        self.is_stale = true;
        if self.stopped[bin] + self.went_on[bin] >= MEMORY {
            self.stopped[bin] /= 2.0;
            self.went_on[bin] /= 2.0;
        }
    }

    fn refresh(&mut self, edges: &[u32]) {
        if !std::mem::take(&mut self.is_stale) || self.is_certain {
            return;
        }
        for bin in 0..edges.len() - 1 {
            let (start, end) = (edges[bin], edges[bin + 1]);
            // As if one had been seen of which nothing is known.
            let unseen = if start < UNKNOWN { 0.0 } else { 1.0 - (f64::from(start) / f64::from(end)).powi(2) };
            let (stopped, went_on) = (self.stopped[bin], self.went_on[bin]);
            let stops = (stopped + unseen) / (stopped + went_on + 1.0);
            self.survival[bin + 1] = (self.survival[bin] * (1.0 - stops)).max(LEAST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sequence that gets to `len` tokens, and stops there or is cut there.
    fn see(lengths: &mut Lengths, ending: Ending, len: u32, stops: bool) {
        let mut bin = 0;
        while lengths.last_of(bin) < len || (lengths.last_of(bin) == len && !stops) {
            lengths.went_on(ending, bin);
            bin += 1;
        }
        if stops {
            lengths.stopped(ending, bin);
        }
        lengths.refresh();
    }

    fn chance(lengths: &Lengths, ending: Ending, len: u32) -> f64 {
        lengths.survival(ending, 0, len).0
    }

    #[test]
    fn what_nobody_has_seen() {
        let mut lengths = Lengths::new(4096);
        lengths.refresh();
        assert!(lengths.is_certain(Ending::Known));
        let open = [100, 250, 500, 1000].map(|len| chance(&lengths, Ending::Open, len));
        // From 151 on, where a bin begins, with the square of the length.
        for (chance, expected) in open.iter().zip([1.0, 0.365, 0.091, 0.023]) {
            assert!((chance - expected).abs() < 0.02, "{open:?}");
        }
    }

    #[test]
    fn those_that_are_cut_or_still_run_count_as_far_as_they_got() {
        let mut lengths = Lengths::new(4096);
        for _ in 0..300 {
            see(&mut lengths, Ending::Open, 50, true);
            see(&mut lengths, Ending::Open, 200, false);
            see(&mut lengths, Ending::Open, 800, true);
        }
        // A third stops at 50; of those that were seen beyond 200, all get to 800.
        let chances = [40, 70, 600, 1100].map(|len| chance(&lengths, Ending::Open, len));
        for (chance, expected) in chances.iter().zip([1.0, 2.0 / 3.0, 2.0 / 3.0, 0.0]) {
            assert!((chance - expected).abs() < 0.05, "{chances:?}");
        }
    }

    #[test]
    fn a_length_is_known_until_one_of_its_kind_stops_before() {
        let mut lengths = Lengths::new(4096);
        for _ in 0..20 {
            see(&mut lengths, Ending::Known, 256, false);
        }
        assert!(lengths.is_certain(Ending::Known));
        see(&mut lengths, Ending::Known, 100, true);
        assert!(!lengths.is_certain(Ending::Known));
        let left = chance(&lengths, Ending::Known, 256);
        assert!((0.75..0.99).contains(&left), "{left}");
    }

    #[test]
    fn habits_change() {
        let mut lengths = Lengths::new(4096);
        for _ in 0..2000 {
            see(&mut lengths, Ending::Open, 1000, true);
        }
        for _ in 0..3000 {
            see(&mut lengths, Ending::Open, 40, true);
        }
        assert!(chance(&lengths, Ending::Open, 500) < 0.05);
    }
}
