//! Which blocks a sequence has: the pool, the prefix index and the rules of each KV group together.
//!
//! All groups draw from one pool. A full-attention group keeps every block of a sequence; a group
//! with a sliding window gives back blocks that no coming token can see. The tables of one sequence
//! always have the same number of entries. It knows nothing of requests, budgets or slots; lengths
//! are in tokens.

use crate::block_pool::BlockPool;
use crate::block_table::BlockTable;
use crate::config::CoreConfig;
use crate::prefix_cache::{BlockKey, PrefixCache};
use crate::request::BlockId;

/// The KV pool of all groups.
#[derive(Debug)]
pub struct KvCache {
    block_size: usize,
    /// By group; 0 for full attention.
    windows: Vec<u32>,
    has_windows: bool,
    /// By group: blocks that a sequence holds at most, however long it is.
    limits: Vec<usize>,
    /// The same while it decodes, with the number of groups that have this limit.
    decode_limits: Vec<(usize, usize)>,
    pool: BlockPool,
    index: PrefixCache,
}

impl KvCache {
    /// The pool of a checked configuration.
    pub fn new(config: &CoreConfig) -> Self {
        let block_size = config.block_size as usize;
        // While a chunk is computed the window of its first token is still needed; drafts that a
        // step in flight may yet reject stretch it. A span of t tokens touches at most ceil(t /
        // block_size) + 1 blocks.
        let chunk = config.max_num_batched_tokens.min(config.max_model_len) + config.num_draft_tokens;
        let limit = |window: &u32| match window {
            0 => usize::MAX,
            window => (window + chunk).div_ceil(config.block_size) as usize + 1,
        };
        let mut decode_limits: Vec<(usize, usize)> = Vec::new();
        for window in &config.kv_windows {
            let limit = if *window == 0 { usize::MAX } else { window.div_ceil(config.block_size) as usize + 1 };
            match decode_limits.iter_mut().find(|(other, _)| *other == limit) {
                Some((_, groups)) => *groups += 1,
                None => decode_limits.push((limit, 1)),
            }
        }
        Self {
            block_size,
            decode_limits,
            windows: config.kv_windows.clone(),
            has_windows: config.kv_windows.iter().any(|window| *window > 0),
            limits: config.kv_windows.iter().map(limit).collect(),
            pool: BlockPool::new(config.num_blocks),
            index: PrefixCache::with_capacity(if config.enable_prefix_caching {
                config.num_blocks as usize
            } else {
                0
            }),
        }
    }

    /// The blocks.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Whether any group has a sliding window.
    pub fn has_windows(&self) -> bool {
        self.has_windows
    }

    /// Blocks, over all groups, that a sequence of `len` tokens holds at most at any moment.
    pub fn footprint(&self, len: u32) -> usize {
        let blocks = (len as usize).div_ceil(self.block_size);
        self.limits.iter().map(|limit| blocks.min(*limit)).sum()
    }

    /// Blocks, over all groups, that a sequence holds at most while its token number `len` is decoded.
    pub fn decode_footprint(&self, len: u32) -> usize {
        let blocks = (len as usize).div_ceil(self.block_size);
        self.decode_limits.iter().map(|(limit, groups)| blocks.min(*limit) * groups).sum()
    }

    /// The longest sequence whose footprint the whole pool can hold, up to `limit` tokens.
    pub fn longest_sequence(&self, limit: u32) -> u32 {
        let (mut fits, mut too_long) = (0, limit + 1);
        while too_long - fits > 1 {
            let middle = fits + (too_long - fits) / 2;
            if self.footprint(middle) <= self.pool.num_blocks() {
                fits = middle;
            } else {
                too_long = middle;
            }
        }
        fits
    }

    /// Blocks to allocate before `tables` cover `len` tokens.
    pub fn missing(&self, tables: &[BlockTable], len: u32) -> usize {
        let entries = (len as usize).div_ceil(self.block_size);
        entries.saturating_sub(tables[0].len()) * tables.len()
    }

