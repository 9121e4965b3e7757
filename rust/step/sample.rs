//! The tokens of a step: what is done to a row's logits, a draw for each place, and which places count.

use std::sync::OnceLock;

use super::State;
use crate::cpu::draw::{Draw, Drawn};
use crate::cpu::level::Level;
use crate::cpu::pool::Pool;
use crate::plan::words::{enter, result};
use crate::plan::{
    PlanView, Row, ROW_PENALTIES, ROW_PREFILL, ROW_SAMPLE, STATUS_MASKED, STATUS_NAN, STATUS_NO_TOKEN, STATUS_OK,
};

/// A matrix of rows that may be longer than what counts of them.
#[derive(Debug, Clone, Copy)]
pub struct Wide<'a, T> {
    /// [rows, width]
    pub numbers: &'a [T],
    /// Of a row.
    pub width: usize,
}

impl<'a, T> Wide<'a, T> {
    fn row(&self, row: usize) -> &'a [T] {
        &self.numbers[row * self.width..][..self.width]
    }
}

/// What a row drew: its status, and the tokens that count.
#[derive(Debug)]
struct Answer {
    status: u32,
    tokens: Vec<u32>,
}

/// Draws a token for each place that counts, writes the rows' records, and advances the state. Log
/// probabilities are left out.
///
/// logits: of all places of each decode row, then of the last place of each prefill row. masks: bit t % 32 of
/// word t / 32 allows token t.
///
/// # Panics
/// The plan names a row or a slot that is not there.
pub fn sample(
    pool: &Pool,
    plan: &PlanView<'_>,
    logits: Wide<'_, f32>,
    masks: Option<Wide<'_, i32>>,
    state: &mut State<'_>,
    results: &mut [i32],
) {
    let info = plan.info();
    let rows: Vec<Row> = plan.rows().collect();
    let (drafts, bias): (Vec<u32>, Vec<_>) = (plan.drafts().collect(), plan.bias().collect());
    let decodes = info.padded_decodes as usize;
    // Where the drafts of each row begin.
    let first_drafts: Vec<usize> = rows
        .iter()
        .scan(0, |next, row| {
            let first = *next;
            *next += row.num_drafts as usize;
            Some(first)
        })
        .collect();
    let answers: Vec<OnceLock<Answer>> = rows.iter().map(|_| OnceLock::new()).collect();
    let seen = &*state;
    pool.run(rows.len(), &|index| {
        let row = &rows[index];
        let is_decode = index < decodes;
        let first = if is_decode { row.query_start } else { info.num_decode_tokens + (index - decodes) as u32 };
        let own = &drafts[first_drafts[index]..][..row.num_drafts as usize];
        let places = Places { row, first: first as usize, drafts: if is_decode { own } else { &[] } };
        let _ = answers[index].set(places.draw(seen, logits, masks, &bias));
    });
    for (index, (row, answer)) in rows.iter().zip(answers).enumerate() {
        let answer = answer.into_inner().expect("every row was drawn");
        advance(row, &answer, state);
        let record = &mut results[index * info.result_width as usize..][..info.result_width as usize];
        record[result::STATUS] = answer.status as i32;
        record[result::NUM_VALID] = answer.tokens.len() as i32;
        let places = &mut record[result::TOKENS..][..info.decode_query_len as usize];
        places.fill(-1);
        for (place, token) in places.iter_mut().zip(answer.tokens) {
            *place = token as i32;
        }
    }
}

/// The places of a row that may draw.
#[derive(Debug)]
struct Places<'a> {
    row: &'a Row,
    /// Of its rows of logits.
    first: usize,
    drafts: &'a [u32],
}

