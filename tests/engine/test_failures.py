"""What a failure may cost: the step or the request it struck, never the engine or its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from octavo import LLM, AsyncEngine, EngineConfig, SamplingParams
from octavo.errors import EngineDeadError

TINY = {"model": "tiny", "load_format": "dummy", "dtype": "float32", "device": "cpu", "max_model_len": 128}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS: list[Any] = [{"prompt_token_ids": [10 + n, 40, 41 + n]} for n in range(6)]


@pytest.fixture(scope="module")
def shared() -> LLM:
    return LLM(**TINY, max_num_seqs=4, max_num_batched_tokens=32)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """An engine that must be as good as new after the test."""
    shared.core.reset_prefix_cache()
    yield shared
    shared._engine._overlap = False
    check_empty(shared)


def check_empty(llm: LLM) -> None:
    stats = llm.core.stats()
    assert (stats["num_requests_running"], stats["num_requests_waiting"], stats["steps_in_flight"]) == (0, 0, 0)
    assert stats["kv_blocks_used"] == 0
    llm.core.check_integrity()


def tokens(llm: LLM, prompts: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


class Interrupted:
    """Calls through, and raises before or after the call of that number."""

    def __init__(self, call: Callable[..., Any], number: int, error: BaseException, *, after: bool = False) -> None:
        self.call, self.number, self.error, self.after, self.count = call, number, error, after, 0

    def __call__(self, *args: Any) -> Any:
        self.count += 1
        if self.count == self.number and not self.after:
            raise self.error
        result = self.call(*args)
        if self.count == self.number:
            raise self.error
        return result


class Core:
    """A core of which one method is replaced."""

    def __init__(self, core: Any, **replaced: Any) -> None:
        self._core = core
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize(
    "place",
    [
        "before launch_forward",
        "after launch_forward",
        "before launch_sample",
        "after launch_sample",
        "wait",
        "schedule",
        "commit",
    ],
)
def test_an_interrupted_step_leaves_a_working_engine(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, place: str, number: int, overlap: bool
) -> None:
    engine = llm._engine
    expected = tokens(llm, PROMPTS)
    engine._overlap = overlap  # on a CPU a step has run when it is launched, which is allowed in both modes
    interrupt = KeyboardInterrupt()
    with monkeypatch.context() as patched:
        when, _, half = place.partition(" ")
        if half:
            launch = Interrupted(getattr(engine.runner, half), number, interrupt, after=when == "after")
            patched.setattr(engine.runner, half, launch)
        elif place == "wait":
            buffers = engine.parts.buffers[0]
            patched.setattr(buffers, "wait", Interrupted(buffers.wait, number, interrupt))
        else:
            call = Interrupted(getattr(engine.core, place), 1 if place == "schedule" else number, interrupt, after=True)
            patched.setattr(engine, "core", Core(engine.core, **{place: call}))
        with pytest.raises(KeyboardInterrupt) as caught:
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert caught.value is interrupt
    check_empty(llm)
    assert tokens(llm, PROMPTS) == expected


def test_a_second_interrupt_while_the_first_is_settled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokens(llm, PROMPTS)
    with monkeypatch.context() as patched:
        launch = Interrupted(llm._engine.runner.launch_forward, 3, KeyboardInterrupt())
        patched.setattr(llm._engine.runner, "launch_forward", launch)
        patched.setattr(llm._engine, "_drop_interrupted", Interrupted(lambda: None, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert tokens(llm, PROMPTS) == expected


def test_an_error_of_the_runner_is_the_one_that_is_raised(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ArithmeticError("a kernel is wrong")

    with monkeypatch.context() as patched:
        patched.setattr(llm._engine.runner, "launch_forward", broken)
        for _ in range(2):
            with pytest.raises(ArithmeticError, match="a kernel is wrong"):
                llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert len(tokens(llm, PROMPTS)) == len(PROMPTS)


def poison(llm: LLM, monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    """The embedding of one token becomes NaN. The head is tied to the table, so it gets a whole
    copy of its own.
    """
    embedding = llm._engine.runner.model.embedding
    table = embedding.weight.clone()
    table[token] = float("nan")
    monkeypatch.setattr(embedding, "weight", table)


@pytest.mark.parametrize("max_num_seqs_used", [1, 6])
def test_nan_in_one_prompt_costs_that_prompt_only(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, max_num_seqs_used: int
) -> None:
    neighbours = PROMPTS[:max_num_seqs_used]
    expected = tokens(llm, neighbours)
    assert not any(500 in output for output in expected)
    bad: Any = {"prompt_token_ids": [3, 500, 4, *range(20, 50)]}
    with monkeypatch.context() as patched:
        poison(llm, patched, 500)
        first, *others, last = llm.generate([bad, *neighbours, bad], GREEDY, use_tqdm=False)
        for output in (first, last):
            assert output.finished and output.outputs[0].finish_reason == "error"
            assert output.error is not None and output.error.startswith("numerical_error: ")
        assert [output.outputs[0].token_ids for output in others] == expected
        assert all(output.error is None and output.outputs[0].finish_reason == "length" for output in others)
        assert f"2 of {len(neighbours) + 2} requests ended with an error; the first: numerical_error" in caplog.text
        check_empty(llm)
    # The blocks that held NaN are used again, but what the cache kept of the prompt would still be
    # NaN.
    llm.core.reset_prefix_cache()
    assert tokens(llm, neighbours) == expected
    assert llm.generate(bad, GREEDY, use_tqdm=False)[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("half", ["launch_forward", "launch_sample"])
def test_a_step_out_of_memory_costs_its_requests_only(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, half: str, number: int, overlap: bool
) -> None:
    expected = tokens(llm, PROMPTS)
    llm._engine._overlap = overlap
    error = torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as patched:
        patched.setattr(llm._engine.runner, half, Interrupted(getattr(llm._engine.runner, half), number, error))
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    failed = [output for output in outputs if output.error is not None]
    assert 1 <= len(failed) <= 4  # what fits into one step; the queue behind it goes on
    for output in failed:
        assert output.error is not None and output.error.startswith("out_of_memory: ")
        assert output.finished and output.outputs[0].finish_reason == "error"
    for output, whole in zip(outputs, expected, strict=True):
        got = output.outputs[0].token_ids
        assert got == (whole if output.error is None else whole[: len(got)])
    check_empty(llm)
    assert tokens(llm, PROMPTS) == expected


async def test_an_engine_that_died_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ArithmeticError("a kernel is wrong")

    engine = AsyncEngine.from_config(EngineConfig(**TINY))
    try:
        monkeypatch.setattr(engine._engine.runner, "launch_forward", broken)
        with pytest.raises(EngineDeadError, match="ArithmeticError: a kernel is wrong"):
            async for _ in engine.generate(PROMPTS[0], GREEDY):
                pass
    finally:
        engine.shutdown()


async def test_a_failed_request_raises_from_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncEngine.from_config(EngineConfig(**TINY))
    try:
        error = torch.OutOfMemoryError("CUDA out of memory")
        runner = engine._engine.runner
        monkeypatch.setattr(runner, "launch_sample", Interrupted(runner.launch_sample, 2, error))
        with pytest.raises(RuntimeError, match="out_of_memory: "):
            async for _ in engine.generate(PROMPTS[0], GREEDY):
                pass
        whole = [output async for output in engine.generate(PROMPTS[0], GREEDY)]
        assert whole[-1].finished and whole[-1].error is None
    finally:
        engine.shutdown()
