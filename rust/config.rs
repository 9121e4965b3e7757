//! What the core is told once, at the start. Checked here, so that nothing is checked in a step.

use crate::error::Error;

/// Which waiting requests may join the running ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Batching {
    /// A request joins as soon as a place and blocks are free.
    #[default]
    Continuous,
    /// A batch forms (`max_num_seqs` waiting, or `static_batch_wait` seconds), then runs to its end
    /// alone.
    Static,
    /// One request at a time.
    None,
}

/// Who goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SchedulingPolicy {
    /// First come, first served; priorities are ignored.
    #[default]
    Fcfs,
    /// Lower `priority` values first; each `priority_aging` seconds of waiting are worth one unit.
    Priority,
}

/// From where drafts come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpeculationMethod {
    /// What came after the latest place in the sequence's own text that reads as its end.
    Ngram,
    /// What most such places say, in its own text and in earlier outputs of its tenant.
    Suffix,
    /// A model on the device, in the step that verifies them: the core says how many there are, and
    /// never learns which.
    Model,
}

impl SpeculationMethod {
    /// Whether the device makes the drafts. Otherwise the core does, out of text that it knows.
    pub fn is_on_device(self) -> bool {
        self == Self::Model
    }
}

/// Speculative decoding; the fields are the keys of `SpeculativeConfig` in Python.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speculation {
    /// From where drafts come.
    pub method: SpeculationMethod,
    /// Tokens that must be the same, at least.
    pub lookup_min: u32,
    /// Tokens that are compared, at most.
    pub lookup_max: u32,
    /// Drafts that follow a match of one token, at most; of suffixes.
    pub max_spec_factor: f32,
    /// Drafts are this sure at least, by how often their text went on so; of suffixes.
    pub min_token_prob: f32,
    /// Tokens of earlier outputs that are kept; of suffixes.
    pub max_cached_tokens: u32,
    /// Whether only as many drafts are verified as pay. Without, all that there are: that is there
    /// to be compared with, and for tests.
    pub adaptive: bool,
    /// The model that drafts has keys and values of its own, and so must have computed all tokens before
    /// those that it drafts.
    pub follows: bool,
}

impl Default for Speculation {
    fn default() -> Self {
        Self {
            method: SpeculationMethod::Ngram,
            lookup_min: 2,
            lookup_max: 5,
            max_spec_factor: 1.0,
            min_token_prob: 0.1,
            max_cached_tokens: 1 << 20,
            adaptive: true,
            follows: false,
        }
    }
}

impl Speculation {
    fn check(&self, num_draft_tokens: u32) -> Result<(), Error> {
        if num_draft_tokens == 0 {
            return Err(Error::invalid("num_speculative_tokens", 0, "at least 1"));
        }
        if !(1..=64).contains(&self.lookup_min) {
            return Err(Error::invalid("prompt_lookup_min", self.lookup_min, "from 1 to 64"));
        }
        if !(self.lookup_min..=256).contains(&self.lookup_max) {
            let limit = format!("from prompt_lookup_min = {} to 256", self.lookup_min);
            return Err(Error::invalid("prompt_lookup_max", self.lookup_max, limit));
        }
        if !(self.max_spec_factor > 0.0 && self.max_spec_factor.is_finite()) {
            return Err(Error::invalid("suffix_decoding_max_spec_factor", self.max_spec_factor, "above 0"));
        }
        if !(0.0..=1.0).contains(&self.min_token_prob) {
            return Err(Error::invalid("suffix_decoding_min_token_prob", self.min_token_prob, "from 0 to 1"));
        }
        Ok(())
    }
}

