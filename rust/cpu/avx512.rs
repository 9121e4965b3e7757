//! Products by quantised weights with AVX-512 and VNNI: sixteen rows of weights, each a lane, by up to
//! eight rows of the input, or twice sixteen taken apart by up to four. An instruction multiplies four codes of
//! each lane by four bytes of a row.

#[allow(clippy::wildcard_imports)] // some forty instructions
use std::arch::x86_64::*;

use super::blocks::{Format, CODEBOOK};
use super::factors::Factors;
use super::lanes::{lanes_of_formats, with_lanes};
use super::panels::{Ahead, Blocks, LANES};
use super::raw::Writer;
use super::rows::{Codes, Place, Scales, Tile, LARGEST};

/// Bytes between what is multiplied by and what is fetched meanwhile: as far as a page, at whose end processors
/// stop fetching by themselves.
const PREFETCH: usize = 4096;
/// Bytes of a word of all lanes.
const WORD: usize = 4 * LANES;
/// Lanes of a vector.
const WIDTH: usize = LANES;

type Integers = __m512i;
type Numbers = __m512;

lanes_of_formats!("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c");

/// The word of this number.
///
/// # Safety
/// It is there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn load(words: *const u8, number: usize) -> Integers {
    // SAFETY: the caller's.
    unsafe { _mm512_loadu_si512(words.add(number * WORD).cast()) }
}

/// The float16 of this number.
///
/// # Safety
/// It is there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn scale(halves: *const u8, number: usize) -> Numbers {
    // SAFETY: the caller's.
    unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(halves.add(number * 2 * LANES).cast())) }
}

/// The float32 of this number.
///
/// # Safety
/// It is there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn load_number(numbers: *const u8, number: usize) -> Numbers {
    // SAFETY: the caller's.
    unsafe { _mm512_loadu_ps(numbers.add(number * WORD).cast()) }
}

/// a & b
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn and(a: Integers, b: Integers) -> Integers {
    _mm512_and_si512(a, b)
}

/// a | b
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn or(a: Integers, b: Integers) -> Integers {
    _mm512_or_si512(a, b)
}

/// a ^ b
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn xor(a: Integers, b: Integers) -> Integers {
    _mm512_xor_si512(a, b)
}

/// a - b
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn minus(a: Integers, b: Integers) -> Integers {
    _mm512_sub_epi32(a, b)
}

/// This in every byte.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn bytes(value: u8) -> Integers {
    _mm512_set1_epi8(value.cast_signed())
}

/// This in every lane.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn words_of(value: i32) -> Integers {
    _mm512_set1_epi32(value)
}

/// a << bits
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn left(a: Integers, bits: usize) -> Integers {
    _mm512_sllv_epi32(a, words_of(bits as i32))
}

/// a >> bits
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn right(a: Integers, bits: usize) -> Integers {
    _mm512_srlv_epi32(a, words_of(bits as i32))
}

/// a >> bits, with its sign
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn right_signed(a: Integers, bits: usize) -> Integers {
    _mm512_srav_epi32(a, words_of(bits as i32))
}

/// a * factor
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn spread(a: Integers, factor: i32) -> Integers {
    _mm512_mullo_epi32(a, words_of(factor))
}

/// The values of `IQ4_NL`'s codes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn look_up(codes: Integers) -> Integers {
    let [low, high] = [0, 8].map(|at| i64::from_le_bytes(CODEBOOK[at..at + 8].try_into().expect("eight bytes")));
    _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_set_epi64x(high, low)), codes)
}

/// As a float32.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn number(a: Integers) -> Numbers {
    _mm512_cvtepi32_ps(a)
}

/// a * b
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn product(a: Numbers, b: Numbers) -> Numbers {
    _mm512_mul_ps(a, b)
}

/// a * zero
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn zero_times(a: Numbers, zero: f32) -> Numbers {
    _mm512_mul_ps(a, _mm512_set1_ps(zero))
}

/// The products of some panels' lanes with each row of a tile: out [panels, rows, 16].
///
/// # Panics
/// The format has no blocks, the tile more than eight rows or none, or something has another size.
///
/// # Safety
/// The processor has the level's instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub fn multiply(format: Format, blocks: Blocks<'_>, tile: Tile<'_>, out: &mut [[f32; LANES]]) {
    with_lanes!(format, rows_of(blocks, tile, out));
}

