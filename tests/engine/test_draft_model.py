"""A model that drafts: what it may be, what it may not, and that it misses nothing of its target.

A draft model that is the target itself proposes what the target draws, so one token that it has not
followed, or reads from another's block, costs drafts. That answers stay the same is shown by
`test_speculation.py` and, in worlds of troubles, by `test_differential.py`.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch

from octavo import LLM, EngineConfig, SamplingParams, StructuredOutputsParams
from octavo.engine.drafting import share_groups
from octavo.model_config import KvGroup
from tests.models.test_architectures import make
from tests.quantize.checkpoints import write_tokenizer

OPTIONS: dict[str, Any] = {"model": "tiny", "load_format": "dummy", "dtype": "float32", "device": "cpu"}
OPTIONS |= {"max_model_len": 128, "max_num_seqs": 4, "kv_cache_memory": 16 << 20}
TWIN = {"method": "draft_model", "model": "tiny", "num_speculative_tokens": 3, "adaptive": False}
PROMPTS = [{"prompt_token_ids": [7 * i % 500 + 5 for i in range(start, start + 40)]} for start in (0, 0, 31, 90, 12)]


def drafted(llm: LLM, **params: Any) -> tuple[list[list[int]], int, int]:
    """Answers to all prompts, the drafts that were verified, and those that were right."""
    before = llm._engine.core.stats()
    sampling = SamplingParams(**{"max_tokens": 24, "ignore_eos": True, "detokenize": False, **params})
    answers = [
        choice.token_ids for answer in llm.generate(PROMPTS, sampling, use_tqdm=False) for choice in answer.outputs
    ]
    after = llm._engine.core.stats()
    names = ("spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
    verified, right = (int(after[name] - before[name]) for name in names)
    return answers, verified, right


@pytest.mark.parametrize(
    ("options", "overlap"),
    [
        ({}, True),
        ({"max_num_batched_tokens": 20}, False),  # prompts come in pieces, beside drafts
        ({"kv_cache_dtype": "int8", "max_num_batched_tokens": 20}, True),
    ],
    ids=["two in flight", "chunks", "int8 pages"],
)
def test_a_twin_of_the_target_is_always_right(options: dict[str, Any], overlap: bool) -> None:
    with LLM(**OPTIONS | options, speculative_config=TWIN) as llm:
        llm._engine._overlap = overlap  # two steps in flight, as on a GPU
        sampled = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 1, "n": 2}
        for params in ({"temperature": 0.0}, sampled):  # then prompts are found in the prefix cache
            answers, verified, right = drafted(llm, **params, max_tokens=50)
            assert verified > 100
            # With two steps in flight the last drafts of a request may stand behind its end.
            ends = TWIN["num_speculative_tokens"] * len(answers) if overlap else 0
            assert right >= 0.98 * (verified - ends)  # sums in another order may turn a near tie


def test_drafts_of_a_vocabulary_that_is_a_little_smaller(tmp_path: Path) -> None:
    """Families pad their vocabularies to different sizes; ids beyond the draft's are nothing to it."""
    folders = [tmp_path / "target", tmp_path / "draft"]
    for folder, size in zip(folders, (199, 150), strict=True):
        make("llama-gqa-tied", folder, vocab_size=size)
        letters(150).save(str(folder / "tokenizer.json"))
    params = SamplingParams(max_tokens=30, temperature=1.0, top_k=160, seed=3, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": [198, 160, 5]}, {"prompt_token_ids": list(range(140, 199))}]
    options = OPTIONS | {"model": str(folders[0]), "load_format": "auto"}
    answers = []
    for speculation in (None, {"method": "draft_model", "model": str(folders[1]), "adaptive": False}):
        with LLM(**options, speculative_config=speculation) as llm:
            answers.append([answer.outputs[0].token_ids for answer in llm.generate(prompts, params, use_tqdm=False)])
    assert answers[0] == answers[1]
    assert max(max(answer) for answer in answers[0]) >= 150


def test_a_draft_that_was_trained_for_shorter_texts(tmp_path: Path) -> None:
    for name, length in (("target", 256), ("draft", 32)):
        make("llama-gqa-tied", tmp_path / name, max_position_embeddings=length)
    options = OPTIONS | {"model": str(tmp_path / "target"), "load_format": "auto"}
    speculation = TWIN | {"model": str(tmp_path / "draft")}
    prompts = [{"prompt_token_ids": [prompt % 190 + 3 for prompt in range(60)]}]
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, detokenize=False)
    with LLM(**options, speculative_config=speculation) as llm, LLM(**options) as plain:
        assert (
            llm.generate(prompts, params)[0].outputs[0].token_ids
            == plain.generate(prompts, params)[0].outputs[0].token_ids
        )


def test_a_request_under_a_grammar_has_no_drafts_of_a_model(tmp_path: Path) -> None:
    """Its masks follow its drafts, so the core would have to know them. Its neighbours have theirs."""
    make("llama-gqa-tied", tmp_path, vocab_size=260)
    write_tokenizer(tmp_path)
    options = OPTIONS | {"model": str(tmp_path), "load_format": "auto"}
    bounded = SamplingParams(
        temperature=0.0, max_tokens=20, structured_outputs=StructuredOutputsParams(regex="[0-9]{12}")
    )
    free = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    texts = []
    for speculation in (None, {"method": "self", "adaptive": False}):
        with LLM(**options, speculative_config=speculation) as llm:
            core = llm._engine.core
            texts.append(llm.generate(["12"], bounded, use_tqdm=False)[0].outputs[0].text)
            assert core.stats()["spec_decode_num_draft_tokens"] == 0
            texts += [answer.outputs[0].text for answer in llm.generate(["12", "ab"], [bounded, free], use_tqdm=False)]
            assert (core.stats()["spec_decode_num_draft_tokens"] > 0) == (speculation is not None)
    assert texts[:3] == texts[3:] and len(texts[0]) == 12


