"""What every request passes through: a request id, the check of host and key, and errors in one
shape, JSON also for 404 and 500.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import uuid

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError, internal_error
from octavo.server.metrics import Metrics

logger = logging.getLogger(__name__)


OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Answered without a key, so that probes and Prometheus need none, as with vLLM. Every other route
needs one, also those that are added later.
"""

_CODES = {404: "route_not_found", 405: "method_not_allowed", 413: "body_too_large"}


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Before the headers go out: they carry the client's `X-Request-Id`, or one of ours if that is
    none or odd.
    """
    given = request.headers.get("X-Request-Id", "")
    known = re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", given)
    response.headers["Server"] = "octavo"  # rather than the versions of Python and aiohttp
    response.headers["X-Request-Id"] = given if known else uuid.uuid4().hex


def json_errors(metrics: Metrics) -> Middleware:
    """Turns whatever a handler raises into the error contract. A client that left is not an error."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ApiError as error:
            failure = error
        except web.HTTPException as error:
            allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            text = f"{request.method} {request.path[:100]}: {error.reason}"
            failure = ApiError(error.status, _CODES.get(error.status, "http_error"), text, headers=allow)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception:
            logger.exception("%s %s failed", request.method, request.path[:100])
            failure = internal_error()
        metrics.errors[failure.code] += 1
        return failure.response()

    return middleware


def check_host_and_key(config: ServerConfig) -> Middleware:
    """With keys: every route but `OPEN_PATHS` needs one. Without, on a loopback address: only local
    `Host` names are answered, so that a web page cannot reach the server by having its name resolve
    to 127.0.0.1.
    """
    digests = [hashlib.sha256(key.encode()).digest() for key in config.api_key]
    local_only = not digests and _is_loopback(config.host)
    allowed = frozenset(name.lower() for name in config.allowed_hosts)

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if local_only and not _is_local_name(request.headers.get("Host", ""), allowed):
            raise ApiError(403, "host_not_allowed", "This Host is not answered; see --allowed-hosts.")
        if digests and request.path not in OPEN_PATHS and not _has_key(request, digests):
            raise ApiError(401, "invalid_api_key", "A valid key is needed.", headers={"WWW-Authenticate": "Bearer"})
        return await handler(request)

    return middleware


def _has_key(request: web.Request, digests: list[bytes]) -> bool:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    digest = hashlib.sha256(key.strip().encode(errors="surrogateescape")).digest()
    # Over all keys and without an early exit, so that the time says nothing.
    matches = [hmac.compare_digest(digest, known) for known in digests]
    return scheme.lower() == "bearer" and any(matches)


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
