"""Steps padded to captured shapes compute the same, and the warm-up leaves nothing behind; both on
the CPU.
"""

from __future__ import annotations

import functools
import random

import pytest

from octavo import LLM, SamplingParams
from octavo.engine import setup
from octavo.engine.cuda_graph import GraphSizes, decode_ladder
from octavo.engine.forward import StepShape
from octavo.engine.warm_up import warm_up

TINY = {"model": "tiny", "load_format": "dummy", "dtype": "float32", "device": "cpu", "max_model_len": 128}
SIZES = GraphSizes(decodes=[4, 8], prefill_tokens=[8, 24, 40, 56], prefill_decodes=[0, 3, 8])


def answers(llm: LLM) -> list[list[int]]:
    rng = random.Random(0)
    prompts = [{"prompt_token_ids": [rng.randrange(100) for _ in range(rng.randrange(1, 60))]} for _ in range(12)]
    params = [
        SamplingParams(temperature=float(i % 2), seed=i, max_tokens=4 + i, ignore_eos=True, repetition_penalty=1.1)
        for i in range(12)
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.core.check_integrity()
    return [output.outputs[0].token_ids for output in outputs]


def test_padded_steps_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = answers(LLM(**TINY, max_num_seqs=8, max_num_batched_tokens=80))
    monkeypatch.setattr(setup, "GraphSizes", lambda: SIZES)
    llm = LLM(**TINY, max_num_seqs=8, max_num_batched_tokens=80)
    shapes = []
    launch = llm._engine.runner.launch_forward

    @functools.wraps(launch)
    def spy(step) -> None:
        shapes.append((step.plan.num_prefill_tokens, step.plan.padded_rows - step.plan.num_rows))
        launch(step)

    monkeypatch.setattr(llm._engine.runner, "launch_forward", spy)
    assert answers(llm) == plain
    assert sum(tokens in SIZES.prefill_tokens and padding > 0 for tokens, padding in shapes) >= 3


@pytest.mark.parametrize("pooling", ["LAST", "MEAN"])
def test_embeddings_of_padded_steps(monkeypatch: pytest.MonkeyPatch, pooling: str) -> None:
    """Last tokens are found among the places of logits; steps with means are not padded."""
    rng = random.Random(1)
    prompts = [{"prompt_token_ids": [rng.randrange(100) for _ in range(rng.randrange(1, 60))]} for _ in range(12)]
    options = {**TINY, "max_num_seqs": 8, "max_num_batched_tokens": 80, "pooler_config": {"pooling_type": pooling}}
    with LLM(**options) as llm:
        plain = [output.outputs.embedding for output in llm.embed(prompts, use_tqdm=False)]
    monkeypatch.setattr(setup, "GraphSizes", lambda: SIZES)
    with LLM(**options) as llm:
        padded = []
        launch = llm._engine.runner.launch_forward

        @functools.wraps(launch)
        def spy(step) -> None:
            if step.plan.num_pools:
                padded.append(step.plan.padded_rows > step.plan.num_rows)
                assert step.plan.has_wide_pools + padded[-1] < 2
            launch(step)

        monkeypatch.setattr(llm._engine.runner, "launch_forward", spy)
        found = [output.outputs.embedding for output in llm.embed(prompts, use_tqdm=False)]
    assert any(padded) or pooling == "MEAN"
    for one, other in zip(plain, found, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_warm_up_leaves_nothing_behind() -> None:
    llm = LLM(**TINY, max_num_seqs=8, max_num_batched_tokens=80)
    options = {
        "num_blocks": llm._engine.runner.kv_caches[0].shape[0],
        "block_size": llm._engine.runner.kv_layout.block_size,
        "kv_windows": [0],
        "max_num_seqs": 8,
        "max_num_batched_tokens": 80,
        "max_model_len": 128,
        "vocab_size": llm._engine.runner.vocab_size,
        "vector_size": llm._engine.parts.embeddings.size,
    }
    plain = answers(LLM(**TINY, max_num_seqs=8, max_num_batched_tokens=80))
    warm_up(llm._engine.runner, llm._engine.parts.buffers[0], options)
    assert llm.core.stats()["kv_blocks_used"] == 0
    assert answers(llm) == plain


def test_the_ladder_ends_at_the_bounds() -> None:
    sizes = GraphSizes.ladder(256, 8192, 4096)
    assert sizes.decodes[:4] == [1, 2, 4, 8] and sizes.decodes[-1] == 256
    assert sizes.prefill_decodes == [0, 32, 128, 256] and sizes.prefill_tokens[-1] == 1024
    assert decode_ladder(5) == [1, 2, 4, 5]
    tight = GraphSizes.ladder(8, 256, 1024, [2])
    assert tight.prefill_tokens == [64, 128, 192, 256] and tight.prefill_decodes == [0, 4, 8]
    assert all(shape.num_tokens <= 256 for shape in tight.shapes())
    assert GraphSizes.ladder(3, 20, 128, [2]).shapes() == [StepShape(2, 2)]


def test_drafts_add_a_bounded_number_of_graphs() -> None:
    plain = GraphSizes.ladder(256, 8192, 4096)
    assert not plain.drafts and not plain.prefill_drafts
    assert len(plain.shapes()) == 35 + 4 * 8  # each costs a tenth of a second and 16 MiB
    for max_num_seqs, num_draft_tokens in ((1, 1), (1, 7), (31, 7), (256, 1), (256, 7), (1024, 15)):
        with_drafts = GraphSizes.ladder(max_num_seqs, 8192, 4096, num_draft_tokens=num_draft_tokens)
        without = GraphSizes.ladder(max_num_seqs, 8192, 4096)
        assert set(without.shapes()) <= set(with_drafts.shapes())
        added = [shape for shape in with_drafts.shapes() if shape.has_drafts]
        assert len(with_drafts.shapes()) == len(without.shapes()) + len(added)
        assert 1 <= len(added) <= 21 + 2 * 8
        for shape in added:
            # Any rows that have so many tokens fit, and one row is left for padding.
            assert shape.num_decodes == min(shape.num_decode_tokens, max_num_seqs) + 1
            assert shape.num_decode_tokens <= max_num_seqs * (1 + num_draft_tokens)
