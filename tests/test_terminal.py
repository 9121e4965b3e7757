"""`octavo generate` and `octavo chat` over the scripted engine."""

import io

import pytest

from octavo import _core, cli
from octavo.engine.async_engine import AsyncEngine
from octavo.terminal import Sampling
from tests.server.scripted_engine import ScriptedEngine


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedEngine]:
    made: list[ScriptedEngine] = []

    def from_config(_: object) -> ScriptedEngine:
        made.append(ScriptedEngine())
        return made[-1]

    monkeypatch.setattr(AsyncEngine, "from_config", from_config)
    return made


def test_generate(engines: list[ScriptedEngine], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "Hi", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out == "Hello\n"
    assert not engines[0]._thread.is_alive()


def test_generate_from_standard_input(
    engines: list[ScriptedEngine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi"))
    assert cli.main(["generate", "-"]) == 0
    assert capsys.readouterr().out == "Hello world\n"


@pytest.mark.parametrize("command", [["generate", "-"], ["chat"]])
def test_standard_input_that_is_no_text(
    engines: list[ScriptedEngine],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert cli.main(command) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("octavo: error: the standard input is not UTF-8: ")


def test_a_model_without_a_chat_template(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    engine.chat_template = None
    monkeypatch.setattr(AsyncEngine, "from_config", lambda _: engine)
    assert cli.main(["chat"]) == 2
    assert "org/tiny has no chat template: name one with --chat-template" in capsys.readouterr().err


def test_an_answer_that_is_cut_says_so(
    engines: list[ScriptedEngine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n"))
    assert cli.main(["chat", "--max-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("Hell\n", "(cut after 4 tokens: see --max-tokens)\n")


def test_a_prompt_that_is_too_long_ends_with_2(
    engines: list[ScriptedEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "x" * 600]) == 2
    assert "max_model_len" in capsys.readouterr().err


def test_chat_keeps_the_conversation(
    engines: list[ScriptedEngine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n/help\ntwo\n/clear\nthree\n"))
    prompts: list[str] = []
    encode = ScriptedEngine.encode_chat

    async def recorded(self: ScriptedEngine, messages_json: str) -> object:
        prompts.append(messages_json)
        return await encode(self, messages_json)

    monkeypatch.setattr(ScriptedEngine, "encode_chat", recorded)
    assert cli.main(["chat", "--system", "Be brief."]) == 0
    printed = capsys.readouterr()
    assert printed.out == "Hello world\n" * 3  # and no prompt, since nobody sits there
    assert "/system TEXT" in printed.err and "starts over" in printed.err
    system = '{"role": "system", "content": "Be brief."}'
    assert prompts == [
        f'[{system}, {{"role": "user", "content": "one"}}]',
        f'[{system}, {{"role": "user", "content": "one"}}, {{"role": "assistant", "content": "Hello world"}}, '
        '{"role": "user", "content": "two"}]',
        f'[{system}, {{"role": "user", "content": "three"}}]',
    ]


def test_chat_goes_on_after_a_message_that_is_too_long(
    engines: list[ScriptedEngine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 600 + "\nshort\n"))
    assert cli.main(["chat", "--max-tokens", "20"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "Hello world\n"
    assert "has 606 tokens and --max-tokens is 20, but the model's context is 512 tokens" in captured.err


def test_the_models_defaults_count_where_no_flag_does(
    engines: list[ScriptedEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ScriptedEngine()
    engine.generation_defaults = {"max_tokens": 3, "top_k": 5}
    sampling = Sampling({"temperature": 0.7, "max_tokens": 256}, {"top_k": 4})
    params = sampling.params(engine, _core.Prompt([1]))
    assert (params.temperature, params.max_tokens, params.top_k) == (0.7, 3, 4)
    assert sampling.params(engine, _core.Prompt([1] * 510)).max_tokens == 2
    engine.shutdown()
    assert cli.main(["generate", "Hi", "--temperature", "-1"]) == 2 and not engines
