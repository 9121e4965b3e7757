//! Attention over pages: rotary and the write of keys and values, then the answers of rows that
//! bring one token each.

use super::float::{exp, Brain, Half, Number};
use super::level::{by_level, multiply_add, Level};
use super::pool::Pool;
use super::raw::Writer;
use super::rows::{dot, norm};

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
}

impl Pages<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Single(pages) => pages.len(),
            Self::Half(pages) => pages.len(),
            Self::Brain(pages) => pages.len(),
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
    /// [rows]: keys of each row, its new one included; 0 is answered by zeros.
    pub seq_lens: &'a [i32],
}

impl Attention {
    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Numbers of one head in one block of `pages`.
    fn page(&self) -> usize {
        self.block_size * self.head_dim
    }

    /// Why a step cannot be computed.
    ///
    /// # Errors
    /// Names the field that points to memory that is not there.
    pub fn check(&self, step: &Step<'_>) -> Result<(), String> {
        let tokens = step.positions.len();
        let block = 2 * self.kv_heads * self.page();
        if step.qkv.len() != tokens * self.width() {
            return Err(format!("qkv: {} numbers for {tokens} tokens, each has {}", step.qkv.len(), self.width()));
        }
        if !step.pages.len().is_multiple_of(block) {
            return Err(format!("kv_cache: {} numbers are not blocks of {block}", step.pages.len()));
        }
        let (half, blocks) = (step.rotary_dim / 2, step.pages.len() / block);
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
        for (&slot, &len) in step.row_slots.iter().zip(step.seq_lens) {
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

    /// Rotates q and k of all tokens, writes k and v into their pages, then answers the first
    /// `row_slots.len()` tokens, each a row: out [rows, heads * head dim].
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn run(&self, pool: &Pool, step: &Step<'_>, out: &mut [f32]) -> Result<(), String> {
        self.check(step)?;
        let (tokens, rows, answer) = (step.positions.len(), step.row_slots.len(), self.heads * self.head_dim);
        if out.len() != rows * answer {
            return Err(format!("out: {} numbers for {rows} rows of {answer}", out.len()));
        }
        let rotate = |token: usize| rotate(self.level, self, step, token);
        if tokens <= ALONE {
            (0..tokens).for_each(rotate);
        } else {
            pool.run(tokens, &rotate);
        }
        let (out, group) = (Writer::new(out), answer / self.kv_heads);
        let answer_one = |piece: usize| {
            let (row, kv_head) = (piece / self.kv_heads, piece % self.kv_heads);
            // SAFETY: a piece is one thread's, and their answers do not overlap; queries are only read now.
            let (out, queries) = unsafe {
                (
                    out.part(row * answer + kv_head * group, group),
                    step.qkv.part(row * self.width() + kv_head * group, group),
                )
            };
            SCORES.with_borrow_mut(|scores| attend(self.level, self, step, row, kv_head, queries, scores, out));
        };
        pool.run(rows * self.kv_heads, &answer_one);
        Ok(())
    }
}

thread_local! {
    static SCORES: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) };
}