    /// Tokens that `tables` have places for.
    pub fn covered(&self, tables: &[BlockTable]) -> u32 {
        self.coverable(tables, 0)
    }

    /// Tokens that `tables` would cover with `blocks` more blocks.
    pub fn coverable(&self, tables: &[BlockTable], blocks: usize) -> u32 {
        let entries = tables[0].len() + blocks / tables.len();
        u32::try_from(entries * self.block_size).unwrap_or(u32::MAX)
    }

    /// Allocates what is [`missing`](Self::missing). The caller has made sure that it is free.
    pub fn extend(&mut self, tables: &mut [BlockTable], len: u32) {
        for _ in 0..self.missing(tables, len) / tables.len() {
            for table in &mut *tables {
                table.push(self.allocate());
            }
        }
    }

    /// Gives back the blocks that no token from position `least` on can see. A step before may
    /// still read them: the last one that could is `fence`.
    pub fn release_outside_window(&mut self, tables: &mut [BlockTable], least: u32, fence: u64) {
        if !self.has_windows {
            return;
        }
        let mut popped = true;
        while popped {
            popped = false;
            for (table, window) in tables.iter_mut().zip(&self.windows) {
                let limit = first_visible(*window, least) as usize / self.block_size;
                if let Some(block) = table.pop_before(limit) {
                    self.pool.release(block, fence);
                    popped = true;
                }
            }
        }
    }

    /// Gives everything back, last blocks first, so that the beginnings of prompts stay findable
    /// the longest. All groups' blocks of one place go together: a prefix is found as far as all
    /// groups have it.
    pub fn release_all(&mut self, tables: &mut [BlockTable], fence: u64) {
        for _ in 0..tables.first().map_or(0, BlockTable::len) {
            for block in tables.iter_mut().filter_map(BlockTable::pop) {
                self.pool.release(block, fence);
            }
        }
        tables.iter_mut().for_each(BlockTable::reset);
    }

    /// Number of blocks of the longest prefix of `hashes` that a sequence can start from: full
    /// groups hold all of its blocks, window groups those that the next token sees.
    pub fn find(&self, hashes: &[u128]) -> usize {
        let holds = |group: usize, index: usize| self.find_block(group, hashes[index]).is_some();
        let full: Vec<usize> = (0..self.windows.len()).filter(|group| self.windows[*group] == 0).collect();
        let mut len =
            (0..hashes.len()).position(|index| !full.iter().all(|group| holds(*group, index))).unwrap_or(hashes.len());
        // A missing block in the window of one length is in the window of all lengths between it
        // and that one, since windows only move forward: go on right before it, until every group
        // agrees.
        loop {
            let before = len;
            for (group, window) in self.windows.iter().enumerate().filter(|(_, window)| **window > 0) {
                let first = first_visible(*window, (len * self.block_size) as u32) as usize / self.block_size;
                if let Some(missing) = (first..len).rev().find(|index| !holds(group, *index)) {
                    len = missing;
                }
            }
            if len == before {
                return len;
            }
        }
    }

    /// The blocks that [`acquire`](Self::acquire) of `hashes` would reference: how many, and how
    /// many of them are free.
    pub fn hit_size(&self, hashes: &[u128]) -> (usize, usize) {
        self.hit(hashes).fold((0, 0), |(all, free), (_, block)| (all + 1, free + usize::from(self.pool.is_free(block))))
    }

    /// Starts empty `tables` from the blocks of `hashes`, which [`find`](Self::find) has found.
    pub fn acquire(&mut self, tables: &mut [BlockTable], hashes: &[u128]) {
        let hits: Vec<(usize, BlockId)> = self.hit(hashes).collect();
        for (group, table) in tables.iter_mut().enumerate() {
            table.begin_at(self.first_entry(group, hashes.len()));
        }
        for (group, block) in hits {
            self.pool.acquire(block);
            tables[group].push(block);
        }
    }

