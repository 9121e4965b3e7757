"""TGI's deploy command: flags and variables of its launcher, and the image that takes the same."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from octavo import tgi_flags
from octavo.config import EngineConfig
from octavo.entrypoints import launcher
from octavo.server.config import ServerConfig

ROOT = Path(__file__).resolve().parent.parent
Calls = list[tuple[EngineConfig, ServerConfig]]
GIVEN = {"MODEL_ID": "", "PORT": "", "API_KEY": "", "HOSTNAME": "a-container"}  # whatever the machine has of these


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Records what is served."""
    calls: Calls = []
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("octavo.server.serve.serve", lambda engine, server: calls.append((engine, server)) or 0)
    return calls


def test_the_guides_command(served: Calls) -> None:
    line = (
        "--model-id org/model --num-shard 1 --port 8080 --max-concurrent-requests 64 --max-input-tokens 1000 "
        "--max-total-tokens 2048 --max-batch-prefill-tokens 4096 --quantize eetq --dtype bfloat16 "
        "--cuda-memory-fraction 0.8 --api-key secret --payload-limit 2000000 --max-best-of 4 --cuda-graphs 1,2,4 "
        "--speculate 3"
    )
    assert launcher.main(line.split()) == 0
    assert served == [
        (
            EngineConfig(
                model="org/model",
                max_waiting=64,
                max_model_len=2048,
                max_num_batched_tokens=4096,
                quantization="int8",
                dtype="bfloat16",
                gpu_memory_utilization=0.8,
                cudagraph_capture_sizes=(1, 2, 4),
                spec_method="ngram",
                spec_tokens=3,
            ),
            ServerConfig(
                host="0.0.0.0",
                port=8080,
                api_key=("secret",),
                max_body_size=2_000_000,
                max_input_tokens=1000,
                max_best_of=4,
                shutdown_timeout=90.0,
            ),
        )
    ]


def test_variables_count_where_flags_are_not_given(served: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODEL_ID": "org/model", "PORT": "80", "MAX_TOTAL_TOKENS": "2048", "NUM_SHARD": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launcher.main(["--port", "8080"]) == 0
    engine, server = served[0]
    assert (engine.model, engine.max_model_len, server.port, server.host) == ("org/model", 2048, 8080, "0.0.0.0")


def test_what_has_no_effect_is_said(
    served: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "true")
    monkeypatch.setenv("JSON_OUTPUT", "false")
    assert launcher.main(["--waiting-served-ratio", "1.2", "--sharded", "false"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" has no effect")[0] for line in lines] == [
        "octavo-launcher: warning: --waiting-served-ratio",
        "octavo-launcher: warning: --trust-remote-code",
    ]
    assert len(served) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--sharded true", "--sharded true: not supported yet"),
        ("--otlp-endpoint http://a", "--otlp-endpoint: not supported yet"),
        ("--quantize exl2", "--quantize exl2: not supported, only awq, gptq"),
        ("--num-shard 2", "tensor_parallel_size = 2: only 1 is supported"),
        ("--nonsense 2", "unrecognized arguments: --nonsense 2"),
    ],
    ids=["sharded", "otlp", "quantize", "shards", "unknown"],
)
def test_what_is_refused(served: Calls, words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = launcher.main(words.split())
    except SystemExit as ended:
        code = int(str(ended.code))
    assert code == 2 and said in capsys.readouterr().err
    assert served == []


def test_each_flag_of_tgi_has_one_fate() -> None:
    flags = tgi_flags._flags()
    assert len(flags) == len(set(flags)) and set(tgi_flags.SWITCHES) <= set(flags)


def test_the_launcher_is_a_program_that_reads_its_variables(tmp_path: Path) -> None:
    """A process of its own, which finds no model under the name that its environment gives."""
    environment = {**os.environ, "MODEL_ID": str(tmp_path / "none"), "PORT": "0", "PYTHONPATH": str(ROOT / "python")}
    command = [sys.executable, "-m", "octavo.entrypoints.launcher", "--hostname", "127.0.0.1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2 and "none" in result.stderr and "Traceback" not in result.stderr


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, as its format has them."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)
    ]


def test_the_image_runs_the_launcher_and_not_as_root() -> None:
    steps = instructions()
    known = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT"}
    assert {word for word, _ in steps} <= known
    assert steps[0][0] == "FROM" and sum(word == "FROM" for word, _ in steps) == 2
    assert steps[-1] == ("ENTRYPOINT", '["octavo-launcher"]')  # without a shell, so that signals reach it
    words = [word for word, _ in steps]
    user = words.index("USER")
    assert steps[user][1] == "octavo" and "RUN" not in words[user:]
    assert any(word == "RUN" and "useradd" in rest for word, rest in steps[:user])
    environment = dict(part.split("=", 1) for word, rest in steps if word == "ENV" for part in shlex.split(rest))
    exposed = next(rest for word, rest in steps if word == "EXPOSE")
    assert environment["PORT"] == exposed == "80"
    assert "--port" in tgi_flags.RENAMED and tgi_flags._variable("--port") == "PORT"


def test_the_entry_point_is_a_script_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'octavo-launcher = "octavo.entrypoints.launcher:main"' in project
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"python", "rust", "kernels", "Cargo.toml", "pyproject.toml", "README.md"} & set(ignored)
    for word, rest in instructions():
        if word == "RUN":  # each is a command line that a shell reads
            subprocess.run(["sh", "-n", "-c", rest], check=True)
