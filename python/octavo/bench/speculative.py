"""`octavo bench speculative`: what each way of drafting brings on each kind of text, and what it takes:
drafting, verifying, and a step without either.

Every engine of the comparison is loaded at once and they take turns, so that whatever else the
machine does hits all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from octavo.bench.engine import described, step_thread
from octavo.bench.progress import progress
from octavo.bench.replay import Summary, replay
from octavo.bench.workloads import Item
from octavo.config import EngineConfig
from octavo.engine.model_runner import ModelRunner
from octavo.engine.step_thread import StepThread
from octavo.kernels.step.plan_format import Plan
from octavo.speculation import DRAFT_MODEL, TEXT_METHODS, SpeculativeConfig

OFF = "off"

ANSWERS = 4
"""Of each stream in a turn, one after another and of different lengths. Where all begin and end together
the slowest says how long it takes, and drafts, which make the others faster, seem to cost.
"""

SAID = 10
"""The one token of every answer where `--acceptance` sets how many drafts are right."""
ALWAYS_SAID = {"logit_bias": [(SAID, 100.0)]}
FATES = 4096
"""Passes after which the same drafts are right and wrong again."""


class StepTimes:
    """Times of an engine's steps, from one commit to the next: so the pauses of the host are in them."""

    def __init__(self, engine: Any) -> None:
        self._core = engine.core
        self.plain: list[float] = []  # seconds, of steps without drafts
        self.verifying: list[float] = []  # with, less what a model took to make them
        self.drafting: list[float] = []  # that, step by step
        self.restart()

    def restart(self) -> None:
        """The next step begins now."""
        self._before, self._began = self._core.stats(), time.perf_counter()

    def __call__(self) -> None:
        """After a turn of the engine, which may have committed a step."""
        stats = self._core.stats()
        before = self._before
        if stats["steps"] == before["steps"]:
            return
        now = time.perf_counter()
        seconds = now - self._began
        self._before, self._began = stats, now
        if stats["spec_decode_num_drafts"] == before["spec_decode_num_drafts"]:
            self.plain.append(seconds)
            return
        self.drafting.append(stats["spec_decode_draft_seconds"] - before["spec_decode_draft_seconds"])
        self.verifying.append(seconds - self.drafting[-1])


@dataclasses.dataclass
class Measured:
    """The runs of one engine on one text."""

    runs: list[Summary] = dataclasses.field(default_factory=list)
    steps: float = 0.0
    drafts: float = 0.0
    draft_tokens: float = 0.0
    accepted: float = 0.0


def speculative_rows(options: argparse.Namespace, config: EngineConfig) -> list[dict[str, Any]]:
    """A row for each acceptance that is set, text, number of streams and method."""
    base = dataclasses.replace(config, speculative_config=None, spec_method=None, spec_model=None, spec_tokens=None)
    configs = {OFF: base}
    for method, speculation in speculations(options, config.speculation).items():
        configs[method] = dataclasses.replace(base, speculative_config=json.dumps(dataclasses.asdict(speculation)))
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        threads = {name: stack.enter_context(step_thread(each)) for name, each in configs.items()}
        for acceptance, text, streams in itertools.product(options.acceptance or [None], options.text, options.streams):
            with contextlib.ExitStack() as hooks:
                if acceptance is not None:
                    for name in set(threads) - {OFF}:
                        runner = threads[name].engine.runner
                        hooks.enter_context(set_acceptance(runner, acceptance, options.workload_seed))
                rows += compare(threads, text, streams, acceptance, options)
    return rows


