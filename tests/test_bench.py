"""`octavo bench` on a tiny random model: every command runs, counts its tokens right and says what
it measured.

`octavo bench serve` is tested with the servers, in tests/server/test_load_client.py.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from octavo import cli
from octavo.bench import commands
from octavo.bench.precision import verdict
from octavo.bench.replay import replay
from octavo.bench.workloads import NAMES, workload
from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from tests.conftest import find_shared
from tests.quantize.checkpoints import small_model

SHORT_SEED = "48"  # its first chats are short
ENGINE = ["--model", "tiny", "--load-format", "dummy", "--device", "cpu", "--dtype", "float32"]
ENGINE += ["--max-model-len", "1024", "--kv-cache-memory", "8MiB"]


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The progress bars that are made."""
    import tqdm

    made: list[Any] = []

    class Recorded(tqdm.tqdm):  # type: ignore[misc,type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": False})
            made.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Recorded)
    return made


def bench(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert cli.main(["bench", *words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bench"] == words[0]
    rows: list[dict[str, Any]] = printed["rows"]
    return rows


def test_latency(capsys: pytest.CaptureFixture[str], bars: list[Any]) -> None:
    rows = bench(capsys, "latency", "--workload", "prefill40", "prefill300", "--repeat", "3", *ENGINE)
    assert [row["workload"] for row in rows] == ["prefill40", "prefill300"]
    for row, length in zip(rows, (40, 300), strict=True):
        assert (row["requests"], row["output_tokens"]) == (1, 1)
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["ttft_mean"] == row["latency_mean"] == row["latency_p99"] <= row["seconds"]
        assert row["total_tokens_per_second"] == pytest.approx((length + 1) / row["seconds"])
        assert row["tpot_mean"] is None  # of one token there is no time between two
        assert (row["model"], row["dtype"]) == ("tiny", "float32") and row["device"].startswith("cpu") and row["torch"]
    assert [(bar.desc, bar.n, bar.total) for bar in bars] == [("prefill40", 4, 4), ("prefill300", 4, 4)]


def test_throughput(capsys: pytest.CaptureFixture[str], bars: list[Any]) -> None:
    words = ["--workload", "chat", "--num", "3", "--workload-seed", SHORT_SEED, "--rate", "20"]
    (row,) = bench(capsys, "throughput", *words, *ENGINE)
    items = workload("chat", 512, int(SHORT_SEED))[:3]
    assert row["requests"] == 3 and row["output_tokens"] == sum(length for _, length in items)
    tokens = row["output_tokens"] + sum(len(prompt) for prompt, _ in items)
    assert row["total_tokens_per_second"] == pytest.approx(tokens / row["seconds"])
    assert row["ttft_mean"] < row["latency_mean"] <= row["latency_p99"] < row["seconds"]  # they do not arrive at once
    assert row["steps"] >= max(length for _, length in items) and 0 < row["tpot_mean"] < row["latency_p99"]
    assert [(bar.desc, bar.n, bar.total) for bar in bars] == [("chat", 3, 3)]


def test_batching(capsys: pytest.CaptureFixture[str], bars: list[Any]) -> None:
    words = ["--num", "6", "--input-len", "4", "--output-len", "24", "--max-num-seqs", "3"]
    rows = bench(capsys, "batching", *words, *ENGINE)
    assert [row["batching"] for row in rows] == ["none", "static", "continuous"]
    assert len({row["output_tokens"] for row in rows}) == 1 and all(row["requests"] == 6 for row in rows)
    none, static, continuous = (row["steps"] for row in rows)
    assert none > static > continuous  # of the same tokens
    assert rows[0]["throughput_ratio"] == 1.0
    assert [(bar.desc, bar.n, bar.total) for bar in bars] == [(name, 6, 6) for name in ("none", "static", "continuous")]


def test_precision(capsys: pytest.CaptureFixture[str]) -> None:
    """Of dummy weights: what each precision holds and must read, in bytes that are counted here."""
    words = ["--output-len", "4", *ENGINE]
    rows = bench(capsys, "precision", *words)
    assert [row["precision"] for row in rows] == ["16 bits", "INT8", "INT4 GPTQ", "INT4 AWQ", "FP8"]
    matrices = 2 * (64 * (64 + 64) + 64 * 2 * 32 + 3 * 64 * 192)
    plain = rows[0]
    assert plain["bytes_a_weight"] == pytest.approx(4.0, rel=0.5)  # float32, and what a CPU keeps twice
    kv = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, components, bytes
    for streams in (1, 32):
        read = plain[f"read_gib_{streams}"] * 2**30 - streams * (128 + 2) * kv
        assert read == pytest.approx(4 * (matrices + 512 * 64 + 5 * 64))  # with the table as the head, and norms
        for row in rows:
            assert row[f"tok_s_{streams}"] > 0
            assert row[f"ratio_{streams}"] == pytest.approx(row[f"tok_s_{streams}"] / plain[f"tok_s_{streams}"])
            assert (row[f"says_{streams}"] is None) == (row["precision"] in ("16 bits", "FP8"))


def test_precision_of_real_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checkpoints are made, kept and used again, and quality is that of `octavo evaluate`."""
    small_model("llama-gqa-tied", tmp_path / "plain", max_position_embeddings=1024)
    words = ["--model", str(tmp_path / "plain"), "--device", "cpu", "--kv-cache-memory", "8MiB", "--output-len", "2"]
    sizes = ["--num-samples", "2", "--quality-tokens", "200", "--checkpoints", str(tmp_path / "made")]
    rows = bench(capsys, "precision", *words, *sizes)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "made").glob("*/config.json")}
    assert {path.parent.name for path in made} == {"gptq", "awq"}
    for row in rows[1:]:
        assert row["quality"] > 0.0 and 0.0 < row["agreement"] <= 1.0
        assert (row["says_quality"] is None) == (row["precision"] == "FP8")
    assert rows[0]["quality"] is None and rows[1]["divergence"] < rows[2]["divergence"]
    assert bench(capsys, "precision", *words, *sizes)[2]["perplexity"] == rows[2]["perplexity"]
    assert all(path.stat().st_mtime_ns == at for path, at in made.items())
    path = str(tmp_path / "made" / "awq")
    asked = ["evaluate", path, "--against", str(tmp_path / "plain"), "--num-tokens", "200", "--device", "cpu", "--json"]
    assert cli.main(asked) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["perplexity"] == pytest.approx(rows[3]["perplexity"], rel=1e-6)
    assert evaluated["perplexity_against"] / evaluated["perplexity"] == pytest.approx(rows[3]["quality"], rel=1e-6)


@pytest.mark.parametrize(
    ("ratio", "bound", "said"),
    [(1.5, 1.2, "holds"), (1.4, 1.3, "no: bytes allow 1.30x"), (1.2, 2.0, "no: 60% of the 2.00x that bytes allow")],
)
def test_what_a_precision_says(ratio: float, bound: float, said: str) -> None:
    assert verdict(ratio, bound, (1.5, 2.0)) == said
    assert verdict(ratio, bound, None) is None


def test_streams_ask_again_when_they_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(
        model="tiny", load_format="dummy", device="cpu", dtype="float32", max_model_len=64, kv_cache_memory=4 << 20
    )
    engine = Engine.from_config(config)
    there: list[float] = []

    def stepped() -> None:
        stats = engine.core.stats()
        there.append(stats["num_requests_running"] + stats["num_requests_waiting"])

    # A clock that counts steps, from one on.
    monkeypatch.setattr("octavo.bench.replay.time", SimpleNamespace(monotonic=lambda: 1.0 + len(there)))
    lengths = [3, 9, 5, 4, 8, 6, 20]
    summary = replay(engine, [([1, 2, 3], length) for length in lengths], at_once=3, stepped=stepped)
    assert max(there) == 3 and summary.requests == 7 and summary.output_tokens == sum(lengths)
    # The last, of 20 tokens, begins beside two others and ends alone, which is not in the rate.
    assert summary.output_tokens / summary.seconds < 2 < summary.output_tokens_per_second <= 3
    engine.close()


def test_speculative(capsys: pytest.CaptureFixture[str]) -> None:
    """With the acceptance set, what it was set to is what is found."""
    words = ["--text", "random", "--streams", "2", "--repeat", "2", "--input-len", "20", "--output-len", "24"]
    words += ["--method", "draft_model", "self", "--acceptance", "0.5", "1"]
    speculation = {"method": "draft_model", "model": "tiny", "num_speculative_tokens": 1, "adaptive": False}
    rows = bench(capsys, "speculative", *words, *ENGINE, "--speculative-config", json.dumps(speculation))
    assert [row["method"] for row in rows] == ["off", "draft_model", "self"] * 2
    for row in rows:
        if row["method"] == "off":
            assert row["acceptance"] is row["draft_ms"] is row["verify_ms"] is None and row["speed_up"] == 1
            continue
        assert row["acceptance"] == pytest.approx(row["acceptance_set_to"], abs=0.15)
        assert row["draft_ms"] > 0 and row["verify_ms"] > 0 and row["plain_ms"] > 0
        assert row["tokens_per_step"] > 2


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    mha, gqa, windowed, *pages = bench(capsys, "memory", "--kv-gib", "2", "--max-model-len", "2048")
    # Keys and values of 32 layers, 128 elements a head, two bytes each.
    assert [row["bytes_per_token"] for row in (mha, gqa, windowed)] == [
        2 * 32 * 128 * 2 * heads for heads in (32, 8, 8)
    ]
    assert [row["reserved"] for row in (mha, gqa, windowed)] == [2, 8, 8]
    assert mha["paged_peak"] > 4 * mha["reserved"] and mha["ratio"] == mha["paged_peak"] / mha["reserved"]
    assert 3 * mha["paged_peak"] < gqa["paged_peak"] < windowed["paged_peak"]
    assert all(row["paged_mean"] <= row["paged_peak"] for row in (mha, gqa, windowed))
    # Beside each head's codes 4 bytes of a scale.
    sizes = [2 * size for head in (128, 64) for size in (2 * head, head + 4, head + 4, head // 2 + 4)]
    assert [row["bytes_per_token"] for row in pages] == sizes
    ratios = [1, 1.94, 1.94, 3.76, 1, 1.88, 1.88, 3.56]
    assert [row["of_bfloat16"] for row in pages] == [pytest.approx(ratio, abs=0.006) for ratio in ratios]


def test_memory_that_holds_no_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "memory", "--kv-gib", "0.5"]) == 2
    said = "--kv-gib 0.5: one request of --max-model-len 2048 tokens needs 1.01 GiB of the 7B"
    assert said in capsys.readouterr().err


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "memory", "--kv-gib", "2"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["case", "bytes_per_token", "reserved"] and len(lines) == 11


def test_an_unknown_workload_is_named() -> None:
    with pytest.raises(ValueError, match="'decode' is not one of"):
        workload("decode")


def test_what_is_not_known_is_a_dash() -> None:
    assert commands.table([{"failed": 3, "seconds": None}]).splitlines() == ["failed   3", "seconds  -"]
    assert commands.table([{"a": 1, "b": None}, {"a": None, "b": 0.0}]).splitlines()[1:] == ["1  -", "-  0"]


def test_a_bar_is_drawn_on_a_terminal_and_nothing_is_left_of_it() -> None:
    screen, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    done = subprocess.run(
        [sys.executable, "-m", "octavo", "bench", "memory", "--kv-gib", "1.01", "--json"],
        stdout=subprocess.PIPE,
        stderr=side,
        check=True,
        timeout=120,
    )
    os.set_blocking(screen, False)
    drawn = os.read(screen, 65536).decode()
    os.close(screen)
    os.close(side)
    assert "memory:" in drawn and "0/11" in drawn and "\n" not in drawn and drawn.endswith("\r")
    assert len(json.loads(done.stdout)["rows"]) == 11


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("throughput --workload nonsense", "argument --workload: 'nonsense' is not one of decode1"),
        ("throughput --workload chat unifrom", "'unifrom' is not one of"),
        ("latency --workload decode0", "'decode0' is not one of"),
        ("latency --workload prefill-3", "'prefill-3' is not one of"),
        ("latency --workload decode٣", "is not one of"),
        ("latency --repeat 0", "argument --repeat: 0 must be at least 1"),
        ("throughput --num 0", "argument --num: 0 must be at least 1"),
        ("throughput --num -5", "argument --num: -5 must be at least 1"),
        ("speculative --method ngrm", "argument --method: invalid choice: 'ngrm'"),
        ("speculative --method self --acceptance 1.5", "argument --acceptance: 1.5 must be at most 1"),
        ("throughput --rate nan", "argument --rate: nan must be at least 0"),
        ("throughput --rate=-1", "argument --rate: -1 must be at least 0"),
        ("batching --input-len 0", "argument --input-len: 0 must be at least 1"),
        ("batching --output-len many", "argument --output-len: 'many' is not a whole number"),
        ("memory --kv-gib inf", "argument --kv-gib: inf must be"),
        ("memory --max-model-len 0", "argument --max-model-len: 0 must be at least 1"),
        ("serve --concurrency 0", "argument --concurrency: 0 must be at least 1"),
        ("serve --vocab-size 20", "argument --vocab-size: 20 must be at least 21"),
        ("serve --url 127.0.0.1:8000", "must begin with http:// or https://"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(
    line: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "step_thread", lambda _: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", *line.split()])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"octavo bench {line.split()[0]}: error: " in error and said in error


@pytest.mark.parametrize("name", [*NAMES, "decode3", "prefill17"])
def test_workloads_are_those_of_the_other_engines(name: str) -> None:
    spec = importlib.util.spec_from_file_location("shared_workloads", find_shared() / "workloads.py")
    assert spec is not None and spec.loader is not None
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    for vocab_size, seed in ((32000, 0), (128256, 7)):
        assert workload(name, vocab_size, seed) == shared.workload(name, vocab_size, seed)
