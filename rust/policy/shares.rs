//! Who is next among keys that share the engine: the one that has been served least for its weight.
//!
//! Each share has a counter of the tokens it was served, divided by its weight. Of those with
//! somebody in the queue the one with the least goes next, and is charged at once for the prompt;
//! output tokens are charged as they come, so lengths need not be known before. A share that comes
//! back starts level with the least of those that wait (with the last that left the queue, where
//! nobody does): it neither has credit for the time when it asked for nothing, nor owes for what
//! it got while nobody else wanted it. So whoever has 1,000 requests in the queue delays another's
//! first by one of them at most.
//!
//! This is the Virtual Token Counter of Sheng et al., "Fairness in Serving Large Language Models",
//! OSDI 2024; its bound holds: of two shares that both have requests in the queue neither is served
//! more than about the tokens that run at once ahead of the other, however long they wait.

use rustc_hash::FxHashMap;

use super::{Lane, Lanes, Order};

/// What a prompt token costs that is computed, and an output token: a token of a decode row takes
/// more of a step than one of a prompt does.
const PROMPT_COST: f64 = 1.0;
const OUTPUT_COST: f64 = 2.0;

/// A second of `priority_aging` in tokens of service. A request that is one unit of priority more
/// urgent is served first until its share is ahead of the others by so many tokens: what waiting is
/// without shares.
const SERVICE_A_SECOND: f64 = 1000.0;

/// What part of the engine is whose.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Whose; any number but for a name.
    pub key: u32,
    /// How much of what several want at once, in proportion to the others'. Above 0.
    pub weight: f64,
}

#[derive(Debug)]
struct Sharer {
    weight: f64,
    /// Cost of what it was served, by weight; lifted when it comes back.
    served: f64,
    queue: Lanes,
}

/// The sharers and their queues. Numbers of shares start at 1.
#[derive(Debug, Default)]
pub struct Shares {
    sharers: Vec<Sharer>,
    by_key: FxHashMap<u32, u32>,
    /// Those with somebody in the queue.
    waiting: Vec<u32>,
    last_left: Option<u32>,
    /// Tokens of service that a unit of priority is worth.
    priority_cost: f64,
}

impl Shares {
    pub(super) fn new(priority_aging: f64) -> Self {
        Self { priority_cost: priority_aging * SERVICE_A_SECOND, ..Self::default() }
    }

    /// The number of a share, whose weight is this from now on.
    pub fn number(&mut self, share: Share) -> u32 {
        let number = *self.by_key.entry(share.key).or_insert_with(|| {
            self.sharers.push(Sharer { weight: share.weight, served: 0.0, queue: Lanes::default() });
            self.sharers.len() as u32
        });
        self.sharer(number).weight = share.weight;
        number
    }

    /// Prompt tokens are about to be computed for a share; 0 is nobody's.
    pub fn charge_prompt(&mut self, share: u32, tokens: u32) {
        self.charge(share, f64::from(tokens) * PROMPT_COST);
    }

    /// A token was output for a share; 0 is nobody's.
    pub fn charge_output(&mut self, share: u32) {
        self.charge(share, OUTPUT_COST);
    }

    fn charge(&mut self, share: u32, cost: f64) {
        if share > 0 {
            let sharer = self.sharer(share);
            sharer.served += cost / sharer.weight;
        }
    }

    pub(super) fn insert(&mut self, share: u32, order: Order, lane: Lane, sequence: u32) {
        if self.sharer(share).queue.is_empty() {
            let least = self.waiting.iter().map(|other| self.get(*other).served).min_by(f64::total_cmp);
            let level = least.or_else(|| self.last_left.map(|last| self.get(last).served));
            let sharer = self.sharer(share);
            sharer.served = sharer.served.max(level.unwrap_or(0.0));
            sharer.queue.passed = None;
            self.waiting.push(share);
        }
        self.sharer(share).queue.insert(order, lane, sequence);
    }

    pub(super) fn remove(&mut self, share: u32, order: Order) -> bool {
        let was_in = self.sharer(share).queue.remove(order);
        if was_in && self.sharer(share).queue.is_empty() {
            self.waiting.retain(|other| *other != share);
            self.last_left = Some(share);
        }
        was_in
    }

    pub(super) fn start_look(&mut self) {
        for share in &self.waiting {
            self.sharers[*share as usize - 1].queue.passed = None;
        }
    }

