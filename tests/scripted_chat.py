"""`octavo` with the scripted engine in place of a model, as a process that tests run in a terminal.

`python -m tests.scripted_chat RECORD DELAY ARGUMENT...`: messages of each prompt are added to the
file RECORD, one JSON list a line; a token takes DELAY seconds. The terminal on standard input
becomes the controlling one, so that its Ctrl-C is an interrupt.
"""

import fcntl
import os
import sys
import termios
import types
from pathlib import Path
from typing import Any

# Loads torch, for seconds, and nothing here runs it.
sys.modules["octavo.engine.engine"] = types.ModuleType("octavo.engine.engine")
sys.modules["octavo.engine.engine"].Engine = object  # type: ignore[attr-defined]

from octavo import cli  # noqa: E402
from octavo.ending import open_closed_streams  # noqa: E402
from octavo.engine.async_engine import AsyncEngine  # noqa: E402
from tests.server.scripted_engine import ScriptedEngine  # noqa: E402


def main() -> int:
    record, delay, *arguments = sys.argv[1:]
    open_closed_streams()  # as `octavo` does before it makes an engine
    if os.isatty(0):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    if os.environ.get("NO_READLINE"):
        sys.modules["readline"] = None  # type: ignore[assignment]
    engine = ScriptedEngine(max_model_len=400)
    engine.script.step_delay = float(delay)
    encode = engine.encode_chat

    async def recorded(messages_json: str) -> Any:
        with Path(record).open("a") as file:
            file.write(messages_json + "\n")
        return await encode(messages_json)

    engine.encode_chat = recorded  # type: ignore[method-assign,assignment]
    AsyncEngine.from_config = lambda _: engine  # type: ignore[method-assign,assignment]
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