def compare(
    threads: Mapping[str, StepThread], text: str, streams: int, acceptance: float | None, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The engines, by method, in turns: a row for each. `speed_up` is the median over the pairs."""
    measured = {name: Measured() for name in threads}
    times = {name: StepTimes(thread.engine) for name, thread in threads.items()}
    sampling = None if acceptance is None else ALWAYS_SAID
    with progress(f"{text}, {streams} streams", (1 + options.repeat) * len(threads) * streams * ANSWERS) as bar:
        for turn in range(1 + options.repeat):
            for name, thread in threads.items():
                engine = thread.engine
                items = text_items(text, engine, streams, turn, options)
                before = engine.core.stats()
                times[name].restart()
                run = functools.partial(replay, at_once=streams, sampling=sampling, stepped=times[name])
                summary = thread.run(functools.partial(run, engine, items, finished=bar.update))
                if turn == 0:  # caches fill, and the controller learns how long steps take
                    times[name] = StepTimes(engine)
                else:
                    add(measured[name], summary, before, engine.core.stats())
    told = {"streams": streams} | ({} if acceptance is None else {"acceptance_set_to": acceptance})
    return [
        described(threads[name].engine, text)
        | {"method": name, **told}
        | figures(one, measured[OFF])
        | picture(times[name], times[OFF])
        for name, one in measured.items()
    ]


def speculations(options: argparse.Namespace, given: SpeculativeConfig | None) -> dict[str, SpeculativeConfig]:
    """What is compared, by method. Raises `ValueError` for a method that lacks what it needs."""
    found = {}
    for method in options.method or ([given.method] if given else TEXT_METHODS):
        if given is None:
            asked = SpeculativeConfig.read(json.dumps({"method": method}))
        else:
            model = given.model if method == DRAFT_MODEL else None
            quantization = None if method in TEXT_METHODS else given.quantization
            asked = dataclasses.replace(given, method=method, model=model, quantization=quantization)
        if options.acceptance is not None and not asked.drafts_by_model:
            raise ValueError(
                f"--acceptance {options.acceptance[0]:g}: the drafts of method {method!r} are the text's own; "
                "it can be set for draft_model and self"
            )
        found[method] = asked
    return found


@contextlib.contextmanager
def set_acceptance(runner: ModelRunner, acceptance: float, seed: int) -> Iterator[None]:
    """Meanwhile the model that drafts computes as ever, and its drafts then are right with that chance,
    each by itself, under `ALWAYS_SAID`.
    """
    assert runner.proposer is not None
    draw = runner.proposer.draw
    # Drawn beforehand: a step should have no launches that it has not without.
    rows = runner.proposer.sizes[-1]
    generator = torch.Generator(runner.device).manual_seed(seed)
    is_wrong = torch.rand((FATES, rows), generator=generator, device=runner.device) >= acceptance
    fates = itertools.cycle((is_wrong.int() + SAID).unbind())

    def known(step: Plan, place: int) -> Tensor:
        drawn = draw(step, place)
        return next(fates)[: drawn.numel()]

    runner.proposer.draw = known  # type: ignore[method-assign]
    try:
        yield
    finally:
        runner.proposer.draw = draw  # type: ignore[method-assign]


def add(measured: Measured, summary: Summary, before: dict[str, float], after: dict[str, float]) -> None:
    """Takes in one run, and what the core counted meanwhile."""
    measured.runs.append(summary)
    measured.steps += after["steps"] - before["steps"]
    measured.drafts += after["spec_decode_num_drafts"] - before["spec_decode_num_drafts"]
    measured.draft_tokens += after["spec_decode_num_draft_tokens"] - before["spec_decode_num_draft_tokens"]
    measured.accepted += after["spec_decode_num_accepted_tokens"] - before["spec_decode_num_accepted_tokens"]


def figures(one: Measured, off: Measured) -> dict[str, Any]:
    """Rates, acceptance, and how long a step took; None where there were no drafts."""
    ratios = [
        run.output_tokens_per_second / plain.output_tokens_per_second
        for run, plain in zip(one.runs, off.runs, strict=True)
    ]
    tokens = sum(run.output_tokens for run in one.runs)
    return {
        "tokens_per_second": statistics.median(run.output_tokens_per_second for run in one.runs),
        "speed_up": statistics.median(ratios),
        "acceptance": one.accepted / one.draft_tokens if one.draft_tokens else None,
        "accepted_per_draft": one.accepted / one.drafts if one.drafts else None,
        "tokens_per_step": tokens / one.steps,
        "step_ms": statistics.median((run.step_p50 or 0.0) * 1e3 for run in one.runs),
    }


def picture(times: StepTimes, plain: StepTimes) -> dict[str, Any]:
    """What speculative decoding is drawn as: medians of a step's drafting, of its verification, and of a
    step without drafts, in milliseconds; None where there was none.
    """

    def median_ms(seconds: Sequence[float]) -> float | None:
        return statistics.median(seconds) * 1e3 if seconds else None

    return {
        "draft_ms": median_ms(times.drafting),
        "verify_ms": median_ms(times.verifying),
        "plain_ms": median_ms(plain.plain),
    }


def text_items(text: str, engine: Any, streams: int, turn: int, options: argparse.Namespace) -> list[Item]:
    """Prompts of about `--input-len` tokens, another part of the text for each answer and turn: what was
    answered before is no help. Answers have half to one and a half times `--output-len` tokens.
    """
    vocab_size, tokenizer = engine.runner.vocab_size, engine.parts.tokenizer
    rng = random.Random(f"{text}/{options.workload_seed}/{turn}")
    if text == "random" or tokenizer is None:
        ids = [rng.randrange(10, vocab_size - 10) for _ in range(options.input_len * (1 + streams * ANSWERS))]
    else:
        ids = tokenizer.encode_text(source(text)).token_ids
    items = []
    for _ in range(streams * ANSWERS):
        start = rng.randrange(max(1, len(ids) - options.input_len))
        prompt = ids[start : start + options.input_len]
        if text == "copy":  # it is asked for again: half of it stands there twice already
            prompt = prompt[: options.input_len // 2] * 2
        items.append((prompt, round(options.output_len * rng.uniform(0.5, 1.5))))
    return items


def source(text: str) -> str:
    """What the prompts are cut from: this package's own code, or the prose that comes with it."""
    if text == "code":
        import octavo.config
        import octavo.options

        return inspect.getsource(octavo.options) + inspect.getsource(octavo.config)
    return (resources.files("octavo") / "texts" / "evaluation.txt").read_text(encoding="ascii")
