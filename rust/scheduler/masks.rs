//! Grammar masks: which tokens the rows of a planned step may draw.
//!
//! They are made after the step before was committed, whose tokens they depend on, while the device
//! computes the step's forward pass. It takes up to milliseconds, so the work is handed out
//! ([`Scheduler::take_masks`]), done by the caller without the core's lock ([`MaskWork::fill`]), and
//! handed in again ([`Scheduler::return_masks`]). What happens to a request in between, such as an
//! abort, happens: its states come back to nobody.

use std::sync::Arc;

use super::{Scheduler, State};
use crate::error::Error;
use crate::grammar::{Grammar, GrammarFault, GrammarState};
use crate::output::{FinishReason, OutputSink, SequenceError};
use crate::request::SeqRef;

/// A row of a step in flight whose draw a grammar bounds.
#[derive(Debug)]
pub(super) struct MaskedRow {
    /// Place among the step's rows.
    pub row: usize,
    /// First of its masks: one for each token that may be drawn.
    pub mask_row: u32,
    pub drafts: Vec<u32>,
}

/// Where a sequence is in its grammar.
#[derive(Debug)]
pub(super) struct Following {
    grammar: Arc<dyn Grammar>,
    /// None before the first mask, and while it is handed out.
    state: Option<Box<dyn GrammarState>>,
    /// Output tokens that the state has taken.
    taken: usize,
}

impl Following {
    pub fn new(grammar: Arc<dyn Grammar>) -> Self {
        Self { grammar, state: None, taken: 0 }
    }
}

/// The masks of one step, still to be made.
#[derive(Debug)]
pub struct MaskWork {
    rows: Vec<RowWork>,
    eos_token_ids: Vec<u32>,
}

#[derive(Debug)]
struct RowWork {
    sequence: u32,
    name: SeqRef,
    mask_row: usize,
    grammar: Arc<dyn Grammar>,
    state: Option<Box<dyn GrammarState>>,
    /// Output tokens that the state has not taken yet.
    tokens: Vec<u32>,
    /// Drafts, which count as output one after another.
    drafts: Vec<u32>,
    /// Whether end tokens may be drawn at all now.
    may_stop: bool,
    /// Whether one of them would be the end.
    ends: bool,
    outcome: Outcome,
}

/// What became of a row.
#[derive(Debug)]
enum Outcome {
    Masked,
    /// The grammar allows nothing but the end, which is not to be drawn.
    Complete,
    Fault(GrammarFault),
}

impl Scheduler {
    /// Hands out what the masks of a step need. All steps before it must be committed.
    ///
    /// # Errors
    /// [`Error::StepOrder`] where `step_id` is not the oldest step in flight.
    pub fn take_masks(&mut self, step_id: u64) -> Result<MaskWork, Error> {
        let Some(step) = self.in_flight.front().filter(|step| step.id == step_id) else {
            return Err(Error::StepOrder { step_id, reason: "it is not the oldest step in flight" });
        };
        let mut rows = Vec::with_capacity(step.masked.len());
        for masked in &step.masked {
            let Some(number) = step.rows.get(masked.row).map(|row| row.sequence) else { continue };
            let sequence = &mut self.sequences[number];
            let traits = sequence.traits;
            let (false, Some(following)) = (sequence.state == State::Finished, &mut sequence.following) else {
                continue;
            };
            let may_stop = if traits.ignore_eos {
                !following.grammar.has_end()
            } else {
                sequence.outputs.len() as u32 >= traits.min_tokens
            };
            let tokens = sequence.outputs[following.taken..].to_vec();
            following.taken = sequence.outputs.len();
            rows.push(RowWork {
                sequence: number,
                name: sequence.name,
                mask_row: masked.mask_row as usize,
                grammar: Arc::clone(&following.grammar),
                state: following.state.take(),
                tokens,
                drafts: masked.drafts.clone(),
                may_stop,
                ends: !traits.ignore_eos,
                outcome: Outcome::Masked,
            });
        }
        Ok(MaskWork { rows, eos_token_ids: self.config.eos_token_ids.clone() })
    }