impl Places<'_> {
    /// A place counts if all drafts before it equal the tokens drawn in their places.
    fn draw(
        &self,
        state: &State<'_>,
        logits: Wide<'_, f32>,
        masks: Option<Wide<'_, i32>>,
        bias: &[(u32, f32)],
    ) -> Answer {
        let mut answer = Answer { status: STATUS_NO_TOKEN, tokens: Vec::new() };
        if self.row.flags & ROW_SAMPLE == 0 {
            return answer;
        }
        let slot = self.row.slot as usize;
        let record = &state.records[slot * enter::WORDS..][..enter::WORDS];
        let mut processed = Vec::new();
        loop {
            let place = answer.tokens.len();
            let draw = draw_of(record, place);
            let raw = &logits.row(self.first + place)[..state.vocab_size];
            let level = Level::best();
            let own_bias = &bias[self.row.bias.0 as usize..][..self.row.bias.1 as usize];
            let mask = masks.zip(self.row.mask_row).map(|(masks, first)| masks.row(first as usize + place));
            let counts = state.penalty_counts.as_deref().filter(|_| self.row.flags & ROW_PENALTIES != 0);
            let changes = mask.is_some() || !own_bias.is_empty() || counts.is_some();
            let drawn = if !changes && (draw.is_greedy() || draw.temperature.to_bits() == 1.0f32.to_bits()) {
                draw.draw(level, raw)
            } else if changes && raw.iter().any(|logit| logit.is_nan() || *logit == f32::INFINITY) {
                Drawn::Sick // also where a mask would hide it
            } else {
                processed.clear();
                processed.extend_from_slice(raw);
                if let Some(mask) = mask {
                    hide(&mut processed, mask);
                }
                for &(token, value) in own_bias {
                    processed[token as usize] += value;
                }
                if let Some(counts) = counts {
                    penalise(&mut processed, record, &counts[slot * state.vocab_size..], &self.drafts[..place]);
                }
                if !draw.is_greedy() {
                    let inverse = 1.0 / draw.temperature;
                    for logit in &mut processed {
                        *logit *= inverse;
                    }
                }
                draw.draw(level, &processed)
            };
            let Drawn::Token(token) = drawn else {
                answer.status = if drawn == Drawn::Masked { STATUS_MASKED } else { STATUS_NAN };
                return answer;
            };
            answer.status = STATUS_OK;
            answer.tokens.push(token);
            if self.drafts.get(place) != Some(&token) {
                return answer;
            }
        }
    }
}

fn draw_of(record: &[i32], place: usize) -> Draw {
    let number = |word: usize| f32::from_bits(record[word].cast_unsigned());
    Draw {
        temperature: number(enter::TEMPERATURE),
        top_k: record[enter::TOP_K].max(0) as usize,
        top_p: number(enter::TOP_P),
        min_p: number(enter::MIN_P),
        seed: u64::from(record[enter::SEED_LOW].cast_unsigned())
            | u64::from(record[enter::SEED_HIGH].cast_unsigned()) << 32,
        output_index: record[enter::OUTPUT_INDEX].cast_unsigned().wrapping_add(place as u32),
    }
}

fn hide(logits: &mut [f32], mask: &[i32]) {
    for (logits, word) in logits.chunks_mut(32).zip(mask) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// drafts: those before the place, which it takes for output.
fn penalise(logits: &mut [f32], record: &[i32], counts: &[i32], drafts: &[u32]) {
    let number = |word: usize| f32::from_bits(record[word].cast_unsigned());
    let (repetition, frequency) = (number(enter::REPETITION_PENALTY), number(enter::FREQUENCY_PENALTY));
    let presence = number(enter::PRESENCE_PENALTY);
    for (token, (logit, &count)) in logits.iter_mut().zip(counts).enumerate() {
        let drafted = drafts.iter().filter(|&&draft| draft as usize == token).count() as i32;
        let count = count + 2 * drafted;
        if count > 0 {
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            let times = count >> 1;
            *logit = *logit - frequency * times as f32 - if times > 0 { presence } else { 0.0 };
        }
    }
}

/// What the slot is after the row's answer.
fn advance(row: &Row, answer: &Answer, state: &mut State<'_>) {
    let (slot, valid) = (row.slot as usize, answer.tokens.len() as i32);
    let record = state.record(slot);
    record[enter::COMPUTED_LEN] += if row.flags & ROW_PREFILL != 0 { row.query_len as i32 } else { valid };
    record[enter::OUTPUT_INDEX] += valid;
    if let Some(&last) = answer.tokens.last() {
        state.last_token[slot] = last as i32;
    }
    if row.flags & ROW_PENALTIES != 0 {
        if let Some(counts) = state.counts(slot) {
            for &token in &answer.tokens {
                counts[token as usize] += 2;
            }
        }
    }
}