by_level! {
    fn rotate(attention: &Attention, step: &Step<'_>, token: usize) = rotate_body
}

by_level! {
    fn attend(
        attention: &Attention,
        step: &Step<'_>,
        row: usize,
        kv_head: usize,
        queries: &[f32],
        scores: &mut Vec<f32>,
        out: &mut [f32],
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
    match step.pages {
        Pages::Single(pages) => write_page(attention, pages, slot, keys, values),
        Pages::Half(pages) => write_page(attention, pages, slot, keys, values),
        Pages::Brain(pages) => write_page(attention, pages, slot, keys, values),
    }
}

#[inline(always)]
fn norm_in_place<const FUSED: bool>(head: &mut [f32], weight: &[f32], eps: f32) {
    let mut normed = [0.0; 512];
    let normed = &mut normed[..head.len()];
    norm::<FUSED>(head, weight, eps, normed);
    head.copy_from_slice(normed);
}

#[inline(always)]
fn write_page<N: Number>(attention: &Attention, pages: Writer<'_, N>, slot: usize, keys: &[f32], values: &[f32]) {
    let (dim, page) = (attention.head_dim, attention.page());
    let (block, place) = (slot / attention.block_size, slot % attention.block_size);
    for (kind, heads) in [keys, values].into_iter().enumerate() {
        for (number, head) in heads.chunks_exact(dim).enumerate() {
            let start = ((block * 2 + kind) * attention.kv_heads + number) * page + place * dim;
            // SAFETY: a token has a place of its own, but in the null block, whose numbers mean nothing.
            let stored = unsafe { pages.part(start, dim) };
            for (stored, number) in stored.iter_mut().zip(head) {
                *stored = N::narrow(*number);
            }
        }
    }
}

/// The answers of the heads that share one head of keys and values.
#[inline(always)]
fn attend_body<const FUSED: bool>(
    attention: &Attention,
    step: &Step<'_>,
    row: usize,
    kv_head: usize,
    queries: &[f32],
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    match step.pages {
        Pages::Single(pages) => attend_of::<FUSED, _>(attention, step, pages, row, kv_head, queries, scores, out),
        Pages::Half(pages) => attend_of::<FUSED, _>(attention, step, pages, row, kv_head, queries, scores, out),
        Pages::Brain(pages) => attend_of::<FUSED, _>(attention, step, pages, row, kv_head, queries, scores, out),
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn attend_of<const FUSED: bool, N: Number>(
    attention: &Attention,
    step: &Step<'_>,
    pages: Writer<'_, N>,
    row: usize,
    kv_head: usize,
    queries: &[f32],
    scores: &mut Vec<f32>,
    out: &mut [f32],
) {
    let (dim, size) = (attention.head_dim, attention.block_size);
    let len = step.seq_lens[row] as usize;
    out.fill(0.0);
    let first = if attention.window == 0 { 0 } else { len.saturating_sub(attention.window) };
    let keys = len - first;
    if keys == 0 {
        return;
    }
    let table = &step.table[step.row_slots[row] as usize * step.table_width..][..step.table_width];
    // The page of keys (0) or values (1), and which of its places are seen.
    let part_of = |block: usize, kind: usize| {
        let from = first.max(block * size) - block * size;
        let to = len.min((block + 1) * size) - block * size;
        let start = ((table[block] as usize * 2 + kind) * attention.kv_heads + kv_head) * size * dim;
        // SAFETY: all writes of this step have returned, and nobody else writes pages.
        unsafe { &*pages.part(start + from * dim, (to - from) * dim) }
    };
    let group = queries.len() / dim;
    scores.clear();
    scores.resize(group * keys, 0.0);
    let mut wide = [0.0f32; 512];
    let wide = &mut wide[..dim];
    let mut at = 0;
    for block in first / size..len.div_ceil(size) {
        for key in part_of(block, 0).chunks_exact(dim) {
            for (wide, number) in wide.iter_mut().zip(key) {
                *wide = number.widen();
            }
            for (head, query) in queries.chunks_exact(dim).enumerate() {
                scores[head * keys + at] = dot::<FUSED>(query, wide) * attention.scale;
            }
            at += 1;
        }
    }
    for scores in scores.chunks_exact_mut(keys) {
        softmax(scores);
    }
    at = 0;
    for block in first / size..len.div_ceil(size) {
        for value in part_of(block, 1).chunks_exact(dim) {
            for (wide, number) in wide.iter_mut().zip(value) {
                *wide = number.widen();
            }
            for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                let weight = scores[head * keys + at];
                for (out, value) in out.iter_mut().zip(&*wide) {
                    *out = multiply_add::<FUSED>(weight, *value, *out);
                }
            }
            at += 1;
        }
    }
}

#[inline(always)]
fn softmax(scores: &mut [f32]) {
    let mut peak = f32::NEG_INFINITY;
    for &score in &*scores {
        peak = if score > peak { score } else { peak };
    }
    for score in &mut *scores {
        *score = exp(*score - peak);
    }
    let sum: f32 = scores.iter().sum();
    for score in scores {
        *score /= sum;
    }
}
