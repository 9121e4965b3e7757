"""Schemathesis over all routes of `/openapi.json`, in negative mode with NUL bytes and its coverage
phase: no answer is a 5xx, and each server is as well afterwards as before.

`SCHEMATHESIS_CASES` is the number of fuzzed cases a route, `SCHEMATHESIS_SECONDS` bounds the whole. A
route's cases are cut into slices with seeds of their own, and lanes (one a core, or
`SCHEMATHESIS_LANES`) take slices in turn, each against a server of its own: first one slice of every
route, so that a run which is out of time has had as much of each. The document is checked by
openapi-spec-validator before.
"""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from openapi_spec_validator import validate
from served import MODEL, SCRIPTED, SCRIPTED_COMMAND

CASES = int(os.environ.get("SCHEMATHESIS_CASES", "50"))
SECONDS = float(os.environ.get("SCHEMATHESIS_SECONDS", "6000"))
LANES = int(os.environ.get("SCHEMATHESIS_LANES", os.cpu_count() or 1))
SLICE = 100
"""Cases of one process: Hypothesis takes longer for each of many."""
LAST_WORDS = 30.0
"""Seconds that an interrupted process has to say how far it came."""


@dataclass(frozen=True)
class Slice:
    """Some of a route's cases."""

    method: str
    path: str
    seed: int
    cases: int

    def __str__(self) -> str:
        return f"{self.method.upper()} {self.path}"


def get(url: str) -> bytes:
    """A body."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


def slices(document: dict) -> list[Slice]:
    """All of them, those with the first seed first."""
    routes = [
        (method, path, bool(operation.get("requestBody") or operation.get("parameters")))
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    return [
        Slice(method, path, 1 + number, min(SLICE, CASES - number * SLICE))
        for number in range(math.ceil(CASES / SLICE))
        for method, path, takes_something in routes
        if takes_something or number == 0  # else all requests are alike
    ]


@contextlib.contextmanager
def scripted() -> Iterator[str]:
    """A server of a lane's own. Its contexts are short: cases ask for long answers, and many."""
    with subprocess.Popen(
        [*SCRIPTED_COMMAND, "256"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


def healthy(url: str) -> str | None:
    """What is wrong with a server, if anything."""
    body = json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 2}).encode()
    ask = urllib.request.Request(url + "/v1/completions", body, {"Content-Type": "application/json"})
    if not json.load(urllib.request.urlopen(ask, timeout=60))["choices"][0]["text"]:
        return "an answer without text"
    metrics = dict(line.rsplit(" ", 1) for line in get(url + "/metrics").decode().splitlines() if line[:1] != "#")
    watched = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    busy = {name: value for name, value in metrics.items() if name.startswith(watched)}
    return None if busy and not any(map(float, busy.values())) else f"requests are left: {busy}"


class Run:
    """What lanes share."""

    def __init__(self, todo: list[Slice]) -> None:
        self.todo = todo
        self.lock = threading.Lock()
        self.deadline = time.monotonic() + SECONDS
        self.cases: Counter[str] = Counter()
        self.late: Counter[str] = Counter()
        self.failures: list[str] = []

    def lane(self) -> None:
        """Takes slices until there are none, or no time is left."""
        try:
            with scripted() as url:
                while (taken := self.next()) is not None:
                    self.one(url, taken)
                if wrong := healthy(url):
                    self.failures.append(wrong)
        except Exception as error:
            self.failures.append(f"a lane broke: {error!r}")

    def next(self) -> Slice | None:
        with self.lock:
            if not self.todo:
                return None
            taken = self.todo.pop(0)
            if time.monotonic() < self.deadline:
                return taken
            for left in (taken, *self.todo):
                self.late[str(left)] += left.cases
            self.todo.clear()
            return None

    def one(self, url: str, taken: Slice) -> None:
        line = [
            "schemathesis", "run", url + "/openapi.json", "--mode", "negative",
            "--phases", "coverage,fuzzing" if taken.seed == 1 else "fuzzing", "--seed", str(taken.seed),
            "--include-name", str(taken),
            "--checks", "not_a_server_error", "--max-examples", str(taken.cases), "--generation-allow-x00", "true",
            "--generation-database", "none", "--request-timeout", "30", "--suppress-health-check", "all",
            "--continue-on-failure", "--no-color",
        ]  # fmt: skip
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        interrupted = False
        try:
            said, _ = process.communicate(timeout=max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            interrupted = True
            process.send_signal(signal.SIGINT)
            try:
                said, _ = process.communicate(timeout=LAST_WORDS)
            except subprocess.TimeoutExpired:
                process.kill()
                said, _ = process.communicate()
        if "No test cases were generated" in said:  # a path that any text may stand in cannot be broken
            return
        generated = re.search(r"(\d+) generated", said)
        with self.lock:
            self.cases[str(taken)] += int(generated[1]) if generated else 0
            if interrupted:
                self.late[str(taken)] += taken.cases
            if process.returncode and (not interrupted or " failed" in said):
                self.failures.append(f"{taken}, seed {taken.seed}: exit code {process.returncode}\n{said}")


def main() -> int:
    document = json.loads(get(SCRIPTED + "/openapi.json"))
    validate(document)
    run = Run(slices(document))
    lanes = [threading.Thread(target=run.lane) for _ in range(min(LANES, len(run.todo)))]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join()
    for route, count in sorted(run.cases.items()):
        late = f", out of time in {run.late[route]} more" if run.late[route] else ""
        print(f"{route:40} {count:6} cases{late}")
    for route in sorted(run.late.keys() - run.cases.keys()):
        print(f"{route:40} no case: out of time")
    for failure in run.failures:
        print(failure)
    print(f"{sum(run.cases.values())} cases on {len(run.cases)} routes, {len(run.failures)} failures")
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
