//! Attention over pages: rotary and the write of keys and values, then the answers of rows: of one
//! token each by thirty-two keys at a time, of more (prompts, drafts) by sixteen queries at a time too.

use super::codes::{Codes, Fp8, Int4, Int8};
use super::float::{exp, Brain, Half, Number};
use super::level::{by_level, multiply_add, Level};
use super::pool::Pool;
use super::raw::Writer;
use super::rows::{dot, larger, norm};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512, level::Tier};

/// Queries of a row that one piece of work answers, unless the heads that share a key are more.
const AT_ONCE: usize = 192;
/// Keys that are taken from their pages at a time: with their values and sixteen queries they fit into L1.
const KEYS: usize = 32;
/// Queries that are multiplied with them at a time, each a lane: so maxima and sums need no turning.
const LANES: usize = 16;
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

/// Where a key or a value is: of the block, keys (0) or values (1), the head of them, the token in the block.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Of the pages.
    pub block: usize,
    /// 0: keys, 1: values.
    pub kind: usize,
    /// Of keys and values.
    pub head: usize,
    /// Of the block.
    pub token: usize,
}

impl Place {
    /// Its number among the heads of its block.
    pub fn in_block(self, attention: &Attention) -> usize {
        (self.kind * attention.kv_heads + self.head) * attention.block_size + self.token
    }
}

/// Pages of one type of numbers or codes.
pub trait Store: Copy + Sync {
    /// How many blocks it has.
    ///
    /// # Errors
    /// It is not made of whole blocks.
    fn blocks(&self, attention: &Attention) -> Result<usize, String>;

    /// A head as float32: `numbers` [head dim].
    ///
    /// # Safety
    /// Nobody writes there meanwhile.
    unsafe fn read(&self, attention: &Attention, place: Place, numbers: &mut [f32]);

    /// Keeps a head.
    ///
    /// # Safety
    /// Nobody reads or writes there meanwhile.
    unsafe fn write(&self, attention: &Attention, place: Place, numbers: &[f32]);
}

impl<N: Number> Store for Writer<'_, N> {
    fn blocks(&self, attention: &Attention) -> Result<usize, String> {
        let block = 2 * attention.kv_heads * attention.block_size * attention.head_dim;
        if self.len().is_multiple_of(block) {
            return Ok(self.len() / block);
        }
        Err(format!("kv_cache: {} numbers are not blocks of {block}", self.len()))
    }

    #[inline(always)]
    unsafe fn read(&self, attention: &Attention, place: Place, numbers: &mut [f32]) {
        let heads = 2 * attention.kv_heads * attention.block_size;
        let start = (place.block * heads + place.in_block(attention)) * attention.head_dim;
        // SAFETY: the caller's.
        let stored = unsafe { self.part(start, attention.head_dim) };
        N::widen_all(attention.level, stored, numbers);
    }

    #[inline(always)]
    unsafe fn write(&self, attention: &Attention, place: Place, numbers: &[f32]) {
        let heads = 2 * attention.kv_heads * attention.block_size;
        let start = (place.block * heads + place.in_block(attention)) * attention.head_dim;
        // SAFETY: the caller's.
        let stored = unsafe { self.part(start, attention.head_dim) };
        for (stored, number) in stored.iter_mut().zip(numbers) {
            *stored = N::narrow(*number);
        }
    }
}

