"""`prepare` and `sample`, compiled for an H100 without one (`compile_sm90.py`)."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tests.kernels.compile_sm90 import TYPES, ints, meta, report
from tests.kernels.plan_bytes import PENALTIES, SAMPLE, Enter, Row, write_plan

from octavo.engine.step_buffers import DeviceState, StepInputs
from octavo.kernels.step import pool, prepare, prompt_logprobs, sample

META = torch.device("meta")


def prepare_case(query_len: int, num_groups: int, block_size: int) -> None:
    state = DeviceState(max_num_seqs=256, num_groups=num_groups, max_blocks=64, vocab_size=128256, device=META)
    inputs = StepInputs(max_tokens=8192, max_rows=256, num_groups=num_groups, device=META)
    enters = [Enter(0, penalty_tokens=[(1, 1)]), Enter(1)]
    rows = [Row(0, tokens=[1] * query_len)]
    plan, data = write_plan([Row(2), Row(3)], rows, enters=enters, blocks=[(0, 0, 0, 1), (0, 1, 0, 2)])
    prepare.prepare(plan, data.to(META), state, inputs, block_size=block_size)


def sample_case(vocab: int, dtype: torch.dtype, **plan_options: Any) -> None:
    state = DeviceState(max_num_seqs=256, num_groups=1, max_blocks=64, vocab_size=vocab, device=META)
    plan, data = write_plan([Row(slot, flags=SAMPLE | PENALTIES) for slot in range(32)], **plan_options)
    state.require_penalty_counts()
    logits, masks = meta(32, vocab, dtype=dtype), ints(8, -(-vocab // 32))
    inputs = StepInputs(max_tokens=32, max_rows=32, num_groups=1, device=META)
    sample.sample(logits, plan, data.to(META), state, inputs, ints(32 * plan.result_width), masks)


def prompt_case(vocab: int, dtype: torch.dtype) -> None:
    prompt_logprobs.prompt_logprobs(meta(128, vocab, dtype=dtype), ints(128, 2), vocab, 20, ints(128, 42))


def pool_case(size: int, dtype: torch.dtype, last_tokens_from: int | None) -> None:
    hidden, sums, vectors = meta(512, size, dtype=dtype), meta(257, size, dtype=torch.float32), ints(4, size)
    pool.pool(hidden, ints(8, 7), sums, vectors.view(torch.float32), last_tokens_from=last_tokens_from)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for query_len, groups, block_size in itertools.product((1, 512), (1, 2), (16, 64)):
        name = f"prepare query {query_len} groups {groups} page {block_size}"
        yield name, lambda n=query_len, g=groups, b=block_size: prepare_case(n, g, b)
    for size, dtype, last in itertools.product((576, 4096), (torch.float32, torch.float16, torch.bfloat16), (None, 3)):
        name = f"pool {TYPES[dtype]} {size}{' of last tokens' * (last is not None)}"
        yield name, lambda s=size, t=dtype, f=last: pool_case(s, t, f)
    sizes = [(49152, torch.float32), (128256, torch.float32), (128256, torch.bfloat16), (262144, torch.float32)]
    for vocab, dtype in sizes:
        for all_greedy, top in itertools.product((True, False), (-1, 20)):
            name = f"sample {TYPES[dtype]} {vocab}{' greedy' * all_greedy}{' logprobs' * (top > 0)}"
            options = {"all_greedy": all_greedy, "max_logprobs": top}
            yield name, lambda v=vocab, t=dtype, o=options: sample_case(v, t, **o)
        yield f"prompt_logprobs {TYPES[dtype]} {vocab}", lambda v=vocab, t=dtype: prompt_case(v, t)


def main() -> None:
    report(cases(), launches_a_case=None)


if __name__ == "__main__":
    main()
