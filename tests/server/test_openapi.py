"""The OpenAPI document: every route is in it and nothing else, it is a valid one, and it says of bodies
what the structs say that check them.
"""

import re
from typing import Any

import jsonschema
import msgspec
import pytest

from octavo.server.app import build_app
from octavo.server.body import decode
from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError
from octavo.server.limits import Limits
from octavo.server.openapi.document import openapi
from octavo.server.openapi.operations import OPERATIONS
from octavo.server.openapi.schema import Schemas, component_name
from tests.server.conftest import Served
from tests.server.scripted_engine import ScriptedEngine

FORMS = list({id(form): form for operation in OPERATIONS for form in operation.forms}.values())
IDS = [component_name(form.struct) for form in FORMS]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi()


def objects(value: Any) -> list[dict[str, Any]]:
    """Every object in a document."""
    if isinstance(value, list):
        return [found for item in value for found in objects(item)]
    if isinstance(value, dict):
        return [value, *(found for item in value.values() for found in objects(item))]
    return []


def validator(document: dict[str, Any], name: str) -> jsonschema.Draft202012Validator:
    """Of one component, with the document's references."""
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", **document})


def test_every_route_is_in_it_and_nothing_else(document: dict[str, Any]) -> None:
    app = build_app(ScriptedEngine(), ServerConfig())
    served = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None}
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(method, path) for method, path in served if method != "HEAD"}


def test_it_is_whole(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1") and {"title", "version"} <= set(document["info"])
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    identities = [operation["operationId"] for operation in operations]
    assert len(set(identities)) == len(identities)
    for path, methods in document["paths"].items():
        for operation in methods.values():
            named = {parameter["name"] for parameter in operation.get("parameters", ())}
            assert named == set(re.findall(r"{(\w+)}", path))
            assert {"200", "default"} == set(operation["responses"]) and operation["summary"].endswith(".")
    schemas = document["components"]["schemas"]
    references = {found["$ref"] for found in objects(document) if "$ref" in found}
    assert references == {f"#/components/schemas/{name}" for name in schemas}  # none is missing, none is idle
    for name, schema in schemas.items():
        assert re.fullmatch(r"[\w.-]+", name)
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_fields_are_those_of_the_struct(document: dict[str, Any], form: Any) -> None:
    schema = document["components"]["schemas"][component_name(form.struct)]
    read = {*form.struct.__struct_fields__, *({form.apart} & form.bulky)}
    assert set(schema["properties"]) == read
    needed = {field.name for field in msgspec.structs.fields(form.struct) if field.required}
    assert set(schema.get("required", ())) - {"prompt"} == needed - {"prompt"}
    assert not set(schema["properties"]) & set(form.unsupported)


def values(schema: dict[str, Any], document: dict[str, Any]) -> list[Any]:
    """Values that a field may have by its schema, nulls and nested ones too."""
    if "$ref" in schema:
        component = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        required = component.get("required", ())
        least = {name: values(component["properties"][name], document)[0] for name in required}
        if component is document["components"]["schemas"].get("chat.Message"):
            least |= {"role": "user", "content": "Hi"}
        return [least]
    if "anyOf" in schema:
        return [value for part in schema["anyOf"] for value in values(part, document)]
    if "enum" in schema:
        return list(schema["enum"])
    kinds = schema.get("type", "object")
    by_type = {"string": "a", "boolean": True, "number": 0.5, "integer": max(1, schema.get("minimum", 1)), "null": None}
    found = []
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind == "array":
            found.append([values(schema.get("items", {}), document)[0]])
        elif kind == "object":
            inner = schema.get("properties", {})
            found.append({name: values(inner[name], document)[0] for name in schema.get("required", ())})
        else:
            found.append(by_type[kind])
    return found


@pytest.mark.parametrize("form", FORMS, ids=IDS)
def test_types_are_those_of_the_struct(document: dict[str, Any], form: Any) -> None:
    """What the document allows of a field is taken, and what it does not allow is refused as a wrong
    type, by what reads bodies.
    """
    name = component_name(form.struct)
    schema = document["components"]["schemas"][name]
    good = {field: values(schema["properties"][field], document)[0] for field in schema.get("required", ())}
    checks = validator(document, name)
    described = msgspec.inspect.type_info(form.struct)
    raw = {field.name for field in described.fields if "RawType" in str(field.type)}  # type: ignore[attr-defined]

    def read(body: dict[str, Any]) -> None:
        decode(form, msgspec.json.encode(body), 1000, 1000, Limits(), strict=True)

    read(good)
    for field, kind in schema["properties"].items():
        for value in values(kind, document):
            body = {**good, field: value}
            checks.validate(body)
            read(body)
        later = field == form.apart or field in raw  # checked by what comes after
        for value in ("a", 1, 0.5, True, [], {}, None):
            body = {**good, field: value}
            if later or checks.is_valid(body):
                continue
            with pytest.raises(ApiError) as caught:
                read(body)
            assert caught.value.status == 400 and caught.value.param == field
            assert caught.value.code in ("invalid_type", "missing_required_parameter"), (field, value)


def test_a_field_that_nobody_describes_fails() -> None:
    class Odd(msgspec.Struct):
        mystery: msgspec.Raw

    with pytest.raises(KeyError, match="mystery"):
        Schemas().reference(Odd)


async def test_both_are_served(served: Served) -> None:
    status, body = await served.get("/openapi.json")
    assert status == 200 and body == msgspec.json.decode(msgspec.json.encode(openapi()))
    async with served.http.get(served.url + "/docs") as response:
        text = await response.text()
        assert response.status == 200 and response.content_type == "text/html"
        assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert len(text) < 100_000 and "://" not in text and "<script" not in text
    for path in body["paths"]:
        assert f" {path}</code>" in text
    for name, schema in body["components"]["schemas"].items():
        assert f'id="{name}"' in text and all(f"<code>{field}</code>" in text for field in schema["properties"])
    targets = set(re.findall(r'href="#([^"]+)"', text))
    assert targets <= set(re.findall(r'id="([^"]+)"', text))
