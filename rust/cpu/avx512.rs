//! Products by quantised weights with AVX-512 and VNNI.
//!
//! For up to three rows a kernel reads the file's blocks and takes them apart in registers, four
//! blocks at once (`few`). For more rows sixteen rows of weights are taken apart into a panel, which
//! then multiplies all rows, eight at a time (`Panel`): each instruction does 64 multiplications.

#[allow(clippy::wildcard_imports)] // some fifty instructions
use std::arch::x86_64::*;

use super::attention::Factors;
use super::blocks::{unpack, Format, CODEBOOK, MAX_GROUPS};
use super::rows::{Row, Tile, TILE};

/// Rows of weights in a panel.
pub const LANES: usize = 16;
/// Most rows for which blocks are taken apart in registers.
pub const FEW: usize = 3;

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

/// Whether so many rows are multiplied by panels, and not row by row: where taking a panel apart costs
/// less than taking sixteen rows apart by themselves.
pub fn has_panels(format: Format, rows: usize) -> bool {
    match format {
        Format::F32 | Format::F16 | Format::BF16 => false,
        Format::Q5_0 | Format::Q5_1 | Format::IQ4_NL => true,
        Format::Q4_0 | Format::Q4_1 | Format::Q8_0 => rows > FEW,
        Format::Q2_K | Format::Q3_K | Format::Q4_K | Format::Q5_K | Format::Q6_K => rows > 2,
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
    /// [16, numbers of a block]: codes of one block of each row, where they cannot be taken apart side by side.
    rows: Vec<u8>,
}

/// Where each lane's row has what is read.
#[derive(Clone, Copy)]
struct Places<'a> {
    rows: &'a [*const u8; LANES],
    offset: usize,
}

impl Places<'_> {
    fn behind(self, bytes: usize) -> Self {
        Self { rows: self.rows, offset: self.offset + bytes }
    }

    /// # Safety
    /// The lane's row has a byte there.
    #[inline(always)]
    unsafe fn of(self, lane: usize) -> *const u8 {
        // SAFETY: the caller's.
        unsafe { self.rows[lane].add(self.offset) }
    }
}

// What follows are parts of `Panel::fill`. All of it is safe to call for who holds a level but for reading.

/// 16 bytes of each lane, turned: the n-th result has the n-th four bytes of each lane.
///
/// # Safety
/// Each lane's row has 16 bytes there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn turned(at: Places<'_>) -> [__m512i; 4] {
    // Lane 4 * a + b is quarter a of number b.
    let mut mixed = [_mm512_setzero_si512(); 4];
    for (b, mixed) in mixed.iter_mut().enumerate() {
        // SAFETY: the caller's.
        unsafe {
            let all = _mm512_castsi128_si512(_mm_loadu_si128(at.of(b).cast()));
            let all = _mm512_inserti32x4::<1>(all, _mm_loadu_si128(at.of(4 + b).cast()));
            let all = _mm512_inserti32x4::<2>(all, _mm_loadu_si128(at.of(8 + b).cast()));
            *mixed = _mm512_inserti32x4::<3>(all, _mm_loadu_si128(at.of(12 + b).cast()));
        }
    }
    let (a, b) = (_mm512_unpacklo_epi32(mixed[0], mixed[1]), _mm512_unpacklo_epi32(mixed[2], mixed[3]));
    let (c, d) = (_mm512_unpackhi_epi32(mixed[0], mixed[1]), _mm512_unpackhi_epi32(mixed[2], mixed[3]));
    [_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b), _mm512_unpacklo_epi64(c, d), _mm512_unpackhi_epi64(c, d)]
}

/// Four bytes of each lane.
///
/// # Safety
/// Each lane's row has four bytes there.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
unsafe fn words(at: Places<'_>) -> __m512i {
    let mut quarters = [_mm_setzero_si128(); 4];
    for (number, quarter) in quarters.iter_mut().enumerate() {
        // SAFETY: the caller's.
        *quarter = unsafe {
            let word = |lane: usize| i32::from_le_bytes(at.of(number * 4 + lane).cast::<[u8; 4]>().read());
            _mm_set_epi32(word(3), word(2), word(1), word(0))
        };
    }
    let low = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(quarters[0]), quarters[1]);
    let high = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(quarters[2]), quarters[3]);
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
}

/// The low halves of four times sixteen bytes, then the high ones.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn nibbles(bytes: [__m512i; 4]) -> [__m512i; 8] {
    let mask = _mm512_set1_epi8(15);
    let mut codes = [mask; 8];
    for (four, bytes) in bytes.into_iter().enumerate() {
        codes[four] = _mm512_and_si512(bytes, mask);
        codes[4 + four] = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask);
    }
    codes
}

