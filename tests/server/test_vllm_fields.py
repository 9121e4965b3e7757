"""vLLM's further fields of chats and completions: token ids, documents, a template of the request's
own; and `/tokenizer_info`.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from octavo import _core
from octavo.answers import ModelAnswers
from octavo.config import EngineConfig
from octavo.server.config import ServerConfig
from tests.server.conftest import Served, serving
from tests.server.scripted_engine import END, ScriptedEngine

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER: Any = {"role": "user", "content": "Hi"}
HELLO = [*b"Hello world", END]


async def test_token_ids_of_completions(served: Served) -> None:
    request = {"prompt": ["Hi", "You"], "n": 2, "return_token_ids": True}
    _, body = await served.post(COMPLETIONS, request)
    prompts = [[*b"Hi"]] * 2 + [[*b"You"]] * 2
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == prompts
    assert [choice["token_ids"] for choice in body["choices"]] == [HELLO] * 4
    events = await served.events(COMPLETIONS, request)
    drawn: dict[int, list[int]] = {}
    given: dict[int, list[list[int]]] = {}
    for event in events[:-1]:
        (choice,) = event["choices"]
        drawn.setdefault(choice["index"], []).extend(choice["token_ids"])
        if "prompt_token_ids" in choice:
            given.setdefault(choice["index"], []).append(choice["prompt_token_ids"])
    assert drawn == dict.fromkeys(range(4), HELLO)
    assert given == {index: [prompt] for index, prompt in enumerate(prompts)}
    _, body = await served.post(COMPLETIONS, {"prompt": "Hi"})
    assert "token_ids" not in body["choices"][0] and "prompt_token_ids" not in body["choices"][0]


@pytest.mark.parametrize("reasons", [False, True])
async def test_token_ids_of_chats(served: Served, reasons: bool) -> None:
    answer = [*b"<think>a</think>b", END] if reasons else HELLO
    served.engine.script.answer = bytes(answer[:-1])
    config = EngineConfig(model="m", reasoning_parser="think" if reasons else "none")
    served.engine.answers = ModelAnswers(config, None, served.engine.tokenizer)
    request = {"messages": [USER], "return_token_ids": True}
    _, body = await served.post(CHAT, request)
    assert body["choices"][0]["token_ids"] == answer
    prompt = body["prompt_token_ids"]
    assert len(prompt) == body["usage"]["prompt_tokens"] and b"Hi" in bytes(prompt)
    events = (await served.events(CHAT, request))[:-1]
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == answer
    assert [event["prompt_token_ids"] for event in events if "prompt_token_ids" in event] == [prompt]
    assert "prompt_token_ids" in events[0]


async def test_token_ids_are_not_of_echoes(served: Served) -> None:
    status, body = await served.post(COMPLETIONS, {"prompt": "Hi", "echo": True, "return_token_ids": True})
    assert status == 400 and body["error"]["param"] == "return_token_ids"


async def test_spaces_between_special_tokens_change_nothing(served: Served) -> None:
    for value in (True, False, None):
        status, body = await served.post(COMPLETIONS, {"prompt": "Hi", "spaces_between_special_tokens": value})
        assert status == 200 and body["choices"][0]["text"] == "Hello world"


async def test_documents_and_effort_reach_the_template(served: Served) -> None:
    served.engine.chat_template = _core.ChatTemplate(
        "{{ messages[0].content }}|{{ documents | map(attribute='title') | join(',') }}|{{ reasoning_effort }}"
    )
    documents = [{"title": "one", "text": "x"}, {"title": "two", "text": "y"}]
    request = {"messages": [USER], "documents": documents, "reasoning_effort": "low", "return_token_ids": True}
    status, body = await served.post(CHAT, request)
    assert status == 200, body
    assert bytes(body["prompt_token_ids"]) == b"Hi|one,two|low"
    for wrong in ("text", ["text"], {"title": "one"}):
        status, body = await served.post(CHAT, {"messages": [USER], "documents": wrong})
        assert (status, body["error"]["param"], body["error"]["code"]) == (400, "documents", "invalid_type")


async def test_a_suffix_is_refused_in_words(served: Served) -> None:
    status, body = await served.post(COMPLETIONS, {"prompt": "Hi", "suffix": "x"})
    assert (status, body["error"]["param"], body["error"]["code"]) == (400, "suffix", "unsupported_parameter")
    assert "fills none in" in body["error"]["message"]
    assert (await served.post(COMPLETIONS, {"prompt": "Hi", "suffix": ""}))[0] == 200


async def test_tokenizer_info(served: Served) -> None:
    status, body = await served.get("/tokenizer_info")
    assert status == 200
    assert body["chat_template"] == served.engine.chat_template.source
    assert {"tokenizer_class", "model_max_length", "bos_token", "eos_token", "pad_token"} <= set(body)


@pytest.fixture
async def trusting() -> AsyncIterator[Served]:
    async for one in serving(ScriptedEngine(), ServerConfig(trust_request_chat_template=True)):
        yield one


async def test_a_template_of_the_requests_own(served: Served, trusting: Served) -> None:
    request = {"messages": [USER], "chat_template": "<{{ messages[0].content }}>", "return_token_ids": True}
    status, body = await trusting.post(CHAT, request)
    assert status == 200 and bytes(body["prompt_token_ids"]) == b"<Hi>"
    _, body = await trusting.post(CHAT, {"messages": [USER], "return_token_ids": True})
    assert bytes(body["prompt_token_ids"]) != b"<Hi>"  # it was of that request alone
    status, body = await served.post(CHAT, request)
    assert (status, body["error"]["code"]) == (400, "unsupported_parameter")
    assert "--trust-request-chat-template" in body["error"]["message"]
    for broken in ("{{", "{% for x in range(10**9) %}{% endfor %}a", "{{ raise_exception('no') }}", "a" * 3_000_000):
        status, body = await trusting.post(CHAT, request | {"chat_template": broken})
        assert status == 400, json.dumps(body)[:200]
        assert body["error"]["code"] in ("template_error", "invalid_value")
    assert (await trusting.get("/health"))[0] == 200
