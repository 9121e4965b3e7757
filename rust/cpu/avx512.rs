//! Products by quantised weights with AVX-512 and VNNI.
//!
//! For up to four rows a kernel reads the file's blocks and takes them apart in registers, four
//! blocks at once (`few`). For more rows sixteen rows of weights are taken apart into a panel, which
//! then multiplies all rows (`Panel`): each instruction does 64 multiplications.

#[allow(clippy::wildcard_imports)] // some fifty instructions
use std::arch::x86_64::*;

use super::blocks::{unpack, Format, MAX_GROUPS, MAX_NUMBERS};
use super::rows::Row;

/// Rows of weights in a panel.
pub const LANES: usize = 16;
/// Most rows for which blocks are taken apart in registers.
pub const FEW: usize = 4;

/// Bytes between what is multiplied by and what is fetched meanwhile: several rows, which processors
/// do not foresee when four of them are read side by side.
const PREFETCH: usize = 8192;

/// Blocks of 32 numbers that can be taken apart four at a time.
trait Quad {
    const BYTES: usize;

    /// count: of the blocks that are there, 1 to 4; the others have zeros. Returns their codes 0 to 15,
    /// their codes 16 to 31, and of each block its scale and shift.
    ///
    /// # Safety
    /// `count` blocks can be read at `at`, and the processor has AVX-512 and F16C.
    unsafe fn load(at: *const u8, count: usize) -> (__m512i, __m512i, __m256);
}

/// 16 bytes of each block, from `at` on.
#[inline(always)]
unsafe fn sixteens<const BYTES: usize>(at: *const u8, count: usize) -> __m512i {
    // SAFETY: as `Quad::load`.
    unsafe {
        let block = |number: usize| {
            if number < count {
                _mm_loadu_si128(at.add(number * BYTES).cast())
            } else {
                _mm_setzero_si128()
            }
        };
        let low = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(block(0)), block(1));
        let high = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(block(2)), block(3));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
    }
}

/// Two float16 at the start of each block: scale and shift.
#[inline(always)]
unsafe fn scales_and_shifts<const BYTES: usize>(at: *const u8, count: usize) -> __m256 {
    // SAFETY: as `Quad::load`.
    unsafe {
        let block = |number: usize| {
            if number < count {
                at.add(number * BYTES).cast::<i32>().read_unaligned()
            } else {
                0
            }
        };
        _mm256_cvtph_ps(_mm_set_epi32(block(3), block(2), block(1), block(0)))
    }
}

/// One float16 at the start of each block; the shift is `zero` times it.
#[inline(always)]
unsafe fn scales_with_zero<const BYTES: usize>(at: *const u8, count: usize, zero: f32) -> __m256 {
    // SAFETY: as `Quad::load`.
    unsafe {
        let block = |number: usize| {
            if number < count {
                u64::from(at.add(number * BYTES).cast::<u16>().read_unaligned()) << (16 * number)
            } else {
                0
            }
        };
        let halves = _mm_cvtsi64_si128((block(0) | block(1) | block(2) | block(3)) as i64);
        let scales = _mm256_cvtph_ps(_mm_unpacklo_epi16(halves, halves));
        _mm256_mul_ps(scales, _mm256_setr_ps(1.0, zero, 1.0, zero, 1.0, zero, 1.0, zero))
    }
}

#[inline(always)]
unsafe fn split_nibbles(bytes: __m512i) -> (__m512i, __m512i) {
    // SAFETY: as `Quad::load`.
    unsafe {
        let mask = _mm512_set1_epi8(15);
        (_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask))
    }
}

struct Q4_0;
struct Q4_1;
struct Q8_0;

impl Quad for Q4_0 {
    const BYTES: usize = 18;

    #[inline(always)]
    unsafe fn load(at: *const u8, count: usize) -> (__m512i, __m512i, __m256) {
        // SAFETY: the caller's.
        unsafe {
            let (low, high) = split_nibbles(sixteens::<18>(at.add(2), count));
            (low, high, scales_with_zero::<18>(at, count, -8.0))
        }
    }
}

