//! The block formats of GGUF files, as ggml's `ggml-quants` defines them.
//!
//! Every format that quantises is seen as one thing: a row falls into groups of 16 or 32 numbers,
//! and each is `scale * code + shift` with a code from 0 to 255. So products need one kernel for all
//! formats, beside those that are worth one of their own.

use super::float::{from_brain, from_half};

/// How the numbers of a matrix lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, non_camel_case_types)] // ggml's names
pub enum Format {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    IQ4_NL,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

use Format::{BF16, F16, F32, IQ4_NL, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};

/// Most groups of one block: 256 numbers in groups of 16.
pub const MAX_GROUPS: usize = 16;
/// Most numbers of one block.
pub const MAX_NUMBERS: usize = 256;

const ALL: [(Format, &str); 14] = [
    (F32, "F32"),
    (F16, "F16"),
    (BF16, "BF16"),
    (Q4_0, "Q4_0"),
    (Q4_1, "Q4_1"),
    (Q5_0, "Q5_0"),
    (Q5_1, "Q5_1"),
    (Q8_0, "Q8_0"),
    (IQ4_NL, "IQ4_NL"),
    (Q2_K, "Q2_K"),
    (Q3_K, "Q3_K"),
    (Q4_K, "Q4_K"),
    (Q5_K, "Q5_K"),
    (Q6_K, "Q6_K"),
];

impl Format {
    /// The format of ggml's name.
    pub fn named(name: &str) -> Option<Self> {
        ALL.iter().find(|entry| entry.1 == name).map(|entry| entry.0)
    }

    /// ggml's name.
    pub fn name(self) -> &'static str {
        ALL.iter().find(|entry| entry.0 == self).expect("every format is in the table").1
    }

    /// Numbers of one block.
    pub fn numbers(self) -> usize {
        match self {
            F32 | F16 | BF16 => 1,
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | IQ4_NL => 32,
            Q2_K | Q3_K | Q4_K | Q5_K | Q6_K => 256,
        }
    }

    /// Bytes of one block.
    pub fn bytes(self) -> usize {
        match self {
            F32 => 4,
            F16 | BF16 => 2,
            Q4_0 | IQ4_NL => 18,
            Q4_1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            Q2_K => 84,
            Q3_K => 110,
            Q4_K => 144,
            Q5_K => 176,
            Q6_K => 210,
        }
    }

    /// Whether its numbers are codes with a scale.
    pub fn is_quantised(self) -> bool {
        self.numbers() > 1
    }

    /// Numbers that share a scale.
    pub fn group(self) -> usize {
        match self {
            F32 | F16 | BF16 => 1,
            Q2_K | Q3_K | Q6_K => 16,
            _ => 32,
        }
    }

    /// Whether the scales of these blocks are finite, or the numbers where there are no scales.
    pub fn is_finite(self, blocks: &[u8]) -> bool {
        let (exponent, places): (u16, &[usize]) = match self {
            F32 => (0x7F80, &[2]),
            BF16 => (0x7F80, &[0]),
            F16 | Q4_0 | Q5_0 | Q8_0 | IQ4_NL => (0x7C00, &[0]),
            Q4_1 | Q5_1 | Q4_K | Q5_K => (0x7C00, &[0, 2]),
            Q2_K => (0x7C00, &[80, 82]),
            Q3_K => (0x7C00, &[108]),
            Q6_K => (0x7C00, &[208]),
        };
        blocks
            .chunks_exact(self.bytes())
            .all(|block| places.iter().all(|&at| u16::from_le_bytes([block[at], block[at + 1]]) & exponent != exponent))
    }

    /// Bytes of a row of `columns` numbers, which are whole blocks.
    pub fn row_bytes(self, columns: usize) -> usize {
        columns / self.numbers() * self.bytes()
    }
}

/// The values of `IQ4_NL`'s codes, each with 128 added.
pub(super) const CODEBOOK: [u8; 16] = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241];

