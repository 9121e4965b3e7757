//! The blocks of one sequence in one KV group, by position: token `p` lies in entry
//! `p / block_size`.

use crate::request::{BlockId, NULL_BLOCK};

/// A block table. Entries before the sliding window hold the null block: they were given back, or
/// never filled.
#[derive(Debug, Clone, Default)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
    /// First entry that holds a block.
    first: usize,
    /// Entries that the device has been told about.
    sent: usize,
}

impl BlockTable {
    /// Entries, those before the window included.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether it has no entry.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Blocks it holds.
    pub fn num_live(&self) -> usize {
        self.blocks.len() - self.first
    }

    /// Index of the first entry that holds a block.
    pub fn first_live(&self) -> usize {
        self.first
    }

    /// The block at `index`, unless that entry is past the end or before the window.
    pub fn get(&self, index: usize) -> Option<BlockId> {
        self.blocks.get(index).copied().filter(|block| *block != NULL_BLOCK)
    }

    /// The blocks it holds, in order.
    pub fn live(&self) -> &[BlockId] {
        &self.blocks[self.first..]
    }

    /// Appends a block.
    pub fn push(&mut self, block: BlockId) {
        self.blocks.push(block);
    }

    /// Makes an empty table begin at entry `first`: what is before lies outside the window.
    pub fn begin_at(&mut self, first: usize) {
        assert!(self.blocks.is_empty(), "a table in use cannot begin elsewhere");
        self.blocks.resize(first, NULL_BLOCK);
        self.first = first;
    }

    /// Takes the first block out, if its entry is below `limit`.
    pub fn pop_before(&mut self, limit: usize) -> Option<BlockId> {
        if self.first >= limit.min(self.blocks.len()) {
            return None;
        }
        let block = std::mem::replace(&mut self.blocks[self.first], NULL_BLOCK);
        self.first += 1;
        Some(block)
    }

    /// Takes the last block out.
    pub fn pop(&mut self) -> Option<BlockId> {
        if self.num_live() == 0 {
            return None;
        }
        self.blocks.pop()
    }

    /// Forgets all entries; the blocks must have been taken out.
    pub fn reset(&mut self) {
        assert!(self.num_live() == 0, "blocks are still in the table");
        self.blocks.clear();
        self.first = 0;
        self.sent = 0;
    }

    /// The entries that the device has not been told about, with their indices; it has been told
    /// with this call.
    pub fn take_unsent(&mut self) -> impl Iterator<Item = (usize, BlockId)> + '_ {
        let start = self.sent.max(self.first);
        self.sent = self.blocks.len();
        self.blocks[start..].iter().enumerate().map(move |(offset, block)| (start + offset, *block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_moves_over_it() {
        let mut table = BlockTable::default();
        table.begin_at(2);
        for block in 5..9 {
            table.push(BlockId(block));
        }
        assert_eq!(table.take_unsent().next(), Some((2, BlockId(5))));
        assert_eq!(table.take_unsent().next(), None);
        assert_eq!(
            (table.pop_before(4), table.pop_before(4), table.pop_before(4)),
            (Some(BlockId(5)), Some(BlockId(6)), None)
        );
        assert_eq!((table.get(3), table.get(4), table.get(6)), (None, Some(BlockId(7)), None));
        assert_eq!((table.len(), table.num_live(), table.first_live()), (6, 2, 4));
        assert_eq!((table.pop(), table.pop(), table.pop()), (Some(BlockId(8)), Some(BlockId(7)), None));
        table.reset();
        assert!(table.is_empty());
    }
}
