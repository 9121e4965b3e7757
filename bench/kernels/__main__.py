"""`python -m bench.kernels [name part ...]`: microseconds of each op, its share of the card's
limit, torch's, the peer's, the goal.
"""

import itertools
import sys

import torch
import triton
from bench.kernels.cases import all_cases
from bench.kernels.sample import sampling
from bench.kernels.timing import ARITHMETIC, BANDWIDTH, microseconds


def main() -> None:
    wanted = sys.argv[1:]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; bf16, microseconds")
    print(f"{'op':18} {'shape':30} {'ours':>8} {'rate':>14} {'limit':>6} {'torch':>8} {'peer':>8} {'goal':>8}")
    for case in itertools.chain(all_cases(), sampling()):
        if not all(part in f"{case.op} {case.shape}" for part in wanted):
            continue
        ours = microseconds(case.calls)
        plain = microseconds(case.torch_calls) if case.torch_calls else None
        seconds = ours * 1e-6
        # The limit is whichever takes longer: moving the bytes or doing the arithmetic.
        if case.flops / ARITHMETIC > case.bytes / BANDWIDTH:
            rate, share = f"{case.flops / seconds / 1e12:7.0f} TFLOP/s", case.flops / seconds / ARITHMETIC
        else:
            rate, share = f"{case.bytes / seconds / 1e12:9.2f} TB/s", case.bytes / seconds / BANDWIDTH
        columns = [f"{figure:8.2f}" if figure is not None else f"{'-':>8}" for figure in (plain, case.peer, case.goal)]
        met = "" if case.goal is None else " met" if ours <= case.goal else " missed"
        print(f"{case.op:18} {case.shape:30} {ours:8.2f} {rate:>14} {share:6.0%}", *columns, met, flush=True)
        del case
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
