"""The memory that a run promises, against what a process of its own takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.test_architectures import make
from tests.quantize.checkpoints import write_tokenizer

OWN = 24 << 20
"""What torch and its libraries take for themselves as they work: threads' buffers, pages that the
allocator keeps.
"""

PROGRAM = """
import json, sys
from pathlib import Path
import torch
from octavo.quantize.options import Options
from octavo.quantize.run import Quantisation

def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

folder, output, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
run = Quantisation(Options(model=str(folder), output=output, device="cpu", **options))
promised = run.needs().host
x = torch.randn(256, 256)
torch.linalg.cholesky(x @ x.t() + 300 * torch.eye(256))  # the libraries' own memory
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = kib("VmRSS")
run.run()
print(json.dumps([promised, 1024 * (kib("VmHWM") - before)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of 6 MiB: all of them mapped at once would be more than `OWN`."""
    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8}
    make("llama-gqa-tied", folder, vocab_size=512, **shape).to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts a process's peak anew")
@pytest.mark.parametrize("method", ["rtn", "int8", "awq", "gptq"])
def test_the_promise_holds(method: str, folder: Path, tmp_path: Path) -> None:
    options = {"method": method, "num_samples": 4, "sample_length": 64}
    words = [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path / "out"), json.dumps(options)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200, check=True)
    promised, taken = json.loads(done.stdout.splitlines()[-1])
    print(f"{method}: promised {promised / 2**20:.0f} MiB, took {taken / 2**20:.0f}")
    assert taken < promised + OWN
