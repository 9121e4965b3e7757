//! Every word of a plan and of a result, named once. [`PlanWriter`](super::PlanWriter) and
//! [`PlanView`](super::PlanView) use these places; the binding hands them to Python as
//! `PLAN_FORMAT`, with which a test compares `kernels/step/plan_format.py` and the tables of
//! `docs/plan.md`.

/// Bytes at whose multiples sections begin.
pub const SECTION_ALIGNMENT: usize = 16;
/// Stands for "none" in `mask_row`, `num_logprobs`, `max_logprobs`, `max_prompt_logprobs` and `vector`:
/// -1 as a signed word.
pub const NONE: u32 = u32::MAX;

/// What a word of the header can hold.
trait HeaderWord {
    fn to_word(self) -> u32;
    fn from_word(word: u32) -> Self;
}

impl HeaderWord for u32 {
    fn to_word(self) -> u32 {
        self
    }

    fn from_word(word: u32) -> Self {
        word
    }
}

impl HeaderWord for bool {
    fn to_word(self) -> u32 {
        u32::from(self)
    }

    fn from_word(word: u32) -> Self {
        word != 0
    }
}

impl HeaderWord for Option<u32> {
    fn to_word(self) -> u32 {
        self.unwrap_or(NONE)
    }

    fn from_word(word: u32) -> Self {
        (word != NONE).then_some(word)
    }
}

