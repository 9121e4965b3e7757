"""The text side of a model: tokenizer and chat template out of a folder, a GGUF file, or what the
user names instead.

All parsing is the Rust core's, which is imported only when there is something to parse. Read before
the weights, so that a bad vocabulary is found before memory is taken.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.model_config import ModelError, read_json, refuse_special_file

if TYPE_CHECKING:
    from octavo import _core

logger = logging.getLogger(__name__)

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
class _Templates:
    """Jinja sources, not yet compiled; either may be missing."""

    default: str | None = None
    tool_use: str | None = None  # for conversations with tools

    @classmethod
    def named(cls, sources: dict[str, str], where: str) -> _Templates | None:
        """Those of several templates that are used, None where none is; says so of the others."""
        templates = cls(sources.get("default"), sources.get("tool_use"))
        unused = sorted(sources.keys() - {"default", "tool_use"})
        if unused:
            logger.warning(
                "%s: the chat templates named %s are not used: only default and tool_use are", where, ", ".join(unused)
            )
        return None if templates == cls() else templates


@dataclass(frozen=True)
class _Parts:
    """What a folder or file holds, the templates not yet compiled."""

    tokenizer: _core.Tokenizer | None = None
    templates: _Templates | None = None
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
        if path.exists():
            refuse_special_file(path)
        own = _read(path) if path.exists() else _Parts()
        if own.tokenizer is None:
            raise ModelError(
                f"tokenizer {tokenizer!r}: no folder with a tokenizer.json, no tokenizer.json and no .gguf file"
            )
        if own.templates is None:
            own = replace(own, templates=parts.templates)
        else:
            where = str(path)
        parts = replace(own, end_token_ids=parts.end_token_ids)
    if template is not None:
        source, where = _given_template(template)
        parts = replace(parts, templates=_Templates(source))
    if parts.templates is None:
        return Text(parts.tokenizer, end_token_ids=parts.end_token_ids)
    return Text(parts.tokenizer, _compile(parts.templates, parts.tokenizer, where), parts.end_token_ids)


def _read(place: Path) -> _Parts:
    if place.suffix == ".gguf":
        return _from_gguf(place)
    return _from_folder(place.parent if place.is_file() else place)


def _compile(templates: _Templates, tokenizer: _core.Tokenizer | None, where: str) -> _core.ChatTemplate:
    from octavo import _core

    for source in (templates.default, templates.tool_use):
        if source is not None and len(source) > MAX_TEMPLATE_CHARACTERS:
            raise ModelError(
                f"{where}: chat template: {len(source)} characters are over the limit of {MAX_TEMPLATE_CHARACTERS}"
            )
    special_tokens = {} if tokenizer is None else tokenizer.named_tokens
    try:
        return _core.ChatTemplate(templates.default, special_tokens, tool_use=templates.tool_use)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{where}: chat template: {_one_line(error)}") from None


def _given_template(template: str) -> tuple[str, str]:
    """The text of `--chat-template` and where it came from."""
    if "{{" in template or "{%" in template:
        return template, "chat_template"
    path = Path(template).expanduser()
    try:
        refuse_special_file(path)
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
    except (ValueError, RuntimeError) as error:
        raise ModelError(_naming(path, error)) from None
    rows = next((shape[0] for name, _, shape, _, _ in header.tensors() if name == "token_embd.weight"), None)
    if rows is not None and tokenizer.vocab_size != rows:
        raise ModelError(
            f"{path}: tokenizer.ggml.tokens: has {tokenizer.vocab_size} entries, but token_embd.weight has {rows} rows"
        )
    special = tokenizer.special_tokens
    ends = tuple(special[text] for text in END_TOKENS if text in special)
    return _Parts(tokenizer, _Templates.named(gguf_templates(header), str(path)), ends)


def gguf_templates(header: _core.GgufFile) -> dict[str, str]:
    """The chat templates of a GGUF file, by name."""
    keys = {"default": "tokenizer.chat_template", "tool_use": "tokenizer.chat_template.tool_use"}
    metadata = header.metadata()
    return {name: source for name, key in keys.items() if isinstance(source := metadata.get(key), str)}


def _from_folder(folder: Path) -> _Parts:
    path = folder / "tokenizer.json"
    if not path.exists():
        return _Parts()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            refuse_special_file(folder / name)
    from octavo import _core

    try:
        tokenizer = _core.Tokenizer.from_file(str(path))
    except (ValueError, RuntimeError) as error:
        raise ModelError(_naming(path, error)) from None
    return _Parts(tokenizer, _templates_of_folder(folder))


def _templates_of_folder(folder: Path) -> _Templates | None:
    """Templates of tokenizer_config.json, and in their place those of a name that have a file."""
    sources: dict[str, str] = {}
    config = folder / "tokenizer_config.json"
    if config.exists():
        sources = _templates_of_config(config)
    for name, path in [
        ("default", folder / "chat_template.jinja"),
        *((path.stem, path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))),
    ]:
        if path.exists():
            refuse_special_file(path)
            try:
                sources[name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ModelError(f"{path}: not readable as text: {error}") from None
    return _Templates.named(sources, str(folder))


def _templates_of_config(path: Path) -> dict[str, str]:
    """`chat_template`: one template, or several as a list of names and templates (or an object)."""
    given = read_json(path).get("chat_template")
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    pairs: list[Any] = list(given.items()) if isinstance(given, dict) else [None]
    if isinstance(given, list):
        pairs = [(item.get("name"), item.get("template")) if isinstance(item, dict) else None for item in given]
    if not all(pair is not None and all(isinstance(text, str) for text in pair) for pair in pairs):
        raise ModelError(f"{path}: chat_template: must be text, or a list of objects with `name` and `template`")
    return dict(pairs)


def _naming(path: Path, error: Exception) -> str:
    message = _one_line(error)
    return message if str(path.parent) in message else f"{path}: {message}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
