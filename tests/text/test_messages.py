"""From the messages and tools of a chat to what its template sees: a request's way and that of
`LLM.chat`, against jinja2 over the same Python objects.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from octavo import _core
from octavo.chat import ChatError, read_chat
from octavo.server.body import decode
from octavo.server.errors import ApiError
from octavo.server.limits import Limits
from octavo.server.openai.messages import template_messages, template_tools
from octavo.server.openai.routes import CHAT
from tests.text import jinja_oracle

SOURCE = "{{ messages|tojson }}{{ tools|tojson if tools }}{% for m in messages %}{{ m.content }}|{% endfor %}"
USER = {"role": "user", "content": "Hi"}
BIG = 123456789012345678901234567890
TOOL = {
    "type": "function",
    "x-vendor": {"z": 1, "a": [None, 1.50, BIG]},
    "function": {
        "strict": True,
        "parameters": {"type": "object", "properties": {"z": {"default": BIG}, "a": {"enum": [2**64]}}},
        "returns": {"type": "string"},
        "description": "d",
        "name": "f",
    },
    "cache_control": {"type": "ephemeral"},
}


def call(arguments: Any, name: str = "f") -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def turn(*calls: dict[str, Any], **fields: Any) -> list[Any]:
    return [USER, {"role": "assistant", "content": "", **fields, **({"tool_calls": list(calls)} if calls else {})}]


def requested(messages: Any, tools: Any, takes_tools: bool = True, **fields: Any) -> tuple[str, str | None]:
    """What a request's template sees, as JSON."""
    body = json.dumps({"messages": messages, "tools": tools, **fields}).encode()
    request = decode(CHAT.form, body, 1 << 20, 4096, Limits(), strict=True).request
    return msgspec.json.encode(template_messages(request, Limits())).decode(), template_tools(request, takes_tools)


def called(messages: Any, tools: Any) -> tuple[str, str | None]:
    """What the template sees of `LLM.chat`."""
    return read_chat(messages, tools, True)


def assert_seen(way: Any, messages: Any, tools: Any, expected: Any) -> None:
    """The template sees `expected` for the messages, and the tools as they are."""
    messages_json, tools_json = way(messages, tools)
    ours = _core.ChatTemplate(SOURCE).render(messages_json, tools_json=tools_json)
    assert ours == jinja_oracle.render(SOURCE, messages=expected, tools=tools)


BOTH = pytest.mark.parametrize("way", [requested, called])


@BOTH
def test_tools_stay_as_they_are(way: Any) -> None:
    plain = {"type": "function", "function": {"name": "g", "parameters": None, "description": None}}
    assert_seen(way, [USER], [TOOL, plain], [USER])


