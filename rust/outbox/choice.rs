//! One choice's way from tokens to text.

use std::sync::Arc;

use crate::output::{entries_of, Finish, FinishReason, PromptLogprobs, SampledToken, Token, TokenLogprob};
use crate::protocol::Delta;
use crate::request::{Pooling, SamplingParams};
use crate::text::{Detokenizer, StopMatcher, StopPatterns, Tokenizer};

/// More pending tokens of a choice than this leave as one delta: its client is not keeping up, and
/// wants the text, not the count.
const DELTAS_PER_TAKE: usize = 64;

/// What one choice gained since it was last taken.
#[derive(Debug, Default)]
pub struct ChoiceDelta {
    /// Number of the prompt x n + number among the prompt's choices.
    pub index: u32,
    /// Nothing of the choice was taken before.
    pub first: bool,
    /// Text that became certain.
    pub text: String,
    /// Its tokens.
    pub tokens: Vec<Token>,
    /// Per token the drawn one first, then the top ones; empty unless asked for.
    pub logprobs: Vec<Vec<TokenLogprob>>,
    /// Set once, with the last delta.
    pub finish: Option<Finish>,
    /// Those of its prompt, where they were asked for; with the first delta.
    pub prompt: Option<Arc<PromptLogprobs>>,
    /// The embedding of its prompt, where that was asked for; with the finish.
    pub vector: Option<Vec<f32>>,
}

impl ChoiceDelta {
    /// All of it.
    pub(super) fn whole(&self) -> Delta<'_> {
        self.delta(0, self.tokens.len(), true)
    }

    /// One delta a token, the last with the finish; one for all of them if the client lags.
    pub(super) fn deltas(&self) -> impl Iterator<Item = Delta<'_>> {
        let tokens = self.tokens.len();
        let (count, each) = match tokens {
            // Only an ending, which for a choice that failed is the reply's error.
            0 => (usize::from(!self.failed() || !self.text.is_empty()), 0),
            1..=DELTAS_PER_TAKE => (tokens, 1),
            _ => (1, tokens),
        };
        (0..count).map(move |number| self.delta(number * each, (number + 1) * each, number + 1 == count))
    }

    /// The tokens from `start` to `end` with their text; the last delta has what no token brought,
    /// too.
    fn delta(&self, start: usize, end: usize, is_last: bool) -> Delta<'_> {
        let text_start = if start == 0 { 0 } else { self.tokens[start - 1].text_end as usize };
        let text_end = if is_last { self.text.len() } else { self.tokens[end - 1].text_end as usize };
        Delta {
            index: self.index,
            first: self.first && start == 0,
            text: &self.text[text_start..text_end],
            tokens: &self.tokens[start..end],
            logprobs: self.logprobs.get(start..end).unwrap_or_default(),
            finish: self.finish.as_ref().filter(|_| is_last && !self.failed()),
            prompt: self.prompt.as_deref().filter(|_| start == 0),
            vector: self.vector.as_deref(),
        }
    }

    fn failed(&self) -> bool {
        matches!(self.finish, Some(Finish { reason: FinishReason::Error(_), .. }))
    }
}

/// How far a choice has come. Times are seconds of the caller's clock, 0.0 for what has not
/// happened.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ChoiceProgress {
    /// Tokens put out so far.
    pub num_tokens: u32,
    /// When the first was committed.
    pub first_token: f64,
    /// When the latest was committed.
    pub last_token: f64,
}

/// Gaps of about one length between the tokens of a choice: their mean in seconds, and how many.
pub type TokenGap = (f64, u32);

/// A bin is 9 % wide: 8 of them make a factor of two.
const BINS_PER_OCTAVE: f64 = 8.0;

/// Gaps of one length, or nearly.
#[derive(Debug)]
struct GapBin {
    /// Its gaps' logarithm to base two, in steps of 1 / [`BINS_PER_OCTAVE`]; the lowest number for
    /// those of no time.
    number: i16,
    count: u32,
    sum: f64,
}

