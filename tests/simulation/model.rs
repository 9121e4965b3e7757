//! The exact hash model: what the simulation runs in place of a neural network.
//!
//! Each KV slot holds a 64-bit hash of (group, token, position, everything the token attends to),
//! and the next token is a function of the hashes that a row attends to. As in a transformer with
//! several layers, the value stored at a position depends on all groups' values at the positions
//! before it, so one wrong, stale, shared, zeroed or shifted slot changes every later token of the
//! request. There is no rounding: equal means equal.
//!
//! This file has the arithmetic only. `device.rs` applies it to a paged pool through block tables,
//! `oracle.rs` to a plain array of one request; they share nothing else. See docs/invariants.md.

/// Spreads every input bit over the word (the finaliser of `splitmix64`).
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Hash of a pair; not symmetric.
pub fn mix2(left: u64, right: u64) -> u64 {
    mix(mix(left) ^ right)
}

/// One attention read: adds the value of the slot at `position` to the sum of a group. Exchanged
/// slots change the sum.
pub fn attend(sum: u64, position: u32, value: u64) -> u64 {
    let key = u64::from(position).wrapping_mul(0xa076_1d64_78bd_642f);
    sum.wrapping_add((value ^ key).wrapping_mul(0xe703_7ed1_a0b4_28db))
}

/// First position that a token at `position` attends to in a group with this window (0: full
/// attention).
pub fn first_visible(position: u32, window: u32) -> u32 {
    if window == 0 {
        0
    } else {
        (position + 1).saturating_sub(window)
    }
}

/// Hidden state of a token: the token, its position and, per group, the sum over the slots before
/// it.
pub fn hidden(token: u32, position: u32, sums: &[u64]) -> u64 {
    let start = mix2(u64::from(token), u64::from(position));
    sums.iter().fold(start, |state, &sum| mix2(state, sum))
}

/// What a token stores in its KV slot of a group.
pub fn kv_value(hidden: u64, group: usize) -> u64 {
    mix2(hidden, group as u64 + 1)
}

/// What shapes the next token besides the KV cache. Maps and lists enter as sums, so their order
/// does not matter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    pub temperature: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub penalties: [f32; 3],
    pub seed: u64,
}

impl Sampling {
    #[allow(clippy::float_cmp)] // These values mean "off" exactly.
    pub fn has_penalties(&self) -> bool {
        self.penalties != [1.0, 0.0, 0.0]
    }
}

/// Contribution of one biased token; the sum over a request's biases goes into `Logits::extras`.
pub fn bias_term(token: u32, bias: f32) -> u64 {
    mix2(u64::from(token) | 1 << 40, u64::from(bias.to_bits()))
}

/// Contribution of one token that penalties look at: how often it was output, and whether the
/// prompt has it.
pub fn penalty_term(token: u32, times_output: u32, in_prompt: bool) -> u64 {
    mix2(u64::from(token) | 1 << 41, u64::from(times_output) << 1 | u64::from(in_prompt))
}

/// The draw of one token.
pub struct Logits<'a> {
    /// Hidden state after the row's own slot was written and read back.
    pub state: u64,
    /// Sum of `bias_term` and `penalty_term`.
    pub extras: u64,
    pub sampling: &'a Sampling,
    /// How many tokens the request has output before this one.
    pub output_index: u32,
    pub vocab_size: u32,
}

impl Logits<'_> {
    /// The drawn token, or `None` when no allowed one turns up.
    pub fn draw(&self, is_banned: impl Fn(u32) -> bool) -> Option<u32> {
        let mut state = mix2(self.state, self.extras);
        if self.sampling.has_penalties() {
            for penalty in self.sampling.penalties {
                state = mix2(state, u64::from(penalty.to_bits()));
            }
        }
        if self.sampling.temperature > 0.0 {
            for parameter in [self.sampling.temperature, self.sampling.top_p, self.sampling.min_p] {
                state = mix2(state, u64::from(parameter.to_bits()));
            }
            state = mix2(state, u64::from(self.sampling.top_k));
            state = mix2(mix2(state, self.sampling.seed), u64::from(self.output_index));
        }
        // Some candidates; where they are all banned, as under a grammar that allows one token, the
        // first that is not.
        (0..256u64)
            .map(|attempt| (mix2(state, attempt) % u64::from(self.vocab_size)) as u32)
            .find(|&token| !is_banned(token))
            .or_else(|| (0..self.vocab_size).find(|&token| !is_banned(token)))
    }

    /// The log-probability that the model reports for a token.
    pub fn logprob(&self, token: u32) -> f32 {
        logprob(self.state, token)
    }
}

/// The log-probability of a token behind a hidden state; made up, but a function of what the draw
/// depends on.
pub fn logprob(state: u64, token: u32) -> f32 {
    -((mix2(state, u64::from(token)) >> 48) as f32) / 4096.0
}

/// Numbers of an embedding.
pub const VECTOR_SIZE: u32 = 4;

/// The embedding of `count` tokens whose hidden states have this sum: its bits, as finite numbers.
pub fn vector(sum: u64, count: u32) -> [f32; VECTOR_SIZE as usize] {
    let bits = |shift: u32| f32::from_bits((sum >> shift) as u32 & 0x3fff_ffff);
    [bits(0), bits(30), bits(60), count as f32]
}
