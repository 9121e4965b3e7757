//! What bounds an answer token by token, beside its grammar or without one: the only tokens that may
//! be drawn, words that may not be written, an end to the reasoning.
//!
//! All of it is in the masks, so it holds wherever a grammar would: with drafts, several choices
//! and preemption.

use std::sync::Arc;

use super::{Grammar, GrammarFault, GrammarState};
use crate::error::Error;
use crate::text::answer::ReasoningTags;
use crate::text::{Specials, Tokenizer};

/// Bounds of an answer, beside its grammar.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Bounds {
    /// The only tokens that may be drawn; `None`: all.
    pub allowed: Option<Vec<u32>>,
    /// Tokens that may not be written one after another; none is empty.
    pub bad_words: Vec<Vec<u32>>,
    /// Where the reasoning ends.
    pub thinking: Option<Arc<ThinkingBudget>>,
}

impl Bounds {
    /// Whether nothing is bounded.
    pub fn is_empty(&self) -> bool {
        self.allowed.is_none() && self.bad_words.is_empty() && self.thinking.is_none()
    }

    /// A grammar with these bounds. What it says of the answer counts behind the reasoning, where
    /// that has a budget.
    pub fn around(self, grammar: Option<Arc<dyn Grammar>>, vocab_size: u32) -> Arc<dyn Grammar> {
        let allowed = self.allowed.map(|tokens| {
            let mut mask = vec![0; (vocab_size as usize).div_ceil(32)];
            for token in tokens {
                mask[token as usize / 32] |= 1 << (token % 32);
            }
            mask
        });
        let shared = Shared { vocab_size, allowed, bad_words: self.bad_words, thinking: self.thinking };
        Arc::new(Restraint { shared: Arc::new(shared), grammar })
    }
}

/// A grammar and bounds.
#[derive(Debug)]
struct Restraint {
    shared: Arc<Shared>,
    grammar: Option<Arc<dyn Grammar>>,
}

/// Bounds in the form of masks.
#[derive(Debug)]
struct Shared {
    vocab_size: u32,
    allowed: Option<Vec<u32>>,
    bad_words: Vec<Vec<u32>>,
    thinking: Option<Arc<ThinkingBudget>>,
}

/// After so many tokens of reasoning its end is written, exactly.
#[derive(Debug)]
pub struct ThinkingBudget {
    tokenizer: Arc<Tokenizer>,
    tags: ReasoningTags,
    /// The closing tag.
    close: Vec<u32>,
    /// Tokens between the tags.
    most: u32,
    /// The prompt ends within the reasoning.
    begins_inside: bool,
}

impl ThinkingBudget {
    /// A budget for a model that writes its reasoning between `tags`.
    ///
    /// # Errors
    /// That of the tokenizer, where it cannot write the closing tag.
    pub fn new(tokenizer: Arc<Tokenizer>, tags: ReasoningTags, most: u32, begins_inside: bool) -> Result<Self, Error> {
        let close = match tokenizer.token_to_id(tags.close) {
            Some(id) => vec![id],
            None => tokenizer.encode_text(tags.close, false, Specials::Plain)?,
        };
        Ok(Self { tokenizer, tags, close, most, begins_inside })
    }
}

/// Equal to itself alone.
impl PartialEq for ThinkingBudget {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

/// Where an answer is in its reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Before it: the text ends with so many bytes of the opening tag.
    Before(u8),
    /// In it, after so many tokens; the text ends with so many bytes of the closing tag.
    Inside(u32, u8),
    /// So many tokens of the closing tag were written because they had to be.
    Closing(u32),
    /// Behind it, or there is none.
    Done,
}

impl ThinkingBudget {
    fn start(&self) -> Phase {
        if self.begins_inside {
            Phase::Inside(0, 0)
        } else {
            Phase::Before(0)
        }
    }

    /// The token that must come now.
    fn forced(&self, phase: Phase) -> Option<u32> {
        let written = match phase {
            Phase::Inside(spent, _) if spent >= self.most => 0,
            Phase::Closing(written) => written,
            _ => return None,
        };
        self.close.get(written as usize).copied()
    }

