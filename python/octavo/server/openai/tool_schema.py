"""A look at the JSON schema of a tool's parameters: whether its types and patterns can be ones.

Nothing is compiled: what a schema means is the affair of whoever enforces it. A tool that no
validator would take is refused here, since what the model makes of it would be.
"""

from typing import Any

from octavo.server.errors import ApiError, bad_request

TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})

_ONE = ("additionalItems", "additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then",
        "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_LIST = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_BY_NAME = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")


def check_schema(schema: Any, where: str) -> None:
    """Raises `ApiError` 400 with param `tools` for the first type or pattern that is none.

    schema: decoded JSON, of bounded depth. where: its place in the request.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _bad(f"{where}: must be a schema, which is an object")
    _check_type(schema, where)
    if "pattern" in schema:
        _check_pattern(schema["pattern"], f"{where}.pattern")
    for pattern in _names(schema, "patternProperties"):
        _check_pattern(pattern, f"{where}.patternProperties")
    for key in _ONE:
        if key in schema and not isinstance(schema[key], list):
            check_schema(schema[key], f"{where}.{key}")
    for key in _LIST:
        if isinstance(schema.get(key), list):
            for index, part in enumerate(schema[key]):
                check_schema(part, f"{where}.{key}[{index}]")
    for key in _BY_NAME:
        for name in _names(schema, key):
            check_schema(schema[key][name], f"{where}.{key}.{name[:50]}")


def _names(schema: dict[str, Any], key: str) -> list[str]:
    return list(schema[key]) if isinstance(schema.get(key), dict) else []


def _check_type(schema: dict[str, Any], where: str) -> None:
    if "type" not in schema:
        return
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not types or any(not isinstance(kind, str) or kind not in TYPES for kind in types):
        raise _bad(f"{where}.type: must be of {', '.join(sorted(TYPES))}, or a list of these")


def _check_pattern(pattern: Any, where: str) -> None:
    if not isinstance(pattern, str):
        raise _bad(f"{where}: must be text")
    fault = pattern_fault(pattern)
    if fault is not None:
        raise _bad(f"{where}: not a regular expression: {fault}")


def pattern_fault(pattern: str) -> str | None:
    """What is wrong with a regular expression in every dialect: brackets that do not match, nothing
    that could be repeated, an escape of nothing. None where that is all right.
    """
    depth, at, can_repeat = 0, 0, False
    while at < len(pattern):
        character = pattern[at]
        if character == "\\":
            if at + 1 == len(pattern):
                return "it ends with a backslash"
            at, can_repeat = at + 1, True
        elif character == "[":
            end = _class_end(pattern, at)
            if end is None:
                return "a [ is not closed"
            at, can_repeat = end, True
        elif character == "(":
            depth, can_repeat = depth + 1, False
            if pattern.startswith("(?", at):
                at += 1  # what follows says which kind of group it is
        elif character == ")":
            if depth == 0:
                return "a ) was not opened"
            depth, can_repeat = depth - 1, True
        elif character in "*+?":
            if not can_repeat:
                return f"there is nothing before a {character}"
        else:
            can_repeat = character != "|"
        at += 1
    return "a ( is not closed" if depth else None


def _class_end(pattern: str, start: int) -> int | None:
    """Where the class that begins at `start` closes."""
    at = start + 1
    at += pattern.startswith("^", at)
    at += pattern.startswith("]", at) and "]" in pattern[at + 1 :]  # the first one may be a member
    while at < len(pattern):
        if pattern[at] == "]":
            return at
        at += 2 if pattern[at] == "\\" else 1
    return None


def _bad(message: str) -> ApiError:
    return bad_request(f"{message}.", "tools", "invalid_schema")
