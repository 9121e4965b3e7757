"""Ollama's errors: `{"error": text}`."""

from aiohttp import web

from octavo import _core
from octavo.server.errors import ApiError


def response(error: ApiError) -> web.Response:
    """The HTTP answer."""
    return error.response_of(error.status, _core.ollama_error(error.message) + b"\n")
