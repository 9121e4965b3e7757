"""EngineConfig: values and messages, and the flags derived from it."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from octavo.config import AUTO_LENGTH, EngineConfig
from octavo.options import add_flags, from_flags, parse_bytes, parse_count


def parse(*words: str) -> EngineConfig:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser, EngineConfig, title="engine")
    return from_flags(EngineConfig, parser.parse_args(words))


def test_no_flags_give_the_defaults() -> None:
    assert parse() == EngineConfig()


def test_vllm_command_line() -> None:
    line = (
        "--model m --tensor-parallel-size 1 --gpu-memory-utilization 0.9 --max-model-len 25k --max-num-seqs 32 "
        "--no-enable-prefix-caching --enforce-eager --dtype half --served-model-name a b --kv-cache-memory 2GiB"
    )
    config = parse(*line.split())
    assert config == EngineConfig(
        model="m",
        max_model_len=25_000,
        max_num_seqs=32,
        enable_prefix_caching=False,
        enforce_eager=True,
        dtype="float16",
        served_model_name=("a", "b"),
        kv_cache_memory=2 * 2**30,
    )
    assert config.model_name == "a"


@pytest.mark.parametrize("word", ["auto", "-1"])
def test_automatic_length(word: str) -> None:
    assert parse("--max-model-len", word).max_model_len == AUTO_LENGTH


def test_every_field_has_a_flag_and_a_help_text() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineConfig, title="engine")
    text = parser.format_help()
    for field in dataclasses.fields(EngineConfig):
        assert "--" + field.name.replace("_", "-") in text
        assert field.metadata["help"].endswith(".")


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("25k", 25_000), ("25K", 25_600), ("1.5m", 1_500_000), ("25.6k", 25_600), ("-1", -1)],
)
def test_counts(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "k", "1.5", "2.0001k", "1e3", "0x10", "1 2", "25kk", "nan"])
def test_counts_refused(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2GiB", 2**31),
        ("2 GiB", 2**31),
        ("2gb", 2 * 10**9),
        ("1.5G", 3 * 2**29),
        ("512M", 2**29),
        ("77", 77),
        ("77b", 77),
    ],
)
def test_bytes(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "2XB", "2GiBB"])
def test_bytes_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("model", "", "folder"),
        ("dtype", "int8", "bfloat16"),
        ("device", "tpu", "cuda"),
        ("kv_cache_dtype", "fp8_e5m2", "fp8_e4m3, int8, int4"),
        ("load_format", "pt", "safetensors"),
        ("batching", "dynamic", "continuous"),
        ("scheduling_policy", "lifo", "priority"),
        ("seed", -1, "0"),
        ("max_model_len", 0, "1"),
        ("max_model_len", -2, "auto"),
        ("max_num_seqs", 0, "1"),
        ("max_num_batched_tokens", 0, "1"),
        ("max_waiting", -1, "0"),
        ("block_size", 24, "16"),
        ("gpu_memory_utilization", 0.0, "at most 1"),
        ("gpu_memory_utilization", 1.01, "at most 1"),
        ("gpu_memory_utilization", float("nan"), "at most 1"),
        ("kv_cache_memory", 0, "1"),
        ("cudagraph_capture_sizes", (0, 8), "1"),
        ("served_model_name", ("",), "256"),
        ("tensor_parallel_size", 2, "only 1"),
        ("quantization", "bitsandbytes", "fp8, int8, int4, gptq"),
    ],
)
def test_bad_values_name_field_value_and_limit(field: str, value: object, limit: str) -> None:
    with pytest.raises(ValueError) as caught:
        EngineConfig(**{field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} = ")
    assert limit in message.partition(": ")[2]


def test_what_python_programs_have_at_hand() -> None:
    """A path, torch's types and devices, numpy's numbers, lists."""
    import numpy as np
    import torch

    given = EngineConfig(
        model=Path("/models/one"),  # type: ignore[arg-type]
        tokenizer=Path("/models/two"),  # type: ignore[arg-type]
        chat_template=Path("chat.jinja"),  # type: ignore[arg-type]
        generation_config=Path("/models"),  # type: ignore[arg-type]
        dtype=torch.half,  # type: ignore[arg-type]
        device=torch.device("cpu"),  # type: ignore[arg-type]
        max_num_seqs=np.int64(8),  # type: ignore[arg-type]
        gpu_memory_utilization=1,
        served_model_name=["a", "b"],  # type: ignore[arg-type]
        cudagraph_capture_sizes=[8, 1],  # type: ignore[arg-type]
    )
    assert given == EngineConfig(
        model="/models/one",
        tokenizer="/models/two",
        chat_template="chat.jinja",
        generation_config="/models",
        dtype="float16",
        device="cpu",
        max_num_seqs=8,
        gpu_memory_utilization=1.0,
        served_model_name=("a", "b"),
        cudagraph_capture_sizes=(1, 8),
    )
    assert [type(value) for value in (given.model, given.dtype, given.device)] == [str] * 3
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    assert {dtype: EngineConfig(dtype=dtype).dtype for dtype in names} == names  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("dtype", "torch.float64", "'float64': must be one of auto, float32"),
        ("dtype", None, "'None': must be one of"),
        ("model", 5, "5: must be text, not of type int"),
        ("model", None, "None: must be text, not of type NoneType"),
        ("tokenizer", b"x", "b'x': must be text or None, not of type bytes"),
        ("max_model_len", "4096", "'4096': must be an integer or None, not of type str"),
        ("max_num_seqs", 8.0, "8.0: must be an integer or None, not of type float"),
        ("max_num_seqs", True, "True: must be an integer or None, not of type bool"),
        ("seed", None, "None: must be an integer, not of type NoneType"),
        ("kv_cache_memory", "2GiB", "'2GiB': must be an integer or None, not of type str"),
        ("gpu_memory_utilization", "0.9", "'0.9': must be a number, not of type str"),
        ("enforce_eager", "no", "'no': must be True or False, not of type str"),
        ("enable_prefix_caching", 1, "1: must be True or False, not of type int"),
        ("served_model_name", 5, "5: must be a list, each of it text, not of type int"),
        ("served_model_name", ["a", 5], "['a', 5]: must be a list, each of it text"),
        ("cudagraph_capture_sizes", 8, "8: must be a list, each of it an integer, not of type int"),
        ("cudagraph_capture_sizes", "8", "'8': must be a list, each of it an integer, not of type str"),
        ("scheduling_policy", ["fcfs"], "['fcfs']: must be text, not of type list"),
    ],
)
def test_values_of_a_wrong_type(field: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        EngineConfig(**{field: value})
    assert str(caught.value).startswith(f"{field} = {said}")


def test_values_that_depend_on_the_device() -> None:
    cpu, gpu = EngineConfig().for_device("cpu"), EngineConfig().for_device("cuda")
    assert (cpu.block_size, cpu.kv_cache_memory) == (16, 2 * 2**30)
    assert (gpu.block_size, gpu.kv_cache_memory) == (64, None)
    given = EngineConfig(block_size=32, max_num_seqs=8, max_num_batched_tokens=64, kv_cache_memory=5)
    resolved = given.for_device("cpu")
    assert dataclasses.replace(given, device="cpu") == resolved


def test_a_step_holds_one_token_of_every_running_request() -> None:
    assert EngineConfig(max_num_seqs=1000).for_device("cpu").max_num_batched_tokens == 1000
    for chunked, given, budget in ((True, None, 512), (False, None, 4000), (False, 600, 600)):
        config = EngineConfig(max_num_batched_tokens=given, enable_chunked_prefill=chunked)
        assert config.for_device("cpu", 4000).max_num_batched_tokens == budget
    with pytest.raises(ValueError, match="max_num_batched_tokens = 10"):
        EngineConfig(max_num_seqs=20, max_num_batched_tokens=10).for_device("cpu")


def test_no_graph_is_larger_than_a_batch() -> None:
    with pytest.raises(ValueError, match=r"cudagraph_capture_sizes = \(8, 64\): .* at most max_num_seqs = 32"):
        EngineConfig(cudagraph_capture_sizes=(64, 8), max_num_seqs=32)
    with pytest.raises(ValueError, match=r"cudagraph_capture_sizes = \(512,\): .* max_num_seqs = 256"):
        EngineConfig(cudagraph_capture_sizes=(512,)).for_device("cuda")
    assert EngineConfig(cudagraph_capture_sizes=(512,)).for_device("cpu").max_num_seqs == 64
    assert EngineConfig(cudagraph_capture_sizes=(1, 32), max_num_seqs=32).for_device("cuda").max_num_seqs == 32
