"""Conversations that a chat template meets: roles, rounds, tools, tool calls, parts, odd
characters.
"""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]

ODD = "Ünï «ç» <b>&amp;</b> 'q' \"d\" \\ {{ x }} {% y %} \t  \n\n 🦜 नमस्ते \u2028 \u00a0 \x1c é "

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <now> & 'here', \"there\" — 天気",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city\nwith country"},
                    "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 10},
                    "where": {
                        "type": "object",
                        "properties": {"lat": {"type": "number"}, "lon": {"type": "number", "default": 1e-07}},
                        "required": ["lat"],
                    },
                    "tags": {"type": "array", "items": {"type": "string"}},
                },
                "required": ["city"],
            },
            "return": {"type": "object", "description": "what it found"},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "no_arguments",
            "description": "Does nothing",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]

ARGUMENTS = {"city": "São Paulo", "days": 3, "exact": True, "wind": None, "where": {"lat": -23.5, "lon": 1e22}}


def _call(identifier: str, name: str = "get_weather", arguments: Any = None) -> dict[str, Any]:
    return {
        "id": identifier,
        "type": "function",
        "function": {"name": name, "arguments": ARGUMENTS if arguments is None else arguments},
    }


USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": " Hi there. "}
SYSTEM = {"role": "system", "content": "Be brief."}

CONVERSATIONS: dict[str, list[Message]] = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "rounds": [USER, ASSISTANT, {"role": "user", "content": "And?"}, ASSISTANT, {"role": "user", "content": "So?"}],
    "system_rounds": [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "  And then \n"}],
    "ends_with_assistant": [USER, ASSISTANT],
    "odd": [
        {"role": "system", "content": ODD},
        {"role": "user", "content": ODD},
        {"role": "assistant", "content": ODD},
    ],
    "odd_user": [{"role": "user", "content": ODD}],
    "empty": [],
    "empty_content": [{"role": "user", "content": ""}],
    "no_content": [{"role": "user", "content": None}],
    "missing_content": [{"role": "user"}],
    "two_users": [USER, USER],
    "two_systems": [SYSTEM, SYSTEM, USER],
    "late_system": [USER, SYSTEM],
    "unknown_role": [{"role": "critic", "content": "No."}],
    "developer": [{"role": "developer", "content": "Think."}, USER],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "Part one."}, {"type": "text", "text": " Part two"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
        USER,
    ],
    "image": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
    "thinking": [
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes.", "reasoning_content": "hm"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "<think>x</think>Yes"},
    ],
    "reasoning": [USER, {"role": "assistant", "content": "Yes.", "reasoning_content": "Long\nthought"}, USER],
    "tool_call": [
        SYSTEM,
        USER,
        {"role": "assistant", "content": "", "tool_calls": [_call("abcdefghi")]},
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": '{"t": 21.5}'},
        {"role": "assistant", "content": "It is warm."},
        {"role": "user", "content": "Thanks"},
    ],
    "tool_calls": [
        USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [_call("abcdefghi"), _call("jklmnopqr", "no_arguments", {})],
        },
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "rain"},
        {"role": "tool", "tool_call_id": "jklmnopqr", "name": "no_arguments", "content": {"nothing": [1, 2.0, None]}},
    ],
    "tool_call_text": [
        USER,
        {"role": "assistant", "content": "Wait.", "tool_calls": [_call("abcdefghi", arguments='{"city": "Oslo"}')]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "snow"},
    ],
    "tool_call_short_id": [
        USER,
        {"role": "assistant", "tool_calls": [_call("1")]},
        {"role": "tool", "tool_call_id": "1", "content": 3},
    ],
}

VARIABLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_thinking": {"enable_thinking": False},
    "thinking": {"enable_thinking": True},
    "documents": {"documents": [{"title": "One", "text": "First."}, {"title": "Two", "text": "Second & last."}]},
}
