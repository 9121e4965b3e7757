"""A layer's matrices in few bits, by each method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from octavo.layers.norm import RMSNorm
from octavo.model_config import ModelError
from octavo.models.decoder import DecoderLayer
from octavo.quantize.awq import awq, find_scales
from octavo.quantize.gptq import gptq
from octavo.quantize.grid import Grid, Rounded
from octavo.quantize.layer import Activations, Moments, WatchedScheme, matrices

GridOf = Callable[[int], Grid]
"""The grid of a matrix with so many inputs."""


@dataclass
class Result:
    """What becomes of a layer: its projections in few bits, and the tensors that stay plain but
    hold other numbers than before. By our names, projections without ".weight".
    """

    rounded: dict[str, Rounded] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)

    def add(self, scheme: WatchedScheme, rounded: Rounded) -> None:
        """A matrix, projection by projection."""
        for name, start, rows in scheme.matrix.spans():
            self.rounded[name] = rounded.rows(start, start + rows)


def by_gptq(
    layer: DecoderLayer,
    activations: Activations,
    grid_of: GridOf,
    *,
    by_activation: bool,
    groups_in_place: bool,
) -> Result:
    """Matrix after matrix, each for the inputs that it has behind those that are rounded already."""
    result = Result()
    for scheme in matrices(layer):
        (moments,) = activations.look(layer, [scheme])
        try:
            grid = grid_of(scheme.matrix.in_features)
            rounded = gptq(
                scheme.weight,
                moments.products,
                grid,
                by_activation=by_activation,
                groups_in_place=groups_in_place,
            )
        except ValueError as error:
            raise ModelError(f"{' and '.join(scheme.matrix.projections)}: {error}") from None
        result.add(scheme, rounded)
        scheme.weight.copy_(rounded.dequantise())
    return result


def by_awq(
    layer: DecoderLayer,
    activations: Activations,
    grid_of: GridOf,
    *,
    clips: bool,
    dtype_of: Callable[[str], torch.dtype],
) -> Result:
    """Scales for each matrix, which its producer takes back; then all are rounded.

    dtype_of: a plain tensor's, in the file.
    """
    result = Result()
    all_four = qkv, out, gate_up, down = matrices(layer)
    seen = dict(zip(all_four, activations.look(layer, all_four), strict=True))
    # All are found for the layer as it is, before any of them changes it.
    found = {
        scheme: find_scales(
            scheme.weight, moments.products, _magnitude(scheme, layer, moments), grid_of(scheme.matrix.in_features)
        )
        for scheme, moments in seen.items()
    }
    for norm, reader in ((layer.input_norm, qkv), (layer.mlp_norm, gate_up)):
        found[reader] = _into_norm(norm, found[reader], dtype_of(f"{norm.name}.weight"), result)
    sizes = layer.attention.sizes
    heads = sizes[0] // sizes[2]
    _into_rows(qkv, sum(sizes[:2]), _of_kv_heads(found[out], layer, heads)[:, 0].flatten())
    _into_rows(gate_up, down.matrix.in_features, found[down])
    for scheme, moments in seen.items():
        scales = found[scheme]
        scheme.weight.mul_(scales)
        products = moments.products.div_(scales).div_(scales.unsqueeze(1))
        rows = len(scheme.weight)
        # What queries and keys give meets in a product of both, of which no error is known here.
        clipped = range(sum(sizes[:2]) if scheme is qkv else 0, rows) if clips else range(0)
        result.add(scheme, awq(scheme.weight, products, grid_of(scheme.matrix.in_features), clipped_rows=clipped))
    for scheme in (qkv, gate_up):  # whose rows took scales in
        if scheme.bias is not None:
            for name, start, rows in scheme.matrix.spans():
                result.plain[f"{name}.bias"] = scheme.bias[start : start + rows].to(dtype_of(f"{name}.bias"))
    return result


def _of_kv_heads(per_input: Tensor, layer: DecoderLayer, heads: int) -> Tensor:
    """[K] of the output projection -> [KV heads, heads of each, head size]."""
    return per_input.view(-1, heads, layer.attention.head_dim)


def _magnitude(scheme: WatchedScheme, layer: DecoderLayer, moments: Moments) -> Tensor:
    """What scales are made of; heads that share their values share it."""
    if scheme is not layer.attention.out:
        return moments.magnitude
    heads = layer.attention.sizes[0] // layer.attention.sizes[2]
    shared = _of_kv_heads(moments.magnitude, layer, heads)
    return shared.mean(1, keepdim=True).expand_as(shared).flatten()


def _into_norm(norm: RMSNorm, scales: Tensor, dtype: torch.dtype, result: Result) -> Tensor:
    """Divides a norm's weight by the scales, and returns those that this came to: the weight is
    kept in `dtype`, and its rounding need not be lost.
    """
    weight = norm.weight.float()
    less = 1.0 if norm.add_one else 0.0
    kept = (weight / scales - less).to(dtype)
    came_to = weight / (kept.float() + less)
    good = came_to.isfinite() & (came_to > 0)  # of zeros nothing is known
    kept = torch.where(good, kept, (weight - less).to(dtype))
    result.plain[f"{norm.name}.weight"] = kept
    return torch.where(good, came_to, 1.0)


def _into_rows(producer: WatchedScheme, start: int, scales: Tensor) -> None:
    """Divides rows from `start` on, which make the inputs that are to be scaled."""
    rows = slice(start, start + len(scales))
    producer.weight[rows].div_(scales.unsqueeze(1))
    if producer.bias is not None:
        producer.bias[rows].div_(scales)