/// The gaps between tokens since they were last taken, of which an answer may have as many as
/// tokens: kept apart by length only.
#[derive(Debug, Default)]
struct Gaps {
    /// In the order in which they came to be; a few, as a choice's gaps are much alike.
    bins: Vec<GapBin>,
    /// Tokens of the latest time that are in no bin yet: one step may bring several.
    together: u32,
    /// When the token before those came.
    since: f64,
}

impl Gaps {
    /// A token came at `now`, the one before it at `before`.
    fn push(&mut self, before: f64, now: f64) {
        if self.together == 0 || now > before {
            self.settle(before);
            self.since = before;
        }
        self.together += 1;
    }

    /// The latest tokens came at `time`: each took an equal part of the time since those before.
    fn settle(&mut self, time: f64) {
        let count = std::mem::take(&mut self.together);
        if count == 0 {
            return;
        }
        let sum = time - self.since;
        let number = ((sum / f64::from(count)).log2() * BINS_PER_OCTAVE).floor() as i16;
        match self.bins.iter_mut().find(|bin| bin.number == number) {
            Some(bin) => {
                bin.count += count;
                bin.sum += sum;
            }
            None => self.bins.push(GapBin { number, count, sum }),
        }
    }

    /// All of them, the latest token's too, which came at `time`. The bins' memory stays.
    fn take(&mut self, time: f64) -> impl Iterator<Item = TokenGap> + '_ {
        self.settle(time);
        self.bins.drain(..).map(|bin| (bin.sum / f64::from(bin.count), bin.count))
    }
}

/// The outgoing side of one sequence.
#[derive(Debug)]
pub(super) struct Choice {
    /// None for a choice without text, and once its last text is out.
    text: Option<(Detokenizer, StopMatcher)>,
    stops: StopPatterns,
    /// Stop strings do not count where they end within this many tokens.
    min_tokens: u32,
    /// Whether the text of a stop token stays.
    include_stop: bool,
    pooling: Option<Pooling>,
    pending: ChoiceDelta,
    /// Characters that its tokens have made, those held back included.
    text_chars: u32,
    pub(super) progress: ChoiceProgress,
    gaps: Gaps,
    pub(super) ended: Option<FinishReason>,
}

impl Choice {
    /// A choice without tokens; without a tokenizer it makes no text.
    pub(super) fn new(index: u32, params: &SamplingParams, prompt: &[u32], tokenizer: Option<&Arc<Tokenizer>>) -> Self {
        Self {
            text: tokenizer.map(|tokenizer| {
                let detokenizer = Detokenizer::new(Arc::clone(tokenizer), prompt, params.skip_special_tokens);
                (detokenizer, StopMatcher::new(params.stop.clone(), params.include_stop_str_in_output))
            }),
            stops: params.stop.clone(),
            min_tokens: params.min_tokens,
            include_stop: params.include_stop_str_in_output,
            pooling: params.pooling,
            pending: ChoiceDelta { index, first: true, ..ChoiceDelta::default() },
            text_chars: 0,
            progress: ChoiceProgress::default(),
            gaps: Gaps::default(),
            ended: None,
        }
    }

    /// Keeps the embedding in the form that was asked for.
    pub(super) fn keep_vector(&mut self, vector: &[f32]) {
        self.pending.vector = self.pooling.map(|pooling| embedding(vector, &pooling));
    }

