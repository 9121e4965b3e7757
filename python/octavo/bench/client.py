"""A bounded load client for any OpenAI-compatible server: streams `/v1/completions` with token-id prompts.

TTFT: request sent to first content event. TPOT: (last event - first) / (tokens - 1) of a request. ITL: gap between
events. Every request asks for exactly `--output-len` tokens; a short answer, an HTTP error or a time-out counts as
failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from octavo.bench.statistics import percentile

REQUEST_SECONDS = 300


@dataclass
class Record:
    """What one request saw."""

    sent: float = 0.0
    events: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


async def stream_once(
    session: aiohttp.ClientSession, options: argparse.Namespace, prompt: list[int], record: Record
) -> None:
    """Sends one request and reads its stream to the end."""
    body = {
        "model": options.model,
        "prompt": prompt,
        "max_tokens": options.output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    record.sent = time.perf_counter()
    async with session.post(options.url.rstrip("/") + "/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:200]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            if b'"choices":[]' in line:
                record.tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            elif line.startswith(b'data: {"error"'):
                raise RuntimeError(line[:200].decode())
            else:
                record.events.append(time.perf_counter())


async def measure_server(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the closed loop and sums it up; times in milliseconds."""
    rng = random.Random(options.workload_seed)
    prompts = [
        [rng.randrange(10, options.vocab_size - 10) for _ in range(options.input_len)] for _ in range(options.num)
    ]
    records = [Record() for _ in prompts]
    numbers = iter(range(options.num))
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

        async def client() -> None:
            for number in numbers:
                try:
                    await stream_once(session, options, prompts[number], records[number])
                except (RuntimeError, aiohttp.ClientError, asyncio.TimeoutError) as error:
                    records[number].error = f"{type(error).__name__}: {error}"

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(min(options.concurrency, options.num))))
        seconds = time.perf_counter() - started
    good = [record for record in records if record.error is None and record.tokens == options.output_len]
    ttft = [1e3 * (record.events[0] - record.sent) for record in good]
    gaps = [1e3 * (b - a) for record in good for a, b in zip(record.events, record.events[1:], strict=False)]
    tpot = [1e3 * (record.events[-1] - record.events[0]) / (record.tokens - 1) for record in good if record.tokens > 1]
    tokens = sum(record.tokens for record in good)
    return {
        "requests": options.num,
        "concurrency": options.concurrency,
        "failed": len(records) - len(good),
        "first_error": next((record.error for record in records if record.error), None),
        "seconds": seconds,
        "output_tokens_per_second": tokens / seconds,
        "ttft_p50_ms": percentile(ttft, 50),
        "ttft_p99_ms": percentile(ttft, 99),
        "tpot_p50_ms": percentile(tpot, 50),
        "tpot_p99_ms": percentile(tpot, 99),
        "itl_p50_ms": percentile(gaps, 50),
        "itl_p99_ms": percentile(gaps, 99),
    }
