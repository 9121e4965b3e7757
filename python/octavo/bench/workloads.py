"""Fixed, seeded workloads as plain lists of (prompt token ids, output length), the same for every
engine that is compared.
"""

from __future__ import annotations

import random

Item = tuple[list[int], int]

NAMES = ("decode1", "decode32", "prefill512", "prefill2048", "uniform", "chat", "long", "mixed", "prefix")


def workload(name: str, vocab_size: int = 32000, seed: int = 0) -> list[Item]:
    """The items of a workload.

    decodeB: B prompts of 128 tokens, 256 out. prefillN: one prompt of N, one token out. uniform: 512
    requests of 512 in, 256 out. chat: 1,000 requests with a ShareGPT-like spread of lengths. long: 16
    of 8,192 in, 256 out. mixed: 64 chats of 256 with a prompt of 6,000 every eighth. prefix: 256
    requests that share 2,048 tokens. Raises `ValueError` for another name.
    """
    rng = random.Random(f"{name}/{seed}")

    def prompt(length: int) -> list[int]:
        return [rng.randrange(10, vocab_size - 10) for _ in range(length)]

    if name.startswith("prefill") and name[7:].isdigit():
        return [(prompt(int(name[7:])), 1)]
    if name.startswith("decode") and name[6:].isdigit():
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
    if name == "prefix":
        shared = prompt(2048)
        return [(shared + prompt(128), 64) for _ in range(256)]
    raise ValueError(f"workload: {name!r} is not one of {', '.join(NAMES)} (decodeN and prefillN take any N)")
