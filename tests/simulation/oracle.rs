//! What a request must output, computed from its prompt and parameters alone: no batch, no blocks,
//! no cache, no preemption.
//!
//! All of E1-E8 reduce to one comparison: whatever happened to a request in the world, its stream
//! equals this one.

use crate::model::{
    attend, bias_term, first_visible, hidden, kv_value, logprob, penalty_term, vector, Logits, Sampling, VECTOR_SIZE,
};
use crate::toy_grammar::{Next, Toy};
use _core::grammar::Bounds;
use _core::request::PoolingKind;

/// One choice of a request, as the model and the stop rules see it.
pub struct Request<'a> {
    pub prompt: &'a [u32],
    pub sampling: Sampling,
    pub bias: &'a [(u32, f32)],
    pub max_tokens: u32,
    pub min_tokens: u32,
    /// Tokens that end the request and are themselves output: end-of-sequence ids (unless ignored)
    /// and stop ids.
    pub stop_tokens: &'a [u32],
    /// What bounds its output, and the model's end tokens: that may be drawn, or not at all.
    pub grammar: Option<(Toy, &'a [u32])>,
    /// What else bounds it.
    pub bounds: &'a Bounds,
    pub ignores_end_tokens: bool,
}

/// Why a stream ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Stop,
    Length,
    /// The grammar allows nothing more, and no end token is to be drawn.
    Complete,
    /// The grammar fails.
    Fault,
}

/// The expected stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Expected {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<f32>,
    pub end: End,
}

/// Runs the model on one sequence; `windows` has one entry a KV group.
pub fn expect(request: &Request, windows: &[u32], vocab_size: u32) -> Expected {
    let mut tokens = request.prompt.to_vec();
    let mut slots: Vec<Vec<u64>> = vec![Vec::new(); windows.len()];
    let mut expected = Expected { tokens: Vec::new(), logprobs: Vec::new(), end: End::Length };
    let bias_sum = request.bias.iter().fold(0u64, |sum, &(token, bias)| sum.wrapping_add(bias_term(token, bias)));
    while (expected.tokens.len() as u32) < request.max_tokens {
        for position in slots[0].len() as u32..tokens.len() as u32 {
            let sums = sums_before(&slots, windows, position, position);
            let state = hidden(tokens[position as usize], position, &sums);
            for (group, values) in slots.iter_mut().enumerate() {
                values.push(kv_value(state, group));
            }
        }
        let position = tokens.len() as u32 - 1;
        let output_index = expected.tokens.len() as u32;
        let mut extras = bias_sum;
        if request.sampling.has_penalties() {
            extras = extras.wrapping_add(penalty_sum(request.prompt, &expected.tokens));
        }
        let logits = Logits {
            state: hidden(0, position, &sums_before(&slots, windows, position, position + 1)),
            extras,
            sampling: &request.sampling,
            output_index,
            vocab_size,
        };
        let may_stop = output_index >= request.min_tokens;
        let next = match request.grammar {
            Some((toy, ends)) => Some((toy.behind(&expected.tokens, ends), ends)),
            None if request.bounds.is_empty() => None,
            // To what is no grammar end tokens are like others.
            None => Some((Next::Allowed { tokens: (0..vocab_size).collect(), may_end: false }, &[][..])),
        };
        let allowed = match next {
            None => None,
            Some((Next::Fault, _)) => {
                expected.end = End::Fault;
                break;
            }
            Some((Next::Allowed { mut tokens, may_end }, ends)) => {
                if may_end && may_stop && !request.ignores_end_tokens {
                    tokens.extend(ends);
                }
                tokens.retain(|token| !is_left_out(request.bounds, &expected.tokens, *token));
                if tokens.is_empty() {
                    expected.end = if may_end { End::Complete } else { End::Fault };
                    break;
                }
                Some(tokens)
            }
        };
        let banned = |token: u32| {
            !may_stop && request.stop_tokens.contains(&token)
                || allowed.as_ref().is_some_and(|allowed| !allowed.contains(&token))
        };
        let token = logits.draw(banned).expect("a vocabulary has more tokens than a request has stop tokens");
        expected.logprobs.push(logits.logprob(token));
        expected.tokens.push(token);
        tokens.push(token);
        if request.stop_tokens.contains(&token) {
            expected.end = End::Stop;
            break;
        }
    }
    expected
}

/// Whether a token cannot be written behind an output.
fn is_left_out(bounds: &Bounds, output: &[u32], token: u32) -> bool {
    let written: Vec<u32> = output.iter().copied().chain([token]).collect();
    bounds.allowed.as_ref().is_some_and(|allowed| !allowed.contains(&token))
        || bounds.bad_words.iter().any(|word| written.ends_with(word))
}

/// Log probabilities of all tokens of a prompt but the first.
pub fn expect_prompt(prompt: &[u32], windows: &[u32]) -> Vec<f32> {
    let mut slots: Vec<Vec<u64>> = vec![Vec::new(); windows.len()];
    (0..)
        .zip(prompt.windows(2))
        .map(|(position, pair)| {
            let state = hidden(pair[0], position, &sums_before(&slots, windows, position, position));
            for (group, values) in slots.iter_mut().enumerate() {
                values.push(kv_value(state, group));
            }
            logprob(hidden(0, position, &sums_before(&slots, windows, position, position + 1)), pair[1])
        })
        .collect()
}

/// The embedding of a prompt.
pub fn expect_vector(prompt: &[u32], windows: &[u32], kind: PoolingKind) -> [f32; VECTOR_SIZE as usize] {
    let mut slots: Vec<Vec<u64>> = vec![Vec::new(); windows.len()];
    let states: Vec<u64> = (0..)
        .zip(prompt)
        .map(|(position, token)| {
            let state = hidden(*token, position, &sums_before(&slots, windows, position, position));
            for (group, values) in slots.iter_mut().enumerate() {
                values.push(kv_value(state, group));
            }
            hidden(0, position, &sums_before(&slots, windows, position, position + 1))
        })
        .collect();
    match kind {
        PoolingKind::Last => vector(*states.last().expect("a prompt has a token"), 1),
        PoolingKind::Mean => vector(states.iter().fold(0, |sum, state| sum.wrapping_add(*state)), states.len() as u32),
    }
}

/// Per group, the attention sum of a token at `position` over its visible slots below `end`.
fn sums_before(slots: &[Vec<u64>], windows: &[u32], position: u32, end: u32) -> Vec<u64> {
    slots
        .iter()
        .zip(windows)
        .map(|(values, &window)| {
            (first_visible(position, window)..end).fold(0, |sum, at| attend(sum, at, values[at as usize]))
        })
        .collect()
}

fn penalty_sum(prompt: &[u32], output: &[u32]) -> u64 {
    let mut seen: Vec<u32> = prompt.iter().chain(output).copied().collect();
    seen.sort_unstable();
    seen.dedup();
    seen.iter().fold(0, |sum, &token| {
        let times = output.iter().filter(|&&other| other == token).count() as u32;
        sum.wrapping_add(penalty_term(token, times, prompt.contains(&token)))
    })
}
