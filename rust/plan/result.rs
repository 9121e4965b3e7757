//! The result of a step: one record a row, in row order, then one a prompt target, then the vectors.
//! `docs/plan.md` has their words.

use super::word;
use super::words::result::{NUM_VALID, STATUS, TOKENS};
use super::words::target_result::{LOGPROB, RANK, TOP};

/// Where the parts of one result record lie, in words: status, number valid, tokens, then log
/// probabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResultLayout {
    /// Tokens a row may bring: the plan's `decode_query_len`.
    pub query_len: usize,
    /// Top log probabilities a token; None where the record has none at all.
    pub top: Option<usize>,
}

impl ResultLayout {
    /// Words of one record.
    pub fn width(&self) -> usize {
        let logprobs = self.top.map_or(0, |top| 2 * self.query_len + 2 * self.query_len * top);
        TOKENS + self.query_len + logprobs
    }

    /// Bytes of a result of `rows` rows.
    pub fn bytes(&self, rows: usize) -> usize {
        rows * self.width() * 4
    }

    /// The record of one row. Panics where `result` is shorter than [`Self::bytes`] of more than
    /// `row` rows.
    pub fn row<'a>(&self, result: &'a [u8], row: usize) -> RowResult<'a> {
        let bytes = self.bytes(1);
        RowResult { layout: *self, record: &result[row * bytes..(row + 1) * bytes] }
    }
}

/// The result of one row.
#[derive(Debug, Clone, Copy)]
pub struct RowResult<'a> {
    layout: ResultLayout,
    record: &'a [u8],
}

impl<'a> RowResult<'a> {
    /// A `STATUS_*` value.
    pub fn status(&self) -> u32 {
        word(self.record, STATUS)
    }

    /// Tokens drawn: 1 + accepted drafts for a decode row.
    pub fn num_valid(&self) -> u32 {
        word(self.record, NUM_VALID)
    }

    /// The token at `index` below [`Self::num_valid`].
    pub fn token(&self, index: usize) -> u32 {
        word(self.record, TOKENS + index)
    }

    /// Log probabilities of the token at `index`, where the step has any.
    pub fn logprobs(&self, index: usize) -> Option<TokenLogprobs<'a>> {
        let length = self.layout.query_len;
        self.layout.top.map(|top| {
            let ids = TOKENS + 3 * length + index * top;
            TokenLogprobs {
                record: self.record,
                logprob: TOKENS + length + index,
                rank: TOKENS + 2 * length + index,
                ids,
                values: ids + length * top,
                top,
            }
        })
    }
}

/// Where the results of a step's prompt targets lie: records behind those of the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TargetLayout {
    /// Bytes before the first.
    pub start: usize,
    /// Top log probabilities of each.
    pub top: usize,
}

impl TargetLayout {
    fn record_bytes(self) -> usize {
        (TOP + 2 * self.top) * 4
    }

    /// Bytes of a result with so many targets, the rows' records included.
    pub fn end(self, targets: usize) -> usize {
        self.start + targets * self.record_bytes()
    }

    /// Log probabilities of one target. Panics where `result` is shorter than [`Self::end`] of more
    /// than `index` targets.
    pub fn logprobs(self, result: &[u8], index: usize) -> TokenLogprobs<'_> {
        let record = &result[self.end(index)..self.end(index + 1)];
        TokenLogprobs { record, logprob: LOGPROB, rank: RANK, ids: TOP, values: TOP + self.top, top: self.top }
    }
}

/// Where the vectors of a step lie: behind the results of its prompt targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VectorLayout {
    /// Bytes before the first.
    pub start: usize,
    /// Numbers of each.
    pub size: usize,
}

impl VectorLayout {
    /// Bytes of a result with so many vectors, all that comes before them included.
    pub fn end(self, vectors: usize) -> usize {
        self.start + vectors * self.size * 4
    }

    /// The numbers of one vector. Panics where `result` is shorter than [`Self::end`] of more than
    /// `index` vectors.
    pub fn vector(self, result: &[u8], index: usize) -> impl ExactSizeIterator<Item = f32> + '_ {
        let record = &result[self.end(index)..self.end(index + 1)];
        (0..self.size).map(move |place| f32::from_bits(word(record, place)))
    }
}

/// Log probabilities of one token: its own, and the top ones.
#[derive(Debug, Clone, Copy)]
pub struct TokenLogprobs<'a> {
    record: &'a [u8],
    /// Where its own stand, and the first of the top ones, in words.
    logprob: usize,
    rank: usize,
    ids: usize,
    values: usize,
    top: usize,
}

impl<'a> TokenLogprobs<'a> {
    /// The same, with at most `wanted` top entries: a row may ask for fewer than the step's
    /// most.
    #[must_use]
    pub fn limited(self, wanted: u32) -> Self {
        Self { top: self.top.min(wanted as usize), ..self }
    }

    /// Log probability of the token itself.
    pub fn logprob(&self) -> f32 {
        f32::from_bits(word(self.record, self.logprob))
    }

