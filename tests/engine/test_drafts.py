"""Decode rows of different numbers of drafts side by side, through the whole runner from plan bytes
alone: what they bring is what steps of one token bring.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from octavo import LLM
from octavo.engine.model_runner import ModelRunner
from octavo.engine.step_buffers import Step, StepBuffers
from tests.kernels.plan_bytes import LOGPROBS, SAMPLE, Enter, Row, write_plan
from tests.kernels.sampling_oracle import Record, read_records

FLAGS = SAMPLE | LOGPROBS
PROMPTS = [[5, 6, 7], [11] * 9 + [12, 13], list(range(40, 57)), [90, 91]]
BLOCKS_A_SLOT = 4


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def runner(request: pytest.FixtureRequest) -> Iterator[ModelRunner]:
    options = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}
    options |= {"model": "tiny", "load_format": "dummy", "dtype": "float32", "kv_cache_memory": 64 << 20}
    with LLM(**options, device=request.param, max_model_len=60, max_num_seqs=8) as llm:
        yield llm._engine.runner


def run(runner: ModelRunner, *rows: list[Row], captured: bool = False, **options) -> list[Record]:
    plan, data = write_plan(*rows, max_logprobs=3, padding_slot=runner.state.padding_slot, **options)
    buffers = StepBuffers(len(data), 4 * plan.padded_rows * plan.result_width, runner.device)
    buffers.plan_array[:] = data.numpy()
    step = Step(0, buffers.read_plan(), buffers)
    assert not captured or runner.graphs.fits(step.plan)
    runner.launch_forward(step)
    runner.launch_sample(step)
    buffers.wait()
    return read_records(buffers.result_array.view(np.int32), plan)


def start(runner: ModelRunner) -> list[Record]:
    """Every prompt takes its slot and is computed."""
    blocks = [
        (0, slot, index, 1 + slot * BLOCKS_A_SLOT + index)
        for slot in range(len(PROMPTS))
        for index in range(BLOCKS_A_SLOT)
    ]
    rows = [Row(slot, flags=FLAGS, tokens=prompt) for slot, prompt in enumerate(PROMPTS)]
    return run(runner, [], rows, enters=[Enter(slot, num_logprobs=3) for slot in range(len(PROMPTS))], blocks=blocks)


def check(runner: ModelRunner, record: Record, singles: list[Record]) -> None:
    assert record.tokens == [single.tokens[0] for single in singles]
    on_gpu = runner.device.type == "cuda"  # whose tensor cores round float32 to 10 bits
    atol = 1e-2 if on_gpu else 1e-5
    np.testing.assert_allclose(record.logprobs, [single.logprobs[0] for single in singles], atol=atol)
    assert on_gpu or record.top_ids == [single.top_ids[0] for single in singles]


def test_rows_with_drafts_bring_what_single_tokens_bring(runner: ModelRunner) -> None:
    rows = [Row(slot, flags=FLAGS) for slot in range(4)]
    singles = [start(runner)] + [run(runner, rows) for _ in range(8)]
    of_slot = [[step[slot] for step in singles] for slot in range(4)]
    tokens = [[record.tokens[0] for record in records] for records in of_slot]
    assert len({tuple(row) for row in tokens}) == 4

    start(runner)
    wrong = (tokens[2][2] + 1) % runner.vocab_size
    drafts = [[], tokens[1][1:4], [tokens[2][1], wrong, 7], [wrong]]
    decodes = [Row(slot, flags=FLAGS, drafts=drafts[slot]) for slot in range(4)]
    on_gpu = runner.device.type == "cuda"  # where nine rows of sixteen tokens are a captured shape
    padding, padding_tokens = (5, 5) if on_gpu else (2, 5)
    records = run(runner, decodes, captured=on_gpu, padding=padding, padding_tokens=padding_tokens)
    valid = [1, 4, 2, 1 + (wrong == tokens[3][1])]
    for slot in range(4):
        check(runner, records[slot], of_slot[slot][1 : 1 + valid[slot]])

    # What the rejected drafts left in the cache harms nobody.
    decodes = [Row(slot, flags=FLAGS, drafts=tokens[slot][1 + valid[slot] :][:slot]) for slot in range(4)]
    records = run(runner, decodes)
    for slot in range(4):
        check(runner, records[slot], of_slot[slot][1 + valid[slot] :][: 1 + slot])


def test_a_prompt_beside_rows_with_drafts(runner: ModelRunner) -> None:
    rows = [Row(slot, flags=FLAGS) for slot in range(3)]
    prompts = start(runner)
    singles = [prompts[:3]] + [run(runner, rows) for _ in range(4)]
    tokens = [[step[slot].tokens[0] for step in singles] for slot in range(3)]
    start(runner)
    decodes = [Row(0, flags=FLAGS), Row(1, flags=FLAGS, drafts=tokens[1][1:4]), Row(2, flags=FLAGS, drafts=[0])]
    prompt = Row(3, flags=FLAGS, tokens=PROMPTS[3])
    *decoded, padding, prefilled = run(runner, decodes, [prompt], padding=1, padding_tokens=9, enters=[Enter(3)])
    assert padding.tokens == []
    for slot, record in enumerate(decoded):
        check(runner, record, [step[slot] for step in singles[1 : 1 + len(record.tokens)]])
    assert len(decoded[1].tokens) == 4
    check(runner, prefilled, [prompts[3]])
