"""The default model over HTTP, by the official client: 32 streams at once, and half of them cut
midway.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest

from octavo.config import EngineConfig
from octavo.engine.async_engine import AsyncEngine
from octavo.server.config import ServerConfig
from tests.server.conftest import Served, serving

THINGS = ("fruits", "animals", "colours", "cities of France", "planets", "rivers", "metals", "musical instruments")
QUESTIONS = [f"Name {count} {things}." for count in (1, 2, 3, 4) for things in THINGS]


@pytest.fixture(scope="module")
def engine(smollm2_path: Path) -> Iterator[AsyncEngine]:
    # float32: in bfloat16 the company in a batch may turn a near tie, and texts are compared
    # exactly here.
    config = EngineConfig(
        model=str(smollm2_path),
        served_model_name=("smollm2",),
        dtype="float32",
        max_model_len=512,
        kv_cache_memory=256 * 2**20,
        disable_log_stats=True,
    )
    engine = AsyncEngine.from_config(config)
    yield engine
    engine.shutdown()


@pytest.fixture
async def real(engine: AsyncEngine) -> AsyncIterator[Served]:
    async for one in serving(engine, ServerConfig(), shutdown=False):
        yield one


@pytest.fixture
async def client(real: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=real.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


async def ask(client: openai.AsyncOpenAI, question: str, *, leave_after: int | None = None) -> str:
    """The streamed answer; with `leave_after` the connection is closed after that many chunks."""
    stream = await client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=24,
        stream=True,
    )
    text = ""
    chunks = 0
    async for chunk in stream:
        text += chunk.choices[0].delta.content or ""
        chunks += 1
        if chunks == leave_after:
            await stream.close()
            break
    return text


async def test_the_example_that_the_server_prints(client: openai.AsyncOpenAI) -> None:
    """It sends no temperature, and at 1.0 the model talks nonsense."""
    question = {"role": "user", "content": "What is the capital of France?"}
    answer = await client.chat.completions.create(model="smollm2", messages=[question], max_tokens=64, n=8)  # type: ignore[list-item]
    assert [choice.message.content for choice in answer.choices] == ["The capital of France is Paris."] * 8


async def test_32_streams_equal_the_whole_answers(client: openai.AsyncOpenAI) -> None:
    async def whole(question: str) -> str:
        answer = await client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=24
        )
        return answer.choices[0].message.content or ""

    streamed = await asyncio.gather(*(ask(client, question) for question in QUESTIONS))
    assert streamed == await asyncio.gather(*map(whole, QUESTIONS))
    assert len(set(streamed)) > 16  # they are different answers
    capital = await ask(client, "What is the capital of France?")
    assert "Paris" in capital


async def test_blocks_come_back_when_half_of_the_clients_leave(client: openai.AsyncOpenAI, engine: AsyncEngine) -> None:
    answers = await asyncio.gather(
        *(ask(client, question, leave_after=3 if i % 2 else None) for i, question in enumerate(QUESTIONS))
    )
    assert all(answers)
    for _ in range(6_000):  # two minutes; a busy machine may need some of them
        stats = engine.stats()
        if stats["num_requests_running"] == stats["kv_blocks_used"] == stats["kv_blocks_held"] == 0:
            break
        await asyncio.sleep(0.02)
    assert (stats["num_requests_running"], stats["num_requests_waiting"]) == (0, 0)
    # What the prefix cache keeps can be taken at any time and is not in use.
    assert (stats["kv_blocks_used"], stats["kv_blocks_held"]) == (0, 0)
    assert stats["finished_abort"] >= 1
    engine.core.check_integrity()
