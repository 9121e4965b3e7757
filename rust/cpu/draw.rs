//! How one token is drawn from one row of logits: `kernels/reference/draw.py` has the rules, and is what
//! this is tested against. No softmax, no sort: each round of a draw is two passes over the row.

use super::float::exp;
use super::level::{by_level, Level};
use super::rows::{add_lanes, larger};

/// Tokens that the first step of a draw takes together.
const GROUP: usize = 128;
/// What is hashed for a group is its number and this; of round n `n * ROUND_NOISE` more, as for tokens.
const GROUP_NOISE: u32 = 1 << 20;
const ROUND_NOISE: u32 = 1 << 21;
/// Below it the highest logit wins.
const GREEDY_TEMPERATURE: f32 = 1e-5;

/// The parameters of one draw.
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    /// Logits have been divided by it already.
    pub temperature: f32,
    /// 0: off.
    pub top_k: usize,
    /// 1.0: off.
    pub top_p: f32,
    /// 0.0: off.
    pub min_p: f32,
    /// Of the request.
    pub seed: u64,
    /// Tokens before it.
    pub output_index: u32,
}

/// What came of a draw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drawn {
    /// A token.
    Token(u32),
    /// Every logit is -inf.
    Masked,
    /// Some logit is NaN or +inf.
    Sick,
}

/// The highest logit and its place, the first among equals. NaN where one is NaN.
#[derive(Debug, Clone, Copy)]
struct Peak {
    logit: f32,
    token: usize,
}

impl Draw {
    /// Whether the highest logit wins.
    pub fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_TEMPERATURE
    }

    /// A token of processed logits [vocab].
    pub fn draw(&self, level: Level, logits: &[f32]) -> Drawn {
        let peak = find_peak(level, logits);
        if peak.logit.is_nan() || peak.logit == f32::INFINITY {
            return Drawn::Sick;
        }
        if peak.logit == f32::NEG_INFINITY {
            return Drawn::Masked;
        }
        if self.is_greedy() {
            return Drawn::Token(peak.token as u32);
        }
        let threshold = self.threshold(logits, peak.logit);
        let key = self.noise_key();
        let total = if self.top_p < 1.0 { mass(level, logits, peak.logit, threshold) } else { 0.0 };
        // What may still be drawn: logits from here on.
        let mut least = f32::NEG_INFINITY;
        for round in 0.. {
            let token = draw_from(level, logits, least, key, round);
            let logit = logits[token];
            if logit < threshold {
                least = threshold;
                continue;
            }
            if self.top_p < 1.0 {
                least = logit.next_up();
                let ahead = mass(level, logits, peak.logit, least);
                // So written that an empty rest, or a mass that is no number, ends the search.
                if ahead > 0.0 && ahead >= f64::from(self.top_p) * total {
                    continue;
                }
            }
            return Drawn::Token(token as u32);
        }
        unreachable!("rounds have no end")
    }

    /// The least logit that min-p and top-k leave.
    fn threshold(&self, logits: &[f32], peak: f32) -> f32 {
        let mut threshold = f32::MIN;
        if self.min_p > 0.0 {
            threshold = threshold.max((f64::from(peak) + f64::from(self.min_p).ln()) as f32);
        }
        if (1..logits.len()).contains(&self.top_k) {
            let mut sorted = logits.to_vec();
            let (_, last, _) = sorted.select_nth_unstable_by(self.top_k - 1, |a, b| b.total_cmp(a));
            threshold = threshold.max(*last);
        }
        threshold
    }

    /// What selects the noise of this draw: a mix of the seed's two words and the output index.
    fn noise_key(&self) -> [u32; 2] {
        let (low, high, index) = (self.seed as u32, (self.seed >> 32) as u32, self.output_index);
        let second = mix(high.wrapping_add(0xC2B2_AE35) ^ mix(index.wrapping_add(0x27D4_EB2F)));
        [mix(index ^ mix(high ^ mix(low))), mix(low.wrapping_add(0x85EB_CA6B) ^ second)]
    }
}

/// Wellons' `lowbias32`.
fn mix(x: u32) -> u32 {
    let x = (x ^ x >> 16).wrapping_mul(0x21F0_AAAD);
    let x = (x ^ x >> 15).wrapping_mul(0x735A_2D97);
    x ^ x >> 15
}

/// Standard Gumbel noise of a token or group: -log(-log(1 - v)), v from 31 bits of a hash.
fn gumbel(id: u32, key: [u32; 2]) -> f32 {
    let x = id.wrapping_mul(0x9E37_79B1).wrapping_add(key[0]);
    let x = (x ^ x >> 16).wrapping_mul(0x21F0_AAAD) ^ key[1];
    let x = (x ^ x >> 15).wrapping_mul(0x735A_2D97);
    let x = x ^ x >> 15;
    let v = (((x >> 1) as f32 + 0.5) * 2.0f32.powi(-31)).min(1.0 - 2.0f32.powi(-24));
    -(-(-v).ln_1p()).ln()
}

