//! The input of a product: what is computed first (a norm, a gate), then rounded to 16 bits where the
//! weights are quantised. As in llama.cpp, 32 numbers share a scale; but there they have 8 bits, with
//! which the default model names France's capital in French. 16 bits are two instructions where 8 are one, and
//! the weights' bytes are read once for both.

use super::float;
#[cfg(target_arch = "x86_64")]
use super::level::Tier;
use super::level::{by_level, multiply_add, Level};
use super::pool::Pool;
use super::raw::Writer;

/// Numbers of one group of activations.
pub const GROUP: usize = 32;
/// The largest code: both of its bytes are signed numbers.
const LARGEST: f32 = 127.0 * 256.0;
/// Rows that a tile has side by side.
pub const TILE: usize = 8;
/// Up to so many rows the caller makes himself: waking threads takes longer.
pub(super) const ALONE: usize = 4;

/// What the rows of a product are made of. All matrices have the product's rows.
#[derive(Debug, Clone, Copy)]
pub enum Input<'a> {
    /// As they are: [rows, columns].
    Plain(&'a [f32]),
    /// `RMSNorm` of `x` [rows, columns] with `weight` [columns].
    Norm {
        /// [rows, columns]
        x: &'a [f32],
        /// [columns]
        weight: &'a [f32],
        /// Added to the mean square.
        eps: f32,
    },
    /// `residual += x` in place, then the norm of it.
    AddNorm {
        /// [rows, columns]
        x: &'a [f32],
        /// [rows, columns]
        residual: Writer<'a, f32>,
        /// [columns]
        weight: &'a [f32],
        /// Added to the mean square.
        eps: f32,
    },
    /// silu(gate) * up of rows (gate | up): [rows, 2 * columns].
    Silu(&'a [f32]),
    /// gelu(gate), by tanh, * up of such rows.
    Gelu(&'a [f32]),
}

/// Rows as kernels take them. The memory is kept from one product to the next.
#[derive(Debug, Default)]
pub struct Rows {
    /// Numbers of a row, the same with its padding, and how many rows there are.
    columns: usize,
    padded: usize,
    count: usize,
    /// [rows, padded]: `round(x / scale)`, from -32512 to 32512; zeros behind the row.
    codes: Vec<i16>,
    /// [rows, padded / 32, 2]: scale, and scale * (sum of the codes).
    scales: Vec<f32>,
    /// [rows, padded / 16]: scale * (sum of 16 codes).
    sums: Vec<f32>,
    /// [rows, columns]: before rounding, for weights that are not quantised.
    numbers: Vec<f32>,
    tiles: Tiles,
}

/// The same codes, scales and sums for panels of weights: those of up to eight rows side by side, tile after
/// tile. The last one has the rows that are left.
#[derive(Debug, Default)]
struct Tiles {
    /// [padded / 4, rows of the tile] of each tile: four codes, by [`split`].
    codes: Vec<[i32; 2]>,
    /// [padded / 32, rows of the tile]
    scales: Vec<[f32; 2]>,
    /// [padded / 16, rows of the tile]
    sums: Vec<f32>,
}

/// Up to eight rows of [`Rows`], side by side.
#[derive(Debug, Clone, Copy)]
pub struct Tile<'a> {
    /// How many.
    pub rows: usize,
    /// [padded / 4, rows]: four codes, by [`split`]
    pub codes: &'a [[i32; 2]],
    /// [padded / 32, rows]: scale, and scale * (sum of the codes)
    pub scales: &'a [[f32; 2]],
    /// [padded / 16, rows]: scale * (sum of 16 codes)
    pub sums: &'a [f32],
}

/// What of the rows is wanted.
#[derive(Debug, Clone, Copy)]
pub struct Forms {
    /// Codes, for weights that are quantised.
    pub codes: bool,
    /// Codes in tiles too, for panels of weights.
    pub tiles: bool,
    /// Numbers, for weights that are not.
    pub numbers: bool,
}

/// One row of [`Rows`], to be written.
struct Rounded<'a> {
    codes: &'a mut [i16],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
}

/// One row of [`Rows`].
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// [padded]
    pub codes: &'a [i16],
    /// [padded / 32, 2]
    pub scales: &'a [f32],
    /// [padded / 16]
    pub sums: &'a [f32],
}

