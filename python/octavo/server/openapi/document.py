"""The document in OpenAPI 3.1, and a page for readers that asks nothing of any other server."""

import html
import re
from typing import Any

from octavo import _core
from octavo.server.body import Form
from octavo.server.openapi.operations import JSON, OPERATIONS, Operation
from octavo.server.openapi.schema import PROMPTS, Schemas, component_name

_ERROR = "Any error; docs/errors.md has the codes."
_TEXT: dict[str, Any] = {"type": "string"}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_ERRORS: dict[str, dict[str, Any]] = {
    "openai": _object(
        error=_object(message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"type": ["string", "null"]})
    ),
    "tgi": _object(error=_TEXT, error_type=_TEXT),
    "anthropic": _object(type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT)),
    "ollama": _object(error=_TEXT),
}
_SEVERAL = {"/tokenize", "/invocations"}
"""Routes whose errors have OpenAI's form or TGI's, as the body has."""


def openapi() -> dict[str, Any]:
    """The whole document."""
    schemas = Schemas()
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schemas)
    errors = {f"{protocol}.Error": schema for protocol, schema in _ERRORS.items()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Octavo",
            "version": _core.__version__,
            "description": "OpenAI's, vLLM's, TGI's, Anthropic's and Ollama's routes on one port. Every optional field "
            "may be null.",
        },
        "paths": paths,
        "components": {
            "schemas": dict(sorted((schemas.components | errors).items())),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
        "security": [{"bearer": []}, {"x-api-key": []}, {}],
    }


def _operation(operation: Operation, schemas: Schemas) -> dict[str, Any]:
    word = re.sub(r"\W+", "_", operation.path).strip("_") or "root"
    described: dict[str, Any] = {"operationId": f"{operation.method.lower()}_{word}", "summary": operation.summary}
    if operation.open:
        described["security"] = []
    names = re.findall(r"{(\w+)}", operation.path)
    if names:
        described["parameters"] = [{"name": name, "in": "path", "required": True, "schema": _TEXT} for name in names]
    if operation.forms:
        bodies = [_body(form, schemas) for form in operation.forms]
        schema = bodies[0] if len(bodies) == 1 else {"anyOf": bodies}
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema}}}
    errors = [{"$ref": f"#/components/schemas/{operation.errors}.Error"}]
    if operation.path in _SEVERAL:
        errors.append({"$ref": "#/components/schemas/tgi.Error"})
    described["responses"] = {
        "200": {"description": "The answer.", "content": {kind: _answer(kind) for kind in operation.answers}},
        "default": {
            "description": _ERROR,
            "content": {JSON: {"schema": errors[0] if len(errors) == 1 else {"anyOf": errors}}},
        },
    }
    return described


def _answer(kind: str) -> dict[str, Any]:
    return {"schema": {"type": ["object", "array"]} if kind == JSON else _TEXT}


def _body(form: Form[Any], schemas: Schemas) -> dict[str, Any]:
    """The struct, and beside it the one field that structs may leave to others."""
    reference = schemas.reference(form.struct)
    if form.apart in form.bulky and form.apart not in form.struct.__struct_fields__:
        component = schemas.components[component_name(form.struct)]
        component["properties"][form.apart] = PROMPTS
        if form.apart == "prompt":  # where there may be no input
            component["required"] = sorted({*component.get("required", ()), "prompt"})
    return reference


# ---- the page ------------------------------------------------------------------------------------

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{font-family:ui-monospace,monospace}summary{cursor:pointer}"
    "table{border-collapse:collapse}td{padding:.1rem 1rem .1rem 0;vertical-align:top}"
)
PAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
"""The page runs and fetches nothing."""


def page(document: dict[str, Any]) -> str:
    """The document for readers."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Octavo</title><style>{_STYLE}</style>",
        f"<h1>Octavo {_text(document['info']['version'])}</h1><p>{_text(document['info']['description'])} ",
        'As a file: <a href="/openapi.json">/openapi.json</a>.</p><h2>Routes</h2>',
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<details><summary><code>{method.upper()} {_text(path)}</code> {_text(operation['summary'])}")
            parts.append("</summary><p>")
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"][JSON]["schema"]
                parts.append(f"Body: {_type(schema)}. ")
            kinds = (kind for kind in operation["responses"]["200"]["content"])
            parts.append(f"Answer: {', '.join(_text(kind) for kind in kinds)}.</p></details>")
    parts.append("<h2>Bodies</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(f'<h3 id="{_text(name)}">{_text(name)}</h3><p>{_text(schema.get("description", ""))}</p><table>')
        for field, kind in schema["properties"].items():
            needed = "required" if field in schema.get("required", ()) else ""
            parts.append(f"<tr><td><code>{_text(field)}</code><td>{_type(kind)}<td>{needed}</tr>")
        parts.append("</table>")
    return "".join(parts) + "</html>\n"


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words, as HTML."""
    if "$ref" in schema:
        name = _text(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    kinds = schema.get("type", "anything")
    words = " or ".join(kinds) if isinstance(kinds, list) else kinds
    if "items" in schema:
        words += f" of {_type(schema['items'])}"
    return words


def _text(text: str) -> str:
    return html.escape(text, quote=True)
