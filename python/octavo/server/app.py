"""The web application: routes, probes, and what starts and ends with the event loop."""

import asyncio
import logging
from typing import TYPE_CHECKING

from aiohttp import web

from octavo.server.anthropic import errors as anthropic_errors
from octavo.server.anthropic.routes import AnthropicRoutes
from octavo.server.body import Bodies
from octavo.server.calls import CallServer
from octavo.server.config import ServerConfig
from octavo.server.errors import ERROR_FORMS, ERROR_PREFIXES, ErrorForm
from octavo.server.intake import Intake
from octavo.server.keys import Keys
from octavo.server.metrics import Metrics
from octavo.server.middleware import (
    add_headers,
    answer_preflights,
    check_host_and_key,
    json_errors,
    name_origins,
)
from octavo.server.ollama import errors as ollama_errors
from octavo.server.ollama.routes import OllamaRoutes
from octavo.server.openai.embeddings import EmbeddingRoutes
from octavo.server.openai.routes import OpenAIRoutes
from octavo.server.openapi.routes import OpenApiRoutes
from octavo.server.responses.routes import ResponsesRoutes
from octavo.server.shared import SharedRoutes
from octavo.server.tgi import errors as tgi_errors
from octavo.server.tgi.routes import TgiRoutes
from octavo.server.timelines import Timelines

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine

logger = logging.getLogger(__name__)

STUCK_AFTER = 60.0
"""Seconds in one step after which `/health` says that the engine hangs."""

CALLS = web.AppKey("calls", CallServer)
BODIES = web.AppKey("bodies", Bodies)
METRICS = web.AppKey("metrics", Metrics)
KEYS = web.AppKey("keys", Keys)


def build_app(engine: "AsyncEngine", config: ServerConfig) -> web.Application:
    """The application over a loaded engine. On start-up it has the engine watch the running loop."""
    keys = Keys(config, has_priorities=engine.config.scheduling_policy == "priority")
    metrics = Metrics(engine, keys)
    timelines = Timelines(engine)
    calls = CallServer(engine, config, metrics, timelines)
    bodies = Bodies(config)
    intake = Intake(engine, config, bodies, metrics, calls)
    openai = OpenAIRoutes(intake)
    tgi = TgiRoutes(intake, openai)
    shared = SharedRoutes(intake, openai, tgi)
    embeddings = EmbeddingRoutes(intake, openai)
    anthropic, ollama = AnthropicRoutes(intake, openai), OllamaRoutes(intake, openai, embeddings)
    app = web.Application(
        middlewares=[
            json_errors(metrics, access_log=config.access_log),
            answer_preflights(config),
            check_host_and_key(config, keys),
        ]
    )
    app[CALLS], app[BODIES], app[METRICS], app[KEYS], app[ERROR_FORMS] = calls, bodies, metrics, keys, {}

    async def health(_: web.Request) -> web.Response:
        """Alive and making progress; also while draining. An empty body, as vLLM and TGI have it."""
        healthy = not engine.is_dead and engine.step_age < STUCK_AFTER
        return web.Response() if healthy else web.json_response({"status": "dead"}, status=503)

    async def root(request: web.Request) -> web.Response:
        """TGI's health; browsers are shown what there is."""
        if "text/html" in request.headers.get("Accept", ""):
            return web.Response(status=302, headers={"Location": "docs"})
        return await health(request)

    async def ready(_: web.Request) -> web.Response:
        """Whether new requests are welcome."""
        status = "ready" if engine.is_ready else "draining" if engine.draining else "not ready"
        return web.json_response({"status": status}, status=200 if engine.is_ready else 503)

    async def scrape(_: web.Request) -> web.Response:
        return web.Response(body=metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def attach(_: web.Application) -> None:
        engine.attach_loop(asyncio.get_running_loop())

    async def close(_: web.Application) -> None:
        bodies.close()

    responses = ResponsesRoutes(intake, openai)
    app.add_routes([*openai.routes(), *embeddings.routes(), *responses.routes()])
    app.add_routes([*shared.routes(), *timelines.routes(), *OpenApiRoutes().routes()])
    for routes, form in (
        (tgi.routes(), tgi_errors.response),
        (anthropic.routes(), anthropic_errors.response),
        (ollama.routes(), ollama_errors.response),
    ):
        app.add_routes(routes)
        app[ERROR_FORMS].update({route.path: form for route in routes})
    prefixes: dict[str, ErrorForm] = {"/v1/messages/": anthropic_errors.response, "/api/": ollama_errors.response}
    app[ERROR_PREFIXES] = prefixes
    app.add_routes([web.get("/health", health), web.get("/ready", ready), web.get("/metrics", scrape)])
    app.add_routes([web.get("/", root), web.get("/ping", health), web.post("/ping", health)])
    app.on_response_prepare.append(add_headers)
    app.on_response_prepare.append(name_origins(config))
    app.on_startup.append(attach)
    app.on_cleanup.append(close)
    return app
