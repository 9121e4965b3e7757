"""Tensors as people's files have them: one of a tied pair, stale copies, other prefixes, in parts, with
NaN. The oracle is transformers, which loads the same folder.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from octavo.config import EngineConfig
from octavo.model_config import MAX_ERROR_BYTES, ModelError
from octavo.weights.load import load_model
from tests.models import harness
from tests.models.harness import Runner
from tests.models.test_architectures import PROMPT, assert_close, make
from tests.models.test_config_keys import save
from tests.models.test_files import write_index
from tests.models.test_gguf import write

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def load(place: Path, **options: Any) -> Any:
    return load_model(EngineConfig(model=str(place), **{"dtype": "float32", **options}), device=torch.device("cpu"))


def ours(place: Path) -> torch.Tensor:
    return Runner(load(place).model, torch.float32).step([], [(harness.Sequence(0), PROMPT)])[0]


def theirs(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0]


def refused(place: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(place, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message.encode()) <= MAX_ERROR_BYTES
    return message


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    make("llama-gqa-tied", tmp_path)
    return tmp_path


def test_a_head_that_differs_is_kept_although_the_config_ties_it(tied: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = ours(tied)
    tensors = tensors_of(tied)
    rewrite(tied, {**tensors, HEAD: tensors[TABLE].clone()})
    assert_close(ours(tied), plain)
    assert HEAD not in caplog.text
    rewrite(tied, {**tensors, HEAD: tensors[TABLE].flip(0).contiguous()})
    assert_close(ours(tied), theirs(tied))
    assert "lm_head.weight differs" in caplog.text
    assert (ours(tied) - plain).abs().max() > 0.1


def test_a_head_of_another_shape_is_refused(tied: Path) -> None:
    tensors = tensors_of(tied)
    rewrite(tied, {**tensors, HEAD: tensors[TABLE][:100].clone()})
    assert "lm_head.weight: shape [100, 64], but tie_word_embeddings" in refused(tied)


def test_a_tied_pair_may_be_stored_as_the_head(tied: Path) -> None:
    tensors = tensors_of(tied)
    tensors[HEAD] = tensors.pop(TABLE)
    rewrite(tied, tensors)
    assert_close(ours(tied), theirs(tied))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("of_text", [True, False])
def test_the_top_level_ties_a_model_of_two_parts(is_tied: bool, of_text: bool, tmp_path: Path) -> None:
    save("gemma3", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"tie_word_embeddings": is_tied}
    config["text_config"]["tie_word_embeddings"] = of_text
    path.write_text(json.dumps(config))
    tensors = tensors_of(tmp_path)
    (table,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    if not is_tied:
        tensors[next(name for name in (HEAD, table) if name == HEAD)] = tensors[table].flip(0).contiguous()
    rewrite(tmp_path, tensors)
    assert_close(ours(tmp_path), theirs(tmp_path))


def test_files_without_the_prefix(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    expected = ours(tied)
    rewrite(tied, {name.removeprefix("model."): tensor for name, tensor in tensors_of(tied).items()})
    assert_close(ours(tied), expected)
    assert_close(theirs(tied), expected)


def in_two(folder: Path, stale_in: int) -> None:
    """Two shards, of which one has a stale copy of a tensor that the index says to be in the other;
    and a third that the index does not name.
    """
    tensors = tensors_of(folder)
    names = sorted(tensors)
    file = "model-0000{}-of-00002.safetensors".format
    weight_map = {name: file(1 + index % 2) for index, name in enumerate(names)}
    name = next(name for name in names if name.endswith("down_proj.weight") and weight_map[name] != file(stale_in))
    for number in (1, 2):
        part = {key: tensors[key] for key in names if weight_map[key] == file(number)}
        if number == stale_in:
            part[name] = torch.zeros_like(tensors[name])
        save_file(part, folder / file(number), {"format": "pt"})
    save_file({names[0]: torch.zeros_like(tensors[names[0]])}, folder / "old.safetensors")
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)


@pytest.mark.parametrize("stale_in", [1, 2])
def test_a_stale_copy_loses_against_the_index(stale_in: int, tied: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = ours(tied)
    in_two(tied, stale_in)
    assert_close(ours(tied), expected)
    assert "1 tensors are in two files, and taken from the one that the index names: model.layers." in caplog.text


def test_copies_that_the_index_does_not_name(tied: Path) -> None:
    in_two(tied, 1)
    index = tied / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    name = next(
        key for key, file in table.items() if key.endswith("down_proj.weight") and file.startswith("model-00002")
    )
    del table[name]
    write_index(tied, table)
    assert f"{name}: also in model-00001-of-00002.safetensors" in refused(tied)


def test_one_file_goes_before_an_index(tied: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = tensors_of(tied)
    in_two(tied, 1)
    rewrite(tied, {name: tensor * 0.9 for name, tensor in tensors.items()})
    assert_close(ours(tied), theirs(tied))
    assert "model.safetensors is read, and not the files that model.safetensors.index.json names" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_not_finite_are_named(value: float, dtype: str, tied: Path) -> None:
    tensors = tensors_of(tied)
    spoilt = ["model.layers.0.input_layernorm.weight", "model.layers.1.self_attn.k_proj.weight", TABLE]
    for name in spoilt:
        tensors[name].view(-1)[-1] = value
    rewrite(tied, tensors)
    message = refused(tied, dtype=dtype)
    assert str(tied) in message and "NaN or infinite numbers in 3 tensors" in message
    assert all(name in message for name in spoilt)


def test_weights_that_a_type_cannot_hold_are_named(tied: Path) -> None:
    tensors = tensors_of(tied)
    tensors["model.norm.weight"][0] = 1e6
    rewrite(tied, tensors)
    assert "model.norm.weight" in refused(tied, dtype="float16")
    load(tied)


def test_quantised_blocks_that_are_not_finite_are_named(tmp_path: Path) -> None:
    _, path = write("llama-gqa-tied", tmp_path, extra_tensors={"output.weight": spoilt_head()})
    assert "model.gguf: NaN or infinite numbers in 1 tensors, as held in memory: lm_head.weight" in refused(path)


def spoilt_head() -> Any:
    head = torch.ones(199, 64)
    head[7, 7] = float("nan")
    return head.numpy()


def test_long_errors_keep_their_beginning(tied: Path) -> None:
    save_file({f"model.{'x' * 90}{i}\n": torch.zeros(1) for i in range(200)}, tied / "model.safetensors")
    message = refused(tied)
    assert message.startswith(f"{tied}: 229 tensors do not fit the config: ") and message.endswith(" ...")
    config = json.loads((tied / "config.json").read_text())
    for change in ({"hidden_size": "9" * 10**6}, {"layer_types": ["é" * 10**5] * 3}, {"architectures": ["L" * 10**5]}):
        (tied / "config.json").write_text(json.dumps(config | change))
        assert str(tied / "config.json") in refused(tied) and next(iter(change)) in refused(tied)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "index"])
def test_pipes_and_devices_are_not_read(name: str, tied: Path) -> None:
    path = tied / name
    if name == "index":
        (tied / "model.safetensors").unlink()
        path = tied / "model.safetensors.index.json"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert f"{path}: not a regular file" in refused(tied)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert f"{path}: not a regular file" in refused(tied)


def test_a_pipe_as_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    os.mkfifo(path)
    assert f"{path}: not a regular file" in refused(path)
    assert "/dev/null: not a regular file" in refused(Path("/dev/null"))
    for tokenizer in (path, Path("/dev/null")):
        with pytest.raises(ModelError, match=f"{tokenizer}: not a regular file"):
            load("tiny", load_format="dummy", tokenizer=str(tokenizer))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_named(tied: Path) -> None:
    (tied / "config.json").chmod(0)
    assert str(tied / "config.json") in refused(tied)


def test_split_gguf(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    reference, path = write("llama-gqa-tied", tmp_path, split_max_tensors=10)
    assert path.name == "model-00001-of-00003.gguf"
    with torch.inference_mode():
        assert_close(ours(path), reference(torch.tensor([PROMPT])).logits[0])
    assert "split.count is 3" in caplog.text
    second, third = (path.with_name(f"model-0000{number}-of-00003.gguf") for number in (2, 3))
    assert re.search(
        r"split\.no: part 2 of split\.count 3; give the first, model-00001-of-00003\.gguf", refused(second)
    )
    third.rename(tmp_path / "third")
    assert "split.count: 3 parts, but model-00003-of-00003.gguf is missing" in refused(path)
    second.rename(third)
    (tmp_path / "third").rename(second)
    assert "model-00002-of-00003.gguf: split.no and split.count: not part 2 of 3" in refused(path)
    path.rename(tmp_path / "whole.gguf")
    assert "split.count: 3 parts, but the name does not end in" in refused(tmp_path / "whole.gguf")


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("Q8_0", torch.bfloat16)])
def test_auto_dtype_of_a_gguf_file(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, path = write("llama-gqa-tied", tmp_path, kind=kind)
    loaded = load(path, dtype="auto", load_format="dummy")
    assert loaded.dtype == dtype
    assert ("quantised" in loaded.dtype_reason) == (kind == "Q8_0")
