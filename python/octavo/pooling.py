"""Embeddings as a user asks for them: vLLM's `pooler_config`, its `runner`, and the parameters of a
request.

Knows keys and limits. What a model's files say of it is read by `octavo.weights.pooling`; the sums
are the device's (`kernels/step/pool.py`), the cut and the norm the core's (`rust/outbox/choice.rs`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo import _core

RUNNERS = ("auto", "generate", "pooling")
TASKS = ("auto", "generate", "embed", "embedding")
"""Of vLLM's older flag for the same; both of the latter are `pooling`."""

LAST, MEAN = "last", "mean"
POOLING_TYPES = (LAST, MEAN)
_OTHER_POOLING_TYPES = ("all", "cls", "step")
_SAME_KEYS = {"seq_pooling_type": "pooling_type", "use_activation": "normalize"}
"""Newer names of vLLM's."""


@dataclasses.dataclass(frozen=True)
class PoolerConfig:
    """What an embedding is made of, where the user says; None: what the model's files say, or the
    default. `ValueError` names the key.

    pooling_type: "last" (the hidden state of the prompt's last token) or "mean" (of all).
    normalize: whether vectors are brought to length 1.
    dimensions: how many numbers a vector has where a request does not say; of matryoshka models.
    """

    pooling_type: str | None = None
    normalize: bool | None = None
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if self.pooling_type is not None:
            object.__setattr__(self, "pooling_type", _pooling_type(self.pooling_type))
        if not isinstance(self.normalize, (bool, type(None))):
            raise ValueError(f"pooler_config: normalize = {self.normalize!r}: must be true or false")
        dimensions = self.dimensions
        if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
            raise ValueError(f"pooler_config: dimensions = {dimensions!r}: must be an integer from 1")

    @classmethod
    def read(cls, text: str | None) -> PoolerConfig:
        """From JSON, with vLLM's keys. A key that nobody knows is refused."""
        if text is None:
            return cls()
        given = _json_object("pooler_config", text, """'{"pooling_type": "MEAN"}'""")
        values: dict[str, Any] = {}
        for key, value in given.items():
            ours = _SAME_KEYS.get(key, key)
            if value is None:
                continue
            if ours in values:
                raise ValueError(f"pooler_config: {key}: {ours} says it already; give one of them")
            values[ours] = value
        _check_keys("pooler_config", values, [field.name for field in dataclasses.fields(cls)])
        return cls(**values)


def _pooling_type(value: Any) -> str:
    name = value.lower() if isinstance(value, str) else value
    if name in _OTHER_POOLING_TYPES:
        raise ValueError(
            f"pooler_config: pooling_type = {value!r}: not supported, only {' and '.join(POOLING_TYPES).upper()} are"
        )
    if name not in POOLING_TYPES:
        raise ValueError(f"pooler_config: pooling_type = {value!r}: must be LAST or MEAN")
    return str(name)


@dataclasses.dataclass(frozen=True)
class HfOverrides:
    """Keys that the model's config.json may be given in addition: those that say whether the model is
    a matryoshka one, which files mostly forget.
    """

    is_matryoshka: bool | None = None
    matryoshka_dimensions: tuple[int, ...] | None = None

    @classmethod
    def read(cls, text: str | None) -> HfOverrides:
        """From JSON. Any other key is refused: it would change what is computed."""
        if text is None:
            return cls()
        given = _json_object("hf_overrides", text, """'{"is_matryoshka": true}'""")
        _check_keys("hf_overrides", given, [field.name for field in dataclasses.fields(cls)])
        return cls(**read_matryoshka("hf_overrides", given))


