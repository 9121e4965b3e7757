//! What a CPU computes with threads and instructions of its own, apart from the core: products by
//! weights in the blocks of their file.
//!
//! Knows slices and blocks. Does not know tensors, models or requests. The only folder with unsafe
//! code for its own sake: instructions that not every processor has, and outputs that several threads
//! write at once.
#![allow(unsafe_code)]
// What is compiled for a level must be compiled into the function of that level.
#![allow(clippy::inline_always)]

pub mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod blocks;
pub mod codes;
pub mod draw;
mod factors;
pub mod float;
#[cfg(target_arch = "x86_64")]
mod lanes;
pub mod level;
mod memory;
pub mod page;
mod panels;
mod plain;
pub mod pointwise;
pub mod pool;
pub mod product;
pub mod raw;
pub mod rows;
mod scores;
#[cfg(test)]
mod tests;
