"""`octavo top`: a running server's numbers, live.

Read from `/metrics`, which needs no key. On a terminal the view is drawn over itself and keeps to the
terminal's width; elsewhere each look is a line, so that it can be piped and kept.
"""

import http.client
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT = 5.0  # seconds that a look may take
_MOST_BYTES = 16 * 2**20
_BAR = 20  # characters of a bar, where there is room
_HOME_AND_CLEAR = "\x1b[H\x1b[J"


@dataclass(frozen=True)
class Look:
    """What a server said at one moment."""

    at: float
    """On the monotonic clock."""
    model: str
    values: Mapping[str, float]
    keys: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By name: `calls`, `tokens`, `refusals`."""


def read(url: str) -> Look:
    """Looks at a server. Raises `ValueError` that says what is wrong with `url`."""
    address = url.rstrip("/") + "/metrics"
    try:
        if not address.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            text = response.read(_MOST_BYTES).decode()
        return parse(text, time.monotonic())
    except urllib.error.URLError as error:
        raise ValueError(f"--url {url}: {getattr(error.reason, 'strerror', None) or error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ValueError(f"--url {url}: {error or type(error).__name__}") from None


def parse(text: str, at: float) -> Look:
    """What `/metrics` says. Raises `ValueError` where it is not of a server like ours."""
    values: dict[str, float] = {}
    keys: dict[str, dict[str, float]] = {}
    model = ""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            model = sample.labels.get("model_name", model)
            name = sample.name.removeprefix("vllm:").removeprefix("octavo:").removesuffix("_total")
            if "key" in sample.labels:
                keys.setdefault(sample.labels["key"], {})[name.removeprefix("key_")] = sample.value
            else:
                values[name] = values.get(name, 0.0) + sample.value
    if "num_requests_running" not in values:
        raise ValueError("no metrics of an Octavo or vLLM server there")
    return Look(at, model, values, keys)


def summary(now: Look, before: Look | None) -> dict[str, str]:
    """The numbers of a look, in words; rates are those since the look before."""

    def rate(name: str) -> str:
        if before is None or now.at <= before.at:
            return "-"
        gained = now.values.get(name, 0.0) - before.values.get(name, 0.0)
        return f"{max(0.0, gained) / (now.at - before.at):.1f}"

    queries, hits = (
        now.values.get(name, 0.0) - (0.0 if before is None else before.values.get(name, 0.0))
        for name in ("prefix_cache_queries", "prefix_cache_hits")
    )
    return {
        "running": f"{now.values['num_requests_running']:.0f}",
        "waiting": f"{now.values.get('num_requests_waiting', 0.0):.0f}",
        "output tok/s": rate("generation_tokens"),
        "prompt tok/s": rate("prompt_tokens"),
        "kv used": f"{100 * now.values.get('kv_cache_usage_perc', 0.0):.1f} %",
        "cache hits": f"{100 * hits / queries:.1f} %" if queries > 0 else "-",
        "preempted": f"{now.values.get('num_preemptions', 0.0):.0f}",
    }


def line(now: Look, before: Look | None) -> str:
    """A look as one line."""
    parts = [f"{name.replace(' ', '_')}={text.replace(' ', '')}" for name, text in summary(now, before).items()]
    return " ".join([*parts, *(f"{key}={_of_key(key, now, before)}" for key in now.keys)])


def view(now: Look, before: Look | None, width: int, height: int) -> str:
    """A look as a page of so many columns and lines."""
    title = f"octavo top  {now.model}"
    rows = [title, ""]
    for name, text in summary(now, before).items():
        row = f"{name:<13}{text:>9}"
        if name == "kv used" and width >= len(row) + 2 + _BAR:
            row += "  " + bar(now.values.get("kv_cache_usage_perc", 0.0))
        rows.append(row)
    if now.keys:
        rows += ["", f"{'key':<13}{'calls':>9}{'tok/s':>9}{'refused':>9}"]
        busiest = sorted(now.keys, key=lambda key: (-now.keys[key].get("calls", 0.0), key))
        for key in busiest:
            refused = f"{now.keys[key].get('refusals', 0.0):.0f}"
            rows.append(
                f"{key[:12]:<13}{now.keys[key].get('calls', 0.0):>9.0f}{_of_key(key, now, before):>9}{refused:>9}"
            )
    return "\n".join(row[:width] for row in rows[: max(1, height)])


def bar(share: float) -> str:
    """So much of a bar."""
    full = round(min(1.0, max(0.0, share)) * _BAR)
    return "#" * full + "." * (_BAR - full)


def _of_key(key: str, now: Look, before: Look | None) -> str:
    """Its tokens a second, as calls end."""
    if before is None or now.at <= before.at:
        return "-"
    gained = now.keys[key].get("tokens", 0.0) - before.keys.get(key, {}).get("tokens", 0.0)
    return f"{max(0.0, gained) / (now.at - before.at):.1f}"


def run(url: str, interval: float, count: int | None) -> int:
    """Looks every `interval` seconds, `count` times or until it is interrupted."""
    on_terminal = sys.stdout.isatty()
    before = None
    number = 0
    while True:
        now = read(url)
        if on_terminal:
            size = shutil.get_terminal_size()
            text = _HOME_AND_CLEAR + view(now, before, size.columns, size.lines - 1)
        else:
            text = line(now, before)
        print(text, flush=True)
        before, number = now, number + 1
        if count is not None and number >= count:
            return 0
        time.sleep(interval)
