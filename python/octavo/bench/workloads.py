"""Fixed, seeded workloads as plain lists of (prompt token ids, output length), the same for every
engine that is compared.
"""

from __future__ import annotations

import random
import re

Item = tuple[list[int], int]

NAMES = ("decode1", "decode32", "prefill512", "prefill2048", "uniform", "chat", "long", "mixed", "prefix")


def known_workload(name: str) -> str:
    """The name itself. Raises `ValueError` for one that `workload` does not have."""
    if name not in NAMES and not re.fullmatch(r"(decode|prefill)0*[1-9]\d{0,5}", name):
        raise ValueError(f"{name!r} is not one of {', '.join(NAMES)} (decodeN and prefillN take any N from 1)")
    return name


def workload(name: str, vocab_size: int = 32000, seed: int = 0) -> list[Item]:
    """The items of a workload.

    decodeB: B prompts of 128 tokens, 256 out. prefillN: one prompt of N, one token out. uniform:
    512 requests of 512 in, 256 out. chat: 1,000 requests with a ShareGPT-like spread of lengths.
    long: 16 of 8,192 in, 256 out. mixed: 64 chats of 256 with a prompt of 6,000 every eighth.
    prefix: 256 requests that share 2,048 tokens. Raises `ValueError` for another name.
    """
    known_workload(name)
    rng = random.Random(f"{name}/{seed}")

    def prompt(length: int) -> list[int]:
        return [rng.randrange(10, vocab_size - 10) for _ in range(length)]

    if name.startswith("prefill"):
        return [(prompt(int(name[7:])), 1)]
    if name.startswith("decode"):
        return [(prompt(128), 256) for _ in range(int(name[6:]))]
    if name == "uniform":
        return [(prompt(512), 256) for _ in range(512)]
    if name == "chat":
        items = []
        for _ in range(1000):
            length = min(1024, max(4, int(rng.lognormvariate(4.7, 1.1))))
            output = min(1024, max(4, int(rng.lognormvariate(4.9, 0.9))))
            items.append((prompt(length), output))
        return items
    if name == "long":
        return [(prompt(8192), 256) for _ in range(16)]
    if name == "mixed":
        return [(prompt(6000 if number % 8 == 7 else 256), 128) for number in range(64)]
    shared = prompt(2048)
    return [(shared + prompt(128), 64) for _ in range(256)]