@BOTH
@pytest.mark.parametrize(
    ("given", "seen"),
    [
        (f'{{"z": 1, "a": {{"b": [{BIG}, 1.50, 1e5]}}}}', {"z": 1, "a": {"b": [BIG, 1.5, 1e5]}}),
        ({"z": BIG, "a": -(2**64)}, {"z": BIG, "a": -(2**64)}),
        ("", {}),
        (" {} ", {}),
        ("not json", "not json"),
        ('{"a": 1', '{"a": 1'),
        ("[1]", "[1]"),
        ("7", "7"),
        ('{"a": NaN}', '{"a": NaN}'),
        ('{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ('{"a":' * 200 + "1" + "}" * 200, '{"a":' * 200 + "1" + "}" * 200),
        ('{"a":' + "[" * 63 + "]" * 63 + "}", {"a": json.loads("[" * 63 + "]" * 63)}),
        ('{"a":' + "[" * 64 + "]" * 64 + "}", '{"a":' + "[" * 64 + "]" * 64 + "}"),
    ],
)
def test_arguments_of_earlier_turns(way: Any, given: Any, seen: Any) -> None:
    assert_seen(way, turn(call(given)), None, turn(call(seen)))


@BOTH
@pytest.mark.parametrize("name", ["a.b", "n" * 100, "two words", "ü", ""])
def test_names_of_earlier_calls_are_anything(way: Any, name: str) -> None:
    assert_seen(way, turn(call({"a": 1}, name)), None, turn(call({"a": 1}, name)))


@BOTH
def test_refusals_are_what_was_said(way: Any) -> None:
    parts = [{"type": "text", "text": "Well."}, {"type": "refusal", "refusal": "No."}]
    assert_seen(way, turn(content=parts), None, turn(content="Well.\nNo."))
    for content in (None, ""):
        messages_json, _ = way(turn(content=content, refusal="No."), None)
        assert json.loads(messages_json) == turn(content="No.")


@BOTH
def test_earlier_thoughts_reach_the_template(way: Any) -> None:
    expected = [USER, {"role": "assistant", "content": "", "reasoning_content": "hm"}]
    assert_seen(way, turn(reasoning_content="hm"), None, expected)
    for reasoning in ("hm", {"effort": "low"}):  # as answers have it, or as somebody else does
        seen = expected if reasoning == "hm" else [USER, {"role": "assistant", "content": ""}]
        seen = [seen[0], {**seen[1], "reasoning": reasoning}]
        assert_seen(way, turn(reasoning=reasoning), None, seen)


@BOTH
def test_developers_are_the_system(way: Any) -> None:
    given = [{"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert_seen(way, given, None, [{"role": "system", "content": "a\nb"}])


REFUSED = [
    ([], None, "messages", "must not be empty"),
    ("Hi", None, "messages", "messages"),
    (["Hi"], None, "messages", r"messages\[0\]"),
    ([{"role": "king", "content": "Hi"}], None, "messages", r"messages\[0\].role: must be one of"),
    ([{"content": "Hi"}], None, "messages", "role"),
    ([USER, {"role": "user"}], None, "messages", r"messages\[1\].content: required"),
    ([{"role": "user", "content": 5}], None, "messages", r"messages\[0\].content"),
    ([{"role": "tool", "content": "x"}], None, "messages", "tool_call_id: required"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], None, "messages", "only text parts"),
    ([{"role": "user", "content": [{"type": "text"}]}], None, "messages", r"content\[0\].text: this field"),
    (turn(content=[{"type": "refusal", "text": "x"}]), None, "messages", r"content\[0\].refusal: this field"),
    (turn(call(5)), None, "messages", "arguments: must be text or an object"),
    ([USER], [{"type": "function", "function": {}}], "tools", r"tools\[0\].function"),
    ([USER], [TOOL, {**TOOL, "type": "code"}], "tools", r"tools\[1\].type: must be function"),
    ([USER], [TOOL, TOOL], "tools", "two tools are called f"),
    ([USER], [{"type": "function", "function": {"name": "a.b"}}], "tools", "letters, digits"),
    ([USER], [{"type": "function", "function": {"name": "a", "parameters": [1]}}], "tools", "parameters: must be"),
    ([USER], [{"type": "function", "function": {"name": "a", "strict": 1}}], "tools", r"tools\[0\].function.strict"),
    ([USER], [TOOL] * 257, "tools", "at most 256"),
]


@pytest.mark.parametrize(("messages", "tools", "param", "message"), REFUSED)
def test_refusals_name_the_field(messages: Any, tools: Any, param: str, message: str) -> None:
    with pytest.raises(ApiError, match=message) as refused:
        requested(messages, tools)
    assert (refused.value.status, refused.value.param) == (400, param)
    with pytest.raises(ChatError, match=message) as error:
        called(messages, tools)
    assert error.value.param == param


def test_what_json_cannot_hold_is_refused() -> None:
    for odd in (float("nan"), {1, 2}, b"x", "\ud800"):
        with pytest.raises(ChatError, match="messages or tools"):
            called([{"role": "user", "content": "x", "odd": odd}], None)


@BOTH
def test_keys_that_nobody_checks_reach_the_template(way: Any) -> None:
    """As in transformers: a template may ask for what OpenAI's messages do not have."""
    messages = [
        {"role": "user", "content": "Hi", "annotations": [{"z": 1, "a": [None, 1.5]}]},
        {"role": "assistant", "content": "x", "thinking": "hm", "n": BIG, "audio": None},
    ]
    assert_seen(way, messages, None, messages)


def test_a_message_that_is_not_utf8_is_refused() -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x", "odd": "y"}]}).encode().replace(b"y", b"\xff")
    with pytest.raises(ApiError) as refused:
        request = decode(CHAT.form, body, 1 << 20, 4096, Limits(), strict=True).request
        template_messages(request, Limits())
    assert refused.value.status == 400


def test_tools_need_a_place_in_the_template() -> None:
    for way in (lambda: requested([USER], [TOOL], False), lambda: read_chat([USER], [TOOL], False)):
        with pytest.raises((ApiError, ChatError), match="has no place for them") as refused:
            way()
        assert (refused.value.param, refused.value.code) == ("tools", "unsupported_tools")  # type: ignore[attr-defined]
    assert requested([USER], [TOOL], False, tool_choice="none")[1] is None
    assert requested([USER], [TOOL], True, tool_choice="none")[1] is not None
    assert requested([USER], [], False)[1] is None and read_chat([USER], [], False)[1] is None
