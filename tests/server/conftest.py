"""A server on a real socket over the scripted engine."""

import io
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from octavo.engine.async_engine import AsyncEngine
from octavo.server.app import KEYS, METRICS, build_app
from octavo.server.config import ServerConfig
from octavo.server.connections import listen
from octavo.server.keys import Keys
from tests.server.scripted_engine import ScriptedEngine


@dataclass
class Served:
    """A server on a real socket, its engine and a client."""

    engine: Any
    url: str
    http: aiohttp.ClientSession
    keys: Keys

    async def post(self, path: str, body: Any, **kwargs: Any) -> tuple[int, Any]:
        """Status and JSON of one POST; bytes go as they are."""
        data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
        kwargs.setdefault("headers", {"Content-Type": "application/json"})
        async with self.http.post(self.url + path, data=data, **kwargs) as response:
            return response.status, await response.json(content_type="application/json")

    async def get(self, path: str, **kwargs: Any) -> tuple[int, Any]:
        """Status and JSON of one GET; None of an empty body."""
        async with self.http.get(self.url + path, **kwargs) as response:
            is_empty = not await response.read()
            return response.status, None if is_empty else await response.json(content_type="application/json")

    async def metric(self, name: str) -> float:
        """The value of a metric, summed over its labels."""
        return (await self.metrics(name))[0]

    async def metrics(self, *names: str) -> list[float]:
        """The same of several, at one time."""
        async with self.http.get(self.url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        return [
            sum(
                float(line.rpartition(" ")[2])
                for line in lines
                if line.startswith((name + "{", name + " ", name + ","))
            )
            for name in names
        ]

    async def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The `data:` lines of a stream, parsed; the last is `[DONE]`."""
        async with self.http.post(self.url + path, json={**body, "stream": True}) as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            text = (await response.read()).decode()
        return parse_events(text)


def parse_events(text: str) -> list[Any]:
    """As strict clients do: `data: ` with the space, events end with an empty line, comments are
    skipped.
    """
    import msgspec

    assert text.endswith("\n\n")
    events = [event for event in text.split("\n\n")[:-1] if not event.startswith(":")]
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event[6:] if event[6:] == "[DONE]" else msgspec.json.decode(event[6:]) for event in events]


async def serving(engine: AsyncEngine, config: ServerConfig, *, shutdown: bool = True) -> AsyncIterator[Served]:
    app = build_app(engine, config)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    listening = await listen(runner, app[METRICS], listener, backlog=128, limits=config)
    host, port = listener.getsockname()
    async with aiohttp.ClientSession() as http:
        yield Served(engine, f"http://{host}:{port}", http, app[KEYS])
    listening.close()
    await runner.cleanup()
    if shutdown:
        engine.shutdown()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async for one in serving(ScriptedEngine(), ServerConfig()):
        yield one


@pytest.fixture
async def served_slowly() -> AsyncIterator[Served]:
    """The first token takes three keep-alive intervals."""
    engine = ScriptedEngine()
    engine.script.first_delay = 0.3
    async for one in serving(engine, ServerConfig(sse_keep_alive_interval=0.1)):
        yield one


@pytest.fixture
async def served_narrowly() -> AsyncIterator[Served]:
    """Two requests run, four wait."""
    async for one in serving(ScriptedEngine(max_num_seqs=2, max_waiting=4), ServerConfig()):
        yield one
