"""Which of a model's several chat templates is taken, against transformers' `AutoTokenizer`."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import AutoTokenizer

from octavo import _core
from octavo.model_config import ModelError
from octavo.weights.text import Text, read_text
from tests.text import vocabularies
from tests.text.test_special_tokens import ADDED, CONFIG, SPECIAL_MAP, write_folder

MESSAGES = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
SAYS = "{{{{ '{} ' }}}}{{{{ messages[0].content }}}}{{{{ tools|tojson if tools }}}}"
FILE, TOOL_FILE = "chat_template.jinja", "additional_chat_templates/tool_use.jinja"


def named(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": SAYS.format(says)} for name, says in templates.items()]


FOLDERS: dict[str, dict[str, Any]] = {
    "one": {CONFIG: {"chat_template": SAYS.format("one")}},
    "list": {CONFIG: {"chat_template": named(default="default", tool_use="tools", rag="rag")}},
    "list without default": {CONFIG: {"chat_template": named(tool_use="tools")}},
    "list without tools": {CONFIG: {"chat_template": named(default="default", rag="rag")}},
    "object": {CONFIG: {"chat_template": {"default": SAYS.format("default"), "tool_use": SAYS.format("tools")}}},
    "file": {CONFIG: {"chat_template": SAYS.format("one")}, FILE: SAYS.format("file")},
    "file and a list": {CONFIG: {"chat_template": named(default="a", rag="b")}, FILE: SAYS.format("file")},
    "two files": {CONFIG: {}, FILE: SAYS.format("file"), TOOL_FILE: SAYS.format("tool file")},
    "a default file among the others": {
        CONFIG: {}, FILE: SAYS.format("file"), "additional_chat_templates/default.jinja": SAYS.format("other")
    },
    "a file for tools": {CONFIG: {}, TOOL_FILE: SAYS.format("tool file")},
}  # fmt: skip


def write(folder: Path, files: dict[str, Any]) -> Path:
    write_folder(folder, {CONFIG: files[CONFIG]})
    for name, source in files.items():
        if name != CONFIG:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(source)
    return folder


def rendered(text: Text, tools: Any) -> str | None:
    assert text.chat_template is not None
    try:
        return text.chat_template.render(
            json.dumps(MESSAGES), tools_json=json.dumps(tools) if tools else None, add_generation_prompt=False
        )
    except _core.TemplateError:
        return None


def oracle(folder: Path, tools: Any) -> str | None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        return tokenizer.apply_chat_template(MESSAGES, tools=tools, tokenize=False)
    except ValueError:
        return None


@pytest.mark.parametrize("name", FOLDERS)
def test_the_template_is_the_one_of_transformers(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "model", FOLDERS[name])
    text = read_text(folder, None, None)
    for tools in (None, TOOLS):
        assert rendered(text, tools) == oracle(folder, tools)
    assert rendered(text, TOOLS) is not None


def test_the_configurations_templates_stay_beside_files_of_other_names(tmp_path: Path) -> None:
    """Where transformers has none for conversations without tools."""
    folder = write(tmp_path / "model", {CONFIG: {"chat_template": SAYS.format("one")}, TOOL_FILE: SAYS.format("file")})
    text = read_text(folder, None, None)
    assert rendered(text, None) == "one Hi" and oracle(folder, None) is None
    assert rendered(text, TOOLS) == oracle(folder, TOOLS)


def test_a_given_template_is_the_only_one(tmp_path: Path) -> None:
    text = read_text(write(tmp_path / "model", FOLDERS["list"]), None, SAYS.format("mine"))
    assert rendered(text, None) == "mine Hi"
    assert rendered(text, TOOLS) == "mine Hi" + json.dumps(TOOLS)


def test_a_template_that_can_only_be_used_with_tools_says_so(tmp_path: Path) -> None:
    text = read_text(write(tmp_path / "model", FOLDERS["list without default"]), None, None)
    assert text.chat_template is not None
    with pytest.raises(_core.TemplateError, match="conversations with tools only"):
        text.chat_template.render(json.dumps(MESSAGES))


def test_templates_that_nothing_uses_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        text = read_text(write(tmp_path / "model", {CONFIG: {"chat_template": named(rag="x", cite="y")}}), None, None)
    assert text.chat_template is None
    assert "named cite, rag are not used" in caplog.text


@pytest.mark.parametrize("given", [5, [5], [{"name": "default"}], [{"template": "x"}], {"default": 5}])
def test_bad_templates_are_named(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ModelError, match=r"tokenizer_config.json: chat_template: must be text, or a list"):
        read_text(write(tmp_path / "model", {CONFIG: {"chat_template": given}}), None, None)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", {CONFIG: {}, FILE: "x"})
    (folder / FILE).write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template.jinja: not readable as text"):
        read_text(folder, None, None)


@pytest.mark.parametrize("name", ["tokenizer.json", CONFIG, SPECIAL_MAP, ADDED, FILE, TOOL_FILE])
def test_pipes_are_not_read(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "model", {CONFIG: {}, TOOL_FILE: "x"})
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ModelError, match=f"{name}: not a regular file"):
        read_text(folder, None, None)
    with pytest.raises(ModelError, match=f"{name}: not a regular file"):
        read_text(None, None, str(folder / name))


def test_a_gguf_file_has_a_template_for_tools_and_names_its_tokens(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<pad>"]
    path, types = tmp_path / "m.gguf", [2, 3, 3, *[6] * 256, 3]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 259, "mask_token_id": 999}
    vocabularies.write_gguf(path, "llama", tokens, types, scores=[0.0] * len(tokens), **ids)
    templates = tmp_path / "t.gguf"
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(templates, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=kind)
    source = "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ mask_token is defined }} "
    writer.add_chat_template(
        [{"name": "default", "template": source + "default"}, {"name": "tool_use", "template": source + "{{ tools }}"}]
    )
    writer.add_tensor("a", np.zeros((2, 32), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    text = read_text(templates, None, None)
    assert rendered(text, None) == "<s></s><unk><pad>False default"
    assert rendered(text, [1]) == "<s></s><unk><pad>False [1]"


@pytest.mark.parametrize(
    ("default", "tool_use", "takes"),
    [
        ("{{ messages }}", None, False),
        ("{% if tools %}x{% endif %}", None, True),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}", None, True),
        ("{% set tools = 1 %}{{ tools }}{{ messages[0].tools }}{# tools #}tools", None, False),
        ("{{ messages }}", "{{ tools }}", True),
        ("{{ tools }}", "{{ messages }}", False),
        (None, "{% macro f() %}{{ tools|tojson }}{% endmacro %}", True),
    ],
)
def test_whether_a_template_takes_tools(default: str | None, tool_use: str | None, takes: bool) -> None:
    assert _core.ChatTemplate(default, tool_use=tool_use).takes_tools is takes


def test_published_templates_take_tools_where_their_rendering_shows_them(shared_data: Path) -> None:
    taking = 0
    for path in sorted((shared_data / "chat_templates").glob("*.jinja")):
        template = _core.ChatTemplate(path.read_text(), {"bos_token": "<s>", "eos_token": "</s>"})
        options = {"kwargs_json": json.dumps({"enable_thinking": False})}
        try:
            plain = template.render(json.dumps(MESSAGES), **options)
            shown = template.render(json.dumps(MESSAGES), tools_json=json.dumps(TOOLS), **options) != plain
        except _core.TemplateError:
            continue
        assert template.takes_tools or not shown, path.name
        taking += template.takes_tools
    assert taking > 10
