"""guidellm: a short benchmark of chats over real prompts, by its command."""

import json
import subprocess
from pathlib import Path

from served import CAPITAL, REAL

Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{CAPITAL} {i}"}) + "\n" for i in range(8)))
subprocess.run(
    ["guidellm", "run", "--backend", f"kind=openai_http,target={REAL}", "--profile", "kind=concurrent,streams=2",
     "--constraint", "kind=max_requests,count=6", "--data", "kind=json_file,path=prompts.jsonl",
     "--output", "kind=json,path=out.json", "--disable-console"],
    check=True,
    timeout=300,
)  # fmt: skip
report = json.loads(Path("out.json").read_text())
(benchmark,) = report["benchmarks"]
totals = benchmark["metrics"]["request_totals"]
assert totals["successful"] == 6 and totals["errored"] == 0, totals
assert benchmark["metrics"]["time_to_first_token_ms"]["successful"]["mean"] > 0
