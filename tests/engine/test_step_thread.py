"""Who runs the steps of callers that wait: one thread for all of them, in the process that loaded
the model.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from octavo import LLM, SamplingParams, cli
from octavo.engine.engine import Engine
from tests.conftest import REPOSITORY

TINY = {"model": "tiny", "load_format": "dummy", "dtype": "float32", "device": "cpu", "max_model_len": 128}
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
ENGINE = ["--model", "tiny", "--load-format", "dummy", "--device", "cpu", "--dtype", "float32"]


def prompt(number: int) -> Any:
    return {"prompt_token_ids": [10 + number, 40, 41 + number]}


def tokens(llm: LLM, number: int) -> list[int]:
    return llm.generate(prompt(number), GREEDY, use_tqdm=False)[0].outputs[0].token_ids


def test_calls_of_many_threads() -> None:
    with LLM(**TINY) as llm:
        expected = [tokens(llm, number) for number in range(4)]
        with ThreadPoolExecutor(4) as callers:
            got = list(callers.map(lambda number: tokens(llm, number % 4), range(48)))
        assert got == [expected[number % 4] for number in range(48)]


def test_a_call_behind_another_is_closed_in_order() -> None:
    """`close` waits for what runs, and what comes behind it is told."""
    llm = LLM(**TINY)
    expected = tokens(llm, 0)
    with ThreadPoolExecutor(2) as callers:
        running = [callers.submit(tokens, llm, 0) for _ in range(2)]
        while not llm._engine.core.has_unfinished() and not all(job.done() for job in running):
            time.sleep(0.001)
        llm.close()
    for job in running:
        error = job.exception()
        assert job.result() == expected if error is None else "has been closed" in str(error)
    assert running[0].exception() is None


@pytest.mark.parametrize(
    "use",
    [
        lambda: LLM(**TINY).generate(prompt(0), GREEDY, use_tqdm=False),
        lambda: cli.main(["bench", "latency", "--workload", "prefill4", *ENGINE]),
        lambda: cli.main(["bench", "throughput", "--workload", "prefill4", *ENGINE]),
        lambda: cli.main(["bench", "batching", "--num", "2", "--output-len", "2", *ENGINE]),
    ],
)
def test_steps_have_a_thread_of_their_own(
    use: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the thread that loaded the model: torch's workers spin longer for that one."""
    threads: set[threading.Thread] = set()
    turn = Engine._turn

    def watched(engine: Engine) -> bool:
        threads.add(threading.current_thread())
        return turn(engine)

    monkeypatch.setattr(Engine, "_turn", watched)
    use()
    capsys.readouterr()
    assert threads and threading.main_thread() not in threads


def test_ctrl_c_ends_a_call_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(**TINY) as llm:
        expected = tokens(llm, 1)
        launch, count = llm._engine.runner.launch_forward, 0

        def interrupting(step: Any) -> None:
            nonlocal count
            count += 1
            if count == 3:
                os.kill(os.getpid(), signal.SIGINT)
            launch(step)

        with monkeypatch.context() as patched:
            patched.setattr(llm._engine.runner, "launch_forward", interrupting)
            with pytest.raises(KeyboardInterrupt):
                tokens(llm, 0)
        assert 3 <= count < 12
        stats = llm.core.stats()
        assert (stats["num_requests_running"], stats["kv_blocks_used"], stats["steps_in_flight"]) == (0, 0, 0)
        assert tokens(llm, 1) == expected


FORKED = """
import os, sys
from octavo import LLM, AsyncEngine, EngineConfig
OPTIONS = dict(model="tiny", load_format="dummy", dtype="float32", device="cpu", max_model_len=128)
PROMPT = {"prompt_token_ids": [1, 2]}
llm = LLM(**OPTIONS)
llm.generate(PROMPT, use_tqdm=False)
engine = AsyncEngine.from_config(EngineConfig(**OPTIONS))

async def stream():
    async for _ in engine.generate(PROMPT):
        pass

if os.fork() == 0:
    import asyncio
    for use in (
        lambda: llm.generate(PROMPT, use_tqdm=False),
        lambda: llm.chat([{"role": "user", "content": "Hi"}]),
        lambda: asyncio.run(stream()),
        lambda: LLM(**OPTIONS),
        lambda: AsyncEngine.from_config(EngineConfig(**OPTIONS)),
    ):
        try:
            use()
        except RuntimeError as error:
            print("spawn" in str(error), "forked" in str(error), flush=True)
    llm.close()
    engine.shutdown()
    sys.exit(0)
print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
llm.generate(PROMPT, use_tqdm=False)
engine.shutdown()
llm.close()
"""


def test_a_forked_process_is_told_to_spawn() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "python")},
    )
    assert done.stdout.splitlines() == ["True True"] * 5 + ["0"], done.stderr
