"""How commands end: exit codes and last words when somebody presses Ctrl-C, leaves, or closes or
fills a stream.
"""

from __future__ import annotations

import ast
import asyncio
import errno
import functools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from octavo import cli
from octavo.ending import describe, run_command
from octavo.server.config import ServerConfig
from octavo.server.serve import open_socket, serve_engine
from tests.conftest import REPOSITORY
from tests.server.scripted_engine import ScriptedEngine

ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{REPOSITORY / 'python'}:{REPOSITORY}", "PYTHONUNBUFFERED": ""}
OCTAVO = [sys.executable, "-m", "octavo"]
SCRIPTED = [sys.executable, "-m", "tests.scripted_chat", "/dev/null", "0"]
SLOW_LOAD = """
import sys, time, types
class AsyncEngine:
    @staticmethod
    def from_config(config):
        print("loading", flush=True)
        time.sleep(60)
sys.modules["octavo.engine.async_engine"] = types.ModuleType("octavo.engine.async_engine")
sys.modules["octavo.engine.async_engine"].AsyncEngine = AsyncEngine
"""

SWALLOWED = """
import importlib.abc, importlib.machinery, sys, time
class Torch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "torch" else None
    def exec_module(self, module):
        try:
            print("loading", flush=True)
            time.sleep(60)
        except BaseException:
            pass
sys.meta_path.insert(0, Torch())
"""
"""Some lines of torch's import take any exception for a library that is missing."""


