"""The text side of a GGUF file as the files of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from octavo import _core
from octavo.weights.text import gguf_templates, open_gguf


def write_gguf_text(path: Path, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, where the file has any, chat templates."""
    header = open_gguf(path)
    tokenizer = _core.Tokenizer.from_gguf(header)
    text = tokenizer.to_json()
    assert text is not None  # a GGUF vocabulary is none of bytes
    pipeline = json.loads(text)
    pipeline["post_processor"] = _surrounding(tokenizer) or pipeline["post_processor"]
    (folder / "tokenizer.json").write_text(json.dumps(pipeline, ensure_ascii=False), encoding="utf-8")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {name: token for name, token in tokenizer.named_tokens.items() if token}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for name, source in gguf_templates(header).items():
        place = folder / "chat_template.jinja"
        if name != "default":
            place = folder / "additional_chat_templates" / f"{name}.jinja"
            place.parent.mkdir(exist_ok=True)
        place.write_text(source, encoding="utf-8")


def _surrounding(tokenizer: _core.Tokenizer) -> dict[str, Any] | None:
    """What puts the tokens before and after a text that belong there; None where there are none."""
    around = tokenizer.encode_text("", add_special_tokens=True).token_ids
    before = [token for token in around if token == tokenizer.bos_token_id][:1]
    after = around[len(before) :]
    if not around:
        return None

    def piece(token: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": tokenizer.id_to_token(token), "type_id": 0}}

    single = [*map(piece, before), {"Sequence": {"id": "A", "type_id": 0}}, *map(piece, after)]
    pair = [*single, *map(piece, before), {"Sequence": {"id": "B", "type_id": 0}}, *map(piece, after)]
    names = {token: tokenizer.id_to_token(token) for token in around}
    known = {name: {"id": name, "ids": [token], "tokens": [name]} for token, name in names.items()}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}
