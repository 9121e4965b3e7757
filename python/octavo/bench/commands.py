"""The five commands of `octavo bench`. Each prints a table for people, or one JSON object with `--json`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import platform
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from octavo.bench.memory import CacheShape, paged_requests, reserved_requests
from octavo.bench.workloads import Item, workload
from octavo.config import EngineConfig

Rows = list[dict[str, Any]]

BATCHING_SEQS = 32
LENGTH_SPREAD = 24


def add_commands(parser: argparse.ArgumentParser, add_engine_flags: Any) -> None:
    """Adds the sub-commands; `add_engine_flags(parser)` gives those that load a model the flags of `EngineConfig`."""
    commands = parser.add_subparsers(dest="bench", required=True, metavar="COMMAND")

    def command(name: str, text: str, *, engine: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print one JSON object")
        sub.add_argument("--workload-seed", type=int, default=0, help="seed of prompts and arrivals")
        if engine:
            add_engine_flags(sub)
        return sub

    latency = command("latency", "One batch from start to end: decode1, decode32, prefill512 and the like")
    latency.add_argument("--workload", nargs="+", default=["decode1"], help="decodeN or prefillN")
    latency.add_argument("--repeat", type=int, default=3, help="runs; the median is reported")

    throughput = command("throughput", "A whole workload, all requests at once or at a rate")
    throughput.add_argument("--workload", nargs="+", default=["chat"], help="chat, uniform, long, mixed or prefix")
    throughput.add_argument("--num", type=int, help="only this many requests of the workload")
    throughput.add_argument("--rate", type=float, default=0.0, help="requests a second (Poisson); 0: all at once")

    batching = command(
        "batching",
        "The same arrivals under no, static and continuous batching: twice as many requests as run at once, whose "
        f"output lengths differ by a factor of {LENGTH_SPREAD}, so that static batches wait for their longest request. "
        f"Without --max-num-seqs {BATCHING_SEQS} run at once.",
    )
    batching.add_argument("--num", type=int, default=2 * BATCHING_SEQS, help="requests")
    batching.add_argument("--rate", type=float, default=0.0, help="requests a second (Poisson); 0: all at once")
    batching.add_argument("--input-len", type=int, default=32, help="longest prompt; lengths are spread below it")
    batching.add_argument("--output-len", type=int, default=96, help="longest output; short ones are commoner")

    memory = command("memory", "Requests in the same KV memory: pages, GQA, sliding window", engine=False)
    memory.add_argument("--kv-gib", type=float, default=8.0, help="KV memory in GiB")
    memory.add_argument("--max-model-len", type=int, default=2048, help="what a whole reservation must hold")

    serve = command("serve", "Streams against a running server", engine=False)
    serve.add_argument("--url", default="http://127.0.0.1:8000")
    serve.add_argument("--model", required=True, help="name of the served model")
    serve.add_argument("--num", type=int, default=64, help="requests")
    serve.add_argument("--concurrency", type=int, default=32, help="streams at once")
    serve.add_argument("--input-len", type=int, default=128)
    serve.add_argument("--output-len", type=int, default=128)
    serve.add_argument("--vocab-size", type=int, default=32000, help="prompts are random ids below it")


def run(options: argparse.Namespace, config: EngineConfig | None) -> int:
    """Runs the chosen command. Returns the exit code."""
    if options.bench == "memory":
        rows = memory_rows(options.kv_gib, options.max_model_len, options.workload_seed)
    elif options.bench == "serve":
        from octavo.bench.client import measure_server

        rows = [asyncio.run(measure_server(options))]
    else:
        assert config is not None
        rows = {"latency": latency_rows, "throughput": throughput_rows, "batching": batching_rows}[options.bench](
            options, config
        )
    print(json.dumps({"bench": options.bench, "rows": rows}) if options.json else table(rows))
    return int(any(row.get("failed") for row in rows))


def latency_rows(options: argparse.Namespace, config: EngineConfig) -> Rows:
    """The median of some runs of each small workload, after a warm-up."""
    from octavo.bench.replay import replay

    rows: Rows = []
    with engine_of(config) as engine:
        for name in options.workload:
            items = workload(name, engine.runner.vocab_size, options.workload_seed)
            replay(engine, items)
            runs = sorted((replay(engine, items) for _ in range(options.repeat)), key=lambda run: run.seconds)
            spread = {"fastest": runs[0].seconds, "slowest": runs[-1].seconds}
            rows.append(described(engine, name) | runs[len(runs) // 2].as_dict() | spread)
    return rows


def throughput_rows(options: argparse.Namespace, config: EngineConfig) -> Rows:
    """One run of each workload, after a warm-up with its first request."""
    from octavo.bench.replay import poisson_arrivals, replay

    rows: Rows = []
    with engine_of(config) as engine:
        for name in options.workload:
            items = workload(name, engine.runner.vocab_size, options.workload_seed)[: options.num]
            replay(engine, items[:1])
            arrivals = poisson_arrivals(len(items), options.rate, options.workload_seed)
            rows.append(described(engine, name) | replay(engine, items, arrivals).as_dict())
    return rows


def batching_rows(options: argparse.Namespace, config: EngineConfig) -> Rows:
    """One row a batching policy, over the same requests and arrivals."""
    from octavo.bench.replay import poisson_arrivals, replay

    rows: Rows = []
    config = dataclasses.replace(config, max_num_seqs=config.max_num_seqs or BATCHING_SEQS)
    for policy in ("none", "static", "continuous"):
        with engine_of(dataclasses.replace(config, batching=policy)) as engine:
            items = batching_items(options, engine.runner.vocab_size)
            replay(engine, items[:2])
            summary = replay(engine, items, poisson_arrivals(len(items), options.rate, options.workload_seed))
        rows.append({"batching": policy} | summary.as_dict())
    for row in rows:
        row["throughput_ratio"] = row["output_tokens_per_second"] / rows[0]["output_tokens_per_second"]
    return rows


def batching_items(options: argparse.Namespace, vocab_size: int) -> list[Item]:
    """Random prompts, and output lengths spread evenly over the logarithm, as those of people's requests are skewed."""
    rng = random.Random(options.workload_seed)
    shortest = max(1, options.output_len // LENGTH_SPREAD)
    items = []
    for _ in range(options.num):
        prompt_len = rng.randint(max(1, options.input_len // 4), options.input_len)
        prompt = [rng.randrange(10, vocab_size - 10) for _ in range(prompt_len)]
        items.append((prompt, round(shortest * (options.output_len / shortest) ** rng.random())))
    return items


def memory_rows(kv_gib: float, max_model_len: int, seed: int) -> Rows:
    """Rows for a 7B with MHA, an 8B with GQA, and the same 8B with three of four layers windowed."""
    kv_bytes = int(kv_gib * 2**30)
    items = workload("chat", seed=seed)
    mha, gqa = CacheShape(32, 32, 128), CacheShape(32, 8, 128)
    cases: list[tuple[str, CacheShape, tuple[int, ...]]] = [
        ("7B, MHA (32 KV heads)", mha, (0,)),
        ("8B, GQA (8 KV heads)", gqa, (0,)),
        ("8B, GQA, 3 of 4 layers windowed (256)", gqa, (0, 256, 256, 256)),
    ]
    rows: Rows = []
    for name, shape, windows in cases:
        reserved = reserved_requests(kv_bytes, shape, max_model_len)
        peak, mean = paged_requests(kv_bytes, shape, items, max_model_len=max_model_len, windows=windows)
        rows.append(
            {
                "case": name,
                "bytes_per_token": shape.bytes_per_token,
                "reserved": reserved,
                "paged_peak": peak,
                "paged_mean": mean,
                "ratio": peak / max(reserved, 1),
            }
        )
    return rows


@contextlib.contextmanager
def engine_of(config: EngineConfig) -> Iterator[Any]:
    """An engine whose queue holds any workload. Closed at the end: the next one needs its memory."""
    from octavo.engine.engine import Engine

    engine = Engine.from_config(dataclasses.replace(config, max_waiting=2**20))
    try:
        yield engine
    finally:
        engine.close()


def described(engine: Any, name: str) -> dict[str, Any]:
    """What a figure needs beside it."""
    import torch

    return {
        "workload": name,
        "model": engine.parts.model_name,
        "device": engine.parts.report.device,
        "dtype": engine.parts.report.dtype,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned columns; one row alone as a list of its fields."""

    def shown(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    if len(rows) == 1:
        width = max(map(len, rows[0]))
        return "\n".join(f"{name:<{width}}  {shown(value)}" for name, value in rows[0].items())
    lines = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
