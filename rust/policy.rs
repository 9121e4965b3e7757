//! Who goes first: the order of the waiting queue, which is also the order in which running
//! sequences are served and the reverse of the order in which they are preempted.
//!
//! Aging is linear: a request's rank is `priority - waited / priority_aging`, lower first. All
//! waiting requests age alike, so comparing ranks at any moment is comparing
//! `arrival + priority * priority_aging`, which never changes: the queue needs no re-sorting, and
//! whoever waits is passed only by requests that came at most
//! `priority_aging * (difference of priorities)` seconds later.
//!
//! Where keys share the engine, a request has a place in this order from its first admission on.
//! Until then it stands in the queue of its key, and [`shares`] says which queue is next.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::config::{CoreConfig, SchedulingPolicy};

pub mod shares;

use shares::Shares;

/// Sequences that may be admitted past one that does not fit, before the queue stops for it. Then
/// what runs drains, and it has its turn; so a big request is passed a bounded number of times, and
/// small ones wait only while the batch drains.
pub const HEAD_BYPASS_LIMIT: u32 = 32;

/// Sequences that do not fit which one step looks at.
pub const LOOKAHEAD: usize = 16;

/// Added to the turn of those that stand in the queue of their key: whoever has been admitted comes
/// before them.
const NOT_ADMITTED: u64 = 1 << 63;

/// A place in the order: smaller goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Order {
    /// `arrival + priority * priority_aging`, as an integer of the same order; 0 for first come,
    /// first served.
    rank: i64,
    /// When its request took its place in the queue: one after another. Where keys share, when it
    /// was admitted first.
    turn: u64,
    /// Which of the request's sequences.
    index: u32,
    /// The share in whose queue it stands, by number; 0: the one queue.
    share: u32,
    /// Lower goes first; 0 where the policy does not ask.
    priority: i32,
}

impl Order {
    /// The place of sequence `index` of the request that took turn `turn`, at `arrival` seconds.
    pub fn new(config: &CoreConfig, turn: u64, index: u32, priority: i32, arrival: f64) -> Self {
        let rank = match config.scheduling_policy {
            SchedulingPolicy::Fcfs => 0,
            SchedulingPolicy::Priority => ordered_bits(arrival + f64::from(priority) * config.priority_aging),
        };
        Self { rank, turn, index, share: 0, priority }
    }

    /// The same in the queue of a share.
    #[must_use]
    pub fn in_share(self, share: u32) -> Self {
        Self { share, turn: self.turn | NOT_ADMITTED, ..self }
    }

    /// Its place from its first admission on.
    #[must_use]
    pub fn admitted(self, turn: u64) -> Self {
        Self { share: 0, turn, ..self }
    }

    /// The share in whose queue it stands; 0: the one queue.
    pub fn share(self) -> u32 {
        self.share
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

/// A queue of waiting sequences, by order; the values are the scheduler's own numbers for them.
/// Short ones can be asked for by themselves, since they may go past long ones.
#[derive(Debug, Default)]
struct Lanes {
    short: BTreeMap<Order, u32>,
    long: BTreeMap<Order, u32>,
    /// The look that goes on has left behind those up to here.
    passed: Option<Order>,
}

impl Lanes {
    fn insert(&mut self, order: Order, lane: Lane, sequence: u32) {
        let sequences = match lane {
            Lane::Short => &mut self.short,
            Lane::Long => &mut self.long,
        };
        let previous = sequences.insert(order, sequence);
        assert!(previous.is_none(), "sequence {sequence} is queued twice");
    }

    fn remove(&mut self, order: Order) -> bool {
        self.short.remove(&order).or_else(|| self.long.remove(&order)).is_some()
    }

    /// The first after `order`, or the very first; of one lane, or of both.
    fn next_after(&self, order: Option<Order>, lane: Option<Lane>) -> Option<(Order, u32)> {
        let first = |lane| self.lane(lane, order).next();
        lane.map_or_else(|| first_of(first(Lane::Short), first(Lane::Long)), first)
    }

    fn lane(&self, lane: Lane, order: Option<Order>) -> impl Iterator<Item = (Order, u32)> + '_ {
        let sequences = match lane {
            Lane::Short => &self.short,
            Lane::Long => &self.long,
        };
        let from = order.map_or(Bound::Unbounded, Bound::Excluded);
        sequences.range((from, Bound::Unbounded)).map(|(order, sequence)| (*order, *sequence))
    }

    fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.short.values().chain(self.long.values()).copied()
    }

