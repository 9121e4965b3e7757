"""From the bytes of a request to a checked msgspec struct.

Sizes and nesting are looked at before anything is parsed, since msgspec recurses, also through
fields that nobody reads.
"""

import asyncio
import itertools
import re
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from octavo.server.errors import ApiError, bad_request

T = TypeVar("T", bound=msgspec.Struct)

MAX_DEPTH = 64
MAX_FIELDS = 1000
MAX_FIELD_BYTES = 256 * 1024
"""Of every field but the ones that carry the prompt."""
BODY_TIMEOUT = 30.0
"""Seconds from the headers to the end of the body."""

_BULKY = frozenset({"prompt", "messages", "tools"})
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # +1 and -1 as signed bytes
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


async def read_body(request: web.Request, limit: int) -> bytes:
    """The whole body. Raises `ApiError`: 400, 408, 413 or 415."""
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(limit)
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise ApiError(415, "unsupported_charset", "The body must be UTF-8.")
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding not in ("identity", "gzip", "deflate"):
        raise ApiError(415, "unsupported_encoding", "Content-Encoding must be identity, gzip or deflate.")
    try:
        return await asyncio.wait_for(request.read(), BODY_TIMEOUT)
    except asyncio.TimeoutError:
        request.content.feed_eof()  # else aiohttp reads on, for politeness
        message = f"The body did not arrive within {BODY_TIMEOUT:.0f} s."
        raise ApiError(408, "body_timeout", message, headers={"Connection": "close"}) from None
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(limit) from None
    except web.RequestPayloadError:
        request.content.feed_eof()  # else aiohttp reads on, for politeness, and logs the same error as its own
        what = "chunked" if encoding == "identity" else encoding
        message = f"The body is not valid {what} data."
        raise ApiError(400, "invalid_encoding", message, headers={"Connection": "close"}) from None


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"The body may have at most {limit} bytes.", headers={"Connection": "close"})


def nesting(body: bytes) -> int:
    """How deep the brackets outside of strings go, in a few passes of C code."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return 0  # cannot be too deep: the usual case
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(unescaped.split(b'"')[::2])
    steps = memoryview(outside.translate(_STEP, _NOT_BRACKETS)).cast("b")
    return max(itertools.accumulate(steps), default=0)


def decode(struct: type[T], body: bytes, unsupported: dict[str, tuple[Any, ...]]) -> tuple[T, int]:
    """The struct, and the number of fields that it does not know (they are accepted and ignored).

    unsupported: fields that would change the answer if they worked, with the values that change
    nothing, besides null. Raises `ApiError` 400.
    """
    if nesting(body) > MAX_DEPTH:
        raise bad_request(f"The JSON is nested more than {MAX_DEPTH} deep.", code="json_too_deep")
    try:
        fields = _FIELDS.decode(body)
        if len(fields) > MAX_FIELDS:
            raise bad_request(f"The object has {len(fields)} fields; at most {MAX_FIELDS} are allowed.")
        for name, raw in fields.items():
            if name not in _BULKY and memoryview(raw).nbytes > MAX_FIELD_BYTES:
                raise bad_request(f"{name[:100]}: at most {MAX_FIELD_BYTES} bytes are allowed.", name[:100])
            if name in unsupported and not _harmless(msgspec.json.decode(raw), unsupported[name]):
                raise bad_request(f"{name}: not supported yet.", name, "unsupported_parameter")
        known = set(struct.__struct_fields__)
        return msgspec.json.decode(body, type=struct), sum(name not in known for name in fields)
    except msgspec.ValidationError as error:
        raise from_validation(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="json_invalid") from None


def _harmless(value: Any, values: tuple[Any, ...]) -> bool:
    return value is None or any(value == other and isinstance(value, type(other)) for other in values)


def from_validation(text: str) -> ApiError:
    """From msgspec's ``Expected `int`, got `str` - at `$.max_tokens` `` to a message that begins
    with the field.
    """
    what, _, where = text.partition(" - at ")
    path = re.search(r"\$\.?([^`]*)", where)
    full = path.group(1) if path else ""
    missing = re.search(r"missing required field `(\w+)`", what)
    if missing:
        full = f"{full}.{missing.group(1)}" if full else missing.group(1)
        return bad_request(f"{full}: this field is required.", _top(full), "missing_required_parameter")
    code = "invalid_type" if ", got `" in what else "invalid_value"
    return bad_request(f"{full or 'body'}: {what[:1].lower()}{what[1:]}.".replace("`", ""), _top(full), code)


def _top(path: str) -> str | None:
    """The field of the request that a path such as `messages[0].role` begins with."""
    return re.split(r"[.\[]", path)[0] or None