/// The products of blocks taken apart with each row of a tile are added: sums [panels, rows, 16]. Two panels share
/// what is fetched of the rows; by one panel, half of the time goes into fetching. group: numbers of a group.
///
/// # Panics
/// The tile has not three or four rows, or something has another size.
///
/// # Safety
/// The processor has the level's instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub fn multiply_apart(group: usize, blocks: Blocks<'_>, tile: Tile<'_>, ahead: Ahead<'_>, sums: &mut [[f32; LANES]]) {
    match (group, tile.rows) {
        (16, 3) => by_pairs::<Apart<16>, 3>(blocks, tile, ahead, sums),
        (16, 4) => by_pairs::<Apart<16>, 4>(blocks, tile, ahead, sums),
        (32, 3) => by_pairs::<Apart<32>, 3>(blocks, tile, ahead, sums),
        (32, 4) => by_pairs::<Apart<32>, 4>(blocks, tile, ahead, sums),
        _ => unreachable!("tiles by blocks taken apart have three or four rows"),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn rows_of<L: Lanes>(blocks: Blocks<'_>, tile: Tile<'_>, out: &mut [[f32; LANES]]) {
    match tile.rows {
        1 => products::<L, 1>(blocks, tile, out),
        2 => products::<L, 2>(blocks, tile, out),
        3 => products::<L, 3>(blocks, tile, out),
        4 => products::<L, 4>(blocks, tile, out),
        5 => products::<L, 5>(blocks, tile, out),
        6 => products::<L, 6>(blocks, tile, out),
        7 => products::<L, 7>(blocks, tile, out),
        8 => products::<L, 8>(blocks, tile, out),
        _ => unreachable!("a tile has one to eight rows"),
    }
}

/// Blocks of a row, of which there are as many as the tile says.
///
/// # Panics
/// Panels, tile and products have not the sizes that this makes.
fn blocks_of_row<L: Lanes>(blocks: Blocks<'_>, tile: Tile<'_>, products: usize) -> usize {
    let of_row = tile.codes.len() / tile.rows * 32 / (L::GROUPS * L::GROUP);
    assert!(tile.scales.len() == tile.codes.len() && products == blocks.count * tile.rows);
    assert!(tile.codes.len() >= of_row * L::GROUPS * L::GROUP / 32 * tile.rows);
    assert!(blocks.words.len() >= blocks.count * of_row * L::WORDS * WORD);
    assert!(blocks.halves.len() >= blocks.count * of_row * L::HALVES * L::HALF * LANES);
    of_row
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn products<L: Lanes, const R: usize>(blocks: Blocks<'_>, tile: Tile<'_>, out: &mut [[f32; LANES]]) {
    let of_row = blocks_of_row::<L>(blocks, tile, out.len());
    assert_eq!(tile.rows, R);
    for (panel, out) in out.as_chunks_mut::<R>().0.iter_mut().enumerate() {
        let mut sums = [_mm512_setzero_ps(); R];
        for block in 0..of_row {
            // SAFETY: blocks and their groups are inside of panels and tile (checked above).
            unsafe {
                let words = blocks.words.as_ptr().add((panel * of_row + block) * L::WORDS * WORD);
                let halves = blocks.halves.as_ptr().add((panel * of_row + block) * L::HALVES * L::HALF * LANES);
                for group in 0..L::GROUPS {
                    for line in group * L::WORDS / L::GROUPS..(group + 1) * L::WORDS / L::GROUPS {
                        // No harm is done where the address is nobody's.
                        _mm_prefetch::<_MM_HINT_T0>(words.wrapping_add(PREFETCH + line * WORD).cast());
                    }
                    let first = (block * L::GROUPS + group) * L::GROUP;
                    let (codes, scales) =
                        (tile.codes.as_ptr().add(first / 32 * R), tile.scales.as_ptr().add(first / 32 * R));
                    let half = first % 32 / 16;
                    let (mut highs, mut lows) = ([_mm512_setzero_si512(); R], [_mm512_setzero_si512(); R]);
                    for four in 0..L::GROUP / 8 {
                        // One of the first half, one of the second: they may be in the same word.
                        let other = four + L::GROUP / 8;
                        let (front, back) = (L::codes(words, group, four), L::codes(words, group, other));
                        for r in 0..R {
                            let [high, low] = &(*codes.add(r)).0;
                            let (at, at_other) = (half * 4 + four, half * 4 + other);
                            highs[r] = _mm512_dpbusd_epi32(highs[r], front, _mm512_set1_epi32(high[at]));
                            lows[r] = _mm512_dpbusd_epi32(lows[r], front, _mm512_set1_epi32(low[at]));
                            highs[r] = _mm512_dpbusd_epi32(highs[r], back, _mm512_set1_epi32(high[at_other]));
                            lows[r] = _mm512_dpbusd_epi32(lows[r], back, _mm512_set1_epi32(low[at_other]));
                        }
                    }
                    let (scale, shift) = L::scales(words, halves, group);
                    for r in 0..R {
                        let of_row = *scales.add(r);
                        let x_sum = of_row[if L::GROUP == 16 { 2 + half } else { 1 }];
                        sums[r] = scaled(highs[r], lows[r], scale, of_row[0], sums[r]);
                        sums[r] = _mm512_fmadd_ps(shift, _mm512_set1_ps(x_sum), sums[r]);
                    }
                }
            }
        }
        for (sum, out) in sums.into_iter().zip(out) {
            // SAFETY: `out` has sixteen numbers.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
        }
    }
}

/// `sum + scale * x_scale * (256 * highs + lows)`
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn scaled(highs: Integers, lows: Integers, scale: Numbers, x_scale: f32, sum: Numbers) -> Numbers {
    let scale = _mm512_mul_ps(scale, _mm512_set1_ps(x_scale));
    let products = _mm512_add_epi32(_mm512_slli_epi32::<8>(highs), lows);
    _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scale, sum)
}

/// Two panels by R rows at a time.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn by_pairs<L: Lanes, const R: usize>(blocks: Blocks<'_>, tile: Tile<'_>, ahead: Ahead<'_>, sums: &mut [[f32; LANES]]) {
    let of_row = blocks_of_row::<L>(blocks, tile, sums.len());
    assert_eq!(tile.rows, R);
    for (pair, sums) in sums.chunks_mut(2 * R).enumerate() {
        // SAFETY: the one or two panels are inside of the blocks (checked above), and so is the tile.
        unsafe {
            let words = blocks.words.as_ptr().add(2 * pair * of_row * L::WORDS * WORD);
            let halves = blocks.halves.as_ptr().add(2 * pair * of_row * L::HALVES * L::HALF * LANES);
            if sums.len() == 2 * R {
                side_by_side::<L, 2, R>(words, halves, of_row, tile, ahead, sums.as_mut_ptr());
            } else {
                side_by_side::<L, 1, R>(words, halves, of_row, tile, ahead, sums.as_mut_ptr());
            }
        }
    }
}

