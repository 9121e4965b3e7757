"""The command line: which flags reach which field, and what is said about the others."""

import argparse
import subprocess
import sys
from typing import Any

import pytest

from octavo import cli
from octavo.bench import commands
from octavo.config import DEFAULT_MODEL, EngineConfig
from octavo.entrypoints.openai import api_server
from octavo.server.config import ServerConfig


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, ServerConfig]]:
    """Records what `serve` is called with."""
    calls: list[tuple[EngineConfig, ServerConfig]] = []

    def record(engine: EngineConfig, server: ServerConfig) -> int:
        calls.append((engine, server))
        return 0

    monkeypatch.setattr("octavo.server.serve.serve", record)
    return calls


Calls = list[tuple[EngineConfig, ServerConfig]]


def test_serve_without_a_model_serves_the_default_one(served: Calls) -> None:
    assert cli.main(["serve"]) == 0
    assert served == [(EngineConfig(), ServerConfig())]
    assert served[0][0].model == DEFAULT_MODEL


def test_model_by_place_or_by_flag(served: Calls) -> None:
    assert cli.main(["serve", "m", "--port", "9000"]) == 0
    assert cli.main(["serve", "--model", "m", "--port=9000"]) == 0
    assert served[0] == served[1] == (EngineConfig(model="m"), ServerConfig(port=9000))


@pytest.mark.parametrize(
    "line",
    [
        "--served-model-name foo ./model",
        "--served-model-name foo org/model --port 9000",
        "--served-model-name ./model",
        "--served-model-name=weights.gguf",
        "--served-model-name tests",
        "--port 9000 --api-key secret org/model",
        "--allowed-hosts llm.internal org/model",
    ],
)
def test_a_list_flag_does_not_swallow_the_model(served: Calls, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", *line.split()]) == 2
    assert api_server.main(line.split()) == 2
    errors = capsys.readouterr().err
    assert errors.count("put the model before --") == 2 and "secret" not in errors
    assert not served


@pytest.mark.parametrize(
    ("line", "model", "names"),
    [
        ("./model --served-model-name foo bar", "./model", ("foo", "bar")),
        ("--served-model-name foo bar --model ./model", "./model", ("foo", "bar")),
        ("--model org/model --served-model-name tests", "org/model", ("tests",)),
        ("--served-model-name foo -- org/model", "org/model", ("foo",)),
        ("--served-model-name foo --served-model-name bar --port 9000", DEFAULT_MODEL, ("foo", "bar")),
    ],
)
def test_names_beside_a_model(served: Calls, line: str, model: str, names: tuple[str, ...]) -> None:
    assert cli.main(["serve", *line.split()]) == 0
    assert (served[0][0].model, served[0][0].served_model_name) == (model, names)


def test_model_given_twice(served: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "m", "--model", "n"]) == 2
    assert "given twice" in capsys.readouterr().err
    assert not served


def test_vllm_deploy_command(served: Calls) -> None:
    line = "--model M --tensor-parallel-size 1 --gpu-memory-utilization 0.9 --max-model-len 25k --host 0.0.0.0"
    assert api_server.main(line.split()) == 0
    assert served == [
        (EngineConfig(model="M", gpu_memory_utilization=0.9, max_model_len=25_000), ServerConfig(host="0.0.0.0"))
    ]


def test_underscores_and_short_flags(served: Calls) -> None:
    assert cli.main(["serve", "m", "--max_num_seqs=7", "-tp", "1", "--api-key", "a", "b", "--api_key", "c"]) == 0
    assert served == [(EngineConfig(model="m", max_num_seqs=7), ServerConfig(api_key=("a", "b", "c")))]


@pytest.mark.parametrize(
    "flag", ["--trust-remote-code", "--enable-lora", "--kv-cache-dtype=fp8", "--no-async-scheduling", "--swap_space=4"]
)
def test_flags_of_vllm_that_do_not_work_are_named(served: Calls, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for main, words in ((cli.main, ["serve", flag]), (api_server.main, [flag])):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        assert f"{flag.partition('=')[0].replace('_', '-')}: not supported yet" in capsys.readouterr().err
    assert not served


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["serve", "--max-model-len", "long"], "'long' is not a number"),
        (["serve", "--kv-cache-memory", "2X"], "'2X' is not a size"),
        (["serve", "--dtype", "int3"], "'int3' is not one of"),
        (["serve", "--port"], "expected one argument"),
        (["nonsense"], "invalid choice"),
    ],
)
def test_bad_flags(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "--tensor-parallel-size", "2"], "tensor_parallel_size = 2"),
        (["serve", "-q", "awq"], "quantization = 'awq'"),
        (["serve", "--port", "70000"], "port = 70000"),
        (["serve", "--gpu-memory-utilization", "1.5"], "gpu_memory_utilization = 1.5"),
    ],
)
def test_bad_values_end_with_2_and_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_no_flag_of_ours_is_listed_as_unsupported() -> None:
    parser = argparse.ArgumentParser()
    cli.add_serve_flags(parser)
    ours = {flag for action in parser._actions for flag in action.option_strings}
    assert not ours & cli.UNSUPPORTED_VLLM_FLAGS


def test_generate_and_chat_reach_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("octavo.terminal.generate", lambda *args: calls.append(args) or 0)
    monkeypatch.setattr("octavo.terminal.chat", lambda *args, **kwargs: calls.append((args, kwargs)) or 0)
    assert cli.main(["generate", "Once upon", "--max-tokens", "5", "--temperature", "0", "--seed", "3"]) == 0
    config, sampling, prompt = calls[0]
    assert (config.seed, sampling.given, prompt) == (3, {"max_tokens": 5, "temperature": 0.0}, "Once upon")
    assert cli.main(["chat", "m", "--system", "Be brief."]) == 0
    assert calls[1][0][0].model == "m"
    assert calls[1][1] == {"system": "Be brief."}


def test_module_and_version() -> None:
    done = subprocess.run([sys.executable, "-m", "octavo", "version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("octavo ")


def test_help_of_every_command() -> None:
    for words in (["--help"], ["serve", "--help"], ["chat", "--help"], ["generate", "--help"], ["bench", "--help"]):
        done = subprocess.run([sys.executable, "-m", "octavo", *words], capture_output=True, text=True, check=True)
        assert "usage: octavo" in done.stdout


def test_the_batching_benchmark_has_something_to_compare() -> None:
    parser = cli.build_parser()
    options = parser.parse_args(["bench", "batching"])
    # More than one batch, and lengths that differ widely: else static is as good as continuous.
    assert options.num >= 2 * commands.BATCHING_SEQS
    lengths = sorted(length for _, length in commands.batching_items(options, vocab_size=1000))
    assert len(lengths) == options.num
    assert lengths[-1] <= options.output_len and lengths[-1] > 8 * lengths[0]
    assert lengths[len(lengths) // 2] < options.output_len / 3
    assert commands.batching_items(options, 1000) == commands.batching_items(options, 1000)