/// Codes of five bits: those of four, and 32 fifth bits a lane.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn with_fifth(mut codes: [__m512i; 8], fifth: __m512i) -> [__m512i; 8] {
    for (four, codes) in codes.iter_mut().enumerate() {
        let bits = _mm512_srlv_epi32(fifth, _mm512_set1_epi32(four as i32 * 4));
        let bits = _mm512_and_si512(bits, _mm512_set1_epi32(15));
        // Copies of the four bits, seven places apart: bit n of them is then the least of byte n.
        let spread = _mm512_mullo_epi32(bits, _mm512_set1_epi32(0x0020_4081));
        let spread = _mm512_and_si512(spread, _mm512_set1_epi8(1));
        *codes = _mm512_or_si512(*codes, _mm512_slli_epi32::<4>(spread));
    }
    codes
}

/// The values of `IQ4_NL`'s codes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn named(mut codes: [__m512i; 8]) -> [__m512i; 8] {
    let [low, high] = [0, 8].map(|at| i64::from_le_bytes(CODEBOOK[at..at + 8].try_into().expect("eight bytes")));
    let book = _mm512_broadcast_i32x4(_mm_set_epi64x(high, low));
    for codes in &mut codes {
        *codes = _mm512_shuffle_epi8(book, *codes);
    }
    codes
}

/// Signed bytes with 128 added.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn signed(front: [__m512i; 4], back: [__m512i; 4]) -> [__m512i; 8] {
    let bias = _mm512_set1_epi8(-128);
    let mut codes = [bias; 8];
    for four in 0..4 {
        codes[four] = _mm512_xor_si512(front[four], bias);
        codes[4 + four] = _mm512_xor_si512(back[four], bias);
    }
    codes
}

/// float16 in the low half of each lane.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
#[inline]
fn half_numbers(words: __m512i) -> __m512 {
    _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words))
}

/// Blocks of 32 numbers in one group, which are taken apart sixteen rows at a time.
trait Sixteen {
    const BYTES: usize;

