"""Step times of a server under many SSE streams, with `advance` holding the GIL and giving it up.

    python bench/advance_gil.py --model llama2-7b --load-format dummy --max-model-len 4096 [any flag of `octavo serve`]

The client runs in a process of its own. The engine uses the attached form; this is the measurement that chose it.
"""

import asyncio
import socket
import sys
import time
from typing import Any

from octavo.bench.statistics import percentile
from octavo.cli import build_parser, engine_config, parse
from octavo.engine.async_engine import AsyncEngine
from octavo.options import from_flags
from octavo.server.config import ServerConfig
from octavo.server.serve import serve_engine

STREAMS, REQUESTS, INPUT, OUTPUT = 256, 512, 128, 128


class DetachedCore:
    """The core, with `advance` replaced by its detached form."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.advance = core.advance_detached

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


def main() -> None:
    args = parse(build_parser(), ["serve", *sys.argv[1:]])
    engine = AsyncEngine.from_config(engine_config(args))
    inner = engine._engine
    times: list[float] = []
    step = inner.step

    def timed_step() -> bool:
        started = time.perf_counter()
        worked = step()
        if worked:
            times.append(time.perf_counter() - started)
        return worked

    inner.step = timed_step  # type: ignore[method-assign]
    attached = inner.core
    config = from_flags(ServerConfig, args)

    async def run() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = asyncio.ensure_future(serve_engine(engine, config, listener))
        for name in ("warm-up", "attached", "detached", "attached", "detached"):
            inner.core = DetachedCore(attached) if name == "detached" else attached  # type: ignore[assignment]
            times.clear()
            client = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "octavo", "bench", "serve", "--url", url, "--model", engine.model_name),
                *("--num", str(REQUESTS), "--concurrency", str(STREAMS), "--json"),
                *("--input-len", str(INPUT), "--output-len", str(OUTPUT)),
                stdout=asyncio.subprocess.PIPE,
            )
            output, _ = await client.communicate()
            milliseconds = [1e3 * value for value in times]
            print(
                f"{name:9} steps {len(times)}  p50 {percentile(milliseconds, 50):.2f} ms  "
                f"p99 {percentile(milliseconds, 99):.2f} ms  client {output.decode().strip()}",
                flush=True,
            )
        server.cancel()

    asyncio.run(run())
    engine.shutdown()


if __name__ == "__main__":
    main()
