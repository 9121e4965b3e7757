"""From the bytes of a request to a checked msgspec struct.

Nothing is decoded before it was measured (`_core.measure_body`): objects are many times as large as
their text, and no thread runs Python while they are made. What is left of a body that passes takes
a few milliseconds. Large bodies are worked on beside the loop all the same.
"""

import asyncio
import re
import zlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Generic, TypeVar

import msgspec
from aiohttp import web
from aiohttp.streams import StreamReader

from octavo import _core
from octavo.server.errors import ApiError, bad_request, body_refused, prompt_too_long, shutting_down
from octavo.server.limits import Limits

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")

MAX_FIELDS = 1000
MAX_VALUES = 65_536
"""Keys and values of all fields but a completion's `prompt`: 10 ms of decoding."""

_SHORT = 32 * 1024
"""Bytes of a body that are not worth the way to another thread."""
_CLOSE = {"Connection": "close"}


class Bodies:
    """Reads bodies, and has the large ones worked on by a thread of its own, one after the other."""

    def __init__(self, limits: Limits) -> None:
        self._limit = limits.max_body_size
        self._timeout = limits.body_timeout
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="octavo-body")
        self._uploads: set[StreamReader] = set()
        self._refuses = False

    async def read(self, request: web.Request) -> bytes:
        """The whole body, unpacked. Raises `ApiError`: 400, 408, 413, 415 or 503."""
        if request.content_length is not None and request.content_length > self._limit:
            raise _too_large(self._limit)
        if (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
            raise ApiError(415, "unsupported_charset", "The body must be UTF-8.")
        encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", "gzip", "deflate"):
            raise ApiError(415, "unsupported_encoding", "Content-Encoding must be identity, gzip or deflate.")
        body = await self._receive(request)
        if encoding == "identity":
            return body
        return await self._beside(lambda: unpack(body, encoding, self._limit))

    async def work(self, size: int, do: Callable[[], T]) -> T:
        """Runs what takes as long as a body of `size` bytes is large, beside the loop unless that is
        short.
        """
        return do() if size < _SHORT else await self._beside(do)

    def refuse_uploads(self) -> None:
        """Ends the requests whose bodies are still on their way, and those that come, with 503."""
        self._refuses = True
        for content in self._uploads:
            content.set_exception(shutting_down(close=True))

    def close(self) -> None:
        """Gives the thread back."""
        self._thread.shutdown(wait=False)

    async def _receive(self, request: web.Request) -> bytes:
        content = request.content
        if self._refuses and not content.is_eof():
            raise shutting_down(close=True)
        why = f"The body did not arrive within {self._timeout:g} s (body_timeout)."
        late = ApiError(408, "body_timeout", why, headers=_CLOSE)
        # Whoever ends the upload early does so by an exception at its reader: this one, the
        # connection (bytes that are no HTTP), or `refuse_uploads`.
        timer = asyncio.get_running_loop().call_later(self._timeout, content.set_exception, late)
        self._uploads.add(content)
        pieces, size = [], 0
        try:
            # Not `request.read`, which copies the body twice and keeps it until the answer has ended.
            while piece := await content.readany():
                pieces.append(piece)
                size += len(piece)
                if size > self._limit:
                    content.set_exception(_too_large(self._limit))  # raised by the next look
            return b"".join(pieces)
        except web.RequestPayloadError:
            content.feed_eof()  # else aiohttp reads on, for politeness, and logs the same error as its own
            raise _not(400, "chunked") from None
        except ApiError:
            content.feed_eof()
            raise
        finally:
            timer.cancel()
            self._uploads.discard(content)

    async def _beside(self, do: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, do)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"The body may have at most {limit} bytes.", headers=_CLOSE)


def _not(status: int, encoding: str) -> ApiError:
    return ApiError(status, "invalid_encoding", f"The body is not valid {encoding} data.", headers=_CLOSE)


def unpack(packed: bytes, encoding: str, limit: int) -> bytes:
    """What was compressed: one stream, whole, and nothing behind it. Raises `ApiError`: 400, or 413
    where that is over `limit` bytes.
    """
    # Some write what HTTP calls deflate without the two bytes that begin it.
    bits = 31 if encoding == "gzip" else 15 if packed[:1] and packed[0] & 15 == 8 else -15
    stream = zlib.decompressobj(bits)
    try:
        body = stream.decompress(packed, limit + 1)
    except zlib.error:
        raise _not(400, encoding) from None
    if len(body) > limit:
        raise _too_large(limit)
    if not stream.eof or stream.unused_data:
        raise _not(400, encoding)
    return body


@dataclass(frozen=True)
class Form(Generic[S]):
    """What the body of a route may look like."""

    struct: type[S]
    bulky: frozenset[str]
    """Fields that carry the prompt, with no limit but those of the whole."""
    prompt_text: frozenset[str]
    """Fields whose text may all become part of the prompt."""
    unsupported: Mapping[str, tuple[Any, ...]]
    """Fields that would change the answer if they worked, with the values that change nothing,
    besides null.
    """
    prompt: str = "messages"
    """The field that is named where the prompt is too long."""
    inner: Mapping[str, type[msgspec.Struct]] = field(default_factory=dict)
    """Fields that are objects, of which the fields are held to those of a struct as well."""
    apart: str = "prompt"
    """The field that may hold millions of values: `_core.read_prompts` decodes it unless the struct has
    it.
    """


