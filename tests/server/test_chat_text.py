"""The text side of chats over HTTP: tools, and text that breaks a library."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo import _core
from octavo.weights.text import read_text
from tests.server.conftest import Served
from tests.server.scripted_engine import MASKED
from tests.text.test_panics import ON_Q_ONLY, with_normalizer

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


async def test_tools_that_the_template_has_no_place_for(served: Served) -> None:
    body = {"messages": [USER], "tools": [TOOL], "max_tokens": 2}
    assert (await served.post(CHAT, body))[0] == 200
    served.engine.chat_template = _core.ChatTemplate("{{ messages[0].content }}")
    status, answer = await served.post(CHAT, body)
    assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, "unsupported_tools", "tools")
    status, answer = await served.post(CHAT, {**body, "stream": True})
    assert (status, answer["error"]["code"]) == (400, "unsupported_tools")
    status, answer = await served.post(CHAT, {**body, "tool_choice": "none"})
    assert (status, answer["usage"]["prompt_tokens"]) == (200, 2)


async def test_tools_take_the_template_for_tools(served: Served) -> None:
    served.engine.chat_template = _core.ChatTemplate("a", tool_use="{{ tools[0].function.name }}bc")
    for tools, length in (([TOOL], 3), ([], 1), (None, 1)):
        _, answer = await served.post(CHAT, {"messages": [USER], "tools": tools, "max_tokens": 2})
        assert answer["usage"]["prompt_tokens"] == length
    served.engine.chat_template = _core.ChatTemplate(None, tool_use="{{ tools }}")
    status, answer = await served.post(CHAT, {"messages": [USER]})
    assert (status, answer["error"]["code"]) == (400, "template_error")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_panic_of_a_text_library_costs_its_request_only(served: Served, tmp_path: Path, stream: bool) -> None:
    served.engine.tokenizer = read_text(with_normalizer(tmp_path / "model", ON_Q_ONLY), None, None).tokenizer
    served.engine.chat_template = _core.ChatTemplate("{{ messages[0].content }}")
    for path, bad, good in (
        (CHAT, {"messages": [{"role": "user", "content": "q"}]}, {"messages": [USER]}),
        ("/v1/completions", {"prompt": "q"}, {"prompt": "Hi"}),
    ):
        for _ in range(3):
            status, answer = await served.post(path, {**bad, "stream": stream})
            assert (status, answer["error"]["type"], answer["error"]["code"]) == (500, "server_error", "internal_error")
            assert "panic" not in answer["error"]["message"]
        assert (await served.post(path, {**good, "max_tokens": 2}))[0] == 200
    assert (await served.http.get(served.url + "/health")).status == 200


async def test_a_request_that_rules_out_every_token_is_at_fault(served: Served) -> None:
    served.engine.script.fail_after, served.engine.script.fail_status = 0, MASKED
    body = {"messages": [USER], "logit_bias": {"5": -100}, "max_tokens": 4}
    wanted = ("invalid_request_error", "all_tokens_masked", "logit_bias")
    status, answer = await served.post(CHAT, body)
    assert (status, *(answer["error"][key] for key in ("type", "code", "param"))) == (400, *wanted)
    *_, error, done = await served.events(CHAT, body)
    assert (*(error["error"][key] for key in ("type", "code", "param")), done) == (*wanted, "[DONE]")


async def test_the_last_message_is_continued(served: Served) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is"}]
    body = {"messages": messages, "continue_final_message": True}
    status, answer = await served.post(CHAT, body)
    assert status == 200 and answer["usage"]["prompt_tokens"] == len("<user>Hi<assistant>It is")
    status, answer = await served.post(CHAT, {**body, "add_generation_prompt": True})
    assert (status, answer["error"]["param"]) == (400, "continue_final_message")


async def test_the_last_tokens_of_a_prompt(served: Served) -> None:
    text, kept = "a" * 600, {"truncate_prompt_tokens": 100}
    for path, body in (
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": [97] * 600}),
    ):
        assert (await served.post(path, body))[0] == 400
        status, answer = await served.post(path, {**body, **kept})
        assert status == 200 and answer["usage"]["prompt_tokens"] == 100
