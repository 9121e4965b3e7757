"""The error contract: `{"error": {"message", "type", "param", "code"}}`, always JSON, under every
status.

`type` follows from the status; `code` is a stable word that clients may rely on. Messages name the
field, its value and the limit, and never paths, addresses or tracebacks. A request that would fail
again must not be a 5xx: OpenAI's clients retry those.
"""

import re
from collections.abc import Callable, Mapping

from aiohttp import web

from octavo import _core
from octavo.errors import FieldError

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
    """An answer that is not a success. `status` decides `type`: other 4xx are
    `invalid_request_error`.
    """

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

    def renamed(self, names: Mapping[str, str]) -> "ApiError":
        """The same, where the request calls fields by other names than whoever refused them. A field
        below a field keeps its own name.
        """
        message, param = self.message, self.param
        for ours, theirs in names.items():
            if ours != "prompt":  # an ordinary word, too
                message = re.sub(rf"\b{re.escape(ours)}\b", theirs, message)
            if self.param is not None and re.match(rf"{re.escape(ours)}\b", self.param) and param == self.param:
                param = theirs + self.param.removeprefix(ours)
        return ApiError(self.status, self.code, message, param=param, headers=self.headers)

    def body(self) -> bytes:
        """The JSON object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return _core.openai_error(self.message, type=kind, param=self.param, code=self.code)

    def response(self) -> web.Response:
        """The HTTP answer, as OpenAI's API has it."""
        return self.response_of(self.status, self.body() + b"\n")

    def response_of(self, status: int, body: bytes) -> web.Response:
        """The HTTP answer in the form of a protocol."""
        response = web.Response(status=status, body=body, content_type="application/json", headers=self.headers)
        if self.headers.get("Connection") == "close":
            response.force_close()  # aiohttp does not look at the header
        return response


ErrorForm = Callable[[ApiError], web.Response]
"""How a protocol answers with an error."""

ERROR_FORMS = web.AppKey("error_forms", dict[str, ErrorForm])
"""Of routes that have another form than OpenAI's, by their path."""
ERROR_PREFIXES = web.AppKey("error_prefixes", dict[str, ErrorForm])
"""Of paths that begin so, and lead to no route."""

ERROR_FORM: web.RequestKey[ErrorForm] = web.RequestKey("error_form", Callable)  # type: ignore[arg-type]
"""Of a request whose body says which protocol it is of."""


def error_form(request: web.BaseRequest) -> ErrorForm:
    """The form of errors in which a request is answered."""
    form: ErrorForm | None = request.get(ERROR_FORM)
    if form is None and isinstance(request, web.Request):
        resource = request.match_info.route.resource
        form = request.app[ERROR_FORMS].get(request.path if resource is None else resource.canonical)
        if form is None and resource is None:  # no such route, or not with this method
            prefixes = request.app[ERROR_PREFIXES].items()
            form = next((form for prefix, form in prefixes if request.path.startswith(prefix)), None)
    return form or ApiError.response


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, code, message, param=param)


def bad_http(what: str = "") -> ApiError:
    """A 400 for bytes that are no HTTP request."""
    return ApiError(400, "bad_http", f"Not a valid HTTP request{': ' + what if what else ''}.")


def prompt_too_long(max_model_len: int, what: str, param: str) -> ApiError:
    """A 400 in the words by which clients recognise that the context is full."""
    limit = f"this model's maximum context length is {max_model_len} tokens"
    return bad_request(f"prompt is too long: {limit}; {what}", param, "context_length_exceeded")


def body_refused(error: _core.RefusedError) -> ApiError:
    """A 400 for what `_core.measure_body` and `_core.read_prompts` would not take."""
    return bad_request(str(error), error.param, error.code)


def refused(error: ValueError, names: Mapping[str, str]) -> ApiError:
    """A 400 for what the core would not take, or a check on the way to it.

    names: what the request calls the core's fields, where that is something else. An error that
    names no field is about the prompt.
    """
    named = error if isinstance(error, (_core.RefusedError, FieldError)) else None
    param = (None if named is None else named.param) or "prompt"
    code = "invalid_value" if named is None else named.code
    return bad_request(str(error), param, code).renamed(names)


def overloaded(message: str, retry_after: int) -> ApiError:
    """429: the waiting queue is full."""
    return ApiError(429, "queue_full", message, headers={"Retry-After": str(retry_after)})


def shutting_down(*, close: bool = False) -> ApiError:
    """503 while the server drains; `close`: on a connection whose request has not come whole."""
    headers = {"Retry-After": "5"} | ({"Connection": "close"} if close else {})
    return ApiError(503, _core.SERVER_SHUTTING_DOWN, "The server is shutting down.", headers=headers)


def deadline_exceeded() -> ApiError:
    """408: the answer was not done by the time that was set for it."""
    message = "The answer was not done in time (deadline_ms, or the server's --request-timeout)."
    return ApiError(408, "deadline_exceeded", message)


def internal_error() -> ApiError:
    """500 for what should not have happened."""
    return ApiError(500, "internal_error", "The server met an error of its own; its log has the details.")


def engine_dead() -> ApiError:
    """503 after the engine was lost; the reason is in the server's log."""
    message = "The engine has stopped and the server is about to exit."
    return ApiError(503, _core.ENGINE_DEAD, message, headers={"Retry-After": "10"})


def from_failure(failure: _core.Failure) -> ApiError:
    """What ended an accepted call before anything of its answer was sent."""
    if failure.code == _core.ENGINE_DEAD:
        return engine_dead()
    if failure.code == _core.SERVER_SHUTTING_DOWN:
        return shutting_down()
    return ApiError(500 if failure.param is None else 400, failure.code, failure.message, param=failure.param)
