"""Every kernel variant compiles for an H100, fits its shared memory and keeps its registers; no GPU needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SHARED_LIMIT = 227 * 1024  # bytes a program may use on sm_90
SPILL_LIMIT = 128  # bytes a thread: a few scalars around a loop cost nothing, an accumulator would be hundreds
CHOOSE_SPILL_LIMIT = 256  # `_choose_kernel` keeps a row's pointers and parameters around its loops


@pytest.mark.parametrize(
    ("module", "at_least"),
    [
        ("compile_sm90", 50),
        ("compile_sm90_8bit", 60),
        ("compile_sm90_linear", 15),
        ("compile_sm90_step", 60),
    ],
)
def test_every_variant_compiles_and_fits(module: str, at_least: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(REPOSITORY / "python")
    command = [sys.executable, "-m", f"tests.kernels.{module}", "--json"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    table = json.loads(result.stdout)
    assert len(table) > at_least
    limits = {name: CHOOSE_SPILL_LIMIT if name.endswith("_choose_kernel") else SPILL_LIMIT for name in table}
    assert not {name: entry for name, entry in table.items() if entry["spilled"] > limits[name]}
    assert all(entry["shared"] <= SHARED_LIMIT for entry in table.values())
