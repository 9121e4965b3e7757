"""Runs requests with given arrival times on an engine in this process, and sums up what happened."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from octavo import _core
from octavo.bench.statistics import percentile
from octavo.bench.workloads import Item
from octavo.engine.engine import Engine


def poisson_arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds after the start at which each request arrives; all at once for a rate of 0."""
    rng = random.Random(f"arrivals/{seed}")
    at, times = 0.0, []
    for _ in range(count):
        times.append(at)
        at += rng.expovariate(rate) if rate else 0.0
    return times


@dataclass(frozen=True)
class Summary:
    """Times in seconds, rates in tokens a second. Latency is from arrival to the last token. None:
    there was nothing to measure.
    """

    requests: int
    seconds: float
    output_tokens: int
    output_tokens_per_second: float
    total_tokens_per_second: float
    latency_mean: float
    latency_p50: float | None
    latency_p99: float | None
    ttft_mean: float
    ttft_p99: float | None
    tpot_mean: float | None
    steps: int
    step_p50: float | None
    step_p99: float | None
    preemptions: int

    def as_dict(self) -> dict[str, float | None]:
        """For `--json`."""
        return asdict(self)


def replay(
    engine: Engine,
    items: list[Item],
    arrivals: list[float] | None = None,
    *,
    at_once: int | None = None,
    sampling: Mapping[str, Any] | None = None,
    finished: Callable[[], object] = lambda: None,
    stepped: Callable[[], object] = lambda: None,
) -> Summary:
    """Greedy, to the exact output lengths. The scheduler knows no request before it has arrived.

    at_once: no more are there than so many, and whoever ends is followed by the next, which arrives then.
    Output tokens a second are those until the last one begins: behind it fewer and fewer run.

    sampling: further parameters of every request, as the core takes them. `finished` is called after
    each request, `stepped` after each turn of the engine that did something.
    """
    arrivals = arrivals or [0.0] * len(items)
    order = sorted(range(len(items)), key=arrivals.__getitem__)
    before = engine.core.stats()
    started = time.monotonic()
    arrived_at: dict[int, float] = {}
    waiting = list(reversed(order))
    latency: list[float] = []
    ttft, tpot, steps = [], [], []
    output_tokens = 0
    busy: tuple[float, int] | None = None  # seconds until the last one began, and output tokens until then
    while waiting or arrived_at:
        now = time.monotonic()
        while waiting and started + arrivals[waiting[-1]] <= now:
            if at_once is not None and len(arrived_at) == at_once:
                break
            number = waiting.pop()
            prompt, length = items[number]
            params = _core.SamplingParams(
                temperature=0.0,
                max_tokens=length,
                min_tokens=length,
                ignore_eos=True,
                detokenize=False,
                **sampling or {},
            )
            request = engine.core.add_call([_core.Prompt(prompt)], params, now=now)
            arrived_at[request] = started + arrivals[number] if at_once is None else now
            if at_once is not None and not waiting and latency:
                busy = (now - started, int(engine.core.stats()["generation_tokens"] - before["generation_tokens"]))
        if not engine.step():
            if waiting and at_once is None:
                time.sleep(max(0.0, min(0.001, started + arrivals[waiting[-1]] - time.monotonic())))
            continue
        steps.append(time.monotonic() - now)
        stepped()
        for request in engine.core.take_news():
            delta = engine.core.take(request)
            if delta is None or not delta.finished:
                continue
            if delta.error is not None:
                raise RuntimeError(str(delta.error))
            (progress,) = delta.requests
            arrived = arrived_at.pop(request)
            _, _, first, last = progress.times
            latency.append(last - arrived)
            ttft.append(first - arrived)
            if progress.num_output_tokens > 1:
                tpot.append((last - first) / (progress.num_output_tokens - 1))
            output_tokens += progress.num_output_tokens
            finished()
    seconds = time.monotonic() - started
    prompt_tokens = sum(len(prompt) for prompt, _ in items)
    busy_seconds, busy_tokens = busy or (seconds, output_tokens)
    return Summary(
        requests=len(items),
        seconds=seconds,
        output_tokens=output_tokens,
        output_tokens_per_second=busy_tokens / busy_seconds,
        total_tokens_per_second=(output_tokens + prompt_tokens) / seconds,
        latency_mean=sum(latency) / len(latency),
        latency_p50=percentile(latency, 50),
        latency_p99=percentile(latency, 99),
        ttft_mean=sum(ttft) / len(ttft),
        ttft_p99=percentile(ttft, 99),
        tpot_mean=sum(tpot) / len(tpot) if tpot else None,
        steps=len(steps),
        step_p50=percentile(steps, 50),
        step_p99=percentile(steps, 99),
        preemptions=int(engine.core.stats()["num_preemptions"] - before["num_preemptions"]),
    )
