"""`octavo bench serve` against a server whose answers are scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from octavo import cli
from octavo.server.config import ServerConfig
from tests.server.conftest import Served, serving
from tests.server.scripted_engine import ScriptedEngine


@pytest.fixture
async def served_with_a_key() -> AsyncIterator[Served]:
    async for one in serving(ScriptedEngine(), ServerConfig(api_key=("secret",))):
        yield one


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
    unknown = {name for name, value in row.items() if value is None}
    assert unknown >= {"output_tokens_per_second", "ttft_p50_ms", "tpot_p99_ms", "itl_p50_ms"}


async def test_the_model_is_found_and_the_key_is_sent(
    served_with_a_key: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    code, row = await measure(served_with_a_key, capsys, "--api-key", "secret")
    assert (code, row["failed"], row["model"]) == (0, 0, "org/tiny")
    url = served_with_a_key.url + "/v1/"  # as OpenAI's clients are given it
    words = ["bench", "serve", "--url", url, "--num", "2", "--vocab-size", "256"]
    assert await asyncio.to_thread(cli.main, [*words, "--api-key", "wrong"]) == 2
    assert "/v1/models names no model (ValueError: HTTP 401" in capsys.readouterr().err
    # With the model named there is nothing to ask before; a table for people has dashes.
    assert await asyncio.to_thread(cli.main, [*words, "--model", "org/tiny"]) == 1
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (lines["failed"], lines["output_tokens_per_second"], lines["ttft_p99_ms"]) == ("2", "-", "-")
    assert "HTTP 401" in lines["first_error"]


async def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "serve", "--url", "http://127.0.0.1:9"]
    assert await asyncio.to_thread(cli.main, words) == 2
    error = capsys.readouterr().err
    assert "http://127.0.0.1:9/v1/models names no model" in error and "check --url" in error and error.count("\n") == 1
