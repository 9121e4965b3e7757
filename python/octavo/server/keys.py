"""Who may call: keys from `--api-key` and `--api-key-file`, kept as digests alone, and what each may
use.

A file has a key a line (or `sha256:` and its digest in hex), `#` for comments; or it is JSON,
`{"keys": [{"name": "ops", "sha256": "...", "weight": 2, ...}]}` with the fields of `Key`.
"""

import hashlib
import hmac
import json
import logging
import math
import re
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError

logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 16 * 2**20
_ASSUMED_OUTPUT = 256
"""Tokens that a choice without `max_tokens` is taken to put out, until it has."""

_LIMITS: dict[str, tuple[type, float, float]] = {
    "weight": (float, 0.001, 1000.0),
    "priority": (int, -1000, 1000),
    "max_concurrency": (int, 1, 10**6),
    "tokens_per_minute": (int, 1, 10**12),
}


@dataclass(frozen=True)
class Key:
    """One key, without the key."""

    name: str
    digest: bytes = field(repr=False)
    """SHA-256 of the key."""
    weight: float = 1.0
    """Its part of what several keys want at once, in proportion to theirs."""
    priority: int = 0
    """Added to that of its requests: lower goes first, under `--scheduling-policy priority`."""
    max_concurrency: int | None = None
    """Calls that are answered or wait at a time."""
    tokens_per_minute: int | None = None
    """Tokens of prompts and answers."""
    cache_salt: str | None = None
    """Keys with the same one find each other's prefixes in the cache; by default nobody else's are."""


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def read_keys(config: ServerConfig, *, has_priorities: bool = True) -> tuple[Key, ...]:
    """All keys of a configuration. Raises `ValueError` that names file, entry and field.

    has_priorities: whether the engine's policy has a use for them.
    """
    keys = [Key(f"api-key-{number}", digest_of(key)) for number, key in enumerate(config.api_key, 1)]
    if config.api_key_file is not None:
        keys += _read_file(Path(config.api_key_file))
    _check_once("name", [key.name for key in keys])
    _check_once("key", [key.digest for key in keys])
    if not has_priorities and (urgent := next((key for key in keys if key.priority), None)):
        raise ValueError(
            f"api_key_file: the key {urgent.name!r} has priority = {urgent.priority}, which counts under "
            "--scheduling-policy priority only"
        )
    return tuple(keys)


def _check_once(what: str, values: list[Any]) -> None:
    places: dict[Any, int] = {}
    for number, value in enumerate(values, 1):
        if value in places:
            raise ValueError(f"api_key_file: keys {places[value]} and {number} have the same {what}")
        places[value] = number


def _read_file(path: Path) -> list[Key]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe or a device may wait or go on for ever
            raise ValueError(f"api_key_file = {str(path)!r}: not a regular file")
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise ValueError(f"api_key_file = {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"api_key_file = {str(path)!r}: must be text in UTF-8") from None
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"api_key_file = {str(path)!r}: must have at most {_MAX_FILE_BYTES} bytes")
    keys = _of_json(text, path) if text.lstrip()[:1] in ("{", "[") else _of_lines(text, path)
    if not keys:
        raise ValueError(f"api_key_file = {str(path)!r}: has no key, so nobody could call")
    return keys


def _of_lines(text: str, path: Path) -> list[Key]:
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        word = line.strip()
        if not word or word.startswith("#"):
            continue
        where = f"{path}: line {number}"
        digest = _hex_digest(word[7:], where) if word.startswith("sha256:") else digest_of(word)
        keys.append(Key(f"line-{number}", digest))
    return keys


def _of_json(text: str, path: Path) -> list[Key]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({str(error)[:100]})") from None
    entries = content.get("keys") if isinstance(content, dict) else content
    if not isinstance(entries, list) or (isinstance(content, dict) and set(content) != {"keys"}):
        raise ValueError(f'{path}: must be {{"keys": [...]}}')
    return [_entry(entry, f"{path}: key {number}") for number, entry in enumerate(entries, 1)]


def _entry(entry: object, where: str) -> Key:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object")
    known = {"name", "key", "sha256", "cache_salt", *_LIMITS}
    if unknown := sorted(set(entry) - known):
        raise ValueError(f"{where}: {unknown[0]!r} is unknown; the fields are {', '.join(sorted(known))}")
    for name in ("name", "key", "sha256", "cache_salt"):
        if name in entry and not (isinstance(entry[name], str) and entry[name]):
            raise ValueError(f"{where}: {name} must be text that is not empty")
    if not re.fullmatch(r"[\w.@:-]{1,64}", entry.get("name", "")):
        raise ValueError(f"{where}: name must be 1 to 64 letters, digits, or . _ - @ :")
    if ("key" in entry) == ("sha256" in entry):
        raise ValueError(f"{where}: must have either key or sha256")
    digest = _hex_digest(entry["sha256"], where) if "sha256" in entry else digest_of(entry["key"])
    limits = {field: _limit(entry[field], field, where) for field in _LIMITS if entry.get(field) is not None}
    return Key(entry["name"], digest, cache_salt=entry.get("cache_salt"), **limits)


