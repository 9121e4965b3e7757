//! The arena of KV blocks: reference counts, and the lists of blocks that nobody references.
//!
//! A block is in exactly one place: *referenced* by block tables; *held*, given back while a step
//! in flight may still touch it; or *free*. The free list runs from the block to reuse first to the
//! one to keep longest: blocks without content at the front, then those whose content the prefix
//! cache can still find, least recently used first. Lists are threaded through the blocks by index,
//! so taking a block out of the middle (a prefix hit) costs no search.
//!
//! It knows nothing of sequences, tokens or groups. Cf. vLLM's `FreeKVCacheBlockQueue` and
//! mistral.rs' `block_pool.rs`. Misuse (a release of what is not referenced) is a panic with the
//! block's id, in release builds too.

use crate::prefix_cache::BlockKey;
use crate::request::{BlockId, NULL_BLOCK};

/// End of a list.
const NIL: u32 = u32::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Referenced,
    Free,
    /// By the parity of the fence: at most two steps are in flight, so both of one parity are the
    /// same step.
    Held(u8),
}

#[derive(Debug, Clone)]
struct Block {
    references: u32,
    place: Place,
    previous: u32,
    next: u32,
    /// The last step that may touch it on behalf of a table that gave it back.
    fence: u64,
    /// What the prefix cache knows it by.
    key: Option<BlockKey>,
    /// The model that drafts has filled its part of it.
    is_followed: bool,
}

#[derive(Debug, Clone, Copy)]
struct List {
    head: u32,
    tail: u32,
    len: usize,
}

const EMPTY: List = List { head: NIL, tail: NIL, len: 0 };

/// The blocks of the KV pool, by index. Block 0 is the null block and never handed out.
#[derive(Debug, Clone)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: List,
    held: [List; 2],
    /// Free blocks that have a key.
    num_cached: usize,
    /// Steps up to this one have been committed.
    fenced: u64,
}

impl BlockPool {
    /// A pool of `num_blocks` blocks, all of them free but the null block.
    pub fn new(num_blocks: u32) -> Self {
        let block = Block {
            references: 0,
            place: Place::Referenced,
            previous: NIL,
            next: NIL,
            fence: 0,
            key: None,
            is_followed: false,
        };
        let mut pool =
            Self { blocks: vec![block; num_blocks as usize], free: EMPTY, held: [EMPTY; 2], num_cached: 0, fenced: 0 };
        pool.blocks[0].references = 1;
        for index in 1..num_blocks {
            pool.push_back(index, Place::Free);
        }
        pool
    }