    fn after(&self, phase: Phase, token: u32) -> Phase {
        if self.forced(phase).is_some() {
            let written = if let Phase::Closing(written) = phase { written + 1 } else { 1 };
            return if written as usize == self.close.len() { Phase::Done } else { Phase::Closing(written) };
        }
        let mut now = phase;
        for byte in self.tokenizer.token_bytes(token) {
            now = match now {
                Phase::Before(0) if byte.is_ascii_whitespace() => now,
                Phase::Before(matched) => match tag_goes_on(self.tags.open, matched, *byte) {
                    Some(true) => Phase::Inside(0, 0),
                    Some(false) => Phase::Before(matched + 1),
                    None => Phase::Done,
                },
                Phase::Inside(spent, matched) => match tag_goes_on(self.tags.close, matched, *byte) {
                    Some(true) => Phase::Done,
                    Some(false) => Phase::Inside(spent, matched + 1),
                    // No tag begins anew within itself.
                    None => Phase::Inside(spent, u8::from(self.tags.close.as_bytes()[0] == *byte)),
                },
                Phase::Closing(_) | Phase::Done => break,
            };
        }
        match (phase, now) {
            (Phase::Inside(spent, _), Phase::Inside(_, matched)) => Phase::Inside(spent + 1, matched),
            _ => now,
        }
    }
}

/// Whether a tag of which `matched` bytes are there goes on with `byte`, and is whole then.
fn tag_goes_on(tag: &str, matched: u8, byte: u8) -> Option<bool> {
    let place = usize::from(matched);
    (tag.as_bytes()[place] == byte).then_some(place + 1 == tag.len())
}

impl Grammar for Restraint {
    fn start(&self) -> Box<dyn GrammarState> {
        Box::new(Place {
            shared: Arc::clone(&self.shared),
            phase: self.shared.thinking.as_ref().map_or(Phase::Done, |thinking| thinking.start()),
            inner: self.grammar.as_ref().map(|grammar| grammar.start()),
            tokens: Vec::new(),
            phases: Vec::new(),
        })
    }

    fn has_end(&self) -> bool {
        self.grammar.as_ref().is_some_and(|grammar| grammar.has_end())
    }
}

/// Where a sequence is.
#[derive(Debug)]
struct Place {
    shared: Arc<Shared>,
    inner: Option<Box<dyn GrammarState>>,
    phase: Phase,
    tokens: Vec<u32>,
    /// Before each of the tokens.
    phases: Vec<Phase>,
}

impl GrammarState for Place {
    fn push(&mut self, token: u32) -> Result<(), GrammarFault> {
        if let Some(inner) = self.inner.as_mut().filter(|_| self.phase == Phase::Done) {
            inner.push(token)?;
        }
        self.tokens.push(token);
        self.phases.push(self.phase);
        if let Some(thinking) = &self.shared.thinking {
            self.phase = thinking.after(self.phase, token);
        }
        Ok(())
    }

    fn pop(&mut self, count: usize) -> Result<(), GrammarFault> {
        let left = self.tokens.len().saturating_sub(count);
        let of_inner = self.phases[left..].iter().filter(|phase| **phase == Phase::Done).count();
        if let Some(inner) = &mut self.inner {
            inner.pop(of_inner)?;
        }
        self.phase = self.phases.get(left).copied().unwrap_or(self.phase);
        self.tokens.truncate(left);
        self.phases.truncate(left);
        Ok(())
    }

    fn mask(&mut self, row: &mut [u32]) -> Result<(), GrammarFault> {
        if let Some(token) = self.shared.thinking.as_ref().and_then(|thinking| thinking.forced(self.phase)) {
            row.fill(0);
            row[token as usize / 32] = 1 << (token % 32);
            return Ok(());
        }
        match self.inner.as_mut().filter(|_| self.phase == Phase::Done) {
            Some(inner) => inner.mask(row)?,
            None => fill_all(row, self.shared.vocab_size),
        }
        if let Some(allowed) = &self.shared.allowed {
            for (word, allowed) in row.iter_mut().zip(allowed.iter().chain(std::iter::repeat(&0))) {
                *word &= allowed;
            }
        }
        for word in &self.shared.bad_words {
            if let Some((last, _)) = word.split_last().filter(|(_, before)| self.tokens.ends_with(before)) {
                row[*last as usize / 32] &= !(1 << (last % 32));
            }
        }
        Ok(())
    }

    fn may_end(&mut self) -> bool {
        let is_done = self.phase == Phase::Done;
        self.inner.as_mut().is_some_and(|inner| is_done && inner.may_end())
    }
}

