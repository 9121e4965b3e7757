//! How the keys and values of a layer lie in its pages, whatever their numbers are.

use super::float::Number;
use super::level::Level;
use super::raw::Writer;

/// Pages are [blocks, 2, kv heads, block size, head dim].
#[derive(Debug, Clone, Copy)]
pub struct PageShape {
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Numbers of a head.
    pub head_dim: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// The code that reads them.
    pub level: Level,
}

/// Where a key or a value is: of the block, keys (0) or values (1), the head of them, the token in the block.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Of the pages.
    pub block: usize,
    /// 0: keys, 1: values.
    pub kind: usize,
    /// Of keys and values.
    pub head: usize,
    /// Of the block.
    pub token: usize,
}

impl Place {
    /// Its number among the heads of its block.
    pub fn in_block(self, shape: &PageShape) -> usize {
        (self.kind * shape.kv_heads + self.head) * shape.block_size + self.token
    }
}

/// Pages of one type of numbers or codes.
pub trait Store: Copy + Sync {
    /// How many blocks it has.
    ///
    /// # Errors
    /// It is not made of whole blocks.
    fn blocks(&self, shape: &PageShape) -> Result<usize, String>;

    /// A head as float32: `numbers` [head dim].
    ///
    /// # Safety
    /// Nobody writes there meanwhile.
    unsafe fn read(&self, shape: &PageShape, place: Place, numbers: &mut [f32]);

    /// Keeps a head.
    ///
    /// # Safety
    /// Nobody reads or writes there meanwhile.
    unsafe fn write(&self, shape: &PageShape, place: Place, numbers: &[f32]);
}

impl<N: Number> Store for Writer<'_, N> {
    fn blocks(&self, shape: &PageShape) -> Result<usize, String> {
        let block = 2 * shape.kv_heads * shape.block_size * shape.head_dim;
        if self.len().is_multiple_of(block) {
            return Ok(self.len() / block);
        }
        Err(format!("kv_cache: {} numbers are not blocks of {block}", self.len()))
    }

    #[inline(always)]
    unsafe fn read(&self, shape: &PageShape, place: Place, numbers: &mut [f32]) {
        let heads = 2 * shape.kv_heads * shape.block_size;
        let start = (place.block * heads + place.in_block(shape)) * shape.head_dim;
        // SAFETY: the caller's.
        let stored = unsafe { self.part(start, shape.head_dim) };
        N::widen_all(shape.level, stored, numbers);
    }

    #[inline(always)]
    unsafe fn write(&self, shape: &PageShape, place: Place, numbers: &[f32]) {
        let heads = 2 * shape.kv_heads * shape.block_size;
        let start = (place.block * heads + place.in_block(shape)) * shape.head_dim;
        // SAFETY: the caller's.
        let stored = unsafe { self.part(start, shape.head_dim) };
        for (stored, number) in stored.iter_mut().zip(numbers) {
            *stored = N::narrow(*number);
        }
    }
}
