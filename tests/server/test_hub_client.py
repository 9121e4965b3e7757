"""huggingface_hub's client on TGI's routes and on chats."""

import asyncio
from typing import Any

from huggingface_hub import InferenceClient

from tests.server.conftest import Served


async def test_text_generation(served: Served) -> None:
    client = InferenceClient(served.url)

    def use() -> None:
        assert client.text_generation("Hi") == "Hello world"
        whole: Any = client.text_generation("Hi", details=True, max_new_tokens=3)
        assert (whole.generated_text, whole.details.finish_reason) == ("Hel", "length")
        assert [token.text for token in whole.details.tokens] == ["H", "e", "l"]
        assert "".join(client.text_generation("Hi", stream=True, max_new_tokens=5)) == "Hello"
        streamed: Any = list(client.text_generation("Hi", stream=True, details=True, max_new_tokens=5))
        assert streamed[-1].generated_text == "Hello" and streamed[-1].details.generated_tokens == 5

    await asyncio.to_thread(use)


async def test_chats(served: Served) -> None:
    client = InferenceClient(served.url)

    def use() -> None:
        answer: Any = client.chat_completion([{"role": "user", "content": "Hi"}])
        assert answer.choices[0].message.content == "Hello world"

    await asyncio.to_thread(use)