/// One round: the group with the highest log(mass) + noise, in it the token with the highest logit + noise.
/// Logits below `least` do not take part.
fn draw_from(level: Level, logits: &[f32], least: f32, key: [u32; 2], round: u32) -> usize {
    let base = round.wrapping_mul(ROUND_NOISE);
    let mut best = (f32::NEG_INFINITY, 0);
    for (group, logits) in logits.chunks(GROUP).enumerate() {
        let (peak, mass) = group_mass(level, logits, least);
        if mass > 0.0 {
            let noise = gumbel(base.wrapping_add(GROUP_NOISE).wrapping_add(group as u32), key);
            let score = peak + mass.ln() + noise;
            if score > best.0 {
                best = (score, group);
            }
        }
    }
    let first = best.1 * GROUP;
    let mut best = (f32::NEG_INFINITY, first);
    for (token, &logit) in logits.iter().enumerate().skip(first).take(GROUP) {
        let score = logit + gumbel(base.wrapping_add(token as u32), key);
        if logit >= least && score > best.0 {
            best = (score, token);
        }
    }
    best.1
}

by_level! {
    /// The highest logit.
    fn find_peak(logits: &[f32]) -> Peak = peak_body
}

by_level! {
    /// Of up to [`GROUP`] logits, of those from `least` on: the highest, and the sum of e^(logit - highest).
    fn group_mass(logits: &[f32], least: f32) -> (f32, f32) = group_mass_body
}

by_level! {
    /// The sum of e^(logit - peak) of logits from `least` on.
    fn mass(logits: &[f32], peak: f32, least: f32) -> f64 = mass_body
}

#[inline(always)]
fn peak_body<const FUSED: bool>(logits: &[f32]) -> Peak {
    let mut peak = Peak { logit: f32::NEG_INFINITY, token: 0 };
    for (group, logits) in logits.chunks(GROUP).enumerate() {
        let highest = highest(logits, f32::NEG_INFINITY);
        if logits.iter().fold(false, |odd, logit| odd | logit.is_nan()) {
            return Peak { logit: f32::NAN, token: 0 };
        }
        if highest > peak.logit {
            peak = Peak { logit: highest, token: group * GROUP };
        }
    }
    let own = logits.iter().skip(peak.token).take(GROUP).position(|&logit| logit >= peak.logit);
    peak.token += own.unwrap_or(0);
    peak
}

/// The highest of those from `least` on.
#[inline(always)]
fn highest(logits: &[f32], least: f32) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (whole, rest) = logits.as_chunks::<16>();
    for logits in whole {
        for lane in 0..16 {
            let logit = if logits[lane] >= least { logits[lane] } else { f32::NEG_INFINITY };
            lanes[lane] = larger(lanes[lane], logit);
        }
    }
    for (lane, &logit) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, if logit >= least { logit } else { f32::NEG_INFINITY });
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, larger)
}

/// The sum of e^(logit - peak) of those from `least` on.
#[inline(always)]
fn exponentials(logits: &[f32], peak: f32, least: f32) -> f32 {
    let mut lanes = [0.0; 16];
    let (whole, rest) = logits.as_chunks::<16>();
    for logits in whole {
        for lane in 0..16 {
            let value = exp(logits[lane] - peak);
            lanes[lane] += if logits[lane] >= least { value } else { 0.0 };
        }
    }
    for (lane, &logit) in lanes.iter_mut().zip(rest) {
        *lane += if logit >= least { exp(logit - peak) } else { 0.0 };
    }
    add_lanes(lanes)
}

#[inline(always)]
fn group_mass_body<const FUSED: bool>(logits: &[f32], least: f32) -> (f32, f32) {
    let peak = highest(logits, least);
    if peak == f32::NEG_INFINITY {
        return (peak, 0.0);
    }
    (peak, exponentials(logits, peak, least))
}

#[inline(always)]
fn mass_body<const FUSED: bool>(logits: &[f32], peak: f32, least: f32) -> f64 {
    logits.chunks(1 << 12).map(|logits| f64::from(exponentials(logits, peak, least))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREEDY: Draw = Draw { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 7, output_index: 0 };

    #[test]
    fn the_first_of_the_highest_wins_wherever_it_stands() {
        for level in Level::all() {
            for len in [1, 15, 16, 17, 127, 128, 129, 300] {
                for token in 0..len {
                    let mut logits = vec![-1.0; len];
                    logits[token..].fill(2.0);
                    assert_eq!(GREEDY.draw(level, &logits), Drawn::Token(token as u32), "{len}, {level:?}");
                }
            }
        }
    }

    #[test]
    fn sick_and_masked_rows_are_told() {
        for level in Level::all() {
            for place in [0, 20, 130, 199] {
                let mut logits = vec![f32::NEG_INFINITY; 200];
                assert_eq!(GREEDY.draw(level, &logits), Drawn::Masked);
                for sick in [f32::NAN, f32::INFINITY] {
                    logits[place] = sick;
                    assert_eq!(GREEDY.draw(level, &logits), Drawn::Sick);
                }
                logits[place] = f32::MIN;
                for draw in [GREEDY, Draw { temperature: 1.0, ..GREEDY }] {
                    assert_eq!(draw.draw(level, &logits), Drawn::Token(place as u32));
                }
            }
        }
    }

    #[test]
    fn levels_draw_the_same() {
        let logits: Vec<f32> = (0..1_000u32).map(|id| gumbel(id, [1, 2])).collect();
        for index in 0..200 {
            let draw = Draw { temperature: 1.0, top_k: 40, top_p: 0.9, output_index: index, ..GREEDY };
            let drawn = Level::all().into_iter().map(|level| draw.draw(level, &logits));
            let drawn: Vec<_> = drawn.collect();
            assert!(drawn.iter().all(|one| *one == drawn[0]), "{index}: {drawn:?}");
        }
    }
}
