"""How many requests fit into the same KV memory: pages against whole reservations, GQA against MHA,
windows against full attention; and how many tokens, in pages of fewer bits.

Requests are counted by the real scheduler and block pool over a workload with tokens made up on the
spot, without a model; tokens by the report of an engine that has started, of a model of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from octavo import _core
from octavo.bench.workloads import Item
from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.setup import StartupReport
from octavo.kernels.step.plan_format import Plan

BLOCK_SIZE = 16
TOKENS_BYTES = 64 << 20
"""KV memory of the engines whose tokens are counted: the ratios do not depend on it."""


@dataclass(frozen=True)
class CacheShape:
    """What decides the size of a token's keys and values."""

    layers: int
    kv_heads: int
    head_dim: int
    bytes_per_element: int = 2

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token, all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * self.bytes_per_element


def reserved_requests(kv_bytes: int, shape: CacheShape, max_model_len: int) -> int:
    """Requests that fit when each one reserves its longest possible cache in one piece."""
    return kv_bytes // (shape.bytes_per_token * max_model_len)


def paged_requests(
    kv_bytes: int,
    shape: CacheShape,
    items: list[Item],
    *,
    max_model_len: int,
    block_size: int = BLOCK_SIZE,
    windows: tuple[int, ...] = (0,),
) -> tuple[int, float]:
    """(largest number of requests that ran at once, mean number over the steps) as the real
    scheduler packs the workload.

    `windows` has one entry for each group of `layers / len(windows)` layers: 0 for full attention,
    else its window in tokens.
    """
    group_bytes = shape.bytes_per_token // len(windows) * block_size
    core = _core.EngineCore(
        num_blocks=kv_bytes // group_bytes,
        block_size=block_size,
        kv_windows=list(windows),
        max_num_seqs=len(items),
        max_num_batched_tokens=max(8192, len(items)),
        max_model_len=max_model_len,
        vocab_size=32000,
        max_waiting=len(items),
        enable_prefix_caching=False,
    )
    plan_buffer = np.zeros(core.plan_bytes, dtype=np.uint8)
    result_buffer = np.zeros(core.result_bytes, dtype=np.uint8)
    core.bind(0, plan_buffer, result_buffer)
    for prompt, length in items:
        params = _core.SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
        core.add_call([_core.Prompt(prompt)], params, now=0.0)
    running = []
    now = 0.0
    while core.schedule(0, now) is not None:
        plan = Plan.read(plan_buffer)
        running.append(int(core.stats()["num_requests_running"]))
        records = (
            result_buffer[: plan.padded_rows * plan.result_width * 4].view(np.int32).reshape(-1, plan.result_width)
        )
        records[:, :3] = (0, 1, 100)  # status ok, one valid token, its id
        now += 0.01
        core.commit(0, now)
        core.take_news()
    return max(running), sum(running) / len(running)


def started_with(kv_cache_dtype: str, head_dim: int) -> StartupReport:
    """What an engine on the CPU reports that keeps heads of `head_dim` (64 or 128) components as
    `kv_cache_dtype`.
    """
    config = EngineConfig(
        model=f"tiny-{head_dim}",
        load_format="dummy",
        dtype="bfloat16",
        device="cpu",
        block_size=BLOCK_SIZE,
        kv_cache_memory=TOKENS_BYTES,
        kv_cache_dtype=kv_cache_dtype,
    )
    engine = Engine.from_config(config)
    engine.close()
    return engine.parts.report
