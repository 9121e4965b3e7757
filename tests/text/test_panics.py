"""Files that make the text libraries panic: named at start, an error in a request."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from octavo import _core
from octavo.model_config import ModelError
from octavo.weights.text import read_text
from tests.text.test_special_tokens import CONFIG, write_folder


def charsmap(data: bytes) -> dict[str, Any]:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def replace(pattern: dict[str, str]) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": "x"}


ON_Q_ONLY = replace({"Regex": "(?=q)"})  # where a text begins with it
NORMALIZERS = {
    "a charsmap that is none": charsmap(b""),
    "a charsmap that is cut": charsmap(b"\x01"),
    "a charsmap without entries": charsmap(b"\x00" * 4),
    "a charsmap that points beyond its end": charsmap(b"\x04\x00\x00\x00\xff\xff\xff\xffx"),
    "a charsmap that is no base64": {"type": "Precompiled", "precompiled_charsmap": "%"},
    "an empty text to replace": replace({"String": ""}),
    "an empty pattern": replace({"Regex": ""}),
}


def with_normalizer(folder: Path, normalizer: dict[str, Any]) -> Path:
    write_folder(folder, {CONFIG: {}})
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": normalizer}))
    return folder


@pytest.mark.parametrize("name", NORMALIZERS)
def test_at_start_the_file_is_named_in_one_line(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match=r"tokenizer.json: .*panicked") as refused:
        read_text(with_normalizer(tmp_path / "model", NORMALIZERS[name]), None, None)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr().err == ""


def test_later_it_is_an_error_and_the_tokenizer_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = read_text(with_normalizer(tmp_path / "model", ON_Q_ONLY), None, None).tokenizer
    assert tokenizer is not None
    template = _core.ChatTemplate("{{ messages[0].content }}")
    before = tokenizer.encode_text("abc").token_ids
    for _ in range(3):
        with pytest.raises(RuntimeError, match="panicked") as failed:
            tokenizer.encode_text("q")
        assert failed.value.code == "internal_error"  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="panicked"):
            tokenizer.encode_chat(template, '[{"role": "user", "content": "q"}]')
        assert tokenizer.encode_text("abc").token_ids == before
    assert capfd.readouterr().err == ""
