"""Schemathesis over all routes of `/openapi.json`, in negative mode with NUL bytes and its coverage
phase: no answer is a 5xx, and the server is as well afterwards as before.

`SCHEMATHESIS_CASES` is the number of cases a route; the document is checked by
openapi-spec-validator before.
"""

import json
import os
import subprocess
import urllib.request

from openapi_spec_validator import validate
from served import MODEL, SCRIPTED


def get(path: str) -> bytes:
    """A body, of the server whose answers are short."""
    with urllib.request.urlopen(SCRIPTED + path, timeout=60) as answer:
        return answer.read()


validate(json.loads(get("/openapi.json")))
line = [
    "schemathesis", "run", SCRIPTED + "/openapi.json", "--mode", "negative", "--phases", "coverage,fuzzing",
    "--checks", "not_a_server_error", "--max-examples", os.environ.get("SCHEMATHESIS_CASES", "50"),
    "--generation-allow-x00", "true", "--request-timeout", "30", "--suppress-health-check", "all",
    "--continue-on-failure", "--no-color",
]  # fmt: skip
ended = subprocess.run(line, check=False)
assert ended.returncode == 0, ended.returncode
body = json.dumps({"model": MODEL, "prompt": "Hi", "max_tokens": 2}).encode()
ask = urllib.request.Request(SCRIPTED + "/v1/completions", body, {"Content-Type": "application/json"})
assert json.load(urllib.request.urlopen(ask, timeout=60))["choices"][0]["text"]
metrics = dict(line.rsplit(" ", 1) for line in get("/metrics").decode().splitlines() if not line.startswith("#"))
watched = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
busy = {name: value for name, value in metrics.items() if name.startswith(watched)}
assert busy and not any(float(value) for value in busy.values()), busy