    /// Returns the index of the stop string that the token completes. `scratch` is text between the
    /// detokeniser and the stop matcher.
    pub(super) fn push(&mut self, token: &SampledToken<'_>, now: f64, scratch: &mut String) -> Option<u32> {
        if self.progress.num_tokens == 0 {
            self.progress.first_token = now;
        } else {
            self.gaps.push(self.progress.last_token, now);
        }
        self.progress.num_tokens += 1;
        self.progress.last_token = now;
        if let Some(logprobs) = token.logprobs {
            self.pending.logprobs.push(entries_of(token.id, &logprobs).collect());
        }
        let text_offset = self.text_chars;
        let ends_by_id = matches!(token.finish, Some(FinishReason::Eos | FinishReason::StopToken(_)));
        let mut hit = None;
        if let Some((detokenizer, stops)) = self.text.as_mut().filter(|_| !ends_by_id || self.include_stop) {
            scratch.clear();
            detokenizer.push(token.id, scratch);
            self.text_chars += scratch.chars().count() as u32;
            let may_stop = self.progress.num_tokens > self.min_tokens;
            hit = stops.push(scratch, may_stop, &mut self.pending.text).map(|hit| hit.index as u32);
        }
        if hit.is_some() {
            self.text = None;
        }
        self.pending.tokens.push(Token { id: token.id, text_end: self.pending.text.len() as u32, text_offset });
        hit
    }

    /// Ends it, once.
    pub(super) fn end(&mut self, mut reason: FinishReason, scratch: &mut String) {
        let mut stop_text = match reason {
            FinishReason::StopString(index) => Some(self.stops.text(index as usize).to_owned()),
            _ => None,
        };
        if let Some((mut detokenizer, mut stops)) = self.text.take() {
            // What was held back, because it might have become a stop string or a whole character,
            // is text after all.
            scratch.clear();
            detokenizer.finish(scratch);
            let may_stop = self.progress.num_tokens > self.min_tokens;
            match stops.push(scratch, may_stop, &mut self.pending.text) {
                Some(hit) => {
                    stop_text = Some(self.stops.text(hit.index).to_owned());
                    if reason == FinishReason::Length {
                        reason = FinishReason::StopString(hit.index as u32);
                    }
                }
                None => stops.finish(&mut self.pending.text),
            }
        }
        self.ended = Some(reason);
        self.pending.finish = Some(Finish { reason, stop_text });
    }

    /// The times between its tokens since the last call, those of about one length as one. Tokens
    /// of one step share the time since the step before; the choice's first has none before it.
    pub(super) fn take_gaps(&mut self) -> impl Iterator<Item = TokenGap> + '_ {
        self.gaps.take(self.progress.last_token)
    }

    /// What it gained since the last call.
    pub(super) fn take(&mut self) -> Option<ChoiceDelta> {
        let empty = self.pending.tokens.is_empty() && self.pending.finish.is_none();
        let next = ChoiceDelta { index: self.pending.index, ..ChoiceDelta::default() };
        (!empty).then(|| std::mem::replace(&mut self.pending, next))
    }
}

/// Lengths below this are taken for it, so that a vector of zeros stays one: torch's `normalize`.
const SHORTEST: f64 = 1e-12;

/// The numbers that are wanted of a vector, in the form that is.
fn embedding(vector: &[f32], pooling: &Pooling) -> Vec<f32> {
    let wanted = &vector[..pooling.dimensions.map_or(vector.len(), |wanted| vector.len().min(wanted as usize))];
    if !pooling.normalize {
        return wanted.to_vec();
    }
    let length = wanted.iter().map(|number| f64::from(*number).powi(2)).sum::<f64>().sqrt().max(SHORTEST);
    wanted.iter().map(|number| (f64::from(*number) / length) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::PoolingKind;

    #[test]
    fn an_embedding_is_cut_before_it_is_normalised() {
        let form = |normalize, dimensions| {
            embedding(&[3.0, -4.0, 12.0], &Pooling { kind: PoolingKind::Last, normalize, dimensions })
        };
        assert_eq!(form(false, None), [3.0, -4.0, 12.0]);
        assert_eq!(form(false, Some(1)), [3.0]);
        assert_eq!(form(true, Some(2)), [0.6, -0.8]);
        assert_eq!(form(true, None), [3.0 / 13.0, -4.0 / 13.0, 12.0 / 13.0]);
        let zeros = embedding(&[0.0; 2], &Pooling { kind: PoolingKind::Mean, normalize: true, dimensions: None });
        assert_eq!(zeros, [0.0; 2]);
    }
}
