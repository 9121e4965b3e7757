"""What the core refuses says so in values: the exception's type, `code` and `param`."""

from collections.abc import Callable
from typing import Any

import pytest

from octavo import _core


def core(**options: Any) -> _core.EngineCore:
    given = {
        "num_blocks": 9,
        "block_size": 4,
        "kv_windows": [0],
        "max_num_seqs": 2,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
        "vocab_size": 100,
        "max_waiting": 1,
        **options,
    }
    return _core.EngineCore(**given)


def add(*prompts: list[int], **params: Any) -> None:
    core().add_call([_core.Prompt(prompt) for prompt in prompts], _core.SamplingParams(**params), now=0.0)


def render(source: str) -> None:
    _core.ChatTemplate(source).render('[{"role": "user", "content": "Hi"}]')


@pytest.mark.parametrize(
    ("refused", "kind", "code", "param"),
    [
        (lambda: _core.SamplingParams(temperature=9.0), _core.RefusedError, "invalid_value", "temperature"),
        (lambda: _core.SamplingParams(stop=[""]), _core.RefusedError, "invalid_value", "stop"),
        (lambda: core(block_size=0), _core.RefusedError, "invalid_value", "block_size"),
        (lambda: add([]), _core.RefusedError, "invalid_value", "prompt"),
        (lambda: add([1, 100]), _core.RefusedError, "token_id_out_of_range", "prompt"),
        (lambda: add([1], logit_bias=[(100, 1.0)]), _core.RefusedError, "token_id_out_of_range", "logit_bias"),
        (lambda: add([1] * 64), _core.PromptTooLongError, "context_length_exceeded", "prompt"),
        (lambda: add([1] * 30, max_tokens=20), _core.KvCapacityError, "kv_capacity_exceeded", "prompt"),
        (lambda: add(), _core.RefusedError, "invalid_value", "prompt"),
        (lambda: add([1], [2]), _core.RefusedError, "invalid_value", "prompt"),  # more than may ever wait
        (lambda: core(max_waiting=3).check_queue(3), _core.OverloadedError, "queue_full", None),
        (lambda: render("{{ raise_exception('no') }}"), _core.TemplateError, "template_error", "messages"),
        (lambda: _core.GgufFile(__file__), _core.GgufError, "invalid_gguf", None),
        (lambda: _core.Tokenizer.from_file(__file__), _core.RefusedError, "invalid_value", None),
    ],
)
def test_refusals(refused: Callable[[], object], kind: type[Exception], code: str, param: str | None) -> None:
    with pytest.raises(kind) as caught:
        refused()
    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.param) == (code, param)  # type: ignore[attr-defined]
    assert str(caught.value) == caught.value.args[0]
    assert isinstance(caught.value, RuntimeError if kind is _core.OverloadedError else ValueError)


def test_a_failure_is_a_value() -> None:
    one = core()
    reply = one.add_call([_core.Prompt([1])], _core.SamplingParams(), now=0.0)
    one.fail_all("out_of_luck", "it broke: badly")
    delta = one.take(reply)
    assert delta is not None and delta.finished and delta.error is not None
    assert (delta.error.code, delta.error.message) == ("out_of_luck", "it broke: badly")
    assert str(delta.error) == "out_of_luck: it broke: badly"
    (request,) = delta.requests
    assert request.finish_reason == "error"
