"""The text side of a model: tokenizer and chat template out of a folder, a GGUF file, or what the
user names instead.

All parsing is the Rust core's, which is imported only when there is something to parse. Read before
the weights, so that a bad vocabulary is found before memory is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.model_config import ModelError, read_json

if TYPE_CHECKING:
    from octavo import _core

END_TOKENS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
)
"""Control tokens of GGUF files that end an answer whatever the file's keys say, as in llama.cpp:
many files name only the token that ends a text, not the one that ends a turn.
"""

MAX_TEMPLATE_CHARACTERS = 1 << 20  # published templates stay under 30 KB


@dataclass(frozen=True)
class Text:
    """How to get from messages to ids and back; either part may be missing."""

    tokenizer: _core.Tokenizer | None = None
    chat_template: _core.ChatTemplate | None = None
    end_token_ids: tuple[int, ...] = ()  # of the model's own vocabulary, recognised by their text


def open_gguf(path: Path) -> _core.GgufFile:
    """Checks a GGUF header. Raises `ModelError` naming file and field."""
    from octavo import _core

    try:
        return _core.GgufFile(str(path))
    except _core.GgufError as error:
        raise ModelError(str(error)) from None


@dataclass(frozen=True)
class _Parts:
    """What a folder or file holds, the template not yet compiled."""

    tokenizer: _core.Tokenizer | None = None
    template: str | None = None
    bos_token: str = ""
    eos_token: str = ""
    end_token_ids: tuple[int, ...] = ()


def read_text(place: Path | None, tokenizer: str | None, template: str | None) -> Text:
    """Text of a model's folder or file (None: a preset, which has none).

    tokenizer: the user's folder, tokenizer.json or .gguf file in its place; the model's template
    stays unless that brings its own. template: the user's template, as text or as a file.
    """
    parts = _Parts() if place is None else _read(place)
    where = str(place)
    if tokenizer is not None:
        path = Path(tokenizer).expanduser()
        own = _read(path) if path.exists() else _Parts()
        if own.tokenizer is None:
            raise ModelError(
                f"tokenizer {tokenizer!r}: no folder with a tokenizer.json, no tokenizer.json and no .gguf file"
            )
        if own.template is None:
            own = replace(own, template=parts.template)
        else:
            where = str(path)
        parts = replace(own, end_token_ids=parts.end_token_ids)
    if template is not None:
        source, where = _given_template(template)
        parts = replace(parts, template=source)
    if parts.template is None:
        return Text(parts.tokenizer, end_token_ids=parts.end_token_ids)
    return Text(parts.tokenizer, _compile(parts, where), parts.end_token_ids)


def _read(place: Path) -> _Parts:
    if place.suffix == ".gguf":
        return _from_gguf(place)
    return _from_folder(place.parent if place.is_file() else place)


def _compile(parts: _Parts, where: str) -> _core.ChatTemplate:
    from octavo import _core

    source = parts.template or ""
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise ModelError(
            f"{where}: chat template: {len(source)} characters are over the limit of {MAX_TEMPLATE_CHARACTERS}"
        )
    try:
        return _core.ChatTemplate(source, bos_token=parts.bos_token, eos_token=parts.eos_token)
    except ValueError as error:
        raise ModelError(f"{where}: chat template: {_one_line(error)}") from None


def _given_template(template: str) -> tuple[str, str]:
    """The text of `--chat-template` and where it came from."""
    if "{{" in template or "{%" in template:
        return template, "chat_template"
    path = Path(template).expanduser()
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"chat_template {template!r}: neither a Jinja template nor a readable file ({error})"
        ) from None


def _from_gguf(path: Path) -> _Parts:
    from octavo import _core

    header = open_gguf(path)
    try:
        tokenizer = _core.Tokenizer.from_gguf(header)
    except ValueError as error:
        raise ModelError(_naming(path, error)) from None
    rows = next((shape[0] for name, _, shape, _, _ in header.tensors() if name == "token_embd.weight"), None)
    if rows is not None and tokenizer.vocab_size != rows:
        raise ModelError(
            f"{path}: tokenizer.ggml.tokens: has {tokenizer.vocab_size} entries, but token_embd.weight has {rows} rows"
        )
    source = header.metadata().get("tokenizer.chat_template")
    bos, eos = (
        "" if token is None else tokenizer.id_to_token(token) or ""
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    special = tokenizer.special_tokens
    ends = tuple(special[text] for text in END_TOKENS if text in special)
    return _Parts(tokenizer, source if isinstance(source, str) else None, bos, eos, ends)


def _from_folder(folder: Path) -> _Parts:
    path = folder / "tokenizer.json"
    if not path.exists():
        return _Parts()
    from octavo import _core

    try:
        tokenizer = _core.Tokenizer.from_file(str(path))
    except ValueError as error:
        raise ModelError(_naming(path, error)) from None
    settings: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").exists():
        settings = read_json(folder / "tokenizer_config.json")
    source = settings.get("chat_template")
    if isinstance(source, list):  # several named templates
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        source = named.get("default")
    if (folder / "chat_template.jinja").exists():
        source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    bos, eos = (_special(settings.get(key)) for key in ("bos_token", "eos_token"))
    return _Parts(tokenizer, source if isinstance(source, str) else None, bos, eos)


def _special(value: Any) -> str:
    """A special token of tokenizer_config.json: text, or an object with its text in `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _naming(path: Path, error: ValueError) -> str:
    message = _one_line(error)
    return message if str(path) in message else f"{path}: {message}"


def _one_line(error: ValueError) -> str:
    return " ".join(str(error).split())
