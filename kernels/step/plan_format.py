"""Word offsets and flags of the plan's and the result's records: DESIGN.md, "What crosses the boundary in a step?".

A plan is a buffer of little-endian 32-bit words; `Plan` has the byte offset of each section. Shared by the kernels and
their twins.
"""

ROW_WORDS = 8
ROW_SLOT, ROW_QUERY_START, ROW_QUERY_LEN, ROW_FLAGS, ROW_NUM_DRAFTS, ROW_MASK, ROW_BIAS_START, ROW_BIAS_LEN = range(8)

SAMPLE = 1  # a token is drawn at the row's last position
PREFILL = 2  # the row's tokens are in `prefill_tokens`
LOGPROBS = 4
PENALTIES = 8
PADDING = 16

BLOCK_WORDS = 4
BLOCK_GROUP, BLOCK_SLOT, BLOCK_INDEX, BLOCK_ID = range(4)

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
) = range(15)

STATUS_OK = 0
STATUS_NAN = 1  # NaN or +inf in the row's logits: nothing is drawn
STATUS_MASKED = 2  # every token is at -inf: nothing is drawn
STATUS_NO_SAMPLE = 3  # the row asked for no token

RESULT_STATUS, RESULT_NUM_VALID, RESULT_TOKENS = range(3)

GREEDY_TEMPERATURE = 1e-5  # below it the highest logit wins, as in vLLM


def result_columns(positions: int, top: int) -> tuple[int, int, int, int, int]:
    """First word of tokens, logprobs, ranks, top ids and top logprobs in a result record.

    `positions` is 1 + k tokens a row, `top` is T = `max_logprobs`. Without logprobs only the first is meaningful.
    """
    logprobs = RESULT_TOKENS + positions
    ranks = logprobs + positions
    top_ids = ranks + positions
    return RESULT_TOKENS, logprobs, ranks, top_ids, top_ids + positions * top