    /// Whether a sequence of `len` computed tokens can be forked off `source`: it still has all the
    /// blocks for it.
    pub fn can_fork(&self, source: &[BlockTable], len: u32) -> bool {
        source.iter().zip(&self.windows).all(|(table, window)| {
            let first = first_visible(*window, len) as usize / self.block_size;
            first >= table.first_live() && (len as usize).div_ceil(self.block_size) <= table.len()
        })
    }

    /// Blocks that a fork of `len` tokens shares with `source`.
    pub fn fork_size(&self, source: &[BlockTable], len: u32) -> usize {
        let shared = len as usize / self.block_size;
        (0..source.len()).map(|group| shared - self.first_entry_at(group, len)).sum()
    }

    /// Starts empty `tables` with the first `len` tokens of `source`: full blocks are shared, the
    /// partly filled one gets a block of its own, and `copies` gains (source, destination).
    pub fn fork(
        &mut self,
        source: &[BlockTable],
        tables: &mut [BlockTable],
        len: u32,
        copies: &mut Vec<(BlockId, BlockId)>,
    ) {
        let shared = len as usize / self.block_size;
        for (group, (source, table)) in source.iter().zip(tables).enumerate() {
            let first = self.first_entry_at(group, len);
            table.begin_at(first);
            for index in first..shared {
                let block = source.get(index).expect("can_fork has looked");
                self.pool.acquire(block);
                table.push(block);
            }
            if !(len as usize).is_multiple_of(self.block_size) {
                let partly_filled = source.get(shared).expect("can_fork has looked");
                let block = self.allocate();
                table.push(block);
                copies.push((partly_filled, block));
            }
        }
    }

    /// The block at entry `index` of each table is filled and will not change: it can be found from
    /// now on.
    pub fn register(&mut self, tables: &[BlockTable], index: usize, hash: u128) {
        for (group, table) in (0..).zip(tables) {
            let key = BlockKey { hash, group };
            match table.get(index) {
                Some(block) if self.pool.key(block).is_none() && self.index.insert(key, block) => {
                    self.pool.set_key(block, key);
                }
                _ => {}
            }
        }
    }

    /// The model that drafts has filled its part of the blocks at entry `index` of each table.
    pub fn note_followed(&mut self, tables: &[BlockTable], index: usize) {
        for block in tables.iter().filter_map(|table| table.get(index)) {
            self.pool.note_followed(block);
        }
    }

    /// Nobody knows any more whether it has, of any block.
    pub fn doubt_followed(&mut self) {
        self.pool.doubt_followed();
    }

    /// Leading entries of `tables` whose blocks it has filled, all that are there.
    pub fn followed(&self, tables: &[BlockTable]) -> usize {
        let is_followed = |index: &usize| {
            tables.iter().filter_map(|table| table.get(*index)).all(|block| self.pool.is_followed(block))
        };
        (0..tables[0].len()).take_while(is_followed).count()
    }

    /// Whether `tables` still have every block that tokens from `position` on see.
    pub fn sees_from(&self, tables: &[BlockTable], position: u32) -> bool {
        let first = |window| first_visible(window, position) as usize / self.block_size;
        tables.iter().zip(&self.windows).all(|(table, window)| first(*window) >= table.first_live())
    }

    /// Step `step` has been committed.
    pub fn fence(&mut self, step: u64) {
        self.pool.fence(step);
    }

    /// Forgets the content of all blocks.
    pub fn forget(&mut self) {
        self.index.clear();
        self.pool.clear_keys();
    }