/// Configuration of a [`Scheduler`](crate::scheduler::Scheduler). The fields are those of
/// `EngineCore` in `_core.pyi`.
#[derive(Debug, Clone, PartialEq)]
pub struct CoreConfig {
    /// Blocks of the KV pool, the null block 0 included.
    pub num_blocks: u32,
    /// Tokens a block holds.
    pub block_size: u32,
    /// One entry a KV group: 0 for full attention, else the sliding window in tokens.
    pub kv_windows: Vec<u32>,
    /// Request slots; the slot `max_num_seqs` itself is reserved for padding rows.
    pub max_num_seqs: u32,
    /// Token budget of one step.
    pub max_num_batched_tokens: u32,
    /// Longest prompt plus output.
    pub max_model_len: u32,
    /// Token ids are below this.
    pub vocab_size: u32,
    /// Numbers of a hidden state, which is what an embedding is made of; 0: there are no embeddings.
    pub vector_size: u32,
    /// Tokens that end a sequence unless it asks to ignore them.
    pub eos_token_ids: Vec<u32>,
    /// Requests that may wait for their first admission.
    pub max_waiting: usize,
    /// Which waiting requests may join.
    pub batching: Batching,
    /// Who goes first.
    pub scheduling_policy: SchedulingPolicy,
    /// Whether finished and shared blocks are found again by their content.
    pub enable_prefix_caching: bool,
    /// Whether a prompt may be computed over several steps.
    pub enable_chunked_prefill: bool,
    /// Captured sizes, in rows of one token, to which a step of decodes only is padded.
    pub graph_sizes: Vec<u32>,
    /// Captured sizes to which a step of decodes only is padded where some row has drafts.
    pub draft_graphs: Vec<DecodeShape>,
    /// Captured sizes to which a step with prompt tokens is padded.
    pub prefill_graphs: PrefillGraphs,
    /// Most draft tokens a decode row may carry.
    pub num_draft_tokens: u32,
    /// Speculative decoding; None: drafts come from [`set_drafts`](crate::scheduler::Scheduler::set_drafts) alone.
    pub speculation: Option<Speculation>,
    /// How often a sequence may have been preempted and still give its place to a better rank.
    pub max_preemptions: u32,
    /// Whether a sequence is admitted only if there will be room for its growth as well. Without, as
    /// soon as what is known of it fits: that is there to be compared with, and to have sequences
    /// preempted in tests.
    pub admits_by_growth: bool,
    /// Seconds of waiting that are worth one unit of priority.
    pub priority_aging: f64,
    /// Longest wait, in seconds, of the first request of a static batch.
    pub static_batch_wait: f64,
    /// Secret key of the prefix hashes.
    pub hash_secret: [u8; 32],
    /// From which requests that give no seed get theirs.
    pub seed: u64,
}

/// The decode rows of a captured step whose rows differ in their numbers of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DecodeShape {
    /// Tokens of all its rows.
    pub tokens: u32,
    /// Its rows.
    pub rows: u32,
}

/// Captured steps with prompt tokens: one for each pair of `tokens` with one of `decodes` or
/// `draft_decodes`, each with `rows` prefill rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PrefillGraphs {
    /// Numbers of prompt tokens; none: no step with prompt tokens is padded.
    pub tokens: Vec<u32>,
    /// Numbers of decode rows of one token; 0 for prompts alone.
    pub decodes: Vec<u32>,
    /// Decode rows of which some have drafts.
    pub draft_decodes: Vec<DecodeShape>,
    /// Prefill rows of each, the last of which is always padding.
    pub rows: u32,
}

impl Default for CoreConfig {
    /// The defaults of `_core.pyi`; the sizes without a default there are those of a small test.
    fn default() -> Self {
        Self {
            num_blocks: 64,
            block_size: 16,
            kv_windows: vec![0],
            max_num_seqs: 8,
            max_num_batched_tokens: 256,
            max_model_len: 512,
            vocab_size: 1024,
            vector_size: 0,
            eos_token_ids: Vec::new(),
            max_waiting: 1024,
            batching: Batching::Continuous,
            scheduling_policy: SchedulingPolicy::Fcfs,
            enable_prefix_caching: true,
            enable_chunked_prefill: true,
            graph_sizes: Vec::new(),
            draft_graphs: Vec::new(),
            prefill_graphs: PrefillGraphs::default(),
            num_draft_tokens: 0,
            speculation: None,
            max_preemptions: 3,
            admits_by_growth: true,
            priority_aging: 60.0,
            static_batch_wait: 0.1,
            hash_secret: [0; 32],
            seed: 0,
        }
    }
}

