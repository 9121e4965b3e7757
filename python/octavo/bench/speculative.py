"""`octavo bench speculative`: what each way of drafting brings on each kind of text.

Every engine of the comparison is loaded at once and they take turns, so that whatever else the
machine does hits all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import inspect
import json
import random
import statistics
from importlib import resources
from typing import Any

from octavo.bench.progress import progress
from octavo.bench.replay import Summary, replay
from octavo.bench.workloads import Item
from octavo.config import EngineConfig
from octavo.speculation import TEXT_METHODS, SpeculativeConfig

OFF = "off"


@dataclasses.dataclass
class Measured:
    """The runs of one engine on one text."""

    runs: list[Summary] = dataclasses.field(default_factory=list)
    drafts: float = 0.0
    draft_tokens: float = 0.0
    accepted: float = 0.0


def speculative_rows(options: argparse.Namespace, config: EngineConfig) -> list[dict[str, Any]]:
    """A row for each text, number of streams and method; `speed_up` is the median over the pairs."""
    from octavo.bench.commands import described, step_thread

    base = dataclasses.replace(config, speculative_config=None, spec_method=None, spec_model=None, spec_tokens=None)
    given = config.speculation
    configs = {OFF: base}
    for method in [given.method] if given else TEXT_METHODS:
        asked = dataclasses.replace(given, method=method) if given else SpeculativeConfig(method)
        configs[method] = dataclasses.replace(base, speculative_config=json.dumps(dataclasses.asdict(asked)))
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        threads = {name: stack.enter_context(step_thread(each)) for name, each in configs.items()}
        for text in options.text:
            for streams in options.streams:
                measured = {name: Measured() for name in threads}
                total = (1 + options.repeat) * len(threads) * streams
                with progress(f"{text}, {streams} streams", total) as bar:
                    for turn in range(1 + options.repeat):
                        for name, thread in threads.items():
                            engine = thread.engine
                            items = text_items(text, engine, streams, turn, options)
                            before = engine.core.stats()
                            summary = thread.run(functools.partial(replay, engine, items, finished=bar.update))
                            if turn == 0:
                                continue  # caches fill, and the controller learns how long steps take
                            add(measured[name], summary, before, engine.core.stats())
                for name, one in measured.items():
                    head = described(threads[name].engine, text) | {"streams": streams, "method": name}
                    rows.append(head | figures(one, measured[OFF]))
    return rows


def add(measured: Measured, summary: Summary, before: dict[str, float], after: dict[str, float]) -> None:
    """Takes in one run, and what the core counted meanwhile."""
    measured.runs.append(summary)
    measured.drafts += after["spec_decode_num_drafts"] - before["spec_decode_num_drafts"]
    measured.draft_tokens += after["spec_decode_num_draft_tokens"] - before["spec_decode_num_draft_tokens"]
    measured.accepted += after["spec_decode_num_accepted_tokens"] - before["spec_decode_num_accepted_tokens"]


def figures(one: Measured, off: Measured) -> dict[str, Any]:
    """Rates, acceptance, and how long a step took; None where there were no drafts."""
    ratios = [
        run.output_tokens_per_second / plain.output_tokens_per_second
        for run, plain in zip(one.runs, off.runs, strict=True)
    ]
    tokens, steps = sum(run.output_tokens for run in one.runs), sum(run.steps for run in one.runs)
    return {
        "tokens_per_second": statistics.median(run.output_tokens_per_second for run in one.runs),
        "speed_up": statistics.median(ratios),
        "acceptance": one.accepted / one.draft_tokens if one.draft_tokens else None,
        "accepted_per_draft": one.accepted / one.drafts if one.drafts else None,
        "tokens_per_step": tokens / steps,
        "step_ms": statistics.median((run.step_p50 or 0.0) * 1e3 for run in one.runs),
    }


def text_items(text: str, engine: Any, streams: int, turn: int, options: argparse.Namespace) -> list[Item]:
    """Prompts of about `--input-len` tokens, another part of the text for each stream and
    turn: what was answered before is no help.
    """
    vocab_size, tokenizer = engine.runner.vocab_size, engine.parts.tokenizer
    rng = random.Random(f"{text}/{options.workload_seed}/{turn}")
    if text == "random" or tokenizer is None:
        ids = [rng.randrange(10, vocab_size - 10) for _ in range(options.input_len * (1 + streams))]
    else:
        ids = tokenizer.encode_text(source(text)).token_ids
    items = []
    for _ in range(streams):
        start = rng.randrange(max(1, len(ids) - options.input_len))
        prompt = ids[start : start + options.input_len]
        if text == "copy":  # it is asked for again: half of it stands there twice already
            prompt = prompt[: options.input_len // 2] * 2
        items.append((prompt, options.output_len))
    return items


def source(text: str) -> str:
    """What the prompts are cut from: this package's own code, or the prose that comes with it."""
    if text == "code":
        import octavo.config
        import octavo.options

        return inspect.getsource(octavo.options) + inspect.getsource(octavo.config)
    return (resources.files("octavo") / "texts" / "evaluation.txt").read_text(encoding="ascii")
