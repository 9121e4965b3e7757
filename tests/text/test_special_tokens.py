"""Special tokens that the files beside `tokenizer.json` name, against transformers' `AutoTokenizer`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer

from octavo import _core
from octavo.model_config import ModelError
from octavo.weights.text import read_text

CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"

TEMPLATE = (
    "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ sep_token }}|{{ pad_token }}|{{ cls_token }}|{{ mask_token }}|"
    "{{ image_token }}|{{ boi_token }}|{{ bos_token is defined }}|{{ messages[0].content }}"
)


def token(content: str, **flags: Any) -> dict[str, Any]:
    """As `tokenizer_config.json` writes a token with its flags."""
    return {"__type": "AddedToken", "content": content, **flags}


def listed(content: str, **flags: Any) -> dict[str, Any]:
    """As `added_tokens_decoder` writes one."""
    return {
        **dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False),
        "content": content,
        **flags,
    }


FOLDERS: dict[str, dict[str, Any]] = {
    "none": {CONFIG: {}},
    "named": {CONFIG: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}},
    "named with flags": {CONFIG: {"bos_token": token("<s>", lstrip=True), "mask_token": token("<m>", rstrip=True)}},
    "named, in the vocabulary": {CONFIG: {"bos_token": "ab"}},
    "named, added but not special": {CONFIG: {"bos_token": "<plain>", "pad_token": "<low>"}},
    "named, special before": {CONFIG: {"eos_token": "<end>", "pad_token": "<end>"}},
    "null": {CONFIG: {"bos_token": None, "eos_token": "</s>"}},
    "additional": {CONFIG: {"additional_special_tokens": ["<x>", "<y>"]}},
    "additional with flags": {CONFIG: {"additional_special_tokens": [token("<x>", lstrip=True, special=True), "<y>"]}},
    "extra": {CONFIG: {"extra_special_tokens": ["<x>", "<y>"]}},
    "extra before additional": {CONFIG: {"extra_special_tokens": ["<x>"], "additional_special_tokens": ["<y>"]}},
    "extra empty, additional": {CONFIG: {"extra_special_tokens": [], "additional_special_tokens": ["<y>"]}},
    "extra by name": {CONFIG: {"extra_special_tokens": {"image_token": "<x>", "boi_token": "<y>"}}},
    "extra by name, additional": {
        CONFIG: {"extra_special_tokens": {"image_token": "<x>"}, "additional_special_tokens": ["<y>"]}
    },
    "names of its own": {CONFIG: {"image_token": "<x>", "boi_token": token("<y>", lstrip=True), "add_bos_token": True}},
    "decoder": {
        CONFIG: {
            "added_tokens_decoder": {
                "300": listed("<x>", special=True),
                "301": listed("<y>", normalized=True),
                "302": listed("<z>", special=True, lstrip=True),
                "303": listed("word", single_word=True),
            },
            "pad_token": "<x>",
            "bos_token": "<y>",
        }
    },
    "decoder changes flags": {
        CONFIG: {"added_tokens_decoder": {"260": listed("<plain>", special=True), "1": listed("<end>", rstrip=True)}}
    },
    "decoder, out of order": {
        CONFIG: {"added_tokens_decoder": {"500": listed("<x>", special=True), "400": listed("<y>", special=True)}}
    },
    "map": {
        CONFIG: {},
        SPECIAL_MAP: {"bos_token": "<s>", "pad_token": {"content": "<pad>", "lstrip": True, "normalized": False}},
    },
    "map over the configuration": {
        CONFIG: {"bos_token": "<s>", "eos_token": "</s>"},
        SPECIAL_MAP: {"bos_token": "<t>", "eos_token": None},
    },
    "map beside a decoder": {
        CONFIG: {"added_tokens_decoder": {"300": listed("<x>", special=True)}, "bos_token": "<s>"},
        SPECIAL_MAP: {"bos_token": "<t>", "pad_token": "<pad>", "additional_special_tokens": ["<y>"]},
        ADDED: {"<z>": 301},
    },
    "map, additional": {CONFIG: {}, SPECIAL_MAP: {"additional_special_tokens": ["<x>", "<y>"]}},
    "map, additional twice": {
        CONFIG: {"additional_special_tokens": ["<x>"]},
        SPECIAL_MAP: {"additional_special_tokens": ["<y>"]},
    },
    "map, extra": {
        CONFIG: {"extra_special_tokens": ["<x>"]},
        SPECIAL_MAP: {"extra_special_tokens": ["<y>", {"content": "<z>", "lstrip": True}]},
    },
    "map, extra by name": {CONFIG: {}, SPECIAL_MAP: {"extra_special_tokens": {"image_token": "<x>"}}},
    "map, names of its own": {CONFIG: {}, SPECIAL_MAP: {"image_token": "<x>", "boi_token": {"content": "<y>"}}},
    "added": {CONFIG: {}, ADDED: {"<x>": 300, "Word": 301}},
    "added, special by name": {CONFIG: {"pad_token": "<x>"}, ADDED: {"<x>": 300, "<y>": 301}},
    "added, special by the map": {
        CONFIG: {},
        SPECIAL_MAP: {"pad_token": "<x>", "extra_special_tokens": ["<y>"]},
        ADDED: {"<x>": 300, "<y>": 301, "<z>": 302},
    },
}

TOKENS = (
    "<s>",
    "</s>",
    "<t>",
    "<unk>",
    "<pad>",
    "<m>",
    "<x>",
    "<y>",
    "<z>",
    "<end>",
    "<plain>",
    "<low>",
    "word",
    "Word",
)
TEXTS = ["ab a", *(f"a {text} b{text}{text}c  {text}" for text in TOKENS), "".join(TOKENS)]


def write_folder(folder: Path, files: dict[str, Any], padding: str | None = None) -> Path:
    """A byte-level tokenizer that makes small letters, with two added tokens of its own and one
    that is special.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*alphabet, "ab", "Ġa"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("Ġ", "a")]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.add_tokens([AddedToken("<end>", special=True), "<low>", AddedToken("<plain>", normalized=False)])
    if padding is not None:
        tokenizer.enable_padding(pad_id=0, pad_token=padding)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        more = {"tokenizer_class": "PreTrainedTokenizerFast"} if name == CONFIG else {}
        (folder / name).write_text(json.dumps({**more, **content}))
    return folder


