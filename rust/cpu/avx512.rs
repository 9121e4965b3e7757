//! Products by quantised weights with AVX-512 and VNNI: sixteen rows of weights, each a lane, by up to
//! eight rows of the input. An instruction multiplies four codes of each lane by four bytes of a row.

#[allow(clippy::wildcard_imports)] // some fifty instructions
use std::arch::x86_64::*;

use super::attention::Factors;
use super::blocks::{unpack, Format, CODEBOOK, MAX_GROUPS};
use super::panels::{Blocks, LANES};
use super::rows::Tile;

/// Bytes between what is multiplied by and what is fetched meanwhile: further than a page, at whose end
/// processors stop fetching by themselves.
const PREFETCH: usize = 4096;

/// Blocks of 32 numbers of sixteen rows.
trait Sixteen {
    /// Four bytes of a block, besides its float16 numbers.
    const WORDS: usize;
    /// The shift as a multiple of the scale; without it the block has one.
    const ZERO: Option<f32>;
    /// float16 numbers of a block.
    const HALVES: usize = if Self::ZERO.is_some() { 1 } else { 2 };

    /// Four codes of each lane: the `four`-th of the block, and the `four + 4`-th.
    ///
    /// # Safety
    /// `WORDS` times 64 bytes can be read at `words`, and the processor has the level's instructions.
    unsafe fn codes(words: *const u8, four: usize) -> (__m512i, __m512i);

    /// Scales and shifts of the lanes.
    ///
    /// # Safety
    /// `HALVES` times 32 bytes can be read at `halves`, and the processor has the level's instructions.
    unsafe fn scales(halves: *const u8) -> (__m512, __m512);
}

struct Q4_0;
struct Q4_1;
struct Q5_0;
struct Q5_1;
struct Q8_0;
#[allow(non_camel_case_types)] // ggml's name
struct IQ4_NL;

macro_rules! sixteen {
    ($format:ident, $words:literal, $zero:expr, $at:ident, $four:ident => $codes:expr) => {
        impl Sixteen for $format {
            const WORDS: usize = $words;
            const ZERO: Option<f32> = $zero;

            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            #[inline]
            unsafe fn codes($at: *const u8, $four: usize) -> (__m512i, __m512i) {
                // SAFETY: the caller's: all that is read is one of the block's words.
                unsafe { $codes }
            }

            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            #[inline]
            unsafe fn scales(halves: *const u8) -> (__m512, __m512) {
                // SAFETY: the caller's: there are two halves where there is no zero.
                unsafe {
                    let scale = _mm512_cvtph_ps(_mm256_loadu_si256(halves.cast()));
                    let shift = match Self::ZERO {
                        Some(zero) => _mm512_mul_ps(scale, _mm512_set1_ps(zero)),
                        None => _mm512_cvtph_ps(_mm256_loadu_si256(halves.add(2 * LANES).cast())),
                    };
                    (scale, shift)
                }
            }
        }
    };
}

sixteen!(Q4_0, 4, Some(-8.0), at, four => nibbles(word(at, four)));
sixteen!(Q4_1, 4, None, at, four => nibbles(word(at, four)));
sixteen!(Q5_0, 5, Some(-16.0), at, four => with_fifth(nibbles(word(at, 1 + four)), word(at, 0), four));
sixteen!(Q5_1, 5, None, at, four => with_fifth(nibbles(word(at, 1 + four)), word(at, 0), four));
sixteen!(IQ4_NL, 4, Some(-128.0), at, four => named(nibbles(word(at, four))));
sixteen!(Q8_0, 8, Some(-128.0), at, four => signed(word(at, four), word(at, 4 + four)));

/// Four bytes of each lane.
///
/// # Safety
/// A block has this word.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn word(words: *const u8, number: usize) -> __m512i {
    // SAFETY: the caller's.
    unsafe { _mm512_loadu_si512(words.add(number * 64).cast()) }
}

/// The low halves of bytes, and the high ones.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn nibbles(bytes: __m512i) -> (__m512i, __m512i) {
    let mask = _mm512_set1_epi8(15);
    (_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask))
}

/// Codes of five bits: those of four, and 32 fifth bits a lane.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn with_fifth(codes: (__m512i, __m512i), fifth: __m512i, four: usize) -> (__m512i, __m512i) {
    let mut with = [codes.0, codes.1];
    for (half, codes) in with.iter_mut().enumerate() {
        let bits = _mm512_srlv_epi32(fifth, _mm512_set1_epi32((four * 4 + half * 16) as i32));
        let bits = _mm512_and_si512(bits, _mm512_set1_epi32(15));
        // Copies of the four bits, seven places apart: bit n of them is then the least of byte n.
        let spread = _mm512_mullo_epi32(bits, _mm512_set1_epi32(0x0020_4081));
        let spread = _mm512_and_si512(spread, _mm512_set1_epi8(1));
        *codes = _mm512_or_si512(*codes, _mm512_slli_epi32::<4>(spread));
    }
    (with[0], with[1])
}

