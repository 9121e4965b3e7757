"""The client packages that are among the development tools, against a server of the default model.

`make clients` tries the others, each in an environment of its own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.clients.servers import HERE, servers
from tests.clients.table import CLIENTS


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with servers() as environment:
        yield {**os.environ, **environment}


@pytest.mark.parametrize("name", [client.name for client in CLIENTS if client.light])
def test_client(environment: dict[str, str], name: str) -> None:
    line = [sys.executable, "-W", "ignore", str(HERE / f"use_{name}.py")]
    ended = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]


def test_every_client_has_its_file() -> None:
    files = {path.stem.removeprefix("use_") for path in HERE.glob("use_*.py")}
    assert files == {client.name for client in CLIENTS}
    assert all("==" in package for client in CLIENTS for package in client.packages)
