"""What `LLM` and its prompts accept of vLLM's, and what they say of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, AsyncEngine, SamplingParams, _core
from octavo.engine import setup
from octavo.engine.prompts import encode_prompt
from tests.models.test_architectures import make

TINY: dict[str, Any] = {"load_format": "dummy", "device": torch.device("cpu"), "max_model_len": 64}
TOKENS: Any = {"prompt_token_ids": [1, 2]}


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ({"trust_remote_code": True}, "trust_remote_code has no effect: code that comes with a model is never run"),
        ({"swap_space": 4}, "swap_space has no effect"),
        ({"trust_remote_code": False, "num_lookahead_slots": 0, "enable_lora": False, "hf_overrides": None}, ""),
    ],
)
def test_options_that_ask_for_nothing(option: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture) -> None:
    LLM("tiny", dtype=torch.float32, **TINY, **option).close()
    said = [record.message for record in caplog.records if "no effect" in record.message]
    assert [text.startswith(line) for text in said] == ([True] if line else [])


def test_threads_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    before, torch_threads = _core.cpu_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", torch_threads.append)
    try:
        with LLM("tiny", dtype=torch.float32, cpu_threads=3, **TINY) as llm:
            assert "cpu, 3 threads of " in llm._engine.parts.report.device
        assert _core.cpu_threads() == 3 and 3 in torch_threads
    finally:
        _core.set_cpu_threads(before)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"cpu_threads": 0}, r"cpu_threads = 0: must be from 1 to 1024"),
        ({"cpu_offload_gb": 4}, r"cpu_offload_gb = 4: not supported yet, only 0"),
        ({"kv_cache_dtype": "fp8_e5m2"}, r"kv_cache_dtype = 'fp8_e5m2': must be one of auto, bfloat16, .*int4"),
        ({"speculative_config": {}}, r"speculative_config: method is missing: must be one of ngram, suffix"),
        ({"quantisation": None}, r"quantisation: no such option \(did you mean quantization\?\)"),
        ({"frobnicate": 1}, r"frobnicate: no such option$"),
        ({"model": 3}, r"model = 3: must be text"),
    ],
)
def test_options_that_ask_for_something_else(option: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        LLM(**option)


def test_an_async_engine_takes_a_name_or_a_configuration(tmp_path: Path) -> None:
    for model in (str(tmp_path / "none"), tmp_path / "none"):
        with pytest.raises(ValueError, match=r"none'?: no such folder"):
            AsyncEngine.from_config(model)
    for wrong in ({"model": "tiny"}, None):
        with pytest.raises(ValueError, match="config: expected an EngineConfig, got"):
            AsyncEngine.from_config(wrong)  # type: ignore[arg-type]


class Words:
    """A tokenizer that counts characters."""

    def encode_text(self, text: str, _: bool) -> list[int]:
        return [len(text)]


def test_prompts_in_dictionaries() -> None:
    words: Any = Words()
    for prompt in ("Hello", {"prompt": "Hello"}, {"prompt": "Hello", "multi_modal_data": None}):
        assert encode_prompt(prompt, words) == [5]  # type: ignore[arg-type]
    both: Any = {"prompt": "Hello", "prompt_token_ids": [7, 8, 9]}
    assert encode_prompt(both, words).token_ids == [7, 8, 9]
    for wrong in ({}, {"prompt": None}, {"prompt": 3}, [1, 2], 3):
        with pytest.raises(ValueError, match=r"expected text, \{'prompt': text\} or \{'prompt_token_ids'"):
            encode_prompt(wrong, words)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'multi_modal_data' is not supported"):
        encode_prompt({"prompt": "Hello", "multi_modal_data": {"image": 1}}, words)  # type: ignore[typeddict-unknown-key]


def test_the_output_shows_the_text_of_its_prompt() -> None:
    short = SamplingParams(max_tokens=1)
    with LLM("tiny", dtype="float32", **TINY) as llm:
        outputs = llm.generate([TOKENS, TOKENS | {"prompt": "Hi"}], short, use_tqdm=False)
        assert [output.prompt for output in outputs] == [None, "Hi"]
        for prompts in (None, b"Hi", 3):
            with pytest.raises(ValueError, match="prompts: expected a prompt or a list of them"):
                llm.generate(prompts, short, use_tqdm=False)  # type: ignore[arg-type]
        for params in ({"temperature": 0}, 3):
            with pytest.raises(ValueError, match="sampling_params: expected SamplingParams or a list of them"):
                llm.generate(TOKENS, params, use_tqdm=False)  # type: ignore[arg-type]


def test_a_step_without_memory_gives_its_own_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed step still held when the cache is emptied would stay taken."""
    held: list[object] = []

    class Block:
        def __init__(self) -> None:
            held.append(None)

        def __del__(self) -> None:
            held.pop()

    def launch(_: object) -> None:
        block = Block()
        raise torch.OutOfMemoryError(f"no room for {type(block)}")

    seen: list[int] = []
    with LLM("tiny", dtype="float32", **TINY) as llm, monkeypatch.context() as patched:
        patched.setattr(llm._engine.runner, "launch_forward", launch)
        patched.setattr(torch.cuda, "empty_cache", lambda: seen.append(len(held)))
        (output,) = llm.generate(TOKENS, SamplingParams(max_tokens=1), use_tqdm=False)
    assert output.error is not None and seen == [0]


@pytest.mark.parametrize(
    ("kv_cache_dtype", "name", "bytes_per_token"),
    [
        ("auto", "float32", 512),
        ("bfloat16", "bfloat16", 256),
        (torch.float16, "float16", 256),
        ("fp8", "fp8", 136),
        ("fp8_e4m3", "fp8", 136),
        ("int8", "int8", 136),
        ("int4", "int4", 72),
    ],
)
def test_the_report_names_what_pages_hold(kv_cache_dtype: Any, name: str, bytes_per_token: int) -> None:
    """tiny-64 has one head of 64 in one layer."""
    options = {**TINY, "dtype": torch.float32, "kv_cache_memory": 1 << 20}
    with LLM("tiny-64", kv_cache_dtype=kv_cache_dtype, **options) as llm:
        report = llm._engine.parts.report
        blocks = (1 << 20) // (16 * bytes_per_token) - 1  # but for the null block
        assert report.lines()[2].endswith(f"GiB of {name}, {blocks} blocks of 16 = {16 * blocks} tokens")
        (output,) = llm.generate(TOKENS, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True), use_tqdm=False)
        assert output.error is None and len(output.outputs[0].token_ids) == 4


def test_pages_that_the_model_or_the_device_cannot_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("llama-head-dim", tmp_path, head_dim=26)
    with pytest.raises(ValueError, match=r"kv_cache_dtype = int4: .*head_dim is 26: use --kv-cache-dtype int8"):
        LLM(str(tmp_path), kv_cache_dtype="int4", device="cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(setup, "pick_device", lambda _: torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"kv_cache_dtype = fp8: .* NVIDIA A100 has 8\.0"):  # before anything is read
        LLM(str(tmp_path / "none"), kv_cache_dtype="fp8")
