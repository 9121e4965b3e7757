"""A bounded load client for any OpenAI-compatible server: streams `/v1/completions` with token-id
prompts.

TTFT: request sent to first content event. TPOT: (last event - first) / (tokens - 1) of a request.
ITL: gap between events. Every request asks for exactly `--output-len` tokens; a short answer, an
HTTP error or a time-out counts as failed.
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

from octavo.bench.progress import progress
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
    session: aiohttp.ClientSession, options: argparse.Namespace, model: str, prompt: list[int], record: Record
) -> None:
    """Sends one request and reads its stream to the end. Raises `RuntimeError` for an answer that
    is none or short.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": options.output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    record.sent = time.perf_counter()
    async with session.post(options.url + "/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(await refusal(response))
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            if b'"choices":[]' in line:
                record.tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            elif line.startswith(b'data: {"error"'):
                raise RuntimeError(line[:200].decode())
            else:
                record.events.append(time.perf_counter())
    if record.tokens != options.output_len or not record.events:
        raise RuntimeError(f"{record.tokens} tokens in {len(record.events)} events, not {options.output_len}")


async def refusal(response: aiohttp.ClientResponse) -> str:
    """What an answer that is no success says, on one line."""
    return f"HTTP {response.status}: {' '.join((await response.text()).split())[:200]}"


async def first_model(session: aiohttp.ClientSession, url: str) -> str:
    """The name of the first model that the server lists. Raises `ValueError` that says what to do
    instead.
    """
    try:
        async with session.get(url + "/v1/models") as response:
            if response.status != 200:
                raise ValueError(await refusal(response))
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, asyncio.TimeoutError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{url}/v1/models names no model ({type(error).__name__}: {error}): check --url and --api-key, or name one "
            "with --model"
        ) from None


async def measure_server(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the closed loop and sums it up; times in milliseconds, None where no request was served.

    Raises `ValueError` where no model is named and the server names none.
    """
    rng = random.Random(options.workload_seed)
    prompts = [
        [rng.randrange(10, options.vocab_size - 10) for _ in range(options.input_len)] for _ in range(options.num)
    ]
    records = [Record() for _ in prompts]
    numbers = iter(range(options.num))
    timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
    headers = {} if options.api_key is None else {"Authorization": f"Bearer {options.api_key}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        model = options.model or await first_model(session, options.url)

        async def client() -> None:
            for number in numbers:
                try:
                    await stream_once(session, options, model, prompts[number], records[number])
                except (RuntimeError, ValueError, LookupError, aiohttp.ClientError, asyncio.TimeoutError) as error:
                    records[number].error = f"{type(error).__name__}: {error}"
                bar.update()

        with progress("serve", options.num) as bar:
            started = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(min(options.concurrency, options.num))))
            seconds = time.perf_counter() - started
    good = [record for record in records if record.error is None]
    ttft = [1e3 * (record.events[0] - record.sent) for record in good]
    gaps = [1e3 * (b - a) for record in good for a, b in zip(record.events, record.events[1:], strict=False)]
    tpot = [1e3 * (record.events[-1] - record.events[0]) / (record.tokens - 1) for record in good if record.tokens > 1]
    tokens = sum(record.tokens for record in good)
    return {
        "model": model,
        "requests": options.num,
        "concurrency": options.concurrency,
        "failed": len(records) - len(good),
        "first_error": next((record.error for record in records if record.error), None),
        "seconds": seconds,
        "output_tokens_per_second": tokens / seconds if good else None,
        "ttft_p50_ms": percentile(ttft, 50),
        "ttft_p99_ms": percentile(ttft, 99),
        "tpot_p50_ms": percentile(tpot, 50),
        "tpot_p99_ms": percentile(tpot, 99),
        "itl_p50_ms": percentile(gaps, 50),
        "itl_p99_ms": percentile(gaps, 99),
    }
