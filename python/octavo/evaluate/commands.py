"""The command line of `octavo evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections import deque
from pathlib import Path
from typing import Any

from octavo.bench.progress import progress
from octavo.config import EngineConfig
from octavo.ending import load_torch
from octavo.options import add_flags, at_least, parse_with
from octavo.texts import EVALUATION, read_text

WINDOW = 512
NUM_TOKENS = 8192

_OF_THE_ENGINE = ("tokenizer", "dtype", "load_format", "device", "seed", "quantization", "block_size",
                  "kv_cache_memory", "kv_cache_dtype")  # fmt: skip
"""Flags that change what is computed; the others are about serving."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `octavo evaluate`."""
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--against",
        metavar="MODEL",
        help="compare with this model, as its files are and with a KV cache of its own type: mean and 99th percentile "
        "of the Kullback-Leibler divergence from it, in nats a token, and how often both hold the same token "
        "for the likeliest [default: none, perplexity only]",
    )
    group.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text to read [default: prose that ships with Octavo]"
    )
    group.add_argument(
        "--num-tokens",
        type=parse_with(at_least(2)),
        default=NUM_TOKENS,
        metavar="N",
        help=f"read the first N tokens of the text [default: {NUM_TOKENS}]",
    )
    group.add_argument(
        "--window",
        type=parse_with(at_least(16)),
        default=WINDOW,
        metavar="N",
        help=f"tokens that are read at a time, each but the first after those before it [default: {WINDOW}]",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    skip = [field.name for field in dataclasses.fields(EngineConfig) if field.name not in _OF_THE_ENGINE]
    add_flags(parser, EngineConfig, title="engine", skip=skip)


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    """`octavo evaluate`: reads, measures, prints."""
    load_torch()
    from octavo.evaluate.measure import Reader, check_comparable, measure, tokens_of, windows

    text = read_text(args.text or EVALUATION, "--text")
    readers = [Reader(config, args.window)]
    try:
        other = None
        if args.against is not None:
            against = dataclasses.replace(config, model=args.against, quantization=None, kv_cache_dtype="auto")
            readers.append(other := Reader(against, args.window))
            check_comparable(readers[0], other, text)
        prefix, tokens = tokens_of(readers[0], text)
        pieces = list(windows(prefix, tokens[: args.num_tokens], args.window))
        if not pieces:
            raise ValueError(f"--text: {args.text or EVALUATION} has {len(tokens)} tokens; at least 2 are needed")
        steps = progress("windows", len(pieces), measure(readers[0], other, iter(pieces)))
        ((quality, others),) = deque(itertools.islice(steps, len(pieces)), maxlen=1)
        report = readers[0].engine.parts.report
        row: dict[str, Any] = {
            "model": config.model,
            "weights": f"{report.weight_bytes / 2**20:.0f} MiB",
            "quantization": config.quantization,
            "dtype": report.dtype,
            "kv_cache_dtype": report.kv_dtype,
            "positions": len(quality.nll),
            "perplexity": quality.perplexity,
        }
        if other is not None:
            row |= {
                "against": args.against,
                "perplexity_against": others.perplexity,
                "mean_divergence": quality.mean_divergence,
                "divergence_99": quality.divergence_99,
                "agreement": quality.agreement,
            }
    finally:
        for reader in readers:
            reader.close()
    if args.json:
        print(json.dumps(row))
    else:
        print_table(row)
    return 0


def print_table(row: dict[str, Any]) -> None:
    """The figures as a person reads them."""
    form = {"perplexity": ".3f", "perplexity_against": ".3f", "mean_divergence": ".5f", "divergence_99": ".4f"}
    names = {
        "quantization": "quantised on load",
        "kv_cache_dtype": "KV cache",
        "perplexity_against": "its perplexity",
        "mean_divergence": "KL, mean",
        "divergence_99": "KL, 99th percentile",
        "agreement": "same likeliest token",
    }
    for key, value in row.items():
        if value is None:
            continue
        shown = f"{value:.2%}" if key == "agreement" else format(value, form.get(key, ""))
        print(f"{names.get(key, key):<20} {shown}")
