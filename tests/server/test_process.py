"""The real process, as it is deployed: a command line, a signal, an exit code."""

import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

PYTHON = Path(__file__).resolve().parents[2] / "python"
FLAGS = ["--load-format=dummy", "--device=cpu", "--max-model-len=128", "--kv-cache-memory=4MiB", "--port=0"]
COMMANDS = ["octavo serve tiny", "octavo.entrypoints.openai.api_server --model tiny"]


def url_of(process: "subprocess.Popen[bytes]", limit: float) -> str:
    """What the process says that it serves on, once it does."""
    assert process.stderr is not None
    deadline, said = time.monotonic() + limit, b""
    while b" on http" not in said or b". Try:" not in said:
        assert select.select([process.stderr], [], [], max(0.0, deadline - time.monotonic()))[0], said.decode()
        piece = os.read(process.stderr.fileno(), 65536)
        assert piece, said.decode()
        said += piece
    return said.decode().partition(". Try:")[0].rpartition(" on ")[2]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_process_serves_and_drains(command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{PYTHON}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", *command.split(), *FLAGS]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment) as process:
        try:
            url = url_of(process, limit=600.0)
            with urllib.request.urlopen(url + "/ready", timeout=120) as ready:
                assert ready.status == 200
            body = json.dumps({"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True}).encode()
            call = urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(call, timeout=120) as response:
                assert json.load(response)["usage"]["completion_tokens"] == 5
            process.send_signal(signal.SIGTERM)
            _, rest = process.communicate(timeout=120)
            assert process.returncode == 0, rest.decode()
        finally:
            process.kill()
