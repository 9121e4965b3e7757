"""The server's own options, beside the engine's."""

import dataclasses
import json
from collections.abc import Iterable, Iterator

from octavo.options import option, parse_count
from octavo.server.limits import Limits

_LISTS = ("allowed_origins", "allowed_methods", "allowed_headers")
PARAMS_MODES = ("strict", "lenient")
LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclasses.dataclass(frozen=True)
class ServerConfig(Limits):
    """Where and how to listen. `ValueError` names the field, its value and the limit."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for all interfaces (then set --api-key).")
    port: int = option(8000, "Port to listen on; 0: any free one.", parse=parse_count)
    api_key: tuple[str, ...] = option((), "Keys that clients must present; without one the server is open.")
    api_key_file: str | None = option(
        None, "File of further keys, with names, limits and weights if it is JSON; read again on SIGHUP."
    )
    allowed_hosts: tuple[str, ...] = option(
        (), "Further `Host` names to answer to, on a loopback address without a key."
    )
    allowed_origins: tuple[str, ...] = option(
        (), "Origins whose pages may call from a browser (CORS), * for all; words or a JSON list."
    )
    allowed_methods: tuple[str, ...] = option(("*",), "Methods that such pages may use.")
    allowed_headers: tuple[str, ...] = option(("*",), "Headers that such pages may send.")
    allow_credentials: bool = option(False, "Whether such pages may send cookies.")
    max_input_tokens: int | None = option(
        None, "Longest prompt in tokens; default: what the model's length leaves.", parse=parse_count
    )
    max_best_of: int = option(2, "Largest best_of on TGI's routes.", parse=parse_count)
    max_stop_sequences: int = option(4, "Stop sequences of a request on TGI's routes.", parse=parse_count)
    max_top_n_tokens: int = option(5, "Largest top_n_tokens on TGI's routes.", parse=parse_count)
    params_mode: str = option(
        "strict",
        "Request fields that nobody knows are refused (strict), or ignored with warnings.",
        choices=PARAMS_MODES,
    )
    trust_request_chat_template: bool = option(
        False, "Take the chat template of a request that brings one (chat_template)."
    )
    shutdown_timeout: float = option(
        30.0, "Seconds that running requests may take to finish after SIGTERM.", parse=float
    )
    request_timeout: float | None = option(
        None,
        "Seconds from its arrival in which a request must be done; deadline_ms of a request may be less.",
        parse=float,
    )
    log_level: str = option("info", "What is logged: from this level on.", choices=LOG_LEVELS)
    access_log: bool = option(False, "Log a line for each answer. Refusals have theirs in any case.")
    sse_keep_alive_interval: float = option(
        15.0, "Seconds between comment lines while a stream waits for its first token.", parse=float
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("api_key", "allowed_hosts", *_LISTS):
            if isinstance(getattr(self, field), str):  # whose characters are not the entries
                object.__setattr__(self, field, (getattr(self, field),))
        for field in _LISTS:
            object.__setattr__(self, field, tuple(_words(field, getattr(self, field))))
        for field, low, high in (
            ("port", 0, 65535),
            ("max_best_of", 1, 128),
            ("max_stop_sequences", 0, 32),
            ("max_top_n_tokens", 0, 20),
            ("shutdown_timeout", 0.0, 86400.0),
            ("sse_keep_alive_interval", 0.01, 3600.0),
        ):
            value = getattr(self, field)
            if not low <= value <= high:
                raise ValueError(f"{field} = {value}: must be from {low} to {high}")
        if self.max_input_tokens is not None and self.max_input_tokens < 1:
            raise ValueError(f"max_input_tokens = {self.max_input_tokens}: must be at least 1")
        if self.request_timeout is not None and not 0.001 <= self.request_timeout <= 86400.0:
            raise ValueError(f"request_timeout = {self.request_timeout}: must be from 0.001 to 86400 s")
        if self.log_level not in LOG_LEVELS:
            raise ValueError(f"log_level = {self.log_level!r}: must be one of {', '.join(LOG_LEVELS)}")
        if self.params_mode not in PARAMS_MODES:
            raise ValueError(f"params_mode = {self.params_mode!r}: must be one of {', '.join(PARAMS_MODES)}")
        if any(len(key) < 1 for key in self.api_key):
            raise ValueError("api_key: a key must not be empty")


def _words(field: str, values: Iterable[str]) -> Iterator[str]:
    """The entries of a list that is given in words, or as vLLM's flags have it, in JSON."""
    for value in values:
        if not value.startswith("["):
            yield value
            continue
        try:
            entries = json.loads(value)
        except ValueError:
            entries = None
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            raise ValueError(f"{field} = {value[:100]!r}: must be words, or a JSON list of texts")
        yield from entries
