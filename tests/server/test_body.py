"""The look at a body before it is parsed: nesting, against a scanner that reads one character after
the other.
"""

import json

from hypothesis import given
from hypothesis import strategies as st

from octavo.server.body import MAX_DEPTH, nesting

PADDING = "[" + ",".join(["[]"] * (MAX_DEPTH + 1)) + "]"  # more brackets than the limit, so that it really looks


def slow_nesting(text: str) -> int:
    depth = deepest = 0
    in_string = escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif in_string:
            escaped = character == "\\"
            in_string = character != '"'
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


JSON = st.recursive(
    st.none() | st.integers() | st.text(alphabet='[]{}"\\ü,:a'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(alphabet='[]{}"\\'), inner, max_size=3),
    max_leaves=30,
)


@given(JSON)
def test_nesting_of_valid_json(value: object) -> None:
    text = json.dumps([value, json.loads(PADDING)], ensure_ascii=False)
    assert nesting(text.encode()) == slow_nesting(text)


@given(st.text(alphabet='[]{}"\\a', max_size=60))
def test_nesting_of_anything(text: str) -> None:
    """Invalid JSON may be judged differently after its fault, but what is deep before any quote is
    seen as deep.
    """
    body = "[" * (MAX_DEPTH + 1) + text
    assert nesting(body.encode()) >= MAX_DEPTH + 1


def test_few_brackets_are_not_looked_at() -> None:
    assert nesting(b"[" * MAX_DEPTH) == 0


def test_large_bodies_are_cheap_in_memory_and_passes() -> None:
    assert nesting(b'"' + b"\\n" * 2_000_000 + b'"' + b"[" * 100) == 100
