"""What fewer bits a weight bring: memory, decode speed and quality of the same model in 16, 8 and 4
bits, beside what the guide expects.

A decode step must read every weight once, and the keys and values of each stream: bytes bound how
much faster fewer bits can be, and each cell that falls short says how far they would have let it go.
Quality is the perplexity in 16 bits as a share of the perplexity in few.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from octavo.bench.engine import step_thread
from octavo.bench.progress import progress
from octavo.bench.replay import replay
from octavo.bench.workloads import Item, workload
from octavo.config import EngineConfig
from octavo.evaluate.commands import WINDOW
from octavo.evaluate.measure import Reader, measure, tokens_of, windows
from octavo.model_config import read_json
from octavo.models.presets import PRESETS
from octavo.models.registry import config_from_dict
from octavo.quantize.formats import config_of
from octavo.quantize.layer import WatchedSchemes
from octavo.quantize.options import Options
from octavo.quantize.run import quantize
from octavo.quantize.shapes import pick_group, projections
from octavo.texts import EVALUATION, read_text
from octavo.weights.load import resolve

STREAMS = (1, 32)


@dataclasses.dataclass(frozen=True)
class Precision:
    """How a model is held, and how many times as fast as in 16 bits the guide has it decode."""

    name: str
    quantization: str | None = None  # while loading
    method: str | None = None  # of a checkpoint, in the method's own format
    expected: tuple[float, float] | None = None
    quality: float | None = None


PRECISIONS = (
    Precision("16 bits"),
    Precision("INT8", quantization="int8", expected=(1.5, 2.0), quality=0.99),
    Precision("INT4 GPTQ", method="gptq", expected=(2.0, 3.0), quality=0.97),
    Precision("INT4 AWQ", method="awq", expected=(2.0, 3.0), quality=0.98),
    Precision("FP8", quantization="fp8"),
)


def precision_rows(options: Any, config: EngineConfig) -> list[dict[str, Any]]:
    """One row a precision. options: `output_len`, `repeat`, `num_samples`, `checkpoints`,
    `quality_tokens`, `workload_seed`. Of dummy weights quality says nothing, and is not measured.
    """
    rows: list[dict[str, Any]] = []
    with _folder(options.checkpoints) as folder:
        configs = [_config_of(precision, config, folder, options) for precision in PRECISIONS]
        for precision, one in zip(PRECISIONS, configs, strict=True):
            rows.append(_measure(precision, one, rows[0] if rows else None, options))
            if len(rows) > 1 and config.load_format != "dummy":
                rows[-1] |= _quality(precision, one, configs[0], options.quality_tokens)
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _quality(precision: Precision, config: EngineConfig, plain: EngineConfig, num_tokens: int) -> dict[str, Any]:
    """Beside the same model in 16 bits, on the prose that ships."""
    text = read_text(EVALUATION, "text")
    readers = [Reader(plain, WINDOW)]
    try:
        readers.append(Reader(config, WINDOW))
        prefix, tokens = tokens_of(readers[0], text)
        pieces = list(windows(prefix, tokens[:num_tokens], WINDOW))
        steps = progress(f"{precision.name}, quality", len(pieces), measure(readers[1], readers[0], iter(pieces)))
        ((quality, others),) = deque(steps, maxlen=1)
    finally:
        for reader in readers:
            reader.close()
    share = others.perplexity / quality.perplexity
    holds = None
    if precision.quality is not None:
        holds = "holds" if share >= precision.quality else f"no: {share:.1%} of {precision.quality:.0%}"
    return {
        "perplexity": quality.perplexity,
        "quality": share,
        "agreement": quality.agreement,
        "divergence": quality.mean_divergence,
        "says_quality": holds,
    }


def _measure(precision: Precision, config: EngineConfig, plain: dict[str, Any] | None, options: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"precision": precision.name}
    with step_thread(config) as thread:
        report, model = thread.engine.parts.report, thread.engine.runner.model
        kv_bytes = len(model.kv_groups) * report.kv_bytes // report.num_blocks // report.block_size
        row |= {"weights_gib": report.weight_bytes / 2**30, "dtype": report.dtype, "device": report.device}
        row["bytes_a_weight"] = report.weight_bytes / model.config.num_parameters()
        for streams in STREAMS:
            items = _items(streams, options.output_len, thread.engine.runner.vocab_size, options.workload_seed)
            rate = _rate(thread, items, f"{precision.name}, {streams}", options.repeat)
            tokens = len(items[0][0]) + options.output_len // 2
            read = read_bytes(model) + streams * tokens * kv_bytes
            row |= {f"tok_s_{streams}": rate, f"read_gib_{streams}": read / 2**30}
            if plain is None:
                row |= {f"ratio_{streams}": 1.0, f"bound_{streams}": 1.0, f"says_{streams}": None}
                continue
            ratio, bound = rate / plain[f"tok_s_{streams}"], plain[f"read_gib_{streams}"] / row[f"read_gib_{streams}"]
            said = verdict(ratio, bound, precision.expected)
            row |= {f"ratio_{streams}": ratio, f"bound_{streams}": bound, f"says_{streams}": said}
    return row


def verdict(ratio: float, bound: float, expected: tuple[float, float] | None) -> str | None:
    """Whether a speed is what the guide expects, and if not what bounds it. bound: the ratio of the
    bytes that a step must read.
    """
    if expected is None:
        return None
    if ratio >= expected[0]:
        return "holds"
    if bound < expected[0]:
        return f"no: bytes allow {bound:.2f}x"
    return f"no: {ratio / bound:.0%} of the {bound:.2f}x that bytes allow"


def read_bytes(model: Any) -> int:
    """Of the weights, in a step of few tokens: all but a table that is only looked up."""
    read = sum(layer.own_bytes() for layer in model.layers() if layer is not model.embedding)
    shares_table = model.config.tie_word_embeddings and model.head.own_bytes() == 0
    return int(read + (model.embedding.own_bytes() if shares_table else 0))


def _items(streams: int, output_len: int, vocab_size: int, seed: int) -> list[Item]:
    return [(prompt, output_len) for prompt, _ in workload(f"decode{streams}", vocab_size, seed)]


def _rate(thread: Any, items: list[Item], name: str, repeat: int) -> float:
    """Tokens a second, the best of some runs after a warm-up; on a CPU a second of the processors,
    which neighbours on the machine do not lengthen.
    """
    on_cpu = thread.engine.runner.device.type == "cpu"
    rates: list[float] = []
    with progress(name, (1 + repeat) * len(items)) as bar:
        run = functools.partial(replay, thread.engine, items, finished=bar.update)
        for _ in range(1 + repeat):
            before = time.process_time()
            summary = thread.run(run)
            used = time.process_time() - before if on_cpu else summary.seconds
            rates.append(summary.output_tokens / used)
    return max(rates[1:])


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """Where checkpoints are made: a folder that keeps them, or one that goes."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="octavo-precision-") as folder:
        yield Path(folder)


