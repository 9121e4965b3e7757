"""aiperf: short runs of streamed chats, by its command, with the server's own counts of tokens."""

import json
import subprocess
from pathlib import Path

from served import CAPITAL, MODEL, REAL
from tokenizers import Tokenizer, models, pre_tokenizers

# It wants a tokenizer, though the server's counts are used: one that the hub need not be asked for.
words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
Path("tokenizer").mkdir()
words.save("tokenizer/tokenizer.json")
Path("tokenizer/tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')

Path("prompts.jsonl").write_text("".join(json.dumps({"text": f"{CAPITAL} {i}"}) + "\n" for i in range(6)))
subprocess.run(
    ["aiperf", "profile", "--model", MODEL, "--url", REAL, "--endpoint-type", "chat", "--streaming",
     "--input-file", "prompts.jsonl", "--custom-dataset-type", "single_turn", "--request-count", "6",
     "--concurrency", "2", "--use-server-token-count", "--tokenizer", "tokenizer", "--ui", "none",
     "--extra-inputs", "max_tokens:16"],
    check=True,
    timeout=300,
)  # fmt: skip
(report,) = Path("artifacts").rglob("profile_export_aiperf.json")
metrics = json.loads(report.read_text())
assert metrics["request_count"]["avg"] == 6 and not metrics.get("error_summary"), metrics
assert metrics["time_to_first_token"]["avg"] > 0
