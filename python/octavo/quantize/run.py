"""`octavo quantize`: layer after layer, each written before the next one is touched."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from octavo.engine.setup import pick_device
from octavo.layers.embedding import Embedding
from octavo.model_config import ModelError
from octavo.models.decoder import DecoderLayer
from octavo.models.registry import MODELS
from octavo.quantize.formats import config_of, grid_of, scale_dtype, tensors_of
from octavo.quantize.grid import Grid, round_rows
from octavo.quantize.layer import Activations, WatchedSchemes, fill, make_layer
from octavo.quantize.memory import Needs, check_room, needs
from octavo.quantize.methods import Result, by_awq, by_gptq
from octavo.quantize.options import COMPRESSED, Options
from octavo.quantize.original import Original, open_original
from octavo.quantize.output import Output, is_full
from octavo.quantize.shapes import pick_group, projections
from octavo.texts import CALIBRATION, read_text
from octavo.weights.load import pick_dtype
from octavo.weights.quantization.config import recipe_from
from octavo.weights.safetensors import text_model_name
from octavo.weights.source import check
from octavo.weights.text import read_text as read_model_text

REST_BYTES = 1 << 30
"""Of a file of weights that are no layer's; a larger tensor has one to itself."""

MIN_TOKENS = 128
"""Of a calibration: fewer say nothing of a model."""

_EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Quantisation:
    """One run. All its questions are settled before anything is written."""

    def __init__(self, options: Options) -> None:
        """Raises `ModelError` and `ValueError`."""
        self.options = options
        self.device = pick_device(options.device)
        self.original: Original = open_original(options.model)
        self.config = self.original.config
        dtype, _ = pick_dtype("auto", self.config.checkpoint_dtype, self.device)
        self.schemes = WatchedSchemes(dtype, self.device)
        check(MODELS[self.config.architecture](self.config, self.schemes), self.original.source)
        self.shapes = projections(self.config, self.schemes)
        self.group = pick_group(options, self.shapes)
        self.layers, self.rest, sees = _files(self.original)
        plain = self.original.read(self.layers[0][f"model.layers.0.{next(iter(self.shapes))}.weight"]).dtype
        self.plain_dtype = torch.float32 if plain == torch.float64 else plain
        self.quantization_config = config_of(options, self.group, sees=sees)
        self.recipe = recipe_from(self.quantization_config, str(options.output / "config.json"))
        self.samples = calibration(options, self.original) if options.is_calibrated else None
        state = {"source": self.original.fingerprint(), **options.of_result(), "group_size": self.group}
        if self.samples is not None:
            state["calibration"] = hashlib.sha256(self.samples.numpy().tobytes()).hexdigest()
        self.output = Output(options.output, state, len(self.layers) + len(self.rest))

    def needs(self) -> Needs:
        """Of memory and disk."""
        return needs(
            self.options,
            self.config,
            list(self.shapes.values()),
            tokens=0 if self.samples is None else self.samples.numel(),
            item_bytes=self.plain_dtype.itemsize,
            state_bytes=self.schemes.activation_dtype.itemsize,
            rest=[sum(map(self.original.nbytes, names)) for names in self.rest],
            to_do=[not self.output.has(number) for number in range(self.output.count)],
            reading=self.original.reading,
            on_host=self.device.type == "cpu",
        )

    def run(self) -> None:
        """Writes the folder. Raises `ValueError` that says how to go on where it could not be done."""
        needs = self.needs()
        kept = sum(map(self.output.has, range(self.output.count)))
        print(self._said_before(needs), flush=True)
        if kept:
            print(f"{self.options.output}: {kept} of {self.output.count} files are there and kept", flush=True)
        check_room(needs, self.device, self.options)
        with self._telling_what_is_kept():
            self.output.begin()
            for number, names in enumerate(self.rest, len(self.layers)):
                if not self.output.has(number):
                    self.output.write(number, {name: self.original.read(name).contiguous() for name in names})
            self._quantise_layers()
            values = {**self.original.values, "quantization_config": self.quantization_config}
            self.output.finish(values, self.original.write_texts)
        total = sum(self.output.path(number).stat().st_size for number in range(self.output.count))
        before = sum(self.original.nbytes(name) for name in self.original.names())
        print(
            f"{self.options.output}: {total / 2**20:,.0f} MiB of weights, {before / 2**20:,.0f} before. Next: octavo "
            f"serve {self.options.output}"
        )

    def _said_before(self, needs: Needs) -> str:
        options = self.options
        groups = "a scale a row" if self.group == -1 else f"groups of {self.group}"
        how = f"{options.bits} bits by {options.method}, {groups}, as {options.format}"
        text = "" if self.samples is None else f"; {self.samples.numel():,} tokens of calibration"
        return f"{self.original.name}: {len(self.layers)} layers to {how}{text}\n{needs.said(self.device)}"

    def _quantise_layers(self) -> None:
        to_do = [number for number in range(len(self.layers)) if not self.output.has(number)]
        if not to_do:
            return
        activations = self._first_activations() if self.samples is not None else None
        bar = tqdm(
            range(to_do[-1] + 1), desc="Quantising", unit=" layers", disable=not sys.stderr.isatty(), leave=False
        )
        for number in bar:
            if number in to_do:
                self._quantise(number, activations)
            if activations is not None and number < to_do[-1]:
                self._advance(number, activations)

    def _quantise(self, number: int, activations: Activations | None) -> None:
        names = self.layers[number]
        tensors = {name: self.original.read(stored) for name, stored in names.items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ModelError(f"{self.original.name}: {name}: holds NaN or infinite numbers")
        prefix = f"model.layers.{number}."
        result = (
            self._rounded(tensors, prefix) if activations is None else self._calibrated(number, tensors, activations)
        )
        for name, rounded in result.rounded.items():
            stored = names[f"{name}.weight"].removesuffix(".weight")
            del tensors[f"{name}.weight"]
            for end, tensor in tensors_of(rounded, self.options).items():
                tensors[f"{name}.{end}"] = tensor
                names[f"{name}.{end}"] = f"{stored}.{end}"
        tensors |= {name: tensor.cpu().contiguous() for name, tensor in result.plain.items()}
        self.output.write(number, {names[name]: tensor.contiguous() for name, tensor in tensors.items()})

    def _rounded(self, tensors: Mapping[str, Tensor], prefix: str) -> Result:
        """Each number to the nearest."""
        result = Result()
        for name, (_, inputs) in self.shapes.items():
            weight = tensors[f"{prefix}{name}.weight"].to(self.device).float()
            if self.options.whole_rows:
                dtype = _EIGHT_BITS[self.options.method]
                result.rounded[prefix + name] = round_rows(weight, dtype, scale_dtype(self.options, self.plain_dtype))
            else:
                result.rounded[prefix + name] = self._grid(inputs).round(weight)
        return result

    def _grid(self, inputs: int) -> Grid:
        return grid_of(self.options, inputs if self.group == -1 else self.group, self.plain_dtype)

    @torch.inference_mode()
    def _calibrated(self, number: int, tensors: Mapping[str, Tensor], activations: Activations) -> Result:
        layer = self._layer(number, tensors)
        if self.options.method == "gptq":
            # compressed-tensors has given up groups in another order than that of the inputs.
            in_place = self.options.format == COMPRESSED
            by_activation = self.options.desc_act
            return by_gptq(layer, activations, self._grid, by_activation=by_activation, groups_in_place=in_place)
        return by_awq(
            layer, activations, self._grid, clips=self.options.clip, dtype_of=lambda name: tensors[name].dtype
        )

    def _layer(self, number: int, tensors: Mapping[str, Tensor]) -> DecoderLayer:
        layer = make_layer(self.config, number, self.schemes)
        fill(layer, tensors, self.recipe.format_of, self.device)
        return layer

    @torch.inference_mode()
    def _first_activations(self) -> Activations:
        assert self.samples is not None
        config = self.config
        name = "model.embed_tokens"
        embedding = Embedding(
            name, config.vocab_size, config.hidden_size, schemes=self.schemes, scale=config.embedding_scale
        )
        stored = next(stored for stored, ours in self.original.names().items() if ours == f"{name}.weight")
        fill(embedding, {f"{name}.weight": self.original.read(stored)}, self.recipe.format_of, self.device)
        return Activations(self.samples.to(self.device), embedding)

    @torch.inference_mode()
    def _advance(self, number: int, activations: Activations) -> None:
        """Through a layer as its file has it, which is what the next one will see."""
        stored = load_file(self.output.path(number))
        tensors = {ours: tensor for name, tensor in stored.items() if (ours := text_model_name(name)) is not None}
        activations.advance(self._layer(number, tensors))

    @contextmanager
    def _telling_what_is_kept(self) -> Iterator[None]:
        """Whatever ends a run: what it has finished stays."""
        try:
            yield
        except BaseException as error:
            kept = sum(map(self.output.has, range(self.output.count)))
            line = (
                f"{kept} of {self.output.count} files are finished and kept in {self.options.output}; the same command "
                "goes on from there"
            )
            if isinstance(error, OSError) and is_full(error):
                raise ValueError(f"--output {self.options.output}: no room left on the disk. {line}") from None
            print(line, file=sys.stderr)
            raise


def calibration(options: Options, original: Original) -> Tensor:
    """Token ids [samples, length] of the beginning of the calibration's text. Raises `ValueError`."""
    text = read_text(options.calibration or CALIBRATION, "--calibration")
    tokenizer = read_model_text(original.place, None, None).tokenizer
    if tokenizer is None:
        raise ModelError(f"{original.name}: no tokenizer.json: --method {options.method} needs it for its calibration")
    before = tokenizer.encode_text("", add_special_tokens=True).token_ids[:1]
    before = before if before == [tokenizer.bos_token_id] else []
    length = min(options.sample_length, original.config.max_position_embeddings)
    ids = tokenizer.encode_text(text, add_special_tokens=False, parse_special=False).token_ids
    beyond = [token for token in ids if token >= original.config.vocab_size]
    if beyond:
        raise ModelError(
            f"{original.name}: the tokenizer gives {beyond[0]}, over vocab_size {original.config.vocab_size}"
        )
    if len(ids) < MIN_TOKENS:
        raise ValueError(
            f"--calibration {options.calibration or CALIBRATION}: holds {len(ids)} tokens, at least {MIN_TOKENS} say "
            "something of a model"
        )
    each = min(length - len(before), len(ids))
    count = min(options.num_samples, len(ids) // each)
    return torch.tensor([before + ids[start * each : (start + 1) * each] for start in range(count)])


def _files(original: Original) -> tuple[list[dict[str, str]], list[list[str]], bool]:
    """The tensors of each layer (our name -> the file's), the others cut into files, and whether
    there are any that are not the text model's.
    """
    layers: list[dict[str, str]] = [{} for _ in range(original.config.num_layers)]
    rest: list[list[str]] = []
    size = REST_BYTES
    sees = False
    for stored, name in original.names().items():
        sees |= name is None
        parts = (name or "").split(".")
        if parts[:2] == ["model", "layers"] and parts[2].isdigit() and int(parts[2]) < len(layers):
            layers[int(parts[2])][name or ""] = stored
            continue
        nbytes = original.nbytes(stored)
        if size + nbytes > REST_BYTES:
            rest.append([])
            size = 0
        rest[-1].append(stored)
        size += nbytes
    return layers, rest, sees


def quantize(options: Options) -> int:
    """Runs the command. Returns the exit code."""
    Quantisation(options).run()
    return 0
