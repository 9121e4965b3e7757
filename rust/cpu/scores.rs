//! The arithmetic of attention: keys by queries, their softmax, and values by weights; of sixteen queries
//! beside each other, or of one.

use super::factors::Factors;
use super::float::exp;
use super::level::{by_level, multiply_add, Level};
use super::rows::{dot, larger};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512, level::Tier};

/// Keys that are taken from their pages at a time: with their values and sixteen queries they fit into L1.
pub(super) const KEYS: usize = 32;
/// Queries that are multiplied with them at a time, each a lane: so maxima and sums need no turning.
pub(super) const LANES: usize = 16;

/// What sixteen queries have seen: their largest scores, and the sums of exponentials in units of these.
#[derive(Debug, Clone, Copy)]
pub(super) struct State {
    pub(super) peaks: [f32; LANES],
    pub(super) sums: [f32; LANES],
    /// By which what was summed before comes into the units of `peaks`.
    pub(super) shrinks: [f32; LANES],
}

impl Default for State {
    fn default() -> Self {
        Self { peaks: [f32::NEG_INFINITY; LANES], sums: [0.0; LANES], shrinks: [0.0; LANES] }
    }
}

/// scores [32 keys, 16 queries] = keys [32, padded dim] . queries [padded dim, 16].
pub(super) fn scores(level: Level, keys: &[f32], queries: &[[f32; LANES]], scores: &mut [[f32; LANES]; KEYS]) {
    let factors = Factors { numbers: keys, row: queries.len(), column: 1 };
    scores.fill([0.0; LANES]);
    add_products(level, factors, queries, &[1.0; LANES], scores);
}

/// answers [padded dim, 16 queries] = answers * shrinks + values [32 keys, padded dim] turned . weights [32, 16].
pub(super) fn add_values(
    level: Level,
    values: &[f32],
    weights: &[[f32; LANES]; KEYS],
    shrinks: &[f32; LANES],
    answers: &mut [[f32; LANES]],
) {
    let factors = Factors { numbers: values, row: 1, column: answers.len() };
    add_products(level, factors, weights, shrinks, answers);
}

/// sums = sums * shrinks + factors . lanes, as many rows at a time as the level has registers for.
fn add_products(
    level: Level,
    factors: Factors<'_>,
    lanes: &[[f32; LANES]],
    shrinks: &[f32; LANES],
    sums: &mut [[f32; LANES]],
) {
    #[cfg(target_arch = "x86_64")]
    if level.tier() == Tier::Avx512 {
        // SAFETY: a `Level` can only be had where the processor has its instructions.
        return unsafe { avx512::add_products(factors, lanes, shrinks, sums) };
    }
    add_products_by_four(level, factors, lanes, shrinks, sums);
}

by_level! {
    fn add_products_by_four(
        factors: Factors<'_>,
        lanes: &[[f32; LANES]],
        shrinks: &[f32; LANES],
        sums: &mut [[f32; LANES]],
    ) = add_products_body
}

by_level! {
    pub(super) fn weigh(
        scores: &mut [[f32; LANES]; KEYS],
        seen: [&[i32; LANES]; 2],
        state: &mut State,
    ) = weigh_body
}

#[inline(always)]
fn add_products_body<const FUSED: bool>(
    factors: Factors<'_>,
    lanes: &[[f32; LANES]],
    shrinks: &[f32; LANES],
    sums: &mut [[f32; LANES]],
) {
    const ROWS: usize = 4; // with AVX2 their sums fill half of the registers
    factors.check(lanes.len(), sums.len(), ROWS);
    for (part, sums) in sums.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
        let mut kept = *sums;
        for kept in &mut kept {
            for lane in 0..LANES {
                kept[lane] *= shrinks[lane];
            }
        }
        for (at, lanes) in lanes.iter().enumerate() {
            for (number, kept) in kept.iter_mut().enumerate() {
                // SAFETY: `check` says that it is inside.
                let factor = unsafe { *factors.numbers.get_unchecked(factors.place(part * ROWS + number, at)) };
                for lane in 0..LANES {
                    kept[lane] = multiply_add::<FUSED>(factor, lanes[lane], kept[lane]);
                }
            }
        }
        *sums = kept;
    }
}