@pytest.mark.parametrize(
    ("target", "windows", "groups", "seen"),
    [
        ([(0, 3)], [0, 0, 0], [[0, 1, 2]], [0, 0, 0]),
        ([(0, 2), (16, 2), (16, 2)], [8, 0, 8, 16, 8], None, [8, 0, 8, 16, 8]),
        ([(16, 4)], [0, 4], [[0, 1]], [16, 4]),  # nothing keeps more than the window
        ([(0, 2), (16, 2)], [32, 0], [[0, 1], []], [32, 0]),
    ],
)
def test_layers_go_where_as_much_is_kept_as_they_see(
    target: list[tuple[int, int]], windows: list[int], groups: list[list[int]] | None, seen: list[int]
) -> None:
    layers = [SimpleNamespace(attention=SimpleNamespace(window=window, kv_group=0)) for window in windows]
    draft = SimpleNamespace(decoder_layers=layers, kv_groups=[])
    share_groups(draft, [KvGroup(window, list(range(count))) for window, count in target])  # type: ignore[arg-type]
    assert [layer.attention.window for layer in layers] == seen
    assert sorted(layer for group in draft.kv_groups for layer in group.layers) == list(range(len(windows)))
    for index, (group, (window, _)) in enumerate(zip(draft.kv_groups, target, strict=True)):
        for layer in group.layers:
            own = layers[layer].attention
            assert own.kv_group == index
            assert window == 0 or 0 < own.window <= window
    if groups is not None:
        assert [sorted(group.layers) for group in draft.kv_groups] == groups
    else:  # the layers that see little are spread
        assert max(len(group.layers) for group in draft.kv_groups) == 2


def letters(count: int, first: int = 0) -> tokenizers.Tokenizer:
    """So many tokens, each a letter; `first` of them stand at the end."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:count]
    vocabulary = {letter: number for number, letter in enumerate(alphabet[first:] + alphabet[:first])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize(
    ("draft", "told"),
    [
        ({"vocab_size": 150}, "its vocabulary has 150 tokens and the target's 199"),
        ({"tokenizer": letters(199, first=1)}, "token 0 is '\"' to it and '!' to the target"),
        ({"tokenizer": letters(40)}, "its tokenizer has 40 tokens and the target's 199"),
        (None, "no such folder"),
    ],
    ids=["size", "tokens", "far fewer", "missing"],
)
def test_another_vocabulary_or_no_model_is_refused_by_key(
    draft: dict[str, Any] | None, told: str, tmp_path: Path
) -> None:
    folders = {"target": tmp_path / "target", "draft": tmp_path / "draft"}
    make("llama-gqa-tied", folders["target"])
    if draft is not None:
        tokenizer = draft.pop("tokenizer", None)
        make("llama-gqa-tied", folders["draft"], **draft)
        if tokenizer is not None:
            tokenizer.save(str(folders["draft"] / "tokenizer.json"))
            letters(199).save(str(folders["target"] / "tokenizer.json"))
    options = OPTIONS | {"model": str(folders["target"]), "load_format": "auto"}
    with pytest.raises(ValueError, match=r"^speculative_config: model") as error:
        LLM(**options, speculative_config={"method": "draft_model", "model": str(folders["draft"])})
    assert told in str(error.value)


def test_a_quantised_target_has_no_copy_in_few_bits() -> None:
    with pytest.raises(ValueError, match="speculative_config: method = 'self': needs a target in 16 or 32 bits"):
        LLM(**OPTIONS, quantization="int8", speculative_config={"method": "self"})


def test_what_a_draft_model_takes_is_reported() -> None:
    with LLM(**OPTIONS) as llm:
        plain = llm._engine.parts.report
    with LLM(**OPTIONS, speculative_config=TWIN) as llm:
        twin = llm._engine.parts.report
        assert llm._engine.runner.block_bytes == 2 * llm._engine.runner.kv_layout.block_bytes
    with LLM(**OPTIONS, speculative_config={"method": "self"}) as llm:
        own = llm._engine.parts.report
    assert twin.weight_bytes == 2 * plain.weight_bytes
    assert (twin.num_blocks, own.num_blocks) == (plain.num_blocks // 2, plain.num_blocks)
    assert plain.weight_bytes < own.weight_bytes < 2 * plain.weight_bytes
    assert "draft_model tiny, up to 3 drafts" in twin.speculation and "of the KV cache" in twin.speculation
    assert "self in int4" in own.speculation and "KV cache" not in own.speculation


def test_a_model_whose_logits_are_nan_drafts_something(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(**OPTIONS, speculative_config=TWIN) as llm, LLM(**OPTIONS) as plain:
        model = llm._engine.runner.proposer.draft.model
        compute = model.compute_logits
        monkeypatch.setattr(model, "compute_logits", lambda hidden: compute(hidden) * torch.nan)
        answers, verified, _ = drafted(llm, temperature=0.0)
        assert verified > 0
        assert answers == drafted(plain, temperature=0.0)[0]


def test_keys_of_a_draft_model_reach_it(tmp_path: Path) -> None:
    config = EngineConfig(speculative_config={"method": "draft_model", "model": tmp_path, "quantization": "int8"})
    assert config.speculation is not None
    assert (config.speculation.model, config.speculation.quantization) == (str(tmp_path), "int8")
    assert config.num_draft_tokens == 5
