"""TGI's errors: `{"error": text, "error_type": word}`. What is wrong with a request is 422 there."""

from aiohttp import web

from octavo import _core
from octavo.server.errors import ApiError

_TYPES = {401: "authentication", 403: "authentication", 413: "validation", 422: "validation", 424: "generation",
          429: "overloaded", 503: "incomplete_generation"}  # fmt: skip
_STATUSES = {400: 422, 404: 404, 415: 422, 500: 424}


def response(error: ApiError) -> web.Response:
    """The HTTP answer."""
    status = _STATUSES.get(error.status, error.status)
    kind = _TYPES.get(status, "validation")
    message = error.message
    if status == 422:
        message = f"Input validation error: {message}"
    elif status == 429:
        message = f"Model is overloaded: {message}"
    body = _core.tgi_error(message, kind) + b"\n"
    return error.response_of(status, body)