def read_matryoshka(source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The two keys that say to which sizes vectors may be cut. Raises `ValueError`."""
    found: dict[str, Any] = {}
    if (flag := values.get("is_matryoshka")) is not None:
        if not isinstance(flag, bool):
            raise ValueError(f"{source}: is_matryoshka: {str(flag)[:100]!r} is not true or false")
        found["is_matryoshka"] = flag
    if (sizes := values.get("matryoshka_dimensions")) is not None:
        if not isinstance(sizes, list) or not sizes or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"{source}: matryoshka_dimensions: {str(sizes)[:100]!r} is not a list of sizes")
        found["matryoshka_dimensions"] = tuple(sorted(set(sizes)))
    return found


def _json_object(field: str, text: str, example: str) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{field} = {text[:100]!r}: is not JSON ({error}); for example {example}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{field} = {text[:100]}: must be an object; for example {example}")
    return given


def _check_keys(field: str, given: Mapping[str, Any], known: list[str]) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f": the keys are {', '.join(known)}"
            raise ValueError(f"{field}: {str(key)[:100]!r} is not supported{hint}")


@dataclasses.dataclass(frozen=True)
class PoolingParams:
    """How one embedding is wanted; None: as the model and its configuration say. vLLM's name."""

    dimensions: int | None = None
    """The first so many numbers, before they are normalised; of matryoshka models."""
    normalize: bool | None = None
    """Whether the vector is brought to length 1."""


@dataclasses.dataclass(frozen=True)
class CheckedPooling:
    """Parameters of a request for an embedding, ready for the core."""

    pooling: str
    normalize: bool
    dimensions: int | None
    n: int = 1

    def to_core(self) -> _core.SamplingParams:
        """In the core's form."""
        from octavo import _core  # `import octavo` must not load the extension

        return _core.SamplingParams.embedding(
            pooling=self.pooling, normalize=self.normalize, dimensions=self.dimensions
        )


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """What a served model's embeddings are."""

    pooling: str
    normalize: bool
    size: int
    """Numbers of a vector."""
    source: str
    """Who says so, for the report."""
    dimensions: int | None = None
    """Of a vector where a request does not say."""
    is_matryoshka: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()
    """The sizes to which vectors may be cut; none: any."""
    longest: int | None = None
    """Tokens of an input, where the model's files say; it may have been trained for more."""

    def checked(self, params: PoolingParams) -> CheckedPooling:
        """The parameters of a request, completed. Raises `ValueError` that names the field."""
        dimensions = params.dimensions if params.dimensions is not None else self.dimensions
        if params.dimensions is not None:
            self.check_dimensions(params.dimensions)
        normalize = self.normalize if params.normalize is None else params.normalize
        return CheckedPooling(self.pooling, normalize, None if dimensions == self.size else dimensions)

    def check_dimensions(self, dimensions: int) -> None:
        """Raises `ValueError` for a size that vectors may not be cut to."""
        if type(dimensions) is not int or not 1 <= dimensions <= self.size:
            raise ValueError(f"dimensions = {dimensions}: must be from 1 to the model's {self.size}")
        if dimensions == self.size:
            return
        if not self.is_matryoshka:
            raise ValueError(
                f"dimensions = {dimensions}: this model was not trained for shorter embeddings (matryoshka); leave it "
                f"out for all {self.size}. Where the model was, start with --hf-overrides "
                """'{"is_matryoshka": true}'"""
            )
        if self.matryoshka_dimensions and dimensions not in self.matryoshka_dimensions:
            sizes = ", ".join(map(str, self.matryoshka_dimensions))
            raise ValueError(f"dimensions = {dimensions}: must be one of the model's matryoshka_dimensions, {sizes}")

    def line(self) -> str:
        """For the start-up report."""
        what = "mean of all tokens" if self.pooling == MEAN else "last token"
        cut = ", matryoshka" if self.is_matryoshka else ""
        return f"{self.size} numbers, {what}, {'normalised' if self.normalize else 'as they are'}{cut} ({self.source})"


def first_tokens(prompt: _core.Prompt, plain: _core.Prompt, most: int) -> _core.Prompt:
    """The first `most` tokens of a prompt, of which those stay that the tokenizer adds at its end: an
    embedding is often made of that one. plain: the prompt without what the tokenizer adds.
    """
    from octavo import _core  # as above

    if len(prompt) <= most:
        return prompt
    ids, own = prompt.token_ids, plain.token_ids
    added = len(ids) - len(own)
    begin = next((place for place in range(added + 1) if ids[place : place + len(own)] == own), None)
    if begin is None or added >= most:
        return _core.Prompt(ids[:most])
    end = ids[begin + len(own) :]
    return _core.Prompt([*ids[: most - len(end)], *end])