/// What a layer's attention is, whatever the step.
#[derive(Debug, Clone)]
pub struct Attention {
    /// Heads of queries; a multiple of those of keys and values.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Numbers of a head.
    pub head_dim: usize,
    /// Tokens of a block.
    pub block_size: usize,
    /// Of queries times keys.
    pub scale: f32,
    /// Keys that a token sees, its own included; 0: all.
    pub window: usize,
    /// Of `RMSNorm` on heads of q and k, where the model has it.
    pub norms: Option<(Vec<f32>, Vec<f32>)>,
    /// Of these norms.
    pub eps: f32,
    /// The code that runs.
    pub level: Level,
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
        (self.heads + 2 * self.kv_heads) * self.head_dim
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
        let blocks = with_store!(step.pages, store => store.blocks(self))?;
        let half = step.rotary_dim / 2;
        if half == 0 || !step.rotary_dim.is_multiple_of(2) || step.rotary_dim > self.head_dim {
            return Err(format!("cos_sin: rows of {} for heads of {}", step.rotary_dim, self.head_dim));
        }
        let longest = step.cos_sin.len() / step.rotary_dim;
        if let Some(position) = step.positions.iter().find(|&&position| position < 0 || position as usize >= longest) {
            return Err(format!("positions: {position} of {longest}"));
        }
        let places = blocks * self.block_size;
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
            let used = (len.max(0) as usize).div_ceil(self.block_size);
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
        let (tokens, answered, answer) = (step.positions.len(), step.answered(), self.heads * self.head_dim);
        if out.len() != answered * answer {
            return Err(format!("out: {} numbers for {answered} tokens of {answer}", out.len()));
        }
        let rotate = |token: usize| rotate(self.level, self, step, token);
        if tokens <= ALONE {
            (0..tokens).for_each(rotate);
        } else {
            pool.run(tokens, &rotate);
        }
        let out = Writer::new(out);
        let pieces = self.pieces(step);
        pool.run(pieces.len() * self.kv_heads, &|number| {
            let (piece, kv_head) = (pieces[number / self.kv_heads], number % self.kv_heads);
            SCRATCH.with_borrow_mut(|scratch| attend(self.level, self, step, piece, kv_head, scratch, out));
        });
        Ok(())
    }

    /// The rows, long ones in parts.
    fn pieces(&self, step: &Step<'_>) -> Vec<Piece> {
        let at_once = (AT_ONCE / (self.heads / self.kv_heads)).max(1);
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

/// What sixteen queries have seen: their largest scores, and the sums of exponentials in units of these.
#[derive(Debug, Clone, Copy)]
struct State {
    peaks: [f32; LANES],
    sums: [f32; LANES],
    /// By which what was summed before comes into the units of `peaks`.
    shrinks: [f32; LANES],
}

impl Default for State {
    fn default() -> Self {
        Self { peaks: [f32::NEG_INFINITY; LANES], sums: [0.0; LANES], shrinks: [0.0; LANES] }
    }
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
    let (width, dim) = (attention.width(), attention.head_dim);
    // SAFETY: a token is rotated once, by one thread, and tokens do not overlap.
    let heads = unsafe { step.qkv.part(token * width, width) };
    let table = &step.cos_sin[step.positions[token] as usize * step.rotary_dim..][..step.rotary_dim];
    let (rotated, values) = heads.split_at_mut((attention.heads + attention.kv_heads) * dim);
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
    let (block, token) = (slot / attention.block_size, slot % attention.block_size);
    for (kind, heads) in [keys, values].into_iter().enumerate() {
        for (head, numbers) in heads.chunks_exact(attention.head_dim).enumerate() {
            // SAFETY: a token has a place of its own, but in the null block, whose numbers mean nothing.
            unsafe { store.write(attention, Place { block, kind, head, token }, numbers) };
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
    let group = attention.heads / attention.kv_heads * attention.head_dim;
    // SAFETY: a token's heads are one piece's, and one thread has it.
    let answer = |token: usize| unsafe { out.part(token * attention.kv_heads * group + kv_head * group, group) };
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
        unsafe { self.store.read(self.attention, place, numbers) };
    }

    /// Those of `count` tokens from `first` on, each `width` numbers behind the one before.
    #[inline(always)]
    fn read_some(&self, kind: usize, first: usize, count: usize, width: usize, numbers: &mut [f32]) {
        let (dim, size) = (self.attention.head_dim, self.attention.block_size);
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
    let (dim, level) = (keys.attention.head_dim, keys.attention.level);
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
    let (dim, level) = (keys.attention.head_dim, keys.attention.level);
    let heads = keys.attention.heads / keys.attention.kv_heads;
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

/// scores [32 keys, 16 queries] = keys [32, padded dim] . queries [padded dim, 16].
fn scores(level: Level, keys: &[f32], queries: &[[f32; LANES]], scores: &mut [[f32; LANES]; KEYS]) {
    let factors = Factors { numbers: keys, row: queries.len(), column: 1 };
    scores.fill([0.0; LANES]);
    add_products(level, factors, queries, &[1.0; LANES], scores);
}

/// answers [padded dim, 16 queries] = answers * shrinks + values [32 keys, padded dim] turned . weights [32, 16].
fn add_values(
    level: Level,
    values: &[f32],
    weights: &[[f32; LANES]; KEYS],
    shrinks: &[f32; LANES],
    answers: &mut [[f32; LANES]],
) {
    let factors = Factors { numbers: values, row: 1, column: answers.len() };
    add_products(level, factors, weights, shrinks, answers);
}

/// sums = sums * shrinks + factors . lanes, as many rows at a time as the level has registers for.
fn add_products(
    level: Level,
    factors: Factors<'_>,
    lanes: &[[f32; LANES]],
    shrinks: &[f32; LANES],
    sums: &mut [[f32; LANES]],
) {
    #[cfg(target_arch = "x86_64")]
    if level.tier() == Tier::Avx512 {
        // SAFETY: a `Level` can only be had where the processor has its instructions.
        return unsafe { avx512::add_products(factors, lanes, shrinks, sums) };
    }
    add_products_by_four(level, factors, lanes, shrinks, sums);
}

/// A matrix by which lanes are multiplied: numbers from one row to the next, and from one column to the next.
#[derive(Clone, Copy)]
pub(super) struct Factors<'a> {
    pub(super) numbers: &'a [f32],
    row: usize,
    column: usize,
}

impl Factors<'_> {
    /// Where a number is.
    #[inline(always)]
    pub(super) fn place(&self, row: usize, column: usize) -> usize {
        row * self.row + column * self.column
    }

    /// There are so many columns and rows, and these are whole parts of `part` rows.
    ///
    /// # Panics
    /// If not.
    #[inline(always)]
    pub(super) fn check(&self, columns: usize, rows: usize, part: usize) {
        assert!(columns > 0 && rows > 0 && rows.is_multiple_of(part));
        assert!(self.place(rows - 1, columns - 1) < self.numbers.len());
    }
}

by_level! {
    fn add_products_by_four(
        factors: Factors<'_>,
        lanes: &[[f32; LANES]],
        shrinks: &[f32; LANES],
        sums: &mut [[f32; LANES]],
    ) = add_products_body
}

by_level! {
    fn weigh(
        scores: &mut [[f32; LANES]; KEYS],
        seen: [&[i32; LANES]; 2],
        state: &mut State,
    ) = weigh_body
}

#[inline(always)]
fn add_products_body<const FUSED: bool>(
    factors: Factors<'_>,
    lanes: &[[f32; LANES]],
    shrinks: &[f32; LANES],
    sums: &mut [[f32; LANES]],
) {
    const ROWS: usize = 4; // with AVX2 their sums fill half of the registers
    factors.check(lanes.len(), sums.len(), ROWS);
    for (part, sums) in sums.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
        let mut kept = *sums;
        for kept in &mut kept {
            for lane in 0..LANES {
                kept[lane] *= shrinks[lane];
            }
        }
        for (at, lanes) in lanes.iter().enumerate() {
            for (number, kept) in kept.iter_mut().enumerate() {
                // SAFETY: `check` says that it is inside.
                let factor = unsafe { *factors.numbers.get_unchecked(factors.place(part * ROWS + number, at)) };
                for lane in 0..LANES {
                    kept[lane] = multiply_add::<FUSED>(factor, lanes[lane], kept[lane]);
                }
            }
        }
        *sums = kept;
    }
}

/// Scores become weights, in units of the largest one yet.
/// from, to: of each query the first key that it sees, and the first after those.
#[inline(always)]
fn weigh_body<const FUSED: bool>(scores: &mut [[f32; LANES]; KEYS], [from, to]: [&[i32; LANES]; 2], state: &mut State) {
    let all_seen = *from == [0; LANES] && *to == [KEYS as i32; LANES];
    let mut peaks = state.peaks;
    for (key, scores) in scores.iter_mut().enumerate() {
        if !all_seen {
            for lane in 0..LANES {
                let is_seen = (from[lane]..to[lane]).contains(&(key as i32));
                scores[lane] = if is_seen { scores[lane] } else { f32::NEG_INFINITY };
            }
        }
        for lane in 0..LANES {
            // A score that is no number may get lost here: its exponential does not.
            peaks[lane] = larger(scores[lane], peaks[lane]);
        }
    }
    // Where nothing has been seen yet all weights are 0, unless a score is no number.
    let units = peaks.map(|peak| if peak == f32::NEG_INFINITY { 0.0 } else { peak });
    let mut shrinks = [0.0f32; LANES];
    let mut sums = [0.0f32; LANES];
    for lane in 0..LANES {
        shrinks[lane] = exp(state.peaks[lane] - units[lane]);
        sums[lane] = state.sums[lane] * shrinks[lane];
    }
    for scores in scores {
        for lane in 0..LANES {
            scores[lane] = exp(scores[lane] - units[lane]);
        }
        for lane in 0..LANES {
            sums[lane] += scores[lane];
        }
    }
    *state = State { peaks, sums, shrinks };
}

by_level! {
    /// Scores become weights, whose sum is one.
    fn softmax(scores: &mut [f32]) = softmax_body
}

#[inline(always)]
fn softmax_body<const FUSED: bool>(scores: &mut [f32]) {
    let mut peaks = [f32::NEG_INFINITY; LANES];
    let (sixteens, rest) = scores.as_chunks::<LANES>();
    for scores in sixteens {
        for lane in 0..LANES {
            // A score that is no number may get lost here: its exponential does not.
            peaks[lane] = larger(scores[lane], peaks[lane]);
        }
    }
    let peak = rest.iter().chain(&peaks).fold(f32::NEG_INFINITY, |peak, &score| larger(score, peak));
    let mut sums = [0.0f32; LANES];
    let (sixteens, rest) = scores.as_chunks_mut::<LANES>();
    for scores in sixteens {
        for score in scores.iter_mut() {
            *score = exp(*score - peak);
        }
        for lane in 0..LANES {
            sums[lane] += scores[lane];
        }
    }
    for (score, sum) in rest.iter_mut().zip(&mut sums) {
        *score = exp(*score - peak);
        *sum += *score;
    }
    let inverse = 1.0 / sums.iter().sum::<f32>();
    for score in scores {
        *score *= inverse;
    }
}

/// scores [n] = keys [n, padded dim] . query [padded dim] * scale
fn dots(level: Level, keys: &[f32], query: &[[f32; LANES]], scale: f32, scores: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    match level.tier() {
        // SAFETY: a `Level` can only be had where the processor has its instructions.
        Tier::Avx512 => return unsafe { avx512::dots(keys, query, scale, scores) },
        // SAFETY: as above.
        Tier::Avx2 => return unsafe { avx2::dots(keys, query, scale, scores) },
        Tier::Portable => {}
    }
    let _ = level;
    for (score, key) in scores.iter_mut().zip(keys.chunks_exact(query.len() * LANES)) {
        *score = dot::<false>(key, query.as_flattened()) * scale;
    }
}

/// answers [padded dim] += weights [n] . values [n, padded dim]
fn add_weighted(level: Level, values: &[f32], weights: &[f32], answers: &mut [[f32; LANES]]) {
    #[cfg(target_arch = "x86_64")]
    match level.tier() {
        // SAFETY: a `Level` can only be had where the processor has its instructions.
        Tier::Avx512 => return unsafe { avx512::add_weighted(values, weights, answers) },
        // SAFETY: as above.
        Tier::Avx2 => return unsafe { avx2::add_weighted(values, weights, answers) },
        Tier::Portable => {}
    }
    let _ = level;
    for (weight, values) in weights.iter().zip(values.chunks_exact(answers.len() * LANES)) {
        for (answer, value) in answers.as_flattened_mut().iter_mut().zip(values) {
            *answer += weight * value;
        }
    }
}
