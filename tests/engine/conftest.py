"""The independent oracle: transformers in float32 over the same weights."""

from __future__ import annotations

import fcntl
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from octavo import LLM, SamplingParams

GAP = 1e-3
"""Logit gap above which greedy tokens must agree. Batching and chunking move SmolLM2's float32
logits by under 1e-4 on CPUs.
"""


@dataclass
class Reference:
    """transformers' SmolLM2 in float32."""

    model: torch.nn.Module
    judged: dict[tuple[int, ...], tuple[list[int], torch.return_types.topk]] = field(default_factory=dict)

    def disagreement(self, prompt: list[int], output: list[int]) -> str | None:
        """Where a greedy output leaves the reference at a position whose two best logits differ by
        more than GAP.
        """
        best = self.best_two(prompt, output)
        for position, token in enumerate(output):
            gap = float(best.values[position, 0] - best.values[position, 1])
            if gap > GAP and token != int(best.indices[position, 0]):
                return f"output[{position}] = {token}, reference {int(best.indices[position, 0])} by {gap:.4f}"
        return None

    @torch.inference_mode()
    def best_two(self, prompt: list[int], output: list[int]) -> torch.return_types.topk:
        """The two best logits at each place of `output` and beyond, and their tokens.

        The reference reads prompt and output in one pass, so every position is judged on the very
        context it was drawn in. What it said of a prompt serves every output that begins as the one
        it has read, and most do.
        """
        read, best = self.judged.get(tuple(prompt), ([], None))
        if best is None or read[: len(output)] != output:
            best = self.model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1].topk(2)
            self.judged[tuple(prompt)] = (output, best)
        return best


NEVER_DRAWN = 1
"""A token that the models of these tests do not put out. A request that may stop at it has no known
length.
"""


def make_admission_hopeful(llm: LLM) -> None:
    """Has many answers end at their first token. Who joins is decided by the lengths that were seen,
    so more requests of unknown length will be let in than the pool holds to their ends.
    """
    prompt = {"prompt_token_ids": [5]}
    first = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)[0].outputs[0]
    params = SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=first.token_ids)
    outputs = llm.generate([prompt] * 64, params, use_tqdm=False)
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}


@pytest.fixture(scope="session")
def reference(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Made of the file by transformers itself, which takes it some 20 s: once for all workers of a run."""
    from transformers import AutoModelForCausalLM

    run = tmp_path_factory.getbasetemp()
    folder = (run.parent if "PYTEST_XDIST_WORKER" in os.environ else run) / "reference"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        if not folder.exists():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # transformers' own, while it reads GGUF
                model = AutoModelForCausalLM.from_pretrained(
                    smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
                )
            model.hf_quantizer = None  # else it would not save what it has expanded
            del model.config.quantization_config
            model.save_pretrained(folder.with_suffix(".part"))
            folder.with_suffix(".part").rename(folder)
    return Reference(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """32 varied prompts: lengths from one token to hundreds, code, lists, other scripts, odd
    characters.
    """
    texts = [
        "The capital of France is",
        "Once upon a time",
        "def fibonacci(n):",
        "1, 2, 3, 4, 5, 6,",
        "Q: What is the boiling point of water?\nA:",
        "import numpy as np\n\nx = np.",
        "Dear Sir or Madam,",
        "A",
        "\n\n",
        "The quick brown fox jumps over the lazy dog. " * 6,
        "Le chat est assis sur",
        "Das Wetter ist heute",
        "El perro corre por",
        "東京は日本の",
        "Москва - столица",
        "emoji 🙂🙃 and ümläuts",
        "SELECT name FROM users WHERE",
        "<html><head><title>",
        "To be, or not to be, that is the",
        "In 1969, the first humans",
        "Photosynthesis is the process by which",
        "Roses are red, violets are",
        "x^2 + 2x + 1 = (x + 1)",
        "The three laws of thermodynamics are:\n1.",
        "Translate to French: Good morning ->",
        "My favourite recipe starts with",
        "A haiku about the sea:\n",
        "List of planets: Mercury, Venus, Earth,",
        "She opened the door and saw",
        "The function of the heart is to",
        "Breaking news: scientists have discovered",
    ]
    texts.append(" ".join(texts))
    return texts
