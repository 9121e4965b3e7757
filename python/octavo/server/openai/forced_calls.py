"""The schema of an answer that must be calls of tools: `tool_choice` required, or with a name.

A named tool's answer is its arguments; else it is a list of `{"name": ..., "parameters": ...}`, as
vLLM has both. There each tool's parameters are a definition of the whole, and references within
them begin there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from octavo.answers import ToolUse
from octavo.server.structured import Wanted
from octavo.structured_outputs import StructuredOutputsParams

_ANY: dict[str, Any] = {"type": "object"}


def forced_calls(tools: Sequence[msgspec.Raw], use: ToolUse) -> Wanted | None:
    """The constraint of an answer that must be calls; None where it need not. tools: checked."""
    if not use.required and use.named is None:
        return None
    functions = [msgspec.json.decode(tool)["function"] for tool in tools]
    functions = [function for function in functions if function["name"] in use.names]
    if use.named is not None:
        schema = schema_of_named(functions, use.named)
    else:
        schema = schema_of_calls(functions, parallel=use.parallel)
    return Wanted(StructuredOutputsParams(json=schema), {"structured_outputs.json": "tools"})


def schema_of_named(functions: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Of the arguments of the function called `name`."""
    return next(function.get("parameters") or _ANY for function in functions if function["name"] == name)


def schema_of_calls(functions: Sequence[Mapping[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """Of a list of at least one call; of one alone unless they may be parallel."""
    definitions = {
        str(number): _moved(function.get("parameters") or _ANY, f"#/$defs/{number}")
        for number, function in enumerate(functions)
    }
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "parameters": {"$ref": f"#/$defs/{number}"}},
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for number, function in enumerate(functions)
    ]
    length = {"minItems": 1} if parallel else {"minItems": 1, "maxItems": 1}
    return {"type": "array", **length, "items": {"anyOf": calls}, "$defs": definitions}


def _moved(part: Any, root: str) -> Any:
    """A part of a tool's schema, with its references from `root` on."""
    if isinstance(part, list):
        return [_moved(item, root) for item in part]
    if not isinstance(part, dict):
        return part
    moved = {key: _moved(value, root) for key, value in part.items()}
    reference = part.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = root + reference[1:]
    return moved
