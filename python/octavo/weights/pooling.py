"""What a model's files say of its embeddings: sentence-transformers' `modules.json` and the config of
its pooling, matryoshka sizes in `config.json`, llama.cpp's `pooling_type` of a GGUF file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.model_config import ModelError, read_json
from octavo.pooling import LAST, MEAN, Embeddings, HfOverrides, PoolerConfig, read_matryoshka

MODULES, CONFIG, TEXT = "modules.json", "config.json", "sentence_bert_config.json"
_MODES = {"pooling_mode_lasttoken": LAST, "pooling_mode_mean_tokens": MEAN}
_NEW_MODES = {"lasttoken": LAST, "mean": MEAN}
_GGUF_TYPES = {1: MEAN, 3: LAST}
_GGUF_NAMES = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}
_HELP = """; --pooler-config '{"pooling_type": "LAST"}' (or "MEAN") says what to do instead, --runner generate """
_HELP += "loads the model to generate"


@dataclass(frozen=True)
class ModelPooling:
    """What the files say; None where they do not."""

    pooling: str | None = None
    normalize: bool | None = None
    source: str = ""
    """The file that says so."""
    problem: str | None = None
    """Why embeddings cannot be made as the files say, unless the user says something else."""
    is_matryoshka: bool | None = None
    matryoshka_dimensions: tuple[int, ...] | None = None
    longest: int | None = None
    """Tokens of an input that its embedding is made of."""

    @property
    def is_embedder(self) -> bool:
        """Whether the files are those of a model for embeddings."""
        return self.pooling is not None or self.problem is not None


def read_folder(folder: Path, hidden_size: int) -> ModelPooling:
    """Raises `ModelError` where a file cannot be read, or asks for what no option could replace."""
    config = folder / CONFIG
    try:
        matryoshka = read_matryoshka(str(config), read_json(config))
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(str(error)) from None
    path = folder / MODULES
    if not path.exists():
        return ModelPooling(**matryoshka)
    pooling, normalize, source, longest = None, False, str(path), None
    for place, module in enumerate(_modules(path)):
        kind = module["type"].rpartition(".")[2]
        where = f"{path}: {place}: {module['type'][:100]!r}"
        if kind == "Transformer":
            if place != 0 or module["path"] not in ("", "0_Transformer") or (folder / module["path"]) != folder:
                raise ModelError(f"{where} must be the first module, in the folder itself")
            longest = _read_text(folder / TEXT)
        elif kind == "Pooling" and place == 1:
            source = str(folder / module["path"] / CONFIG)
            pooling = _read_pooling(folder / module["path"] / CONFIG, hidden_size)
            if pooling.problem is not None:
                return ModelPooling(problem=pooling.problem, source=source, **matryoshka)
        elif kind == "Normalize" and place >= 2:
            normalize = True
        else:
            raise ModelError(f"{where} is not supported in this place: embeddings are made by a Transformer, a Pooling"
                             " of its last or of all tokens, and a Normalize; --runner generate loads the model to "
                             "generate")  # fmt: skip
    if pooling is None:
        return ModelPooling(**matryoshka)
    return ModelPooling(pooling.pooling, normalize, source, longest=longest, **matryoshka)


def read_gguf(metadata: Mapping[str, Any], path: str) -> ModelPooling:
    """llama.cpp normalises embeddings whatever the file."""
    key = f"{metadata.get('general.architecture')}.pooling_type"
    kind = metadata.get(key)
    if kind is None or kind == 0:
        return ModelPooling()
    if kind in _GGUF_TYPES:
        return ModelPooling(_GGUF_TYPES[kind], True, path)
    return ModelPooling(problem=f"{path}: {key}: {_GGUF_NAMES.get(kind, kind)} is not supported{_HELP}", source=path)


def settle(
    files: ModelPooling, hidden_size: int, runner: str, pooler: PoolerConfig, overrides: HfOverrides
) -> Embeddings | None:
    """What embeddings of the model are; None under the runner `generate`. Raises `ModelError`.

    Without a word of files or user it is the last token's hidden state, normalised: what vLLM makes
    of a model that generates.
    """
    if runner == "generate":
        return None
    if pooler.pooling_type is None and files.problem is not None:
        raise ModelError(files.problem)
    own = files.normalize if files.normalize is not None else True
    sizes = overrides.matryoshka_dimensions or files.matryoshka_dimensions or ()
    flag = overrides.is_matryoshka if overrides.is_matryoshka is not None else files.is_matryoshka
    if any(size > hidden_size for size in sizes):
        raise ModelError(f"matryoshka_dimensions = {list(sizes)}: the model's embeddings have {hidden_size} numbers")
    source = files.source if files.pooling else "the default"
    embeddings = Embeddings(
        pooling=pooler.pooling_type or files.pooling or LAST,
        normalize=own if pooler.normalize is None else pooler.normalize,
        size=hidden_size,
        source=source if pooler.pooling_type is None else "--pooler-config",
        dimensions=pooler.dimensions,
        is_matryoshka=bool(sizes) if flag is None else flag,
        matryoshka_dimensions=sizes,
        longest=files.longest,
    )
    if pooler.dimensions is not None:
        try:
            embeddings.check_dimensions(pooler.dimensions)
        except ValueError as error:
            raise ModelError(f"pooler_config: {error}") from None
    return embeddings


def _modules(path: Path) -> list[dict[str, str]]:
    try:
        modules = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(modules, list) or not modules:
        raise ModelError(f"{path}: is not a list of modules")
    for place, module in enumerate(modules):
        for key in ("type", "path"):
            if not isinstance(module, dict) or not isinstance(module.get(key), str):
                raise ModelError(f"{path}: {place}: {key}: missing, or not a string")
        name = module["path"]
        if name and (Path(name).name != name or name.startswith(".")):
            raise ModelError(f"{path}: {place}: path: {name[:100]!r} is not the plain name of a folder")
    return modules


def _read_pooling(path: Path, hidden_size: int) -> ModelPooling:
    values = read_json(path)
    size = values.get("word_embedding_dimension", values.get("embedding_dimension"))
    if size not in (None, hidden_size):
        raise ModelError(
            f"{path}: word_embedding_dimension: {str(size)[:50]}, but the model's hidden_size is {hidden_size}"
        )
    if values.get("include_prompt") is False:
        return ModelPooling(problem=f"{path}: include_prompt: false is not supported{_HELP}")
    given = values.get("pooling_mode")
    if given is not None:
        names = [given] if isinstance(given, str) else list(given) if isinstance(given, list) else [str(given)]
        known = _NEW_MODES
    else:
        names = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
        known = _MODES
    if len(names) != 1 or names[0] not in known:
        shown = ", ".join(str(name)[:50] for name in names) or "no pooling mode"
        return ModelPooling(problem=f"{path}: {shown}: not supported, only {' and '.join(known)} are{_HELP}")
    return ModelPooling(known[names[0]])


def _read_text(path: Path) -> int | None:
    """Tokens of the longest input, where the file says."""
    if not path.exists():
        return None
    values = read_json(path)
    if values.get("do_lower_case"):
        raise ModelError(f"{path}: do_lower_case: true is not supported")
    longest = values.get("max_seq_length")
    if longest is not None and (type(longest) is not int or longest < 1):
        raise ModelError(f"{path}: max_seq_length: {str(longest)[:50]}, but must be a number of tokens, at least 1")
    return longest
