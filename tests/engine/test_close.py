"""An engine that ends gives everything back: its threads, and the memory of model, KV cache and
buffers. So several may live in a process one after another.

What is watched: weak references to the objects that hold the memory, the threads, and the resident
memory of the process as the kernel counts it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, AsyncEngine, EngineConfig, SamplingParams, cli
from octavo._core import Failure, Prompt
from octavo.engine.engine import Engine
from octavo.errors import EngineDeadError

TINY = {"model": "tiny", "load_format": "dummy", "dtype": "float32", "device": "cpu", "max_model_len": 128}
PROMPT: Any = {"prompt_token_ids": [1, 2, 3]}
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


def holders(engine: Engine) -> dict[str, weakref.ref[Any]]:
    """Weak references to all that holds an engine's memory, from the first layer's weights to the
    plan's buffers.
    """
    runner = engine.runner
    attention = runner.model.decoder_layers[0].attention
    held = {
        "runner": runner,
        "model": runner.model,
        "weight": runner.model.embedding.weight,
        "KV tensor": runner.kv_caches[0],
        "rotary table": attention.cos_sin,
        "device state": runner.state,
        "inputs": runner.inputs,
        "block table": runner.state.block_tables[0],
        "graphs": runner.graphs,
        "plan buffer": engine.parts.buffers[0],
        "plan as the core sees it": engine.parts.buffers[1].plan_array,
        "result as the core sees it": engine.parts.buffers[0].result_array,
    }
    return {name: weakref.ref(thing) for name, thing in held.items()}


def still_held(references: dict[str, weakref.ref[Any]]) -> list[str]:
    gc.collect()
    return [name for name, reference in references.items() if reference() is not None]


def run_llm() -> tuple[object, dict[str, weakref.ref[Any]]]:
    llm = LLM(**TINY)
    llm.generate(PROMPT, SHORT, use_tqdm=False)
    references = holders(llm._engine)
    llm.close()
    return llm, references


def run_llm_in_with() -> tuple[object, dict[str, weakref.ref[Any]]]:
    with pytest.raises(ArithmeticError), LLM(**TINY) as llm:
        llm.generate(PROMPT, SHORT, use_tqdm=False)
        references = holders(llm._engine)
        raise ArithmeticError
    return llm, references


def run_async_engine() -> tuple[object, dict[str, weakref.ref[Any]]]:
    engine = AsyncEngine.from_config(EngineConfig(**TINY))
    references = holders(engine._engine)

    async def use() -> None:
        await engine._detached(lambda: None, engine._text_pool)
        async for _ in engine.generate(PROMPT, SHORT):
            pass

    asyncio.run(use())
    engine.shutdown()
    return engine, references


def run_engine_with_a_request_in_flight() -> tuple[object, dict[str, weakref.ref[Any]]]:
    engine = Engine.from_config(EngineConfig(**TINY))
    engine.core.add_call([Prompt([1, 2, 3])], SamplingParams(max_tokens=50).to_core(), now=0.0)
    engine._overlap = True  # a step stays in flight
    engine.step()
    references = holders(engine)
    engine.close()
    assert not engine.core.has_unfinished()
    return engine, references


@pytest.mark.parametrize("run", [run_llm, run_llm_in_with, run_async_engine, run_engine_with_a_request_in_flight])
def test_threads_and_memory_are_given_back(run: Callable[[], tuple[object, dict[str, weakref.ref[Any]]]]) -> None:
    before = set(threading.enumerate())
    closed, references = run()
    assert len(references) == 12
    assert still_held(references) == []
    for thread in set(threading.enumerate()) - before:
        if thread.name != "tqdm_monitor":  # one of a process, for all progress bars
            thread.join()  # it may have to return from its last work
    assert closed is not None  # whoever keeps the closed engine keeps none of that


def test_engines_one_after_another_do_not_add_up() -> None:
    """Each engine writes a KV pool of 24 MiB whole: five that stay would be 120 MiB."""
    resident = []
    for _ in range(5):
        with LLM(**TINY, kv_cache_memory=24 << 20) as llm:
            for cache in llm._engine.runner.kv_caches:
                cache.fill_(1.0)
            del cache
            llm.generate(PROMPT, SHORT, use_tqdm=False)
            during = resident_bytes()
        resident.append(resident_bytes())
        assert during - resident[-1] > 20 << 20  # the pool is what this measures
    assert max(resident[1:]) - resident[0] < 12 << 20


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_closed_llm_says_so() -> None:
    llm = LLM(**TINY)
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match=r"this LLM or engine has been closed, .*make a new one"):
        llm.generate(PROMPT, SHORT, use_tqdm=False)
    assert llm.core.stats()["num_requests_waiting"] == 0
    assert llm.get_default_sampling_params() == SamplingParams()  # what needs no model still answers


def test_a_shut_down_async_engine_says_so_and_ends_its_streams() -> None:
    engine = AsyncEngine.from_config(EngineConfig(**TINY))

    async def use() -> Failure | None:
        engine.attach_loop(asyncio.get_running_loop())
        stream = engine.submit([Prompt([1])], SamplingParams(max_tokens=127, ignore_eos=True).to_core())
        engine.shutdown()
        engine.shutdown()
        while not (delta := await stream.next()).finished:
            pass
        return delta.error

    error = asyncio.run(use())
    assert error is not None and error.code == "server_shutting_down"
    with pytest.raises(EngineDeadError, match="shut down"):
        engine.submit([Prompt([1])], SHORT.to_core())
    with pytest.raises(EngineDeadError, match="shut down"):
        asyncio.run(generate(engine))
    with pytest.raises(RuntimeError, match="closed"):
        engine._engine.step()


async def generate(engine: AsyncEngine) -> None:
    async for _ in engine.generate(PROMPT, SHORT):
        pass


def test_shutdown_ends_well_though_the_device_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncEngine.from_config(EngineConfig(**TINY))
    references = holders(engine._engine)
    asyncio.run(generate(engine))

    def lost(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Engine, "_wait_for_device", lost)
    engine.shutdown()
    assert still_held(references) == []


def test_one_engine_closes_while_another_runs() -> None:
    with LLM(**TINY) as other:
        greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        expected = other.generate(PROMPT, greedy, use_tqdm=False)[0].outputs[0].token_ids
        LLM(**TINY).close()
        assert other.generate(PROMPT, greedy, use_tqdm=False)[0].outputs[0].token_ids == expected


@pytest.mark.parametrize("command", ["latency", "throughput", "batching"])
def test_benchmarks_close_each_engine_before_the_next(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alive: list[weakref.ref[Any]] = []
    build = Engine.from_config

    def watched(config: EngineConfig) -> Engine:
        gc.collect()
        assert [reference for reference in alive if reference() is not None] == []
        engine = build(config)
        alive.append(weakref.ref(engine.runner))
        return engine

    monkeypatch.setattr(Engine, "from_config", watched)
    workload = ["--num", "2", "--output-len", "2"] if command == "batching" else ["--workload", "prefill4"]
    engine = ["--model", "tiny", "--load-format", "dummy", "--device", "cpu", "--dtype", "float32"]
    assert cli.main(["bench", command, *workload, *engine]) == 0
    capsys.readouterr()
    assert len(alive) == (3 if command == "batching" else 1)
    assert [reference for reference in alive if reference() is not None] == []


@pytest.mark.gpu
def test_device_memory_is_given_back() -> None:
    """Each engine takes most of the card, as by default: the second can only start in what the
    first gave back.
    """
    options = TINY | {"device": "cuda", "dtype": "bfloat16", "gpu_memory_utilization": 0.8}
    after = []
    for _ in range(3):
        with LLM(**options) as llm:
            llm.generate(PROMPT, SHORT, use_tqdm=False)
            references = holders(llm._engine)
            assert torch.cuda.memory_reserved() > torch.cuda.get_device_properties(0).total_memory // 2
        assert still_held(references) == []
        after.append(torch.cuda.memory_reserved())
    assert after[0] < 256 << 20  # work space of the libraries, which the next engine uses again
    assert after[2] <= after[1]