/// The values of `IQ4_NL`'s codes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn named(codes: (__m512i, __m512i)) -> (__m512i, __m512i) {
    let [low, high] = [0, 8].map(|at| i64::from_le_bytes(CODEBOOK[at..at + 8].try_into().expect("eight bytes")));
    let book = _mm512_broadcast_i32x4(_mm_set_epi64x(high, low));
    (_mm512_shuffle_epi8(book, codes.0), _mm512_shuffle_epi8(book, codes.1))
}

/// Signed bytes with 128 added.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn signed(front: __m512i, back: __m512i) -> (__m512i, __m512i) {
    let bias = _mm512_set1_epi8(-128);
    (_mm512_xor_si512(front, bias), _mm512_xor_si512(back, bias))
}

/// The products of some panels' lanes with each row of a tile: out [panels, rows, 16]. `blocks`: of a format of
/// 32 numbers.
///
/// # Panics
/// The format has other blocks, the tile more than eight rows or none, or something has another size.
///
/// # Safety
/// The processor has the level's instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub fn multiply(format: Format, blocks: Blocks<'_>, tile: Tile<'_>, out: &mut [[f32; LANES]]) {
    match format {
        Format::Q4_0 => rows_of::<Q4_0>(blocks, tile, out),
        Format::Q4_1 => rows_of::<Q4_1>(blocks, tile, out),
        Format::Q5_0 => rows_of::<Q5_0>(blocks, tile, out),
        Format::Q5_1 => rows_of::<Q5_1>(blocks, tile, out),
        Format::IQ4_NL => rows_of::<IQ4_NL>(blocks, tile, out),
        Format::Q8_0 => rows_of::<Q8_0>(blocks, tile, out),
        _ => unreachable!("a block of 32 numbers"),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn rows_of<S: Sixteen>(blocks: Blocks<'_>, tile: Tile<'_>, out: &mut [[f32; LANES]]) {
    match tile.rows {
        1 => products::<S, 1>(blocks, tile, out),
        2 => products::<S, 2>(blocks, tile, out),
        3 => products::<S, 3>(blocks, tile, out),
        4 => products::<S, 4>(blocks, tile, out),
        5 => products::<S, 5>(blocks, tile, out),
        6 => products::<S, 6>(blocks, tile, out),
        7 => products::<S, 7>(blocks, tile, out),
        8 => products::<S, 8>(blocks, tile, out),
        _ => unreachable!("a tile has one to eight rows"),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn products<S: Sixteen, const R: usize>(blocks: Blocks<'_>, tile: Tile<'_>, out: &mut [[f32; LANES]]) {
    let groups = tile.scales.len() / R;
    assert!(tile.codes.len() >= groups * 8 * R && out.len() == blocks.count * R);
    assert!(blocks.words.len() >= blocks.count * groups * S::WORDS * 64);
    assert!(blocks.halves.len() >= blocks.count * groups * S::HALVES * 32);
    for (panel, out) in out.as_chunks_mut::<R>().0.iter_mut().enumerate() {
        let mut sums = [_mm512_setzero_ps(); R];
        for group in 0..groups {
            // SAFETY: groups are inside of panels and tile (checked above).
            unsafe {
                let words = blocks.words.as_ptr().add((panel * groups + group) * S::WORDS * 64);
                let halves = blocks.halves.as_ptr().add((panel * groups + group) * S::HALVES * 32);
                let rows = tile.codes.as_ptr().add(group * 8 * R);
                for line in 0..S::WORDS {
                    // No harm is done where the address is nobody's.
                    _mm_prefetch::<_MM_HINT_T0>(words.wrapping_add(PREFETCH + line * 64).cast());
                }
                let (mut highs, mut lows) = ([_mm512_setzero_si512(); R], [_mm512_setzero_si512(); R]);
                for four in 0..4 {
                    let (front, back) = S::codes(words, four);
                    for r in 0..R {
                        let ([high, low], [high_back, low_back]) =
                            (*rows.add(four * R + r), *rows.add((four + 4) * R + r));
                        highs[r] = _mm512_dpbusd_epi32(highs[r], front, _mm512_set1_epi32(high));
                        lows[r] = _mm512_dpbusd_epi32(lows[r], front, _mm512_set1_epi32(low));
                        highs[r] = _mm512_dpbusd_epi32(highs[r], back, _mm512_set1_epi32(high_back));
                        lows[r] = _mm512_dpbusd_epi32(lows[r], back, _mm512_set1_epi32(low_back));
                    }
                }
                let (scale, shift) = S::scales(halves);
                for r in 0..R {
                    let [x_scale, x_sum] = *tile.scales.as_ptr().add(group * R + r);
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x_scale));
                    let products = _mm512_add_epi32(_mm512_slli_epi32::<8>(highs[r]), lows[r]);
                    sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, sums[r]);
                    sums[r] = _mm512_fmadd_ps(shift, _mm512_set1_ps(x_sum), sums[r]);
                }
            }
        }
        for (sum, out) in sums.into_iter().zip(out) {
            // SAFETY: `out` has sixteen numbers.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
        }
    }
}

