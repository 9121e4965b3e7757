"""Embeddings against transformers' hidden states in float32: means and last tokens, over chunks,
beside decodes, over the prefix cache, under preemption; and beside requests whose states are NaN.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from octavo import LLM, PoolingParams, SamplingParams, _core
from octavo.outputs import EmbeddingRequestOutput
from octavo.pooling import HfOverrides, PoolerConfig, first_tokens
from octavo.weights.pooling import read_gguf, settle
from tests.engine.conftest import Reference, make_admission_hopeful
from tests.models.test_architectures import make

TOLERANCE = 2e-4
RAW = PoolingParams(normalize=False)
MEAN_CONFIG = json.dumps({"pooling_type": "MEAN"})


@torch.inference_mode()
def hidden_states(model: Any, ids: list[int]) -> Tensor:
    """[len(ids), hidden_size], after the last norm."""
    return model.model(torch.tensor([ids])).last_hidden_state[0].float()


def expected(model: Any, ids: list[int], pooling: str) -> Tensor:
    states = hidden_states(model, ids)
    return states[-1] if pooling == "LAST" else states.double().mean(0).float()


def vector(output: EmbeddingRequestOutput) -> Tensor:
    assert output.finished and output.error is None
    return torch.tensor(output.outputs.embedding)


def tokens(*lengths: int, top: int = 199) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, top, (length,), generator=generator).tolist() for length in lengths]


def begin(llm: LLM, ids: list[int], **params: Any) -> None:
    """Has an answer run beside what comes next. It is told as a whole, so that nobody looks for its
    tokens meanwhile.
    """
    whole = _core.ReplyFormat.openai_completion(id="", model="", created=0, stream=False)
    checked = _core.SamplingParams(temperature=0.0, detokenize=False, **params)
    llm.core.add_call([_core.Prompt(ids)], checked, now=0.0, reply_format=whole)


def as_prompts(ids: list[list[int]]) -> list[Any]:
    return [{"prompt_token_ids": own} for own in ids]


@pytest.mark.parametrize("pooling", ["LAST", "MEAN"])
@pytest.mark.parametrize("case", ["llama-gqa-tied", "mistral-window", "qwen2", "qwen3", "gemma3"])
def test_families_in_chunks_beside_decodes(case: str, pooling: str, tmp_path: Path) -> None:
    model = make(case, tmp_path)
    ids = tokens(41, 1, 90, 17, 64)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_memory": 1 << 24}
    pooler = json.dumps({"pooling_type": pooling})
    with LLM(str(tmp_path), **options, max_num_batched_tokens=16, max_num_seqs=4, pooler_config=pooler) as llm:
        begin(llm, ids[0], max_tokens=40, ignore_eos=True)
        outputs = llm.embed(as_prompts(ids), RAW, use_tqdm=False)
        unit = llm.embed(as_prompts(ids), use_tqdm=False)
        llm.core.check_integrity()
    for own, output, normalised in zip(ids, outputs, unit, strict=True):
        right = expected(model, own, pooling)
        torch.testing.assert_close(vector(output), right, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(vector(normalised), right / right.norm(), atol=TOLERANCE, rtol=TOLERANCE)
        assert output.prompt_token_ids == own and output.outputs.hidden_size == len(right)


@pytest.mark.parametrize("pooling", ["LAST", "MEAN"])
def test_the_default_model_over_its_prefix_cache(
    reference: Reference, smollm2_path: Path, prompts: list[str], pooling: str
) -> None:
    with LLM(
        str(smollm2_path),
        dtype="float32",
        device="cpu",
        max_model_len=512,
        max_num_seqs=4,
        max_num_batched_tokens=33,
        pooler_config=json.dumps({"pooling_type": pooling}),
    ) as llm:
        chosen = [prompts[9], prompts[7], prompts[9] + prompts[0]]
        llm.generate(prompts[9], SamplingParams(temperature=0.0, max_tokens=2), use_tqdm=False)
        outputs = llm.embed(chosen, RAW, use_tqdm=False)
        assert (outputs[0].num_cached_tokens > 0) == (pooling == "LAST")  # a mean needs the states of all
        for output in outputs:
            right = expected(reference.model, output.prompt_token_ids, pooling)
            torch.testing.assert_close(vector(output), right, atol=2e-3, rtol=TOLERANCE)
        truncated = llm.embed(prompts[9], RAW, truncate_prompt_tokens=7, use_tqdm=False)[0]
        assert truncated.prompt_token_ids == outputs[0].prompt_token_ids[:7]
        # What it leaves in the cache is what others find there.
        (after,) = llm.generate(chosen[2], SamplingParams(temperature=0.0, max_tokens=8), use_tqdm=False)
        assert after.num_cached_tokens > 0
        assert reference.disagreement(after.prompt_token_ids, after.outputs[0].token_ids) is None


TINY: dict[str, Any] = {
    "model": "tiny",
    "load_format": "dummy",
    "dtype": "float32",
    "device": "cpu",
    "max_model_len": 128,
}


@pytest.mark.parametrize("pooling", ["LAST", "MEAN"])
def test_preempted_ones_begin_anew(pooling: str) -> None:
    """Beside open answers in a pool for few, so that they give way midway."""
    ids = tokens(*range(60, 76), top=500)
    pooler = json.dumps({"pooling_type": pooling, "normalize": False})
    options = {**TINY, "max_num_seqs": 8, "max_num_batched_tokens": 8, "pooler_config": pooler}
    with LLM(**options, kv_cache_memory=1 << 26, enable_prefix_caching=False) as llm:
        alone = [vector(llm.embed(prompt, use_tqdm=False)[0]) for prompt in as_prompts(ids)]
        pool = llm.core.stats()["num_blocks"]
    bytes_a_block = (1 << 26) // int(pool + 1)
    with LLM(**options, kv_cache_memory=12 * bytes_a_block) as llm:
        make_admission_hopeful(llm)
        before = llm.core.stats()["num_preemptions"]
        for own in ids[:6]:
            begin(llm, own[:20], max_tokens=70, stop_token_ids=[1])
        crowded = llm.embed(as_prompts(ids), use_tqdm=False)
        assert llm.core.stats()["num_preemptions"] > before
        llm.core.check_integrity()
    for one, other in zip(alone, crowded, strict=True):
        torch.testing.assert_close(vector(other), one, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("pooling", ["LAST", "MEAN"])
def test_the_head_computes_nothing_where_nothing_is_drawn(pooling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is drawn beside embeddings is as it was."""
    ids = tokens(41, 1, 90, 17, top=500)
    pooler = json.dumps({"pooling_type": pooling, "normalize": False})
    answers = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with LLM(**TINY, max_num_seqs=4, max_num_batched_tokens=16, pooler_config=pooler) as llm:
        before = llm.generate(as_prompts(ids), answers, use_tqdm=False)
        asked: list[int] = []
        model = llm._engine.runner.model
        compute = model.compute_logits
        monkeypatch.setattr(model, "compute_logits", lambda hidden: asked.append(len(hidden)) or compute(hidden))
        alone = llm.embed(as_prompts(ids), use_tqdm=False)
        assert asked == []
        begin(llm, ids[0], max_tokens=40, ignore_eos=True)
        beside = llm.embed(as_prompts(ids), use_tqdm=False)
        assert asked
        after = llm.generate(as_prompts(ids), answers, use_tqdm=False)
        llm.core.check_integrity()
    for one, other in zip(alone, beside, strict=True):
        torch.testing.assert_close(vector(other), vector(one), atol=1e-4, rtol=1e-4)
    assert [output.outputs[0].token_ids for output in after] == [output.outputs[0].token_ids for output in before]


