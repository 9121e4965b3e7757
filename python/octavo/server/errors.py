"""The error contract: `{"error": {"message", "type", "param", "code"}}`, always JSON, under every status.

`type` follows from the status; `code` is a stable word that clients may rely on. Messages name the field, its value
and the limit, and never paths, addresses or tracebacks. A request that would fail again must not be a 5xx: OpenAI's
clients retry those.
"""

import re
from collections.abc import Mapping

import msgspec
from aiohttp import web

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
_CUT = 500  # characters of a message; a value that a client sent must not come back whole


class ApiError(Exception):
    """An answer that is not a success. `status` decides `type`: other 4xx are `invalid_request_error`."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message if len(message) <= _CUT else message[:_CUT] + "..."
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The JSON object, for an answer or for a `data:` line."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return msgspec.json.encode(
            {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
        )

    def response(self) -> web.Response:
        """The HTTP answer."""
        response = web.Response(
            status=self.status, body=self.body() + b"\n", content_type="application/json", headers=self.headers
        )
        if self.headers.get("Connection") == "close":
            response.force_close()  # aiohttp does not look at the header
        return response

    def frames(self) -> bytes:
        """How a stream ends whose status 200 has been sent: OpenAI's clients raise on this."""
        return b"data: " + self.body() + b"\n\ndata: [DONE]\n\n"


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, code, message, param=param)


def from_value_error(error: Exception, known_fields: frozenset[str], default_param: str | None) -> ApiError:
    """A refusal by the core. Its messages begin with the field's name."""
    from octavo import _core

    message = str(error)
    named = re.match(r"[a-z_]+", message)
    param = named.group() if named and named.group() in known_fields else default_param
    if isinstance(error, _core.PromptTooLongError):
        return bad_request(message, param, "context_length_exceeded")
    if isinstance(error, _core.KvCapacityError):
        return bad_request(message, param, "kv_capacity_exceeded")
    if isinstance(error, _core.TemplateError):
        return bad_request(message, "messages", "template_error")
    if re.match(r"[a-z_]+ holds token id ", message):
        return bad_request(message, param, "token_id_out_of_range")
    if isinstance(error, OverflowError):
        return bad_request(f"{param}: the number is out of range", param)
    return bad_request(message, param)


def overloaded(message: str, retry_after: int) -> ApiError:
    """429: the waiting queue is full."""
    return ApiError(429, "queue_full", message, headers={"Retry-After": str(retry_after)})


def shutting_down() -> ApiError:
    """503 while the server drains."""
    return ApiError(503, "server_shutting_down", "The server is shutting down.", headers={"Retry-After": "5"})


def internal_error() -> ApiError:
    """500 for what should not have happened."""
    return ApiError(500, "internal_error", "The server met an error of its own; its log has the details.")


def engine_dead() -> ApiError:
    """503 after the engine was lost; the reason is in the server's log."""
    message = "The engine has stopped and the server is about to exit."
    return ApiError(503, "engine_dead", message, headers={"Retry-After": "10"})


def from_engine_text(text: str) -> ApiError:
    """An error that ended an accepted request. The engine writes `code: explanation`."""
    code, colon, explanation = text.partition(": ")
    if code == "engine_dead":
        return engine_dead()
    if code == "server_shutting_down":
        return shutting_down()
    if not colon or not re.fullmatch(r"[a-z_]{1,40}", code):
        code, explanation = "generation_failed", text
    return ApiError(500, code, explanation)
