"""Who is answered: keys, host names, and that nothing but the probes is open."""

from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from octavo.server.app import build_app
from octavo.server.config import ServerConfig
from tests.server.conftest import Served, serving
from tests.server.scripted_engine import ScriptedEngine

KEYS = ("first-key", "zweiter-schlüssel")


@pytest.fixture
async def guarded() -> AsyncIterator[Served]:
    async for one in serving(ScriptedEngine(), ServerConfig(api_key=KEYS)):
        yield one


async def test_every_route_but_the_probes_needs_a_key(guarded: Served) -> None:
    app = build_app(ScriptedEngine(), ServerConfig())
    paths = {resource.canonical.replace("{model}", "x") for resource in app.router.resources()}
    assert len(paths) >= 7
    for path in [*paths, "/v1/nope", "/v1/completions/../models"]:
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            async with guarded.http.request(method, guarded.url + path) as response:
                if path in ("/health", "/ready", "/metrics") and method == "GET":
                    assert response.status == 200
                else:
                    assert response.status == 401, path
                    body = await response.json()
                    if isinstance(body["error"], str):  # TGI's, and Ollama's
                        assert body.get("error_type", "authentication") == "authentication"
                    else:
                        assert body["error"]["type"] == "authentication_error"
                        assert body["error"].get("code", "invalid_api_key") == "invalid_api_key"
                    assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("key", KEYS)
async def test_good_keys(guarded: Served, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    assert (await guarded.get("/v1/models", headers=headers))[0] == 200


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer first-keY",
        "Basic first-key",
        "first-key",
        "Bearer " + "k" * 8000,
        "Bearer \xfc",
    ],
)
async def test_bad_keys(guarded: Served, value: str) -> None:
    assert (await guarded.get("/v1/models", headers={"Authorization": value}))[0] in (400, 401)


async def test_key_in_the_query_does_not_count(guarded: Served) -> None:
    assert (await guarded.get(f"/v1/models?api_key={KEYS[0]}"))[0] == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil", 403),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:80", 200),
        ("127.9.9.9", 200),
    ],
)
async def test_only_local_names_on_a_loopback_address_without_a_key(served: Served, host: str, status: int) -> None:
    got, answer = await served.get("/v1/models", headers={"Host": host})
    assert got == status
    if status == 403:
        assert answer["error"]["code"] == "host_not_allowed"


async def test_allowed_hosts() -> None:
    async for one in serving(ScriptedEngine(), ServerConfig(allowed_hosts=("llm.internal",))):
        assert (await one.get("/v1/models", headers={"Host": "llm.internal:8000"}))[0] == 200
        assert (await one.get("/v1/models", headers={"Host": "other.internal"}))[0] == 403


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1", True), ("x" * 129, False), ('a"b', False), ("a b", False), ("a\tb", False)]
)
async def test_request_ids_are_not_reflected_raw(served: Served, given: str, kept: bool) -> None:
    async with served.http.get(served.url + "/health", headers={"X-Request-Id": given}) as response:
        assert (response.headers["X-Request-Id"] == given) == kept
        assert len(response.headers["X-Request-Id"]) <= 128


def test_the_application_has_no_other_middleware_order() -> None:
    """Errors are shaped outermost, so that a refusal of host or key is JSON too."""
    app = build_app(ScriptedEngine(), ServerConfig())
    assert isinstance(app, web.Application)
    assert [middleware.__qualname__.partition(".")[0] for middleware in app.middlewares] == [
        "json_errors",
        "answer_preflights",
        "check_host_and_key",
    ]


def test_one_key_is_not_the_keys_of_its_letters() -> None:
    config = ServerConfig(api_key="secret", allowed_hosts="example.org")  # type: ignore[arg-type]
    assert (config.api_key, config.allowed_hosts) == (("secret",), ("example.org",))