def _config_of(precision: Precision, config: EngineConfig, folder: Path, options: Any) -> EngineConfig:
    if precision.method is None:
        in_file = resolve(config.model, config.load_format)
        # A quantised GGUF file would stay in its blocks on a CPU: a type that is asked for expands it.
        as_blocks = config.dtype == "auto" and in_file is not None and in_file.suffix == ".gguf"
        dtype = "bfloat16" if as_blocks else config.dtype
        return dataclasses.replace(config, quantization=precision.quantization, dtype=dtype)
    place = folder / precision.method
    if config.load_format == "dummy":
        _write_shape(place, precision.method, config)
    elif not (place / "config.json").exists():
        wanted = Options(
            model=config.model,
            method=precision.method,
            output=place,
            format=precision.method,
            num_samples=options.num_samples,
            device=config.device,
        )
        with redirect_stdout(sys.stderr):  # the table's, or the JSON's
            quantize(wanted)
    load_format = "dummy" if config.load_format == "dummy" else "auto"  # what is made is no GGUF file
    return dataclasses.replace(config, model=str(place), load_format=load_format)


def _write_shape(place: Path, method: str, config: EngineConfig) -> None:
    """A config alone, of which dummy weights are made in the method's format."""
    import torch

    folder = resolve(config.model, "dummy")
    values = PRESETS[config.model] if folder is None else read_json(folder / "config.json")
    wanted = Options(model=config.model, method=method, output=place, format=method)
    schemes = WatchedSchemes(torch.bfloat16, torch.device("cpu"))
    group = pick_group(wanted, projections(config_from_dict(values, config.model), schemes))
    place.mkdir(exist_ok=True)
    full = {**values, "quantization_config": config_of(wanted, group, sees=False)}
    (place / "config.json").write_text(json.dumps(full))