/// Sixteen rows of weights taken apart, whose blocks do not stand side by side: lane by lane, four codes of a
/// row beside each other.
#[derive(Debug, Default)]
pub struct Panel {
    group: usize,
    groups: usize,
    /// [columns / 4, 16, 4]
    codes: Vec<u8>,
    /// [groups, 2, 16]: scales, then shifts.
    scales: Vec<f32>,
    /// [16, numbers of a block]: codes of one block of each row, where they cannot be taken apart side by side.
    rows: Vec<u8>,
}

/// 16 bytes of each lane, turned: the n-th result has the n-th four bytes of each lane.
///
/// # Safety
/// Each lane has 16 bytes there: lane n `n * stride` bytes behind `at`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn turned(at: *const u8, stride: usize) -> [__m512i; 4] {
    // Lane 4 * a + b is quarter a of number b.
    let mut mixed = [_mm512_setzero_si512(); 4];
    for (b, mixed) in mixed.iter_mut().enumerate() {
        // SAFETY: the caller's.
        unsafe {
            let all = _mm512_castsi128_si512(_mm_loadu_si128(at.add(b * stride).cast()));
            let all = _mm512_inserti32x4::<1>(all, _mm_loadu_si128(at.add((4 + b) * stride).cast()));
            let all = _mm512_inserti32x4::<2>(all, _mm_loadu_si128(at.add((8 + b) * stride).cast()));
            *mixed = _mm512_inserti32x4::<3>(all, _mm_loadu_si128(at.add((12 + b) * stride).cast()));
        }
    }
    let (a, b) = (_mm512_unpacklo_epi32(mixed[0], mixed[1]), _mm512_unpacklo_epi32(mixed[2], mixed[3]));
    let (c, d) = (_mm512_unpackhi_epi32(mixed[0], mixed[1]), _mm512_unpackhi_epi32(mixed[2], mixed[3]));
    [_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b), _mm512_unpacklo_epi64(c, d), _mm512_unpackhi_epi64(c, d)]
}

