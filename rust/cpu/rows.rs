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
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};

/// Numbers of one group of activations.
pub const GROUP: usize = 32;
/// The largest code: both of its bytes are signed numbers.
pub(super) const LARGEST: f32 = 127.0 * 256.0;
/// Up to so many rows are one tile.
pub const FEW: usize = 8;
/// Rows of a tile where there are more: by two panels of weights, as many as registers hold sums for.
const TILE: usize = 4;
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

/// Rows for panels of weights: up to eight side by side, or tile after tile of three or four.
#[derive(Debug, Default)]
struct Tiles {
    /// The first row of each tile, and how many rows there are.
    starts: Vec<usize>,
    /// [padded / 32, rows of the tile] of each tile
    codes: Vec<Codes>,
    /// [padded / 32, rows of the tile]
    scales: Vec<Scales>,
}

/// 32 codes, by fours, as a level multiplies them: with VNNI their high bytes, such that the low ones have a
/// sign, and their low ones; else the first and third of each four, and the second and fourth.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub struct Codes(pub [[i32; 8]; 2]);

/// What belongs to 32 codes: their scale, scale * (sum of the codes), and the same of each half.
pub type Scales = [f32; 4];

/// Up to eight rows, side by side.
#[derive(Debug, Clone, Copy)]
pub struct Tile<'a> {
    /// How many.
    pub rows: usize,
    /// [groups of 32, rows]
    pub codes: &'a [Codes],
    /// [groups of 32, rows]
    pub scales: &'a [Scales],
}

impl Tile<'_> {
    /// `count` groups of 32 from number `first` on.
    #[must_use]
    pub fn part(self, first: usize, count: usize) -> Self {
        let (from, len) = (first * self.rows, count * self.rows);
        Self { rows: self.rows, codes: &self.codes[from..][..len], scales: &self.scales[from..][..len] }
    }
}

/// What of the rows is wanted.
#[derive(Debug, Clone, Copy)]
pub struct Forms {
    /// Codes row by row, for weights that are quantised.
    pub codes: bool,
    /// Codes in tiles, for panels of such weights.
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
        let tiled = if tiles { rows * self.padded / GROUP } else { 0 };
        self.tiles.codes.resize(tiled, Codes::default());
        self.tiles.scales.resize(tiled, [0.0; 4]);
        self.tiles.starts.clear();
        self.tiles.starts.extend((0..=tiles_of(rows)).map(|number| first_of_tile(number, rows)));
        let tile_codes = Writer::new(&mut self.tiles.codes);
        let tile_scales = Writer::new(&mut self.tiles.scales);
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
                if tiles {
                    let place = Place::of(row, rows, columns.div_ceil(GROUP));
                    round(level, made, place, tile_codes, tile_scales);
                }
            });
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

    /// How many tiles there are.
    pub fn tiles(&self) -> usize {
        self.tiles.starts.len() - 1
    }

    /// The first row of tile `number`, or how many rows there are behind the last.
    pub fn first_of_tile(&self, number: usize) -> usize {
        self.tiles.starts[number]
    }

    /// Tile `number`.
    pub fn tile(&self, number: usize) -> Tile<'_> {
        let first = self.first_of_tile(number);
        let (rows, groups) = (self.first_of_tile(number + 1) - first, self.padded / GROUP);
        let (codes, scales) = (&self.tiles.codes[first * groups..], &self.tiles.scales[first * groups..]);
        Tile { rows, codes: &codes[..rows * groups], scales: &scales[..rows * groups] }
    }

    /// Numbers of row `row`.
    pub fn numbers(&self, row: usize) -> &[f32] {
        &self.numbers[row * self.columns..][..self.columns]
    }
}

/// How many tiles so many rows are.
fn tiles_of(rows: usize) -> usize {
    if rows <= FEW {
        1
    } else {
        rows.div_ceil(TILE)
    }
}

/// The first of the rows of tile `number`: nine rows are thrice three, since four, four and one take longer.
fn first_of_tile(number: usize, rows: usize) -> usize {
    number * rows / tiles_of(rows)
}

/// Where a row of tiles lies: groups are `step` apart.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    first: usize,
    step: usize,
}

impl Place {
    /// Of row `row` of `rows`, which have so many groups of 32.
    fn of(row: usize, rows: usize, groups: usize) -> Self {
        let tile = ((row + 1) * tiles_of(rows) - 1) / rows;
        let first = first_of_tile(tile, rows);
        Self { first: first * groups + row - first, step: first_of_tile(tile + 1, rows) - first }
    }

    /// Where group `group` is.
    #[inline(always)]
    pub fn group(self, group: usize) -> usize {
        self.first + group * self.step
    }
}

/// Rounds `numbers` to a row of tiles. Only levels that have kernels for panels have tiles.
#[cfg(target_arch = "x86_64")]
fn round(level: Level, numbers: &[f32], place: Place, codes: Writer<'_, Codes>, scales: Writer<'_, Scales>) {
    let round = match level.tier() {
        Tier::Portable => unreachable!("no kernel for panels"),
        Tier::Avx2 => avx2::round,
        Tier::Avx512 => avx512::round,
    };
    // SAFETY: a `Level` can only be had where the processor has its instructions; places of a row are its own.
    unsafe { round(numbers, place, codes, scales) };
}

#[cfg(not(target_arch = "x86_64"))]
fn round(_: Level, _: &[f32], _: Place, _: Writer<'_, Codes>, _: Writer<'_, Scales>) {
    unreachable!("no kernel for panels");
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
