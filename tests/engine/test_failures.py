"""What a failure may cost: the step or the request it struck, never the engine or its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from octavo import LLM, SamplingParams

TINY = {"model": "tiny", "load_format": "dummy", "dtype": "float32", "device": "cpu", "max_model_len": 128}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPTS: list[Any] = [{"prompt_token_ids": [10 + n, 40, 41 + n]} for n in range(6)]


@pytest.fixture(scope="module")
def shared() -> LLM:
    return LLM(**TINY, max_num_seqs=4, max_num_batched_tokens=32)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """An engine that must be as good as new after the test."""
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
@pytest.mark.parametrize("place", ["before launch", "after launch", "wait", "schedule", "advance"])
def test_an_interrupted_step_leaves_a_working_engine(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, place: str, number: int, overlap: bool
) -> None:
    engine = llm._engine
    expected = tokens(llm, PROMPTS)
    engine._overlap = overlap  # on a CPU a step has run when `launch` returns, which is allowed in both modes
    interrupt = KeyboardInterrupt()
    with monkeypatch.context() as patched:
        if place.endswith("launch"):
            launch = Interrupted(engine.runner.launch, number, interrupt, after=place == "after launch")
            patched.setattr(engine.runner, "launch", launch)
        elif place == "wait":
            patched.setattr(engine._buffers[0], "wait", Interrupted(engine._buffers[0].wait, number, interrupt))
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
        patched.setattr(llm._engine.runner, "launch", Interrupted(llm._engine.runner.launch, 3, KeyboardInterrupt()))
        patched.setattr(llm._engine, "_drop_interrupted", Interrupted(lambda: None, 1, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert tokens(llm, PROMPTS) == expected


def test_an_error_of_the_runner_is_the_one_that_is_raised(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ArithmeticError("a kernel is wrong")

    with monkeypatch.context() as patched:
        patched.setattr(llm._engine.runner, "launch", broken)
        for _ in range(2):
            with pytest.raises(ArithmeticError, match="a kernel is wrong"):
                llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert len(tokens(llm, PROMPTS)) == len(PROMPTS)
