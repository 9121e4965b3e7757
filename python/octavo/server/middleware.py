"""What every request passes through: a request id, the check of host and key, and errors in one
shape, JSON also for 404 and 500.
"""

import asyncio
import ipaddress
import logging
import re
import time
from collections.abc import Awaitable, Callable

from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler, Middleware

from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError, bad_http, error_form, internal_error
from octavo.server.keys import CALLER, Keys
from octavo.server.log import log_answer, log_refusal, one_line
from octavo.server.metrics import Metrics
from octavo.server.request_id import request_id

logger = logging.getLogger(__name__)


OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Answered without a key, so that probes and Prometheus need none, as with vLLM. Every other route
needs one, also those that are added later.
"""

_CODES = {
    404: "route_not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    417: "unknown_expectation",
}


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Before the headers go out."""
    response.headers["Server"] = "octavo"  # rather than the versions of Python and aiohttp
    response.headers.setdefault("X-Request-Id", request_id(request))


def answer_preflights(config: ServerConfig) -> Middleware:
    """Tells browsers what pages of other origins may ask: a request without a key, as they send it
    before the one with it.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if (
            request.method != "OPTIONS"
            or "Access-Control-Request-Method" not in request.headers
            or _allowed_origin(request, config) is None
        ):
            return await handler(request)
        wanted = request.headers.get("Access-Control-Request-Headers", "authorization, content-type")
        names = wanted if "*" in config.allowed_headers else ", ".join(config.allowed_headers)
        methods = "DELETE, GET, OPTIONS, POST" if "*" in config.allowed_methods else ", ".join(config.allowed_methods)
        headers = {
            "Access-Control-Allow-Methods": methods,
            "Access-Control-Allow-Headers": names,
            "Access-Control-Max-Age": "600",
        }
        return web.Response(status=204, headers=headers)

    return middleware


def _allowed_origin(request: web.BaseRequest, config: ServerConfig) -> str | None:
    """What to tell the browser of a page's origin; None: nothing."""
    origin = request.headers.get("Origin")
    if origin is None or not ("*" in config.allowed_origins or origin in config.allowed_origins):
        return None
    return "*" if "*" in config.allowed_origins and not config.allow_credentials else origin


def name_origins(config: ServerConfig) -> Callable[[web.Request, web.StreamResponse], Awaitable[None]]:
    """Adds to every answer, errors and streams too, that the page's origin may read it."""

    async def add(request: web.Request, response: web.StreamResponse) -> None:
        if not config.allowed_origins:
            return
        response.headers["Vary"] = "Origin"
        if (origin := _allowed_origin(request, config)) is not None:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"
            if config.allow_credentials:
                response.headers["Access-Control-Allow-Credentials"] = "true"

    return add


def json_errors(metrics: Metrics, *, access_log: bool) -> Middleware:
    """Turns whatever a handler raises into the error contract, and logs it. A client that left is
    not an error.

    access_log: whether each answer leaves a line, and not refusals alone.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        arrival = time.monotonic()
        try:
            response = await handler(request)
        except ApiError as error:
            failure = error
        except web.HTTPException as error:
            failure = from_http(error, request)
        except (asyncio.CancelledError, ConnectionError):
            if access_log:
                log_answer(request, None, time.monotonic() - arrival, request_id(request))
            raise
        except Exception:
            logger.exception("%s failed", one_line(f"{request.method} {request.path}"))
            failure = internal_error()
        else:
            if access_log:
                log_answer(request, response.status, time.monotonic() - arrival, request_id(request))
            return response
        metrics.errors[failure.code] += 1
        response = error_form(request)(failure)
        response.headers["X-Request-Id"] = request_id(request)
        log_refusal(failure, request.method, request.path, response.headers["X-Request-Id"])
        return response

    return middleware


def from_http(error: web.HTTPException, request: web.BaseRequest) -> ApiError:
    """An error of aiohttp's in our shape: the wrong route or method, or an `Expect` that nobody
    knows.
    """
    headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    text = f"{request.method} {request.path[:100]}: {error.reason}"
    if error.status == 404 and isinstance(request, web.Request):
        text += f". {_route_hint(request)}"
    return ApiError(error.status, _CODES.get(error.status, "http_error"), text, headers=headers)


def _route_hint(request: web.Request) -> str:
    """Which route may be meant: clients leave out `/v1`, or write it twice. Or what to do without it."""
    if request.path.rstrip("/").rpartition("/")[2] in ("score", "rerank"):
        return "Texts are not scored here: take their vectors from /v1/embeddings, and of two vectors the cosine."
    routes = list(dict.fromkeys(resource.canonical for resource in request.app.router.resources()))
    meant = [route for route in routes if request.path.rstrip("/").endswith(route.removeprefix("/v1"))]
    if meant:
        return f"Is {max(meant, key=len)} meant?"
    return f"The routes are {', '.join(route for route in routes if '{' not in route)}."


def check_host_and_key(config: ServerConfig, keys: Keys) -> Middleware:
    """With keys: every route but `OPEN_PATHS` needs one. Without, on a loopback address: only local
    `Host` names are answered, so that a web page cannot reach the server by having its name resolve
    to 127.0.0.1.
    """
    local_only = not keys and _is_loopback(config.host)
    allowed = frozenset(name.lower() for name in config.allowed_hosts)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.version >= HttpVersion11 and len(request.headers.getall("Host", ())) != 1:
            raise bad_http("exactly one Host header is needed")
        if local_only and not _is_local_name(request.headers.get("Host", ""), allowed):
            raise ApiError(403, "host_not_allowed", "This Host is not answered; see --allowed-hosts.")
        if keys and not _is_open(request):
            caller = keys.find(_key_of(request))
            if caller is None:
                raise ApiError(401, "invalid_api_key", "A valid key is needed.", headers={"WWW-Authenticate": "Bearer"})
            request[CALLER] = caller
        return await handler(request)

    return middleware


def _is_open(request: web.Request) -> bool:
    """By the route that was matched, and not by what a path looks like."""
    resource = request.match_info.route.resource
    return resource is not None and resource.canonical in OPEN_PATHS


def _key_of(request: web.Request) -> str:
    """In `Authorization: Bearer`, or in `X-Api-Key` as Anthropic's clients send it; else nothing, which
    is nobody's.
    """
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if "X-Api-Key" in request.headers and scheme == "":
        return request.headers["X-Api-Key"].strip()
    return key.strip() if scheme.lower() == "bearer" else ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_local_name(header: str, allowed: frozenset[str]) -> bool:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:]+)(?::\d{1,5})?", header)
    if match is None:
        return False
    name = match.group(1).lower()
    return _is_loopback(name.strip("[]")) or name in allowed
