//! Shapes at random by every level against the portable one, with inputs and outputs that end where their
//! memory does: what reads or writes beyond is for `make asan` to find.

use std::sync::Arc;

use super::attention::{Attention, Pages, Step};
use super::blocks::Format;
use super::codes::{Codes, Fp8, Int4, Int8};
use super::float::{Brain, Half};
use super::level::Level;
use super::memory::Memory;
use super::page::PageShape;
use super::panels::Panels;
use super::pool::Pool;
use super::product::{Bytes, Matrix, Product};
use super::raw::Writer;
use super::rows::Input;

const FORMATS: [&str; 14] =
    ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"];

/// xorshift64*
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// From `low` to `high`.
    fn from(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() >> 33) as usize % (high - low + 1)
    }

    /// From -1 to 1.
    fn number(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    }

    fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.number()).collect()
    }

    /// Blocks whose scales are small numbers, behind `start` bytes of something else.
    fn blocks(&mut self, format: Format, count: usize, start: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..start).map(|_| 0xFF).collect();
        let places: &[usize] = match format {
            Format::Q2_K => &[80, 82],
            Format::Q3_K => &[108],
            Format::Q6_K => &[208],
            Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
            _ => &[0],
        };
        for _ in 0..count {
            let first = bytes.len();
            match format {
                Format::F32 => bytes.extend(self.number().to_le_bytes()),
                Format::BF16 => bytes.extend(((self.number().to_bits() >> 16) as u16).to_le_bytes()),
                _ => {
                    bytes.extend((0..format.bytes()).map(|_| 0));
                    bytes[first..].fill_with(|| (self.next() >> 40) as u8);
                    for place in places {
                        bytes[first + place + 1] = 0x24 | bytes[first + place + 1] & 0x83;
                    }
                }
            }
        }
        bytes
    }
}

fn assert_close(got: &[f32], right: &[f32], tolerance: f32, what: &str) {
    let size = right.iter().fold(1.0f32, |size, number| size.max(number.abs()));
    for (at, (got, right)) in got.iter().zip(right).enumerate() {
        assert!((got - right).abs() <= tolerance * size, "{what}: number {at} is {got}, not {right}");
    }
}

#[test]
fn products_of_every_shape_are_the_portable_ones() {
    let mut random = Random(7);
    let pool = Pool::new(2);
    for turn in 0..24 {
        for name in FORMATS {
            let format = Format::named(name).expect("a format");
            let (most, start) = (1024 / format.numbers().max(32), random.from(0, 3));
            let columns = random.from(1, most) * format.numbers().max(1);
            let (outputs, rows) = (random.from(1, 80), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 41][turn % 12]);
            let count = outputs * columns / format.numbers();
            let bytes: Bytes = Arc::new(random.blocks(format, count, start));
            let x = random.numbers(rows * columns);
            let run = |level| {
                let matrix = Matrix::new(format, outputs, columns, Arc::clone(&bytes), start).expect("a matrix");
                let product = Product::new(vec![matrix], None, level, &pool).expect("a product");
                let mut out = vec![f32::NAN; rows * outputs];
                product.run(&pool, Input::Plain(&x), rows, &mut out);
                out
            };
            let levels = Level::all();
            let right = run(levels[0]);
            for &level in &levels[1..] {
                let what = format!("{name}, {}, {rows} rows of {columns}, {outputs} outputs", level.name());
                assert_close(&run(level), &right, 1e-5, &what);
            }
        }
    }
}

#[test]
fn panels_have_every_row_as_it_was() {
    let mut random = Random(5);
    for turn in 0..40 {
        for format in FORMATS.into_iter().filter_map(Format::named).filter(|&format| Panels::take(format)) {
            let columns = random.from(1, 9) * format.numbers();
            // Some of them so large that they share memory with others.
            let rows = if turn % 8 == 0 { random.from(1_000, 2_000) } else { random.from(1, 50) };
            let len = format.row_bytes(columns);
            let bytes = random.blocks(format, rows * columns / format.numbers(), 0);
            let row = |row: usize| &bytes[row * len..][..len];
            let panels = Panels::new(format, rows, columns, &Pool::new(2), &row);
            let mut read = vec![0; len];
            for number in 0..rows {
                panels.read(number, &mut read);
                assert_eq!(read, row(number), "{}, row {number} of {rows} of {columns}", format.name());
            }
        }
    }
}

