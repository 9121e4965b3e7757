"""`octavo bench` on a tiny random model: every command runs, counts its tokens right and says what it measured.

`octavo bench serve` is tested with the servers, in tests/server/test_load_client.py.
"""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from octavo import cli
from octavo.bench.workloads import NAMES, workload
from tests.conftest import find_shared

SHORT_SEED = "48"  # its first chats are short
ENGINE = ["--model", "tiny", "--load-format", "dummy", "--device", "cpu", "--dtype", "float32"]
ENGINE += ["--max-model-len", "1024", "--kv-cache-memory", "8MiB"]


def bench(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert cli.main(["bench", *words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["bench"] == words[0]
    rows: list[dict[str, Any]] = printed["rows"]
    return rows


def test_latency(capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench(capsys, "latency", "--workload", "prefill40", "prefill300", "--repeat", "3", *ENGINE)
    assert [row["workload"] for row in rows] == ["prefill40", "prefill300"]
    for row, length in zip(rows, (40, 300), strict=True):
        assert (row["requests"], row["output_tokens"]) == (1, 1)
        assert 0 < row["fastest"] <= row["seconds"] <= row["slowest"]
        assert row["ttft_mean"] == row["latency_mean"] == row["latency_p99"] <= row["seconds"]
        assert row["total_tokens_per_second"] == pytest.approx((length + 1) / row["seconds"])
        assert (row["model"], row["dtype"]) == ("tiny", "float32") and row["device"].startswith("cpu") and row["torch"]


def test_throughput(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--workload", "chat", "--num", "3", "--workload-seed", SHORT_SEED, "--rate", "20"]
    (row,) = bench(capsys, "throughput", *words, *ENGINE)
    items = workload("chat", 512, int(SHORT_SEED))[:3]
    assert row["requests"] == 3 and row["output_tokens"] == sum(length for _, length in items)
    tokens = row["output_tokens"] + sum(len(prompt) for prompt, _ in items)
    assert row["total_tokens_per_second"] == pytest.approx(tokens / row["seconds"])
    assert row["ttft_mean"] < row["latency_mean"] <= row["latency_p99"] < row["seconds"]  # they do not arrive at once
    assert row["steps"] >= max(length for _, length in items) and 0 < row["tpot_mean"] < row["latency_p99"]


def test_batching(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--num", "6", "--input-len", "4", "--output-len", "24", "--max-num-seqs", "3"]
    rows = bench(capsys, "batching", *words, *ENGINE)
    assert [row["batching"] for row in rows] == ["none", "static", "continuous"]
    assert len({row["output_tokens"] for row in rows}) == 1 and all(row["requests"] == 6 for row in rows)
    none, static, continuous = (row["steps"] for row in rows)
    assert none > static > continuous  # of the same tokens
    assert rows[0]["throughput_ratio"] == 1.0


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    mha, gqa, windowed = bench(capsys, "memory", "--kv-gib", "2", "--max-model-len", "2048")
    # Keys and values of 32 layers, 128 elements a head, two bytes each.
    assert [row["bytes_per_token"] for row in (mha, gqa, windowed)] == [
        2 * 32 * 128 * 2 * heads for heads in (32, 8, 8)
    ]
    assert [row["reserved"] for row in (mha, gqa, windowed)] == [2, 8, 8]
    assert mha["paged_peak"] > 4 * mha["reserved"] and mha["ratio"] == mha["paged_peak"] / mha["reserved"]
    assert 3 * mha["paged_peak"] < gqa["paged_peak"] < windowed["paged_peak"]
    assert all(row["paged_mean"] <= row["paged_peak"] for row in (mha, gqa, windowed))


def test_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "memory", "--kv-gib", "2"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["case", "bytes_per_token", "reserved"] and len(lines) == 3


def test_an_unknown_workload_is_named() -> None:
    with pytest.raises(ValueError, match="workload: 'decode' is not one of"):
        workload("decode")


@pytest.mark.parametrize("name", [*NAMES, "decode3", "prefill17"])
def test_workloads_are_those_of_the_other_engines(name: str) -> None:
    spec = importlib.util.spec_from_file_location("shared_workloads", find_shared() / "workloads.py")
    assert spec is not None and spec.loader is not None
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    for vocab_size, seed in ((32000, 0), (128256, 7)):
        assert workload(name, vocab_size, seed) == shared.workload(name, vocab_size, seed)
