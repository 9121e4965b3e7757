//! What a CPU does of a step beside the model: the inputs that a plan makes, and the tokens that are drawn.
//! The twins are in `kernels/reference/step.py`, which says what every tensor holds.
//!
//! Knows the words of a plan, and slices. Does not know tensors, models or requests.

pub mod prepare;
pub mod sample;

use crate::plan::words::enter;

/// What request slots remember from step to step.
#[derive(Debug)]
pub struct State<'a> {
    /// [slots, words of `enters`]: the record that entered, with its lengths as they are now
    pub records: &'a mut [i32],
    /// [slots]
    pub last_token: &'a mut [i32],
    /// [slots, vocabulary]: 2 * (times the token was output) + (1 if it is in the prompt); None: nobody asked
    pub penalty_counts: Option<&'a mut [i32]>,
    /// Tokens that can be drawn.
    pub vocab_size: usize,
}

impl State<'_> {
    fn record(&mut self, slot: usize) -> &mut [i32] {
        &mut self.records[slot * enter::WORDS..][..enter::WORDS]
    }

    fn counts(&mut self, slot: usize) -> Option<&mut [i32]> {
        Some(&mut self.penalty_counts.as_mut()?[slot * self.vocab_size..][..self.vocab_size])
    }
}