def _limit(value: object, field: str, where: str) -> Any:
    kind, least, most = _LIMITS[field]
    is_number = isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:  # type: ignore[operator]
        what = "a number" if kind is float else "a whole number"
        raise ValueError(f"{where}: {field} = {str(value)[:100]}: must be {what} from {least:g} to {most:g}")
    return value


def _hex_digest(text: str, where: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError(f"{where}: sha256 must be 64 hexadecimal digits")
    return bytes.fromhex(text)


class Caller:
    """What is known of whoever has a key, by its name: it stays when the file is read again."""

    def __init__(self, number: int, key: Key) -> None:
        self.number = number
        """Names its share to the core."""
        self.key = key
        self.active = 0
        """Calls that are answered or wait."""
        self.tokens = 0
        """Tokens used, prompts and answers."""
        self.refusals = 0
        """Calls refused for its limits."""
        self._left = math.inf
        self._left_at = 0.0
        self._seconds = 1.0

    def salt(self, asked: str | None) -> str:
        """The salt of a call's prefixes, so that other keys' are not found."""
        own = ["name", self.key.name] if self.key.cache_salt is None else ["salt", self.key.cache_salt]
        return json.dumps([*own, asked])

    def priority(self, asked: int) -> int:
        """The priority of a call, within the core's numbers."""
        return max(-(2**31), min(2**31 - 1, asked + self.key.priority))

    def check(self, tokens: int = 1) -> None:
        """Raises `ApiError` 429 where a call with so many tokens is over a limit."""
        most = self.key.max_concurrency
        if most is not None and self.active >= most:
            self.refusals += 1
            raise over_limit(
                "key_concurrency",
                f"This key has {self.active} calls at work, and may have {most} (max_concurrency).",
                self._seconds / most,
            )
        rate = self.key.tokens_per_minute
        if rate is None:
            return
        missing = min(tokens, rate) - self._refilled(rate)
        if missing > 0:
            self.refusals += 1
            raise over_limit(
                "key_token_rate",
                f"This key may use {rate} tokens a minute (tokens_per_minute), and has used them; "
                f"the call needs {tokens}.",
                missing * 60 / rate,
            )

    def begin(self, num_prompt_tokens: int, num_choices: int, max_tokens: int | None) -> "CallerUse":
        """A call of this caller begins, for which its tokens are set aside. Raises `ApiError` 429."""
        tokens = num_prompt_tokens + num_choices * (_ASSUMED_OUTPUT if max_tokens is None else max_tokens)
        self.check(tokens)
        self.active += 1
        self._spend(tokens)
        return CallerUse(self, tokens)

    def _refilled(self, rate: int) -> float:
        now = time.monotonic()
        self._left = min(float(rate), self._left + (now - self._left_at) * rate / 60)
        self._left_at = now
        return self._left

    def _spend(self, tokens: int) -> None:
        if self.key.tokens_per_minute is not None:
            self._left = self._refilled(self.key.tokens_per_minute) - tokens

    def end(self, use: "CallerUse", tokens: int) -> None:
        """A call has ended, having used so many tokens."""
        self.active -= 1
        self.tokens += tokens
        self._spend(tokens - use.tokens)
        self._seconds += 0.1 * (time.monotonic() - use.since - self._seconds)


class CallerUse:
    """A call at work, as its caller's limits have it."""

    def __init__(self, caller: Caller, tokens: int) -> None:
        self.caller = caller
        self.tokens = tokens
        self.since = time.monotonic()

    def end(self, tokens: int) -> None:
        """It used so many tokens."""
        self.caller.end(self, tokens)


def over_limit(code: str, message: str, seconds: float) -> ApiError:
    """A 429 that says in how many seconds to try again: from 1 to 60."""
    wait = min(60, max(1, math.ceil(seconds)))
    return ApiError(429, code, message, headers={"Retry-After": str(wait)})


CALLER: web.RequestKey[Caller] = web.RequestKey("caller", Caller)
"""Whose key a request came with, on servers with keys."""


class Keys:
    """The keys of a running server."""

    def __init__(self, config: ServerConfig, *, has_priorities: bool = True) -> None:
        self.callers: dict[str, Caller] = {}
        self._config = config
        self._has_priorities = has_priorities
        self._by_digest: tuple[tuple[bytes, Caller], ...] = ()
        self._take(read_keys(config, has_priorities=has_priorities))

    def __bool__(self) -> bool:
        return bool(self._by_digest)

    def _take(self, keys: Iterable[Key]) -> None:
        known = []
        for key in keys:
            caller = self.callers.setdefault(key.name, Caller(len(self.callers) + 1, key))
            caller.key = key
            known.append((key.digest, caller))
        self._by_digest = tuple(known)

    def reload(self) -> None:
        """Reads the file again; where it cannot be, the keys stay what they were. Calls at work go on."""
        try:
            keys = read_keys(self._config, has_priorities=self._has_priorities)
        except ValueError as error:
            logger.error("the keys stay what they were: %s", error)
            return
        self._take(keys)
        logger.info("%d keys are known", len(keys))

    def find(self, key: str) -> Caller | None:
        """Whose key it is. The time says nothing of the keys: all are compared, without an early exit."""
        digest = digest_of(key)
        found = None
        for known, caller in self._by_digest:
            if hmac.compare_digest(digest, known):
                found = caller
        return found
