"""Building an engine: device, model, KV memory, core, graphs; and the report that start-up prints.

KV memory is taken last: on a GPU from what is left of `gpu_memory_utilization` after a rehearsal of
the largest step, on a CPU from `kv_cache_memory`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from octavo import _core
from octavo.config import AUTO_LENGTH, EngineConfig
from octavo.engine import host_memory
from octavo.engine.cuda_graph import GraphSizes
from octavo.engine.drafting import DraftModel
from octavo.engine.gate import Gate, Verdict
from octavo.engine.kv_layout import KvLayout, pick_kv_dtype, refuse_kv_dtype_of_device
from octavo.engine.model_runner import ModelRunner
from octavo.engine.step_buffers import StepBuffers
from octavo.engine.warm_up import rehearse_layers, warm_up
from octavo.model_config import ModelConfig
from octavo.pooling import Embeddings
from octavo.speculation import SELF
from octavo.weights.draft import load_draft
from octavo.weights.load import LoadedModel, load_model

logger = logging.getLogger(__name__)

GRAPH_BYTES = 16 << 20
"""Memory set aside for one captured graph's own bookkeeping; its activations are shared with the
rehearsed step's.
"""

MEMORY_FLAG = {"cuda": "--gpu-memory-utilization", "cpu": "--kv-cache-memory"}


@dataclass(frozen=True)
class StartupReport:
    """What start-up decided, for the log and for benchmarks."""

    device: str
    dtype: str
    dtype_reason: str
    weight_bytes: int
    kv_dtype: str
    kv_bytes: int
    num_blocks: int
    block_size: int
    kv_tokens: int
    max_concurrency: float
    kernels: str
    speculation: str
    sampling: str
    embeddings: str
    verdict: Verdict | None  # on what is in few bits by the user's wish
    load_seconds: float
    total_seconds: float

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        return [
            f"device       {self.device}, {self.dtype} ({self.dtype_reason})",
            f"weights      {self.weight_bytes / 2**30:.2f} GiB in {self.load_seconds:.1f} s",
            f"KV cache     {self.kv_bytes / 2**30:.2f} GiB of {self.kv_dtype}, "
            f"{self.num_blocks - 1} blocks of {self.block_size} = {self.kv_tokens} tokens",
            *([f"quality      {line}" for line in self.verdict.lines()] if self.verdict else []),
            f"concurrency  {self.max_concurrency:.1f} requests of the full model length",
            f"kernels      {self.kernels}",
            *([f"sampling     {self.sampling}"] if self.sampling else []),
            *([f"embeddings   {self.embeddings}"] if self.embeddings else []),
            *([f"speculation  {self.speculation}"] if self.speculation else []),
            f"set up in    {self.total_seconds:.1f} s",
        ]


@dataclass
class EngineParts:
    """What `Engine` is made of."""

    config: EngineConfig
    core: _core.EngineCore
    runner: ModelRunner
    buffers: tuple[StepBuffers, StepBuffers]
    tokenizer: _core.Tokenizer | None
    grammars: _core.GrammarCompiler | None
    chat_template: _core.ChatTemplate | None
    model_name: str
    model_config: ModelConfig
    max_model_len: int
    generation_defaults: dict[str, Any]
    embeddings: Embeddings | None
    generates: bool
    report: StartupReport


def build_engine(config: EngineConfig) -> EngineParts:
    """Loads and sizes everything. Raises `ValueError` naming the field or file for what the user
    can mend.
    """
    started = time.monotonic()
    device = pick_device(config.device)
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    config.for_device(kind)  # what contradicts itself is refused before anything is loaded
    refuse_kv_dtype_of_device(config.kv_cache_dtype, device)
    if config.cpu_threads is not None:
        _core.set_cpu_threads(config.cpu_threads)
        torch.set_num_threads(config.cpu_threads)

    def refuse_early(model_config: ModelConfig, dtype: torch.dtype) -> None:
        pick_max_model_len(config, model_config)
        pick_kv_dtype(config.kv_cache_dtype, model_dtype=dtype, head_dim=model_config.head_dim, device=device)

    gate = Gate(config, device) if Gate.is_for(config) else None
    loaded = load_model(config, device=device, check=refuse_early, judge=gate)
    verdict = None if gate is None else gate.conclude(loaded.model)
    max_model_len = pick_max_model_len(config, loaded.config, None if loaded.generates else loaded.embeddings)
    config = config.for_device(kind, max_model_len)
    max_num_seqs, max_num_batched_tokens = known(config.max_num_seqs), known(config.max_num_batched_tokens)
    block_size = known(config.block_size)
    kv_dtype = pick_kv_dtype(
        config.kv_cache_dtype, model_dtype=loaded.dtype, head_dim=loaded.config.head_dim, device=device
    )
    graph_sizes = GraphSizes()
    if device.type == "cuda" and not config.enforce_eager:
        graph_sizes = GraphSizes.ladder(
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            list(config.cudagraph_capture_sizes),
            num_draft_tokens=config.num_draft_tokens,
        )
    draft = draft_model(config, loaded, max_model_len, device)
    load_seconds = time.monotonic() - started
    runner = ModelRunner(
        loaded,
        device=device,
        kv_layout=KvLayout.of(
            loaded.model,
            block_size=block_size,
            dtype=kv_dtype,
            plain_dtype=loaded.dtype,
            plain_layers=() if gate is None else gate.layers_with_plain_kv,
        ),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        num_draft_tokens=config.num_draft_tokens,
        graph_sizes=graph_sizes,
        draft=draft,
        draft_kv_dtype=pick_draft_kv_dtype(config, draft, device) if draft else None,
    )
    weight_bytes = loaded.model.weight_bytes() + (draft.weight_bytes if draft else 0)
    num_graphs = len(graph_sizes.shapes()) + (len(runner.proposer.shapes()) if runner.proposer else 0)
    num_blocks = pick_num_blocks(config, runner, graphs=num_graphs)
    core_options: dict[str, Any] = dict(
        num_blocks=num_blocks,
        block_size=block_size,
        kv_windows=[group.window for group in loaded.model.kv_groups],
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        vocab_size=loaded.config.vocab_size,
        vector_size=loaded.embeddings.size if loaded.embeddings else 0,
        eos_token_ids=loaded.eos_token_ids,
        max_waiting=config.max_waiting,
        batching=config.batching,
        scheduling_policy=config.scheduling_policy,
        enable_prefix_caching=config.enable_prefix_caching,
        enable_chunked_prefill=config.enable_chunked_prefill,
        graph_sizes=graph_sizes.decodes,
        prefill_graph_tokens=graph_sizes.prefill_tokens,
        prefill_graph_decodes=graph_sizes.prefill_decodes,
        prefill_graph_rows=graph_sizes.prefill_rows,
        draft_graphs=graph_sizes.drafts,
        prefill_draft_graphs=graph_sizes.prefill_drafts,
        num_draft_tokens=config.num_draft_tokens,
        speculation=config.speculation and config.speculation.core_options(),
        # A secret of this process, so that nobody can make two prompts share cached blocks by
        # crafting a collision.
        hash_secret=os.urandom(32),
        seed=config.seed,
        tokenizer=loaded.tokenizer,
    )
    core = _core.EngineCore(max_model_len=max_model_len, **core_options)
    if core.longest_request < max_model_len:
        if config.max_model_len != AUTO_LENGTH:
            gib = num_blocks * runner.block_bytes / 2**30
            raise ValueError(
                f"kv cache: {gib:.2f} GiB ({num_blocks - 1} blocks) hold at most "
                f"{core.longest_request} tokens of one request, but max_model_len = {max_model_len}: "
                f"lower --max-model-len (auto takes what fits), or raise {MEMORY_FLAG[device.type]}"
            )
        max_model_len = core.longest_request
        core = _core.EngineCore(max_model_len=max_model_len, **core_options)
    buffers = (
        StepBuffers(core.plan_bytes, core.result_bytes, device),
        StepBuffers(core.plan_bytes, core.result_bytes, device),
    )
    runner.allocate_kv(num_blocks)
    if device.type == "cuda":
        logger.info("preparing the kernels (the first start on a machine compiles them, about half a minute)")
        rehearse_layers(loaded.model)
        if draft is not None:
            rehearse_layers(draft.model)
        runner.capture_graphs()
        warm_up(runner, buffers[0], core_options | {"max_model_len": max_model_len})
    kv_tokens = (num_blocks - 1) * block_size // runner.kv_layout.num_groups
    report = StartupReport(
        device=torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {_core.cpu_threads()} threads of {_core.cpu_levels()[-1]} and {torch.get_num_threads()} of torch",
        dtype=str(loaded.dtype).removeprefix("torch."),
        dtype_reason=loaded.dtype_reason,
        weight_bytes=weight_bytes,
        kv_dtype=runner.kv_layout.dtype_name,
        kv_bytes=num_blocks * runner.block_bytes,
        num_blocks=num_blocks,
        block_size=block_size,
        kv_tokens=kv_tokens,
        max_concurrency=kv_tokens / max_model_len,
        kernels=f"triton, {num_graphs} CUDA graphs" if device.type == "cuda" else "torch",
        speculation=describe_speculation(config, runner, num_blocks),
        sampling=describe_defaults(loaded.generation_defaults) if loaded.generates else "",
        embeddings=loaded.embeddings.line() if loaded.embeddings else "",
        verdict=verdict,
        load_seconds=load_seconds,
        total_seconds=time.monotonic() - started,
    )
    for line in report.lines():
        logger.info("%s", line)
    return EngineParts(
        config=config,
        core=core,
        runner=runner,
        buffers=buffers,
        tokenizer=loaded.tokenizer,
        grammars=loaded.tokenizer
        and _core.GrammarCompiler(loaded.tokenizer, loaded.config.vocab_size, loaded.eos_token_ids),
        chat_template=loaded.chat_template,
        model_name=config.model_name,
        model_config=loaded.config,
        max_model_len=max_model_len,
        generation_defaults=loaded.generation_defaults,
        embeddings=loaded.embeddings,
        generates=loaded.generates,
        report=report,
    )


def draft_model(
    config: EngineConfig, target: LoadedModel, max_model_len: int, device: torch.device
) -> DraftModel | None:
    """What drafts for `target` on the device, where `config` asks for such a method."""
    speculation = config.speculation
    if speculation is None or not speculation.drafts_by_model:
        return None
    loaded = load_draft(dataclasses.replace(config, max_model_len=max_model_len), speculation, target, device)
    shares_pages = speculation.method == SELF
    held = loaded.model.weight_bytes()
    if shares_pages:
        held -= sum(layer.own_bytes() for layer in (loaded.model.embedding, *loaded.model.head.layers()))
    return DraftModel(loaded.model, loaded.dtype, shares_pages, held)


def pick_draft_kv_dtype(config: EngineConfig, draft: DraftModel, device: torch.device) -> torch.dtype:
    """The dtype of a draft model's pages. Raises ValueError that names the key."""
    try:
        return pick_kv_dtype(
            config.kv_cache_dtype, model_dtype=draft.dtype, head_dim=draft.model.config.head_dim, device=device
        )
    except ValueError as error:
        raise ValueError(f"speculative_config: model: {error}") from None


