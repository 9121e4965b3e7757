"""One GGUF file on a CPU, Octavo and llama.cpp in turns in one process: decode of one stream, a prompt
of 512, and several streams at once.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python==0.3.36
    python bench/cpu_llama_cpp.py [--threads 1] [--model FILE] [--streams 8 32]

Beside wall time it counts the process's CPU seconds, which other processes on the machine do not
change: with one thread look at those.
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial

import llama_cpp
import torch

from octavo import LLM, SamplingParams, _core
from octavo.weights.default_model import default_model_path

TOKENS, PROMPT, LONG = 48, list(range(100, 164)), list(range(100, 612))
LENGTH = 1024


class Peer:
    """llama.cpp by its low-level API: a context of `streams` sequences."""

    def __init__(self, path: str, threads: int, streams: int) -> None:
        llama_cpp.llama_log_set(SILENT, ctypes.c_void_p(0))
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = LENGTH * streams, 512, 512
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max = streams
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def evaluate(self, tokens: list[tuple[int, int, int]], logits: int) -> None:
        """tokens: (id, position, stream); the last `logits` of them have logits."""
        self.batch.n_tokens = len(tokens)
        for place, (token, position, stream) in enumerate(tokens):
            self.batch.token[place], self.batch.pos[place] = token, position
            self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, stream
            self.batch.logits[place] = place >= len(tokens) - logits
        if llama_cpp.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")

    def greedy(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        address = ctypes.addressof(logits.contents)
        return int(torch.frombuffer((ctypes.c_float * self.vocab).from_address(address), dtype=torch.float32).argmax())

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def prompt(self, ids: list[int], stream: int) -> int:
        self.evaluate([(token, position, stream) for position, token in enumerate(ids)], 1)
        return self.greedy(-1)

    def decode(self, ids: list[int], streams: int, count: int) -> None:
        self.forget()
        last = [self.prompt([ids[0] + stream, *ids[1:]], stream) for stream in range(streams)]
        for step in range(count - 1):
            position = len(ids) + step
            self.evaluate([(last[stream], position, stream) for stream in range(streams)], streams)
            last = [self.greedy(stream) for stream in range(streams)]


@llama_cpp.llama_log_callback
def SILENT(*_: object) -> None:
    """llama.cpp's own log."""


def ours(llm: LLM, ids: list[int], streams: int, count: int) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    llm.generate([{"prompt_token_ids": [ids[0] + s, *ids[1:]]} for s in range(streams)], params, use_tqdm=False)


def seconds(run: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default=None)
    parser.add_argument("--streams", type=int, nargs="*", default=[])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    path = arguments.model or str(default_model_path())
    torch.set_num_threads(arguments.threads)
    _core.set_cpu_threads(arguments.threads)
    most = max([1, *arguments.streams])
    peer = Peer(path, arguments.threads, most)
    llm = LLM(path, device="cpu", max_model_len=LENGTH, max_num_seqs=max(most, 8), enable_prefix_caching=False)
    print(f"{path}, {arguments.threads} threads, levels {', '.join(_core.cpu_levels())}")
    print("tokens a second of wall time, and of CPU time; ratio of the medians of paired turns")
    report("prompt 512", 512, lambda count: ours(llm, LONG, 1, 1), lambda count: peer.decode(LONG, 1, 1), arguments)
    for streams in [1, *arguments.streams]:
        tokens = streams * (TOKENS - 1)
        octavo, llama = partial(ours, llm, PROMPT, streams), partial(peer.decode, PROMPT, streams)
        report(f"decode, {streams} streams", tokens, octavo, llama, arguments, is_decode=True)


def report(
    name: str,
    tokens: int,
    octavo: Callable[[int], None],
    llama: Callable[[int], None],
    arguments: argparse.Namespace,
    is_decode: bool = False,
) -> None:
    """Both in turns, each given how many tokens it decodes; of a decode less its prompts."""
    speeds: dict[str, list[tuple[float, float]]] = {"octavo": [], "llama.cpp": []}
    for repeat in range(arguments.repeats + 1):
        for who, run in (("octavo", octavo), ("llama.cpp", llama)):
            wall, cpu = seconds(partial(run, TOKENS))
            if is_decode:
                wall_first, cpu_first = seconds(partial(run, 1))
                wall, cpu = wall - wall_first, cpu - cpu_first
            if repeat:  # the first of each warms up
                speeds[who].append((tokens / wall, tokens / cpu))
    for who, all_ in speeds.items():
        wall, cpu = (statistics.median(one) for one in zip(*all_, strict=True))
        print(f"{name:20} {who:10} {wall:8.1f} {cpu:8.1f}")
    pairs = list(zip(speeds["octavo"], speeds["llama.cpp"], strict=True))
    wall, cpu = (statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1))
    print(f"{name:20} {'ratio':10} {wall:8.2f} {cpu:8.2f}", flush=True)


if __name__ == "__main__":
    main()
