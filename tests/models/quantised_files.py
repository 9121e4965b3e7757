"""Checkpoints in every quantised format, written number by number from what the formats say.

Nothing here is the product's: words are put together in numpy, and each writer returns the weight
that its tensors mean, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is output AWQ_ORDER[i] of its eight


@dataclass
class Written:
    """What a writer makes of one weight."""

    tensors: Tensors  # by the end of their names
    weight: torch.Tensor  # [N, K] float32: what they mean
    round_input: Callable[[torch.Tensor], torch.Tensor] | None = None


Writer = Callable[[torch.Tensor], Written]


@dataclass
class Case:
    """A format with its options, and the config that says so."""

    config: dict[str, Any]
    writer: Callable[[str], Writer | None]  # of a module's name; None: it stays plain
    own_file: str | None = None  # the config's, where it is not in config.json
    extra: Tensors = field(default_factory=dict)
    head: bool = False  # whether lm_head is quantised too


def pack(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """[a, b] of unsigned numbers -> [a, b * bits / 32] int32; place i of a word is number order[i]."""
    count = 32 // bits
    numbers = numbers.astype(np.uint64).reshape(numbers.shape[0], -1, count)
    words = np.zeros(numbers.shape[:2], dtype=np.uint64)
    for place, which in enumerate(order or range(count)):
        words |= numbers[:, :, which] << np.uint64(place * bits)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def grouped(
    weight: torch.Tensor, bits: int, group_of: np.ndarray, sym: bool, low_zero: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """numbers [N, K], scales [N, G] (float16), zeros [N, G], and the weight they mean; group_of [K]."""
    values = weight.double().numpy()
    top = 2**bits - 1
    groups = int(group_of.max()) + 1
    numbers, meant = np.zeros(values.shape, dtype=np.int64), np.zeros(values.shape)
    scales, zeros = np.zeros((len(values), groups)), np.zeros((len(values), groups), dtype=np.int64)
    for group in range(groups):
        columns = group_of == group
        part = values[:, columns]
        if sym:
            scale = np.abs(part).max(1) / (top / 2)
            zero = np.full(len(part), (top + 1) // 2)
        else:
            scale = (np.maximum(part.max(1), 0) - np.minimum(part.min(1), 0)) / top
            zero = np.clip(np.round(-np.minimum(part.min(1), 0) / scale), low_zero, top)
        scale = scale.astype(np.float16).astype(np.float64)
        scales[:, group], zeros[:, group] = scale, zero
        number = np.clip(np.round(part / scale[:, None]) + zero[:, None], 0, top)
        numbers[:, columns] = number
        meant[:, columns] = (number - zero[:, None]) * scale[:, None]
    return numbers, scales, zeros, meant


def group_index(inputs: int, group: int, shuffled: bool, seed: int = 0) -> np.ndarray:
    index = np.arange(inputs) // (inputs if group == -1 else group)
    return np.random.default_rng(seed).permutation(index) if shuffled else index


def half(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.copy()).half()


def gptq(bits: int, group: int, *, sym: bool, act_order: bool = False, version: str = "gptq", seed: int = 0) -> Writer:
    def write(weight: torch.Tensor) -> Written:
        index = group_index(weight.shape[1], group, act_order, seed)
        numbers, scales, zeros, meant = grouped(weight, bits, index, sym, low_zero=1)
        tensors = {
            "qweight": pack(numbers, bits).t(),
            "qzeros": pack(zeros.T - (version == "gptq"), bits),
            "scales": half(scales.T),
            "g_idx": torch.from_numpy(index).int(),
        }
        return Written(tensors, torch.from_numpy(meant).float())

    return write


def gptq_case(bits: int, group: int, *, sym: bool, act_order: bool = False, version: str = "gptq") -> Case:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": act_order}
    config |= {"checkpoint_format": version, "damp_percent": 0.01, "true_sequential": True}
    return Case(config, lambda name: gptq(bits, group, sym=sym, act_order=act_order, version=version))


def awq_case(group: int) -> Case:
    def write(weight: torch.Tensor) -> Written:
        numbers, scales, zeros, meant = grouped(weight, 4, group_index(weight.shape[1], group, False), sym=False)
        tensors = {
            "qweight": pack(numbers.T, 4, AWQ_ORDER),
            "qzeros": pack(zeros.T, 4, AWQ_ORDER),
            "scales": half(scales.T),
        }
        return Written(tensors, torch.from_numpy(meant).float())

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Case(config, lambda name: write)


def packed(bits: int, group: int, *, sym: bool, act_order: bool = False) -> Writer:
    def write(weight: torch.Tensor) -> Written:
        index = group_index(weight.shape[1], group, act_order)
        numbers, scales, zeros, meant = grouped(weight, bits, index, sym)
        tensors = {
            "weight_packed": pack(numbers, bits),
            "weight_scale": half(scales),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not sym:
            tensors["weight_zero_point"] = pack(zeros.T, bits).t()
        if act_order:
            tensors["weight_g_idx"] = torch.from_numpy(index).int()
        return Written(tensors, torch.from_numpy(meant).float())

    return write


def packed_args(bits: int, group: int, *, sym: bool, act_order: bool = False) -> dict[str, Any]:
    strategy = "channel" if group == -1 else "group"
    size = None if group == -1 else group
    order = {"actorder": "group"} if act_order else {}
    return {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": strategy, "group_size": size} | order


def eight_bits(
    dtype: torch.dtype,
    *,
    per_row: bool,
    inputs: str | None,
    names: tuple[str, str] = ("weight_scale", "input_scale"),
    static: float = 2.5,
) -> Writer:
    """inputs: None, "dynamic" or "static", where `static` is the largest (some are beyond it);
    names: of the scales.
    """
    top = 127.0 if dtype == torch.int8 else 448.0

    def to_grid(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
        q = (x / scale).clamp(-top, top)
        return q.round() if dtype == torch.int8 else q.to(dtype).float()

    def write(weight: torch.Tensor) -> Written:
        largest = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max()
        scale = largest / top
        numbers = to_grid(weight, scale)
        tensors = {"weight": numbers.to(dtype), names[0]: scale}
        if inputs is None:
            return Written(tensors, numbers * scale)
        if inputs == "static":
            step = static / top
            tensors[names[1]] = torch.tensor([step])
            return Written(tensors, numbers * scale, lambda x: to_grid(x, step) * step)

        def by_token(x: torch.Tensor) -> torch.Tensor:
            own = x.abs().amax(-1, keepdim=True) / top
            return to_grid(x, own) * own

        return Written(tensors, numbers * scale, by_token)

    return write


def byte_args(dtype: torch.dtype, *, per_row: bool, inputs: str | None) -> dict[str, Any]:
    kind = "int" if dtype == torch.int8 else "float"
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel" if per_row else "tensor"}
    if inputs is None:
        return {"weights": weights, "input_activations": None}
    strategy = "token" if inputs == "dynamic" else "tensor"
    given = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": inputs == "dynamic"}
    return {"weights": weights, "input_activations": given}


def compressed(
    *groups: tuple[dict[str, Any], str, list[str]], ignore: tuple[str, ...] = ("lm_head",)
) -> dict[str, Any]:
    """groups: (what the group says, its format, its targets)."""
    formats = {form for _, form, _ in groups}
    table = {
        f"group_{i}": {"targets": targets, "format": form, **args} for i, (args, form, targets) in enumerate(groups)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": table,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def packed_case(bits: int, group: int, *, sym: bool, act_order: bool = False) -> Case:
    weights = packed_args(bits, group, sym=sym, act_order=act_order)
    config = compressed(({"weights": weights, "input_activations": None}, "pack-quantized", ["Linear"]))
    return Case(config, lambda name: packed(bits, group, sym=sym, act_order=act_order))


def byte_case(dtype: torch.dtype, *, per_row: bool, inputs: str | None) -> Case:
    form = "int-quantized" if dtype == torch.int8 else "float-quantized"
    args = byte_args(dtype, per_row=per_row, inputs=inputs)
    return Case(compressed((args, form, ["Linear"])), lambda name: eight_bits(dtype, per_row=per_row, inputs=inputs))


def quantise(folder: Path, reference: torch.nn.Module, case: Case) -> None:
    """Rewrites a folder in the case's format, and gives `reference` the weights that it means."""
    tensors = load_file(folder / "model.safetensors")
    modules = dict(reference.named_modules())
    for name, module in modules.items():
        if not isinstance(module, torch.nn.Linear) or (name == "lm_head" and not case.head):
            continue
        writer = case.writer(name)
        if writer is None:
            continue
        written = writer(module.weight.data)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{end}": tensor.contiguous() for end, tensor in written.tensors.items()}
        module.weight.data = written.weight
        if written.round_input is not None:
            module.register_forward_pre_hook(lambda _, args, round_=written.round_input: (round_(args[0]),))
    save_file(tensors | case.extra, folder / "model.safetensors")
    path = folder / "config.json"
    if case.own_file is None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": case.config}))
    else:
        (folder / case.own_file).write_text(json.dumps(case.config))