    /// Four codes of each lane, eight times; scales and shifts.
    ///
    /// # Safety
    /// Each lane's row has a block there, and the processor has the level's instructions.
    unsafe fn take(at: Places<'_>) -> ([__m512i; 8], __m512, __m512);
}

struct Q5_0;
struct Q5_1;
#[allow(non_camel_case_types)] // ggml's name
struct IQ4_NL;

/// $zero: the shift as a multiple of the scale; without it the block has one.
macro_rules! sixteen {
    ($format:ident, $bytes:literal, $zero:expr, $at:ident => $codes:expr) => {
        impl Sixteen for $format {
            const BYTES: usize = $bytes;

            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
            #[inline]
            unsafe fn take($at: Places<'_>) -> ([__m512i; 8], __m512, __m512) {
                // SAFETY: the caller's: all that is read is inside of a block.
                let (first, codes) = unsafe { (words($at), $codes) };
                let scale = half_numbers(first);
                let zero: Option<f32> = $zero;
                let shift = match zero {
                    Some(zero) => _mm512_mul_ps(scale, _mm512_set1_ps(zero)),
                    None => half_numbers(_mm512_srli_epi32::<16>(first)),
                };
                (codes, scale, shift)
            }
        }
    };
}

sixteen!(Q4_0, 18, Some(-8.0), at => nibbles(turned(at.behind(2))));
sixteen!(Q4_1, 20, None, at => nibbles(turned(at.behind(4))));
sixteen!(Q5_0, 22, Some(-16.0), at => with_fifth(nibbles(turned(at.behind(6))), words(at.behind(2))));
sixteen!(Q5_1, 24, None, at => with_fifth(nibbles(turned(at.behind(8))), words(at.behind(4))));
sixteen!(IQ4_NL, 18, Some(-128.0), at => named(nibbles(turned(at.behind(2)))));
sixteen!(Q8_0, 34, Some(-128.0), at => signed(turned(at.behind(2)), turned(at.behind(18))));

impl Panel {
    /// Takes sixteen rows apart.
    ///
    /// # Panics
    /// A row has less than `columns` numbers.
    ///
    /// # Safety
    /// The processor has the level's instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub fn fill(&mut self, format: Format, weights: &[&[u8]; LANES], columns: usize) {
        assert!(weights.iter().all(|row| row.len() >= format.row_bytes(columns)));
        self.group = format.group();
        self.groups = columns / self.group;
        self.codes.resize(columns * LANES, 0);
        self.scales.resize(self.groups * 2 * LANES, 0.0);
        match format {
            Format::Q4_0 => self.fill_sixteen::<Q4_0>(weights),
            Format::Q4_1 => self.fill_sixteen::<Q4_1>(weights),
            Format::Q5_0 => self.fill_sixteen::<Q5_0>(weights),
            Format::Q5_1 => self.fill_sixteen::<Q5_1>(weights),
            Format::IQ4_NL => self.fill_sixteen::<IQ4_NL>(weights),
            Format::Q8_0 => self.fill_sixteen::<Q8_0>(weights),
            _ => self.fill_by_rows(format, weights, columns),
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn fill_sixteen<S: Sixteen>(&mut self, weights: &[&[u8]; LANES]) {
        let rows = weights.map(<[u8]>::as_ptr);
        let next = rows[0].wrapping_add(self.groups * S::BYTES * LANES);
        for group in 0..self.groups {
            for line in 0..(LANES * S::BYTES).div_ceil(64) {
                // What the next sixteen rows have here, where they lie behind these; no harm is done elsewhere.
                let ahead = next.wrapping_add(group * S::BYTES * LANES + line * 64);
                _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
            }
            // SAFETY: rows have so many blocks (`fill` checks), and the panel has room for them.
            unsafe {
                let (codes, scale, shift) = S::take(Places { rows: &rows, offset: group * S::BYTES });
                let to = self.codes.as_mut_ptr().add(group * 32 * LANES);
                for (four, codes) in codes.into_iter().enumerate() {
                    _mm512_storeu_si512(to.add(four * 64).cast(), codes);
                }
                let to = self.scales.as_mut_ptr().add(group * 2 * LANES);
                _mm512_storeu_ps(to, scale);
                _mm512_storeu_ps(to.add(LANES), shift);
            }
        }
    }

    /// Block by block: each row's is taken apart by itself, then all are turned.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn fill_by_rows(&mut self, format: Format, weights: &[&[u8]; LANES], columns: usize) {
        let (mut scales, mut shifts) = ([0.0; MAX_GROUPS], [0.0; MAX_GROUPS]);
        let (numbers, bytes, groups) = (format.numbers(), format.bytes(), format.numbers() / self.group);
        self.rows.resize(LANES * numbers, 0);
        let rows = std::array::from_fn(|lane| self.rows[lane * numbers..].as_ptr());
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
                    let turned = turned(Places { rows: &rows, offset: part * 16 });
                    for (four, codes) in turned.into_iter().enumerate() {
                        _mm512_storeu_si512(panel.as_mut_ptr().add(four * 64).cast(), codes);
                    }
                }
            }
        }
    }

    /// The products of all lanes with each of the first `rows` rows of a tile.
    ///
    /// # Panics
    /// rows: none, or more than a tile has; or the tile's rows are shorter than the panel's.
    ///
    /// # Safety
    /// The processor has the level's instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    pub fn multiply(&self, tile: Tile<'_>, rows: usize, out: &mut [[f32; LANES]; TILE]) {
        match rows {
            1 => self.rows::<1>(tile, out),
            2 => self.rows::<2>(tile, out),
            3 => self.rows::<3>(tile, out),
            4 => self.rows::<4>(tile, out),
            5 => self.rows::<5>(tile, out),
            6 => self.rows::<6>(tile, out),
            7 => self.rows::<7>(tile, out),
            8 => self.rows::<8>(tile, out),
            _ => unreachable!("a tile has one to eight rows"),
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn rows<const R: usize>(&self, tile: Tile<'_>, out: &mut [[f32; LANES]; TILE]) {
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
        assert!(tile.codes.len() >= groups * FOURS * TILE);
        assert!(tile.scales.len() >= groups.div_ceil(per_scale) * TILE);
        assert!(tile.sums.len() * FOURS >= groups * 4 * TILE);
        let mut sums = [_mm512_setzero_ps(); R];
        for group in 0..groups {
            // SAFETY: groups are inside of panel and tile (checked above), and R is at most `TILE`.
            unsafe {
                let codes = self.codes.as_ptr().add(group * FOURS * 64);
                let rows = tile.codes.as_ptr().add(group * FOURS * TILE);
                let (mut highs, mut lows) = ([_mm512_setzero_si512(); R], [_mm512_setzero_si512(); R]);
                for four in 0..FOURS {
                    let weights = _mm512_loadu_si512(codes.add(four * 64).cast());
                    for r in 0..R {
                        let [high, low] = *rows.add(four * TILE + r);
                        highs[r] = _mm512_dpbusd_epi32(highs[r], weights, _mm512_set1_epi32(high));
                        lows[r] = _mm512_dpbusd_epi32(lows[r], weights, _mm512_set1_epi32(low));
                    }
                }
                let scales = self.scales.as_ptr().add(group * 32);
                let (scale, shift) = (_mm512_loadu_ps(scales), _mm512_loadu_ps(scales.add(16)));
                for r in 0..R {
                    let [x_scale, whole_sum] = *tile.scales.as_ptr().add(group / per_scale * TILE + r);
                    let x_sum = if FOURS == 4 { *tile.sums.as_ptr().add(group * TILE + r) } else { whole_sum };
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