#[test]
fn memory_of_any_size_is_apart_and_zero() {
    let mut random = Random(3);
    for _ in 0..3 {
        // The last are more than what is shared, and so are all together.
        let sizes = [1, 63, 70_000, 65_536, 3 << 20, 12 << 20, 9 << 20, 11 << 20, 17 << 20];
        let mut all: Vec<(Memory, u8)> = Vec::new();
        for len in sizes {
            let (mut memory, mark) = (Memory::new(len), random.from(1, 255) as u8);
            assert_eq!(memory.bytes().as_ptr().align_offset(64), 0);
            assert!(memory.bytes().len() == len && memory.bytes().iter().all(|&byte| byte == 0));
            // SAFETY: nobody else has it.
            unsafe { memory.writer().part(0, len) }.fill(mark);
            all.push((memory, mark));
        }
        all.remove(4);
        assert!(all.iter().all(|(memory, mark)| memory.bytes().iter().all(|byte| byte == mark)));
    }
}

/// The memory of pages, and the pages that it is.
fn with_pages(
    kind: usize,
    count: usize,
    heads: usize,
    dim: usize,
    run: impl FnOnce(Pages<'_>) -> Vec<f32>,
) -> Vec<f32> {
    let coded = |bytes: usize| vec![0u8; count / dim * (bytes + 4)];
    let stride = |bytes: usize| heads * (bytes + 4);
    match kind {
        0 => run(Pages::Single(Writer::new(&mut vec![0.0; count]))),
        1 => run(Pages::Half(Writer::new(&mut vec![Half(0); count]))),
        2 => run(Pages::Brain(Writer::new(&mut vec![Brain(0); count]))),
        3 => run(Pages::Fp8(Codes { bytes: Writer::new(&mut coded(dim)), stride: stride(dim), coding: Fp8 })),
        4 => run(Pages::Int8(Codes { bytes: Writer::new(&mut coded(dim)), stride: stride(dim), coding: Int8 })),
        _ => run(Pages::Int4(Codes { bytes: Writer::new(&mut coded(dim / 2)), stride: stride(dim / 2), coding: Int4 })),
    }
}

#[test]
fn attention_of_every_shape_is_the_portable_one() {
    let mut random = Random(11);
    let pool = Pool::new(2);
    for turn in 0..60 {
        let (kv_heads, dim) = (random.from(1, 3), 2 * random.from(1, 70));
        let (heads, block_size) = (kv_heads * random.from(1, 5), random.from(1, 20));
        let tokens: usize = [1, 2, 6, 33, 90][turn % 5];
        let window = [0, 0, 1, 7, 40][random.from(0, 4)];
        let blocks = tokens.div_ceil(block_size);
        let qkv = random.numbers(tokens * (heads + 2 * kv_heads) * dim);
        let cos_sin = random.numbers(tokens * dim);
        let positions: Vec<i64> = (0..tokens as i64).collect();
        let table: Vec<i32> = (0..blocks as i32).rev().collect();
        let slots: Vec<i64> = (0..tokens)
            .map(|token| i64::from(table[token / block_size]) * block_size as i64 + (token % block_size) as i64)
            .collect();
        let levels = Level::all();
        let run = |level| {
            let shape = PageShape { kv_heads, head_dim: dim, block_size, level };
            let attention = Attention { heads, shape, scale: 0.3, window, norms: None, eps: 0.0 };
            let count = blocks * 2 * kv_heads * block_size * dim;
            with_pages(turn / 5 % 6, count, 2 * kv_heads * block_size, dim, |pages| {
                let (mut qkv, mut out) = (qkv.clone(), vec![f32::NAN; tokens * heads * dim]);
                let step = Step {
                    qkv: Writer::new(&mut qkv),
                    positions: &positions,
                    cos_sin: &cos_sin,
                    rotary_dim: dim,
                    slots: &slots,
                    pages,
                    table: &table,
                    table_width: blocks,
                    row_slots: &[0],
                    seq_lens: &[tokens as i32],
                    starts: Some(&[0, tokens as i32]),
                };
                attention.run(&pool, &step, &mut out).expect("a step");
                out
            })
        };
        let right = run(levels[0]);
        assert!(right.iter().all(|number| number.is_finite()));
        for &level in &levels[1..] {
            let what = format!("{}, {tokens} tokens, {heads} heads of {dim}, window {window}", level.name());
            // Codes may round to another neighbour where keys differ in their last bit.
            assert_close(&run(level), &right, if turn / 5 % 6 == 0 { 1e-5 } else { 0.05 }, &what);
        }
    }
}
