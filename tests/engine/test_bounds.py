"""Bounds on an answer's tokens through the engine, with a real model and with one of random weights:
judged by transformers, and by the engine without what may not change an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, SamplingParams, StructuredOutputsParams
from tests.engine.conftest import GAP, Reference, make_admission_hopeful
from tests.text.test_special_tokens import CONFIG, write_folder


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    options: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory": 64 * 2**20}
    with LLM(smollm2_path, reasoning_parser="think", **options) as engine:
        yield engine
        engine.core.check_integrity()
        assert engine.core.stats()["kv_blocks_used"] == 0


def answer(llm: LLM, prompt: str, **fields: Any) -> tuple[list[int], list[int], str]:
    """Tokens of the prompt and of the answer, and its text."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 16} | fields)
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    assert output.error is None
    return list(output.prompt_token_ids), list(output.outputs[0].token_ids), output.outputs[0].text


def disagreement(reference: Reference, prompt: list[int], output: list[int], banned: Any) -> str | None:
    """Where a greedy output leaves the likeliest token of those that are not banned.

    banned: a function of the output so far, to token ids.
    """
    with torch.inference_mode():
        logits = reference.model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    for place, token in enumerate(output):
        bans = banned(output[:place])
        if token in bans:
            return f"output[{place}] = {token} is banned"
        left = logits[place].clone()
        left[list(bans)] = float("-inf")
        best = left.topk(2)
        if float(best.values[0] - best.values[1]) > GAP and token != int(best.indices[0]):
            return f"output[{place}] = {token}, reference {int(best.indices[0])}"
    return None


def test_greedy_answers_are_the_likeliest_that_is_left(llm: LLM, reference: Reference) -> None:
    prompt = "The capital of France is"
    ids, free, text = answer(llm, prompt)
    words = [word for word in re.findall(r"[A-Za-z]+", text) if len(word) > 3][:3]
    assert words
    ids, output, bounded = answer(llm, prompt, bad_words=words)
    assert output != free
    assert not any(word in bounded for word in words)
    tokenizer = llm.get_tokenizer()
    spelt = [
        list(tokenizer.encode_text(space + word, add_special_tokens=False).token_ids)
        for word in words
        for space in ("", " ")
    ]

    def bad(before: list[int]) -> set[int]:
        return {
            word[-1] for word in spelt if before[max(0, len(before) - len(word) + 1) :] == word[:-1] or len(word) == 1
        }

    assert disagreement(reference, ids, output, bad) is None
    allowed = set(free[:6]) | set(range(500, 900))
    ids, output, _ = answer(llm, prompt, allowed_token_ids=sorted(allowed))
    others = set(range(len(reference.model.get_input_embeddings().weight))) - allowed
    assert disagreement(reference, ids, output, lambda _: others) is None