impl Rows {
    /// Computes the input's rows.
    pub fn make(&mut self, level: Level, pool: &Pool, input: Input<'_>, rows: usize, columns: usize, forms: Forms) {
        let Forms { codes, tiles, numbers } = forms;
        self.columns = columns;
        self.padded = columns.next_multiple_of(GROUP);
        let padded = if codes { self.padded } else { 0 };
        let (groups, numbers_of_row) = (padded / GROUP, if numbers { columns } else { 0 });
        self.codes.resize(rows * padded, 0);
        self.scales.resize(rows * groups * 2, 0.0);
        self.sums.resize(rows * groups * 2, 0.0);
        self.numbers.resize(rows * numbers_of_row, 0.0);
        self.count = rows;
        let tiled = if tiles { rows * padded } else { 0 };
        self.tiles.codes.resize(tiled / 4, [0; 2]);
        self.tiles.scales.resize(tiled / GROUP, [0.0; 2]);
        self.tiles.sums.resize(tiled / 16, 0.0);
        let tile_codes = Writer::new(&mut self.tiles.codes);
        let tile_scales = Writer::new(&mut self.tiles.scales);
        let tile_sums = Writer::new(&mut self.tiles.sums);
        let all_codes = Writer::new(&mut self.codes);
        let all_scales = Writer::new(&mut self.scales);
        let all_sums = Writer::new(&mut self.sums);
        let all_numbers = Writer::new(&mut self.numbers);
        let one = |row: usize| {
            // SAFETY: each row is made once, by one thread, and rows do not overlap.
            let (mut rounded, row_numbers) = unsafe {
                let rounded = Rounded {
                    codes: all_codes.part(row * padded, padded),
                    scales: all_scales.part(row * groups * 2, groups * 2),
                    sums: all_sums.part(row * groups * 2, groups * 2),
                };
                (rounded, all_numbers.part(row * numbers_of_row, numbers_of_row))
            };
            SCRATCH.with_borrow_mut(|scratch| {
                scratch.resize(columns, 0.0);
                let made = if numbers { row_numbers } else { &mut scratch[..] };
                fill(level, input, row, made);
                if codes {
                    quantise(level, made, &mut rounded);
                }
            });
            if tiles {
                let Rounded { codes, scales, sums } = rounded;
                let place = Place { row, rows };
                place.write(tile_codes, codes.as_chunks().0.iter().map(|&four| split(level, four)));
                place.write(tile_scales, scales.as_chunks().0.iter().copied());
                place.write(tile_sums, sums.iter().copied());
            }
        };
        if rows <= ALONE {
            (0..rows).for_each(one);
        } else {
            pool.run(rows, &one);
        }
    }

    /// Codes of row `row`.
    pub fn row(&self, row: usize) -> Row<'_> {
        let padded = self.padded;
        Row {
            codes: &self.codes[row * padded..][..padded],
            scales: &self.scales[row * padded / GROUP * 2..][..padded / GROUP * 2],
            sums: &self.sums[row * padded / 16..][..padded / 16],
        }
    }

    /// Rows from `8 * number` on, up to eight.
    pub fn tile(&self, number: usize) -> Tile<'_> {
        let rows = TILE.min(self.count - number * TILE);
        let (first, len) = (number * TILE * self.padded, rows * self.padded);
        Tile {
            rows,
            codes: &self.tiles.codes[first / 4..][..len / 4],
            scales: &self.tiles.scales[first / GROUP..][..len / GROUP],
            sums: &self.tiles.sums[first / 16..][..len / 16],
        }
    }

    /// Numbers of row `row`.
    pub fn numbers(&self, row: usize) -> &[f32] {
        &self.numbers[row * self.columns..][..self.columns]
    }
}

/// Four codes as a level multiplies them: with VNNI their high bytes, such that the low ones have a sign,
/// and their low ones; else the first and third, and the second and fourth.
#[inline(always)]
fn split(level: Level, codes: [i16; 4]) -> [i32; 2] {
    #[cfg(target_arch = "x86_64")]
    if level.tier() == Tier::Avx512 {
        let high = codes.map(|code| ((i32::from(code) + 128) >> 8) as u8);
        return [high, codes.map(|code| code as u8)].map(i32::from_ne_bytes);
    }
    let _ = level;
    let pair = |low: i16, high: i16| i32::from(low.cast_unsigned()) | i32::from(high) << 16;
    [pair(codes[0], codes[2]), pair(codes[1], codes[3])]
}

/// Where a row is among tiles.
#[derive(Debug, Clone, Copy)]
struct Place {
    row: usize,
    /// Of all tiles.
    rows: usize,
}

impl Place {
    /// Writes what the row has.
    fn write<T>(self, tiles: Writer<'_, T>, parts: impl ExactSizeIterator<Item = T>) {
        let tile = self.row / TILE * TILE;
        let width = TILE.min(self.rows - tile);
        let first = tile * parts.len() + self.row - tile;
        for (at, part) in parts.enumerate() {
            // SAFETY: each row has places of its own, and is made by one thread.
            let place = unsafe { tiles.part(first + at * width, 1) };
            place[0] = part;
        }
    }
}

thread_local! {
    static SCRATCH: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
}