    /// Recounts references from the `tables` of all sequences, and compares the index with the
    /// blocks' keys.
    ///
    /// # Errors
    /// What does not agree.
    pub fn check<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) -> Result<(), String> {
        let mut references = vec![0; self.pool.num_blocks() + 1];
        for block in tables.flat_map(BlockTable::live) {
            let count =
                references.get_mut(block.0 as usize).ok_or_else(|| format!("block {} does not exist", block.0))?;
            *count += 1;
        }
        self.pool.check(&references)?;
        let known = self.pool.keys().count();
        if let Some((_, block)) = self.pool.keys().find(|(key, block)| self.index.find(*key) != Some(*block)) {
            return Err(format!("block {} has a key, but the index does not lead to it", block.0));
        }
        if known != self.index.len() {
            return Err(format!("{known} blocks have a key, but the index has {}", self.index.len()));
        }
        Ok(())
    }

    fn allocate(&mut self) -> BlockId {
        let (block, evicted) = self.pool.allocate().expect("the caller has made sure that enough blocks are free");
        if let Some(key) = evicted {
            self.index.remove(key);
        }
        block
    }

    fn find_block(&self, group: usize, hash: u128) -> Option<BlockId> {
        self.index.find(BlockKey { hash, group: group as u32 })
    }

    /// First table entry that the token after `blocks` full blocks sees.
    fn first_entry(&self, group: usize, blocks: usize) -> usize {
        self.first_entry_at(group, (blocks * self.block_size) as u32)
    }

    fn first_entry_at(&self, group: usize, len: u32) -> usize {
        first_visible(self.windows[group], len) as usize / self.block_size
    }

    /// (group, block) of a hit, in table order.
    fn hit<'a>(&'a self, hashes: &'a [u128]) -> impl Iterator<Item = (usize, BlockId)> + 'a {
        (0..self.windows.len()).flat_map(move |group| {
            hashes[self.first_entry(group, hashes.len())..]
                .iter()
                .map(move |hash| (group, self.find_block(group, *hash).expect("find has found every block of the hit")))
        })
    }
}