@dataclass(frozen=True)
class Parsed(Generic[S]):
    """A body that was decoded."""

    request: S
    body: bytes
    """What was decoded: large bodies without the escapes that they could have done without."""
    prompts: tuple[slice, ...]
    """Where in it the field that is read apart has its value. The last counts."""
    ignored: tuple[str, ...]
    """Names of the fields that nobody knows; of those inside others with a point between."""


def decode(
    form: Form[S], body: bytes, max_characters: int, max_model_len: int, limits: Limits, *, strict: bool
) -> Parsed[S]:
    """Measures and decodes a body. Raises `ApiError` 400.

    max_characters: of all text that may become part of the prompt. strict: fields that nobody knows are
    refused.
    """
    fields = _measure(body, form.apart, limits.max_json_depth)
    received = body
    if len(body) >= _SHORT and (body := _core.resolve_escapes(received)) is not received:
        fields = _measure(body, form.apart, limits.max_json_depth)
    text = sum(given.text for given in fields if given.name in form.prompt_text)
    if text > max_characters:
        named = " and ".join(sorted(form.bulky))
        what = f"{named} have {text} characters, more than the {max_characters} that are read."
        raise prompt_too_long(max_model_len, what, form.prompt)
    for given in fields:
        name = given.name
        if name not in form.bulky and given.value.stop - given.value.start > limits.max_schema_size:
            raise bad_request(
                f"{name[:100]}: at most {limits.max_schema_size} bytes are allowed (max_schema_size).", name[:100]
            )
        if name in form.unsupported and not _harmless(_json(body[given.value]), form.unsupported[name]):
            raise bad_request(f"{name}: not supported yet.", name, "unsupported_parameter")
    known = {*form.struct.__struct_fields__, *form.bulky, *form.unsupported}
    ignored = [given.name for given in fields if given.name not in known and not _may_be_ignored(given.name)]
    for given in fields:
        if (struct := form.inner.get(given.name)) is not None:
            names = _names_in(body[given.value])
            ignored += [f"{given.name}.{name}" for name in names if name not in struct.__struct_fields__]
    if ignored and strict:
        raise _unknown(ignored[0], known, form.inner)
    apart = form.apart in form.bulky and form.apart not in form.struct.__struct_fields__
    prompts = tuple(given.value for given in fields if apart and given.name == form.apart)
    rest = _without(body, prompts)
    return Parsed(_json(rest, form.struct, as_received=rest == received), body, prompts, tuple(ignored))


_MAY_BE_IGNORED = frozenset({
    "user", "store", "metadata", "service_tier", "prediction", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "verbosity", "parallel_tool_calls", "extra_headers", "usage", "keep_alive",
    "watermark", "adapter_id", "request_id", "session_id",
})  # fmt: skip
"""Labels and hints, which change nothing of an answer, on any route; `x_...` as well. Where they do mean
something, the route's struct has them, or refuses them.
"""


def _may_be_ignored(name: str) -> bool:
    return name in _MAY_BE_IGNORED or name.startswith("x_")


def _names_in(value: bytes) -> list[str]:
    """Names of the fields of an object; of anything else none, which its struct refuses."""
    try:
        return list(msgspec.json.decode(value, type=dict[str, msgspec.Raw]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []


def _unknown(name: str, known: Collection[str], inner: Mapping[str, type[msgspec.Struct]]) -> ApiError:
    outer, _, rest = name.partition(".")
    struct = inner.get(outer) if rest else None
    names = known if struct is None else [f"{outer}.{field}" for field in struct.__struct_fields__]
    near = get_close_matches(name[:50], sorted(names), 1)
    hint = f" Is {near[0]} meant?" if near else ""
    return bad_request(
        f"{name[:100]}: unknown field.{hint} With --params-mode lenient such fields are ignored.",
        name[:100],
        "unknown_parameter",
    )


def field_names(body: bytes, limits: Limits) -> list[str]:
    """Names of the fields of a body. Raises `ApiError` 400."""
    return [field.name for field in _measure(body, "prompt", limits.max_json_depth)]


@dataclass(frozen=True)
class _Field:
    name: str
    value: slice
    text: int


def _measure(body: bytes, uncounted: str, max_depth: int) -> list[_Field]:
    try:
        measured, _ = _core.measure_body(
            body, max_depth=max_depth, max_fields=MAX_FIELDS, max_values=MAX_VALUES, uncounted=uncounted
        )
    except _core.RefusedError as error:
        raise body_refused(error) from None
    return [_Field(_json(body[slice(*name)], str), slice(*value), text) for name, value, text in measured]


def _without(body: bytes, values: tuple[slice, ...]) -> bytes:
    """The body with null for each of the values."""
    pieces, at = [], 0
    for value in values:
        pieces += [body[at : value.start], b"null"]
        at = value.stop
    return b"".join([*pieces, body[at:]])


def _json(text: bytes, kind: Any = Any, *, as_received: bool = True) -> Any:
    """as_received: places in it are places in what the client sent."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise from_validation(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        what = str(error) if as_received else re.sub(r" \(byte \d+\)$", "", str(error))
        raise bad_request(f"The body is not valid JSON: {what}", code="json_invalid") from None


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