def test_the_longest_prompt_has_an_embedding() -> None:
    with LLM(**TINY, max_num_batched_tokens=64) as llm:
        (output,) = llm.embed({"prompt_token_ids": [5] * 128}, use_tqdm=False)
        assert vector(output).norm() == pytest.approx(1.0, abs=1e-5)
        with pytest.raises(ValueError, match=r"prompts\[0\]: .*129"):
            llm.embed({"prompt_token_ids": [5] * 129}, use_tqdm=False)
        (cut,) = llm.embed({"prompt_token_ids": [5] * 129}, truncate_prompt_tokens=-1, use_tqdm=False)
        assert vector(cut).tolist() == pytest.approx(vector(output).tolist(), abs=1e-5)


@pytest.mark.parametrize("pooling", ["LAST", "MEAN"])
def test_nan_ends_its_own_request(pooling: str) -> None:
    """The embedding of token 7 is NaN; for a mean in the first chunk of several."""
    ids = [[7, *range(20, 60)], list(range(30, 60)), [9] * 20]
    if pooling == "LAST":
        ids[0] = ids[0][::-1]
    pooler = json.dumps({"pooling_type": pooling})
    with LLM(**TINY, max_num_batched_tokens=16, max_num_seqs=4, pooler_config=pooler) as llm:
        right = [vector(output) for output in llm.embed(as_prompts(ids[1:]), use_tqdm=False)]
        table = llm._engine.runner.model.embedding.weight
        with torch.inference_mode():
            table[7] = torch.nan
        outputs = llm.embed(as_prompts(ids), use_tqdm=False)
        assert outputs[0].error is not None and outputs[0].error.startswith("numerical_error")
        assert outputs[0].outputs.embedding == []
        for output, own in zip(outputs[1:], right, strict=True):
            torch.testing.assert_close(vector(output), own, atol=1e-5, rtol=1e-4)