def shell(line: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a line of bash; `octavo` and `scripted` are the real command and that with the scripted
    engine.
    """
    commands = f'octavo() {{ {" ".join(OCTAVO)} "$@"; }}; scripted() {{ {" ".join(SCRIPTED)} "$@"; }}; '
    environment = {**ENVIRONMENT, **options.pop("env", {})}
    return subprocess.run(
        ["bash", "-c", commands + line], capture_output=True, text=True, timeout=120, env=environment, **options
    )


MAIN = "from octavo import cli; sys.exit(cli.main(["
API_SERVER = "from octavo.entrypoints.openai import api_server as a; sys.exit(a.main(['--model', 'm', '--port', '0']))"
INTERRUPT = (signal.SIGINT, 130, "interrupted")
TERMINATE = (signal.SIGTERM, 143, "ended by SIGTERM")


@pytest.mark.parametrize("load", [SLOW_LOAD, SWALLOWED], ids=["slow", "swallowed"])
@pytest.mark.parametrize(
    ("start", "number", "code", "words"),
    [
        (f"{MAIN}'serve', 'm', '--port', '0']))", *INTERRUPT),
        (f"{MAIN}'serve', 'm', '--port', '0']))", *TERMINATE),
        (f"{MAIN}'chat', 'm']))", *INTERRUPT),
        (f"{MAIN}'chat', 'm']))", signal.SIGHUP, 129, "ended by SIGHUP"),
        (f"{MAIN}'generate', 'Hi']))", *INTERRUPT),
        (API_SERVER, *INTERRUPT),
        (API_SERVER, *TERMINATE),
    ],
)
def test_a_signal_while_loading(load: str, start: str, number: signal.Signals, code: int, words: str) -> None:
    command = [sys.executable, "-c", load + start]
    # What ran these tests may ignore the signal, as nohup does, and a process inherits that.
    heed = functools.partial(signal.signal, number, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, preexec_fn=heed
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    program = "api_server" if "api_server" in start else "octavo"
    said = [line for line in error.splitlines() if not line.endswith(" starts")]  # a server's first line
    assert (process.returncode, said) == (code, [f"{program}: {words}"])


def test_sigterm_leaves_nothing_of_a_download(tmp_path: Path) -> None:
    """Neither the folder that was being filled nor the installer that fills it."""
    code = """
import sys
from octavo.ending import run_command
from octavo.weights import default_model
run = default_model._run
def slow(_):
    print("fetching", flush=True)
    run([sys.executable, "-c", "import time; time.sleep(60)"])
default_model._run = slow
sys.exit(run_command("octavo", default_model.default_model_path))
"""
    environment = {**ENVIRONMENT, "XDG_CACHE_HOME": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "fetching\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert list((tmp_path / "octavo").iterdir()) == []


def test_ctrl_c_in_generate() -> None:
    command = [*SCRIPTED[:-1], "0.2", "generate", "Hi"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == "H"
        process.send_signal(signal.SIGINT)
        text, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "octavo: interrupted\n")
    assert text.endswith("\n") and "ello world".startswith(text[:-1])


@pytest.mark.parametrize("line", ["octavo version", "octavo --help", "octavo serve --help", "scripted generate Hi"])
def test_a_full_disk_under_the_output(line: str) -> None:
    done = shell(f"{line} >/dev/full")
    assert done.returncode == 2
    assert done.stderr == "octavo: error: the standard output cannot be written: No space left on device\n"


def test_a_full_disk_under_output_that_is_not_buffered() -> None:
    done = shell("scripted generate Hi >/dev/full", env={"PYTHONUNBUFFERED": "1"})
    assert done.returncode == 2
    assert done.stderr == "octavo: error: No space left on device for the output, or for temporary files (set TMPDIR)\n"


def test_a_full_disk_under_the_errors() -> None:
    done = shell("octavo serve --port 99999 2>/dev/full")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_reader_that_leaves() -> None:
    """As `head` does. The process is told by a pipe that has no reader from the start."""
    reader, writer = os.pipe()
    os.close(reader)
    for words in (["generate", "Hi"], ["version"]):
        done = subprocess.run(
            [*SCRIPTED, *words], stdout=writer, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (141, "")
    os.close(writer)


@pytest.mark.parametrize(
    ("line", "code", "out"),
    [
        ("octavo version <&- 2>&-", 0, "octavo 0"),
        ("octavo version <&- >&- 2>&-", 0, ""),
        ("octavo serve --port 99999 2>&-", 2, ""),
        ("octavo serve --nonsense >&- 2>&-", 2, ""),
        ("scripted chat <&-", 0, ""),
        ("scripted generate Hi <&- 2>&-", 0, "Hello world\n"),
        ("scripted generate Hi >&-", 0, ""),
    ],
)
def test_closed_streams(line: str, code: int, out: str) -> None:
    done = shell(line)
    assert (
        (done.returncode, done.stderr) == (code, "") and done.stdout.startswith(out) and bool(done.stdout) == bool(out)
    )


def test_what_is_opened_later_does_not_become_a_closed_stream() -> None:
    """What a library prints to the standard error would go into it."""
    code = "import os; from octavo.ending import run_command; print(run_command('x', lambda: os.open('/etc/hosts', 0)))"
    assert shell(f'{sys.executable} -c "{code}" 2>&- <&-').stdout == "3\n"


def test_a_home_that_cannot_be_written() -> None:
    done = shell("octavo generate Hi", env={"HOME": "/dev/null", "XDG_CACHE_HOME": ""})
    assert done.returncode == 2
    assert done.stderr.endswith(
        "octavo: error: /dev/null/.cache/octavo: Not a directory; set XDG_CACHE_HOME to a folder that can be written\n"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("path", "variable"),
    [
        ("/home/a/.cache/octavo/model.gguf", "XDG_CACHE_HOME"),
        ("/home/a/.cache", "XDG_CACHE_HOME"),  # where there is none yet
        ("/hub/models--a", "HF_HOME"),
        ("/home/a/.triton/cache/x", "TRITON_CACHE_DIR"),
        ("/home/a/.cache/octavo2", None),
        ("/home/a/models/config.json", None),
        ("/", None),
    ],
)
def test_the_variable_that_moves_a_folder(path: str, variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/a")
    monkeypatch.setenv("HF_HOME", "/hub")
    for name in ("XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    said = describe(OSError(errno.EROFS, "Read-only file system", path))
    hint = f"; set {variable} to a folder that can be written" if variable else ""
    assert said == f"{path}: Read-only file system{hint}"
    assert describe(FileNotFoundError(errno.ENOENT, "No such file", path)) == f"{path}: No such file"


@pytest.mark.parametrize(("host", "url"), [("0.0.0.0", "http://127.0.0.1:"), ("127.0.0.1", "http://127.0.0.1:")])
def test_the_address_that_is_printed_can_be_called(host: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> tuple[int, int]:
        engine, config = ScriptedEngine(), ServerConfig(host=host, port=0)
        engine.attach_loop(asyncio.get_running_loop())
        listener = open_socket(config)
        port: int = listener.getsockname()[1]
        serving = asyncio.ensure_future(serve_engine(engine, config, listener))
        said = ""
        while "Try:" not in said:
            await asyncio.sleep(0.02)
            said += capsys.readouterr().err
        assert f" on {url}{port}. Try:\n\n  curl {url}{port}/v1/chat/completions" in said
        others = f"Other machines reach it at http://{socket.gethostname()}:{port}."
        assert (others in said) == (host == "0.0.0.0") and "://0.0.0.0" not in said
        async with aiohttp.ClientSession() as http, http.get(f"{url}{port}/health") as response:
            status = response.status
        os.kill(os.getpid(), signal.SIGTERM)
        return status, await serving

    assert asyncio.run(main()) == (200, 0)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a" * 70, "256.1.1.1"])
def test_a_host_that_is_none(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--host", host]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"octavo: error: host = '{host}': no address of this machine (") and error.count("\n") == 1


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def ends_with(error: BaseException) -> int:
        def fails() -> int:
            raise error

        return run_command("prog", fails)

    assert run_command("prog", lambda: 7) == 7
    assert ends_with(ValueError("field = 3: must be 4")) == 2
    assert ends_with(OSError(errno.EADDRINUSE, "cannot listen")) == 2
    assert ends_with(RuntimeError("the engine is dead")) == 1
    assert capsys.readouterr().err.splitlines() == [
        "prog: error: field = 3: must be 4",
        "prog: error: cannot listen",
        "prog: error: the engine is dead",
    ]
    assert ends_with(KeyboardInterrupt()) == 130
    capsys.readouterr()
    assert ends_with(BrokenPipeError(errno.EPIPE, "Broken pipe", "/run/other")) == 2  # not the output's
    assert capsys.readouterr().err == "prog: error: /run/other: Broken pipe\n"
    with pytest.raises(ZeroDivisionError):
        ends_with(ZeroDivisionError())


def test_little_is_loaded_before_an_interrupt_is_caught() -> None:
    """An interrupt before that is a traceback, so it has to come early."""
    for module in ("octavo.cli", "octavo.entrypoints.openai.api_server"):
        code = f"import sys; before = set(sys.modules); import {module}; print(sorted(set(sys.modules) - before))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
        loaded = set(ast.literal_eval(done.stdout))
        assert len(loaded) < 20 and not loaded & {"typing", "re", "argparse", "logging", "dataclasses", "pathlib"}
