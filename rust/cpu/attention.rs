//! Attention over pages: rotary and the write of keys and values, then the answers of rows: of one
//! token each by thirty-two keys at a time, of more (prompts, drafts) by sixteen queries at a time too.

use super::codes::{Codes, Fp8, Int4, Int8};
use super::float::{Brain, Half};
use super::level::by_level;
use super::page::{PageShape, Place, Store};
use super::pool::Pool;
use super::raw::Writer;
use super::rows::norm;
use super::scores::{add_values, add_weighted, dots, scores, softmax, weigh, State, KEYS, LANES};

/// Queries of a row that one piece of work answers, unless the heads that share a key are more.
const AT_ONCE: usize = 192;
/// Up to so many tokens the caller rotates himself: waking threads takes longer.
const ALONE: usize = 4;

/// The pages of a layer: [blocks, 2, kv heads, block size, head dim].
#[derive(Debug, Clone, Copy)]
pub enum Pages<'a> {
    /// float32
    Single(Writer<'a, f32>),
    /// float16
    Half(Writer<'a, Half>),
    /// bfloat16
    Brain(Writer<'a, Brain>),
    /// float8 e4m3 with a scale a head
    Fp8(Codes<'a, Fp8>),
    /// int8 with a scale a head
    Int8(Codes<'a, Int8>),
    /// Pairs of four bits with a scale a head
    Int4(Codes<'a, Int4>),
}

/// Runs `$body` with `$store` as what `$pages` holds.
macro_rules! with_store {
    ($pages:expr, $store:ident => $body:expr) => {
        match $pages {
            Pages::Single($store) => $body,
            Pages::Half($store) => $body,
            Pages::Brain($store) => $body,
            Pages::Fp8($store) => $body,
            Pages::Int8($store) => $body,
            Pages::Int4($store) => $body,
        }
    };
}

/// What a layer's attention is, whatever the step.
#[derive(Debug, Clone)]
pub struct Attention {
    /// Heads of queries; a multiple of those of keys and values.
    pub heads: usize,
    /// Of its keys and values.
    pub shape: PageShape,
    /// Of queries times keys.
    pub scale: f32,
    /// Keys that a token sees, its own included; 0: all.
    pub window: usize,
    /// Of `RMSNorm` on heads of q and k, where the model has it.
    pub norms: Option<(Vec<f32>, Vec<f32>)>,
    /// Of these norms.
    pub eps: f32,
}

/// What a step brings.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// [tokens, (heads + 2 * kv heads) * head dim]: q is rotated in place.
    pub qkv: Writer<'a, f32>,
    /// [tokens]
    pub positions: &'a [i64],
    /// [positions, 2 * half]: cosines, then sines.
    pub cos_sin: &'a [f32],
    /// Numbers of a row of `cos_sin`; so many of each head are rotated.
    pub rotary_dim: usize,
    /// [tokens]: block * block size + place in it.
    pub slots: &'a [i64],
    /// Of this layer.
    pub pages: Pages<'a>,
    /// [request slots, most blocks]
    pub table: &'a [i32],
    /// Blocks of a row of `table`.
    pub table_width: usize,
    /// [rows]: the request slot of each row.
    pub row_slots: &'a [i32],
    /// [rows]: keys of each row, its new ones included; 0 is answered by zeros.
    pub seq_lens: &'a [i32],
    /// [rows + 1]: the first token of each row, and the end of the last; without it each row has one token.
    /// A row's tokens are the last of its keys.
    pub starts: Option<&'a [i32]>,
}

impl Step<'_> {
    /// Tokens of row `row`.
    fn tokens(&self, row: usize) -> std::ops::Range<usize> {
        match self.starts {
            Some(starts) => starts[row] as usize..starts[row + 1] as usize,
            None => row..row + 1,
        }
    }

    /// Tokens of all rows, no more than the step has.
    pub fn answered(&self) -> usize {
        let rows = self.row_slots.len();
        let end = self.starts.map_or(rows, |starts| starts.get(rows).map_or(0, |&end| end.max(0) as usize));
        end.min(self.positions.len())
    }
}

impl Attention {
    fn width(&self) -> usize {
        (self.heads + 2 * self.shape.kv_heads) * self.shape.head_dim
    }

    /// Why a step cannot be computed.
    ///
    /// # Errors
    /// Names the field that points to memory that is not there.
    pub fn check(&self, step: &Step<'_>) -> Result<(), String> {
        let tokens = step.positions.len();
        if step.qkv.len() != tokens * self.width() {
            return Err(format!("qkv: {} numbers for {tokens} tokens, each has {}", step.qkv.len(), self.width()));
        }
        let blocks = with_store!(step.pages, store => store.blocks(&self.shape))?;
        let half = step.rotary_dim / 2;
        if half == 0 || !step.rotary_dim.is_multiple_of(2) || step.rotary_dim > self.shape.head_dim {
            return Err(format!("cos_sin: rows of {} for heads of {}", step.rotary_dim, self.shape.head_dim));
        }
        let longest = step.cos_sin.len() / step.rotary_dim;
        if let Some(position) = step.positions.iter().find(|&&position| position < 0 || position as usize >= longest) {
            return Err(format!("positions: {position} of {longest}"));
        }
        let places = blocks * self.shape.block_size;
        if step.slots.len() != tokens {
            return Err(format!("slot_mapping: {} for {tokens} tokens", step.slots.len()));
        }
        if let Some(slot) = step.slots.iter().find(|&&slot| slot < 0 || slot as usize >= places) {
            return Err(format!("slot_mapping: {slot} of {places}"));
        }
        if step.row_slots.len() != step.seq_lens.len() || step.row_slots.len() > tokens {
            return Err(format!("row_slots: {} for {} seq_lens", step.row_slots.len(), step.seq_lens.len()));
        }
        if let Some(starts) = step.starts {
            let rows = step.row_slots.len();
            if starts.len() != rows + 1 || starts[0] != 0 || starts[rows] as usize > tokens || !starts.is_sorted() {
                return Err(format!("query_start_loc: not where {rows} rows of {tokens} tokens begin, from 0 on"));
            }
        }
        for (row, (&slot, &len)) in step.row_slots.iter().zip(step.seq_lens).enumerate() {
            if len > 0 && step.tokens(row).len() > len as usize {
                return Err(format!("seq_lens: {len} keys of a row of {} tokens", step.tokens(row).len()));
            }
            let used = (len.max(0) as usize).div_ceil(self.shape.block_size);
            let start = slot.max(0) as usize * step.table_width;
            if slot < 0 || len < 0 || used > step.table_width || start + used > step.table.len() {
                return Err(format!("block_table: has no {used} blocks of slot {slot}"));
            }
            if let Some(block) = step.table[start..start + used].iter().find(|&&id| id < 0 || id as usize >= blocks) {
                return Err(format!("block_table: block {block} of {blocks}"));
            }
        }
        Ok(())
    }

    /// Rotates q and k of all tokens, writes k and v into their pages, then answers those of the rows:
    /// out [tokens of rows, heads * head dim].
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn run(&self, pool: &Pool, step: &Step<'_>, out: &mut [f32]) -> Result<(), String> {
        self.check(step)?;
        let (tokens, answered, answer) = (step.positions.len(), step.answered(), self.heads * self.shape.head_dim);
        if out.len() != answered * answer {
            return Err(format!("out: {} numbers for {answered} tokens of {answer}", out.len()));
        }
        let rotate = |token: usize| rotate(self.shape.level, self, step, token);
        if tokens <= ALONE {
            (0..tokens).for_each(rotate);
        } else {
            pool.run(tokens, &rotate);
        }
        let out = Writer::new(out);
        let pieces = self.pieces(step);
        pool.run(pieces.len() * self.shape.kv_heads, &|number| {
            let (piece, kv_head) = (pieces[number / self.shape.kv_heads], number % self.shape.kv_heads);
            SCRATCH.with_borrow_mut(|scratch| attend(self.shape.level, self, step, piece, kv_head, scratch, out));
        });
        Ok(())
    }

    /// The rows, long ones in parts.
    fn pieces(&self, step: &Step<'_>) -> Vec<Piece> {
        let at_once = (AT_ONCE / (self.heads / self.shape.kv_heads)).max(1);
        let mut pieces = Vec::new();
        for row in 0..step.row_slots.len() {
            let (tokens, keys) = (step.tokens(row), step.seq_lens[row] as usize);
            for first in tokens.clone().step_by(at_once) {
                let count = at_once.min(tokens.end - first);
                pieces.push(Piece { row, first, count, position: (keys + first).saturating_sub(tokens.end) });
            }
        }
        pieces
    }
}

/// Tokens of one row that are answered together.
#[derive(Debug, Clone, Copy)]
struct Piece {
    row: usize,
    /// Of the step's tokens.
    first: usize,
    count: usize,
    /// Of its first token in its row.
    position: usize,
}

/// What a piece needs besides, kept from one to the next. Heads are padded to whole sixteens, and so are queries.
#[derive(Debug)]
struct Scratch {
    /// [tiles, padded dim]: sixteen queries' numbers beside each other, times the scale.
    queries: Vec<[f32; LANES]>,
    /// [tiles, padded dim]: sums of values, not yet divided.
    answers: Vec<[f32; LANES]>,
    /// [tiles]
    states: Vec<State>,
    scores: [[f32; LANES]; KEYS],
    /// Keys and values, [32, padded dim] each.
    heads: [Vec<f32>; 2],
    /// [heads, keys] of a single token
    row: Vec<f32>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            queries: Vec::new(),
            answers: Vec::new(),
            states: Vec::new(),
            scores: [[0.0; LANES]; KEYS],
            heads: [Vec::new(), Vec::new()],
            row: Vec::new(),
        }
    }
}

thread_local! {
    static SCRATCH: std::cell::RefCell<Scratch> = std::cell::RefCell::default();
}

by_level! {
    fn rotate(attention: &Attention, step: &Step<'_>, token: usize) = rotate_body
}

by_level! {
    fn attend(
        attention: &Attention,
        step: &Step<'_>,
        piece: Piece,
        kv_head: usize,
        scratch: &mut Scratch,
        out: Writer<'_, f32>,
    ) = attend_body
}

/// Norms and rotary of one token's q and k, and its k and v into their page.
#[inline(always)]
fn rotate_body<const FUSED: bool>(attention: &Attention, step: &Step<'_>, token: usize) {
    let (width, dim) = (attention.width(), attention.shape.head_dim);
    // SAFETY: a token is rotated once, by one thread, and tokens do not overlap.
    let heads = unsafe { step.qkv.part(token * width, width) };
    let table = &step.cos_sin[step.positions[token] as usize * step.rotary_dim..][..step.rotary_dim];
    let (rotated, values) = heads.split_at_mut((attention.heads + attention.shape.kv_heads) * dim);
    for (number, head) in rotated.chunks_exact_mut(dim).enumerate() {
        if let Some((q_norm, k_norm)) = &attention.norms {
            let weight = if number < attention.heads { q_norm } else { k_norm };
            norm_in_place::<FUSED>(head, weight, attention.eps);
        }
        let (cos, sin) = table.split_at(step.rotary_dim / 2);
        let (first, second) = head[..step.rotary_dim].split_at_mut(step.rotary_dim / 2);
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
    let keys = &rotated[attention.heads * dim..];
    let slot = step.slots[token] as usize;
    with_store!(step.pages, store => write_page(attention, store, slot, keys, values));
}

#[inline(always)]
fn norm_in_place<const FUSED: bool>(head: &mut [f32], weight: &[f32], eps: f32) {
    let mut normed = [0.0; 512];
    let normed = &mut normed[..head.len()];
    norm::<FUSED>(head, weight, eps, normed);
    head.copy_from_slice(normed);
}

#[inline(always)]
fn write_page(attention: &Attention, store: impl Store, slot: usize, keys: &[f32], values: &[f32]) {
    let (block, token) = (slot / attention.shape.block_size, slot % attention.shape.block_size);
    for (kind, heads) in [keys, values].into_iter().enumerate() {
        for (head, numbers) in heads.chunks_exact(attention.shape.head_dim).enumerate() {
            // SAFETY: a token has a place of its own, but in the null block, whose numbers mean nothing.
            unsafe { store.write(&attention.shape, Place { block, kind, head, token }, numbers) };
        }
    }
}

/// The answers of the heads that share one head of keys and values.
#[inline(always)]
fn attend_body<const FUSED: bool>(
    attention: &Attention,
    step: &Step<'_>,
    piece: Piece,
    kv_head: usize,
    scratch: &mut Scratch,
    out: Writer<'_, f32>,
) {
    with_store!(step.pages, store => attend_of::<FUSED>(attention, step, store, piece, kv_head, scratch, out));
}

#[inline(always)]
fn attend_of<const FUSED: bool>(
    attention: &Attention,
    step: &Step<'_>,
    store: impl Store,
    piece: Piece,
    kv_head: usize,
    scratch: &mut Scratch,
    out: Writer<'_, f32>,
) {
    let group = attention.heads / attention.shape.kv_heads * attention.shape.head_dim;
    // SAFETY: a token's heads are one piece's, and one thread has it.
    let answer = |token: usize| unsafe { out.part(token * attention.shape.kv_heads * group + kv_head * group, group) };
    // SAFETY: queries are only read now.
    let query = |token: usize| unsafe { &*step.qkv.part(token * attention.width() + kv_head * group, group) };
    let keys = Keys {
        table: &step.table[step.row_slots[piece.row] as usize * step.table_width..][..step.table_width],
        store,
        attention,
        kv_head,
    };
    if step.seq_lens[piece.row] == 0 {
        for token in piece.first..piece.first + piece.count {
            answer(token).fill(0.0);
        }
    } else if piece.count == 1 {
        one(keys, piece.position, query(piece.first), scratch, answer(piece.first));
    } else {
        many::<FUSED>(keys, piece, query, scratch, answer);
    }
}

/// Keys and values of one head in the pages of one row.
#[derive(Clone, Copy)]
struct Keys<'a, S> {
    table: &'a [i32],
    store: S,
    attention: &'a Attention,
    kv_head: usize,
}

impl<S: Store> Keys<'_, S> {
    /// The first key that the token at `position` sees.
    #[inline(always)]
    fn first_of(&self, position: usize) -> usize {
        if self.attention.window == 0 {
            0
        } else {
            (position + 1).saturating_sub(self.attention.window)
        }
    }

    /// The key (0) or value (1) of token `token` of the row's block `block`.
    #[inline(always)]
    fn read(&self, kind: usize, block: usize, token: usize, numbers: &mut [f32]) {
        let place = Place { block: self.table[block] as usize, kind, head: self.kv_head, token };
        // SAFETY: all writes of this step have returned, and nobody else writes pages.
        unsafe { self.store.read(&self.attention.shape, place, numbers) };
    }

    /// Those of `count` tokens from `first` on, each `width` numbers behind the one before.
    #[inline(always)]
    fn read_some(&self, kind: usize, first: usize, count: usize, width: usize, numbers: &mut [f32]) {
        let (dim, size) = (self.attention.shape.head_dim, self.attention.shape.block_size);
        let (mut block, mut token) = (first / size, first % size); // once: divisions take longer than to read
        for numbers in numbers.chunks_exact_mut(width).take(count) {
            self.read(kind, block, token, &mut numbers[..dim]);
            token += 1;
            if token == size {
                (block, token) = (block + 1, 0);
            }
        }
    }
}

/// One token, whose heads see the same keys.
#[inline(always)]
fn one(keys: Keys<'_, impl Store>, position: usize, queries: &[f32], scratch: &mut Scratch, out: &mut [f32]) {
    let (dim, level) = (keys.attention.shape.head_dim, keys.attention.shape.level);
    let (parts, heads) = (dim.div_ceil(LANES), queries.len() / dim);
    let (begin, end) = (keys.first_of(position), position + 1);
    let Scratch { queries: padded, answers, heads: [key_heads, value_heads], row: scores, .. } = scratch;
    for (sixteens, head) in [(&mut *padded, queries), (&mut *answers, &[])] {
        sixteens.clear();
        sixteens.resize(heads * parts, [0.0; LANES]);
        for (sixteens, head) in sixteens.chunks_exact_mut(parts).zip(head.chunks_exact(dim)) {
            sixteens.as_flattened_mut()[..dim].copy_from_slice(head);
        }
    }
    for numbers in [&mut *key_heads, &mut *value_heads] {
        numbers.clear();
        numbers.resize(KEYS * parts * LANES, 0.0);
    }
    scores.clear();
    scores.resize(heads * (end - begin), 0.0);
    for first in (begin..end).step_by(KEYS) {
        let count = KEYS.min(end - first);
        keys.read_some(0, first, count, parts * LANES, key_heads);
        for (scores, query) in scores.chunks_exact_mut(end - begin).zip(padded.chunks_exact(parts)) {
            dots(level, key_heads, query, keys.attention.scale, &mut scores[first - begin..][..count]);
        }
    }
    for first in (begin..end).step_by(KEYS) {
        let count = KEYS.min(end - first);
        keys.read_some(1, first, count, parts * LANES, value_heads);
        for (scores, answers) in scores.chunks_exact_mut(end - begin).zip(answers.chunks_exact_mut(parts)) {
            if first == begin {
                softmax(level, scores);
            }
            add_weighted(level, value_heads, &scores[first - begin..][..count], answers);
        }
    }
    for (out, answers) in out.chunks_exact_mut(dim).zip(answers.chunks_exact(parts)) {
        out.copy_from_slice(&answers.as_flattened()[..dim]);
    }
}

/// Several tokens of a row, each of which sees one key more than the one before it.
#[inline(always)]
fn many<'a, const FUSED: bool>(
    keys: Keys<'_, impl Store>,
    piece: Piece,
    query: impl Fn(usize) -> &'a [f32],
    scratch: &mut Scratch,
    answer: impl Fn(usize) -> &'a mut [f32],
) {
    let (dim, level) = (keys.attention.shape.head_dim, keys.attention.shape.level);
    let heads = keys.attention.heads / keys.attention.shape.kv_heads;
    let padded = dim.next_multiple_of(16);
    let queries = piece.count * heads;
    let tiles = queries.div_ceil(LANES);
    scratch.queries.clear();
    scratch.queries.resize(tiles * padded, [0.0; LANES]);
    scratch.answers.clear();
    scratch.answers.resize(tiles * padded, [0.0; LANES]);
    scratch.states.clear();
    scratch.states.resize(tiles, State::default());
    for kind in &mut scratch.heads {
        kind.clear();
        kind.resize(KEYS * padded, 0.0);
    }
    for token in 0..piece.count {
        for (head, numbers) in query(piece.first + token).chunks_exact(dim).enumerate() {
            let number = token * heads + head;
            let tile = &mut scratch.queries[number / LANES * padded..][..padded];
            for (lanes, query) in tile.iter_mut().zip(numbers) {
                lanes[number % LANES] = query * keys.attention.scale;
            }
        }
    }
    let (begin, end) = (keys.first_of(piece.position), piece.position + piece.count);
    for first in (begin..end).step_by(KEYS) {
        let count = KEYS.min(end - first);
        for (kind, numbers) in scratch.heads.iter_mut().enumerate() {
            keys.read_some(kind, first, count, padded, numbers);
            numbers[count * padded..].fill(0.0); // what was there may be no number, and nobody sees it
        }
        let tiles = scratch.queries.chunks_exact(padded).zip(scratch.answers.chunks_exact_mut(padded));
        for (tile, ((queries, answers), state)) in tiles.zip(&mut scratch.states).enumerate() {
            // Lanes without a query have what the last one sees.
            let position = |lane: usize| piece.position + ((tile * LANES + lane) / heads).min(piece.count - 1);
            if position(LANES - 1) < first || keys.first_of(position(0)) >= first + count {
                continue;
            }
            let place = |key: usize| key.saturating_sub(first).min(KEYS) as i32;
            let from = std::array::from_fn(|lane| place(keys.first_of(position(lane))));
            let to = std::array::from_fn(|lane| place(position(lane) + 1));
            let [key_heads, value_heads] = &scratch.heads;
            scores(level, key_heads, queries, &mut scratch.scores);
            weigh(level, &mut scratch.scores, [&from, &to], state);
            add_values(level, value_heads, &scratch.scores, &state.shrinks, answers);
        }
    }
    for token in 0..piece.count {
        for (head, out) in answer(piece.first + token).chunks_exact_mut(dim).enumerate() {
            let number = token * heads + head;
            let inverse = 1.0 / scratch.states[number / LANES].sums[number % LANES];
            let answers = &scratch.answers[number / LANES * padded..];
            for (out, lanes) in out.iter_mut().zip(answers) {
                *out = lanes[number % LANES] * inverse;
            }
        }
    }
}
