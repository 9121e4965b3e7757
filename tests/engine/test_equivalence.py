"""Greedy tokens equal transformers' on SmolLM2 in float32, alone and with every mechanism in play (E1-E5 of
docs/invariants.md).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.outputs import RequestOutput
from tests.engine.conftest import Reference

TOKENS = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)


@contextmanager
def engine(**options: Any) -> Iterator[LLM]:
    llm = LLM(dtype="float32", device="cpu", max_model_len=1024, **options)
    yield llm
    llm.core.check_integrity()
    del llm
    gc.collect()


def check(reference: Reference, outputs: list[RequestOutput], tokens: int = TOKENS) -> None:
    for output in outputs:
        for choice in output.outputs:
            assert len(choice.token_ids) == tokens
            problem = reference.disagreement(output.prompt_token_ids, choice.token_ids)
            assert problem is None, f"{output.prompt!r} choice {choice.index}: {problem}"


def test_alone_and_prefix_cached(reference: Reference, prompts: list[str]) -> None:
    short = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)  # one stream at a time is slow
    with engine(max_num_seqs=1, max_num_batched_tokens=1024) as llm:
        cold = llm.generate(prompts, short, use_tqdm=False)
        check(reference, cold, tokens=8)
        assert not any(output.num_cached_tokens for output in cold[:2])
        warm = llm.generate(prompts, short, use_tqdm=False)
        check(reference, warm, tokens=8)
        assert sum(output.num_cached_tokens for output in warm) > 600
        assert max(output.num_cached_tokens for output in warm) < max(len(output.prompt_token_ids) for output in warm)


def test_batch_of_32(reference: Reference, prompts: list[str]) -> None:
    with engine(max_num_seqs=32, enable_prefix_caching=False) as llm:
        check(reference, llm.generate(prompts, GREEDY, use_tqdm=False))


@pytest.mark.parametrize("budget", [7, 33])
def test_chunked_prefill_beside_decodes(reference: Reference, prompts: list[str], budget: int) -> None:
    with engine(max_num_seqs=7, max_num_batched_tokens=budget, enable_prefix_caching=False) as llm:
        check(reference, llm.generate(prompts, GREEDY, use_tqdm=False))


def test_preempted(reference: Reference, prompts: list[str]) -> None:
    # 72 blocks of 16 tokens: one request of the full length fits, 32 together do not.
    block = 30 * 2 * 3 * 16 * 64 * 4
    with engine(max_num_seqs=32, kv_cache_memory=72 * block, enable_prefix_caching=False) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True), use_tqdm=False)
        check(reference, outputs, tokens=64)
        assert llm.core.stats()["num_preemptions"] > 0


def test_forked(reference: Reference, prompts: list[str]) -> None:
    forked = SamplingParams(n=4, temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    with engine(max_num_seqs=16, enable_prefix_caching=False) as llm:
        check(reference, llm.generate(prompts, forked, use_tqdm=False))


def test_batching_policies_agree(reference: Reference, prompts: list[str]) -> None:
    for batching in ("none", "static"):
        with engine(max_num_seqs=8, batching=batching) as llm:
            check(reference, llm.generate(prompts[:12], GREEDY, use_tqdm=False))


def test_seeded_draws_do_not_depend_on_company(prompts: list[str]) -> None:
    seeded = [SamplingParams(temperature=0.8, top_p=0.9, seed=number, max_tokens=16) for number in range(len(prompts))]
    with engine(max_num_seqs=32) as llm:
        together = llm.generate(prompts, seeded, use_tqdm=False)
        again = llm.generate(prompts[::-1], seeded[::-1], use_tqdm=False)[::-1]
    with engine(max_num_seqs=1) as llm:
        alone = llm.generate(prompts, seeded, use_tqdm=False)
    # Float32 rounding differs between batch shapes, and a draw may sit on a border: nearly all must agree, not all.
    for other in (again, alone):
        same = sum(a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(together, other, strict=True))
        assert same >= len(prompts) - 1