    fn is_empty(&self) -> bool {
        self.short.is_empty() && self.long.is_empty()
    }
}

/// All waiting sequences. Where keys share, those that have been admitted before stand in one queue,
/// by order, and go first unless somebody has a better rank; then the others, as [`Shares`] has it.
#[derive(Debug)]
pub struct WaitingQueue {
    admitted: Lanes,
    shares: Shares,
    len: usize,
}

impl WaitingQueue {
    /// `priority_aging`: seconds of waiting that are worth one unit of priority.
    pub fn new(priority_aging: f64) -> Self {
        Self { admitted: Lanes::default(), shares: Shares::new(priority_aging), len: 0 }
    }

    /// Who shares the engine.
    pub fn shares(&mut self) -> &mut Shares {
        &mut self.shares
    }

    /// Puts a sequence in its place.
    pub fn insert(&mut self, order: Order, lane: Lane, sequence: u32) {
        self.len += 1;
        match order.share {
            0 => self.admitted.insert(order, lane, sequence),
            share => self.shares.insert(share, order, lane, sequence),
        }
    }

    /// Takes a sequence out; false if it was not in.
    pub fn remove(&mut self, order: Order) -> bool {
        let was_in = match order.share {
            0 => self.admitted.remove(order),
            share => self.shares.remove(share, order),
        };
        self.len -= usize::from(was_in);
        was_in
    }

    /// Begins to look at those who wait, one after another.
    pub fn start_look(&mut self) {
        self.admitted.passed = None;
        self.shares.start_look();
    }

    /// Who is next in this look, of one lane or of both. It stays next until it is taken out or
    /// passed.
    pub fn next(&self, lane: Option<Lane>) -> Option<(Order, u32)> {
        first_of(self.admitted.next_after(self.admitted.passed, lane), self.shares.next(lane))
    }

    /// Leaves behind, for this look, the one who is next.
    pub fn pass(&mut self, order: Order) {
        match order.share {
            0 => self.admitted.passed = Some(order),
            share => self.shares.pass(share, order),
        }
    }

    /// Who is first, of one lane or of both, whatever a look has passed.
    pub fn first(&self, lane: Option<Lane>) -> Option<(Order, u32)> {
        first_of(self.admitted.next_after(None, lane), self.shares.first(lane))
    }

    /// The sequences of one lane: a queue after another, each first to last.
    pub fn lane(&self, lane: Lane) -> impl Iterator<Item = (Order, u32)> + '_ {
        self.queues().flat_map(move |queue| queue.lane(lane, None))
    }

    /// The same of those that come before a place in the order.
    pub fn lane_before(&self, lane: Lane, order: Order) -> impl Iterator<Item = (Order, u32)> + '_ {
        self.queues().flat_map(move |queue| queue.lane(lane, None).take_while(move |(other, _)| *other <= order))
    }

    /// All sequences.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.queues().flat_map(Lanes::iter)
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn queues(&self) -> impl Iterator<Item = &Lanes> {
        std::iter::once(&self.admitted).chain(self.shares.queues())
    }
}

/// Of the first of two queues, the first.
fn first_of(one: Option<(Order, u32)>, other: Option<(Order, u32)>) -> Option<(Order, u32)> {
    one.into_iter().chain(other).min()
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
