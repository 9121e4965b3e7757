"""What an answer must look like, in the forms that clients send: OpenAI's `response_format` (also as
huggingface_hub, TGI and llama.cpp write it), vLLM's `structured_outputs`, and its older `guided_*`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import msgspec

from octavo.server.errors import ApiError, bad_request
from octavo.structured_outputs import KINDS, StructuredOutputsParams

_SHAPE = '{"type": "json_schema", "json_schema": {"name": "...", "schema": {...}, "strict": true}}'
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_MAX_NAME = 64
_OPTIONS = tuple(field.name for field in fields(StructuredOutputsParams))

GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_whitespace_pattern": "whitespace_pattern",
}
"""Names of vLLM's before `structured_outputs`."""


@dataclass(frozen=True)
class Wanted:
    """A constraint, and where in the request it stands."""

    params: StructuredOutputsParams | None = None
    names: Mapping[str, str] | None = None
    """What the request calls the field that the core names."""


def read(
    response_format: msgspec.Raw | None, structured_outputs: msgspec.Raw | None, guided: Mapping[str, Any]
) -> Wanted:
    """The constraint of a request, from the one field that has it. Raises `ApiError` 400.

    guided: the older fields that the request has, by name.
    """
    found = []
    if response_format is not None:
        found.append(("response_format", _response_format(response_format)))
    if structured_outputs is not None:
        found.append(("structured_outputs", _structured_outputs(structured_outputs)))
    if guided:
        found.append((min(guided), _guided(guided)))
    found = [(field, wanted) for field, wanted in found if wanted.params is not None]
    if len(found) > 1:
        both = " and ".join(field for field, _ in found)
        raise bad_request(f"{both}: an answer can only follow one of them.", found[1][0])
    return found[0][1] if found else Wanted()


def _response_format(raw: msgspec.Raw) -> Wanted:
    field = "response_format"
    given = _object(raw, field)
    kind = given.get("type")
    if kind == "text":
        _check_names(given, ("type",), field)
        return Wanted()
    if kind == "json_schema" and "value" not in given:
        _check_names(given, ("type", "json_schema"), field)
        return _schema(_schema_of(given.get("json_schema")), f"{field}.json_schema.schema")
    if kind == "json_object":
        _check_names(given, ("type", "value", "schema"), field)
        name = next((name for name in ("value", "schema") if given.get(name) is not None), None)
        if name is None:
            return _made("json_object", {"json_object": True}, field)
        return _schema(given[name], f"{field}.{name}")
    return _with_value(given, field, "text, json_object, json_schema, json or regex")


def read_grammar(raw: msgspec.Raw, field: str) -> Wanted:
    """TGI's form: `{"type": "json" | "json_schema" | "regex", "value": ...}`. Raises `ApiError` 400."""
    return _with_value(_object(raw, field), field, "json, json_schema or regex")


def _with_value(given: Mapping[str, Any], field: str, known: str) -> Wanted:
    kind, value = given.get("type"), given.get("value")
    if kind not in ("json", "json_schema", "regex"):
        shown = "missing" if kind is None else msgspec.json.encode(kind).decode()[:100]
        raise _wrong(f"{field}.type is {shown}, but must be one of {known}.", f"{field}.type")
    _check_names(given, ("type", "value"), field)
    if value is None:
        raise _wrong(f"{field}.value: is required for type {kind}.", f"{field}.value")
    if kind == "regex":
        return _made("regex", {"regex": value}, f"{field}.value")
    if kind == "json_schema" and isinstance(value, dict) and isinstance(value.get("schema"), dict):
        return _schema(value["schema"], f"{field}.value.schema")  # beside a name
    return _schema(value, f"{field}.value")


def _schema_of(given: Any) -> Any:
    """The schema in OpenAI's wrapper, whose other parts are checked."""
    field = "response_format.json_schema"
    if not isinstance(given, dict):
        raise _wrong(f"{field}: must be an object; the whole is {_SHAPE}.", field)
    for name in given:
        if name not in ("name", "description", "schema", "strict"):
            raise _wrong(f"{field}.{name[:50]}: unknown; the schema belongs one level deeper: {_SHAPE}.", field)
    if given.get("schema") is None:
        raise _wrong(f"{field}.schema: is missing; the whole is {_SHAPE}.", f"{field}.schema")
    name = given.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not _NAME.issuperset(name):
        raise _wrong(f"{field}.name: must be 1 to {_MAX_NAME} letters, digits, '_' or '-'.", f"{field}.name")
    if not isinstance(given.get("description"), (str, type(None))):
        raise _wrong(f"{field}.description: must be text.", f"{field}.description")
    if not isinstance(given.get("strict"), (bool, type(None))):
        raise _wrong(f"{field}.strict: must be true or false.", f"{field}.strict")
    return given["schema"]


def _structured_outputs(raw: msgspec.Raw) -> Wanted:
    field = "structured_outputs"
    given = {name: value for name, value in _object(raw, field).items() if value is not None}
    _check_names(given, _OPTIONS, field)
    kinds = [kind for kind in KINDS if kind in given]
    if not kinds and not given:
        return Wanted()
    return _made(kinds[0] if kinds else KINDS[0], given, field if not kinds else f"{field}.{kinds[0]}")


def _guided(guided: Mapping[str, Any]) -> Wanted:
    given = {GUIDED[name]: msgspec.json.decode(value) for name, value in guided.items()}
    kind = next((name for name in guided if GUIDED[name] in KINDS), None)
    if kind is None:
        raise _wrong("guided_whitespace_pattern: only makes sense beside guided_json.", "guided_whitespace_pattern")
    return _made(GUIDED[kind], given, kind)


def _schema(schema: Any, where: str) -> Wanted:
    if not isinstance(schema, (dict, str)) or (isinstance(schema, str) and not schema.lstrip().startswith("{")):
        raise bad_request(f"{where}: must be a JSON schema, which is an object.", where, "invalid_schema")
    return _made("json", {"json": schema}, where)


def _made(kind: str, given: Mapping[str, Any], where: str) -> Wanted:
    names = {f"structured_outputs.{kind}": where}
    try:
        return Wanted(StructuredOutputsParams(**given), names)
    except ValueError as error:
        message = str(error).replace(f"structured_outputs.{kind}", where)
        raise _wrong(f"{message}.", where) from None


def _object(raw: msgspec.Raw, field: str) -> dict[str, Any]:
    value = msgspec.json.decode(raw)
    if not isinstance(value, dict):
        raise bad_request(f"{field}: must be an object.", field, "invalid_type")
    return value


def _check_names(given: Mapping[str, Any], known: tuple[str, ...], field: str) -> None:
    for name in given:
        if name not in known:
            near = get_close_matches(name[:50], known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}."
            raise bad_request(f"{field}.{name[:50]}: unknown{hint}", f"{field}.{name[:50]}", "unknown_parameter")


def _wrong(message: str, field: str) -> ApiError:
    return bad_request(message, field)
