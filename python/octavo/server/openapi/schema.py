"""msgspec structs as JSON schemas: what a body may hold is written once, where it is checked."""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import inspect as types

from octavo.chat import Message, Tool
from octavo.server.anthropic import schemas as anthropic
from octavo.server.ollama import schemas as ollama
from octavo.server.openai import schemas as openai
from octavo.server.responses import schemas as responses
from octavo.server.tgi import schemas as tgi

OBJECT: dict[str, Any] = {"type": "object"}
_TEXT: dict[str, Any] = {"type": ["string", "null"]}
_MAYBE_OBJECT: dict[str, Any] = {"type": ["object", "null"]}

PROMPTS: dict[str, Any] = {
    "description": "A text, its token ids, or a list of either.",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}, "minItems": 1},
    ],
}
"""The `prompt` of a completion and the `input` of embeddings, which no struct has, since they may be
millions of token ids.
"""

_RESPONSE_FORMAT = {
    "type": ["object", "null"],
    "properties": {
        "type": {"enum": ["text", "json_object", "json_schema", "json", "regex"]},
        "json_schema": OBJECT,
        "value": {},
        "schema": OBJECT,
    },
    "required": ["type"],
}
_GRAMMAR = {
    "type": ["object", "null"],
    "properties": {"type": {"enum": ["json", "json_schema", "regex"]}, "value": {}},
    "required": ["type", "value"],
}
_STRUCTURED = {
    "type": ["object", "null"],
    "properties": {
        "json": {"type": ["object", "string", "boolean", "null"]},
        "regex": _TEXT,
        "choice": {"type": ["array", "null"], "items": {"type": "string"}},
        "grammar": _TEXT,
        "json_object": {"type": ["boolean", "null"]},
        "disable_any_whitespace": {"type": ["boolean", "null"]},
        "whitespace_pattern": _TEXT,
    },
    "additionalProperties": False,
}

RAW: Mapping[str, type[msgspec.Struct] | dict[str, Any]] = {
    "messages": Message,
    "tools": Tool,
    "response_format": _RESPONSE_FORMAT,
    "structured_outputs": _STRUCTURED,
    "guided_json": {"type": ["object", "string", "null"]},
    "guided_regex": _TEXT,
    "guided_choice": {"type": ["array", "null"], "items": {"type": "string"}},
    "guided_grammar": _TEXT,
    "guided_whitespace_pattern": _TEXT,
    "grammar": _GRAMMAR,
    "format": {"type": ["string", "object", "null"]},
    "arguments": {"type": ["string", "object"]},
    "parameters": _MAYBE_OBJECT,
    "input": OBJECT,
    "input_schema": _MAYBE_OBJECT,
    "output_format": _MAYBE_OBJECT,
}
"""Fields that structs keep as bytes, because what checks them comes later: by their names."""

_OWNERS = {
    openai.__name__: "openai",
    "octavo.server.openai.tokenize": "openai",
    "octavo.server.openai.embeddings": "openai",
    anthropic.__name__: "anthropic",
    ollama.__name__: "ollama",
    tgi.__name__: "tgi",
    responses.__name__: "responses",
    "octavo.server.responses.items": "responses",
}


def component_name(struct: type[msgspec.Struct]) -> str:
    """Protocols have structs of the same names."""
    owner = _OWNERS.get(struct.__module__, struct.__module__.rpartition(".")[2])
    return f"{owner}.{struct.__name__.lstrip('_')}"


class Schemas:
    """Collects the schemas of structs, each once, under `#/components/schemas`."""

    def __init__(self) -> None:
        self.components: dict[str, dict[str, Any]] = {}

    def reference(self, struct: type[msgspec.Struct]) -> dict[str, Any]:
        """Where the struct's schema is."""
        name = component_name(struct)
        if name not in self.components:
            self.components[name] = {}  # those that hold themselves
            self.components[name] = self._object(struct)
        return {"$ref": f"#/components/schemas/{name}"}

    def _object(self, struct: type[msgspec.Struct]) -> dict[str, Any]:
        described = types.type_info(struct)
        assert isinstance(described, types.StructType)
        properties = {field.encode_name: self._field(field) for field in described.fields}
        required = [field.encode_name for field in described.fields if field.required]
        schema: dict[str, Any] = {
            "type": "object",
            "description": " ".join((struct.__doc__ or "").split()),
            "properties": properties,
        }
        if required:
            schema["required"] = required
        return schema

    def _field(self, field: types.Field) -> dict[str, Any]:
        schema = self._type(field.type, field.name)
        if isinstance(field.default, (str, int, float, bool)):
            schema = {**schema, "default": field.default}
        return schema

    def _type(self, given: types.Type, name: str) -> dict[str, Any]:
        """name: of the field, which says what raw bytes are."""
        if isinstance(given, types.RawType):
            known = RAW[name]
            return known if isinstance(known, dict) else self.reference(known)
        if isinstance(given, types.StructType):
            return self.reference(given.cls)
        if isinstance(given, types.UnionType):
            return _any_of([self._type(one, name) for one in given.types])
        if isinstance(given, types.ListType):
            return {"type": "array", "items": self._type(given.item_type, name)}
        if isinstance(given, types.DictType):
            return {"type": "object", "additionalProperties": self._type(given.value_type, name)}
        if isinstance(given, types.IntType):
            bounds = {"minimum": given.ge, "maximum": given.le}
            return {"type": "integer", **{name: bound for name, bound in bounds.items() if bound is not None}}
        if isinstance(given, types.AnyType):
            return {}
        simple = {types.StrType: "string", types.BoolType: "boolean", types.FloatType: "number", types.NoneType: "null"}
        return {"type": simple[type(given)]}


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """One schema where the others say no more than their types."""
    plain = [schema["type"] for schema in schemas if set(schema) == {"type"}]
    others = [schema for schema in schemas if set(schema) != {"type"}]
    if not others:
        return {"type": plain}
    if len(others) == 1 and isinstance(others[0].get("type"), str) and len(plain) + 1 == len(schemas):
        return {**others[0], "type": [others[0]["type"], *plain]}
    return {"anyOf": [*others, *({"type": kind} for kind in plain)]}
