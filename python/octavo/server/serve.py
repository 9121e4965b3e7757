"""The life of a server: take the port, load the model, serve, drain on SIGTERM, end.

The exit code is 0 after a drain and 1 when the engine died. The port is taken before the model is
loaded, so that a port in use is said at once; nothing is answered on it until the model is ready.
"""

import asyncio
import errno
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from aiohttp import web

from octavo.config import EngineConfig
from octavo.ending import load_torch, raise_again
from octavo.server.app import BODIES, CALLS, KEYS, METRICS, STUCK_AFTER, build_app
from octavo.server.config import ServerConfig
from octavo.server.connections import listen
from octavo.server.keys import read_keys

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine

logger = logging.getLogger(__name__)

BACKLOG = 4096
LOG_INTERVAL = 10.0  # seconds between two lines of throughput
LOOK_INTERVAL = 0.5  # seconds between two looks at whether the engine is alive
OUT_OF_FILES_INTERVAL = 60.0  # seconds between two lines that say so
LAST_WORDS = 5.0  # seconds for handlers to send their last event after the engine has ended


def serve(engine_config: EngineConfig, config: ServerConfig) -> int:
    """Serves until a signal comes; returns the exit code. Raises `ValueError` or `OSError` for what
    users can mend.
    """
    logging.getLogger("octavo").setLevel(config.log_level.upper())
    read_keys(config, has_priorities=engine_config.scheduling_policy == "priority")  # said before a model is loaded
    listener = open_socket(config)
    _raise_file_limit()
    load_torch()
    from octavo.engine.async_engine import AsyncEngine

    engine = AsyncEngine.from_config(engine_config)
    try:
        raise_again()
        return _run(serve_engine(engine, config, listener))
    finally:
        engine.shutdown()
        listener.close()


def _run(main: Coroutine[Any, Any, int]) -> int:
    """Runs on uvloop where it is installed (the extra `uvloop`): the same behaviour in less time."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    return uvloop.run(main)


def open_socket(config: ServerConfig) -> socket.socket:
    """A socket bound to the configured address, not yet listening."""
    try:
        infos = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ValueError(f"host = {config.host!r}: no address of this machine ({reason})") from None
    family, kind, protocol, _, address = infos[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {config.host}:{config.port}: {error.strerror}") from None
    return listener


async def serve_engine(engine: "AsyncEngine", config: ServerConfig, listener: socket.socket) -> int:
    """Serves a loaded engine on a bound socket until a signal comes or the engine dies; returns the
    exit code.
    """
    app = build_app(engine, config)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=LAST_WORDS)
    await runner.setup()
    listening = await listen(runner, app[METRICS], listener, BACKLOG, config)
    signals = Signals(reload=app[KEYS].reload if config.api_key_file is not None else None)
    asyncio.get_running_loop().set_exception_handler(LoopErrors())
    engine.answers.warn()
    logger.info("ready %.1f s after the process began", process_age())
    print(_welcome(engine, config, listener), file=sys.stderr, flush=True)
    logging_task = asyncio.ensure_future(_log_stats(engine)) if not engine.config.disable_log_stats else None
    try:
        died = await _until_the_end(engine, signals)
        if not died:
            stats = engine.stats()
            logger.info(
                "draining: %d requests run and %d wait, which have %.0f s; a second signal ends at once",
                stats["num_requests_running"],
                stats["num_requests_waiting"],
                config.shutdown_timeout,
            )
            await _drain(engine, app, config.shutdown_timeout, signals)
            died = engine.is_dead
            if died:
                logger.critical("the engine died while it drained: requests were lost")
        engine.shutdown()  # what still runs ends with an error, which its handler sends on
        await _until_idle(app, LAST_WORDS, signals)
    finally:
        if logging_task is not None:
            logging_task.cancel()
        signals.close()
        listening.close()
        await runner.cleanup()
    logger.info("stopped")
    return 1 if died else 0


class Signals:
    """Counts SIGTERM and SIGINT: the first asks for a drain, the second for the end. On SIGHUP `reload`
    is called, where there is one.
    """

    def __init__(self, reload: Callable[[], None] | None = None) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._come)
        self._reloads = reload is not None
        if reload is not None:
            self._loop.add_signal_handler(signal.SIGHUP, reload)

    def _come(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    def close(self) -> None:
        """Gives the signals their old meaning back."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(number)
        if self._reloads:
            self._loop.remove_signal_handler(signal.SIGHUP)