    /// Blocks without the null block.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len() - 1
    }

    /// Blocks that can be handed out now.
    pub fn num_free(&self) -> usize {
        self.free.len
    }

    /// Blocks that will be free once the steps in flight are committed.
    pub fn num_held(&self) -> usize {
        self.held[0].len + self.held[1].len
    }

    /// Free blocks whose content can still be found.
    pub fn num_cached(&self) -> usize {
        self.num_cached
    }

    /// Block tables that hold `block`.
    pub fn references(&self, block: BlockId) -> u32 {
        self.blocks[block.0 as usize].references
    }

    /// What the prefix cache knows `block` by.
    pub fn key(&self, block: BlockId) -> Option<BlockKey> {
        self.blocks[block.0 as usize].key
    }

    /// Whether `block` can be handed out now.
    pub fn is_free(&self, block: BlockId) -> bool {
        self.blocks[block.0 as usize].place == Place::Free
    }

    /// Hands out the free block that is missed least, with one reference, and the key it had: the
    /// prefix cache must forget that key. None if no block is free.
    pub fn allocate(&mut self) -> Option<(BlockId, Option<BlockKey>)> {
        let index = self.free.head;
        if index == NIL {
            return None;
        }
        self.unlink(index);
        let block = &mut self.blocks[index as usize];
        block.references = 1;
        block.is_followed = false;
        Some((BlockId(index), block.key.take()))
    }

    /// Adds a reference to a block that is referenced, held or free: its content is kept.
    pub fn acquire(&mut self, block: BlockId) {
        assert!(block != NULL_BLOCK, "the null block is not shared");
        if self.blocks[block.0 as usize].place != Place::Referenced {
            self.unlink(block.0);
        }
        self.blocks[block.0 as usize].references += 1;
    }

    /// Takes one reference away. The last one puts the block into the free list, or, if the step
    /// `fence` is not yet committed, holds it until it is.
    pub fn release(&mut self, block: BlockId, fence: u64) {
        let fenced = self.fenced;
        let entry = &mut self.blocks[block.0 as usize];
        assert!(block != NULL_BLOCK && entry.references > 0, "block {} is released but not referenced", block.0);
        assert!(fence <= fenced + 2, "block {} is released for step {fence}, but {fenced} is the last done", block.0);
        entry.references -= 1;
        entry.fence = entry.fence.max(fence);
        if entry.references == 0 {
            if entry.fence > fenced {
                let parity = (entry.fence % 2) as u8;
                self.push_back(block.0, Place::Held(parity));
            } else {
                self.push_free(block.0);
            }
        }
    }

    /// Step `step` has been committed: what was held for it is free.
    pub fn fence(&mut self, step: u64) {
        assert!(step == self.fenced + 1, "step {step} is fenced after {}", self.fenced);
        self.fenced = step;
        let parity = (step % 2) as usize;
        while self.held[parity].head != NIL {
            let index = self.held[parity].head;
            self.unlink(index);
            self.push_free(index);
        }
    }

    /// Notes what the prefix cache knows a referenced block by.
    pub fn set_key(&mut self, block: BlockId, key: BlockKey) {
        let entry = &mut self.blocks[block.0 as usize];
        assert!(entry.references > 0 && entry.key.is_none(), "block {} cannot take a key now", block.0);
        entry.key = Some(key);
    }

    /// Whether the model that drafts has filled its part of `block`.
    pub fn is_followed(&self, block: BlockId) -> bool {
        self.blocks[block.0 as usize].is_followed
    }

    /// It has.
    pub fn note_followed(&mut self, block: BlockId) {
        self.blocks[block.0 as usize].is_followed = true;
    }

    /// It may have filled none.
    pub fn doubt_followed(&mut self) {
        for block in &mut self.blocks {
            block.is_followed = false;
        }
    }

    /// Takes the keys of all blocks away.
    pub fn clear_keys(&mut self) {
        for block in &mut self.blocks {
            block.key = None;
        }
        self.num_cached = 0;
    }

    /// Keys with their blocks.
    pub fn keys(&self) -> impl Iterator<Item = (BlockKey, BlockId)> + '_ {
        self.blocks.iter().zip(0..).filter_map(|(block, index)| block.key.map(|key| (key, BlockId(index))))
    }

    fn push_free(&mut self, index: u32) {
        if self.blocks[index as usize].key.is_some() {
            self.push_back(index, Place::Free);
        } else {
            self.push_front(index);
        }
    }

    fn list(&mut self, place: Place) -> &mut List {
        match place {
            Place::Free => &mut self.free,
            Place::Held(parity) => &mut self.held[parity as usize],
            Place::Referenced => unreachable!("referenced blocks are in no list"),
        }
    }

    fn push_back(&mut self, index: u32, place: Place) {
        let ends = self.list(place);
        let last = ends.tail;
        ends.tail = index;
        ends.len += 1;
        if last == NIL {
            ends.head = index;
        } else {
            self.blocks[last as usize].next = index;
        }
        let block = &mut self.blocks[index as usize];
        (block.place, block.previous, block.next) = (place, last, NIL);
        self.num_cached += usize::from(place == Place::Free && block.key.is_some());
    }

    /// To the front of the free list: a block without content.
    fn push_front(&mut self, index: u32) {
        let first = self.free.head;
        self.free.head = index;
        self.free.len += 1;
        if first == NIL {
            self.free.tail = index;
        } else {
            self.blocks[first as usize].previous = index;
        }
        let block = &mut self.blocks[index as usize];
        (block.place, block.previous, block.next) = (Place::Free, NIL, first);
    }

    fn unlink(&mut self, index: u32) {
        let block = &mut self.blocks[index as usize];
        let (place, previous, next) = (block.place, block.previous, block.next);
        (block.place, block.previous, block.next) = (Place::Referenced, NIL, NIL);
        let cached = usize::from(place == Place::Free && block.key.is_some());
        self.num_cached -= cached;
        if previous != NIL {
            self.blocks[previous as usize].next = next;
        }
        if next != NIL {
            self.blocks[next as usize].previous = previous;
        }
        let list = self.list(place);
        list.len -= 1;
        if previous == NIL {
            list.head = next;
        }
        if next == NIL {
            list.tail = previous;
        }
    }

    /// Compares reference counts with `expected` (by block, the null block included), and walks the
    /// lists.
    ///
    /// # Errors
    /// The first block that is not where it should be.
    pub fn check(&self, expected: &[u32]) -> Result<(), String> {
        for (index, (block, expected)) in self.blocks.iter().zip(expected).enumerate().skip(1) {
            if block.references != *expected {
                return Err(format!(
                    "block {index} has {} references, but {expected} tables hold it",
                    block.references
                ));
            }
            if (block.place == Place::Referenced) != (block.references > 0) {
                return Err(format!("block {index} is {:?} with {} references", block.place, block.references));
            }
        }
        let mut listed = 0;
        for (list, place) in [(self.free, Place::Free), (self.held[0], Place::Held(0)), (self.held[1], Place::Held(1))]
        {
            let (mut index, mut previous, mut len) = (list.head, NIL, 0);
            while index != NIL {
                let block = &self.blocks[index as usize];
                if block.place != place || block.previous != previous || len > list.len {
                    return Err(format!("block {index} is {:?} but stands in the list {place:?}", block.place));
                }
                if (block.fence > self.fenced) != (place != Place::Free) {
                    return Err(format!(
                        "block {index} is {place:?}, its fence is {}, {} is done",
                        block.fence, self.fenced
                    ));
                }
                (previous, index, len) = (index, block.next, len + 1);
            }
            if len != list.len || list.tail != previous {
                return Err(format!("the list {place:?} has {len} blocks, but says {}", list.len));
            }
            listed += len;
        }
        let referenced = self.blocks.iter().skip(1).filter(|block| block.references > 0).count();
        if listed + referenced != self.num_blocks() {
            return Err(format!("{listed} listed and {referenced} referenced blocks of {}", self.num_blocks()));
        }
        let cached = self.blocks.iter().filter(|block| block.place == Place::Free && block.key.is_some()).count();
        if cached != self.num_cached {
            return Err(format!("{cached} blocks are cached, but the count is {}", self.num_cached));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn key(number: u32) -> BlockKey {
        BlockKey { hash: u128::from(number), group: 0 }
    }

    /// The same pool in the plainest form: lists as vectors, searched from end to end.
    #[derive(Default)]
    struct Model {
        references: Vec<u32>,
        keys: Vec<Option<BlockKey>>,
        fences: Vec<u64>,
        free: VecDeque<u32>,
        held: Vec<u32>,
        fenced: u64,
    }

    impl Model {
        fn free(&mut self, block: u32) {
            if self.keys[block as usize].is_some() {
                self.free.push_back(block);
            } else {
                self.free.push_front(block);
            }
        }
    }

    #[derive(Debug, Clone)]
    enum Event {
        Allocate,
        Acquire(u32),
        Release(u32, u64),
        SetKey(u32),
        Fence,
        ClearKeys,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => Just(Event::Allocate),
            2 => (0..8u32).prop_map(Event::Acquire),
            5 => (0..8u32, 0..3u64).prop_map(|(block, ahead)| Event::Release(block, ahead)),
            2 => (0..8u32).prop_map(Event::SetKey),
            2 => Just(Event::Fence),
            1 => Just(Event::ClearKeys),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_the_plain_model(events in prop::collection::vec(event(), 1..200), num_blocks in 2..8u32) {
            let mut pool = BlockPool::new(num_blocks);
            let size = num_blocks as usize;
            let mut model = Model {
                references: vec![0; size],
                keys: vec![None; size],
                fences: vec![0; size],
                free: (1..num_blocks).collect(),
                ..Model::default()
            };
            for (number, event) in events.into_iter().enumerate() {
                match event {
                    Event::Allocate => {
                        let expected = model.free.pop_front();
                        let got = pool.allocate();
                        prop_assert_eq!(got.map(|(block, _)| block.0), expected);
                        if let Some(block) = expected {
                            prop_assert_eq!(got.and_then(|(_, key)| key), model.keys[block as usize].take());
                            model.references[block as usize] = 1;
                        }
                    }
                    Event::Acquire(block) if (1..num_blocks).contains(&block) => {
                        pool.acquire(BlockId(block));
                        model.references[block as usize] += 1;
                        model.free.retain(|other| *other != block);
                        model.held.retain(|other| *other != block);
                    }
                    Event::Release(block, ahead) if block < num_blocks && model.references[block as usize] > 0 => {
                        let index = block as usize;
                        pool.release(BlockId(block), model.fenced + ahead);
                        model.references[index] -= 1;
                        model.fences[index] = model.fences[index].max(model.fenced + ahead);
                        if model.references[index] == 0 {
                            if model.fences[index] > model.fenced {
                                model.held.push(block);
                            } else {
                                model.free(block);
                            }
                        }
                    }
                    Event::SetKey(block) if block < num_blocks && model.references[block as usize] > 0 => {
                        if model.keys[block as usize].is_none() {
                            pool.set_key(BlockId(block), key(number as u32));
                            model.keys[block as usize] = Some(key(number as u32));
                        }
                    }
                    Event::Fence => {
                        model.fenced += 1;
                        pool.fence(model.fenced);
                        for block in std::mem::take(&mut model.held) {
                            if model.fences[block as usize] > model.fenced {
                                model.held.push(block);
                            } else {
                                model.free(block);
                            }
                        }
                    }
                    Event::ClearKeys => {
                        pool.clear_keys();
                        model.keys.fill(None);
                    }
                    Event::Acquire(_) | Event::Release(..) | Event::SetKey(_) => {}
                }
                prop_assert_eq!(pool.check(&model.references), Ok(()));
                prop_assert_eq!((pool.num_free(), pool.num_held()), (model.free.len(), model.held.len()));
            }
        }
    }

    #[test]
    #[should_panic(expected = "block 1 is released but not referenced")]
    fn a_double_release_is_caught() {
        let mut pool = BlockPool::new(3);
        let (block, _) = pool.allocate().expect("two are free");
        pool.release(block, 0);
        pool.release(block, 0);
    }

    #[test]
    fn blocks_with_content_are_reused_last_and_oldest_first() {
        let mut pool = BlockPool::new(4);
        let blocks: Vec<BlockId> = (0..3).map(|_| pool.allocate().expect("three are free").0).collect();
        pool.set_key(blocks[0], key(0));
        pool.set_key(blocks[1], key(1));
        for block in &blocks {
            pool.release(*block, 0);
        }
        let order: Vec<_> = std::iter::from_fn(|| pool.allocate()).collect();
        assert_eq!(order, [(blocks[2], None), (blocks[0], Some(key(0))), (blocks[1], Some(key(1)))]);
    }
}
