//! What the scheduler knows of one sequence.

use std::sync::Arc;

use super::lengths::Ending;
use super::masks::Following;
use super::waits::Spell;
use crate::block_table::BlockTable;
use crate::plan::{ROW_LOGPROBS, ROW_PENALTIES, ROW_SAMPLE};
use crate::policy::{Lane, Order};
use crate::prefix_cache::PrefixHasher;
use crate::request::{Pooling, SamplingParams, SeqRef};
use crate::speculation::Drafter;

/// Where a sequence is. It is in exactly one of these, and finishes once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Behind other prompts of its call, of which one stands in the queue at a time.
    Behind,
    /// A choice after the first, until the first one has computed the prompt.
    Forming,
    /// In the waiting queue: new, or preempted.
    Waiting,
    /// In the running batch: it has a slot and blocks.
    Running,
    /// Told to the sink. It stays only until no step in flight has a row of it.
    Finished,
}

/// What every step asks of the sampling parameters, beside the sequence's own state: they lie
/// elsewhere in memory, and a step of a thousand rows is bound by that.
#[derive(Debug, Clone, Copy)]
#[allow(clippy::struct_excessive_bools)] // Independent answers, each asked on its own.
pub(super) struct Traits {
    /// Flags of each row that ends with its last known token.
    pub row_flags: u32,
    /// Output tokens before which no end token may come.
    pub min_tokens: u32,
    pub greedy: bool,
    pub has_bias: bool,
    pub has_choices: bool,
    pub ignore_eos: bool,
    pub has_stop_tokens: bool,
    pub wants_prompt: bool,
    /// It ends with an embedding of its prompt, and draws nothing.
    pub pooling: Option<Pooling>,
    /// A grammar bounds it.
    pub has_grammar: bool,
    /// That may be over where no end token can be drawn.
    pub ends_unasked: bool,
    pub ending: Ending,
}

impl Traits {
    /// `has_ends`: the model has end tokens.
    pub fn new(params: &SamplingParams, has_ends: bool) -> Self {
        let logprobs = if params.logprobs.is_some() { ROW_LOGPROBS } else { 0 };
        let penalties = if params.has_penalties() { ROW_PENALTIES } else { 0 };
        let grammar_ends = params.grammar.as_ref().is_some_and(|grammar| grammar.0.has_end());
        let may_stop =
            grammar_ends || !params.ignore_eos || !params.stop_token_ids.is_empty() || !params.stop.is_empty();
        Self {
            row_flags: if params.pooling.is_some() { 0 } else { ROW_SAMPLE | logprobs | penalties },
            // Without end tokens there is nothing that may not be drawn yet.
            min_tokens: if params.ignore_eos && params.stop_token_ids.is_empty() { 0 } else { params.min_tokens },
            greedy: params.temperature == 0.0,
            has_choices: params.n > 1,
            has_bias: !params.logit_bias.is_empty(),
            ignore_eos: params.ignore_eos,
            has_stop_tokens: !params.stop_token_ids.is_empty(),
            wants_prompt: params.prompt_logprobs.is_some(),
            pooling: params.pooling,
            has_grammar: params.grammar.is_some(),
            ends_unasked: grammar_ends && (params.ignore_eos || !has_ends),
            ending: if may_stop || params.max_tokens.is_none() { Ending::Open } else { Ending::Known },
        }
    }
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub name: SeqRef,
    /// Number of its request.
    pub request: u32,
    pub order: Order,
    /// Lower goes first; 0 where the policy does not ask.
    pub priority: i32,
    pub params: Arc<SamplingParams>,
    pub traits: Traits,
    pub seed: u64,
    pub prompt: Arc<[u32]>,
    pub outputs: Vec<u32>,
    /// Output tokens at most, by the request, the model's length and the pool.
    pub max_tokens: u32,
    pub state: State,
    /// Where it waits, or waited last.
    pub lane: Lane,
    /// Valid while it runs.
    pub slot: u32,
    /// One a KV group.
    pub tables: Vec<BlockTable>,
    /// Tokens that the tables have places for.
    pub covered_len: u32,
    /// The tables have entries that the device has not been told about.
    pub has_unsent: bool,
    /// Chained hashes of its full blocks, as far as they have been needed; the root is that of an
    /// empty prefix.
    pub hashes: Vec<u128>,
    pub root: u128,
    /// Leading blocks that are findable, or were offered.
    pub num_registered: usize,
    /// Tokens whose keys and values are in its blocks, by the steps committed.
    pub computed_len: u32,
    /// The same once the steps in flight have run: at least, and at most. They differ while drafts
    /// are undecided.
    pub least_len: u32,
    pub most_len: u32,
    /// Tokens that the steps in flight will draw, at least.
    pub pending: u32,
    /// Rows in the steps in flight.
    pub in_flight: u32,
    /// The last step it took part in; what it gives back is held until that one is committed.
    pub last_step: u64,
    /// How often it has entered a slot; tells rows of this time from those before a preemption.
    pub run: u32,
    /// All that is known has been computed or is in flight, and the device holds its last token.
    pub decoding: bool,
    pub preemptions: u32,
    /// Blocks that others held already when it joined.
    pub num_shared: usize,
    /// Where its output is in the [`Lengths`](super::lengths::Lengths), and the last length there.
    pub length_bin: u32,
    pub bin_end: u32,
    /// Its waiting, and what it has put out, as far as its story does not tell it yet.
    pub spell: Spell,
    /// Sequences admitted past it while it did not fit.
    pub bypassed: u32,
    /// For its next decode row.
    pub drafts: Vec<u32>,
    /// The last tokens before it, once the steps in flight have run, of which the model that drafts has no
    /// keys and values, and the first of these, which it computes in the step being planned.
    pub unfollowed: u32,
    pub follow_len: u32,
    /// Leading blocks that the pool knows to be followed.
    pub num_followed: usize,
    /// Foretells its tokens while it decodes, where that is wanted.
    pub drafter: Option<Box<Drafter>>,
    /// Its place in the grammar that bounds it.
    pub following: Option<Following>,
}

