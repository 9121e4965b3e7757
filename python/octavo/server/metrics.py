"""Prometheus metrics under vLLM's names, so that its dashboards and autoscalers work (octavo's own
ones begin with `octavo:`).

Gauges and the engine's counters are read from `engine.stats()` when somebody scrapes; the server
adds what only it sees: the times of each request and how it ended. Histograms are counted here
rather than by the client library: an observation costs a bisection, and there is one for every
token.
"""

import bisect
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from octavo import _core
from octavo.server.keys import Keys
from octavo.server.log import one_line

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine

logger = logging.getLogger(__name__)

# Bounds in seconds and tokens; vLLM's, rounded to fewer.
_LATENCY = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 240.0, 480.0)
_FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_BETWEEN_TOKENS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    10.0,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_CHOICES = (1, 2, 5, 10, 20, 50, 100)
_NAMED_FIELDS = 100  # of the ignored fields this many are named in the log: clients choose the names

_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From arrival to the first token.", _FIRST_TOKEN),
    "inter_token_latency_seconds": ("Between the tokens of a choice.", _BETWEEN_TOKENS),
    "request_time_per_output_token_seconds": ("Mean time between the tokens of a choice.", _BETWEEN_TOKENS),
    "e2e_request_latency_seconds": ("From arrival to the last token.", _LATENCY),
    "request_queue_time_seconds": ("From arrival to the first step.", _LATENCY),
    "request_prefill_time_seconds": ("From the first step to the first token.", _LATENCY),
    "request_decode_time_seconds": ("From the first token to the last.", _LATENCY),
    "request_inference_time_seconds": ("From the first step to the last token.", _LATENCY),
    "request_prompt_tokens": ("Tokens of the prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens put out.", _TOKENS),
    "request_params_max_tokens": ("max_tokens of requests whose client set it.", _TOKENS),
    "request_params_n": ("Choices that a request asks for.", _CHOICES),
}

_GAUGES = {
    "num_requests_running": "Requests in the running batch.",
    "num_requests_waiting": "Sequences that wait, preempted ones included.",
    "kv_cache_usage_perc": "Share of the KV blocks in use, 0 to 1.",
}
_COUNTERS = {
    "prompt_tokens": "Prompt tokens of accepted requests.",
    "generation_tokens": "Tokens put out.",
    "num_preemptions": "Requests set back for lack of blocks.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
}
_DRAFT_COUNTERS = {
    "spec_decode_num_drafts": "Rows of steps that had drafts.",
    "spec_decode_num_draft_tokens": "Drafts verified.",
    "spec_decode_num_accepted_tokens": "Drafts that were right.",
}
_DRAFT_PASSES = {
    "spec_decode_num_draft_passes": "Passes of a model that drafts.",
    "spec_decode_draft_seconds": "Seconds that they took.",
}


class Histogram:
    """Counts of values below each bound."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Counts `value`, `times` times."""
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """(bound, count of values up to it), as Prometheus wants them."""
        cumulative, result = 0, []
        for bound, count in zip([*map(float, self.bounds), float("inf")], self.counts, strict=True):
            cumulative += count
            result.append(("+Inf" if bound == float("inf") else repr(bound), float(cumulative)))
        return result


