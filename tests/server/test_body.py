"""What is looked at of a body before it is decoded, against the decoded object; and what is
unpacked.
"""

import gzip
import json
import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo import _core
from octavo.chat import MAX_DEPTH
from octavo.server.body import MAX_VALUES, decode, unpack
from octavo.server.errors import ApiError
from octavo.server.limits import Limits
from octavo.server.openai.messages import template_messages
from octavo.server.openai.routes import CHAT, COMPLETION
from octavo.server.openai.schemas import ChatCompletionRequest
from octavo.server.openai.tool_schema import pattern_fault

TEXT = st.text(alphabet='[]{}"\\ü,:a\u2028\U0001f600')
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=30,
)


def measure(body: bytes, **limits: Any) -> Any:
    return _core.measure_body(body, **{"max_depth": 64, "max_fields": 10, "max_values": 1000, **limits})


def count(value: object) -> tuple[int, int, int]:
    """Keys and values, characters of text and numbers, and depth."""
    if isinstance(value, str):
        return 1, len(value), 0
    if isinstance(value, (list, dict)):
        inner = [*value.values(), *value] if isinstance(value, dict) else value
        parts = [(1, 0, 0), *map(count, inner)]
        return sum(part[0] for part in parts), sum(part[1] for part in parts), 1 + max(part[2] for part in parts)
    return 1, len(json.dumps(value)), 0


@given(JSON, st.booleans(), st.sampled_from([None, 1]))
def test_the_measure_of_valid_json(value: object, ascii: bool, indent: int | None) -> None:
    body = json.dumps({"a": value, "ü": [1]}, ensure_ascii=ascii, indent=indent).encode()
    values, text, depth = count(value)
    fields, total = measure(body)
    assert [json.loads(body[slice(*name)]) for name, _, _ in fields] == ["a", "ü"]
    assert json.loads(body[slice(*fields[0][1])]) == value
    assert (fields[0][2], total) == (text, values + 3)  # the whole object, the list, its 1
    for limits in ({"max_depth": max(depth, 1)}, {"max_values": total - 1}, {"max_fields": 1}):
        with pytest.raises(_core.RefusedError):
            measure(body, **limits)


@given(JSON)
def test_escapes_are_resolved_where_they_need_not_be(value: object) -> None:
    plain = json.dumps(value, ensure_ascii=False).encode()
    assert _core.resolve_escapes(json.dumps(value).encode()) == plain
    assert _core.resolve_escapes(plain) is plain


@pytest.mark.parametrize("ascii", [False, True])
def test_a_large_body_is_read_with_and_without_escapes(ascii: bool) -> None:
    text = 'a"\\ü\n 😀\x7f' * 10_000

    def read(form: Any, more: str = "", **fields: Any) -> Any:
        body = (json.dumps(fields, ensure_ascii=ascii)[:-1] + more + "}").encode()
        return decode(form, body, 10**6, 10**6, Limits(), strict=True)

    chat = read(CHAT.form, messages=[{"role": "user", "content": text}])
    assert [json.loads(bytes(message)) for message in chat.request.messages] == [{"role": "user", "content": text}]
    completion = read(COMPLETION.form, prompt=text, n=2)
    (value,) = completion.prompts
    bounds = {"max_prompts": 1, "max_tokens": 10**6, "max_characters": 10**6}
    assert _core.read_prompts(completion.body, value.start, value.stop, **bounds) == [text]
    assert completion.request.n == 2
    with pytest.raises(ApiError) as error:
        read(CHAT.form, ', "n": \\u0031', messages=[{"role": "user", "content": text}])
    assert error.value.code == "json_invalid" and ("(byte " in error.value.message) is not ascii


@given(st.binary(max_size=60) | st.text(alphabet='[]{}"\\a:,u', max_size=60).map(str.encode))
def test_what_is_no_json_is_measured_or_refused(body: bytes) -> None:
    try:
        fields, total = measure(body, max_depth=4)
    except _core.RefusedError as error:
        assert error.code in ("json_invalid", "json_too_deep")
    else:
        assert total <= len(body) and all(start <= end <= len(body) for _, (start, end), _ in fields)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 1, 5_000_000])
def test_deep_bodies_are_refused_whatever_follows(depth: int) -> None:
    with pytest.raises(_core.RefusedError) as caught:
        _core.measure_body(b"[" * depth, max_depth=MAX_DEPTH, max_fields=1, max_values=MAX_VALUES)
    assert caught.value.code == "json_too_deep"


def test_the_arguments_of_a_call_are_measured_too() -> None:
    """They are JSON within a text, which the measure of the body took for a text."""
    for number, code in ((MAX_VALUES - 10, None), (MAX_VALUES, "too_many_values")):
        arguments = json.dumps({"a": [[]] * number})
        turn = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": arguments}}]}
        chat = msgspec.json.decode(json.dumps({"messages": [turn]}), type=ChatCompletionRequest)
        if code is None:
            assert len(template_messages(chat, Limits())) == 1
            continue
        with pytest.raises(ApiError) as caught:
            template_messages(chat, Limits())
        assert (caught.value.code, caught.value.param) == (code, "messages")


def refusal(packed: bytes, encoding: str, limit: int = 1000) -> int:
    with pytest.raises(ApiError) as caught:
        unpack(packed, encoding, limit)
    return caught.value.status


def test_unpacking() -> None:
    body = b'{"prompt": "Hi"}' * 20
    raw = zlib.compressobj(wbits=-15)
    for encoding, packed in (
        ("gzip", gzip.compress(body)),
        ("deflate", zlib.compress(body)),
        ("deflate", raw.compress(body) + raw.flush()),
    ):
        assert unpack(packed, encoding, len(body)) == body
        assert refusal(packed, encoding, len(body) - 1) == 413
        for cut in range(len(packed)):
            assert refusal(packed[:cut], encoding) == 400, cut
        assert refusal(packed + b"x", encoding) == 400
    assert refusal(gzip.compress(bytes(50_000_000)), "gzip") == 413


@pytest.mark.parametrize(
    "pattern", ["", "^a+?$", "[]a]", "[^]]", "[]", r"\(", "a|b*", "(?:a)(?<n>b)(?P<m>c)(?i)", r"[\]]"]
)
def test_patterns_of_any_dialect_pass(pattern: str) -> None:
    assert pattern_fault(pattern) is None


@pytest.mark.parametrize("pattern", ["(", ")", "a)", "[", "[a", "*a", "a|*", "(+)", "\\", "a(b", "[\\]"])
def test_patterns_of_no_dialect_are_faults(pattern: str) -> None:
    assert pattern_fault(pattern) is not None