/// Bound of every length and count, so that sums of a few of them fit into the plan's 32-bit words.
const MAX_COUNT: u32 = 1 << 28;

impl CoreConfig {
    /// Whether the model has end tokens.
    pub fn has_ends(&self) -> bool {
        !self.eos_token_ids.is_empty()
    }

    /// Checks every field and brings lists into their canonical order.
    ///
    /// # Errors
    /// [`Error::InvalidValue`] that names the field, its value and its limit.
    pub fn checked(mut self) -> Result<Self, Error> {
        let in_range = |field, value: u32, least: u32| {
            if (least..=MAX_COUNT).contains(&value) {
                Ok(())
            } else {
                Err(Error::invalid(field, value, format!("from {least} to {MAX_COUNT}")))
            }
        };
        in_range("num_blocks", self.num_blocks, 2)?;
        in_range("block_size", self.block_size, 1)?;
        in_range("max_num_seqs", self.max_num_seqs, 1)?;
        in_range("max_model_len", self.max_model_len, 2)?;
        in_range("vocab_size", self.vocab_size, 1)?;
        in_range("vector_size", self.vector_size, 0)?;
        if self.num_draft_tokens > 64 {
            return Err(Error::invalid("num_draft_tokens", self.num_draft_tokens, "at most 64"));
        }
        // Each running sequence must be able to take a decode row in every step.
        in_range("max_num_batched_tokens", self.max_num_batched_tokens, 1 + self.num_draft_tokens)?;
        if !self.enable_chunked_prefill && self.max_num_batched_tokens < self.max_model_len {
            return Err(Error::invalid(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                format!("at least max_model_len = {} when chunked prefill is off", self.max_model_len),
            ));
        }
        if self.kv_windows.is_empty() || self.kv_windows.len() > 1024 {
            return Err(Error::invalid(
                "kv_windows",
                format!("a list of {}", self.kv_windows.len()),
                "a list of 1 to 1024",
            ));
        }
        if let Some(window) = self.kv_windows.iter().find(|window| **window > MAX_COUNT) {
            return Err(Error::invalid("kv_windows", window, format!("at most {MAX_COUNT}")));
        }
        if let Some(token) = self.eos_token_ids.iter().find(|token| **token >= self.vocab_size) {
            return Err(Error::invalid("eos_token_ids", token, format!("below vocab_size = {}", self.vocab_size)));
        }
        if let Some(speculation) = &self.speculation {
            speculation.check(self.num_draft_tokens)?;
        }
        if self.max_waiting == 0 {
            return Err(Error::invalid("max_waiting", 0, "at least 1"));
        }
        if self.graph_sizes.contains(&0) {
            return Err(Error::invalid("graph_sizes", 0, "at least 1"));
        }
        for (field, shapes) in
            [("draft_graphs", &self.draft_graphs), ("prefill_draft_graphs", &self.prefill_graphs.draft_decodes)]
        {
            if let Some(shape) = shapes.iter().find(|shape| shape.rows == 0 || shape.tokens == 0) {
                return Err(Error::invalid(field, format!("{shape:?}"), "at least 1 row and 1 token"));
            }
        }
        if self.prefill_graphs.tokens.contains(&0) {
            return Err(Error::invalid("prefill_graph_tokens", 0, "at least 1"));
        }
        in_range("prefill_graph_rows", self.prefill_graphs.rows, 0)?;
        if !(self.priority_aging > 0.0 && self.priority_aging.is_finite()) {
            return Err(Error::invalid("priority_aging", self.priority_aging, "a finite number of seconds above 0"));
        }
        if !(self.static_batch_wait >= 0.0 && self.static_batch_wait.is_finite()) {
            return Err(Error::invalid(
                "static_batch_wait",
                self.static_batch_wait,
                "a finite number of seconds from 0",
            ));
        }
        self.eos_token_ids.sort_unstable();
        self.eos_token_ids.dedup();
        for sizes in [&mut self.graph_sizes, &mut self.prefill_graphs.tokens, &mut self.prefill_graphs.decodes] {
            sizes.sort_unstable();
            sizes.dedup();
        }
        for shapes in [&mut self.draft_graphs, &mut self.prefill_graphs.draft_decodes] {
            shapes.sort_unstable();
        }
        Ok(self)
    }