/// Scores become weights, in units of the largest one yet.
/// from, to: of each query the first key that it sees, and the first after those.
#[inline(always)]
fn weigh_body<const FUSED: bool>(scores: &mut [[f32; LANES]; KEYS], [from, to]: [&[i32; LANES]; 2], state: &mut State) {
    let all_seen = *from == [0; LANES] && *to == [KEYS as i32; LANES];
    let mut peaks = state.peaks;
    for (key, scores) in scores.iter_mut().enumerate() {
        if !all_seen {
            for lane in 0..LANES {
                let is_seen = (from[lane]..to[lane]).contains(&(key as i32));
                scores[lane] = if is_seen { scores[lane] } else { f32::NEG_INFINITY };
            }
        }
        for lane in 0..LANES {
            // A score that is no number may get lost here: its exponential does not.
            peaks[lane] = larger(scores[lane], peaks[lane]);
        }
    }
    // Where nothing has been seen yet all weights are 0, unless a score is no number.
    let units = peaks.map(|peak| if peak == f32::NEG_INFINITY { 0.0 } else { peak });
    let mut shrinks = [0.0f32; LANES];
    let mut sums = [0.0f32; LANES];
    for lane in 0..LANES {
        shrinks[lane] = exp(state.peaks[lane] - units[lane]);
        sums[lane] = state.sums[lane] * shrinks[lane];
    }
    for scores in scores {
        for lane in 0..LANES {
            scores[lane] = exp(scores[lane] - units[lane]);
        }
        for lane in 0..LANES {
            sums[lane] += scores[lane];
        }
    }
    *state = State { peaks, sums, shrinks };
}

by_level! {
    /// Scores become weights, whose sum is one.
    pub(super) fn softmax(scores: &mut [f32]) = softmax_body
}

#[inline(always)]
fn softmax_body<const FUSED: bool>(scores: &mut [f32]) {
    let mut peaks = [f32::NEG_INFINITY; LANES];
    let (sixteens, rest) = scores.as_chunks::<LANES>();
    for scores in sixteens {
        for lane in 0..LANES {
            // A score that is no number may get lost here: its exponential does not.
            peaks[lane] = larger(scores[lane], peaks[lane]);
        }
    }
    let peak = rest.iter().chain(&peaks).fold(f32::NEG_INFINITY, |peak, &score| larger(score, peak));
    let mut sums = [0.0f32; LANES];
    let (sixteens, rest) = scores.as_chunks_mut::<LANES>();
    for scores in sixteens {
        for score in scores.iter_mut() {
            *score = exp(*score - peak);
        }
        for lane in 0..LANES {
            sums[lane] += scores[lane];
        }
    }
    for (score, sum) in rest.iter_mut().zip(&mut sums) {
        *score = exp(*score - peak);
        *sum += *score;
    }
    let inverse = 1.0 / sums.iter().sum::<f32>();
    for score in scores {
        *score *= inverse;
    }
}

/// scores [n] = keys [n, padded dim] . query [padded dim] * scale
pub(super) fn dots(level: Level, keys: &[f32], query: &[[f32; LANES]], scale: f32, scores: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    match level.tier() {
        // SAFETY: a `Level` can only be had where the processor has its instructions.
        Tier::Avx512 => return unsafe { avx512::dots(keys, query, scale, scores) },
        // SAFETY: as above.
        Tier::Avx2 => return unsafe { avx2::dots(keys, query, scale, scores) },
        Tier::Portable => {}
    }
    let _ = level;
    for (score, key) in scores.iter_mut().zip(keys.chunks_exact(query.len() * LANES)) {
        *score = dot::<false>(key, query.as_flattened()) * scale;
    }
}

/// answers [padded dim] += weights [n] . values [n, padded dim]
pub(super) fn add_weighted(level: Level, values: &[f32], weights: &[f32], answers: &mut [[f32; LANES]]) {
    #[cfg(target_arch = "x86_64")]
    match level.tier() {
        // SAFETY: a `Level` can only be had where the processor has its instructions.
        Tier::Avx512 => return unsafe { avx512::add_weighted(values, weights, answers) },
        // SAFETY: as above.
        Tier::Avx2 => return unsafe { avx2::add_weighted(values, weights, answers) },
        Tier::Portable => {}
    }
    let _ = level;
    for (weight, values) in weights.iter().zip(values.chunks_exact(answers.len() * LANES)) {
        for (answer, value) in answers.as_flattened_mut().iter_mut().zip(values) {
            *answer += weight * value;
        }
    }
}
