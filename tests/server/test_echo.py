"""Completions that begin with their prompt, and log probabilities of prompts, as lm-eval and vLLM's
clients read them.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.conftest import Served
from tests.server.scripted_engine import prompt_logprob

LM_EVAL = {"temperature": 0, "seed": 1234, "logprobs": 1, "echo": True}
"""What lm-eval's log likelihoods ask, beside `max_tokens` and a list of lists of token ids."""


def ids(text: str) -> list[int]:
    return list(text.encode())


def merged(events: list[Any]) -> dict[int, dict[str, Any]]:
    """The choices of a stream, joined."""
    whole: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            own = whole.setdefault(choice["index"], {"text": "", "logprobs": {}})
            own["text"] += choice["text"]
            own["finish_reason"] = choice["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                own["logprobs"].setdefault(name, []).extend(values)
    return whole


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
@pytest.mark.parametrize(
    "prompt",
    ["Hé!", ["Hé!", "xyz"], ids("Hé!"), [ids("Hé!"), ids("xyz")]],
    ids=["text", "texts", "ids", "lists-of-ids"],
)
async def test_prompts_come_before_their_output(served: Served, prompt: Any, max_tokens: int, streamed: bool) -> None:
    body = {**LM_EVAL, "prompt": prompt, "max_tokens": max_tokens}
    if streamed:
        *events, usage, _ = await served.events("/v1/completions", {**body, "stream_options": {"include_usage": True}})
        choices, used = merged(events), usage["usage"]
    else:
        status, answer = await served.post("/v1/completions", body)
        assert status == 200
        choices, used = {choice["index"]: choice for choice in answer["choices"]}, answer["usage"]
    texts = ["Hé!", "xyz"][: len(choices)]
    assert len(choices) == (2 if prompt in (["Hé!", "xyz"], [ids("Hé!"), ids("xyz")]) else 1)
    assert used["completion_tokens"] == max_tokens * len(texts)
    for choice, text in zip((choices[index] for index in sorted(choices)), texts, strict=True):
        output = "Hello world"[:max_tokens]
        assert choice["text"] == text + output and choice["finish_reason"] == "length"
        told, tokens = choice["logprobs"], ids(text)
        assert all(len(values) == len(tokens) + max_tokens for values in told.values())
        assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
        expected = [prompt_logprob(token) for token in tokens[1:]]
        assert told["token_logprobs"][1 : len(tokens)] == pytest.approx(expected)
        # Its own token, then the likeliest one.
        own = [list(top) for top in told["top_logprobs"][1 : len(tokens)]]
        assert own == [[token, "A"] for token in told["tokens"][1 : len(tokens)]]
        # A token's text begins where its offset says, but for the second half of a character.
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            assert token == "\ufffd" or choice["text"].startswith(token, offset)
        assert told["text_offset"] == sorted(told["text_offset"])
        # lm-eval's way to find whether a token was the likeliest.
        pairs = zip(told["tokens"][1:], told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True)
        for token, value, top in pairs:
            assert top[token] == value


async def test_without_logprobs_only_the_text_begins_with_it(served: Served) -> None:
    _, answer = await served.post("/v1/completions", {"prompt": "ab", "max_tokens": 2, "n": 2, "echo": True})
    assert [(choice["text"], choice["logprobs"]) for choice in answer["choices"]] == [("abHe", None)] * 2
    assert "prompt_logprobs" not in answer["choices"][0]


async def test_prompt_logprobs_of_completions_are_in_each_choice(served: Served) -> None:
    body = {"prompt": ["ab", "c"], "max_tokens": 1, "prompt_logprobs": 2}
    _, answer = await served.post("/v1/completions", body)
    first, second = (choice["prompt_logprobs"] for choice in answer["choices"])
    assert first[0] is None and second == [None]
    own = next(iter(first[1].items()))
    assert own == ("98", {"logprob": pytest.approx(prompt_logprob(98)), "rank": 2, "decoded_token": "b"})
    assert list(first[1]) == ["98", "65"] and answer["choices"][0]["text"] == "H"
    echoed = {**body, "echo": True, "logprobs": 0}
    _, answer = await served.post("/v1/completions", echoed)
    choice = answer["choices"][0]
    assert choice["prompt_logprobs"] == first and choice["logprobs"]["top_logprobs"][1] == {
        "b": pytest.approx(prompt_logprob(98))
    }


async def test_prompt_logprobs_of_chats_are_in_the_answer(served: Served) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "prompt_logprobs": 0}
    _, answer = await served.post("/v1/chat/completions", body)
    told = answer["prompt_logprobs"]
    assert told[0] is None and len(told) == answer["usage"]["prompt_tokens"]
    assert [list(position) for position in told[1:]] == [[str(token)] for token in ids("<user>Hi")[1:]]


async def test_a_long_prompt_is_written_beside_the_loop(served: Served) -> None:
    """Thousands of entries: the bytes are right, and come from the pool for text."""
    body = {**LM_EVAL, "prompt": [ids("abcdefgh") * 25] * 2, "max_tokens": 0, "logprobs": 20}
    _, answer = await served.post("/v1/completions", body)
    for choice in answer["choices"]:
        assert choice["text"] == "abcdefgh" * 25
        assert choice["logprobs"]["text_offset"] == list(range(200))