    /// Its rank in the whole vocabulary, from 1.
    pub fn rank(&self) -> u32 {
        word(self.record, self.rank)
    }

    /// The likeliest tokens and their log probabilities, best first.
    pub fn top(&self) -> impl ExactSizeIterator<Item = (u32, f32)> + 'a {
        let Self { record, ids, values, .. } = *self;
        (0..self.top).map(move |i| (word(record, ids + i), f32::from_bits(word(record, values + i))))
    }
}

/// Writes result records: what the device does, for the simulation and the tests.
#[derive(Debug)]
pub struct ResultWriter<'a> {
    layout: ResultLayout,
    record: &'a mut [u8],
}

impl<'a> ResultWriter<'a> {
    /// The record of one row; every word of it is cleared first.
    pub fn new(layout: ResultLayout, result: &'a mut [u8], row: usize) -> Self {
        let bytes = layout.bytes(1);
        let record = &mut result[row * bytes..(row + 1) * bytes];
        record.fill(0);
        Self { layout, record }
    }

    /// Sets the status and the tokens.
    pub fn tokens(&mut self, status: u32, tokens: &[u32]) {
        self.set(STATUS, status);
        self.set(NUM_VALID, tokens.len() as u32);
        for (index, token) in tokens.iter().enumerate() {
            self.set(TOKENS + index, *token);
        }
    }

    /// Sets the log probabilities of the token at `index`; `top` is cut to what the record holds.
    pub fn logprobs(&mut self, index: usize, logprob: f32, rank: u32, top: &[(u32, f32)]) {
        let ResultLayout { query_len, top: Some(width) } = self.layout else { return };
        self.set(TOKENS + query_len + index, logprob.to_bits());
        self.set(TOKENS + 2 * query_len + index, rank);
        for (i, (id, value)) in top.iter().take(width).enumerate() {
            let ids = TOKENS + 3 * query_len + index * width;
            self.set(ids + i, *id);
            self.set(ids + query_len * width + i, value.to_bits());
        }
    }

    fn set(&mut self, index: usize, value: u32) {
        self.record[index * 4..index * 4 + 4].copy_from_slice(&value.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::super::STATUS_OK;
    use super::*;

    #[test]
    fn result_records_hold_tokens_then_logprobs_ranks_top_ids_and_top_values() {
        let layout = ResultLayout { query_len: 2, top: Some(3) };
        assert_eq!(layout.width(), 2 + 2 + 2 + 2 + 6 + 6);
        let mut result = vec![0; layout.bytes(2)];
        let mut writer = ResultWriter::new(layout, &mut result, 1);
        writer.tokens(STATUS_OK, &[7, 8]);
        writer.logprobs(1, -0.5, 2, &[(9, -0.25), (8, -0.5), (1, -4.0)]);
        let words: Vec<u32> = (0..layout.width()).map(|i| word(&result[layout.bytes(1)..], i)).collect();
        assert_eq!(words[..4], [0, 2, 7, 8]);
        assert_eq!((words[5], words[7]), ((-0.5f32).to_bits(), 2));
        assert_eq!(words[8 + 3..8 + 6], [9, 8, 1]);
        assert_eq!(words[14 + 3..14 + 5], [(-0.25f32).to_bits(), (-0.5f32).to_bits()]);

        let row = layout.row(&result, 1);
        assert_eq!((row.status(), row.num_valid(), row.token(1)), (STATUS_OK, 2, 8));
        let logprobs = row.logprobs(1).expect("the layout has them").limited(2);
        assert_eq!((logprobs.logprob(), logprobs.rank()), (-0.5, 2));
        assert_eq!(logprobs.top().collect::<Vec<_>>(), [(9, -0.25), (8, -0.5)]);
    }

    #[test]
    fn prompt_targets_have_records_behind_the_rows() {
        let layout = TargetLayout { start: 8, top: 2 };
        let value = |number: f32| number.to_bits();
        let words = [7, 7, 7, 7, 7, 7, 7, 7, value(-2.5), 4, 11, 12, value(-0.5), value(-0.75)];
        let result: Vec<u8> = words.iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
        assert_eq!(layout.end(2), result.len());
        let logprobs = layout.logprobs(&result, 1);
        assert_eq!((logprobs.logprob(), logprobs.rank()), (-2.5, 4));
        assert_eq!(logprobs.top().collect::<Vec<_>>(), [(11, -0.5), (12, -0.75)]);
        assert_eq!(logprobs.limited(1).top().len(), 1);
    }

    #[test]
    fn vectors_stand_behind_the_prompt_targets() {
        let layout = VectorLayout { start: 4, size: 2 };
        let words = [7, 1.0f32.to_bits(), 2.0f32.to_bits(), 3.0f32.to_bits(), (-4.0f32).to_bits()];
        let result: Vec<u8> = words.iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
        assert_eq!(layout.end(2), result.len());
        assert_eq!(layout.vector(&result, 1).collect::<Vec<_>>(), [3.0, -4.0]);
    }
}
