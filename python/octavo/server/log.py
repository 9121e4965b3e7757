"""What the server writes into the log about requests: a line for each refusal, and for each request
where that is asked for.

What a client sent is shortened and has no line breaks, so that nobody can write lines of their own.
Prompts, keys and queries are never logged.
"""

import logging

from aiohttp import web

from octavo.server.errors import ApiError

logger = logging.getLogger(__name__)

_LONGEST = 300  # characters


def one_line(text: str) -> str:
    """The text on one line, cut, with what does not print written as an escape."""
    cut = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in cut)


def log_refusal(error: ApiError, method: str, path: str, request_id: str | None) -> None:
    """One line for an answer that is an error."""
    what = f"{one_line(method)} {one_line(path)}"
    suffix = f" ({request_id})" if request_id else ""
    logger.info("%s: %d %s: %s%s", what, error.status, error.code, one_line(error.message), suffix)


def log_answer(request: web.Request, status: int | None, seconds: float, request_id: str) -> None:
    """One line for an answer that is none; `status` is None where the client left before its end."""
    what = one_line(f"{request.method} {request.path}")
    logger.info("%s: %s in %.3f s, %s (%s)", what, status or "left", seconds, request.remote, request_id)