def test_reasoning_is_closed_and_the_answer_follows(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    close = list(tokenizer.encode_text("</think>", add_special_tokens=False).token_ids)
    prompt = "Question: 2 + 2?\n<think>\n"
    _, free, _ = answer(llm, prompt, max_tokens=30)
    for budget in (0, 5):
        params = SamplingParams(temperature=0.7, seed=1, max_tokens=30, thinking_token_budget=budget, n=3)
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        for choice in output.outputs:
            assert list(choice.token_ids[budget : budget + len(close)]) == close
    _, output, text = answer(llm, prompt, max_tokens=30, thinking_token_budget=5)
    assert output[:5] == free[:5]
    wanted = StructuredOutputsParams(choice=["four", "five"])
    _, output, text = answer(llm, prompt, max_tokens=30, thinking_token_budget=5, structured_outputs=wanted)
    assert re.fullmatch(r"(?s).*</think>(four|five)", text)
    # Without an opening tag there is nothing to close.
    _, free, _ = answer(llm, "The capital of France is")
    assert answer(llm, "The capital of France is", thinking_token_budget=0)[1] == free


CASES: dict[str, dict[str, Any]] = {
    "allowed": {"temperature": 0.4, "seed": 3, "allowed_token_ids": list(range(40, 60)), "ignore_eos": True},
    "allowed ends": {"temperature": 0.4, "seed": 3, "allowed_token_ids": list(range(0, 60))},
    "bad words": {"temperature": 0.0, "bad_words": ["ab", "a", "z"], "ignore_eos": True},
    "both": {
        "temperature": 0.4,
        "seed": 5,
        "allowed_token_ids": list(range(60, 90)),
        "bad_words": ["b", "cc"],
        "ignore_eos": True,
    },
    "budget": {"temperature": 0.4, "seed": 7, "thinking_token_budget": 11, "ignore_eos": True},
    "choices": {"temperature": 0.6, "seed": 9, "thinking_token_budget": 4, "n": 3, "ignore_eos": True},
}
"""Of a model with random weights, whose answers repeat themselves."""


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = write_folder(tmp_path_factory.mktemp("bounds") / "text", {CONFIG: {"eos_token": "<end>"}})
    return {
        "model": "tiny",
        "load_format": "dummy",
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 160,
        "max_num_seqs": 8,
        "tokenizer": str(folder),
        "reasoning_parser": "think",
    }


def all_answers(llm: LLM, case: dict[str, Any], repeat: int = 1) -> list[list[list[int]]]:
    prompts = ["x<think>", "abcabcabcabc<think>", "the answer, the answer<think>"] * repeat
    params = SamplingParams(**{"max_tokens": 60, "detokenize": False} | case)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return [[list(choice.token_ids) for choice in output.outputs] for output in outputs]


def test_drafts_change_nothing(options: dict[str, Any]) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 1, "adaptive": False}
    with LLM(**options, kv_cache_memory=16 << 20) as plain:
        expected = {name: all_answers(plain, case) for name, case in CASES.items()}
        close = list(plain.get_tokenizer().encode_text("</think>", add_special_tokens=False).token_ids)
    for name, budget in (("budget", 11), ("choices", 4)):
        for choices in expected[name]:
            assert all(choice[budget : budget + len(close)] == close for choice in choices)
    with LLM(
        **options, kv_cache_memory=16 << 20, speculative_config=speculation | {"prompt_lookup_max": 4}
    ) as drafting:
        for name, case in CASES.items():
            assert all_answers(drafting, case) == expected[name], name
        assert drafting.core.stats()["spec_decode_num_accepted_tokens"] > 0
        drafting.core.check_integrity()


def test_preemption_changes_nothing(options: dict[str, Any]) -> None:
    options = options | {"enable_prefix_caching": False}
    with LLM(**options, kv_cache_memory=16 << 20) as roomy:
        expected = {name: all_answers(roomy, case, repeat=4) for name, case in CASES.items()}
        stats = roomy.core.stats()
        blocks = sum(stats[f"kv_blocks_{state}"] for state in ("used", "held", "cached", "blank"))
    narrow = int((16 << 20) * 16 / blocks)
    with LLM(**options, kv_cache_memory=narrow) as llm:
        make_admission_hopeful(llm)
        for name, case in CASES.items():
            assert all_answers(llm, case, repeat=4) == expected[name], name
        assert llm.core.stats()["num_preemptions"] > 0
        llm.core.check_integrity()


def test_parameters_are_checked_when_they_are_made() -> None:
    for fields, message in (
        ({"allowed_token_ids": []}, "allowed_token_ids is an empty list"),
        ({"allowed_token_ids": "ab"}, "allowed_token_ids is 'ab'"),
        ({"allowed_token_ids": [True]}, r"allowed_token_ids\[0\] is True"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"bad_words": "word"}, "bad_words is 'word'"),
        ({"bad_words": ["a", " "]}, r"bad_words\[1\]"),
        ({"bad_words": ["a"] * 257}, "at most 256"),
        ({"thinking_token_budget": -1}, "thinking_token_budget = -1"),
        ({"thinking_token_budget": 1.5}, "thinking_token_budget is 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            SamplingParams(**fields)
    with pytest.raises(ValueError, match="must be tokenised"):
        SamplingParams(bad_words=["a"]).to_core()


def test_what_a_model_cannot_do_names_the_prompt(llm: LLM, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"prompts\[0\]: allowed_token_ids holds token id 1000000 at index 1"):
        answer(llm, "a", allowed_token_ids=[5, 10**6])
    with (
        LLM(**options | {"reasoning_parser": "none"}, kv_cache_memory=1 << 20) as plain,
        pytest.raises(ValueError, match=r"prompts\[0\]: thinking_token_budget = 3"),
    ):
        answer(plain, "a", thinking_token_budget=3)
