"""How calls of tools and reasoning are written, found from published chat templates."""

import json
from pathlib import Path
from typing import ClassVar

import pytest

from octavo import _core
from octavo.answers import ModelAnswers, ToolUse
from octavo.config import EngineConfig
from octavo.engine.outputs import tell_apart
from octavo.outputs import CompletionOutput, ToolCall
from octavo.sampling_params import SamplingParams

# Of each template that takes tools, or shows reasoning: (calls, reasoning).
SHOWN = {
    "command_a_tool_use": (None, None),
    "deepseek_v3": (None, "think"),
    "exaone4": ("hermes", "think"),
    "falcon_h1": ("hermes", None),
    "gemma4": (None, None),
    "granite-3.0-instruct": (None, None),
    "jamba": (None, None),
    "llama3_2_vision": ("llama3_json", None),
    "llama4": ("llama3_json", None),
    "mistral_v2v3": ("mistral", None),
    "mistral_v3_tekken": ("mistral", None),
    "phi_4": (None, "think"),
    "qwen2.5-instruct": ("hermes", None),
    "qwen3": ("hermes", "think"),
    "qwen3-coder": (None, None),
    "qwen3_5": ("hermes", "think"),
}
USER = json.dumps([{"role": "user", "content": "Hi"}])


def template(shared_data: Path, name: str) -> _core.ChatTemplate:
    source = (shared_data / "chat_templates" / f"{name}.jinja").read_text()
    return _core.ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


def test_published_templates_show_their_formats(shared_data: Path) -> None:
    shown = {}
    for path in sorted((shared_data / "chat_templates").glob("*.jinja")):
        compiled = template(shared_data, path.stem)
        formats = (compiled.call_format, compiled.reasoning)
        if compiled.takes_tools or formats != (None, None):
            shown[path.stem] = formats
    assert shown == SHOWN


@pytest.mark.parametrize(
    ("calls", "text"),
    [
        ("qwen3", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'),
        ("mistral_v3_tekken", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "123456789"}]'),
        ("llama3_2_vision", '{"name": "f", "parameters": {"a": 1}}'),
    ],
)
def test_what_a_template_writes_of_earlier_calls_is_read_as_calls(shared_data: Path, calls: str, text: str) -> None:
    """The template is the oracle: as it shows earlier calls, so its model was taught to write them."""
    compiled = template(shared_data, calls)
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    rendered = compiled.render(json.dumps(messages), tools_json=json.dumps(tools), add_generation_prompt=False)
    assert text in rendered.replace("\\n", "\n")
    written = rendered[rendered.rindex(text) :]
    for end in ("<|im_end|>", "<|eot_id|>", "</s>"):
        written = written.split(end)[0]
    format = _core.AnswerFormat(calls=compiled.call_format, tools=["f"])
    reasoning, content, read = format.read(written)
    assert (reasoning, content) == (None, None)
    assert [(name, json.loads(arguments)) for name, arguments in read] == [("f", {"a": 1})]


SOURCE = "{{ messages }}{{ tools }}<tool_call></think>"


def answers(compiled: _core.ChatTemplate, **options: str) -> ModelAnswers:
    return ModelAnswers(EngineConfig(model="m", **options), compiled, _core.Tokenizer.bytes_only(300))


def test_flags_override_the_template() -> None:
    compiled = _core.ChatTemplate(SOURCE)
    assert (answers(compiled).calls, answers(compiled).reasoning) == ("hermes", "think")
    chosen = answers(compiled, tool_call_parser="llama4_json", reasoning_parser="none")
    assert (chosen.calls, chosen.reasoning) == ("llama3_json", None)
    with pytest.raises(ValueError, match="tool_call_parser = 'pythonic': must be one of auto, none, hermes"):
        EngineConfig(model="m", tool_call_parser="pythonic")


def test_an_unknown_format_is_said_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    unknown = answers(_core.ChatTemplate("{{ messages }}{{ tools }}<tool_call><function=f>"))
    assert unknown.calls is None
    unknown.warn()
    assert "calls of tools stay text" in caplog.text


def test_a_prompt_may_open_the_reasoning(shared_data: Path) -> None:
    """As Qwen's templates do, where thinking is not turned off."""
    compiled = template(shared_data, "qwen3_5")
    models = answers(compiled)
    for kwargs, expected in (
        ('{"enable_thinking": true}', ("hm", "Yes")),
        ('{"enable_thinking": false}', (None, "hm</think>Yes")),
    ):
        rendered = compiled.render(USER, kwargs_json=kwargs)
        format = models.format(_core.Prompt(rendered.encode()), ToolUse())
        assert format is not None
        assert format.read("hm</think>Yes")[:2] == expected


def test_markers_that_are_special_tokens_stay_in_the_text() -> None:
    class Tokens:
        special_tokens: ClassVar = {"[TOOL_CALLS]": 5}

        def token_to_id(self, _: str) -> None: ...

    models = ModelAnswers(EngineConfig(model="m", tool_call_parser="mistral"), None, Tokens())  # type: ignore[arg-type]
    params = SamplingParams()
    format = models.format(_core.Prompt([1]), ToolUse(["f"]))
    assert models.params(format, params).skip_special_tokens is False
    assert models.params(None, params).skip_special_tokens is True


def test_parts_of_an_answer_of_llm_chat() -> None:
    choice = CompletionOutput(0, text='<think>h</think>So <tool_call>{"name": "f", "arguments": {}}</tool_call>')
    tell_apart(_core.AnswerFormat(reasoning="think", calls="hermes"), choice)
    assert (choice.reasoning, choice.content, choice.tool_calls) == ("h", "So", [ToolCall("f", "{}")])
    plain = CompletionOutput(0, text="So")
    tell_apart(None, plain)
    assert (plain.reasoning, plain.content, plain.tool_calls) == (None, "So", [])


@pytest.mark.parametrize("name", ["qwen3", "llama-3-instruct", "mistral_v3_tekken", "gemma3", "zephyr"])
def test_the_last_message_is_continued(shared_data: Path, name: str) -> None:
    """transformers is the oracle: it renders with the same wish, with a tag of its own behind the message."""
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (shared_data / "chat_templates" / f"{name}.jinja").read_text()
    messages = [
        {"role": "user", "content": "Say <|im_end|> it"},
        {"role": "assistant", "content": "It"},
        {"role": "user", "content": "Go on"},
        {"role": "assistant", "content": "It is"},
    ]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    (expected,), _ = render_jinja_template([messages], chat_template=source, continue_final_message=True, **tokens)
    tokenizer = _core.Tokenizer.bytes_only(256)
    prompt = tokenizer.encode_chat(
        _core.ChatTemplate(source, tokens),
        json.dumps(messages),
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert tokenizer.decode(prompt.token_ids) == expected and expected.endswith("It is")
