"""What a client reads, byte for byte: one transcript for each form of a stream, written by hand.

The core is driven step by step and taken after each, so that what leaves together does not depend
on time.
"""

import json
import re

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
    ending: str = "\n\n",
    whole: bool = False,
    **params: int,
) -> list[str]:
    """Everything that is written for a call, as events without what ends each."""
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
    if whole:
        return [text.decode()]
    events = text.decode().split(ending)
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


def test_a_chat_with_reasoning_and_calls(script: Script) -> None:
    """As OpenAI's and vLLM's documents have them: a call's name first, with empty arguments, then pieces."""
    script.answer = b'<think>h</think>\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    head = '{"id":"c","object":"chat.completion.chunk","created":5,"model":"m","choices":[{"index":0,"delta":'
    answer = _core.AnswerFormat(reasoning="think", calls="hermes", tools=["f"])
    events = told(script, CHAT(id="c", model="m", created=5, stream=True, answer=answer))
    assert events.pop() == "data: [DONE]"
    deltas, tails = [], []
    for event in events:
        assert event.startswith(f"data: {head}")
        delta, _, tail = event.removeprefix(f"data: {head}").partition(',"logprobs":null,')
        deltas.append(delta)
        tails.append(tail)
    assert tails == ['"finish_reason":null}]}'] * (len(tails) - 1) + ['"finish_reason":"tool_calls"}]}']
    assert len(deltas) == len(script.answer) + 1  # one a token, the end token too
    assert deltas[0] == '{"role":"assistant","content":""}'
    identity = json.loads(next(delta for delta in deltas if "tool_calls" in delta))["tool_calls"][0]["id"]
    assert [delta for delta in deltas[1:] if delta != "{}"] == [
        '{"reasoning_content":"h","reasoning":"h"}',
        f'{{"tool_calls":[{{"index":0,"id":"{identity}","type":"function",'
        '"function":{"name":"f","arguments":""}}]}',
        *('{"tool_calls":[{"index":0,"function":{"arguments":' + json.dumps(piece) + "}}]}" for piece in '{"a": 1}'),
    ]


def test_messages_of_anthropic(script: Script) -> None:
    """As Anthropic's documents have a stream: blocks are opened, filled and closed one after another."""
    script.answer = b'<think>h</think>a<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    answer = _core.AnswerFormat(reasoning="think", calls="hermes", tools=["f"])
    events = told(script, _core.ReplyFormat.anthropic(id="msg_1", model="m", stream=True, answer=answer))
    names = [event.split("\n")[0] for event in events]
    data = [event.split("\n")[1].removeprefix("data: ") for event in events]
    assert all(name == f"event: {json.loads(line)['type']}" for name, line in zip(names, data, strict=True))
    usage = '"usage":{"input_tokens":2,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":'
    identity = json.loads(next(line for line in data if "tool_use" in line))["content_block"]["id"]
    assert identity.startswith("toolu_")
    assert data == [
        '{"type":"message_start","message":{"id":"msg_1","type":"message","role":"assistant","model":"m",'
        '"content":[],"stop_reason":null,"stop_sequence":null,' + usage + "0}}}",
        '{"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"h"}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":""}}',
        '{"type":"content_block_stop","index":0}',
        '{"type":"content_block_start","index":1,"content_block":{"type":"text","text":""}}',
        '{"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"a"}}',
        '{"type":"content_block_stop","index":1}',
        '{"type":"content_block_start","index":2,"content_block":{"type":"tool_use",'
        f'"id":"{identity}","name":"f","input":{{}}}}}}',
        '{"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":"{"}}',
        '{"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":"}"}}',
        '{"type":"content_block_stop","index":2}',
        '{"type":"message_delta","delta":{"stop_reason":"tool_use","stop_sequence":null},' + usage + "71}}",
        '{"type":"message_stop"}',
    ]


def responses(answer: _core.AnswerFormat | None = None, *, stream: bool = True) -> _core.ReplyFormat:
    request = '{"store":false,"tools":[{"a":\n"\u2028"}]}'
    return _core.ReplyFormat.responses(id="resp_1", model="m", created=5, request=request, stream=stream, answer=answer)


def numbered(*events: tuple[str, str]) -> list[str]:
    """Events with their names, numbers and further fields."""
    return [
        f'event: {name}\ndata: {{"type":"{name}","sequence_number":{number},{fields}}}'
        for number, (name, fields) in enumerate(events)
    ]


def response(status: str, output: str, usage: str = "null", incomplete: str = "null", error: str = "null") -> str:
    return (
        f'"response":{{"id":"resp_1","object":"response","created_at":5,"status":"{status}","error":{error},'
        f'"incomplete_details":{incomplete},"model":"m","output":[{output}],'
        f'"store":false,"tools":[{{"a": "\\u2028"}}],"usage":{usage}}}'
    )


def used(output: int, reasoning: int = 0) -> str:
    return (
        f'{{"input_tokens":2,"input_tokens_details":{{"cached_tokens":0,"cache_write_tokens":0}},"output_tokens":{output},'
        f'"output_tokens_details":{{"reasoning_tokens":{reasoning}}},"total_tokens":{2 + output}}}'
    )


def message(text: str | None, number: int, status: str) -> str:
    part = "" if text is None else f'{{"type":"output_text","text":"{text}","annotations":[],"logprobs":[]}}'
    return f'{{"id":"msg_1_{number}","type":"message","role":"assistant","content":[{part}],"status":"{status}"}}'


def told_message(text: str, *, number: int = 0, status: str = "completed") -> list[tuple[str, str]]:
    """The events of a message, a token a letter."""
    place = f'"item_id":"msg_1_{number}","output_index":{number},"content_index":0'
    part = '{{"type":"output_text","text":"{}","annotations":[],"logprobs":[]}}'
    return [
        ("response.output_item.added", f'"output_index":{number},"item":{message(None, number, "in_progress")}'),
        ("response.content_part.added", f'{place},"part":{part.format("")}'),
        *(("response.output_text.delta", f'{place},"delta":"{letter}","logprobs":[]') for letter in text),
        ("response.output_text.done", f'{place},"text":"{text}","logprobs":[]'),
        ("response.content_part.done", f'{place},"part":{part.format(text)}'),
        ("response.output_item.done", f'"output_index":{number},"item":{message(text, number, status)}'),
    ]


BEGUN = [
    ("response.created", response("in_progress", "")),
    ("response.in_progress", response("in_progress", "")),
]


def test_a_response(script: Script) -> None:
    """As OpenAI's documents have a stream: items are added, filled and done, events are numbered."""
    script.answer = b"ab"
    assert told(script, responses()) == numbered(
        *BEGUN,
        *told_message("ab"),
        ("response.completed", response("completed", message("ab", 0, "completed"), used(3))),
    )


def test_a_response_of_nothing_has_an_empty_message(script: Script) -> None:
    script.answer = b""
    assert told(script, responses()) == numbered(
        *BEGUN,
        *told_message(""),
        ("response.completed", response("completed", message("", 0, "completed"), used(1))),
    )


def test_a_response_that_is_cut(script: Script) -> None:
    script.answer = b"abc"
    cut = response("incomplete", message("ab", 0, "incomplete"), used(2), '{"reason":"max_output_tokens"}')
    assert told(script, responses(), max_tokens=2) == numbered(
        *BEGUN, *told_message("ab", status="incomplete"), ("response.incomplete", cut)
    )


def test_a_response_that_fails(script: Script) -> None:
    script.answer, script.fail_after = b"abc", 1
    why = "the model's output for this request could not be used"
    error = f'"message":"{why}",{{}}"param":null,"code":"numerical_error"'
    kind = '"type":"server_error",'
    failed = f'{{"code":"numerical_error","message":"{why}"}}'
    assert told(script, responses()) == numbered(
        *BEGUN,
        *told_message("a")[:3],
        ("error", error.format("") + ',"error":{' + error.format(kind) + "}"),
        ("response.failed", response("failed", message("a", 0, "incomplete"), error=failed)),
    )


def test_a_response_with_reasoning_and_calls(script: Script) -> None:
    script.answer = b'<think>h</think>a<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    answer = _core.AnswerFormat(reasoning="think", calls="hermes", tools=["f"])

    def reasoning(text: str | None, status: str) -> str:
        part = "" if text is None else f'{{"type":"reasoning_text","text":"{text}"}}'
        return (
            f'{{"id":"rs_1_0","type":"reasoning","summary":[],"content":[{part}],"encrypted_content":null,'
            f'"status":"{status}"}}'
        )

    def call(arguments: str, status: str) -> str:
        return (
            f'{{"id":"fc_1_2","type":"function_call","call_id":"{identity}","name":"f","arguments":"{arguments}",'
            f'"status":"{status}"}}'
        )

    def expected() -> list[str]:
        place = '"item_id":"rs_1_0","output_index":0,"content_index":0'
        of_call = '"item_id":"fc_1_2","output_index":2'
        done = [reasoning("h", "completed"), message("a", 1, "completed"), call("{}", "completed")]
        return numbered(
            *BEGUN,
            ("response.output_item.added", f'"output_index":0,"item":{reasoning(None, "in_progress")}'),
            ("response.content_part.added", f'{place},"part":{{"type":"reasoning_text","text":""}}'),
            ("response.reasoning_text.delta", f'{place},"delta":"h"'),
            ("response.reasoning_text.done", f'{place},"text":"h"'),
            ("response.content_part.done", f'{place},"part":{{"type":"reasoning_text","text":"h"}}'),
            ("response.output_item.done", f'"output_index":0,"item":{done[0]}'),
            *told_message("a", number=1),
            ("response.output_item.added", f'"output_index":2,"item":{call("", "in_progress")}'),
            ("response.function_call_arguments.delta", f'{of_call},"delta":"{{"'),
            ("response.function_call_arguments.delta", f'{of_call},"delta":"}}"'),
            ("response.function_call_arguments.done", f'{of_call},"name":"f","arguments":"{{}}"'),
            ("response.output_item.done", f'"output_index":2,"item":{done[2]}'),
            ("response.completed", response("completed", ",".join(done), used(71, reasoning=10))),
        )

    events = told(script, responses(answer))
    identity = json.loads(next(event for event in events if "call_id" in event).split("\ndata: ")[1])["item"]["call_id"]
    assert identity.startswith("call_")
    assert events == expected()
    # The scripted tokens are bytes: those of the opening tag are reasoning once it is whole.
    # A client that lags gets fewer deltas of the same answer; so does a whole answer.
    assert told(script, responses(answer), steps_a_take=99)[-1].split(",", 2)[2] == events[-1].split(",", 2)[2]
    (body,) = told(script, responses(answer, stream=False), whole=True)
    assert f'"response":{body}}}' == events[-1].split(",", 2)[2]


def test_tokens_of_tgi(script: Script) -> None:
    """As TGI's documents have a stream: an event a token, the last with all of the text, and no `[DONE]`."""
    script.answer = b"ab"

    def told_by(steps_a_take: int) -> list[str]:
        reply_format = _core.ReplyFormat.tgi(stream=True, details=True, top_n_tokens=1, seed=7, prompt="Hi ")
        return told(script, reply_format, logprobs=1, steps_a_take=steps_a_take)

    def token(identity: int, text: str) -> str:
        entry = f'{{"id":{identity},"text":"{text}","logprob":-0.5,"special":false}}'
        return f'"token":{entry},"top_tokens":[{entry}]'

    end = '{"finish_reason":"eos_token","generated_tokens":3,"seed":7,"input_length":2}'
    expected = [
        f'data:{{"index":1,{token(97, "a")},"generated_text":null,"details":null}}',
        f'data:{{"index":2,{token(98, "b")},"generated_text":null,"details":null}}',
        f'data:{{"index":3,{token(256, "")},"generated_text":"Hi ab","details":{end}}}',
    ]
    assert told_by(1) == expected
    assert told_by(9) == expected  # also where they leave together


def test_lines_of_ollama(script: Script) -> None:
    """Its fields in the order of `ChatResponse` in its api/types.go."""
    script.answer = b'a<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
    answer = _core.AnswerFormat(calls="hermes", tools=["f"])
    reply_format = _core.ReplyFormat.ollama(
        id="1", model="m", created_at="2026-01-01T00:00:00Z", chat=True, stream=True, answer=answer
    )
    lines = told(script, reply_format, ending="\n")
    head = '{"model":"m","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":'
    assert lines[:2] == [
        f'{head}"a"}},"done":false}}',
        f'{head}"","tool_calls":[{{"id":"{json.loads(lines[1])["message"]["tool_calls"][0]["id"]}","function":'
        '{"index":0,"name":"f","arguments":{"x": 1}}}]},"done":false}',
    ]
    last = json.loads(lines[2])
    assert list(last) == [
        "model", "created_at", "message", "done", "done_reason", "total_duration", "load_duration",
        "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration",
    ]  # fmt: skip
    assert (last["done"], last["done_reason"], last["prompt_eval_count"], last["eval_count"]) == (True, "stop", 2, 61)
    assert last["total_duration"] >= last["eval_duration"] >= 0


OLLAMA_TIMES = (
    r'"total_duration":\d+,"load_duration":0,"prompt_eval_count":2,"prompt_eval_duration":\d+,"eval_count":2,'
    r'"eval_duration":\d+'
)


@pytest.mark.parametrize("chat", [True, False])
def test_log_probabilities_of_ollama(script: Script, chat: bool) -> None:
    """Chats have them before the times, completions behind: so stand the fields in its api/types.go."""
    script.answer = "é".encode()

    def lines(stream: bool, logprobs: int) -> list[str]:
        reply_format = _core.ReplyFormat.ollama(id="1", model="m", created_at="T", chat=chat, stream=stream)
        return told(script, reply_format, ending="\n", whole=not stream, logprobs=logprobs, max_tokens=2)

    def part(text: str) -> str:
        of_text = f'"message":{{"role":"assistant","content":"{text}"}}' if chat else f'"response":"{text}"'
        return f'{{"model":"m","created_at":"T",{of_text},"done":'

    def entry(byte: int, top: str = "") -> str:
        return f'{{"token":"\N{REPLACEMENT CHARACTER}","logprob":-0.5,"bytes":[{byte}]{top}}}'

    first, second = lines(True, 0)[:2]
    assert first == f'{part("")}false,"logprobs":[{entry(0xC3)}]}}'
    assert second == f'{part("é")}false,"logprobs":[{entry(0xA9)}]}}'
    last = lines(True, 0)[2]
    assert re.fullmatch(re.escape(part("")) + rf'true,"done_reason":"length",{OLLAMA_TIMES}}}', last)
    tops = [f',"top_logprobs":[{entry(byte)}]' for byte in (0xC3, 0xA9)]
    told_all = f'"logprobs":[{entry(0xC3, tops[0])},{entry(0xA9, tops[1])}]'
    (whole,) = lines(False, 1)
    end = f"{re.escape(told_all)},{OLLAMA_TIMES}" if chat else f"{OLLAMA_TIMES},{re.escape(told_all)}"
    assert re.fullmatch(re.escape(part("é")) + rf'true,"done_reason":"length",{end}}}', whole)
