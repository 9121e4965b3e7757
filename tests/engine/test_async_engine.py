"""`AsyncEngine` on its own: event loops that come and go, outputs that stay as they were yielded."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import pytest

from octavo import AsyncEngine, EngineConfig, RequestOutput, SamplingParams
from octavo._core import Prompt
from octavo.errors import EngineDeadError

TINY = {"model": "tiny", "load_format": "dummy", "dtype": "float32", "device": "cpu", "max_model_len": 128}
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1, n=2)


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    engine = AsyncEngine.from_config(EngineConfig(**TINY))
    yield engine
    engine.shutdown()


async def outputs(engine: AsyncEngine) -> list[RequestOutput]:
    generated = engine.generate({"prompt_token_ids": [1, 2, 3]}, GREEDY)
    return [output async for output in generated]


async def first(engine: AsyncEngine) -> RequestOutput:
    """Leaves its request in the middle, to the end of the loop."""
    async for output in engine.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=100)):
        return output
    raise AssertionError("no output")


def test_one_event_loop_after_another(engine: AsyncEngine) -> None:
    async def text() -> str:
        return (await outputs(engine))[-1].outputs[0].text

    texts = {asyncio.run(text()) for _ in range(3)}
    asyncio.run(first(engine))
    loop = asyncio.new_event_loop()  # not closed before the next one runs
    texts.add(loop.run_until_complete(text()))
    texts.add(asyncio.run(text()))
    loop.close()
    assert len(texts) == 1


async def ended_before_it_is_closed(engine: AsyncEngine) -> None:
    engine.attach_loop(asyncio.get_running_loop())
    stream = engine.submit([Prompt([1, 2, 3])], GREEDY.to_core())
    while engine.core.has_unfinished():
        await asyncio.sleep(0.001)
    unknown = engine.stats()["unknown_aborts"]
    last = stream.close()
    assert last is not None and last.finished and last.requests[0].num_output_tokens == 16
    assert stream.close() is None
    assert engine.stats()["unknown_aborts"] == unknown  # there was nothing to abort


def test_a_stream_gives_its_end_to_who_closes_it(engine: AsyncEngine) -> None:
    asyncio.run(ended_before_it_is_closed(engine))


def test_a_second_loop_beside_a_running_one_is_refused(engine: AsyncEngine) -> None:
    async def outer() -> None:
        await outputs(engine)
        with pytest.raises(RuntimeError, match="another event loop, which is still running"):
            await asyncio.to_thread(asyncio.run, outputs(engine))
        await outputs(engine)

    asyncio.run(outer())


def test_outputs_stay_as_they_were_yielded(engine: AsyncEngine) -> None:
    async def watch() -> tuple[list[RequestOutput], list[str]]:
        seen, shown = [], []
        async for output in engine.generate({"prompt_token_ids": [1, 2, 3]}, GREEDY):
            seen.append(output)
            shown.append(repr(output))
        return seen, shown

    seen, shown = asyncio.run(watch())
    assert len(seen) > 1
    assert [repr(output) for output in seen] == shown
    assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
    for earlier, later in itertools.pairwise(seen):
        for before, after in zip(earlier.outputs, later.outputs, strict=True):
            assert before is not after
            assert after.token_ids[: len(before.token_ids)] == before.token_ids
            assert before.logprobs is not None and len(before.logprobs) == len(before.token_ids)


def test_a_default_length_gives_way_to_the_prompt(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 tokens of prompt leave room for 28: `max_new_tokens` of the model is a default, not a
    limit.
    """
    monkeypatch.setattr(engine, "generation_defaults", {"max_tokens": 100, "ignore_eos": True})

    async def last() -> RequestOutput:
        return [output async for output in engine.generate({"prompt_token_ids": [1] * 100})][-1]

    assert len(asyncio.run(last()).outputs[0].token_ids) == 28


def test_the_queue_counts_requests_and_not_their_choices() -> None:
    engine = AsyncEngine.from_config(EngineConfig(**TINY, max_num_seqs=2, max_waiting=8))
    many = SamplingParams(n=32, max_tokens=100, ignore_eos=True)

    async def both() -> int:
        running = engine.generate({"prompt_token_ids": [1, 2]}, many)
        await anext(running)  # admitted: 30 of its choices wait
        assert engine.stats()["num_requests_waiting"] > 8
        other = [output async for output in engine.generate({"prompt_token_ids": [3]}, SamplingParams(max_tokens=2))]
        await running.aclose()
        return len(other)

    try:
        assert asyncio.run(both()) > 0
    finally:
        engine.shutdown()


def test_a_request_after_the_shutdown_is_refused() -> None:
    engine = AsyncEngine.from_config(EngineConfig(**TINY))
    engine.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        engine.submit([Prompt([1])], GREEDY.to_core())
    assert asyncio.run(engine.run_beside(lambda: "last words")) == "last words"