impl Panel {
    /// Takes sixteen rows of any quantised format apart, block by block: each row's by itself, then all are turned.
    ///
    /// # Panics
    /// A row has less than `columns` numbers.
    ///
    /// # Safety
    /// The processor has the level's instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub fn fill(&mut self, format: Format, weights: &[&[u8]; LANES], columns: usize) {
        self.group = format.group();
        self.groups = columns / self.group;
        self.codes.resize(columns * LANES, 0);
        self.scales.resize(self.groups * 2 * LANES, 0.0);
        let (mut scales, mut shifts) = ([0.0; MAX_GROUPS], [0.0; MAX_GROUPS]);
        let (numbers, bytes, groups) = (format.numbers(), format.bytes(), format.numbers() / self.group);
        self.rows.resize(LANES * numbers, 0);
        for block in 0..columns / numbers {
            for (lane, row) in weights.iter().enumerate() {
                let codes = &mut self.rows[lane * numbers..][..numbers];
                unpack(format, &row[block * bytes..][..bytes], codes, &mut scales, &mut shifts);
                let panel = &mut self.scales[block * groups * 2 * LANES..][..groups * 2 * LANES];
                for (group, panel) in panel.as_chunks_mut::<{ 2 * LANES }>().0.iter_mut().enumerate() {
                    panel[lane] = scales[group];
                    panel[LANES + lane] = shifts[group];
                }
            }
            let panel = &mut self.codes[block * numbers * LANES..][..numbers * LANES];
            for (part, panel) in panel.as_chunks_mut::<{ 16 * LANES }>().0.iter_mut().enumerate() {
                // SAFETY: a row has `numbers` codes, and a part is sixteen of them.
                unsafe {
                    let turned = turned(self.rows.as_ptr().add(part * 16), numbers);
                    for (four, codes) in turned.into_iter().enumerate() {
                        _mm512_storeu_si512(panel.as_mut_ptr().add(four * 64).cast(), codes);
                    }
                }
            }
        }
    }

    /// The products of all lanes with each row of a tile.
    ///
    /// # Panics
    /// The tile has more than eight rows or none, or its rows are shorter than the panel's.
    ///
    /// # Safety
    /// The processor has the level's instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub fn multiply(&self, tile: Tile<'_>, out: &mut [[f32; LANES]]) {
        match tile.rows {
            1 => self.products::<1>(tile, out),
            2 => self.products::<2>(tile, out),
            3 => self.products::<3>(tile, out),
            4 => self.products::<4>(tile, out),
            5 => self.products::<5>(tile, out),
            6 => self.products::<6>(tile, out),
            7 => self.products::<7>(tile, out),
            8 => self.products::<8>(tile, out),
            _ => unreachable!("a tile has one to eight rows"),
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn products<const R: usize>(&self, tile: Tile<'_>, out: &mut [[f32; LANES]]) {
        let sums = if self.group == 16 { self.sums::<R, 4>(tile) } else { self.sums::<R, 8>(tile) };
        for (sum, out) in sums.into_iter().zip(out) {
            // SAFETY: `out` has sixteen numbers.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
        }
    }

    /// FOURS: a group's codes, four at a time.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    #[inline]
    fn sums<const R: usize, const FOURS: usize>(&self, tile: Tile<'_>) -> [__m512; R] {
        let groups = self.groups;
        assert!(self.codes.len() >= groups * FOURS * 64 && self.scales.len() >= groups * 32);
        let per_scale = 8 / FOURS; // groups of weights to one of the rows
        assert!(tile.codes.len() >= groups * FOURS * R);
        assert!(tile.scales.len() >= groups.div_ceil(per_scale) * R);
        assert!(tile.sums.len() * FOURS >= groups * 4 * R);
        let mut sums = [_mm512_setzero_ps(); R];
        for group in 0..groups {
            // SAFETY: groups are inside of panel and tile (checked above).
            unsafe {
                let codes = self.codes.as_ptr().add(group * FOURS * 64);
                let rows = tile.codes.as_ptr().add(group * FOURS * R);
                let (mut highs, mut lows) = ([_mm512_setzero_si512(); R], [_mm512_setzero_si512(); R]);
                for four in 0..FOURS {
                    let weights = _mm512_loadu_si512(codes.add(four * 64).cast());
                    for r in 0..R {
                        let [high, low] = *rows.add(four * R + r);
                        highs[r] = _mm512_dpbusd_epi32(highs[r], weights, _mm512_set1_epi32(high));
                        lows[r] = _mm512_dpbusd_epi32(lows[r], weights, _mm512_set1_epi32(low));
                    }
                }
                let scales = self.scales.as_ptr().add(group * 32);
                let (scale, shift) = (_mm512_loadu_ps(scales), _mm512_loadu_ps(scales.add(16)));
                for r in 0..R {
                    let [x_scale, whole_sum] = *tile.scales.as_ptr().add(group / per_scale * R + r);
                    let x_sum = if FOURS == 4 { *tile.sums.as_ptr().add(group * R + r) } else { whole_sum };
                    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x_scale));
                    let products = _mm512_add_epi32(_mm512_slli_epi32::<8>(highs[r]), lows[r]);
                    sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, sums[r]);
                    sums[r] = _mm512_fmadd_ps(shift, _mm512_set1_ps(x_sum), sums[r]);
                }
            }
        }
        sums
    }
}

/// sums = sums * shrinks + factors . lanes, eight rows at a time.
///
/// # Panics
/// sums: no whole eights, or more than the factors have rows; lanes: none, or more than columns.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn add_products(
    factors: Factors<'_>,
    lanes: &[[f32; LANES]],
    shrinks: &[f32; LANES],
    sums: &mut [[f32; LANES]],
) {
    const ROWS: usize = 8;
    factors.check(lanes.len(), sums.len(), ROWS);
    let numbers = factors.numbers.as_ptr();
    for (part, sums) in sums.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
        let mut kept = [_mm512_setzero_ps(); ROWS];
        // SAFETY: sixteen numbers are read and written where an array has them, and factors are inside (`check`).
        unsafe {
            let shrinks = _mm512_loadu_ps(shrinks.as_ptr());
            for (kept, sums) in kept.iter_mut().zip(&*sums) {
                *kept = _mm512_mul_ps(_mm512_loadu_ps(sums.as_ptr()), shrinks);
            }
            for (at, lanes) in lanes.iter().enumerate() {
                let lanes = _mm512_loadu_ps(lanes.as_ptr());
                for (number, kept) in kept.iter_mut().enumerate() {
                    let factor = *numbers.add(factors.place(part * ROWS + number, at));
                    *kept = _mm512_fmadd_ps(_mm512_set1_ps(factor), lanes, *kept);
                }
            }
            for (kept, sums) in kept.iter().zip(sums) {
                _mm512_storeu_ps(sums.as_mut_ptr(), *kept);
            }
        }
    }
}
