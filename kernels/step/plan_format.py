"""Places of the words in a plan and in a result, and the values of flags and statuses:
docs/plan.md.

A plan is a buffer of little-endian 32-bit words that begins with its header, `Plan`. Shared by the
kernels and their twins; a test compares everything here with the core's own names
(`octavo._core.PLAN_FORMAT`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Plan(NamedTuple):
    """The header of a plan: the numbers of one step, a 32-bit word a field, in order.

    Counts of rows and tokens include padding where they do not say otherwise. Offsets are bytes
    from the plan's start.
    """

    step_id_low: int
    step_id_high: int
    num_rows: int  # without padding
    padded_rows: int  # records of `rows` and of the result
    num_decodes: int  # decode rows without padding
    padded_decodes: int
    decode_query_len: int  # of the longest decode row that is no padding, at least 1: the places of a result record
    num_decode_tokens: int  # of all decode rows
    num_prefill_tokens: int
    num_tokens: int
    max_query_len: int  # over all rows
    max_seq_len: int  # upper bound of computed length + query length over all rows
    max_logprobs: int  # most top tokens that a row asks for; -1 where no row asks for logprobs
    num_mask_rows: int  # rows of grammar masks: one for each token that a bounded row may draw
    has_penalties: int  # 0 or 1, as the next
    all_greedy: int  # every sampling row has temperature 0 and asks for nothing else: argmax suffices
    result_width: int  # words of one row's result record
    num_bytes: int  # of the plan
    num_blocks: int
    num_enters: int
    num_copies: int
    num_bias: int
    num_drafts: int
    num_penalty_tokens: int
    rows_offset: int
    prefill_tokens_offset: int
    blocks_offset: int
    enters_offset: int
    copies_offset: int
    bias_offset: int
    drafts_offset: int
    penalty_tokens_offset: int
    max_prompt_logprobs: int  # most top tokens that a request asks for its prompt; -1 where there are no targets
    num_prompt_targets: int
    prompt_targets_offset: int
    num_vectors: int  # of the result
    vector_size: int  # words of one: the model's hidden size
    has_wide_pools: int  # 0 or 1: some record of `pools` has more tokens than its row's last
    num_pools: int
    pools_offset: int
    num_follow_rows: int
    num_follow_tokens: int
    max_follow_len: int  # tokens of the longest of `follow_rows`
    follow_rows_offset: int
    follow_tokens_offset: int

    @classmethod
    def read(cls, plan: npt.NDArray[np.uint8]) -> Plan:
        """The header of a plan, uint8 [at least its bytes]. A microsecond or two."""
        return cls._make(plan[:HEADER_BYTES].view(np.int32).tolist())

    @property
    def step_id(self) -> int:
        """Number of the step, from 1."""
        return (self.step_id_low & 0xFFFFFFFF) | self.step_id_high << 32

    @property
    def num_prefills(self) -> int:
        """Prefill rows, padding included."""
        return self.padded_rows - self.padded_decodes

    @property
    def target_width(self) -> int:
        """Words of the result record of one prompt target."""
        return TARGET_RESULT_TOP + 2 * self.max_prompt_logprobs

    @property
    def result_words(self) -> int:
        """Words of the whole result: rows, then prompt targets, then vectors."""
        return self.vectors_start + self.num_vectors * self.vector_size

    @property
    def vectors_start(self) -> int:
        """Word of the result at which its vectors begin."""
        return self.padded_rows * self.result_width + self.num_prompt_targets * self.target_width

    @property
    def needs_all_hidden(self) -> bool:
        """Hidden states are needed of other tokens than those that logits are made of."""
        return self.num_prompt_targets > 0 or self.has_wide_pools != 0


HEADER_BYTES = 4 * len(Plan._fields)

ROW_WORDS = 8
ROW_SLOT, ROW_QUERY_START, ROW_QUERY_LEN, ROW_FLAGS, ROW_NUM_DRAFTS, ROW_MASK_ROW, ROW_BIAS_START, ROW_BIAS_LEN = range(
    ROW_WORDS
)

SAMPLE = 1  # a token is drawn at the row's last position
PREFILL = 2  # the row's tokens are in `prefill_tokens`
LOGPROBS = 4
PENALTIES = 8
PADDING = 16

BLOCK_WORDS = 4
BLOCK_GROUP, BLOCK_SLOT, BLOCK_INDEX, BLOCK_ID = range(BLOCK_WORDS)

ENTER_WORDS = 16
(
    ENTER_SLOT,
    ENTER_COMPUTED_LEN,
    ENTER_OUTPUT_INDEX,
    ENTER_TEMPERATURE,
    ENTER_TOP_K,
    ENTER_TOP_P,
    ENTER_MIN_P,
    ENTER_REPETITION_PENALTY,
    ENTER_PRESENCE_PENALTY,
    ENTER_FREQUENCY_PENALTY,
    ENTER_SEED_LOW,
    ENTER_SEED_HIGH,
    ENTER_NUM_LOGPROBS,
    ENTER_PENALTY_START,
    ENTER_PENALTY_LEN,
    ENTER_UNUSED,
) = range(ENTER_WORDS)

PAIR_WORDS = 2  # of one record of `copies`, `bias`, `penalty_tokens` or `prompt_targets`
COPY_SOURCE, COPY_DESTINATION = range(PAIR_WORDS)
BIAS_TOKEN, BIAS_VALUE = range(PAIR_WORDS)
PENALTY_TOKEN, PENALTY_SEEN = range(PAIR_WORDS)
TARGET_PLACE, TARGET_TARGET = range(PAIR_WORDS)

POOL_WORDS = 7
POOL_SLOT, POOL_ROW, POOL_START, POOL_LEN, POOL_BEGINS, POOL_COUNT, POOL_VECTOR = range(POOL_WORDS)
NO_VECTOR = -1  # the sum is not complete

FOLLOW_WORDS = 8  # the first six are those of a row
(
    FOLLOW_SLOT,
    FOLLOW_QUERY_START,
    FOLLOW_QUERY_LEN,
    FOLLOW_FLAGS,
    FOLLOW_NUM_DRAFTS,
    FOLLOW_MASK_ROW,
    FOLLOW_START,
    FOLLOW_UNUSED,
) = range(FOLLOW_WORDS)

STATUS_OK = 0
STATUS_NAN = 1  # NaN or +inf in the row's logits: nothing is drawn
STATUS_MASKED = 2  # every token is at -inf: nothing is drawn
STATUS_NO_TOKEN = 3  # the row asked for no token

RESULT_STATUS, RESULT_NUM_VALID, RESULT_TOKENS = range(3)
TARGET_RESULT_LOGPROB, TARGET_RESULT_RANK, TARGET_RESULT_TOP = range(3)

GREEDY_TEMPERATURE = 1e-5  # below it the highest logit wins, as in vLLM


def result_columns(positions: int, top: int) -> tuple[int, int, int, int, int]:
    """First word of tokens, logprobs, ranks, top ids and top logprobs in a result record.

    `positions` is 1 + k tokens a row, `top` is T = `max_logprobs`. Without logprobs only the first
    is meaningful.
    """
    logprobs = RESULT_TOKENS + positions
    ranks = logprobs + positions
    top_ids = ranks + positions
    return RESULT_TOKENS, logprobs, ranks, top_ids, top_ids + positions * top
