"""The commands of `octavo bench`. Each prints a table for people, or one JSON object with
`--json`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.bench.engine import described, step_thread
from octavo.bench.progress import progress
from octavo.bench.workloads import NAMES, Item, known_workload, workload
from octavo.config import EngineConfig
from octavo.ending import load_torch
from octavo.options import at_least, parse_with
from octavo.speculation import METHODS, TEXT_METHODS

Rows = list[dict[str, Any]]

BATCHING_SEQS = 32
TEXTS = ("code", "prose", "copy", "random")
LENGTH_SPREAD = 24


def add_commands(parser: argparse.ArgumentParser, add_engine_flags: Callable[[argparse.ArgumentParser], None]) -> None:
    """Adds the sub-commands; `add_engine_flags` gives those that load a model the flags of
    `EngineConfig`.
    """
    commands = parser.add_subparsers(dest="bench", required=True, metavar="COMMAND")
    count = parse_with(at_least(1))
    workloads = ", ".join(NAMES) + "; decodeN and prefillN take any N"

    def command(name: str, text: str, *, engine: bool = True) -> argparse._ArgumentGroup:
        sub = commands.add_parser(name, help=text, description=f"{text}.", allow_abbrev=False)
        sub.set_defaults(parser=sub)
        group = sub.add_argument_group("benchmark")
        group.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
        group.add_argument("--workload-seed", type=int, default=0, help="seed of prompts and arrivals [default: 0]")
        if engine:
            add_engine_flags(sub)
        return group

    def add_workloads(group: argparse._ArgumentGroup, default: str) -> None:
        group.add_argument(
            "--workload",
            nargs="+",
            default=[default],
            type=parse_with(known_workload),
            metavar="NAME",
            help=f"one or more of {workloads} [default: {default}]",
        )

    def add_rate(group: argparse._ArgumentGroup) -> None:
        group.add_argument(
            "--rate",
            type=parse_with(at_least(0.0)),
            default=0.0,
            help="requests a second (Poisson) [default: 0, all at once]",
        )

    latency = command("latency", "One batch from start to end, some times over")
    add_workloads(latency, "decode1")
    latency.add_argument("--repeat", type=count, default=3, help="runs; the median is reported [default: 3]")

    throughput = command("throughput", "A whole workload, all requests at once or at a rate")
    add_workloads(throughput, "chat")
    throughput.add_argument("--num", type=count, help="only this many requests of the workload [default: all]")
    add_rate(throughput)

    batching = command(
        "batching",
        "The same arrivals under no, static and continuous batching: twice as many requests as run at once, whose "
        f"output lengths differ by a factor of {LENGTH_SPREAD}, so that static batches wait for their longest request. "
        f"Without --max-num-seqs {BATCHING_SEQS} run at once",
    )
    batching.add_argument(
        "--num", type=count, default=2 * BATCHING_SEQS, help=f"requests [default: {2 * BATCHING_SEQS}]"
    )
    add_rate(batching)
    batching.add_argument(
        "--input-len", type=count, default=32, help="longest prompt; lengths are spread below it [default: 32]"
    )
    batching.add_argument(
        "--output-len", type=count, default=96, help="longest output; short ones are commoner [default: 96]"
    )

    speculative = command(
        "speculative", "Speculative decoding against none, in turns, on several kinds of text and numbers of streams"
    )
    speculative.add_argument(
        "--text", nargs="+", default=list(TEXTS), choices=TEXTS, help=f"[default: {' '.join(TEXTS)}]"
    )
    speculative.add_argument(
        "--streams", nargs="+", default=[1], type=count, metavar="N", help="requests at once [default: 1]"
    )
    speculative.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        help=f"ways to draft [default: that of --speculative-config, else {' '.join(TEXT_METHODS)}]",
    )
    speculative.add_argument(
        "--acceptance",
        nargs="+",
        type=parse_with(chance),
        metavar="P",
        help="each draft of a model is right with this chance, whatever the model proposes, and every answer is one "
        "token again and again: what drafts cost is measured where weights are random. The rows say so "
        "[default: as the models draw]",
    )
    speculative.add_argument("--repeat", type=count, default=3, help="runs of each; medians are reported [default: 3]")
    speculative.add_argument("--input-len", type=count, default=256, help="tokens of a prompt [default: 256]")
    speculative.add_argument("--output-len", type=count, default=128, help="tokens of an answer [default: 128]")

    precision = command(
        "precision",
        "The same model in 16, 8 and 4 bits: memory, decode speed at 1 and 32 streams, quality, and whether each is "
        "what the guide expects. On a CPU tokens a CPU second",
    )
    precision.add_argument("--output-len", type=count, default=128, help="tokens of an answer [default: 128]")
    precision.add_argument("--repeat", type=count, default=1, help="runs; the best is reported [default: 1]")
    precision.add_argument(
        "--num-samples", type=count, default=32, help="pieces of text for GPTQ and AWQ [default: 32]"
    )
    precision.add_argument(
        "--quality-tokens",
        type=parse_with(at_least(2)),
        default=8192,
        metavar="N",
        help="of prose, on which quality is measured [default: 8192]",
    )
    precision.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="where those are made and kept [default: nowhere]"
    )

    memory = command("memory", "Requests in the same KV memory: pages, GQA, windows; in fewer bits", engine=False)
    memory.add_argument("--kv-gib", type=parse_with(at_least(0.01)), default=8.0, help="KV memory in GiB [default: 8]")
    memory.add_argument(
        "--max-model-len", type=count, default=2048, help="what a whole reservation must hold [default: 2048]"
    )

    serve = command("serve", "Streams against a running server, of any kind that speaks OpenAI's API", engine=False)
    serve.add_argument(
        "--url",
        type=parse_with(server_url),
        default="http://127.0.0.1:8000",
        help="where it runs, with or without /v1 [default: http://127.0.0.1:8000]",
    )
    serve.add_argument("--api-key", help="sent as a bearer token [default: none]")
    serve.add_argument("--model", help="name of the served model [default: the first that the server lists]")
    serve.add_argument("--num", type=count, default=64, help="requests [default: 64]")
    serve.add_argument("--concurrency", type=count, default=32, help="streams at once [default: 32]")
    serve.add_argument("--input-len", type=count, default=128, help="tokens of a prompt [default: 128]")
    serve.add_argument("--output-len", type=count, default=128, help="tokens of an answer [default: 128]")
    serve.add_argument(
        "--vocab-size",
        type=parse_with(at_least(21)),
        default=32000,
        help="prompts are random ids below it [default: 32000]",
    )


def chance(text: str) -> float:
    """A number from 0 to 1."""
    value = at_least(0.0)(text)
    if value > 1:
        raise ValueError(f"{value:g} must be at most 1")
    return value


def server_url(text: str) -> str:
    """The address of a server, without a slash or `/v1` at its end."""
    if not text.startswith(("http://", "https://")):
        raise ValueError(f"{text!r} must begin with http:// or https://")
    return text.rstrip("/").removesuffix("/v1")


def run(options: argparse.Namespace, config: EngineConfig | None) -> int:
    """Runs the chosen command. Returns the exit code."""
    if options.bench == "memory":
        rows = memory_rows(options.kv_gib, options.max_model_len, options.workload_seed)
    elif options.bench == "serve":
        from octavo.bench.client import measure_server

        rows = [asyncio.run(measure_server(options))]
    else:
        assert config is not None
        load_torch()
        rows = _ENGINE_ROWS[options.bench](options, config)
    print(json.dumps({"bench": options.bench, "rows": rows}) if options.json else table(rows))
    return int(any(row.get("failed") for row in rows))


def speculative_rows(options: argparse.Namespace, config: EngineConfig) -> Rows:
    """See `octavo.bench.speculative`."""
    from octavo.bench.speculative import speculative_rows

    return speculative_rows(options, config)


def latency_rows(options: argparse.Namespace, config: EngineConfig) -> Rows:
    """The median of some runs of each small workload, after a warm-up."""
    from octavo.bench.replay import replay

    rows: Rows = []
    with step_thread(config) as thread:
        engine = thread.engine
        for name in options.workload:
            items = workload(name, engine.runner.vocab_size, options.workload_seed)
            with progress(name, (1 + options.repeat) * len(items)) as bar:
                one = functools.partial(replay, engine, items, finished=bar.update)
                thread.run(one)
                runs = [thread.run(one) for _ in range(options.repeat)]
            runs.sort(key=lambda run: run.seconds)
            spread = {"fastest": runs[0].seconds, "slowest": runs[-1].seconds}
            rows.append(described(engine, name) | runs[len(runs) // 2].as_dict() | spread)
    return rows


def throughput_rows(options: argparse.Namespace, config: EngineConfig) -> Rows:
    """One run of each workload, after a warm-up with its first request."""
    from octavo.bench.replay import poisson_arrivals, replay

    rows: Rows = []
    with step_thread(config) as thread:
        engine = thread.engine
        for name in options.workload:
            items = workload(name, engine.runner.vocab_size, options.workload_seed)[: options.num]
            thread.run(functools.partial(replay, engine, items[:1]))
            arrivals = poisson_arrivals(len(items), options.rate, options.workload_seed)
            with progress(name, len(items)) as bar:
                run = functools.partial(replay, engine, items, arrivals, finished=bar.update)
                rows.append(described(engine, name) | thread.run(run).as_dict())
    return rows


def batching_rows(options: argparse.Namespace, config: EngineConfig) -> Rows:
    """One row a batching policy, over the same requests and arrivals."""
    from octavo.bench.replay import poisson_arrivals, replay

    rows: Rows = []
    config = dataclasses.replace(config, max_num_seqs=config.max_num_seqs or BATCHING_SEQS)
    for policy in ("none", "static", "continuous"):
        with step_thread(dataclasses.replace(config, batching=policy)) as thread:
            engine = thread.engine
            items = batching_items(options, engine.runner.vocab_size)
            thread.run(functools.partial(replay, engine, items[:2]))
            arrivals = poisson_arrivals(len(items), options.rate, options.workload_seed)
            with progress(policy, len(items)) as bar:
                summary = thread.run(functools.partial(replay, engine, items, arrivals, finished=bar.update))
        rows.append({"batching": policy} | summary.as_dict())
    for row in rows:
        row["throughput_ratio"] = row["output_tokens_per_second"] / rows[0]["output_tokens_per_second"]
    return rows


def precision_rows(options: argparse.Namespace, config: EngineConfig) -> Rows:
    """One row a precision."""
    from octavo.bench.precision import precision_rows as rows

    return rows(options, config)


_ENGINE_ROWS = {
    "latency": latency_rows,
    "throughput": throughput_rows,
    "batching": batching_rows,
    "precision": precision_rows,
    "speculative": speculative_rows,
}


def batching_items(options: argparse.Namespace, vocab_size: int) -> list[Item]:
    """Random prompts, and output lengths spread evenly over the logarithm, as those of people's
    requests are skewed.
    """
    rng = random.Random(options.workload_seed)
    shortest = max(1, options.output_len // LENGTH_SPREAD)
    items = []
    for _ in range(options.num):
        prompt_len = rng.randint(max(1, options.input_len // 4), options.input_len)
        prompt = [rng.randrange(10, vocab_size - 10) for _ in range(prompt_len)]
        items.append((prompt, round(shortest * (options.output_len / shortest) ** rng.random())))
    return items


def memory_rows(kv_gib: float, max_model_len: int, seed: int) -> Rows:
    """Rows for a 7B with MHA, an 8B with GQA, and the same 8B with three of four layers windowed;
    then for each head size and type of pages, with the tokens that the same memory holds.
    """
    from octavo.bench.memory import BLOCK_SIZE, CacheShape, paged_requests, reserved_requests, started_with

    kv_bytes = int(kv_gib * 2**30)
    items = workload("chat", seed=seed)
    mha, gqa = CacheShape(32, 32, 128), CacheShape(32, 8, 128)
    needed = mha.bytes_per_token * (max_model_len + BLOCK_SIZE)  # the pool keeps a block for itself
    if kv_bytes < needed:
        raise ValueError(
            f"--kv-gib {kv_gib}: one request of --max-model-len {max_model_len} tokens needs "
            f"{needed / 2**30:.2f} GiB of the 7B"
        )
    cases: list[tuple[str, CacheShape, tuple[int, ...]]] = [
        ("7B, MHA (32 KV heads)", mha, (0,)),
        ("8B, GQA (8 KV heads)", gqa, (0,)),
        ("8B, GQA, 3 of 4 layers windowed (256)", gqa, (0, 256, 256, 256)),
    ]
    pages = [(head_dim, kv_dtype) for head_dim in (128, 64) for kv_dtype in ("bfloat16", "fp8", "int8", "int4")]
    rows: Rows = []
    bar = progress("memory", len(cases) + len(pages))
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
                "tokens": None,
                "of_bfloat16": None,
            }
        )
        bar.update()
    plain_tokens = 0
    for head_dim, kv_dtype in pages:
        report = started_with(kv_dtype, head_dim)
        plain_tokens = report.kv_tokens if kv_dtype == "bfloat16" else plain_tokens
        rows.append(
            {
                "case": f"{report.kv_dtype}, one head of {head_dim} in one layer, 64 MiB",
                "bytes_per_token": report.kv_bytes // report.num_blocks // report.block_size,
                "reserved": None,
                "paged_peak": None,
                "paged_mean": None,
                "ratio": None,
                "tokens": report.kv_tokens,
                "of_bfloat16": report.kv_tokens / plain_tokens,
            }
        )
        bar.update()
    bar.close()
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned columns; one row alone as a list of its fields."""

    def shown(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    if len(rows) == 1:
        width = max(map(len, rows[0]))
        return "\n".join(f"{name:<{width}}  {shown(value)}" for name, value in rows[0].items())
    lines = [list(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
