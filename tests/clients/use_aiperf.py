"""aiperf: short runs of streamed chats, by its command, with the server's own counts of tokens."""

import json
import subprocess
from pathlib import Path

from served import CAPITAL, MODEL, REAL

Path("prompts.jsonl").write_text("".join(json.dumps({"text": f"{CAPITAL} {i}"}) + "\n" for i in range(6)))
subprocess.run(
    ["aiperf", "profile", "--model", MODEL, "--url", REAL, "--endpoint-type", "chat", "--streaming",
     "--input-file", "prompts.jsonl", "--custom-dataset-type", "single_turn", "--request-count", "6",
     "--concurrency", "2", "--use-server-token-count", "--tokenizer", "builtin", "--ui", "none",
     "--extra-inputs", "max_tokens:16"],
    check=True,
    timeout=300,
)  # fmt: skip
(report,) = Path("artifacts").rglob("profile_export_aiperf.json")
metrics = json.loads(report.read_text())
assert metrics["request_count"]["avg"] == 6 and not metrics.get("error_summary"), metrics
assert metrics["time_to_first_token"]["avg"] > 0
