"""A server on a free port whose answers are known (`served.py`), from the real core and server over a
scripted engine. Prints its address; ends when its input does. An argument is the length of the model.
"""

import asyncio
import json
import sys
from typing import Any

from octavo import _core
from octavo.answers import ModelAnswers
from octavo.config import EngineConfig
from octavo.server.config import ServerConfig
from tests.clients.served import CALLED, MODEL, SUNNY
from tests.server.conftest import serving
from tests.server.scripted_engine import ScriptedEngine


class Speaker(ScriptedEngine):
    """Calls the first tool of a request, and answers what came of it."""

    def __init__(self, max_model_len: int) -> None:
        super().__init__(max_model_len=max_model_len, num_blocks=4096, model=MODEL)
        self.answers = ModelAnswers(EngineConfig(model=MODEL, tool_call_parser="hermes"), None, self.tokenizer)
        self.script.answer = SUNNY.encode()

    async def encode_chat(self, messages_json: str, tools_json: str | None = None, **options: Any) -> _core.Prompt:
        answer = SUNNY
        if tools_json is not None and json.loads(messages_json)[-1]["role"] != "tool":
            call = {"name": json.loads(tools_json)[0]["function"]["name"], "arguments": CALLED}
            answer = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
        self.script.answer = answer.encode()
        return await super().encode_chat(messages_json, tools_json, **options)


async def main() -> None:
    """Serves until whoever started this has ended."""
    async for served in serving(Speaker(int(sys.argv[1]) if sys.argv[1:] else 8192), ServerConfig()):
        print(served.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
