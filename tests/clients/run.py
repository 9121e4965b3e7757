"""Tries client packages against a server, one after another, each in an environment of its own:
together they would force old versions on one another.

    python -m tests.clients.run [NAME...] [--keep]

An environment is removed when its client is through, so that never more than one takes room; `--keep`
leaves it for the next time.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from tests.clients.servers import HERE, servers
from tests.clients.table import BEFORE, CLIENTS, Client

INSTALL_SECONDS, USE_SECONDS = 900, 7200


def folder() -> Path:
    """Where environments are made."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "octavo" / "clients"


def install(client: Client, place: Path) -> Path:
    """The interpreter of the client's environment, which is made where it is not there."""
    python = place / "bin" / "python"
    uv = [sys.executable, "-m", "uv"]
    if not python.exists():
        subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(place)], check=True)
    if not client.packages:
        return python
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.writelines(f"{name} ; sys_platform == 'none'\n" for name in client.lent)
        overrides.flush()
        options = ["--exclude-newer", BEFORE, "--overrides", overrides.name]
        line = [*uv, "pip", "install", "--quiet", "--python", str(python), *options, *client.packages]
        subprocess.run(line, check=True, timeout=INSTALL_SECONDS)
    if client.lent:  # behind what is the client's own
        (site_packages,) = place.glob("lib/python*/site-packages")
        (site_packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def attempt(client: Client, environment: dict[str, str], keep: bool) -> str:
    """`pass`, or what went wrong, in a word."""
    place = folder() / client.name
    try:
        python = install(client, place)
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        with tempfile.TemporaryDirectory() as scratch:
            ended = subprocess.run(
                [str(python), "-W", "ignore", str(HERE / f"use_{client.name}.py")],
                env={**clean, **environment, "PATH": f"{python.parent}:{clean['PATH']}"},
                cwd=scratch,
                timeout=USE_SECONDS,
            )
        return "pass" if ended.returncode == 0 else f"FAIL (exit code {ended.returncode})"
    except subprocess.CalledProcessError as error:
        return f"FAIL (not installed: exit code {error.returncode})"
    except subprocess.TimeoutExpired as error:
        return f"FAIL (longer than {error.timeout:.0f} s)"
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def main() -> int:
    """The exit code: 1 where a client failed."""
    parser = argparse.ArgumentParser(description="Tries client packages against a server.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(client.name for client in CLIENTS)}")
    parser.add_argument("--keep", action="store_true", help="leave the environments for the next time")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {client.name for client in CLIENTS}
    if unknown:
        parser.error(f"no client is called {', '.join(sorted(unknown))}")
    results = []
    with servers() as environment:
        for client in CLIENTS:
            if arguments.names and client.name not in arguments.names:
                continue
            began = time.monotonic()
            result = attempt(client, environment, arguments.keep)
            results.append(result)
            took = time.monotonic() - began
            print(f"{client.name:22} {' '.join(client.packages):36} {took:5.0f} s  {result}", flush=True)
    return 0 if all(result == "pass" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
