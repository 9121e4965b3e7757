"""The matrices of a model's layers, and the group size that goes with all of them."""

from __future__ import annotations

from collections.abc import Mapping

from octavo.model_config import ModelConfig, ModelError
from octavo.quantize.formats import problem
from octavo.quantize.layer import WatchedSchemes, make_layer, matrices
from octavo.quantize.options import GROUPS, Options

Shapes = Mapping[str, tuple[int, int]]
"""Name of a projection of a layer, without the layer's prefix -> outputs, inputs."""


def projections(config: ModelConfig, schemes: WatchedSchemes) -> Shapes:
    """Of the first layer, whose shapes all others have."""
    found = {}
    for scheme in matrices(make_layer(config, 0, schemes)):
        for name, _, rows in scheme.matrix.spans():
            found[name.removeprefix("model.layers.0.")] = (rows, scheme.matrix.in_features)
    return found


def pick_group(options: Options, shapes: Shapes) -> int:
    """The group size, -1 for whole rows. Raises `ModelError` that names a projection and the groups
    that would do.
    """
    wanted = options.group_size
    for name, (rows, inputs) in shapes.items():
        if (reason := problem(options, rows, inputs)) is not None:
            raise ModelError(f"model.layers.0.{name}: {reason}; use --format compressed-tensors, or --method int8")
    if options.whole_rows or wanted == -1:
        return -1
    would_do = [group for group in GROUPS if all(inputs % group == 0 for _, inputs in shapes.values())]
    if wanted is None and would_do:
        return would_do[0]
    shown = ", ".join(map(str, would_do)) + (" or " if would_do else "") + "-1 (a scale a row)"
    for name, (_, inputs) in shapes.items():
        if wanted is not None and inputs % wanted:
            raise ModelError(
                f"--group-size {wanted}: does not divide the {inputs} inputs of model.layers.0.{name}; use {shown}"
            )
    if wanted is None:
        raise ModelError(
            f"--group-size: none of {', '.join(map(str, GROUPS))} divides the inputs of all matrices; use {shown}"
        )
    return wanted