    /// Takes the states back, and ends the sequences whose grammars are complete, or failed. Tells
    /// what failed.
    pub fn return_masks(&mut self, work: MaskWork, sink: &mut impl OutputSink) -> Vec<GrammarFault> {
        let mut faults = Vec::new();
        for row in work.rows {
            let Some(sequence) = self.sequences.get_mut(row.sequence) else { continue };
            if sequence.name != row.name || sequence.state == State::Finished {
                continue;
            }
            match row.outcome {
                Outcome::Masked => {
                    if let Some(following) = &mut sequence.following {
                        if row.state.is_none() {
                            following.taken = 0; // a new state begins at the beginning
                        }
                        following.state = row.state;
                    }
                }
                Outcome::Complete => {
                    self.lengths_stopped(row.sequence);
                    self.release_choices(row.sequence);
                    self.finish(row.sequence, FinishReason::Complete, sink);
                }
                Outcome::Fault(fault) => {
                    faults.push(fault);
                    self.release_choices(row.sequence);
                    self.finish(row.sequence, FinishReason::Error(SequenceError::Grammar), sink);
                }
            }
        }
        self.drop_left_running();
        faults
    }
}

impl MaskWork {
    /// Rows that the masks must have.
    pub fn num_rows(&self) -> usize {
        self.rows.iter().map(|row| row.mask_row + 1 + row.drafts.len()).max().unwrap_or(0)
    }

    /// Writes the masks: row r of `masks` begins at word r x `width`. Rows that nobody draws by are
    /// left as they are.
    pub fn fill(&mut self, masks: &mut [u32], width: usize) {
        for row in &mut self.rows {
            let places = &mut masks[row.mask_row * width..][..(1 + row.drafts.len()) * width];
            places.fill(0);
            row.outcome = row.fill(places, width, &self.eos_token_ids).unwrap_or_else(Outcome::Fault);
        }
    }
}

impl RowWork {
    fn fill(&mut self, places: &mut [u32], width: usize, ends: &[u32]) -> Result<Outcome, GrammarFault> {
        let grammar = &self.grammar;
        let state = self.state.get_or_insert_with(|| grammar.start());
        for token in std::mem::take(&mut self.tokens) {
            state.push(token)?;
        }
        let bans: &[u32] = if self.may_stop { &[] } else { ends };
        let (first, behind) = places.split_at_mut(width);
        state.mask(first)?;
        ban(first, bans);
        if first.iter().all(|word| *word == 0) {
            return if state.may_end() {
                Ok(Outcome::Complete)
            } else {
                Err(GrammarFault("no token of the vocabulary can go on from here".to_owned()))
            };
        }
        let ends = if self.ends { ends } else { &[] };
        if fill_behind(&mut **state, &self.drafts, first, behind, bans, ends).is_err() {
            // The grammar cannot be followed behind a draft, but nobody knows whether that will hold.
            self.state = None;
        }
        Ok(Outcome::Masked)
    }
}

/// Writes the masks behind each draft, as far as they can be drawn by.
fn fill_behind(
    state: &mut dyn GrammarState,
    drafts: &[u32],
    first: &[u32],
    behind: &mut [u32],
    bans: &[u32],
    ends: &[u32],
) -> Result<(), GrammarFault> {
    let mut before = first;
    let mut pushed = 0;
    for (draft, mask) in drafts.iter().zip(behind.chunks_exact_mut(first.len())) {
        let is_allowed = before[*draft as usize / 32] >> (draft % 32) & 1 == 1;
        if !is_allowed {
            break; // it will not hold
        }
        if ends.contains(draft) {
            mask.fill(u32::MAX); // what is drawn behind an end is nobody's
            break;
        }
        state.push(*draft)?;
        pushed += 1;
        state.mask(mask)?;
        ban(mask, bans);
        before = mask;
    }
    state.pop(pushed)
}

fn ban(mask: &mut [u32], tokens: &[u32]) {
    for token in tokens {
        mask[*token as usize / 32] &= !(1 << (token % 32));
    }
}