/// First position that the token at `position` sees.
fn first_visible(window: u32, position: u32) -> u32 {
    if window == 0 {
        0
    } else {
        (position + 1).saturating_sub(window)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cache(kv_windows: Vec<u32>, num_blocks: u32, block_size: u32) -> KvCache {
        let config =
            CoreConfig { kv_windows, num_blocks, block_size, max_num_batched_tokens: 8, ..CoreConfig::default() };
        KvCache::new(&config.checked().expect("a good configuration"))
    }

    fn tables(cache: &KvCache) -> Vec<BlockTable> {
        vec![BlockTable::default(); cache.windows.len()]
    }

    #[test]
    fn a_window_group_gives_back_what_the_next_token_cannot_see() {
        let mut cache = cache(vec![0, 6], 32, 4);
        let mut tables = tables(&cache);
        cache.extend(&mut tables, 16);
        // The token at position 16 sees 11..=16, so blocks 0 and 1 (positions 0..8) are out of
        // sight; 8..12 is not.
        cache.release_outside_window(&mut tables, 16, 0);
        assert_eq!((tables[0].num_live(), tables[1].num_live(), tables[1].first_live()), (4, 2, 2));
        // At 17 it sees 12..=17.
        cache.release_outside_window(&mut tables, 17, 1);
        assert_eq!((tables[1].first_live(), cache.pool.num_held()), (3, 1));
        cache.fence(1);
        cache.release_all(&mut tables, 0);
        assert_eq!(cache.pool.num_free(), 31);
    }

    #[test]
    fn a_fork_shares_full_blocks_and_copies_the_partial_one() {
        let mut cache = cache(vec![0], 32, 4);
        let (mut source, mut fork) = (tables(&cache), tables(&cache));
        cache.extend(&mut source, 10);
        let mut copies = Vec::new();
        assert!(cache.can_fork(&source, 9));
        assert_eq!(cache.fork_size(&source, 9), 2);
        cache.fork(&source, &mut fork, 9, &mut copies);
        assert_eq!(fork[0].live()[..2], source[0].live()[..2]);
        assert_eq!(copies, [(source[0].live()[2], fork[0].live()[2])]);
        assert_ne!(copies[0].0, copies[0].1);
        assert!(cache.check(source.iter().chain(&fork)).is_ok());
        assert!(cache.check(source.iter()).is_err());
    }

    /// A prompt of 64 blocks is over; another one then needs 40 of the 80 that there are.
    #[test]
    fn equal_groups_lose_the_end_of_a_prompt_and_keep_its_beginning() {
        for kv_windows in [vec![0], vec![0; 2], vec![0; 4], vec![1000; 4], vec![0, 0, 1000, 1000]] {
            let (groups, step) = (kv_windows.len(), 1);
            let mut cache = cache(kv_windows.clone(), 81, 4);
            let mut old = tables(&cache);
            let hashes: Vec<u128> = (100..100 + 64 / groups as u128).collect();
            cache.extend(&mut old, hashes.len() as u32 * 4);
            for (index, hash) in hashes.iter().enumerate() {
                cache.register(&old, index, *hash);
            }
            cache.release_all(&mut old, step);
            cache.fence(step);
            let mut new = tables(&cache);
            cache.extend(&mut new, 40 / groups as u32 * 4);
            assert_eq!(cache.find(&hashes) * groups, 40, "windows {kv_windows:?}");
        }
    }

    /// Two groups with one window gave back the same eight entries each; half of these are needed.
    #[test]
    fn equal_windows_lose_the_same_blocks() {
        let mut cache = cache(vec![8, 8], 65, 4);
        let mut old = tables(&cache);
        let hashes: Vec<u128> = (100..116).collect();
        cache.extend(&mut old, 64);
        for (index, hash) in hashes.iter().enumerate() {
            cache.register(&old, index, *hash);
        }
        cache.release_outside_window(&mut old, 39, 0);
        assert_eq!(old.iter().map(BlockTable::first_live).collect::<Vec<_>>(), [8, 8]);
        let mut new = tables(&cache);
        cache.extend(&mut new, 4 * 20);
        let left = |group| (0..8).filter(|index| cache.find_block(group, hashes[*index]).is_some()).collect::<Vec<_>>();
        assert_eq!((left(0), left(1)), (vec![4, 5, 6, 7], vec![4, 5, 6, 7]));
    }

    proptest! {
        /// A random set of findable blocks: the prefix found is the longest that satisfies the rule
        /// as it is worded.
        #[test]
        fn finds_the_longest_prefix_that_all_groups_can_continue(
            windows in prop::collection::vec(0..10u32, 1..4),
            known in prop::collection::vec(prop::collection::vec(prop::bool::weighted(0.8), 6), 3),
            block_size in 1..4u32,
        ) {
            let mut cache = cache(windows.clone(), 64, block_size);
            let hashes: Vec<u128> = (100..106).collect();
            let mut tables = tables(&cache);
            cache.extend(&mut tables, 6 * block_size);
            for (index, hash) in hashes.iter().enumerate() {
                for (group, table) in (0..).zip(&tables) {
                    if known[group as usize][index] {
                        let (key, block) = (BlockKey { hash: *hash, group }, table.live()[index]);
                        prop_assert!(cache.index.insert(key, block));
                        cache.pool.set_key(block, key);
                    }
                }
            }
            let possible = |len: usize| windows.iter().enumerate().all(|(group, window)| {
                let next = len * block_size as usize;
                (0..len).all(|index| {
                    let last = (index + 1) * block_size as usize - 1;
                    let seen = *window == 0 || last + *window as usize > next;
                    known[group][index] || !seen
                })
            });
            let expected = (0..=hashes.len()).rev().find(|len| possible(*len)).expect("0 is always possible");
            let found = cache.find(&hashes);
            prop_assert_eq!(found, expected);

            // Acquiring it gives exactly the blocks that the next token sees, and each only once
            // more.
            let mut second = vec![BlockTable::default(); windows.len()];
            let (size, free) = cache.hit_size(&hashes[..found]);
            cache.acquire(&mut second, &hashes[..found]);
            prop_assert_eq!((second.iter().map(BlockTable::num_live).sum::<usize>(), free), (size, 0));
            prop_assert!(second.iter().all(|table| table.len() == found));
            prop_assert_eq!(cache.check(tables.iter().chain(&second)), Ok(()));
            cache.release_all(&mut tables, 0);
            cache.release_all(&mut second, 0);
            prop_assert_eq!(cache.pool.num_free(), 63);
        }
    }
}
