"""The command line: which flags reach which field, and what is said about the others."""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import octavo
from octavo import cli, commands, vllm_flags
from octavo.bench import commands as bench
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
    "flag",
    [
        "--enable-lora",
        "--no-async-scheduling",
        "--enable_log_requests",
        "--kv-offloading-size=4",
        "--hf-overrides.rope_theta=1e6",
        "--disable-sliding-window",
    ],
)
def test_flags_of_vllm_that_do_not_work_are_named(served: Calls, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    named = flag.partition("=")[0].replace("_", "-").replace("rope-theta", "rope_theta")
    for main, words, program in ((cli.main, ["serve", flag], "octavo serve"), (api_server.main, [flag], "api_server")):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"usage: {program} ") and f"{program}: error: {named}: not supported yet" in error
    assert not served


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--disable-log-requests", "requests are not logged"),
        ("--no-enable-log-requests", "requests are not logged"),
        ("--swap-space 16", "nothing is swapped"),
        ("--swap_space=16", "nothing is swapped"),
        ("--trust-remote-code", "a model that needs it is refused"),
        ("--no-trust-remote-code", "a model that needs it is refused"),
        ("--download-dir /models", "HF_HOME"),
        ("--limit-mm-per-prompt.image 0", "only text is served"),
        ("--compilation-config {}", "nothing is compiled by torch"),
        ("-O3", "nothing is compiled by torch"),
        ("--distributed-executor-backend mp", "one process"),
        ("--async-scheduling", "while another runs"),
    ],
)
def test_harmless_flags_of_vllm_are_accepted_with_one_line(
    served: Calls, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for main, words, program in ((cli.main, ["serve", "m"], "octavo"), (api_server.main, ["--model=m"], "api_server")):
        assert main([*words, *line.split(), "--port", "9000"]) == 0
        error = capsys.readouterr().err
        flag = re.split("[ =3]|[.]image", line)[0].replace("_", "-")
        assert error.startswith(f"{program}: warning: {flag} has no effect: ") and said in error
        assert error.count("\n") == 1
    assert served == [(EngineConfig(model="m"), ServerConfig(port=9000))] * 2


def test_embeddings_have_vllms_flags(served: Calls) -> None:
    pooler = '{"pooling_type": "MEAN"}'
    for flag, words in (
        ("--pooler-config", ["--runner", "pooling"]),
        ("--override-pooler-config", ["--task", "embed"]),
    ):
        assert cli.main(["serve", "m", *words, flag, pooler, "--hf-overrides", '{"is_matryoshka": true}']) == 0
    for config, _ in served:
        assert (config.wanted_runner, config.pooler_config) == ("pooling", pooler)


def test_flags_of_vllm_that_ask_for_what_happens_say_nothing(served: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    line = "--no-enable-lora --cpu-offload-gb 0 -pp 1 --convert embed --revision main"
    assert cli.main(["serve", "m", *line.split()]) == 0
    assert capsys.readouterr().err == ""
    for words in (["--cpu-offload-gb=4"], ["-pp", "2"], ["--convert", "classify"]):
        with pytest.raises(SystemExit):
            cli.main(["serve", "m", *words])
        assert "not supported yet, only" in capsys.readouterr().err
    assert len(served) == 1


def test_each_flag_of_vllm_has_one_fate() -> None:
    kinds = [
        set(vllm_flags.SWITCHES),
        set(vllm_flags.SETTINGS),
        set(vllm_flags.NEUTRAL),
        set(vllm_flags.UNSUPPORTED),
        {
            flag
            for action in commands.serve_parser("serve")._actions
            if action.help != argparse.SUPPRESS
            for flag in action.option_strings
        },
    ]
    for number, kind in enumerate(kinds):
        for other in kinds[number + 1 :]:
            assert not kind & other


@pytest.mark.parametrize(
    ("line", "program", "meant"),
    [
        ("serve --max-seq-len 4096", "octavo serve", "--max-model-len"),
        ("serve --gpu-memory-utilisation 0.9", "octavo serve", "--gpu-memory-utilization"),
        ("chat --temprature=1", "octavo chat", "--temperature"),
        ("generate Hi --max-token 5", "octavo generate", "--max-tokens"),
        ("bench serve --concurency 4", "octavo bench serve", "--concurrency"),
        ("bench latency --repeats 4", "octavo bench latency", "--repeat"),
    ],
)
def test_a_misspelt_flag(line: str, program: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(line.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"usage: {program} [-h]")
    assert f"{program}: error: unrecognized arguments: --" in error and f"(did you mean {meant}?)" in error


def test_a_text_to_continue_may_look_like_a_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("octavo.terminal.generate", lambda *args: calls.append(args[2]) or 0)
    for text in ("--a_b c", "--a_b"):
        assert cli.main(["generate", "--", text]) == 0
    assert cli.main(["generate", "--x_y z"]) == 0  # a flag has no spaces
    assert calls == ["--a_b c", "--a_b", "--x_y z"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["serve", "--max-model-len", "long"], "'long' is not a number"),
        (["serve", "--kv-cache-memory", "2X"], "'2X' is not a size"),
        (["serve", "--dtype", "int3"], "'int3' is not one of"),
        (["serve", "--port"], "expected one argument"),
        (["nonsense"], "invalid choice"),
        (["--port", "9000", "serve"], "--port: flags come after the command"),
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
        (["serve", "-q", "marlin"], "quantization = 'marlin': must be one of fp8, int8, int4, gptq"),
        (["serve", "--port", "70000"], "port = 70000"),
        (["serve", "--gpu-memory-utilization", "1.5"], "gpu_memory_utilization = 1.5"),
        (["serve", "--spec-method", "ngram", "--spec-tokens", "0"], "num_speculative_tokens = 0"),
        (["serve", "--spec-method", "self", "--spec-tokens", "100"], "num_speculative_tokens = 100"),
        (["serve", "--spec-method", "draft_model"], "speculative_config: model = None"),
        (["serve", "--speculative-config", '{"method": "ngarm"}'], "speculative_config: method = 'ngarm'"),
        (["serve", "--speculative-config", "{"], "speculative_config = '{': is not JSON"),
        (
            ["serve", "--speculative-config", '{"method": "ngram", "prompt_lookup_min": 5, "prompt_lookup_max": 4}'],
            "speculative_config: prompt_lookup_max = 4: must be an integer from 5",
        ),
    ],
)
def test_bad_values_end_with_2_and_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


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


@pytest.mark.parametrize("word", ["version", "--version", "-v"])
def test_module_and_version(word: str) -> None:
    done = subprocess.run([sys.executable, "-m", "octavo", word], capture_output=True, text=True, check=True)
    assert done.stdout == f"octavo {octavo.__version__}\n"


def parsers_below(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from parsers_below(sub)


def test_help_of_every_command_explains_every_flag() -> None:
    names = set()
    for parser in parsers_below(commands.build_parser()):
        names.add(parser.prog)
        assert f"usage: {parser.prog} " in parser.format_help()
        for action in parser._actions:
            assert action.help or action.choices, f"{parser.prog} {action.dest}"
    assert {"octavo serve", "octavo chat", "octavo bench", "octavo bench serve", "octavo bench memory"} <= names
    assert len(names) == 16


def test_the_batching_benchmark_has_something_to_compare() -> None:
    parser = commands.build_parser()
    options = parser.parse_args(["bench", "batching"])
    # More than one batch, and lengths that differ widely: else static is as good as continuous.
    assert options.num >= 2 * bench.BATCHING_SEQS
    lengths = sorted(length for _, length in bench.batching_items(options, vocab_size=1000))
    assert len(lengths) == options.num
    assert lengths[-1] <= options.output_len and lengths[-1] > 8 * lengths[0]
    assert lengths[len(lengths) // 2] < options.output_len / 3
    assert bench.batching_items(options, 1000) == bench.batching_items(options, 1000)
