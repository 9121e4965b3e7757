"""The two servers that clients are tried against, as processes of their own."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.clients.served import MODEL
from tests.server.test_process import url_of

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent


@contextlib.contextmanager
def servers() -> Iterator[dict[str, str]]:
    """Starts both and ends them; within, they answer. Gives the environment of a `use_*.py`."""
    paths = f"{REPOSITORY / 'python'}:{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    # With the paths among the arguments: clients run without these.
    start_scripted = [
        "env",
        f"PYTHONPATH={paths}",
        "OMP_NUM_THREADS=1",
        sys.executable,
        "-m",
        "tests.clients.scripted_server",
    ]
    serve = ["octavo", "serve", "--port=0", f"--served-model-name={MODEL}", "--max-model-len=4096", "--device=cpu",
             "--dtype=float32", "--kv-cache-memory=512MiB", f"--chat-template={HERE / 'tools.jinja'}"]  # fmt: skip
    with (
        subprocess.Popen(
            [sys.executable, "-m", *serve], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
        ) as real,
        subprocess.Popen(
            start_scripted,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as scripted,
    ):
        try:
            assert scripted.stdout is not None
            yield {
                "OCTAVO_REAL": url_of(real, limit=600.0),
                "OCTAVO_SCRIPTED": scripted.stdout.readline().strip(),
                "OCTAVO_SCRIPTED_COMMAND": json.dumps(start_scripted),
            }
        finally:
            real.terminate()
            scripted.kill()
