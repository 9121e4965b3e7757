"""The wheel holds what it needs: one abi3 extension, the kernels behind the symlink, the typing
files, and no more than 15 MB.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_WHEEL_BYTES = 15 * 2**20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "maturin", "build", "--release", "--out", str(folder)]
    environment = {**os.environ, "CARGO_TERM_COLOR": "never"}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return next(folder.glob("*.whl"))


@pytest.mark.timeout(2400)  # it may have to build the core
def test_wheel_lists_the_kernels_and_is_small(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    kernels = {f"octavo/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "kernels").rglob("*.py")}
    assert "octavo/kernels/attention/decode.py" in kernels and kernels <= names
    assert "octavo/_core.pyi" in names and "octavo/py.typed" in names
    assert {f"octavo/texts/{name}" for name in ("calibration.txt", "evaluation.txt", "README.md")} <= names
    assert any(name.endswith(".abi3.so") for name in names)
    assert not any(name.startswith(("tests/", "bench/", "rust/")) for name in names)
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    assert "-abi3-" in wheel.name


def test_make_serve_installs_every_extra() -> None:
    """A hub id must work after the README's first command."""
    extras = re.search(r"optional-dependencies\]\n((?:\w+ = .*\n)+)", (REPOSITORY / "pyproject.toml").read_text())
    installed = re.search(r"--extras (\S+)", (REPOSITORY / "Makefile").read_text())
    assert extras is not None and installed is not None
    assert set(installed[1].split(",")) == {line.split(" = ")[0] for line in extras[1].splitlines()} >= {"hub"}


def test_make_serve_installs_no_tools_for_development() -> None:
    """Given no group, maturin installs the one named `dev`."""
    project = (REPOSITORY / "pyproject.toml").read_text()
    command = re.search(r"maturin develop .*", (REPOSITORY / "Makefile").read_text())
    assert command is not None and re.findall(r"--group (\S+)", command[0]) == ["build"]
    assert re.search(r'^build = \["maturin[^",]*,[^",]*"\]$', project, re.M)


def test_commands_of_the_readme_run_as_written() -> None:
    """What `make serve` installed is in `.venv`, not on the path."""
    readme = (REPOSITORY / "README.md").read_text()
    commands = re.findall(
        r"(?:^|`)((?:[^\s`]*/)?(?:octavo|python|pip)) (?:-m|serve|chat|generate|bench|install)\b", readme, re.M
    )
    assert len(commands) > 10
    assert {command.rpartition("/")[0] for command in commands} == {".venv/bin"}


def test_make_says_what_a_missing_venv_module_needs(tmp_path: Path) -> None:
    command = ["make", "PYTHON=false", f"VENV={tmp_path}", f"{tmp_path}/.uv"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode != 0 and "apt install python3-venv" in result.stderr
    assert not (tmp_path / ".uv").exists()