    /// Number of KV groups.
    pub fn num_groups(&self) -> usize {
        self.kv_windows.len()
    }

    /// Sequences that may run at once: all of them must fit a decode row into the token budget.
    pub fn max_running(&self) -> usize {
        self.max_num_seqs.min(self.max_num_batched_tokens / (1 + self.num_draft_tokens)) as usize
    }

    /// Most rows of one step, padding included: a captured step may have more than there are
    /// sequences.
    pub fn max_rows(&self) -> u32 {
        let with_drafts = self.draft_graphs.iter().chain(&self.prefill_graphs.draft_decodes).map(|shape| shape.rows);
        with_drafts.fold(self.max_num_seqs, u32::max) + self.prefill_graphs.rows
    }

    /// Entries of a slot's block table in each group: the longest sequence, with room for rejected
    /// drafts.
    pub fn max_blocks_per_seq(&self) -> usize {
        (self.max_model_len + self.num_draft_tokens).div_ceil(self.block_size) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_bad_field_is_named() {
        let good = CoreConfig::default;
        assert!(good().checked().is_ok());
        for (field, bad) in [
            ("num_blocks", CoreConfig { num_blocks: 1, ..good() }),
            ("block_size", CoreConfig { block_size: 0, ..good() }),
            ("kv_windows", CoreConfig { kv_windows: vec![], ..good() }),
            ("max_num_seqs", CoreConfig { max_num_seqs: 0, ..good() }),
            ("max_num_batched_tokens", CoreConfig { max_num_batched_tokens: 4, num_draft_tokens: 4, ..good() }),
            (
                "max_num_batched_tokens",
                CoreConfig { max_num_batched_tokens: 511, enable_chunked_prefill: false, ..good() },
            ),
            ("max_model_len", CoreConfig { max_model_len: 1, ..good() }),
            ("vocab_size", CoreConfig { vocab_size: u32::MAX, ..good() }),
            ("eos_token_ids", CoreConfig { eos_token_ids: vec![1024], ..good() }),
            ("max_waiting", CoreConfig { max_waiting: 0, ..good() }),
            ("graph_sizes", CoreConfig { graph_sizes: vec![1, 0], ..good() }),
            (
                "prefill_graph_tokens",
                CoreConfig { prefill_graphs: PrefillGraphs { tokens: vec![0], ..PrefillGraphs::default() }, ..good() },
            ),
            ("draft_graphs", CoreConfig { draft_graphs: vec![DecodeShape { rows: 2, tokens: 0 }], ..good() }),
            (
                "num_speculative_tokens",
                CoreConfig { speculation: Some(Speculation::default()), num_draft_tokens: 0, ..good() },
            ),
            (
                "prompt_lookup_max",
                CoreConfig {
                    speculation: Some(Speculation { lookup_max: 1, ..Speculation::default() }),
                    num_draft_tokens: 1,
                    ..good()
                },
            ),
            ("priority_aging", CoreConfig { priority_aging: 0.0, ..good() }),
            ("static_batch_wait", CoreConfig { static_batch_wait: f64::NAN, ..good() }),
        ] {
            match bad.checked() {
                Err(Error::InvalidValue { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }
}
