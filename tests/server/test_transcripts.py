"""What a client reads, byte for byte: one transcript for each form of a stream, written by hand.

The core is driven step by step and taken after each, so that what leaves together does not depend
on time.
"""

import json

import pytest

from octavo import _core
from octavo.config import EngineConfig
from tests.server.scripted_engine import Script

CHAT, COMPLETION = _core.ReplyFormat.openai_chat, _core.ReplyFormat.openai_completion


@pytest.fixture
def script() -> Script:
    return Script(EngineConfig(model="org/tiny", max_num_seqs=8), max_model_len=512)


def told(
    script: Script,
    reply_format: _core.ReplyFormat,
    prompts: tuple[bytes, ...] = (b"Hi",),
    *,
    steps_a_take: int = 1,
    **params: int,
) -> list[str]:
    """Everything that is written for a call, as events without the empty line that ends each."""
    encoded = [_core.Prompt(prompt) for prompt in prompts]
    reply = script.core.add_call(encoded, _core.SamplingParams(**params), now=0.0, reply_format=reply_format)
    text, finished = b"", False
    while not finished:
        for _ in range(steps_a_take):
            script.step()
        delta = script.core.take(reply)
        assert delta is not None and delta.choices == []
        text, finished = text + delta.write(), delta.finished
    assert script.core.take(reply) is None
    assert not script.core.has_unfinished()
    events = text.decode().split("\n\n")
    assert events.pop() == ""
    return events


def test_a_completion(script: Script) -> None:
    script.answer = 'a"\u2028'.encode()
    head = '{"id":"cmpl-1","object":"text_completion","created":5,"model":"m/\\"x\\"","choices":['
    assert told(script, COMPLETION(id="cmpl-1", model='m/"x"', created=5, stream=True)) == [
        f'data: {head}{{"index":0,"text":"a","logprobs":null,"finish_reason":null}}]}}',
        f'data: {head}{{"index":0,"text":"\\"","logprobs":null,"finish_reason":null}}]}}',
        # A character comes with the last of its bytes.
        f'data: {head}{{"index":0,"text":"","logprobs":null,"finish_reason":null}}]}}',
        f'data: {head}{{"index":0,"text":"","logprobs":null,"finish_reason":null}}]}}',
        f'data: {head}{{"index":0,"text":"\\u2028","logprobs":null,"finish_reason":null}}]}}',
        f'data: {head}{{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}}]}}',
        "data: [DONE]",
    ]


def test_a_chat_with_its_usage_at_the_end(script: Script) -> None:
    script.answer = b"ab"
    head = '{"id":"c","object":"chat.completion.chunk","created":5,"model":"m","choices":['
    reply_format = CHAT(id="c", model="m", created=5, stream=True, include_usage=True)
    role, rest = '"role":"assistant",', '"logprobs":null,"finish_reason"'
    assert told(script, reply_format, n=2, max_tokens=2) == [
        # The second choice waits until the first has computed the prompt.
        f'data: {head}{{"index":0,"delta":{{{role}"content":"a"}},{rest}:null}}],"usage":null}}',
        f'data: {head}{{"index":0,"delta":{{"content":"b"}},{rest}:"length"}}],"usage":null}}',
        f'data: {head}{{"index":1,"delta":{{{role}"content":"a"}},{rest}:null}}],"usage":null}}',
        f'data: {head}{{"index":1,"delta":{{"content":"b"}},{rest}:"length"}}],"usage":null}}',
        f'data: {head}],"usage":{{"prompt_tokens":2,"completion_tokens":4,"total_tokens":6,'
        '"prompt_tokens_details":{"cached_tokens":0}}}',
        "data: [DONE]",
    ]


def test_prompts_with_log_probabilities_and_usage_in_every_event(script: Script) -> None:
    script.answer = b"xy"
    head = '{"id":"c","object":"text_completion","created":5,"model":"m","choices":['
    reply_format = COMPLETION(id="c", model="m", created=5, stream=True, include_usage=True, continuous_usage=True)

    def event(index: int, text: str, offset: int, finish: str, tokens: int) -> str:
        top = f'{{"{text}":-0.5,"A":-1}}'
        logprobs = f'"tokens":["{text}"],"token_logprobs":[-0.5],"top_logprobs":[{top}],"text_offset":[{offset}]'
        return (
            f'data: {head}{{"index":{index},"text":"{text}","logprobs":{{{logprobs}}},"finish_reason":{finish}}}]'
            f',"usage":{{"prompt_tokens":5,"completion_tokens":{tokens},"total_tokens":{5 + tokens},'
            '"prompt_tokens_details":{"cached_tokens":0}}}'
        )

    assert told(script, reply_format, (b"Hi", b"You"), max_tokens=2, logprobs=2) == [
        event(0, "x", 0, "null", 1),
        event(1, "x", 0, "null", 2),
        event(0, "y", 1, '"length"', 3),
        event(1, "y", 1, '"length"', 4),
        f'data: {head}],"usage":{{"prompt_tokens":5,"completion_tokens":4,"total_tokens":9,'
        '"prompt_tokens_details":{"cached_tokens":0}}}',
        "data: [DONE]",
    ]