def describe_speculation(config: EngineConfig, runner: ModelRunner, num_blocks: int) -> str:
    """Speculative decoding as the start-up report says it; empty where there is none."""
    if config.speculation is None:
        return ""
    line = config.speculation.line()
    if runner.proposer is not None:
        line += f"; {runner.proposer.draft.weight_bytes / 2**30:.2f} GiB of its weights"
        if runner.draft_layout is not None:
            line += f", {num_blocks * runner.draft_layout.block_bytes / 2**30:.2f} GiB of the KV cache"
    return line


def pick_device(wanted: str) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU."""
    if wanted == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: {wanted!r} asked for, but torch sees no CUDA device; use --device cpu or auto")
    return torch.device("cuda", 0) if wanted == "cuda" else torch.device(wanted)


def describe_defaults(defaults: Mapping[str, Any]) -> str:
    """The sampling defaults that come with the model, as the start-up report says them."""
    if not defaults:
        return "neutral defaults"
    shown = {name: f"for {len(value)} tokens" if name == "logit_bias" else value for name, value in defaults.items()}
    return "defaults of the model: " + ", ".join(f"{name} {value}" for name, value in shown.items())


def known(value: int | None) -> int:
    """A field that `EngineConfig.for_device` has filled in."""
    assert value is not None
    return value


def pick_max_model_len(config: EngineConfig, model_config: ModelConfig, embeddings: Embeddings | None = None) -> int:
    """The model's own length unless the user asks for less. Asking for more is refused: positions
    past it were never trained.

    embeddings: of a model that makes nothing else, whose files may name a length below.
    """
    limit = model_config.max_position_embeddings
    if config.max_model_len is None or config.max_model_len == AUTO_LENGTH:
        return limit if embeddings is None or embeddings.longest is None else min(limit, embeddings.longest)
    if config.max_model_len > limit:
        raise ValueError(
            f"max_model_len = {config.max_model_len}: must be at most the model's max_position_embeddings = {limit}"
        )
    return config.max_model_len


def pick_num_blocks(config: EngineConfig, runner: ModelRunner, graphs: int) -> int:
    """Blocks of the pool, the null block included, from the memory that is left or that was given."""
    if runner.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(runner.device)
        # What other processes hold is not ours to plan with.
        foreign = total - free - torch.cuda.memory_reserved(runner.device)
        peak = runner.profile_peak_bytes() + graphs * GRAPH_BYTES
        available = int(total * config.gpu_memory_utilization) - peak - foreign
        if config.kv_cache_memory is not None:
            available = min(available, config.kv_cache_memory)
    else:
        available = known(config.kv_cache_memory)
        total = host_memory.total_bytes()
        if available > total:
            raise ValueError(
                f"kv_cache_memory = {available} bytes: this machine has {total} ({total / 2**30:.2f} GiB); "
                f"lower {MEMORY_FLAG[runner.device.type]}"
            )
    num_blocks = available // runner.block_bytes
    if num_blocks < 2:
        raise ValueError(
            f"kv cache: {max(available, 0) / 2**30:.2f} GiB are left after weights and work space, "
            f"less than two blocks of {runner.block_bytes / 2**20:.1f} MiB: "
            f"raise {MEMORY_FLAG[runner.device.type]}, or lower "
            f"--max-num-batched-tokens"
        )
    return num_blocks
