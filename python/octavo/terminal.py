"""`octavo chat` and `octavo generate`: a model in the terminal, without a server.

Text is printed as it comes. Ctrl-C ends the answer, not the conversation; a second one at the prompt ends that too.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo import _core
    from octavo.engine.async_engine import AsyncEngine

_HELP = "/new starts over, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


@dataclass(frozen=True)
class Sampling:
    """How the terminal draws: what was asked for, else the model's own defaults, else these. Fields of
    `SamplingParams`.
    """

    defaults: Mapping[str, Any]
    given: Mapping[str, Any]

    def __post_init__(self) -> None:
        SamplingParams(**{**self.defaults, **self.given})  # a bad value is said before a model is loaded

    def params(self, engine: "AsyncEngine", prompt: "_core.Prompt") -> SamplingParams:
        """For one prompt; a default length gives way to a long prompt."""
        params = SamplingParams(**{**self.defaults, **engine.generation_defaults, **self.given})
        return params if "max_tokens" in self.given else params.fitting(engine.max_model_len - len(prompt))


def chat(config: EngineConfig, sampling: Sampling, *, system: str | None) -> int:
    """An interactive conversation; returns the exit code."""
    return _with_engine(config, lambda engine: _chat(engine, sampling, system))


def generate(config: EngineConfig, sampling: Sampling, prompt: str) -> int:
    """Prints the continuation of `prompt`; returns the exit code."""
    return _with_engine(config, lambda engine: _generate(engine, sampling, prompt))


def _with_engine(config: EngineConfig, run: Callable[["AsyncEngine"], Coroutine[Any, Any, int]]) -> int:
    from octavo.engine.async_engine import AsyncEngine  # loads torch

    engine = AsyncEngine.from_config(config)

    async def attached() -> int:
        engine.attach_loop(asyncio.get_running_loop())
        # asyncio's own handler only cancels this task, which `input` would not notice.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return await run(engine)

    try:
        return asyncio.run(attached())
    finally:
        engine.shutdown()


async def _generate(engine: "AsyncEngine", sampling: Sampling, prompt: str) -> int:
    encoded = await engine.encode_text(prompt)
    await print_stream(engine, encoded, sampling.params(engine, encoded))
    return 0


async def _chat(engine: "AsyncEngine", sampling: Sampling, system: str | None) -> int:
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    interactive = sys.stdin.isatty()
    if interactive:
        print(f"{engine.model_name}. {_HELP}")
    while True:
        try:
            line = input("> " if interactive else "")  # blocks the loop, on which nothing else runs
        except (EOFError, KeyboardInterrupt):
            return 0
        text = line.strip()
        if text == "/exit":
            return 0
        if text == "/new":
            messages = list(start)
        elif text.startswith("/"):
            print(_HELP)
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                prompt = await engine.encode_chat(json.dumps(messages))
                answer = await print_stream(engine, prompt, sampling.params(engine, prompt))
                messages.append({"role": "assistant", "content": answer})
            except (ValueError, RuntimeError) as error:  # for example, the conversation has become too long
                messages.pop()
                print(f"{error}. {_HELP}", file=sys.stderr)


async def print_stream(engine: "AsyncEngine", prompt: "_core.Prompt", params: SamplingParams) -> str:
    """Prints the output as it comes and returns it; Ctrl-C ends it early.

    Raises `ValueError` if it cannot be served, `RuntimeError` if the engine ended it with an error.
    """
    stream = engine.submit([prompt], params.to_core())
    texts: list[str] = []

    async def show() -> None:
        finished = False
        while not finished:
            delta = await stream.next()
            for choice in delta.choices:
                texts.append(choice.text)
                print(choice.text, end="", flush=True)
            if delta.error is not None:
                raise RuntimeError(str(delta.error))
            finished = delta.finished

    showing = asyncio.ensure_future(show())
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, showing.cancel)
    try:
        await asyncio.wait({showing})
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        stream.close()
        print()
    if not showing.cancelled():
        showing.result()
    return "".join(texts)