/// Allows every token that there is.
fn fill_all(row: &mut [u32], vocab_size: u32) {
    let whole = vocab_size as usize / 32;
    row[..whole].fill(u32::MAX);
    row[whole..].fill(0);
    if !vocab_size.is_multiple_of(32) {
        row[whole] = (1 << (vocab_size % 32)) - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VOCAB: u32 = 256;

    fn allowed(state: &mut dyn GrammarState) -> Vec<u32> {
        let mut row = vec![7; VOCAB as usize / 32 + 1];
        state.mask(&mut row).expect("no fault");
        (0..32 * row.len() as u32).filter(|token| row[*token as usize / 32] >> (token % 32) & 1 == 1).collect()
    }

    fn budget(most: u32, begins_inside: bool) -> Bounds {
        let tokenizer = Arc::new(Tokenizer::bytes_only(VOCAB as usize));
        let tags = ReasoningTags::from_name("think").expect("known");
        let thinking = ThinkingBudget::new(tokenizer, tags, most, begins_inside).expect("bytes");
        Bounds { thinking: Some(Arc::new(thinking)), ..Bounds::default() }
    }

    /// What is written where `wanted` is followed as far as the masks let it.
    fn written(bounds: Bounds, wanted: &str) -> String {
        let mut state = bounds.around(None, VOCAB).start();
        let mut text = String::new();
        for wish in wanted.bytes() {
            loop {
                let may = allowed(&mut *state);
                let token = if may.contains(&wish.into()) { wish.into() } else { may[0] };
                state.push(token).expect("it is allowed");
                text.push(char::from(token as u8));
                if token == u32::from(wish) && may.len() > 1 {
                    break;
                }
            }
        }
        text
    }

    #[test]
    fn reasoning_is_closed_at_its_budget() {
        assert_eq!(written(budget(3, true), "abcdef"), "abc</think>def");
        assert_eq!(written(budget(0, true), "ab"), "</think>ab");
        assert_eq!(written(budget(3, false), "\n<think>abcdef"), "\n<think>abc</think>def");
        assert_eq!(written(budget(3, false), "abcdef<think>ghijk"), "abcdef<think>ghijk");
        assert_eq!(written(budget(20, true), "ab</think><think>cdefghijklmnopq"), "ab</think><think>cdefghijklmnopq");
        // A tag that was begun is not one; that of the budget is whole.
        assert_eq!(written(budget(4, true), "a</tx"), "a</t</think>x");
        assert_eq!(written(budget(9, true), "<</think>abcdefgh"), "<</think>abcdefgh");
    }

    #[test]
    fn what_bounds_nothing_allows_all_that_there_is() {
        let mut state = Bounds::default().around(None, 70).start();
        let mut row = [9; 4];
        state.mask(&mut row).expect("no fault");
        assert_eq!(row, [u32::MAX, u32::MAX, 0b11_1111, 0]);
    }

    proptest! {
        /// Against what the words say, looked at anew behind each token; drafts are taken back.
        #[test]
        fn bad_words_and_allowed_tokens(
            words in prop::collection::vec(prop::collection::vec(0_u32..4, 1..4), 0..4),
            only in prop::option::of(prop::collection::vec(0_u32..6, 1..6)),
            steps in prop::collection::vec((0_u32..4, 0_usize..3), 0..40),
        ) {
            let bounds = Bounds { allowed: only.clone(), bad_words: words.clone(), thinking: None };
            let mut state = bounds.around(None, VOCAB).start();
            let mut output: Vec<u32> = Vec::new();
            for (token, back) in steps {
                let expected: Vec<u32> = (0..VOCAB)
                    .filter(|token| only.as_ref().is_none_or(|only| only.contains(token)))
                    .filter(|token| {
                        let with: Vec<u32> = output.iter().copied().chain([*token]).collect();
                        !words.iter().any(|word| with.ends_with(word))
                    })
                    .collect();
                prop_assert_eq!(allowed(&mut *state), expected);
                state.push(token).expect("nothing is checked");
                output.push(token);
                let back = back.min(output.len());
                state.pop(back).expect("they are there");
                output.truncate(output.len() - back);
            }
        }

        #[test]
        fn reasoning_that_is_taken_back(text in "[<>/thinka ]{0,30}", most in 0_u32..12, backs in prop::collection::vec(0_usize..4, 30)) {
            let mut state = budget(most, true).around(None, VOCAB).start();
            let mut output = Vec::new();
            for (wish, back) in text.bytes().zip(backs) {
                let may = allowed(&mut *state);
                let token = if may.contains(&wish.into()) { wish.into() } else { may[0] };
                state.push(token).expect("it is allowed");
                output.push(token);
                let back = back.min(output.len());
                state.pop(back).expect("they are there");
                output.truncate(output.len() - back);
                let mut anew = budget(most, true).around(None, VOCAB).start();
                for token in &output {
                    anew.push(*token).expect("it was allowed");
                }
                prop_assert_eq!(allowed(&mut *state), allowed(&mut *anew));
            }
        }
    }
}