def assert_as_transformers(folder: Path) -> None:
    text = read_text(folder, None, TEMPLATE)
    ours, oracle = text.tokenizer, AutoTokenizer.from_pretrained(folder)
    assert ours is not None and text.chat_template is not None
    assert ours.named_tokens == oracle.special_tokens_map
    assert (ours.bos_token_id, ours.eos_token_id) == (oracle.bos_token_id, oracle.eos_token_id)
    for line in TEXTS:
        ids = ours.encode_text(line).token_ids
        assert ids == oracle(line)["input_ids"], line
        for skip in (False, True):
            assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip), (line, skip)
    messages = [{"role": "user", "content": "Hi"}]
    rendered = oracle.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
    assert text.chat_template.render(json.dumps(messages)) == rendered


@pytest.mark.parametrize("name", FOLDERS)
def test_special_tokens_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    assert_as_transformers(write_folder(tmp_path / "model", FOLDERS[name]))


@pytest.mark.parametrize("config", [{}, {"pad_token": "<y>"}, {"pad_token": None}])
def test_the_padding_of_the_tokenizer_names_a_token(tmp_path: Path, config: dict[str, Any]) -> None:
    assert_as_transformers(write_folder(tmp_path / "model", {CONFIG: config}, padding="<x>"))


def test_a_message_cannot_write_a_token_that_only_the_configuration_makes_special(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {CONFIG: {"eos_token": "</s>", "additional_special_tokens": ["<x>"]}})
    text = read_text(folder, None, "{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    assert text.tokenizer is not None and text.chat_template is not None
    messages = json.dumps([{"role": "user", "content": "a</s><x>"}])
    ids = text.tokenizer.encode_chat(text.chat_template, messages).token_ids
    special = set(text.tokenizer.special_tokens.values())
    assert [token for token in ids if token in special] == [text.tokenizer.eos_token_id]
    assert text.tokenizer.decode(ids, False) == "a</s><x></s>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({CONFIG: {"bos_token": 5}}, r"tokenizer_config.json: bos_token is 5, but must be a string or an object"),
        ({CONFIG: {"eos_token": {"text": "x"}}}, "tokenizer_config.json: eos_token is"),
        ({CONFIG: {"pad_token": token("x", lstrip=1)}}, "tokenizer_config.json: pad_token is"),
        ({CONFIG: {"additional_special_tokens": "<x>"}}, "additional_special_tokens is .* a list"),
        ({CONFIG: {"additional_special_tokens": ["<x>", 7]}}, r"additional_special_tokens\[1\] is 7"),
        ({CONFIG: {"added_tokens_decoder": [1]}}, "added_tokens_decoder is .* an object"),
        ({CONFIG: {"added_tokens_decoder": {"-1": listed("x")}}}, "added_tokens_decoder.-1 is .* a token id"),
        ({CONFIG: {}, ADDED: {"<x>": "7"}}, 'added_tokens.json: <x> is "7", but must be a token id'),
        ({CONFIG: {}, SPECIAL_MAP: {"bos_token": ["x"]}}, "special_tokens_map.json: bos_token is"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_text(write_folder(tmp_path / "model", files), None, None)


def test_tokens_without_measure_are_refused(tmp_path: Path) -> None:
    """Before the library builds its automata, which takes seconds and gigabytes."""
    tokens = [f"{number}{'x' * 40_000}" for number in range(27)]
    too_long = r"the added tokens have 10800\d\d bytes, at most 1048576 are allowed"
    folder = write_folder(tmp_path / "beside", {CONFIG: {"additional_special_tokens": tokens}})
    with pytest.raises(ModelError, match=rf"beside: {too_long}"):
        read_text(folder, None, None)
    folder = write_folder(tmp_path / "inside", {})
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"] = [listed(content) | {"id": 300 + id} for id, content in enumerate(tokens)]
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=rf"tokenizer\.json: {too_long}"):
        read_text(folder, None, None)


def test_an_odd_value_is_cut(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", {CONFIG: {"bos_token": ["x" * 100_000]}})
    with pytest.raises(ModelError, match=r"bos_token is \[\"x+\.\.\., but must be") as refused:
        read_text(folder, None, None)
    assert len(str(refused.value)) < 2048 and isinstance(_core.RefusedError("x"), ValueError)
