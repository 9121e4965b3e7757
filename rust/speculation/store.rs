//! Outputs of the past, by tenant: what one asked for is never looked up for another.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

use super::history::{History, Match};

/// Ends an output in the store; no token of a vocabulary.
pub(super) const END: u32 = u32::MAX;

/// One tenant's outputs: the older half is forgotten whole, once the newer one is full.
#[derive(Debug)]
struct Outputs {
    newer: History,
    older: History,
}

/// Outputs that have ended, at most `capacity` tokens of all tenants together.
#[derive(Debug)]
pub(crate) struct Store {
    key_len: usize,
    capacity: usize,
    /// By the root of the tenant's prefix hashes.
    tenants: FxHashMap<u128, Outputs>,
    /// Their roots, the one that has been quiet for longest first.
    order: VecDeque<u128>,
    num_tokens: usize,
}

impl Store {
    pub fn new(key_len: usize, capacity: usize) -> Self {
        Self { key_len, capacity, tenants: FxHashMap::default(), order: VecDeque::new(), num_tokens: 0 }
    }

    /// Takes up an output. A tenant may fill half of the store; beyond that, and where the store is
    /// full, the oldest goes.
    pub fn add(&mut self, root: u128, output: &[u32]) {
        let share = self.capacity / 4;
        let output = &output[..output.len().min(share.saturating_sub(1))];
        if output.len() <= self.key_len {
            return;
        }
        self.order.retain(|other| *other != root);
        self.order.push_back(root);
        let key_len = self.key_len;
        let tenant = self
            .tenants
            .entry(root)
            .or_insert_with(|| Outputs { newer: History::new(key_len), older: History::new(key_len) });
        if tenant.newer.tokens().len() + output.len() + 1 > share {
            self.num_tokens -= tenant.older.tokens().len();
            tenant.older = std::mem::replace(&mut tenant.newer, History::new(key_len));
        }
        tenant.newer.extend(output);
        tenant.newer.push(END);
        self.num_tokens += output.len() + 1;
        while self.num_tokens > self.capacity {
            let quiet = self.order.pop_front().expect("who has tokens stands in the order");
            let gone = self.tenants.remove(&quiet).expect("who stands in the order is there");
            self.num_tokens -= gone.newer.tokens().len() + gone.older.tokens().len();
        }
    }

    /// Where the last tokens of `text` came before in the tenant's outputs: the text there, in which
    /// [`END`] stands behind each output, and the match in it.
    pub(super) fn matches<'a>(
        &'a self,
        root: u128,
        text: &'a [u32],
        most: usize,
    ) -> impl Iterator<Item = (&'a [u32], Match)> + 'a {
        let tenant = self.tenants.get(&root);
        let halves = tenant.into_iter().flat_map(|outputs| [&outputs.newer, &outputs.older]);
        halves.flat_map(move |half| half.matches(text, most).map(move |found| (half.tokens(), found)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(store: &Store, root: u128, text: &[u32]) -> Vec<Vec<u32>> {
        let until_end = |tokens: &[u32]| tokens.iter().copied().take_while(|token| *token != END).collect();
        store.matches(root, text, 8).map(|(tokens, found)| until_end(&tokens[found.next..])).collect()
    }

    #[test]
    fn a_tenant_finds_its_own_outputs_alone() {
        let mut store = Store::new(2, 1000);
        store.add(1, &[5, 6, 7, 8]);
        store.add(2, &[5, 6, 9]);
        assert_eq!(found(&store, 1, &[5, 6]), [vec![7, 8]]);
        assert_eq!(found(&store, 2, &[5, 6]), [vec![9]]);
        assert_eq!(found(&store, 3, &[5, 6]), Vec::<Vec<u32>>::new());
        // An output's end has nothing behind it, whatever was taken up next.
        store.add(1, &[1, 2, 3]);
        assert_eq!(found(&store, 1, &[7, 8]), [Vec::<u32>::new()]);
    }

    #[test]
    fn stays_within_its_capacity() {
        let mut store = Store::new(2, 400);
        for number in 0..1000_u32 {
            let output: Vec<u32> = (number..number + 30).collect();
            store.add(u128::from(number % 7), &output);
            let held = store.tenants.values().map(|kept| kept.newer.tokens().len() + kept.older.tokens().len());
            assert_eq!(held.sum::<usize>(), store.num_tokens);
            assert!(store.num_tokens <= 400);
            assert_eq!(store.order.len(), store.tenants.len());
        }
        assert_eq!(found(&store, 999 % 7, &[1000, 1001])[0], (1002..1029).collect::<Vec<u32>>());
        store.add(3, &vec![4; 10_000]);
        assert!(store.num_tokens <= 400);
    }
}
