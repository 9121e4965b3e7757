"""Single-stream decode on a CPU against transformers' `generate()`, in turns in one process, on the
default model.

    python bench/cpu_decode.py [bfloat16 | float32]

Figures of shared machines move: look at the ratio.
"""

import statistics
import sys
import time
import warnings

import torch
from transformers import AutoModelForCausalLM

from octavo import LLM, SamplingParams
from octavo.weights.default_model import default_model_path

PROMPT = list(range(100, 164))
TOKENS, REPEATS = 64, 3


def main() -> None:
    dtype = sys.argv[1] if len(sys.argv) > 1 else "bfloat16"
    path = default_model_path()
    warnings.simplefilter("ignore")
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    reference = reference.to(getattr(torch, dtype)).eval()
    llm = LLM(dtype=dtype, device="cpu", max_model_len=1024, enable_prefix_caching=False)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    ids = torch.tensor([PROMPT])

    def transformers_run() -> None:
        reference.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)

    def octavo_run() -> None:
        llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)

    times: dict[str, list[float]] = {"transformers": [], "octavo": []}
    for repeat in range(REPEATS + 1):
        for name, run in (("transformers", transformers_run), ("octavo", octavo_run)):
            started = time.perf_counter()
            run()
            if repeat:  # the first of each warms up
                times[name].append(time.perf_counter() - started)
    speeds = {name: TOKENS / statistics.median(values) for name, values in times.items()}
    print(f"{dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}, {TOKENS} tokens after {len(PROMPT)}")
    for name, speed in speeds.items():
        print(f"{name:13} {speed:6.2f} tok/s  (of {', '.join(f'{TOKENS / value:.2f}' for value in times[name])})")
    print(f"ratio         {speeds['octavo'] / speeds['transformers']:6.2f}")


if __name__ == "__main__":
    main()