def save_embedder(folder: Path, pooling: dict[str, Any], *, normalize: bool, **config: Any) -> None:
    """Makes a folder one of sentence-transformers'."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": "" if number == 0 else f"{number}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))


MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def modes(chosen: str, size: int) -> dict[str, Any]:
    """A `1_Pooling/config.json` as published models have it."""
    return {
        "word_embedding_dimension": size,
        **{f"pooling_mode_{mode}": mode == chosen for mode in MODES},
        "include_prompt": True,
    }


@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        ("llama-mha-untied", "LlamaModel"),
        ("mistral-window", "MistralModel"),
        ("qwen2", "Qwen2Model"),
        ("qwen3", "Qwen3Model"),
        ("gemma3", "Gemma3TextModel"),
    ],
)
def test_files_without_a_head_and_with_their_own_pooling(case: str, architecture: str, tmp_path: Path) -> None:
    model: Any = make(case, tmp_path / "whole")
    folder = tmp_path / "bare"
    model.model.save_pretrained(folder)
    size = model.config.hidden_size
    save_embedder(folder, modes("mean_tokens", size), normalize=False, architectures=[architecture])
    ids = tokens(30, 7)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_memory": 1 << 24}
    with LLM(str(folder), **options) as llm:
        for own, output in zip(ids, llm.embed(as_prompts(ids), use_tqdm=False), strict=True):
            right = expected(model, own, "MEAN")
            torch.testing.assert_close(vector(output), right, atol=TOLERANCE, rtol=TOLERANCE)
        with pytest.raises(ValueError, match=r"dimensions = 8: .*matryoshka"):
            llm.embed(as_prompts(ids), PoolingParams(dimensions=8), use_tqdm=False)
        with pytest.raises(ValueError, match="use embed"):
            llm.generate({"prompt_token_ids": ids[0]}, use_tqdm=False)
    with pytest.raises(ValueError, match="without a head"):
        LLM(str(folder), **options, runner="generate")


def test_an_embedder_with_a_head_is_one_and_matryoshka_is_cut_first(tmp_path: Path) -> None:
    """As Qwen3-Embedding is published: a causal model, the last token, normalised."""
    model = make("qwen3", tmp_path)
    size = model.config.hidden_size
    save_embedder(tmp_path, modes("lasttoken", size), normalize=True, matryoshka_dimensions=[8, 16])
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_memory": 1 << 24}
    ids = tokens(23)
    right = expected(model, ids[0], "LAST")
    with LLM(str(tmp_path), **options) as llm:
        cut = vector(llm.embed(as_prompts(ids), PoolingParams(dimensions=8), use_tqdm=False)[0])
        torch.testing.assert_close(cut, right[:8] / right[:8].norm(), atol=TOLERANCE, rtol=TOLERANCE)
        with pytest.raises(ValueError, match=r"dimensions = 9: .*8, 16"):
            llm.embed(as_prompts(ids), PoolingParams(dimensions=9), use_tqdm=False)
        with pytest.raises(ValueError, match="use embed"):
            llm.generate(as_prompts(ids), use_tqdm=False)
    with LLM(str(tmp_path), **options, runner="generate") as llm:
        assert llm.generate(as_prompts(ids), SamplingParams(max_tokens=1), use_tqdm=False)[0].finished
        with pytest.raises(ValueError, match="runner = 'generate'"):
            llm.embed(as_prompts(ids), use_tqdm=False)
    with LLM(str(tmp_path), **options, override_pooler_config={"pooling_type": "MEAN", "dimensions": 16}) as llm:
        mean = expected(model, ids[0], "MEAN")[:16]
        found = vector(llm.embed(as_prompts(ids), use_tqdm=False)[0])
        torch.testing.assert_close(found, mean / mean.norm(), atol=TOLERANCE, rtol=TOLERANCE)


def test_the_longest_input_is_what_the_files_say(tmp_path: Path) -> None:
    """Sentence-transformers cuts there; the positions of the model reach further."""
    model = make("qwen3", tmp_path)
    save_embedder(tmp_path, modes("lasttoken", model.config.hidden_size), normalize=True)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_memory": 1 << 24}
    text = tmp_path / "sentence_bert_config.json"
    ids = tokens(9)
    for given, longest in (({"max_seq_length": 8}, 8), ({"max_seq_length": 10**6}, None), ({}, None)):
        text.write_text(json.dumps(given | {"do_lower_case": False}))
        with LLM(str(tmp_path), **options) as llm:
            if longest is None:
                assert llm.embed(as_prompts(ids), use_tqdm=False)
                continue
            with pytest.raises(ValueError, match="8"):
                llm.embed(as_prompts(ids), use_tqdm=False)
            cut = vector(llm.embed(as_prompts(ids), use_tqdm=False, truncate_prompt_tokens=-1)[0])
            right = expected(model, ids[0][:8], "LAST")
            torch.testing.assert_close(cut, right / right.norm(), atol=TOLERANCE, rtol=TOLERANCE)
    text.write_text(json.dumps({"max_seq_length": 8}))
    with LLM(str(tmp_path), **options, max_model_len=16) as llm:  # the user knows better
        assert llm.embed(as_prompts(ids), use_tqdm=False)
    for wrong in (0, 8.5, "8", True):
        text.write_text(json.dumps({"max_seq_length": wrong}))
        with pytest.raises(ValueError, match=r"sentence_bert_config\.json: max_seq_length"):
            LLM(str(tmp_path), **options)


REFUSED = {
    "cls": ({}, modes("cls_token", 64), r"1_Pooling/config.json: pooling_mode_cls_token: not supported"),
    "max": ({}, modes("max_tokens", 64), r"pooling_mode_max_tokens"),
    "two": ({}, modes("lasttoken", 64) | {"pooling_mode_mean_tokens": True}, r"mean_tokens, pooling_mode_lasttoken"),
    "none": ({}, modes("nothing", 64), r"no pooling mode"),
    "size": ({}, modes("lasttoken", 63), r"word_embedding_dimension: 63"),
    "prompt": ({}, modes("lasttoken", 64) | {"include_prompt": False}, r"include_prompt"),
    "dense": ({"type": "sentence_transformers.models.Dense"}, modes("lasttoken", 64), r"models.Dense' is not supp"),
    "path": ({"path": "../1_Pooling"}, modes("lasttoken", 64), r"path: '../1_Pooling' is not the plain name"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make("llama-gqa-tied", folder)
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(case: str, llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    module, pooling, message = REFUSED[case]
    size = json.loads((tmp_path / "config.json").read_text())["hidden_size"]
    if pooling["word_embedding_dimension"] == 64:
        pooling = pooling | {"word_embedding_dimension": size}
    save_embedder(tmp_path, pooling, normalize=True)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[2 if case == "dense" else 1].update(module)
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_memory": 1 << 24}
    with pytest.raises(ValueError, match=message):
        LLM(str(tmp_path), **options)
    LLM(str(tmp_path), **options, runner="generate").close()
    if case in ("cls", "max", "none", "two"):
        with LLM(str(tmp_path), **options, pooler_config={"pooling_type": "LAST"}) as llm:
            assert len(llm.embed({"prompt_token_ids": [5]}, use_tqdm=False)[0].outputs.embedding) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooler_config": {"pooling_type": "CLS"}}, r"pooler_config: pooling_type = 'CLS': not supported"),
        ({"pooler_config": {"pooling": "LAST"}}, r"pooler_config: 'pooling' is not supported; did you mean pooling_t"),
        ({"pooler_config": "LAST"}, r"pooler_config = 'LAST': is not JSON"),
        ({"pooler_config": {"normalize": 1}}, r"normalize = 1: must be true or false"),
        ({"pooler_config": {"dimensions": 16}}, r"pooler_config: dimensions = 16: .*matryoshka"),
        ({"pooler_config": {"dimensions": 0}}, r"dimensions = 0: must be"),
        ({"runner": "draft"}, r"runner = 'draft': must be one of auto, generate, pooling"),
        ({"task": "classify"}, r"task = 'classify': must be one of"),
        ({"task": "embed", "runner": "generate"}, r"task = 'embed': runner = 'generate' says something else"),
        ({"runner": "generate", "pooler_config": "{}"}, r"pooler_config: makes no sense"),
        ({"runner": "pooling", "spec_method": "ngram"}, r"speculative_config: makes no sense"),
        ({"hf_overrides": {"rope_theta": 1e6}}, r"hf_overrides: 'rope_theta' is not supported"),
        ({"hf_overrides": {"matryoshka_dimensions": [1 << 20]}}, r"matryoshka_dimensions = \[1048576\]"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(**TINY, **options)


@pytest.mark.parametrize(("kind", "pooling"), [(1, "mean"), (3, "last"), (0, None), (None, None)])
def test_gguf_files_say_how_they_pool(kind: int | None, pooling: str | None) -> None:
    metadata = {"general.architecture": "qwen3"} | ({} if kind is None else {"qwen3.pooling_type": kind})
    files = read_gguf(metadata, "a.gguf")
    assert files.pooling == pooling and files.is_embedder == (pooling is not None)
    embeddings = settle(files, 64, "auto", PoolerConfig(), HfOverrides())
    assert embeddings is not None and (embeddings.pooling, embeddings.normalize) == (pooling or "last", True)


@pytest.mark.parametrize("kind", [2, 4, 9])
def test_gguf_files_that_pool_otherwise_are_refused(kind: int) -> None:
    files = read_gguf({"general.architecture": "qwen3", "qwen3.pooling_type": kind}, "a.gguf")
    with pytest.raises(ValueError, match=r"a.gguf: qwen3.pooling_type: \w+ is not supported"):
        settle(files, 64, "auto", PoolerConfig(), HfOverrides())
    said = settle(files, 64, "auto", PoolerConfig("MEAN"), HfOverrides())
    assert said is not None and (said.pooling, said.source) == ("mean", "--pooler-config")


@pytest.mark.parametrize(
    ("plain", "whole", "most", "kept"),
    [
        ([5, 6, 7], [1, 5, 6, 7, 2], 4, [1, 5, 6, 2]),
        ([5, 6, 7], [5, 6, 7, 2], 2, [5, 2]),
        ([5, 6, 7], [1, 5, 6, 7], 2, [1, 5]),
        ([5, 6, 7], [5, 6, 7], 2, [5, 6]),
        ([5, 6, 7], [1, 5, 6, 7, 2], 5, [1, 5, 6, 7, 2]),
        ([5, 6, 7], [1, 5, 6, 7, 2], 2, [1, 5]),  # no room for a token of the text
    ],
)
def test_what_the_tokenizer_adds_at_the_end_stays(
    plain: list[int], whole: list[int], most: int, kept: list[int]
) -> None:
    assert first_tokens(_core.Prompt(whole), _core.Prompt(plain), most).token_ids == kept
