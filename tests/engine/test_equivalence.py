"""Greedy tokens equal transformers' on SmolLM2 in float32, alone and with every mechanism in play
(E1-E5 of docs/invariants.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.outputs import RequestOutput
from tests.engine.conftest import NEVER_DRAWN, Reference, make_admission_hopeful


def greedy(tokens: int, n: int = 1, **options: Any) -> SamplingParams:
    return SamplingParams(n=n, temperature=0.0, max_tokens=tokens, ignore_eos=True, **options)


@contextmanager
def engine(**options: Any) -> Iterator[LLM]:
    with LLM(dtype="float32", device="cpu", **{"max_model_len": 1024, **options}) as llm:
        yield llm
        llm.core.check_integrity()


@pytest.fixture(scope="module")
def batched() -> Iterator[LLM]:
    """32 requests at once; each test begins with an empty prefix cache."""
    with engine(max_num_seqs=32) as llm:
        yield llm


@pytest.fixture(scope="module")
def single() -> Iterator[LLM]:
    """One request at a time, each prompt whole in one step."""
    with engine(max_num_seqs=1, max_num_batched_tokens=1024) as llm:
        yield llm


def check(reference: Reference, outputs: list[RequestOutput], tokens: int) -> None:
    for output in outputs:
        for choice in output.outputs:
            assert len(choice.token_ids) == tokens
            problem = reference.disagreement(output.prompt_token_ids, choice.token_ids)
            assert problem is None, f"{output.prompt!r} choice {choice.index}: {problem}"


def test_preempted(reference: Reference, prompts: list[str]) -> None:
    """First, because its outputs are the longest: what the reference says of them serves the other
    tests.
    """
    # 34 blocks of 16 tokens: one request of the full length fits, 32 together do not.
    memory = 34 * 30 * 2 * 3 * 16 * 64 * 4
    with engine(max_num_seqs=32, max_model_len=512, kv_cache_memory=memory, enable_prefix_caching=False) as llm:
        make_admission_hopeful(llm)
        params = greedy(24, stop_token_ids=[NEVER_DRAWN])
        check(reference, llm.generate(prompts, params, use_tqdm=False), 24)
        assert llm.core.stats()["num_preemptions"] > 0


def test_alone_and_prefix_cached(single: LLM, reference: Reference, prompts: list[str]) -> None:
    single.core.reset_prefix_cache()
    cold = single.generate(prompts, greedy(4), use_tqdm=False)
    check(reference, cold, 4)
    assert not any(output.num_cached_tokens for output in cold[:2])
    # A shorter prompt fills no block that it could find again.
    longer = [output.prompt for output in cold if len(output.prompt_token_ids) > 16]
    warm = single.generate(longer, greedy(4), use_tqdm=False)
    check(reference, warm, 4)
    assert sum(output.num_cached_tokens for output in warm) > 350
    assert max(output.num_cached_tokens for output in warm) < max(len(output.prompt_token_ids) for output in warm)


def test_batch_of_32(batched: LLM, reference: Reference, prompts: list[str]) -> None:
    batched.core.reset_prefix_cache()
    check(reference, batched.generate(prompts, greedy(16), use_tqdm=False), 16)


@pytest.mark.parametrize("budget", [7, 33])
def test_chunked_prefill_beside_decodes(reference: Reference, prompts: list[str], budget: int) -> None:
    with engine(max_num_seqs=7, max_num_batched_tokens=budget, enable_prefix_caching=False) as llm:
        check(reference, llm.generate(prompts, greedy(8), use_tqdm=False), 8)


def test_forked(batched: LLM, reference: Reference, prompts: list[str]) -> None:
    batched.core.reset_prefix_cache()
    check(reference, batched.generate(prompts, greedy(6, n=4), use_tqdm=False), 6)


@pytest.mark.parametrize("batching", ["none", "static"])
def test_batching_policies_agree(reference: Reference, prompts: list[str], batching: str) -> None:
    with engine(max_num_seqs=4, batching=batching) as llm:
        check(reference, llm.generate(prompts[:6], greedy(8), use_tqdm=False), 8)


def test_seeded_draws_do_not_depend_on_company(batched: LLM, single: LLM, prompts: list[str]) -> None:
    seeded = [SamplingParams(temperature=0.8, top_p=0.9, seed=number, max_tokens=6) for number in range(len(prompts))]
    batched.core.reset_prefix_cache()
    together = batched.generate(prompts, seeded, use_tqdm=False)
    again = batched.generate(prompts[::-1], seeded[::-1], use_tqdm=False)[::-1]
    alone = single.generate(prompts[::3], seeded[::3], use_tqdm=False)
    # Float32 rounding differs between batch shapes, and a draw may sit on a border: nearly all must
    # agree, not all.
    for first, other in ((together, again), (together[::3], alone)):
        same = sum(a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(first, other, strict=True))
        assert same >= len(first) - 1
