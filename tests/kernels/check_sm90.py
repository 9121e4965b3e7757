"""What the tests `test_compile_sm90_*.py` ask of a module of cases: a file each, as workers share
files out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SHARED_LIMIT = 227 * 1024  # bytes a program may use on sm_90
# Bytes a thread. A few scalars around a loop cost nothing (the Gluon kernels have 128); an
# accumulator has 256 or more.
STACK_LIMIT = 192

# A minute of work each: the limit is for what hangs, and no busy machine may reach it.
patient = pytest.mark.timeout(900)


def check_variants(module: str, at_least: int) -> None:
    """Every variant of a module's cases compiles for an H100, fits its shared memory and keeps its
    registers; there are `at_least` so many. What is known of one is not found out again.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(REPOSITORY / "python")
    command = [sys.executable, "-m", f"tests.kernels.{module}", "--json"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    table = json.loads(result.stdout)
    assert len(table) >= at_least
    for what, limit in (("stack", STACK_LIMIT), ("shared", SHARED_LIMIT)):
        beyond = {name: entry[what] for name, entry in table.items() if entry[what] > limit}
        assert not beyond, f"more than {limit} bytes of {what}: {beyond}"