impl Quad for Q4_1 {
    const BYTES: usize = 20;

    #[inline(always)]
    unsafe fn load(at: *const u8, count: usize) -> (__m512i, __m512i, __m256) {
        // SAFETY: the caller's.
        unsafe {
            let (low, high) = split_nibbles(sixteens::<20>(at.add(4), count));
            (low, high, scales_and_shifts::<20>(at, count))
        }
    }
}

impl Quad for Q8_0 {
    const BYTES: usize = 34;

    #[inline(always)]
    unsafe fn load(at: *const u8, count: usize) -> (__m512i, __m512i, __m256) {
        // SAFETY: the caller's.
        unsafe {
            let bias = _mm512_set1_epi8(-128);
            let low = _mm512_xor_si512(sixteens::<34>(at.add(2), count), bias);
            let high = _mm512_xor_si512(sixteens::<34>(at.add(18), count), bias);
            (low, high, scales_with_zero::<34>(at, count, -128.0))
        }
    }
}

/// Whether [`few`] takes this format.
pub fn has_few(format: Format) -> bool {
    matches!(format, Format::Q4_0 | Format::Q4_1 | Format::Q8_0)
}

/// out[w * stride + r] = weights[w] . rows[r], for up to [`FEW`] rows.
///
/// weights: rows of whole blocks, all of `columns` numbers.
///
/// # Safety
/// The processor has the level's instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub fn few(format: Format, weights: &[&[u8]], rows: &[Row<'_>], columns: usize, out: &mut [f32]) {
    match format {
        Format::Q4_0 => few_of::<Q4_0>(weights, rows, columns, out),
        Format::Q4_1 => few_of::<Q4_1>(weights, rows, columns, out),
        Format::Q8_0 => few_of::<Q8_0>(weights, rows, columns, out),
        _ => unreachable!("`has_few` says which"),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
fn few_of<Q: Quad>(weights: &[&[u8]], rows: &[Row<'_>], columns: usize, out: &mut [f32]) {
    let many = rows.len();
    let (fours, rest) = weights.as_chunks::<4>();
    let (out_fours, out_rest) = out.split_at_mut(fours.len() * 4 * many);
    for (weights, out) in fours.iter().zip(out_fours.chunks_exact_mut(4 * many)) {
        match rows {
            [a] => dots::<Q, 4, 1>(*weights, [*a], columns, out),
            [a, b] => dots::<Q, 4, 2>(*weights, [*a, *b], columns, out),
            [a, b, c] => dots::<Q, 4, 3>(*weights, [*a, *b, *c], columns, out),
            [a, b, c, d] => {
                let (first, second) = out.split_at_mut(2 * many);
                dots::<Q, 2, 4>([weights[0], weights[1]], [*a, *b, *c, *d], columns, first);
                dots::<Q, 2, 4>([weights[2], weights[3]], [*a, *b, *c, *d], columns, second);
            }
            _ => unreachable!("up to FEW rows"),
        }
    }
    for (weights, out) in rest.iter().zip(out_rest.chunks_exact_mut(many)) {
        for (row, out) in rows.iter().zip(out) {
            dots::<Q, 1, 1>([*weights], [*row], columns, std::slice::from_mut(out));
        }
    }
}

/// Four groups of 32 codes: the first 16 of each, and the last 16.
///
/// # Safety
/// 128 codes can be read at `codes`, and the processor has AVX-512.
#[inline(always)]
unsafe fn fours(codes: *const i8) -> [__m512i; 2] {
    // SAFETY: the caller's.
    unsafe {
        let (front, back) = (_mm512_loadu_si512(codes.cast()), _mm512_loadu_si512(codes.add(64).cast()));
        [_mm512_shuffle_i64x2::<0b10_00_10_00>(front, back), _mm512_shuffle_i64x2::<0b11_01_11_01>(front, back)]
    }
}

/// W rows of weights by R rows: out[w * R + r].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn dots<Q: Quad, const W: usize, const R: usize>(
    weights: [&[u8]; W],
    rows: [Row<'_>; R],
    columns: usize,
    out: &mut [f32],
) {
    let blocks = columns / 32;
    assert!(weights.iter().all(|row| row.len() >= blocks * Q::BYTES));
    assert!(rows.iter().all(|row| row.high.len().min(row.low.len()) >= blocks.div_ceil(4) * 128));
    assert!(rows.iter().all(|row| row.scales.len() >= blocks.div_ceil(4) * 8));
    let mut sums = [[_mm512_setzero_ps(); R]; W];
    let mut shifts = [[_mm256_setzero_ps(); R]; W];
    let pick = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
    let mut quad = |first: usize, count: usize| {
        // SAFETY: four groups of a row can be read, since rows are padded to them (checked above).
        let inputs: [([__m512i; 2], [__m512i; 2], __m256); R] = std::array::from_fn(|r| unsafe {
            (
                fours(rows[r].high.as_ptr().add(first * 32)),
                fours(rows[r].low.as_ptr().add(first * 32)),
                _mm256_loadu_ps(rows[r].scales.as_ptr().add(first * 2)),
            )
        });
        for w in 0..W {
            // SAFETY: `count` blocks from `first` on are in the row (checked above).
            let (front, back, scales) = unsafe { Q::load(weights[w].as_ptr().add(first * Q::BYTES), count) };
            for line in 0..(4 * Q::BYTES).div_ceil(64) {
                // No harm is done where the address is nobody's.
                let ahead = weights[w].as_ptr().wrapping_add(first * Q::BYTES + PREFETCH + line * 64);
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
            }
            for r in 0..R {
                let (x_high, x_low, x_scales) = inputs[r];
                let highs = _mm512_dpbusd_epi32(_mm512_setzero_si512(), front, x_high[0]);
                let highs = _mm512_slli_epi32::<8>(_mm512_dpbusd_epi32(highs, back, x_high[1]));
                let both = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(highs, front, x_low[0]), back, x_low[1]);
                let products = _mm512_cvtepi32_ps(both);
                // (scale * scale, shift * sum) of each block.
                let pairs = _mm256_mul_ps(scales, x_scales);
                shifts[w][r] = _mm256_mask_add_ps(shifts[w][r], 0b1010_1010, shifts[w][r], pairs);
                let scale = _mm512_permutexvar_ps(pick, _mm512_castps256_ps512(pairs));
                sums[w][r] = _mm512_fmadd_ps(products, scale, sums[w][r]);
            }
        }
    };
    for first in (0..blocks / 4 * 4).step_by(4) {
        quad(first, 4);
    }
    if !blocks.is_multiple_of(4) {
        quad(blocks / 4 * 4, blocks % 4);
    }
    for w in 0..W {
        for r in 0..R {
            let all = _mm512_add_ps(sums[w][r], _mm512_zextps256_ps512(shifts[w][r]));
            out[w * R + r] = _mm512_reduce_add_ps(all);
        }
    }
}

/// Sixteen rows of weights taken apart: lane by lane, four codes of a row beside each other.
#[derive(Debug, Default)]
pub struct Panel {
    group: usize,
    groups: usize,
    /// [columns / 4, 16, 4]
    codes: Vec<u8>,
    /// [groups, 2, 16]: scales, then shifts.
    scales: Vec<f32>,
}

impl Panel {
    /// Takes up to sixteen rows apart; lanes without a row have whatever was there before.
    ///
    /// # Safety
    /// The processor has the level's instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub fn fill(&mut self, format: Format, weights: &[&[u8]], columns: usize) {
        self.group = format.group();
        self.groups = columns / self.group;
        self.codes.resize(columns * LANES, 0);
        self.scales.resize(self.groups * 2 * LANES, 0.0);
        let (mut codes, mut scales, mut shifts) = ([0; MAX_NUMBERS], [0.0; MAX_GROUPS], [0.0; MAX_GROUPS]);
        let (numbers, groups) = (format.numbers(), format.numbers() / self.group);
        for (lane, row) in weights.iter().enumerate() {
            let blocks = row.chunks_exact(format.bytes());
            let panel_codes = self.codes.chunks_exact_mut(numbers * LANES);
            let panel_scales = self.scales.chunks_exact_mut(groups * 2 * LANES);
            for ((block, panel_codes), panel_scales) in blocks.zip(panel_codes).zip(panel_scales) {
                unpack(format, block, &mut codes, &mut scales, &mut shifts);
                let fours = panel_codes.as_chunks_mut::<{ 4 * LANES }>().0.iter_mut();
                for (four, codes) in fours.zip(codes.as_chunks::<4>().0) {
                    four[lane * 4..lane * 4 + 4].copy_from_slice(codes);
                }
                for (group, panel) in panel_scales.as_chunks_mut::<{ 2 * LANES }>().0.iter_mut().enumerate() {
                    panel[lane] = scales[group];
                    panel[LANES + lane] = shifts[group];
                }
            }
        }
    }

    /// The products of all lanes with each row.
    ///
    /// # Safety
    /// The processor has the level's instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub fn multiply(&self, rows: &[Row<'_>], out: &mut [[f32; LANES]]) {
        let (eights, rest) = rows.as_chunks::<8>();
        let (fours, rest) = rest.as_chunks::<4>();
        let (twos, ones) = rest.as_chunks::<2>();
        let mut out = out.iter_mut();
        for rows in eights {
            self.tile(*rows, &mut out);
        }
        for rows in fours {
            self.tile(*rows, &mut out);
        }
        for rows in twos {
            self.tile(*rows, &mut out);
        }
        for row in ones {
            self.tile([*row], &mut out);
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn tile<const R: usize>(&self, rows: [Row<'_>; R], out: &mut std::slice::IterMut<'_, [f32; LANES]>) {
        let sums = if self.group == 16 { self.sums::<R, 4>(rows) } else { self.sums::<R, 8>(rows) };
        for (sum, out) in sums.into_iter().zip(out.by_ref()) {
            // SAFETY: `out` has sixteen numbers.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
        }
    }

    /// FOURS: a group's codes, four at a time.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    #[inline]
    fn sums<const R: usize, const FOURS: usize>(&self, rows: [Row<'_>; R]) -> [__m512; R] {
        let groups = self.groups;
        assert!(self.codes.len() >= groups * FOURS * 64 && self.scales.len() >= groups * 32);
        let per_scale = 8 / FOURS; // groups of weights to one of the rows
        assert!(rows.iter().all(|row| row.high.len().min(row.low.len()) >= groups * FOURS * 4));
        assert!(rows.iter().all(|row| row.scales.len() >= groups.div_ceil(per_scale) * 2));
        assert!(rows.iter().all(|row| row.sums.len() * FOURS >= groups * 4));
        let mut sums = [_mm512_setzero_ps(); R];
        for group in 0..groups {
            // SAFETY: groups are inside of panel and rows (checked above).
            unsafe {
                let codes = self.codes.as_ptr().add(group * FOURS * 64);
                let (mut highs, mut lows) = ([_mm512_setzero_si512(); R], [_mm512_setzero_si512(); R]);
                for four in 0..FOURS {
                    let weights = _mm512_loadu_si512(codes.add(four * 64).cast());
                    let at = (group * FOURS + four) * 4;
                    for r in 0..R {
                        let high = rows[r].high.as_ptr().add(at).cast::<i32>().read_unaligned();
                        let low = rows[r].low.as_ptr().add(at).cast::<i32>().read_unaligned();
                        highs[r] = _mm512_dpbusd_epi32(highs[r], weights, _mm512_set1_epi32(high));
                        lows[r] = _mm512_dpbusd_epi32(lows[r], weights, _mm512_set1_epi32(low));
                    }
                }
                let scales = self.scales.as_ptr().add(group * 32);
                let (scale, shift) = (_mm512_loadu_ps(scales), _mm512_loadu_ps(scales.add(16)));
                for r in 0..R {
                    let x_scale = *rows[r].scales.as_ptr().add(group / per_scale * 2);
                    let x_sum = if FOURS == 4 {
                        *rows[r].sums.as_ptr().add(group)
                    } else {
                        *rows[r].scales.as_ptr().add(group * 2 + 1)
                    };
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