/// P panels by R rows.
///
/// # Safety
/// The panels of `of_row` blocks are there, and rows and sums have the sizes that [`by_pairs`] checks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn side_by_side<L: Lanes, const P: usize, const R: usize>(
    words: *const u8,
    halves: *const u8,
    of_row: usize,
    tile: Tile<'_>,
    ahead: Ahead<'_>,
    sums: *mut [f32; LANES],
) {
    // SAFETY: the caller's, who has checked the sizes.
    unsafe {
        let mut kept = [[_mm512_setzero_ps(); R]; P];
        for (place, kept) in kept.as_flattened_mut().iter_mut().enumerate() {
            *kept = _mm512_loadu_ps(sums.add(place).cast());
        }
        let (next_words, next_halves) = (of_row * L::WORDS * WORD, of_row * L::HALVES * L::HALF * LANES);
        for block in 0..of_row {
            let (words, halves) = (words.add(block * L::WORDS * WORD), halves.add(block * L::HALVES * L::HALF * LANES));
            for line in block * ahead.lines..(block + 1) * ahead.lines {
                // No harm is done where the address is nobody's.
                _mm_prefetch::<_MM_HINT_T1>(ahead.bytes.as_ptr().wrapping_add(line * WORD).cast());
            }
            let (codes, scales) = (tile.codes.as_ptr().add(block * R), tile.scales.as_ptr().add(block * R));
            for group in 0..L::GROUPS {
                let half = group * L::GROUP / 16;
                let (mut highs, mut lows) = ([[_mm512_setzero_si512(); R]; P], [[_mm512_setzero_si512(); R]; P]);
                for four in 0..L::GROUP / 8 {
                    for four in [four, four + L::GROUP / 8] {
                        let mut weights = [_mm512_setzero_si512(); P];
                        for (panel, weights) in weights.iter_mut().enumerate() {
                            *weights = L::codes(words.add(panel * next_words), group, four);
                        }
                        for r in 0..R {
                            let [high, low] = &(*codes.add(r)).0;
                            let high = _mm512_set1_epi32(high[half * 4 + four]);
                            let low = _mm512_set1_epi32(low[half * 4 + four]);
                            for p in 0..P {
                                highs[p][r] = _mm512_dpbusd_epi32(highs[p][r], weights[p], high);
                                lows[p][r] = _mm512_dpbusd_epi32(lows[p][r], weights[p], low);
                            }
                        }
                    }
                }
                for p in 0..P {
                    let (scale, shift) = L::scales(words.add(p * next_words), halves.add(p * next_halves), group);
                    for r in 0..R {
                        let of_row = *scales.add(r);
                        let x_sum = of_row[if L::GROUP == 16 { 2 + half } else { 1 }];
                        kept[p][r] = scaled(highs[p][r], lows[p][r], scale, of_row[0], kept[p][r]);
                        kept[p][r] = _mm512_fmadd_ps(shift, _mm512_set1_ps(x_sum), kept[p][r]);
                    }
                }
            }
        }
        for (place, kept) in kept.as_flattened().iter().enumerate() {
            _mm512_storeu_ps(sums.add(place).cast(), *kept);
        }
    }
}

