"""`octavo chat` and `octavo generate`: a model in the terminal, without a server.

Text is printed as it comes; the standard output gets that alone. In a conversation Ctrl-C ends the
answer or clears the line, and Ctrl-D leaves.
"""

import asyncio
import json
import re
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig
from octavo.ending import load_torch
from octavo.message_input import MessageInput
from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo import _core
    from octavo.engine.async_engine import AsyncEngine

_HELP = """\
/help          shows this
/clear         starts the conversation over
/system TEXT   sets what the model is told before the conversation; without TEXT: nothing
/exit          leaves, as Ctrl-D does
Ctrl-C ends an answer, or clears the line. A paste of many lines is one message."""


@dataclass(frozen=True)
class Sampling:
    """How the terminal draws: what was asked for, else the model's own defaults, else these. Fields
    of `SamplingParams`.
    """

    defaults: Mapping[str, Any]
    given: Mapping[str, Any]

    def __post_init__(self) -> None:
        SamplingParams(**{**self.defaults, **self.given})  # a bad value is said before a model is loaded

    def params(self, engine: "AsyncEngine", prompt: "_core.Prompt") -> SamplingParams:
        """For one prompt; a default length gives way to a long prompt."""
        params = SamplingParams.with_defaults({**self.defaults, **engine.generation_defaults}, self.given)
        return params if "max_tokens" in self.given else params.fitting(engine.max_model_len - len(prompt))


def chat(config: EngineConfig, sampling: Sampling, *, system: str | None) -> int:
    """An interactive conversation; returns the exit code."""
    return _with_engine(config, lambda engine: _chat(engine, sampling, system))


def generate(config: EngineConfig, sampling: Sampling, prompt: str) -> int:
    """Prints the continuation of `prompt`; returns the exit code."""
    return _with_engine(config, lambda engine: _generate(engine, sampling, prompt))


def _with_engine(config: EngineConfig, run: Callable[["AsyncEngine"], Coroutine[Any, Any, int]]) -> int:
    load_torch()
    from octavo.engine.async_engine import AsyncEngine

    engine = AsyncEngine.from_config(config)

    async def attached() -> int:
        engine.attach_loop(asyncio.get_running_loop())
        return await run(engine)

    try:
        return asyncio.run(attached())
    finally:
        engine.shutdown()


async def _generate(engine: "AsyncEngine", sampling: Sampling, prompt: str) -> int:
    encoded = await engine.encode_text(prompt)
    await Answer().show(engine, encoded, sampling.params(engine, encoded))
    return 0


async def _chat(engine: "AsyncEngine", sampling: Sampling, system: str | None) -> int:
    if engine.chat_template is None:
        raise ValueError(f"{engine.model_name} has no chat template: name one with --chat-template, or use generate")
    conversation = Conversation(engine, sampling, system)
    with MessageInput("> ") as messages:
        if messages.interactive:
            _note(f"{engine.model_name}. /help lists what there is beside messages; Ctrl-D leaves.")
        interrupted = False
        while True:
            try:
                # Blocks the loop, on which nothing else runs.
                text = messages.read().strip()
            except KeyboardInterrupt:
                if not messages.interactive:
                    raise
                _note("\nCtrl-D or /exit leaves." if interrupted else "")
                interrupted = True
                continue
            except EOFError:
                return 0
            except ValueError as error:
                if not messages.interactive:
                    raise
                _note(str(error))
                continue
            interrupted = False
            if text == "/exit":
                return 0
            if not text or conversation.obey(text):
                continue
            answering = asyncio.ensure_future(conversation.answer(text))
            with messages.interrupts.cancelling(answering):
                await asyncio.wait({answering})
            try:
                stopped = answering.result()
            except (ValueError, RuntimeError) as error:
                if engine.is_dead:
                    raise
                _note(str(error))
            else:
                if stopped and not messages.interactive:
                    raise KeyboardInterrupt


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Conversation:
    """What was said so far. A message that got no answer is no part of it."""

    def __init__(self, engine: "AsyncEngine", sampling: Sampling, system: str | None) -> None:
        self._engine = engine
        self._sampling = sampling
        self._system = system
        self._turns: list[dict[str, str]] = []

    def obey(self, text: str) -> bool:
        """Does what a command says; False where `text` is a message."""
        command = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", text, re.DOTALL)
        if command is None:
            return False
        name, rest = command.groups()
        if name == "system":
            self._system = rest
            _note(f"The model is told {'this' if rest else 'nothing'} before the conversation.")
        elif "\n" in text:
            return False  # a paste that happens to begin with a slash
        elif name == "clear":
            self._turns.clear()
            _note("The conversation starts over.")
        else:
            _note(_HELP if name == "help" else f"/{name} is no command.\n{_HELP}")
        return True

    async def answer(self, text: str) -> bool:
        """Prints the answer to a message. Returns whether it was cancelled, and so stopped where it
        was.

        Raises `ValueError` where the message cannot be served, for example because the conversation
        has become too long, and `RuntimeError` if the engine ended the answer with an error.
        """
        message = {"role": "user", "content": text}
        start = [{"role": "system", "content": self._system}] if self._system else []
        answer, stopped = Answer(), False
        try:
            prompt = await self._engine.encode_chat(json.dumps([*start, *self._turns, message]))
            params = self._sampling.params(self._engine, prompt)
            self._check_room(len(prompt), params.max_tokens if "max_tokens" in self._sampling.given else None)
            await answer.show(self._engine, prompt, params)
        except asyncio.CancelledError:
            stopped = True
        if answer.text:
            self._turns += [message, {"role": "assistant", "content": answer.text}]
        if answer.finish_reason == "length":
            full = len(prompt) + answer.num_tokens >= self._engine.max_model_len
            why = f"the context of {self._engine.max_model_len} tokens is full, /clear starts over" if full else ""
            _note(f"(cut after {answer.num_tokens} tokens: {why or 'see --max-tokens'})")
        return stopped

    def _check_room(self, num_tokens: int, max_tokens: int | None) -> None:
        limit = self._engine.max_model_len
        if num_tokens + (max_tokens or 1) <= limit:
            return
        wanted = f" and --max-tokens is {max_tokens}" if max_tokens else ""
        what, remedy = ("conversation", "/clear starts over") if self._turns else ("message", "send a shorter one")
        raise ValueError(
            f"The {what} is too long: it has {num_tokens} tokens{wanted}, but the model's context is {limit} tokens. "
            f"Your last message was not sent; {remedy}."
        )


class Answer:
    """The output of one request, printed as it comes."""

    def __init__(self) -> None:
        self.text = ""
        self.num_tokens = 0
        self.finish_reason: str | None = None
        """None while it is not finished; else see `octavo.CompletionOutput`."""

    async def show(self, engine: "AsyncEngine", prompt: "_core.Prompt", params: SamplingParams) -> None:
        """To the end, or until the task is cancelled.

        Raises `ValueError` if it cannot be served, `RuntimeError` if the engine ended it with an
        error.
        """
        stream = engine.submit([prompt], params.to_core())
        texts: list[str] = []
        try:
            finished = False
            while not finished:
                delta = await stream.next()
                for choice in delta.choices:
                    texts.append(choice.text)
                    self.num_tokens += len(choice.token_ids)
                    self.finish_reason = choice.finish_reason
                    print(choice.text, end="", flush=True)
                if delta.error is not None:
                    raise engine.error_of(str(delta.error))
                finished = delta.finished
        finally:
            stream.close()
            self.text = "".join(texts)
            if not self.text.endswith("\n"):
                print()
