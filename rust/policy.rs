//! Who goes first: the order of the waiting queue, which is also the order in which running
//! sequences are served and the reverse of the order in which they are preempted.
//!
//! Aging is linear: a request's rank is `priority - waited / priority_aging`, lower first. All
//! waiting requests age alike, so comparing ranks at any moment is comparing
//! `arrival + priority * priority_aging`, which never changes: the queue needs no re-sorting, and
//! whoever waits is passed only by requests that came at most
//! `priority_aging * (difference of priorities)` seconds later.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::config::{CoreConfig, SchedulingPolicy};

/// Sequences that may be admitted past one that does not fit, before the queue stops for it. Then
/// what runs drains, and it has its turn; so a big request is passed a bounded number of times, and
/// small ones wait only while the batch drains.
pub const HEAD_BYPASS_LIMIT: u32 = 32;

/// Sequences that do not fit which one step looks at.
pub const LOOKAHEAD: usize = 16;

/// A place in the order: smaller goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Order {
    /// `arrival + priority * priority_aging`, as an integer of the same order; 0 for first come,
    /// first served.
    rank: i64,
    /// When its request took its place in the queue: one after another.
    turn: u64,
    /// Which of the request's sequences.
    index: u32,
}

impl Order {
    /// The place of sequence `index` of the request that took turn `turn`, at `arrival` seconds.
    pub fn new(config: &CoreConfig, turn: u64, index: u32, priority: i32, arrival: f64) -> Self {
        let rank = match config.scheduling_policy {
            SchedulingPolicy::Fcfs => 0,
            SchedulingPolicy::Priority => ordered_bits(arrival + f64::from(priority) * config.priority_aging),
        };
        Self { rank, turn, index }
    }
}

/// Maps floats to integers of the same order (IEEE 754 totalOrder).
fn ordered_bits(value: f64) -> i64 {
    let bits = value.to_bits() as i64;
    bits ^ (((bits >> 63) as u64) >> 1) as i64
}

/// Which sequences of the queue are meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Those with few tokens to compute.
    Short,
    /// The others.
    Long,
}

/// Waiting sequences, by order; the values are the scheduler's own numbers for them. Short ones can
/// be asked for by themselves, since they may go past long ones.
#[derive(Debug, Default)]
pub struct WaitingQueue {
    short: BTreeMap<Order, u32>,
    long: BTreeMap<Order, u32>,
}

impl WaitingQueue {
    /// Puts a sequence in its place.
    pub fn insert(&mut self, order: Order, lane: Lane, sequence: u32) {
        let sequences = match lane {
            Lane::Short => &mut self.short,
            Lane::Long => &mut self.long,
        };
        let previous = sequences.insert(order, sequence);
        assert!(previous.is_none(), "sequence {sequence} is queued twice");
    }

    /// Takes a sequence out; false if it was not in.
    pub fn remove(&mut self, order: Order) -> bool {
        self.short.remove(&order).or_else(|| self.long.remove(&order)).is_some()
    }

    /// The first sequence after `order`, or the very first.
    pub fn next_after(&self, order: Option<Order>) -> Option<(Order, u32)> {
        let (short, long) = (self.next_in(Lane::Short, order), self.next_in(Lane::Long, order));
        short.into_iter().chain(long).min()
    }

    /// The same of one lane.
    pub fn next_in(&self, lane: Lane, order: Option<Order>) -> Option<(Order, u32)> {
        self.lane(lane, order).next()
    }

    /// The sequences of one lane after `order`, or all of them, first to last.
    pub fn lane(&self, lane: Lane, order: Option<Order>) -> impl Iterator<Item = (Order, u32)> + '_ {
        let sequences = match lane {
            Lane::Short => &self.short,
            Lane::Long => &self.long,
        };
        let from = order.map_or(Bound::Unbounded, Bound::Excluded);
        sequences.range((from, Bound::Unbounded)).map(|(order, sequence)| (*order, *sequence))
    }

    /// All sequences: the short ones first to last, then the long ones.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.short.values().chain(self.long.values()).copied()
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.short.len() + self.long.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.short.is_empty() && self.long.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_makes_up_for_priority() {
        let config =
            CoreConfig { scheduling_policy: SchedulingPolicy::Priority, priority_aging: 10.0, ..CoreConfig::default() };
        let order = |number, priority, arrival| Order::new(&config, number, 0, priority, arrival);
        assert!(order(2, 0, 5.0) < order(1, 1, 0.0));
        assert!(order(1, 1, 0.0) < order(2, 0, 10.5));
        assert!(order(2, -3, 5.0) < order(1, 0, 5.0));
        assert!(order(1, 0, 5.0) < order(2, 0, 5.0));
    }

    #[test]
    fn first_come_first_served_ignores_priority() {
        let config = CoreConfig::default();
        assert!(Order::new(&config, 1, 0, 9, 3.0) < Order::new(&config, 2, 0, -9, 0.0));
    }

    #[test]
    fn floats_keep_their_order_as_integers() {
        let values = [f64::NEG_INFINITY, -2.5, -1e-9, 0.0, 1e-9, 1.0, 1e300, f64::INFINITY];
        assert!(values.windows(2).all(|pair| ordered_bits(pair[0]) < ordered_bits(pair[1])));
    }
}