def test_a_chat_with_log_probabilities(script: Script) -> None:
    script.answer = "é".encode()
    head = '{"id":"c","object":"chat.completion.chunk","created":5,"model":"m","choices":['

    def event(delta: str, byte: int, finish: str) -> str:
        token = f'{{"token":"\ufffd","logprob":-0.5,"bytes":[{byte}]'
        logprobs = f'{{"content":[{token},"top_logprobs":[{token}}}]}}]}}'
        return f'data: {head}{{"index":0,"delta":{{{delta}}},"logprobs":{logprobs},"finish_reason":{finish}}}]}}'

    reply_format = CHAT(id="c", model="m", created=5, stream=True)
    assert told(script, reply_format, max_tokens=2, logprobs=1) == [
        event('"role":"assistant","content":""', 195, "null"),
        event('"content":"é"', 169, '"length"'),
        "data: [DONE]",
    ]


def test_an_error_comes_after_the_text_that_was_taken_with_it(script: Script) -> None:
    script.answer, script.fail_after, script.fail_slots = b"abcd", 2, {1}
    head = '{"id":"c","object":"text_completion","created":5,"model":"m","choices":['
    reply_format = COMPLETION(id="c", model="m", created=5, stream=True, include_usage=True)
    letters = [
        f'data: {head}{{"index":{index},"text":"{letter}","logprobs":null,"finish_reason":null}}],"usage":null}}'
        for index, text in ((0, "abc"), (1, "ab"))
        for letter in text
    ]
    # Were their lengths open, the small pool would take one after the other.
    assert told(script, reply_format, (b"Hi", b"You"), steps_a_take=3, max_tokens=8) == [
        *letters,
        'data: {"error":{"message":"the model\'s output for this request could not be used","type":"server_error",'
        '"param":null,"code":"numerical_error"}}',
        "data: [DONE]",
    ]
    assert script.core.stats()["finished_abort"] == 1  # the neighbour


def test_a_client_that_lags_gets_one_event(script: Script) -> None:
    script.answer = b"x" * 200
    head = '{"id":"c","object":"text_completion","created":5,"model":"m","choices":['
    reply_format = COMPLETION(id="c", model="m", created=5, stream=True)
    first, second, *_ = told(script, reply_format, max_tokens=100, steps_a_take=65)
    assert first == f'data: {head}{{"index":0,"text":"{"x" * 65}","logprobs":null,"finish_reason":null}}]}}'
    assert second == f'data: {head}{{"index":0,"text":"x","logprobs":null,"finish_reason":null}}]}}'


def test_whole_answers(script: Script) -> None:
    script.answer = b"ab"
    usage = {"completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 0}}
    finish = {"logprobs": None, "finish_reason": "stop", "stop_reason": None}
    encoded = [_core.Prompt(b"Hi"), _core.Prompt(b"You")]

    def answer(reply_format: _core.ReplyFormat, prompts: list[_core.Prompt], n: int) -> object:
        reply = script.core.add_call(prompts, _core.SamplingParams(n=n), now=0.0, reply_format=reply_format)
        while script.step():
            if script.core.has_unfinished():
                assert script.core.take_news() == []
        assert script.core.take_news() == [reply]
        delta = script.core.take(reply)
        assert delta is not None and delta.finished
        return json.loads(delta.write())

    assert answer(COMPLETION(id="c", model="m", created=5, stream=False), encoded, 1) == {
        "id": "c",
        "object": "text_completion",
        "created": 5,
        "model": "m",
        "choices": [{"index": index, "text": "ab", **finish} for index in (0, 1)],
        "usage": {"prompt_tokens": 5, "total_tokens": 11, **usage},
    }
    assert answer(CHAT(id="c", model="m", created=5, stream=False), encoded[:1], 2) == {
        "id": "c",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        "choices": [{"index": index, "message": {"role": "assistant", "content": "ab"}, **finish} for index in (0, 1)],
        "usage": {"prompt_tokens": 2, "total_tokens": 8, **usage},
    }