class CallTimes:
    """Follows the requests of one call, a prompt with its choices each, from arrival to end."""

    def __init__(self, metrics: "Metrics", arrival: float, num_prompts: int) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._without_token = set(range(num_prompts))
        self._running = set(range(num_prompts))
        self._tokens = [0] * num_prompts

    def add(self, delta: _core.ReplyDelta) -> None:
        """Takes in one delta of the reply."""
        for gap, count in delta.token_gaps:
            self._metrics.histograms["inter_token_latency_seconds"].observe(gap, count)
        for request in delta.requests:
            self._add_milestone(request)

    def _add_milestone(self, request: _core.RequestProgress) -> None:
        histograms = self._metrics.histograms
        _, scheduled, first, last = request.times
        if scheduled > 0.0:
            self._tokens[request.index] = request.num_prompt_tokens + request.num_output_tokens
        if request.num_output_tokens > 0 and request.index in self._without_token:
            self._without_token.remove(request.index)
            histograms["time_to_first_token_seconds"].observe(first - self._arrival)
        if request.finish_reason is None or request.index not in self._running:
            return
        self._running.remove(request.index)
        self._metrics.finished(request.finish_reason, self._arrival)
        histograms["request_prompt_tokens"].observe(request.num_prompt_tokens)
        histograms["request_generation_tokens"].observe(request.num_output_tokens)
        if first > 0.0:
            histograms["e2e_request_latency_seconds"].observe(last - self._arrival)
            histograms["request_queue_time_seconds"].observe(scheduled - self._arrival)
            histograms["request_prefill_time_seconds"].observe(first - scheduled)
            histograms["request_decode_time_seconds"].observe(last - first)
            histograms["request_inference_time_seconds"].observe(last - scheduled)
            for tokens, choice_first, choice_last in request.choices:
                if tokens > 1:
                    mean = (choice_last - choice_first) / (tokens - 1)
                    histograms["request_time_per_output_token_seconds"].observe(mean)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts that were begun, and of answers, as far as has been told."""
        return sum(self._tokens)

    def close(self) -> None:
        """The handler is done with the call: of a request that has not ended the client left, or
        another one failed.
        """
        for _ in self._running:
            self._metrics.finished("abort", self._arrival)
        self._running.clear()


class Metrics(Collector):
    """All metrics of one server."""

    def __init__(self, engine: "AsyncEngine", keys: Keys) -> None:
        self._engine = engine
        self._keys = keys
        self._registry = CollectorRegistry()
        self.histograms = {name: Histogram(bounds) for name, (_, bounds) in _HISTOGRAMS.items()}
        self.finish_reasons: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0})
        self.errors: Counter[str] = Counter()
        self.unknown_fields = 0
        self._named: set[str] = set()
        self._service_times: deque[float] = deque(maxlen=64)
        self._last_finish = 0.0
        self._registry.register(self)

    def accepted(self, requests: int, n: int, max_tokens: int | None) -> None:
        """A call was taken in: so many requests, each of `n` choices with what the client set."""
        self.histograms["request_params_n"].observe(n, requests)
        if max_tokens is not None:
            self.histograms["request_params_max_tokens"].observe(max_tokens, requests)

    def ignored(self, fields: tuple[str, ...]) -> None:
        """A request had fields that nobody knows."""
        self.unknown_fields += len(fields)
        for field in fields:
            if field not in self._named and len(self._named) < _NAMED_FIELDS:
                self._named.add(field)
                logger.warning("requests have the field %s, which is ignored", one_line(field))

    def finished(self, reason: str, arrival: float) -> None:
        """A request ended that had arrived at `arrival` (monotonic clock)."""
        self.finish_reasons[reason] += 1
        if reason != "abort":
            now = time.monotonic()
            # Before it arrived the server may have been idle.
            self._service_times.append(now - max(self._last_finish, arrival))
            self._last_finish = now

    def retry_after(self) -> int:
        """Seconds until the queue, at the rate at which the last requests ended while there were
        any, will have drained: from 1 to 60.
        """
        waiting = self._engine.stats().get("num_requests_queued", 0.0)
        seconds_each = sum(self._service_times) / max(1, len(self._service_times))
        return int(min(60, max(1, math.ceil(waiting * seconds_each))))

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not collect at registration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by the registry, for `render`."""
        names, labels = ["model_name"], [self._engine.model_name]
        stats = self._engine.stats()
        for name, text in _GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=names)
            gauge.add_metric(labels, stats.get(name, 0.0))
            yield gauge
        for name, text in _COUNTERS.items():
            counter = CounterMetricFamily(f"vllm:{name}", text, labels=names)
            counter.add_metric(labels, stats.get(name, 0.0))
            yield counter
        yield from self._drafts(stats)
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "The KV pool.", labels=[*names, "block_size", "num_gpu_blocks", "cache_dtype"]
        )
        sizes = [str(int(stats.get(name, 0.0))) for name in ("block_size", "num_blocks")]
        info.add_metric([*labels, *sizes, self._engine.config.kv_cache_dtype], 1.0)
        yield info
        yield from self._quality()
        success = CounterMetricFamily(
            "vllm:request_success", "Requests by how they ended.", labels=[*names, "finished_reason"]
        )
        for reason, count in self.finish_reasons.items():
            success.add_metric([*labels, reason], count)
        yield success
        for name, (text, _) in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"vllm:{name}", text, labels=names)
            histogram.add_metric(labels, self.histograms[name].buckets(), self.histograms[name].total)
            yield histogram
        errors = CounterMetricFamily(
            "octavo:http_errors", "Answers that were errors, by code.", labels=[*names, "code"]
        )
        for code, count in self.errors.items():
            errors.add_metric([*labels, code], count)
        yield errors
        unknown = CounterMetricFamily("octavo:unknown_fields", "Request fields that were ignored.", labels=names)
        unknown.add_metric(labels, self.unknown_fields)
        yield unknown
        yield from self._of_keys()

    def _of_keys(self) -> Iterator[Metric]:
        """By the name of each key, where there are any."""
        if not self._keys:
            return
        names, labels = ["model_name", "key"], [self._engine.model_name]
        active = GaugeMetricFamily("octavo:key_calls", "Calls of a key that are answered or wait.", labels=names)
        tokens = CounterMetricFamily("octavo:key_tokens", "Tokens of a key's calls that have ended.", labels=names)
        refusals = CounterMetricFamily("octavo:key_refusals", "Calls over a key's limits.", labels=names)
        for name, caller in self._keys.callers.items():
            active.add_metric([*labels, name], caller.active)
            tokens.add_metric([*labels, name], caller.tokens)
            refusals.add_metric([*labels, name], caller.refusals)
        yield from (active, tokens, refusals)

    def _quality(self) -> Iterator[Metric]:
        """What fewer bits cost, where start-up has measured it."""
        verdict = self._engine.report.verdict
        if verdict is None or not verdict.num_tokens:
            return
        names, labels = ["model_name"], [self._engine.model_name]
        text = "Mean KL divergence from the model in 16 bits, in nats a token, when it was loaded."
        loss = GaugeMetricFamily("octavo:quality_loss", text, labels=names)
        loss.add_metric(labels, verdict.divergence)
        yield loss
        text = "Layers that stay in 16 bits, as they would lose too much."
        layers = GaugeMetricFamily("octavo:layers_in_16_bits", text, labels=[*names, "part"])
        for part in verdict.parts:
            layers.add_metric([*labels, part.key], len(part.kept))
        yield layers

    def _drafts(self, stats: dict[str, float]) -> Iterator[Metric]:
        """Of speculative decoding, where there is any."""
        by_position = self._engine.accepted_per_position()
        if not by_position:
            return
        names, labels = ["model_name"], [self._engine.model_name]
        for prefix, counters in (("vllm", _DRAFT_COUNTERS), ("octavo", _DRAFT_PASSES)):
            for name, text in counters.items():
                counter = CounterMetricFamily(f"{prefix}:{name}", text, labels=names)
                counter.add_metric(labels, stats.get(name, 0.0))
                yield counter
        positions = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafts that were right, by position.",
            labels=[*names, "position"],
        )
        for position, count in enumerate(by_position):
            positions.add_metric([*labels, str(position)], count)
        yield positions