/// One block taken apart. codes: of [`Format::numbers`]; scales and shifts: one a group.
///
/// # Panics
/// The format is not quantised, or a slice is too short.
#[inline(always)]
pub fn unpack(format: Format, block: &[u8], codes: &mut [u8], scales: &mut [f32], shifts: &mut [f32]) {
    let half = |at: usize| from_half(u16::from_le_bytes([block[at], block[at + 1]]));
    match format {
        Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | IQ4_NL => {
            let scale = half(0);
            scales[0] = scale;
            shifts[0] = match format {
                Q4_1 | Q5_1 => half(2),
                Q4_0 => scale * -8.0,
                Q5_0 => scale * -16.0,
                _ => scale * -128.0,
            };
            let codes = &mut codes[..32];
            match format {
                Q4_0 => nibbles(&block[2..18], codes),
                Q4_1 => nibbles(&block[4..20], codes),
                Q5_0 => five_bits(&block[2..22], codes),
                Q5_1 => five_bits(&block[4..24], codes),
                Q8_0 => codes.iter_mut().zip(&block[2..34]).for_each(|(code, byte)| *code = byte ^ 0x80),
                _ => {
                    nibbles(&block[2..18], codes);
                    for code in codes {
                        *code = CODEBOOK[usize::from(*code)];
                    }
                }
            }
        }
        Q2_K => {
            let (scale, least) = (half(80), half(82));
            for group in 0..16 {
                scales[group] = scale * f32::from(block[group] & 15);
                shifts[group] = -least * f32::from(block[group] >> 4);
            }
            two_bits(&block[16..80], codes);
        }
        Q3_K => {
            let (high, low, packed, scale) = (&block[..32], &block[32..96], &block[96..108], half(108));
            for group in 0..16 {
                let fine = if group < 8 { packed[group] & 15 } else { packed[group - 8] >> 4 };
                let top = packed[8 + group % 4] >> (2 * (group / 4)) & 3;
                scales[group] = scale * (f32::from(fine | top << 4) - 32.0);
                shifts[group] = scales[group] * -4.0;
            }
            two_bits(low, codes);
            for part in 0..8 {
                for at in 0..32 {
                    codes[part * 32 + at] |= (high[at] >> part & 1) << 2;
                }
            }
        }
        Q4_K | Q5_K => {
            let (scale, least) = (half(0), half(2));
            let packed = &block[4..16];
            for group in 0..8 {
                let (fine, fine_least) = if group < 4 {
                    (packed[group] & 63, packed[group + 4] & 63)
                } else {
                    (
                        packed[group + 4] & 15 | packed[group - 4] >> 6 << 4,
                        packed[group + 4] >> 4 | packed[group] >> 6 << 4,
                    )
                };
                scales[group] = scale * f32::from(fine);
                shifts[group] = -least * f32::from(fine_least);
            }
            let low = &block[block.len() - 128..];
            for pair in 0..4 {
                for at in 0..32 {
                    let byte = low[pair * 32 + at];
                    codes[pair * 64 + at] = byte & 15;
                    codes[pair * 64 + 32 + at] = byte >> 4;
                }
            }
            if format == Q5_K {
                let high = &block[16..48];
                for part in 0..8 {
                    for at in 0..32 {
                        codes[part * 32 + at] |= (high[at] >> part & 1) << 4;
                    }
                }
            }
        }
        Q6_K => {
            let (low, high, fine, scale) = (&block[..128], &block[128..192], &block[192..208], half(208));
            for group in 0..16 {
                scales[group] = scale * f32::from(fine[group] as i8);
                shifts[group] = scales[group] * -32.0;
            }
            for part in 0..2 {
                let (low, high, codes) = (&low[part * 64..], &high[part * 32..], &mut codes[part * 128..]);
                for at in 0..32 {
                    codes[at] = low[at] & 15 | (high[at] & 3) << 4;
                    codes[at + 32] = low[at + 32] & 15 | (high[at] >> 2 & 3) << 4;
                    codes[at + 64] = low[at] >> 4 | (high[at] >> 4 & 3) << 4;
                    codes[at + 96] = low[at + 32] >> 4 | high[at] >> 6 << 4;
                }
            }
        }
        F32 | F16 | BF16 => unreachable!("plain numbers have no codes"),
    }
}

/// 16 bytes hold numbers 0 to 15 in their low halves and 16 to 31 in their high ones.
#[inline(always)]
fn nibbles(bytes: &[u8], codes: &mut [u8]) {
    for at in 0..16 {
        codes[at] = bytes[at] & 15;
        codes[at + 16] = bytes[at] >> 4;
    }
}

/// Four bytes with the fifth bits, then nibbles.
#[inline(always)]
fn five_bits(bytes: &[u8], codes: &mut [u8]) {
    let high = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    nibbles(&bytes[4..20], codes);
    for (at, code) in codes[..32].iter_mut().enumerate() {
        *code |= ((high >> at & 1) as u8) << 4;
    }
}

/// 64 bytes: each 32 of them hold four runs of 32 numbers, two bits each.
#[inline(always)]
fn two_bits(bytes: &[u8], codes: &mut [u8]) {
    for half in 0..2 {
        for run in 0..4 {
            for at in 0..32 {
                codes[half * 128 + run * 32 + at] = bytes[half * 32 + at] >> (2 * run) & 3;
            }
        }
    }
}

/// A row as numbers; `numbers` has as many as the row.
///
/// # Panics
/// `row` is shorter than that.
#[inline(always)]
pub fn dequantise(format: Format, row: &[u8], numbers: &mut [f32]) {
    match format {
        F32 => {
            for (number, bytes) in numbers.iter_mut().zip(row.chunks_exact(4)) {
                *number = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
        }
        F16 => {
            for (number, bytes) in numbers.iter_mut().zip(row.chunks_exact(2)) {
                *number = from_half(u16::from_le_bytes([bytes[0], bytes[1]]));
            }
        }
        BF16 => {
            for (number, bytes) in numbers.iter_mut().zip(row.chunks_exact(2)) {
                *number = from_brain(u16::from_le_bytes([bytes[0], bytes[1]]));
            }
        }
        _ => {
            let (mut codes, mut scales, mut shifts) = ([0; MAX_NUMBERS], [0.0; MAX_GROUPS], [0.0; MAX_GROUPS]);
            let group = format.group();
            for (numbers, block) in numbers.chunks_exact_mut(format.numbers()).zip(row.chunks_exact(format.bytes())) {
                unpack(format, block, &mut codes, &mut scales, &mut shifts);
                for (at, numbers) in numbers.chunks_exact_mut(group).enumerate() {
                    for (number, code) in numbers.iter_mut().zip(&codes[at * group..]) {
                        *number = scales[at] * f32::from(*code) + shifts[at];
                    }
                }
            }
        }
    }
}
