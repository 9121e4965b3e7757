"""The engine for asyncio: one engine thread, and streams that wake when the core has news for them.

The core's eventfd becomes readable once for any number of tokens; the loop's reader takes the ids
with news and sets one event a stream. What a stream has not taken yet stays in the core, coalesced,
so a slow client grows no queue here.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from octavo import _core
from octavo.answers import ModelAnswers
from octavo.config import EngineConfig
from octavo.engine import process
from octavo.engine.outputs import OutputBuilder
from octavo.engine.prompts import PromptInput, encode_prompt
from octavo.errors import EngineDeadError
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import StructuredOutputsParams, compile_grammar, find_grammar

if TYPE_CHECKING:
    from octavo.engine.engine import Engine

T = TypeVar("T")

GIL_SWITCH_SECONDS = 0.0002
"""How long a busy thread may keep the GIL from one that waits for it. At Python's 5 ms the engine
thread, back from its wait for the device, would lose that much of a step to a busy event loop.
"""

TEXT_THREADS = 2
"""Threads for templates, tokenising and long answers. Their work is detached Rust: two keep two
cores busy, and more gain nothing."""

LONG_TEXT = 64 * 1024
"""Characters from which a text waits for a thread of its own: tokenising takes a second for each one
or two million, in which short texts must not stand behind it."""
LONG_GRAMMAR = 16 * 1024
"""The same of schemas and grammars: the largest that are compiled take a second or two."""


class ReplyStream:
    """The news of one call's reply. A call whose stream is closed before its end is aborted."""

    def __init__(self, engine: AsyncEngine, reply_id: int) -> None:
        self.reply_id = reply_id
        self._engine = engine
        self._news = asyncio.Event()
        self._open = True

    async def next(self) -> _core.ReplyDelta:
        """Waits for news and takes all of it; `finished` is true on the last. At most one caller at
        a time.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            delta = self._engine.core.take(self.reply_id)
            if delta is not None:
                if delta.finished:
                    self._leave()
                return delta

    def wake(self) -> None:
        """The core has news for this reply (called on the loop)."""
        self._news.set()

    def close(self) -> _core.ReplyDelta | None:
        """Aborts the call unless it has finished: its blocks are free by the next committed step.
        Idempotent.

        Returns what nobody waited for any more, None if the end was taken.
        """
        if not self._open:
            return None
        self._leave()
        last = self._engine.core.take(self.reply_id)
        if last is None or not last.finished:
            self._engine.core.abort(self.reply_id)
        return last

    def _leave(self) -> None:
        self._open = False
        self._engine.streams.pop(self.reply_id, None)


class AsyncEngine:
    """Submit prompts, await their tokens. Build it with `from_config`, then `attach_loop` with the
    running loop.
    """

    def __init__(self, engine: Engine) -> None:
        parts = engine.parts
        self.core = parts.core
        self.config: EngineConfig = parts.config
        self.max_model_len = parts.max_model_len
        self.model_name = parts.model_name
        self.model_config = parts.model_config
        self.tokenizer: _core.Tokenizer | None = parts.tokenizer
        self.grammars: _core.GrammarCompiler | None = parts.grammars
        self.chat_template: _core.ChatTemplate | None = parts.chat_template
        self.answers = ModelAnswers(parts.config, parts.chat_template, parts.tokenizer)
        self.generation_defaults = parts.generation_defaults
        self.embeddings = parts.embeddings
        self.generates = parts.generates
        self.report = parts.report
        self.streams: dict[int, ReplyStream] = {}
        self.draining = False
        self._engine = engine
        self._in_text = 0
        self._text_lock = threading.Lock()
        self._text_pool = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="octavo-text")
        self._long_text_pool = ThreadPoolExecutor(1, thread_name_prefix="octavo-long-text")
        self._grammar_pool = ThreadPoolExecutor(1, thread_name_prefix="octavo-grammar")
        self._long_grammar_pool = ThreadPoolExecutor(1, thread_name_prefix="octavo-long-grammar")
        self._thread = threading.Thread(target=engine.run, name="octavo-engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def from_config(cls, config: EngineConfig | str | os.PathLike[str]) -> AsyncEngine:
        """Loads the model and starts the engine thread. A model's name or path stands for a
        configuration of that alone. Blocks: call it before the loop runs, or in an executor.
        """
        from octavo.engine.engine import Engine  # loads torch, which nothing else here needs

        if isinstance(config, (str, os.PathLike)):
            config = EngineConfig(model=os.fspath(config))
        sys.setswitchinterval(GIL_SWITCH_SECONDS)
        engine = cls(Engine.from_config(config))
        engine._thread.start()
        return engine

    def attach_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Has `loop` watch the core's eventfd. All streams must be awaited on this loop.

        A loop that has ended gives way to the next one, as under one `asyncio.run` after another.
        Raises `RuntimeError` while another loop runs.
        """
        earlier = self._loop
        if earlier is loop:
            return
        if earlier is not None and not earlier.is_closed():
            if earlier.is_running():
                raise RuntimeError("this engine serves another event loop, which is still running: use one loop")
            earlier.remove_reader(self.core.fileno())
        self._loop = loop
        loop.add_reader(self.core.fileno(), self._wake_streams)

    def _wake_streams(self) -> None:
        for reply_id in self.core.take_news():
            stream = self.streams.get(reply_id)
            if stream is not None:
                stream.wake()

    # ---- requests --------------------------------------------------------------------------------

    async def encode_text(self, text: str, add_special_tokens: bool = True) -> _core.Prompt:
        """Tokenises off the loop. Special tokens written in the text count as special, as in vLLM's
        completions.
        """
        encode = functools.partial(self._need_tokenizer().encode_text, text, add_special_tokens)
        return await self._detached(encode, self._pool_of(len(text)))

    async def encode_chat(
        self,
        messages_json: str | bytes,
        tools_json: str | bytes | None = None,
        add_generation_prompt: bool = True,
        kwargs_json: str | bytes | None = None,
        max_characters: int | None = None,
        continue_final_message: bool = False,
        template: _core.ChatTemplate | None = None,
    ) -> _core.Prompt:
        """Renders the chat template, the model's unless another is given, and tokenises, off the loop.
        Raises `TemplateError` where the template refuses, `PromptTooLongError` where it makes more
        than max_characters.
        """
        encode = functools.partial(
            self._need_tokenizer().encode_chat,
            template or self._need_chat_template(),
            messages_json,
            tools_json=tools_json,
            add_generation_prompt=add_generation_prompt,
            kwargs_json=kwargs_json,
            max_characters=max_characters,
            continue_final_message=continue_final_message,
        )
        size = len(messages_json) + len(tools_json or "") + len(kwargs_json or "")
        return await self._detached(encode, self._pool_of(size))

    async def compile_grammar(self, wanted: StructuredOutputsParams | None) -> _core.Grammar | None:
        """The grammar of a request's `structured_outputs`; compiled beside the loop, one at a time, long ones
        apart, unless it has been lately. Raises `ValueError` that says where in it the fault is.
        """
        if wanted is None:
            return None
        known = find_grammar(self.grammars, wanted)
        if known is not None:
            return known
        pool = self._grammar_pool if len(wanted.text) <= LONG_GRAMMAR else self._long_grammar_pool
        return await self._detached(functools.partial(compile_grammar, self.grammars, wanted), pool)

    def submit(
        self,
        prompts: Sequence[_core.Prompt],
        params: _core.SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        share: tuple[int, float] | None = None,
        reply_format: _core.ReplyFormat | None = None,
    ) -> ReplyStream:
        """Queues a call with one prompt or several, all or none of them. share: whose part of the
        engine it takes, and that one's weight.

        Raises `OverloadedError` (queue full), `RefusedError`, such as `PromptTooLongError` and
        `KvCapacityError` (a prompt can never be served), `EngineDeadError`.
        """
        self._check_alive()
        reply_id = self.core.add_call(
            prompts,
            params,
            now=time.monotonic(),
            priority=priority,
            cache_salt=cache_salt,
            share=share,
            reply_format=reply_format,
        )
        try:
            self._check_alive()
        except EngineDeadError:  # it ended meanwhile, and has told those it had: this call is not among them
            self.core.abort(reply_id)
            raise
        stream = self.streams[reply_id] = ReplyStream(self, reply_id)
        return stream

    async def generate(
        self, prompt: PromptInput, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """Yields the growing output of one prompt, each time as an object of its own; the request
        is aborted when the iterator is dropped.

        Raises `OverloadedError` where the queue is full, `EngineDeadError` if the engine is lost,
        and `RuntimeError` if it ended the request with an error.
        """
        self._check_alive()
        if not self.generates:
            raise ValueError("this model makes embeddings alone (runner = 'pooling')")
        self.attach_loop(asyncio.get_running_loop())
        size = len(prompt) if isinstance(prompt, str) else 0
        encoded = await self._detached(functools.partial(encode_prompt, prompt, self.tokenizer), self._pool_of(size))
        room = self.max_model_len - len(encoded)
        params = sampling_params or SamplingParams.with_defaults(self.generation_defaults, {}).fitting(room)
        grammar = await self.compile_grammar(params.structured_outputs)
        of_core = params.to_core(self.answers.of_model(params, [encoded], grammar))
        stream = self.submit([encoded], of_core, priority=priority)
        builder = OutputBuilder(stream.reply_id, prompt, encoded, params, self.tokenizer)
        try:
            finished = False
            while not finished:
                delta = await stream.next()
                finished = delta.finished
                # Log probabilities of a prompt may be of thousands of tokens.
                add = functools.partial(builder.add, delta)
                output = await self.run_beside(add) if delta.is_long else add()
                if finished and output.error is not None:
                    raise self.error_of(output.error)
                yield output if finished else builder.snapshot()
        finally:
            stream.close()

    def _pool_of(self, characters: int) -> ThreadPoolExecutor:
        return self._text_pool if characters <= LONG_TEXT else self._long_text_pool

    async def _detached(self, work: Callable[[], T], pool: ThreadPoolExecutor) -> T:
        """Runs text work of one request beside the loop. Such a request waits already: it counts
        towards the queue's bound.

        Raises `OverloadedError` where the queue is full, `EngineDeadError`.
        """
        self._check_alive()
        self.core.check_queue(self._in_text)
        with self._text_lock:
            self._in_text += 1
        job = pool.submit(work)
        job.add_done_callback(self._text_done)
        return await asyncio.wrap_future(job)

    def _check_alive(self) -> None:
        process.check()
        if self.is_dead:
            raise EngineDeadError(self._engine.failure)
        if self._engine.is_stopped:
            raise EngineDeadError("the engine has been shut down")

    def error_of(self, failure: str) -> RuntimeError:
        """What to raise where a request ended with `failure`: with the reason if it was the
        engine's end.
        """
        return EngineDeadError(self._engine.failure) if self.is_dead else RuntimeError(failure)

    async def run_beside(self, work: Callable[[], T]) -> T:
        """Runs what would keep the loop too long, on the pool for text."""
        if self._engine.is_stopped:  # and the pool with it: these are last words
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._text_pool, work)

    def _text_done(self, _: Future[Any]) -> None:
        """Called on the pool's thread, or by who cancels a job that waits; one that runs goes on
        without its client.
        """
        with self._text_lock:
            self._in_text -= 1

    def _need_tokenizer(self) -> _core.Tokenizer:
        if self.tokenizer is None:
            raise ValueError("prompt: this model has no tokenizer; send token ids, or start with --tokenizer")
        return self.tokenizer

    def _need_chat_template(self) -> _core.ChatTemplate:
        if self.chat_template is None:
            raise ValueError(
                "messages: this model has no chat template; start with --chat-template, or use completions"
            )
        return self.chat_template

    # ---- state -----------------------------------------------------------------------------------

    @property
    def is_dead(self) -> bool:
        """The engine thread ended by an error: nothing will be served any more."""
        return self._engine.failure is not None

    @property
    def is_ready(self) -> bool:
        """The model is loaded, and new requests are welcome."""
        return self._thread.is_alive() and not self.draining and not self.is_dead

    @property
    def step_age(self) -> float:
        """Seconds the current step has been running; 0 when idle. A watchdog reads it."""
        started = self._engine.step_started_at
        return 0.0 if started is None else time.monotonic() - started

    def stats(self) -> dict[str, float]:
        """Gauges and counters of the core by name."""
        return self.core.stats()

    def accepted_per_position(self) -> list[int]:
        """Drafts that were right so far, by position; none without speculative decoding."""
        return self.core.accepted_per_position()

    def shutdown(self) -> None:
        """Ends the engine thread and gives its memory back; requests still running end with an
        error, which wakes their streams.

        Idempotent. Call it on the loop's thread, or after the loop has closed.
        """
        if process.is_forked():  # from that whose threads and locks these are
            return
        self._engine.stop()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        if self._loop is not None and not self._loop.is_closed():
            self._wake_streams()
            self._loop.remove_reader(self.core.fileno())
        self._loop = None
        self._text_pool.shutdown(wait=False)
        self._long_text_pool.shutdown(wait=False)
        self._grammar_pool.shutdown(wait=False)
        self._long_grammar_pool.shutdown(wait=False)
        if not self._thread.is_alive():  # else a step still uses the memory
            self._engine.close()
