//! Products in plain Rust, compiled for each level: what a level has no kernel of its own for.

use super::blocks::{dequantise, unpack, Format, MAX_GROUPS, MAX_NUMBERS};
use super::level::by_level;
use super::rows::{dot, Row, Rows, GROUP};

/// A row of weights taken apart.
#[derive(Debug, Default)]
pub struct Unpacked {
    codes: Vec<u8>,
    scales: Vec<f32>,
    shifts: Vec<f32>,
    numbers: Vec<f32>,
}

by_level! {
    /// out[r] = weights . row r, for every row. weights: of whole blocks, `columns` numbers.
    pub fn multiply(format: Format, weights: &[u8], rows: &Rows, columns: usize, unpacked: &mut Unpacked, out: &mut [f32])
        = multiply_body
}

by_level! {
    /// [`dequantise`] for a level.
    pub fn numbers(format: Format, row: &[u8], numbers: &mut [f32]) = numbers_body
}

#[inline(always)]
fn numbers_body<const FUSED: bool>(format: Format, row: &[u8], numbers: &mut [f32]) {
    dequantise(format, row, numbers);
}

#[inline(always)]
fn multiply_body<const FUSED: bool>(
    format: Format,
    weights: &[u8],
    rows: &Rows,
    columns: usize,
    unpacked: &mut Unpacked,
    out: &mut [f32],
) {
    if !format.is_quantised() {
        unpacked.numbers.resize(columns, 0.0);
        dequantise(format, weights, &mut unpacked.numbers);
        for (row, out) in out.iter_mut().enumerate() {
            *out = dot::<FUSED>(&unpacked.numbers, rows.numbers(row));
        }
        return;
    }
    let (numbers, group) = (format.numbers(), format.group());
    unpacked.codes.resize(columns, 0);
    unpacked.scales.resize(columns / group, 0.0);
    unpacked.shifts.resize(columns / group, 0.0);
    let (mut scales, mut shifts) = ([0.0; MAX_GROUPS], [0.0; MAX_GROUPS]);
    let mut codes = [0; MAX_NUMBERS];
    for (at, block) in weights.chunks_exact(format.bytes()).enumerate() {
        unpack(format, block, &mut codes, &mut scales, &mut shifts);
        let (first, groups) = (at * numbers, numbers / group);
        unpacked.codes[first..first + numbers].copy_from_slice(&codes[..numbers]);
        unpacked.scales[at * groups..(at + 1) * groups].copy_from_slice(&scales[..groups]);
        unpacked.shifts[at * groups..(at + 1) * groups].copy_from_slice(&shifts[..groups]);
    }
    for (row, out) in out.iter_mut().enumerate() {
        let row = rows.row(row);
        *out = if group == GROUP { groups_of_32(unpacked, row) } else { groups_of_16(unpacked, row) };
    }
}

#[inline(always)]
fn groups_of_32(weights: &Unpacked, row: Row<'_>) -> f32 {
    let codes = weights.codes.as_chunks::<32>().0.iter().zip(row.codes.as_chunks::<32>().0);
    let scales = weights.scales.iter().zip(&weights.shifts).zip(row.scales.as_chunks::<2>().0);
    codes.zip(scales).map(|((a, b), ((scale, shift), x))| scale * x[0] * products(a, b) as f32 + shift * x[1]).sum()
}

#[inline(always)]
fn groups_of_16(weights: &Unpacked, row: Row<'_>) -> f32 {
    let codes = weights.codes.as_chunks::<16>().0.iter().zip(row.codes.as_chunks::<16>().0);
    let scales = weights.scales.iter().zip(&weights.shifts).zip(row.sums);
    let mut sum = 0.0;
    for (at, ((a, b), ((scale, shift), total))) in codes.zip(scales).enumerate() {
        sum += scale * row.scales[at / 2 * 2] * products(a, b) as f32 + shift * total;
    }
    sum
}

#[inline(always)]
fn products<const N: usize>(a: &[u8; N], b: &[i16; N]) -> i32 {
    let mut sum = 0;
    for at in 0..N {
        sum += i32::from(i16::from(a[at])) * i32::from(b[at]);
    }
    sum
}