/// Makes the header: the struct, its words in order, and both ways between them.
macro_rules! header {
    ($($(#[$doc:meta])* $field:ident: $kind:ty,)+) => {
        /// The numbers of one planned step, and where its sections lie: what a plan begins with.
        /// Counts of rows and tokens include padding where they do not say otherwise; offsets are
        /// bytes from the plan's start.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        #[allow(missing_docs)] // Counts of sections and their offsets are named after them.
        pub struct PlanInfo {
            /// Number of the step, from 1. Two words, the low one first.
            pub step_id: u64,
            $($(#[$doc])* pub $field: $kind,)+
        }

        /// The header's words in order.
        pub const HEADER: &[&str] = &["step_id_low", "step_id_high", $(stringify!($field)),+];

        impl PlanInfo {
            pub(super) fn to_words(self) -> [u32; HEADER.len()] {
                [self.step_id as u32, (self.step_id >> 32) as u32, $(self.$field.to_word()),+]
            }

            /// Of its words.
            pub fn from_words(words: [u32; HEADER.len()]) -> Self {
                let [low, high, ..] = words;
                let mut rest = words.into_iter().skip(2);
                let mut next = || rest.next().expect("one word a field");
                Self {
                    step_id: u64::from(low) | u64::from(high) << 32,
                    $($field: HeaderWord::from_word(next()),)+
                }
            }
        }
    };
}

header! {
    /// Rows without padding.
    num_rows: u32,
    /// Records of `rows` and of the result.
    padded_rows: u32,
    /// Decode rows without padding.
    num_decodes: u32,
    padded_decodes: u32,
    /// Tokens of the longest decode row that is no padding, at least 1: the places of a result
    /// record.
    decode_query_len: u32,
    /// Tokens of all decode rows.
    num_decode_tokens: u32,
    num_prefill_tokens: u32,
    /// Tokens of the step.
    num_tokens: u32,
    /// Tokens of its longest row.
    max_query_len: u32,
    /// Upper bound of computed length + query length over all rows.
    max_seq_len: u32,
    /// Most top log probabilities that a row asks for; None where no row asks for any.
    max_logprobs: Option<u32>,
    /// Rows of grammar masks: one for each token that a bounded row may draw.
    num_mask_rows: u32,
    /// Some sampling row has penalties.
    has_penalties: bool,
    /// Every sampling row has temperature 0 and asks for nothing else.
    all_greedy: bool,
    /// Words of one row's result record.
    result_width: u32,
    /// Bytes of the plan.
    num_bytes: u32,
    num_blocks: u32,
    num_enters: u32,
    num_copies: u32,
    num_bias: u32,
    num_drafts: u32,
    num_penalty_tokens: u32,
    rows_offset: u32,
    prefill_tokens_offset: u32,
    blocks_offset: u32,
    enters_offset: u32,
    copies_offset: u32,
    bias_offset: u32,
    drafts_offset: u32,
    penalty_tokens_offset: u32,
    /// Most top log probabilities that a request asks for its prompt, of those with a target in this
    /// step; None where there is no target.
    max_prompt_logprobs: Option<u32>,
    num_prompt_targets: u32,
    prompt_targets_offset: u32,
    /// Vectors of the result.
    num_vectors: u32,
    /// Words of one: the model's hidden size.
    vector_size: u32,
    /// Some record of `pools` has more tokens than its row's last.
    has_wide_pools: bool,
    num_pools: u32,
    pools_offset: u32,
    num_follow_rows: u32,
    num_follow_tokens: u32,
    /// Tokens of the longest of `follow_rows`.
    max_follow_len: u32,
    follow_rows_offset: u32,
    follow_tokens_offset: u32,
}

/// Makes the words of one kind of record: their names in order, and the place of each.
macro_rules! record {
    ($(#[$doc:meta])* $record:ident: $($word:ident),+ $(,)?) => {
        $(#[$doc])*
        #[allow(missing_docs)] // `docs/plan.md` says what each word is.
        pub mod $record {
            pub const NAMES: &[&str] = &[$(stringify!($word)),+];
            pub const WORDS: usize = NAMES.len();
            record!(@place 0; $($word),+);
        }
    };
    (@place $at:expr; $word:ident $(, $rest:ident)*) => {
        pub const $word: usize = $at;
        record!(@place $at + 1; $($rest),*);
    };
    (@place $at:expr;) => {};
}

record! {
    /// One row of the step.
    row: SLOT, QUERY_START, QUERY_LEN, FLAGS, NUM_DRAFTS, MASK_ROW, BIAS_START, BIAS_LEN
}
record! {
    /// One block that a slot's table gains.
    block: GROUP, SLOT, INDEX, ID
}
record! {
    /// One sequence that takes a slot.
    enter: SLOT, COMPUTED_LEN, OUTPUT_INDEX, TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION_PENALTY, PRESENCE_PENALTY,
        FREQUENCY_PENALTY, SEED_LOW, SEED_HIGH, NUM_LOGPROBS, PENALTY_START, PENALTY_LEN, UNUSED
}
record! {
    /// One block copy.
    copy: SOURCE, DESTINATION
}
record! {
    /// One biased token.
    bias: TOKEN, VALUE
}
record! {
    /// One token that the penalties must know.
    penalty: TOKEN, SEEN
}
record! {
    /// One prompt token whose log probabilities are wanted.
    target: PLACE, TARGET
}
record! {
    /// Tokens of one row whose hidden states are part of an embedding.
    pool: SLOT, ROW, START, LEN, BEGINS, COUNT, VECTOR
}
record! {
    /// Tokens of one slot that the model which drafts computes before it drafts; the first six words are
    /// those of a row.
    follow: SLOT, QUERY_START, QUERY_LEN, FLAGS, NUM_DRAFTS, MASK_ROW, START, UNUSED
}
record! {
    /// The start of the result of a prompt target: then come its top ids and their log probabilities.
    target_result: LOGPROB, RANK, TOP
}
record! {
    /// The start of a row's result; from `TOKENS` on there are as many words as the layout says.
    result: STATUS, NUM_VALID, TOKENS
}

/// Makes constants, and the list of their names and values.
macro_rules! values {
    ($(#[$doc:meta])* $list:ident: $($(#[$each:meta])* $name:ident = $value:expr,)+) => {
        $($(#[$each])* pub const $name: u32 = $value;)+

        $(#[$doc])*
        pub const $list: &[(&str, u32)] = &[$((stringify!($name), $name)),+];
    };
}

values! {
    /// Bits of a row's flags.
    ROW_FLAGS:
    /// A token is drawn at the row's last position.
    ROW_SAMPLE = 1,
    /// The row's tokens are in `prefill_tokens`.
    ROW_PREFILL = 2,
    /// Log probabilities are wanted.
    ROW_LOGPROBS = 4,
    /// The slot's penalties apply.
    ROW_PENALTIES = 8,
    /// A padding row of the reserved slot.
    ROW_PADDING = 16,
}

values! {
    /// What a result says of a row.
    STATUSES:
    /// A token was drawn.
    STATUS_OK = 0,
    /// The logits held a NaN or +inf.
    STATUS_NAN = 1,
    /// Every token was masked out.
    STATUS_MASKED = 2,
    /// The row draws no token.
    STATUS_NO_TOKEN = 3,
}
