"""Threads that use one core."""

import subprocess
import sys

FIRST_STEP = """
import sys, threading
import numpy as np
from octavo._core import EngineCore, Prompt, SamplingParams

core = EngineCore(num_blocks=8, block_size=16, kv_windows=[0], max_num_seqs=2, max_num_batched_tokens=16,
                  max_model_len=64, vocab_size=100)
core.bind(0, np.zeros(core.plan_bytes, np.uint8), np.zeros(core.result_bytes, np.uint8))
core.add_call([Prompt([1, 2, 3])], SamplingParams(), now=0.0)
asking = True

def ask():
    while asking:
        core.stats()

others = [threading.Thread(target=ask) for _ in range(3)]
sys.setswitchinterval(1e-6)
for other in others:
    other.start()
assert core.schedule(0, 0.0) is not None
asking = False
for other in others:
    other.join()
"""


def test_a_first_step_while_others_ask() -> None:
    """The first borrow of an array has numpy import a module, which lets other threads run in the
    middle of the call: they must not wait for the core with the GIL held.
    """
    for _ in range(3):
        subprocess.run([sys.executable, "-c", FIRST_STEP], check=True, timeout=600)