class LoopErrors:
    """What the event loop could not give to anybody. That no more files can be opened, which a loop
    says once a second with a traceback, is a line a minute.
    """

    def __init__(self) -> None:
        self._said_at = -OUT_OF_FILES_INTERVAL

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio's exception handler."""
        error = context.get("exception")
        if not (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
            loop.default_exception_handler(context)
        elif loop.time() - self._said_at >= OUT_OF_FILES_INTERVAL:
            self._said_at = loop.time()
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            logger.error(
                "out of files (%s; the limit is %d): new connections wait until others close", error.strerror, limit
            )


def process_age() -> float:
    """Seconds since this process began, imports included; 0.0 where the system does not tell."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


async def _until_the_end(engine: "AsyncEngine", signals: Signals) -> bool:
    """Waits for a signal, or for the engine's death: True."""
    warned = False
    while not engine.is_dead:
        try:
            await asyncio.wait_for(signals.first.wait(), LOOK_INTERVAL)
            return False
        except asyncio.TimeoutError:
            pass
        stuck = engine.step_age > STUCK_AFTER
        if stuck and not warned:
            logger.error("one step has taken %.0f s: /health answers 503", engine.step_age)
        warned = stuck
    logger.critical("the engine is dead: exiting")
    return True


async def _drain(engine: "AsyncEngine", app: web.Application, timeout: float, signals: Signals) -> None:
    """New requests are refused from here on; returns when all calls are answered, in time or not."""
    engine.draining = True
    app[BODIES].refuse_uploads()
    await _until_idle(app, timeout, signals)


async def _until_idle(app: web.Application, timeout: float, signals: Signals) -> None:
    deadline = asyncio.get_running_loop().time() + timeout
    while app[CALLS].active and asyncio.get_running_loop().time() < deadline and not signals.second.is_set():
        await asyncio.sleep(0.02)


async def _log_stats(engine: "AsyncEngine") -> None:
    """One line every ten seconds in which something ran."""
    before = engine.stats()
    while True:
        await asyncio.sleep(LOG_INTERVAL)
        now = engine.stats()
        prompt, output = (
            (now.get(name, 0.0) - before.get(name, 0.0)) / LOG_INTERVAL
            for name in ("computed_prompt_tokens", "generation_tokens")
        )
        before = now
        if prompt or output or now.get("num_requests_running"):
            logger.info(
                "prompt %.1f tokens/s, output %.1f tokens/s, running %d, waiting %d, KV cache %.1f %%",
                prompt,
                output,
                now.get("num_requests_running", 0),
                now.get("num_requests_waiting", 0),
                100 * now.get("kv_cache_usage_perc", 0.0),
            )


def _welcome(engine: "AsyncEngine", config: ServerConfig, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    everywhere = host in ("0.0.0.0", "::")  # nobody can call these; the others are told this machine's name
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    others = f"\nOther machines reach it at http://{socket.gethostname()}:{port}.\n" if everywhere else ""
    if engine.chat_template is not None:
        path = "/v1/chat/completions"
        fields: dict[str, object] = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    else:
        path, fields = "/v1/completions", {"prompt": "The capital of France is"}
    body = json.dumps({"model": engine.model_name, **fields, "max_tokens": 64})
    key = " -H 'Authorization: Bearer KEY'" if config.api_key or config.api_key_file else ""
    return (
        f"\nServing {engine.model_name} (up to {engine.max_model_len} tokens) on {url}. Try:\n\n"
        f"  curl {url}{path} -H 'Content-Type: application/json'{key} -d '{body}'\n{others}"
    )


def _raise_file_limit() -> None:
    """Each connection is a file; the soft limit is often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 2**20
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):
            logger.warning("at most %d files can be open; more connections will be refused", soft)
