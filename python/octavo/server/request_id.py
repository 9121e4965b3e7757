"""The name of a request, in `X-Request-Id`, logs and its timeline."""

import re
import uuid

from aiohttp import web

_REQUEST_ID = web.RequestKey("request_id", str)


def request_id(request: web.BaseRequest) -> str:
    """The client's `X-Request-Id`, or one of ours if that is none or odd."""
    if _REQUEST_ID not in request:
        given = request.headers.get("X-Request-Id", "")
        request[_REQUEST_ID] = given if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", given) else uuid.uuid4().hex
    return request[_REQUEST_ID]