by_level! {
    /// Row `row` of the input into `made` [columns].
    pub(super) fn fill(input: Input<'_>, row: usize, made: &mut [f32]) = fill_body
}

by_level! {
    /// Rounds `numbers` to codes, scales and sums of a row of [`Rows`].
    fn quantise(numbers: &[f32], row: &mut Rounded<'_>) = quantise_body
}

#[inline(always)]
fn fill_body<const FUSED: bool>(input: Input<'_>, row: usize, made: &mut [f32]) {
    let columns = made.len();
    match input {
        Input::Plain(x) => made.copy_from_slice(&x[row * columns..][..columns]),
        Input::Norm { x, weight, eps } => norm::<FUSED>(&x[row * columns..][..columns], weight, eps, made),
        Input::AddNorm { x, residual, weight, eps } => {
            // SAFETY: each row is made once, by one thread, and rows do not overlap.
            let residual = unsafe { residual.part(row * columns, columns) };
            for (sum, x) in residual.iter_mut().zip(&x[row * columns..][..columns]) {
                *sum += x;
            }
            norm::<FUSED>(residual, weight, eps, made);
        }
        Input::Silu(x) => {
            let (gate, up) = x[row * 2 * columns..][..2 * columns].split_at(columns);
            for ((out, gate), up) in made.iter_mut().zip(gate).zip(up) {
                *out = gate / (1.0 + float::exp(-gate)) * up;
            }
        }
        Input::Gelu(x) => {
            let (gate, up) = x[row * 2 * columns..][..2 * columns].split_at(columns);
            for ((out, &gate), up) in made.iter_mut().zip(gate).zip(up) {
                let inner = 0.797_884_6 * multiply_add::<FUSED>(0.044_715 * gate * gate, gate, gate);
                *out = 0.5 * gate * (1.0 + float::tanh(inner)) * up;
            }
        }
    }
}

/// x / sqrt(mean(x^2) + eps) * weight.
#[inline(always)]
pub(super) fn norm<const FUSED: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = dot::<FUSED>(x, x) / x.len() as f32;
    let inverse = 1.0 / (mean + eps).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * inverse * weight;
    }
}

/// The sum of products, in sixteen partial sums.
#[inline(always)]
pub(super) fn dot<const FUSED: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let (whole_a, rest_a) = a.as_chunks::<16>();
    let (whole_b, rest_b) = b.as_chunks::<16>();
    for (a, b) in whole_a.iter().zip(whole_b) {
        for lane in 0..16 {
            sums[lane] = multiply_add::<FUSED>(a[lane], b[lane], sums[lane]);
        }
    }
    let rest: f32 = rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum();
    add_lanes(sums) + rest
}

/// The sum of sixteen numbers, by halves.
#[inline(always)]
pub(super) fn add_lanes(mut sums: [f32; 16]) -> f32 {
    for width in [8, 4, 2, 1] {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
    }
    sums[0]
}

#[inline(always)]
fn quantise_body<const FUSED: bool>(numbers: &[f32], row: &mut Rounded<'_>) {
    let codes = row.codes.as_chunks_mut::<GROUP>().0.iter_mut();
    let scales = row.scales.as_chunks_mut::<2>().0.iter_mut().zip(row.sums.as_chunks_mut::<2>().0);
    let mut padded = [0.0; GROUP];
    for (at, (codes, (scale, sums))) in codes.zip(scales).enumerate() {
        let start = (at * GROUP).min(numbers.len());
        let whole: &[f32; GROUP] = if let Some(whole) = numbers[start..].first_chunk() {
            whole
        } else {
            padded.fill(0.0);
            padded[..numbers.len() - start].copy_from_slice(&numbers[start..]);
            &padded
        };
        let mut peaks = [0.0f32; 16];
        let mut odd = [0.0f32; 16];
        for lane in 0..16 {
            peaks[lane] = larger(whole[lane].abs(), whole[lane + 16].abs());
            // NaN and infinite numbers spoil their row, as they would in numbers.
            odd[lane] = (whole[lane] + whole[lane + 16]) * 0.0;
        }
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                peaks[lane] = larger(peaks[lane], peaks[lane + width]);
            }
        }
        let step = peaks[0] / LARGEST + add_lanes(odd);
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        let mut totals = [0i32; 2];
        for half in 0..2 {
            for lane in 0..16 {
                // Adding 1.5 * 2^23 rounds, ties to even, and leaves the whole number in the low bits.
                let rounded = (whole[half * 16 + lane] * inverse + 12_582_912.0).to_bits() as i32;
                let code = (rounded - 0x4B40_0000) as i16;
                codes[half * 16 + lane] = code;
                totals[half] += i32::from(code);
            }
        }
        *sums = [step * totals[0] as f32, step * totals[1] as f32];
        *scale = [step, step * (totals[0] + totals[1]) as f32];
    }
}

/// As the processor's own instruction has it, which `f32::max` is not.
#[inline(always)]
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if a > b {
        a
    } else {
        b
    }
}