impl Sequence {
    /// Blocks in its tables.
    pub fn num_live(&self) -> usize {
        self.tables.iter().map(BlockTable::num_live).sum()
    }

    /// Tokens that are known: prompt and outputs.
    pub fn known_len(&self) -> u32 {
        (self.prompt.len() + self.outputs.len()) as u32
    }

    /// Whether another decode row can bring it forward, by what is known: `max_tokens` may be
    /// reached in flight.
    pub fn wants_decode(&self, max_model_len: u32) -> bool {
        self.decoding && self.outputs.len() as u32 + self.pending < self.max_tokens && self.most_len < max_model_len
    }

    /// Tokens of its next decode row: its last one, and the drafts that there is room for.
    pub fn decode_len(&self, max_model_len: u32) -> u32 {
        // Which tokens are banned depends on their index, which accepted drafts would blur. Nor may a
        // grammar be over behind a draft where no end token can be drawn.
        let room =
            if self.below_min_tokens() || self.traits.ends_unasked { 0 } else { max_model_len - self.most_len - 1 };
        1 + room.min(self.drafts.len() as u32)
    }

    /// Whether its next token is too early to stop.
    pub fn below_min_tokens(&self) -> bool {
        (self.outputs.len() as u32 + self.pending) < self.traits.min_tokens
    }

    /// Calls `visit` with the tokens from `start` to `end`: one or two slices.
    pub fn with_tokens(&self, start: usize, end: usize, mut visit: impl FnMut(&[u32])) {
        let prompt = self.prompt.len();
        if start < prompt {
            visit(&self.prompt[start..end.min(prompt)]);
        }
        if end > prompt {
            visit(&self.outputs[start.max(prompt) - prompt..end - prompt]);
        }
    }

    /// Hashes its blocks up to `count`, which must be full. `scratch` is for a block that spans
    /// prompt and output.
    pub fn hash_blocks(&mut self, hasher: &PrefixHasher, block_size: usize, count: usize, scratch: &mut Vec<u32>) {
        while self.hashes.len() < count {
            let parent = self.hashes.last().copied().unwrap_or(self.root);
            let start = self.hashes.len() * block_size;
            scratch.clear();
            self.with_tokens(start, start + block_size, |tokens| scratch.extend_from_slice(tokens));
            self.hashes.push(hasher.chain(parent, scratch));
        }
    }
}
