"""`AsyncEngine` on its own: event loops that come and go, outputs that stay as they were yielded."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import pytest

from octavo import AsyncEngine, EngineConfig, RequestOutput, SamplingParams

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
    async def within_time(limit: float = 20.0) -> str:
        return (await asyncio.wait_for(outputs(engine), limit))[-1].outputs[0].text

    texts = {asyncio.run(within_time()) for _ in range(3)}
    asyncio.run(first(engine))
    loop = asyncio.new_event_loop()  # not closed before the next one runs
    texts.add(loop.run_until_complete(within_time()))
    texts.add(asyncio.run(within_time()))
    loop.close()
    assert len(texts) == 1


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
