"""Numbers of few bits as the tensors of a format, and the config that says so.

Written as the readers of vLLM and transformers take them (`layers/schemes/formats` reads them
here): compressed-tensors' pack-quantized, int-quantized and float-quantized, AutoGPTQ's first
version, AutoAWQ's "gemm".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.quantize.gptq import DAMPENING
from octavo.quantize.grid import Grid, Rounded
from octavo.quantize.options import COMPRESSED, Options

VISION = ("vision_tower", "multi_modal_projector")
"""Parts of a model that sees, which stay as they are."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is output AWQ_ORDER[i] of its eight


def scale_dtype(options: Options, checkpoint: torch.dtype) -> torch.dtype:
    """In which scales are stored. checkpoint: the type of plain weights."""
    return checkpoint if options.format == COMPRESSED else torch.float16


def grid_of(options: Options, group: int, checkpoint: torch.dtype) -> Grid:
    """What weights are rounded to."""
    assert options.bits is not None and options.symmetric is not None
    # AutoGPTQ's first version stores zeros minus one, and a zero of 0 is another number there.
    lowest = 1 if options.format == "gptq" else 0
    return Grid(options.bits, group, options.symmetric, scale_dtype(options, checkpoint), lowest)


def problem(options: Options, rows: int, inputs: int) -> str | None:
    """Why a projection [rows, inputs] cannot be held."""
    if options.whole_rows:
        return None
    assert options.bits is not None
    in_word = 32 // options.bits
    if options.format == "awq":
        return f"{rows} outputs are not a multiple of 8, as awq's words need" if rows % 8 else None
    if inputs % in_word:
        return f"{inputs} inputs are not a multiple of {in_word}, as words of 32 bits need"
    if options.format == "gptq" and rows % in_word:
        return f"{rows} outputs are not a multiple of {in_word}, as gptq's zeros need"
    return None


def tensors_of(rounded: Rounded, options: Options) -> dict[str, Tensor]:
    """The tensors of one projection, by the end of their names."""
    if options.whole_rows:
        return _contiguous({"weight": rounded.numbers, "weight_scale": rounded.scales})
    assert rounded.zeros is not None and options.bits is not None
    numbers, scales, zeros, bits = rounded.numbers, rounded.scales, rounded.zeros, options.bits
    if options.format == "awq":
        tensors = {
            "qweight": pack_words(_in_eights(numbers.t()), 4),
            "qzeros": pack_words(_in_eights(zeros.t()), 4),
            "scales": scales.t(),
        }
    elif options.format == "gptq":
        groups = rounded.groups
        if groups is None:
            depth, count = numbers.shape[1], scales.shape[1]
            groups = torch.arange(count, dtype=torch.int32).repeat_interleave(depth // count)
        tensors = {
            "qweight": pack_words(numbers, bits).t(),
            "qzeros": pack_words(zeros.t() - 1, bits),
            "scales": scales.t(),
            "g_idx": groups,
        }
    else:
        tensors = {
            "weight_packed": pack_words(numbers, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(numbers.shape),
        }
        if not options.symmetric:
            missing = -len(zeros) % (32 // bits)
            rows = torch.nn.functional.pad(zeros.t(), (0, missing))
            tensors["weight_zero_point"] = pack_words(rows, bits).t()
    return _contiguous(tensors)


def pack_words(numbers: Tensor, bits: int) -> Tensor:
    """uint8 [a, b] below `1 << bits` -> int32 [a, b * bits / 32], the first in the lowest bits. bits:
    4 or 8.
    """
    octets = numbers[:, 0::2] | numbers[:, 1::2] << 4 if bits == 4 else numbers
    return octets.flatten().view(torch.int32).view(len(numbers), -1)


def _in_eights(numbers: Tensor) -> Tensor:
    """[a, b] with each eight in AWQ's order."""
    return numbers.reshape(len(numbers), -1, 8)[..., list(AWQ_ORDER)].flatten(1)


def config_of(options: Options, group: int, *, sees: bool) -> dict[str, Any]:
    """`quantization_config` of config.json. group: -1 for whole rows. sees: whether the model has a
    vision part.
    """
    if options.format == "gptq":
        config = {
            "quant_method": "gptq",
            "bits": options.bits,
            "group_size": group,
            "sym": options.symmetric,
            "desc_act": options.desc_act,
            "checkpoint_format": "gptq",
            "damp_percent": DAMPENING,
            "true_sequential": True,
            "lm_head": False,
        }
        return config | ({"dynamic": {f"-:.*{part}.*": {} for part in VISION}} if sees else {})
    if options.format == "awq":
        config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        return config | {"modules_to_not_convert": list(VISION) if sees else None}
    return {
        "quant_method": COMPRESSED,
        "format": _COMPRESSED_FORMATS.get(options.method, "pack-quantized"),
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], **_compressed_group(options, group)}},
        "ignore": ["lm_head", *(f"re:.*{part}.*" for part in VISION if sees)],
        "kv_cache_scheme": None,
    }


_COMPRESSED_FORMATS = {"int8": "int-quantized", "fp8": "float-quantized"}


def _compressed_group(options: Options, group: int) -> Mapping[str, Any]:
    kind = "float" if options.method == "fp8" else "int"
    numbers = {"num_bits": options.bits, "type": kind, "symmetric": options.symmetric, "dynamic": False}
    if options.whole_rows:
        inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
        return {"weights": {**numbers, "strategy": "channel"}, "input_activations": inputs}
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    order = {"actorder": "weight"} if options.desc_act else {}
    return {"weights": {**numbers, **strategy, **order}, "input_activations": None}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
