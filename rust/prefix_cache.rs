//! Finds blocks by their content: the key of a block is a keyed hash of its tokens and of
//! everything before them.
//!
//! `hash(block i) = blake3(secret; hash(block i - 1), tokens of block i)`, 128 bits kept; the
//! chain's root is a hash of the cache salt. Each input is tagged by its kind, and the KV group is
//! part of the key, since the same tokens have other keys and values in other layers. With a secret
//! per process, nobody outside can make two prompts collide, so tokens are not compared again.
//! Source: vLLM's design "Automatic Prefix Caching"; the key and the width answer vllm#12621.
//!
//! It knows neither references nor windows: [`KvCache`](crate::kv_cache::KvCache) combines it with
//! the pool.

use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::request::BlockId;

/// Names the content of one block, and of all blocks before it, in one KV group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockKey {
    /// Chained hash.
    pub hash: u128,
    /// KV group.
    pub group: u32,
}

/// Makes chained hashes.
#[derive(Debug, Clone)]
pub struct PrefixHasher {
    secret: [u8; 32],
}

/// What kind of input a hash is of.
#[derive(Debug, Clone, Copy)]
enum Tag {
    Unsalted = 0,
    Salted = 1,
    Block = 2,
}

impl PrefixHasher {
    /// Hashes under `secret`.
    pub fn new(secret: [u8; 32]) -> Self {
        Self { secret }
    }

    /// The hash before the first block.
    pub fn root(&self, cache_salt: Option<&str>) -> u128 {
        let tag = if cache_salt.is_some() { Tag::Salted } else { Tag::Unsalted };
        let mut hasher = self.hasher(tag);
        hasher.update(cache_salt.unwrap_or_default().as_bytes());
        first_half(&hasher)
    }

    /// The hash of a block of `tokens` that follows the block with hash `parent`.
    pub fn chain(&self, parent: u128, tokens: &[u32]) -> u128 {
        let mut hasher = self.hasher(Tag::Block);
        hasher.update(&parent.to_le_bytes());
        let mut bytes = [0; 256];
        for chunk in tokens.chunks(bytes.len() / 4) {
            for (target, token) in bytes.chunks_exact_mut(4).zip(chunk) {
                target.copy_from_slice(&token.to_le_bytes());
            }
            hasher.update(&bytes[..chunk.len() * 4]);
        }
        first_half(&hasher)
    }

    fn hasher(&self, tag: Tag) -> blake3::Hasher {
        let mut hasher = blake3::Hasher::new_keyed(&self.secret);
        hasher.update(&[tag as u8]);
        hasher
    }
}

fn first_half(hasher: &blake3::Hasher) -> u128 {
    let hash = hasher.finalize();
    u128::from_le_bytes(hash.as_bytes()[..16].try_into().expect("a hash has 32 bytes"))
}

/// The index from content to block. Of several blocks with the same content, the first one is
/// known.
#[derive(Debug, Clone, Default)]
pub struct PrefixCache {
    blocks: FxHashMap<BlockKey, BlockId>,
}

impl PrefixCache {
    /// An index of up to `num_blocks` blocks. It takes its memory now: growing would stop a step
    /// for milliseconds.
    pub fn with_capacity(num_blocks: usize) -> Self {
        Self { blocks: FxHashMap::with_capacity_and_hasher(num_blocks, FxBuildHasher) }
    }

    /// The block that has this content.
    pub fn find(&self, key: BlockKey) -> Option<BlockId> {
        self.blocks.get(&key).copied()
    }

    /// Makes `block` known by `key`. False, and nothing changes, if another block has that content
    /// already.
    pub fn insert(&mut self, key: BlockKey, block: BlockId) -> bool {
        match self.blocks.entry(key) {
            std::collections::hash_map::Entry::Occupied(_) => false,
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(block);
                true
            }
        }
    }

    /// Forgets a key whose block is about to be overwritten.
    pub fn remove(&mut self, key: BlockKey) {
        let known = self.blocks.remove(&key);
        assert!(known.is_some(), "key {key:?} was noted at a block but not in the index");
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.blocks.clear();
    }

    /// Blocks that can be found.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether no block can be found.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn chain(hasher: &PrefixHasher, salt: Option<&str>, tokens: &[u32], block_size: usize) -> Vec<u128> {
        let mut hash = hasher.root(salt);
        let mut chain = Vec::new();
        for block in tokens.chunks_exact(block_size) {
            hash = hasher.chain(hash, block);
            chain.push(hash);
        }
        chain
    }

    proptest! {
        /// Against the plainest model: the prefix itself, salt and all, as the key of a map.
        #[test]
        fn hashes_are_equal_exactly_where_prefixes_are(
            prompts in prop::collection::vec((prop::option::of("[ab]?"), prop::collection::vec(0..2u32, 0..9)), 1..20),
            block_size in 1..4usize,
        ) {
            let hasher = PrefixHasher::new([7; 32]);
            let mut by_prefix = HashMap::new();
            let mut by_hash = HashMap::new();
            for (salt, tokens) in &prompts {
                for (index, hash) in chain(&hasher, salt.as_deref(), tokens, block_size).into_iter().enumerate() {
                    let prefix = (salt.clone(), tokens[..(index + 1) * block_size].to_vec());
                    prop_assert_eq!(*by_prefix.entry(prefix.clone()).or_insert(hash), hash);
                    prop_assert_eq!(by_hash.entry(hash).or_insert_with(|| prefix.clone()), &prefix);
                }
            }
        }
    }

    #[test]
    fn the_secret_the_salt_and_all_32_bits_of_a_token_count() {
        let hasher = PrefixHasher::new([1; 32]);
        let hash = |hasher: &PrefixHasher, salt, token| hasher.chain(hasher.root(salt), &[token]);
        let plain = hash(&hasher, None, 1);
        assert_ne!(plain, hash(&PrefixHasher::new([2; 32]), None, 1));
        assert_ne!(plain, hash(&hasher, Some(""), 1));
        assert_ne!(plain, hash(&hasher, None, 257));
        assert_ne!(plain, hash(&hasher, None, 1 + (1 << 24)));
    }

    #[test]
    fn the_first_block_of_a_content_stays_known() {
        let mut cache = PrefixCache::default();
        let key = |group| BlockKey { hash: 5, group };
        assert!(cache.insert(key(0), BlockId(1)));
        assert!(!cache.insert(key(0), BlockId(2)));
        assert!(cache.insert(key(1), BlockId(3)));
        assert_eq!(
            (cache.find(key(0)), cache.find(key(1)), cache.find(key(2))),
            (Some(BlockId(1)), Some(BlockId(3)), None)
        );
        cache.remove(key(0));
        assert_eq!((cache.find(key(0)), cache.len()), (None, 1));
    }
}
