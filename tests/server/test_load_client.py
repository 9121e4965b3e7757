"""`octavo bench serve` against a server whose answers are scripted."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from octavo import cli
from tests.server.conftest import Served


async def measure(served: Served, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """Exit code and figures of the command, run as a user does but for the process."""
    options = ["--url", served.url, "--vocab-size", "256", "--num", "12", "--input-len", "20", "--output-len", "6"]
    code = await asyncio.to_thread(cli.main, ["bench", "serve", *options, "--json", *words])
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    return code, row


async def test_every_stream_is_counted(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    served.engine.script.step_delay = 0.01
    code, row = await measure(served, capsys, "--model", "org/tiny", "--concurrency", "4")
    assert (code, row["failed"], row["first_error"]) == (0, 0, None)
    assert (row["requests"], row["concurrency"]) == (12, 4)
    assert row["output_tokens_per_second"] == pytest.approx(12 * 6 / row["seconds"])
    # A step takes 10 ms and more, so three rounds of six tokens take 180.
    assert row["seconds"] > 0.18
    assert row["ttft_p50_ms"] > 10 and row["tpot_p50_ms"] > 9 and row["ttft_p50_ms"] <= row["ttft_p99_ms"]
    assert await served.metric("vllm:request_success_total") == 12


@pytest.mark.parametrize(("model", "named"), [("another", "HTTP 404"), ("org/tiny", "error")])
async def test_failures_are_counted_and_end_with_1(
    served: Served, capsys: pytest.CaptureFixture[str], model: str, named: str
) -> None:
    served.engine.script.fail_after = 3
    code, row = await measure(served, capsys, "--model", model)
    assert (code, row["failed"]) == (1, 12) and named in row["first_error"]
    assert row["output_tokens_per_second"] == 0