/// Rounds 32 numbers of a row.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn round_group(numbers: &[f32; 32], codes: &mut Codes, scales: &mut Scales) {
    // SAFETY: the numbers are 32, and codes have 64 bytes.
    unsafe {
        let (front, back) = (_mm512_loadu_ps(numbers.as_ptr()), _mm512_loadu_ps(numbers.as_ptr().add(16)));
        let peak = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(front), _mm512_abs_ps(back)));
        // NaN and infinite numbers spoil their row, as they would in numbers.
        let odd = _mm512_mul_ps(_mm512_add_ps(front, back), _mm512_setzero_ps());
        let is_odd = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(odd, odd) != 0;
        let step = if is_odd { f32::NAN } else { peak / LARGEST };
        let inverse = _mm512_set1_ps(if step > 0.0 { 1.0 / step } else { 0.0 });
        let front = _mm512_cvtps_epi32(_mm512_mul_ps(front, inverse));
        let back = _mm512_cvtps_epi32(_mm512_mul_ps(back, inverse));
        let to: *mut __m128i = codes.0.as_mut_ptr().cast();
        let half = _mm512_set1_epi32(128);
        _mm_storeu_si128(to, _mm512_cvtepi32_epi8(_mm512_srai_epi32::<8>(_mm512_add_epi32(front, half))));
        _mm_storeu_si128(to.add(1), _mm512_cvtepi32_epi8(_mm512_srai_epi32::<8>(_mm512_add_epi32(back, half))));
        _mm_storeu_si128(to.add(2), _mm512_cvtepi32_epi8(front));
        _mm_storeu_si128(to.add(3), _mm512_cvtepi32_epi8(back));
        let (front, back) = (_mm512_reduce_add_epi32(front), _mm512_reduce_add_epi32(back));
        *scales = [step, step * (front + back) as f32, step * front as f32, step * back as f32];
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

/// scores [n] = keys [n, padded dim] . query [padded dim] * scale
///
/// # Panics
/// There are fewer keys than scores.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn dots(keys: &[f32], query: &[[f32; LANES]], scale: f32, scores: &mut [f32]) {
    let query = query.as_flattened();
    assert!(keys.len() >= scores.len() * query.len());
    for (number, score) in scores.iter_mut().enumerate() {
        let mut sum = _mm512_setzero_ps();
        for at in (0..query.len()).step_by(16) {
            // SAFETY: both have whole sixteens of numbers, the keys as many as there are scores (checked above).
            unsafe {
                let key = _mm512_loadu_ps(keys.as_ptr().add(number * query.len() + at));
                sum = _mm512_fmadd_ps(key, _mm512_loadu_ps(query.as_ptr().add(at)), sum);
            }
        }
        *score = _mm512_reduce_add_ps(sum) * scale;
    }
}

/// answers [padded dim] += weights [n] . values [n, padded dim]
///
/// # Panics
/// There are fewer values than weights.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn add_weighted(values: &[f32], weights: &[f32], answers: &mut [[f32; LANES]]) {
    let width = answers.len() * LANES;
    assert!(values.len() >= weights.len() * width);
    for (part, answers) in answers.chunks_mut(4).enumerate() {
        match answers {
            [_, _, _, _] => weighted::<4>(&values[part * 4 * LANES..], width, weights, answers.as_flattened_mut()),
            _ => {
                for (number, answer) in answers.iter_mut().enumerate() {
                    weighted::<1>(&values[(part * 4 + number) * LANES..], width, weights, answer);
                }
            }
        }
    }
}

/// N vectors of answers, which stay in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn weighted<const N: usize>(values: &[f32], width: usize, weights: &[f32], answers: &mut [f32]) {
    assert!(answers.len() == N * 16 && values.len() + width >= weights.len() * width + N * 16);
    let mut sums = [_mm512_setzero_ps(); N];
    // SAFETY: answers are so many, and values of each weight are inside (checked above).
    unsafe {
        for (at, sum) in sums.iter_mut().enumerate() {
            *sum = _mm512_loadu_ps(answers.as_ptr().add(at * 16));
        }
        for (number, &weight) in weights.iter().enumerate() {
            for (at, sum) in sums.iter_mut().enumerate() {
                let values = _mm512_loadu_ps(values.as_ptr().add(number * width + at * 16));
                *sum = _mm512_fmadd_ps(_mm512_set1_ps(weight), values, *sum);
            }
        }
        for (at, sum) in sums.iter().enumerate() {
            _mm512_storeu_ps(answers.as_mut_ptr().add(at * 16), *sum);
        }
    }
}
