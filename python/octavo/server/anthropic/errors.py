"""Anthropic's errors: `{"type": "error", "error": {"type": word, "message": text}}`."""

from aiohttp import web

from octavo import _core
from octavo.server.errors import ApiError

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
          429: "rate_limit_error", 500: "api_error", 503: "overloaded_error"}  # fmt: skip


def response(error: ApiError) -> web.Response:
    """The HTTP answer."""
    body = _core.anthropic_error(error.message, type=_TYPES.get(error.status, "invalid_request_error"))
    return error.response_of(error.status, body + b"\n")
