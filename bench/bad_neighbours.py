"""The longest pause of a stream while others send what is refused, or is hard to take.

    python -m bench.bad_neighbours [--url http://127.0.0.1:8000] [--only NAME ...] [--max-model-len 512]

Without a URL it serves the tests' scripted engine in a process of its own: a token every 10 ms, and
the real front. For each kind of body one stream runs while it is sent three times or more, and
the line says what the body got, after how long, the longest time between two events of the stream,
which is about 10 ms by itself, and by how much the server's memory grew at most. To a model of 16
million tokens no text is too long to be read: it is decoded and tokenised before it is too long.
"""

import argparse
import asyncio
import contextlib
import gzip
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp

MIB = 2**20
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def _fill(head: bytes, item: bytes, tail: bytes, size: int = 15 * MIB) -> bytes:
    return head + b",".join([item] * ((size - len(head) - len(tail)) // (len(item) + 1))) + tail


def _chat(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **fields}).encode()


def _tool(parameters: str = "{}", name: str = "f") -> bytes:
    tool = {"type": "function", "function": {"name": name, "parameters": {"a": "PARAMETERS"}}}
    return _chat(tools=[tool]).replace(b'"PARAMETERS"', parameters.encode())


def _call(arguments: str) -> bytes:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return json.dumps({"messages": turns, "max_tokens": 1}).encode()


def _zeros(item: str, size: int = 15 * MIB) -> str:
    return "[" + ",".join([item] * (size // (len(item) + 1))) + "]"


BODIES: dict[str, tuple[str, Callable[[], bytes], bool]] = {
    "a good request": (COMPLETIONS, lambda: b'{"prompt":"Hi","max_tokens":5}', False),
    "prompts of one id": (COMPLETIONS, lambda: _fill(b'{"prompt":[', b"[1]", b"]}"), False),
    "8 million ids": (COMPLETIONS, lambda: _fill(b'{"prompt":[', b"1", b"]}"), False),
    "550,000 messages": (CHAT, lambda: _fill(b'{"messages":[', b'{"role":"user","content":""}', b"]}"), False),
    "messages of parts": (
        CHAT,
        lambda: _fill(b'{"messages":[{"role":"user","content":[', b'{"type":"text","text":""}', b"]}]}"),
        False,
    ),
    "lists in a tool": (CHAT, lambda: _tool(_zeros("[]")), False),
    "numbers in a tool": (CHAT, lambda: _tool(_zeros("0")), False),
    "a tool's name": (CHAT, lambda: _tool(name="n" * 15 * MIB), False),
    "lists in arguments": (CHAT, lambda: _call(_zeros("[]")), False),
    "text in arguments": (CHAT, lambda: _call(json.dumps({"a": "x" * 15 * MIB})), False),
    "an ignored field": (COMPLETIONS, lambda: _fill(b'{"prompt":"Hi","x":[', b"[]", b"]}"), False),
    "many fields": (COMPLETIONS, lambda: b"{" + b",".join(b'"%d":1' % i for i in range(1_200_000)) + b"}", False),
    "logit_bias": (
        COMPLETIONS,
        lambda: b'{"prompt":"Hi","logit_bias":{' + b",".join(b'"%d":1' % i for i in range(1_200_000)) + b"}}",
        False,
    ),
    "letters": (COMPLETIONS, lambda: json.dumps({"prompt": "a" * 15 * MIB}).encode(), False),
    "escapes": (COMPLETIONS, lambda: b'{"prompt":"' + b"\\u00e9" * (15 * MIB // 6) + b'"}', False),
    "escapes in a message": (
        CHAT,
        lambda: b'{"messages":[{"role":"user","content":"' + b"\\u00e9" * (15 * MIB // 6) + b'"}]}',
        False,
    ),
    "lines in a message": (
        CHAT,
        lambda: b'{"messages":[{"role":"user","content":"' + b"\\n" * (15 * MIB // 2) + b'"}]}',
        False,
    ),
    "letters of two kinds": (
        CHAT,
        lambda: b'{"messages":[{"role":"user","content":"' + "a\u4e2d".encode() * (15 * MIB // 4) + b'"}]}',
        False,
    ),
    "escapes in arguments": (CHAT, lambda: _call('{"a":"' + "\\u00e9" * (14 * MIB // 7) + '"}'), False),
    "escapes in a tool": (CHAT, lambda: _tool('{"description":"' + "\\u00e9" * (15 * MIB // 6) + '"}'), False),
    "escapes in an input": (
        "/v1/responses",
        lambda: b'{"input":"' + b"\\u00e9" * (15 * MIB // 6) + b'"}',
        False,
    ),
    "escapes in inputs of TGI": ("/generate", lambda: b'{"inputs":"' + b"\\u00e9" * (15 * MIB // 6) + b'"}', False),
    "nested lists": (COMPLETIONS, lambda: b'{"prompt":"Hi","x":' + b"[" * 15 * MIB, False),
    "gzip of lists": (COMPLETIONS, lambda: _fill(b'{"prompt":"Hi","x":[', b"[]", b"]}"), True),
    "gzip of numbers in a tool": (CHAT, lambda: _tool(_zeros("0")), True),
    "gzip of zeros": (COMPLETIONS, lambda: bytes(50 * MIB), True),
}


async def _stream(http: aiohttp.ClientSession, url: str, stop: asyncio.Event) -> float:
    """The longest gap between two events of streams one after the other, until `stop`."""
    longest, last = 0.0, None
    body = {"prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
    while not stop.is_set():
        async with http.post(url + COMPLETIONS, json=body) as response:
            async for _ in response.content:
                now = time.perf_counter()
                if last is not None:
                    longest = max(longest, now - last)
                last = now
                if stop.is_set():
                    break
    return longest


async def _until_it_listens(http: aiohttp.ClientSession, url: str) -> None:
    for _ in range(300):  # 30 s
        with contextlib.suppress(aiohttp.ClientConnectorError):
            return (await http.get(url + "/health")).release()
        await asyncio.sleep(0.1)
    raise SystemExit(f"nothing listens at {url}")


def _resident(pid: int, which: str) -> float:
    """MiB that the process holds (VmRSS), or has held at most since it was last asked to forget (VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) / 1024


async def _measure(url: str, names: list[str], pid: int | None = None) -> None:
    """pid: of the server, where it is ours."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300)) as http:
        await _until_it_listens(http, url)
        print(f"{'body':28} {'got':>24} {'after':>9} {'longest gap':>12} {'memory':>10}")
        for name in names or BODIES:
            path, make, packed = BODIES[name]
            data = await asyncio.get_running_loop().run_in_executor(None, make)
            if packed:
                data = await asyncio.get_running_loop().run_in_executor(None, gzip.compress, data)
            with tempfile.NamedTemporaryFile(delete=False) as file:
                file.write(data)
            headers = {"Content-Type": "application/json"} | ({"Content-Encoding": "gzip"} if packed else {})
            stop = asyncio.Event()
            streaming = asyncio.ensure_future(_stream(http, url, stop))
            await asyncio.sleep(1.0)
            before = 0.0
            if pid is not None:
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # forgets the peak
                before = _resident(pid, "VmRSS")
            started, sent = time.perf_counter(), 0
            while sent < 3 or time.perf_counter() - started < 1.0:
                sent += 1
                process = await asyncio.create_subprocess_exec(
                    *("curl", "-sS", "-m", "120", "--data-binary", f"@{file.name}", "-H", "Expect:"),
                    *(word for header in headers.items() for word in ("-H", ": ".join(header))),
                    url + path,
                    stdout=asyncio.subprocess.PIPE,
                )
                answer, _ = await process.communicate()
            seconds = (time.perf_counter() - started) / sent
            await asyncio.sleep(0.3)
            stop.set()
            longest = await streaming
            os.unlink(file.name)
            try:
                told = json.loads(answer).get("error", {})
                code = told.get("code", "an answer") if isinstance(told, dict) else "an error"
            except ValueError:
                code = "no answer"
            memory = "-" if pid is None else f"{_resident(pid, 'VmHWM') - before:.0f} MiB"
            print(f"{name:28} {code:>24} {seconds:8.2f}s {1000 * longest:9.0f} ms {memory:>10}", flush=True)


def _serve(port: Connection, max_model_len: int) -> None:
    from tests.server.scripted_engine import ScriptedEngine

    from octavo.server.config import ServerConfig
    from octavo.server.serve import open_socket, serve_engine

    async def main() -> None:
        engine, config = ScriptedEngine(max_model_len=max_model_len), ServerConfig(port=0)
        engine.script.step_delay = 0.01
        listener = open_socket(config)
        port.send(listener.getsockname()[1])
        await serve_engine(engine, config, listener)

    asyncio.run(main())


def main() -> None:
    """Prints a line for each kind of body."""
    parser = argparse.ArgumentParser(description="The longest pause of a stream beside bad requests.")
    parser.add_argument("--url", help="a server that runs [default: the tests' scripted engine]")
    parser.add_argument("--only", nargs="+", default=[], choices=list(BODIES), metavar="NAME")
    parser.add_argument("--max-model-len", type=int, default=512, help="of the scripted engine [default: 512]")
    args = parser.parse_args()
    if args.url:
        asyncio.run(_measure(args.url.rstrip("/"), args.only))
        return
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, args.max_model_len), daemon=True)
    server.start()
    try:
        asyncio.run(_measure(f"http://127.0.0.1:{ours.recv()}", args.only, server.pid))
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