    pub(super) fn pass(&mut self, share: u32, order: Order) {
        self.sharer(share).queue.passed = Some(order);
    }

    pub(super) fn next(&self, lane: Option<Lane>) -> Option<(Order, u32)> {
        self.least(|queue| queue.next_after(queue.passed, lane))
    }

    pub(super) fn first(&self, lane: Option<Lane>) -> Option<(Order, u32)> {
        self.least(|queue| queue.next_after(None, lane))
    }

    pub(super) fn queues(&self) -> impl Iterator<Item = &Lanes> {
        self.waiting.iter().map(|share| &self.get(*share).queue)
    }

    /// Of each queue's candidate that whose share has been served least; of equals, the first that came.
    fn least(&self, candidate: impl Fn(&Lanes) -> Option<(Order, u32)>) -> Option<(Order, u32)> {
        let of_share = |share: &u32| {
            let sharer = self.get(*share);
            let (order, sequence) = candidate(&sharer.queue)?;
            Some((sharer.served + f64::from(order.priority) * self.priority_cost, order, sequence))
        };
        let least = self
            .waiting
            .iter()
            .filter_map(of_share)
            .min_by(|(a, first, _), (b, second, _)| a.total_cmp(b).then(first.cmp(second)));
        least.map(|(_, order, sequence)| (order, sequence))
    }

    fn get(&self, share: u32) -> &Sharer {
        &self.sharers[share as usize - 1]
    }

    fn sharer(&mut self, share: u32) -> &mut Sharer {
        &mut self.sharers[share as usize - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CoreConfig;

    /// A queue of shares, to which requests are added by key.
    #[derive(Default)]
    struct Queue {
        shares: Shares,
        turn: u64,
    }

    impl Queue {
        fn add(&mut self, key: u32, weight: f64, priority: i32) {
            self.turn += 1;
            let share = self.shares.number(Share { key, weight });
            let order = Order::new(&CoreConfig::default(), self.turn, 0, priority, 0.0).in_share(share);
            self.shares.insert(share, order, Lane::Short, key);
        }

        /// Admits the next one with a prompt of so many tokens; its key.
        fn admit(&mut self, prompt_len: u32) -> u32 {
            let (order, key) = self.shares.first(None).expect("somebody waits");
            self.shares.remove(order.share, order);
            self.shares.charge_prompt(order.share, prompt_len);
            key
        }
    }

    #[test]
    fn weights_are_kept() {
        let mut queue = Queue::default();
        for _ in 0..100 {
            queue.add(1, 1.0, 0);
            queue.add(2, 3.0, 0);
        }
        let served: Vec<u32> = (0..100).map(|_| queue.admit(10)).collect();
        assert_eq!(served.iter().filter(|key| **key == 2).count(), 75);
    }

    #[test]
    fn who_comes_back_has_neither_credit_nor_debt() {
        let mut queue = Queue::default();
        for _ in 0..100 {
            queue.add(1, 1.0, 0);
        }
        assert!((0..50).all(|_| queue.admit(10) == 1));
        // The first of another is next but one at the latest; then they alternate.
        for _ in 0..100 {
            queue.add(2, 1.0, 0);
        }
        let served: Vec<u32> = (0..40).map(|_| queue.admit(10)).collect();
        assert_eq!(served[..2].iter().filter(|key| **key == 2).count(), 1);
        assert_eq!(served.iter().filter(|key| **key == 2).count(), 20);
    }

    #[test]
    fn output_counts_as_it_comes() {
        let mut queue = Queue::default();
        for _ in 0..10 {
            queue.add(1, 1.0, 0);
            queue.add(2, 1.0, 0);
        }
        assert_eq!((queue.admit(10), queue.admit(10)), (1, 2));
        let first = queue.shares.number(Share { key: 1, weight: 1.0 });
        for _ in 0..11 {
            queue.shares.charge_output(first);
        }
        assert_eq!([(); 4].map(|()| queue.admit(10)), [2, 2, 2, 1]);
    }

    #[test]
    fn the_urgent_go_first_until_their_share_is_far_ahead() {
        let mut queue = Queue { shares: Shares::new(0.02), turn: 0 };
        for _ in 0..10 {
            queue.add(1, 1.0, 0);
            queue.add(2, 1.0, -1);
        }
        // A unit is worth 20 tokens of service.
        assert_eq!([(); 4].map(|()| queue.admit(10)), [2, 2, 1, 2]);
    }
}
