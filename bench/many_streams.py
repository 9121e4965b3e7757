"""Thousands of streams at once: the memory of the server while all are open, and that each has its end.

    python -m bench.many_streams [--streams 10000] [--max-waiting 10000]

The server is the real front over the tests' scripted engine, in a process of its own; this process is
the client, on plain sockets. The engine is held until every stream has its headers, so that all are
open at once; then each gets its tokens. The exit code is 1 where a stream has no end.
"""

import argparse
import asyncio
import json
import multiprocessing
import resource
import sys
import time
from multiprocessing.connection import Connection

from octavo.server.config import ServerConfig
from octavo.server.serve import open_socket, serve_engine

AT_ONCE = 200  # connections that are being opened
ANSWER = "Hello world"
END = b"data: [DONE]\n\n"
REQUEST = json.dumps({"prompt": "Hi", "stream": True, "max_tokens": 16}).encode()
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(REQUEST)
) + REQUEST


def _serve(port: Connection, max_waiting: int) -> None:
    from tests.server.scripted_engine import ScriptedEngine

    raise_file_limit()

    async def main() -> None:
        engine = ScriptedEngine(max_num_seqs=256, max_waiting=max_waiting, num_blocks=4096)
        engine.hold()
        config = ServerConfig(port=0)
        listener = open_socket(config)
        asyncio.get_running_loop().add_reader(port.fileno(), lambda: (port.recv(), engine.release()))
        port.send(listener.getsockname()[1])
        await serve_engine(engine, config, listener)

    asyncio.run(main())


def raise_file_limit() -> None:
    """A connection is a file; the soft limit is often 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def memory(pid: int, field: str = "VmRSS") -> float:
    """MiB that a process has resident, or had at most (`VmHWM`)."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field + ":"))


class Streams:
    """The client's side of all of them."""

    def __init__(self, port: int, number: int) -> None:
        self._port = port
        self._number = number
        self._opening = asyncio.Semaphore(AT_ONCE)
        self._all_open = asyncio.Event()
        self.opened = 0
        self.ended = 0
        self.wrong: list[str] = []

    async def run(self) -> None:
        """One task a stream, to its end."""
        await asyncio.gather(*(self._one() for _ in range(self._number)))

    async def wait_open(self) -> None:
        """Until each has its headers."""
        await self._all_open.wait()

    async def _one(self) -> None:
        async with self._opening:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=4096)
            writer.write(REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
        self.opened += 1
        if self.opened == self._number:
            self._all_open.set()
        text = b""
        while piece := await reader.read(4096):
            text += piece
        writer.close()
        body = b"".join(text.split(b"\r\n")[1::2])  # the chunks without their sizes
        events = [event for event in body.split(b"\n\n")[:-2] if not event.startswith(b":")]
        said = "".join(json.loads(event.removeprefix(b"data: "))["choices"][0]["text"] for event in events)
        if head.startswith(b"HTTP/1.1 200") and body.endswith(END) and said == ANSWER:
            self.ended += 1
        else:
            self.wrong.append(f"{head[:40]!r} ... {body[-80:]!r}")


async def _measure(ours: Connection, pid: int, number: int) -> bool:
    port = ours.recv()
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            break
        except ConnectionRefusedError:
            await asyncio.sleep(0.1)
    alone, began = memory(pid), time.perf_counter()
    streams = Streams(port, number)
    running = asyncio.ensure_future(streams.run())
    opened = asyncio.ensure_future(streams.wait_open())
    await asyncio.wait({running, opened}, return_when=asyncio.FIRST_COMPLETED)
    open_after, all_open = time.perf_counter() - began, memory(pid)
    asked = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    await reader.read()
    health = time.perf_counter() - asked
    ours.send("go")
    await running
    print(f"streams            {number}, open after {open_after:.1f} s, the last end after "
          f"{time.perf_counter() - began:.1f} s")  # fmt: skip
    print(f"with their end     {streams.ended}{''.join(f'; {one}' for one in streams.wrong[:3])}")
    print(f"server's memory    {alone:.0f} MiB alone, {all_open:.0f} with all open, "
          f"{memory(pid, 'VmHWM'):.0f} at most")  # fmt: skip
    print(f"/health            {1000 * health:.0f} ms with all open")
    return streams.ended == number


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description="Thousands of streams at once over a scripted engine.")
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--max-waiting", type=int, default=10_000)
    args = parser.parse_args()
    raise_file_limit()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs, args.max_waiting), daemon=True)
    server.start()
    try:
        assert server.pid is not None
        return 0 if asyncio.run(_measure(ours, server.pid, args.streams)) else 1
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    sys.exit(main())
