"""Log-probabilities of a prompt's tokens and of the top tokens, in Triton: `sample.py`'s pass over the
logits, then one program a token.

Twin: `reference.logprobs.prompt_logprobs`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.launch import has_pdl
from octavo.kernels.step import plan_format as fmt
from octavo.kernels.step import sample
from octavo.kernels.step.logprobs import store_float, write_token

_PAIR_WORDS = tl.constexpr(fmt.PAIR_WORDS)
_TARGET = tl.constexpr(fmt.TARGET_TARGET)
_LOGPROB = tl.constexpr(fmt.TARGET_RESULT_LOGPROB)
_RANK = tl.constexpr(fmt.TARGET_RESULT_RANK)
_TOP = tl.constexpr(fmt.TARGET_RESULT_TOP)


def prompt_logprobs(logits: Tensor, targets: Tensor, vocab: int, top: int, record: Tensor) -> None:
    """As `reference.logprobs.prompt_logprobs`, on CUDA tensors; logits f32 or bf16, targets and
    records contiguous.
    """
    num_logits, device = logits.shape[0], logits.device
    tiles = triton.cdiv(vocab, sample.TILE)
    subs = tiles * (sample.TILE // sample.SUB)
    tile_floats = torch.empty((3, num_logits, tiles), dtype=torch.float32, device=device)
    tile_ints = torch.empty((2, num_logits, tiles), dtype=torch.int32, device=device)
    groups = torch.empty((3, num_logits, subs), dtype=torch.float32, device=device)
    pdl = has_pdl(device)
    # What a greedy pass does not read is `targets`, which no row will follow.
    sample.scan_kernel[(tiles, num_logits)](
        logits, tile_floats, tile_ints, groups, targets, targets, targets, targets, targets,
        0, 0, 0, 0, 1, num_logits, vocab, logits.stride(0), 0,
        GREEDY=True, WITH_LOGPROBS=True, TILE=sample.TILE, SUB=sample.SUB, PDL=pdl,
        num_warps=sample.SCAN_WARPS, maxnreg=sample.SCAN_REGISTERS, enable_fp_fusion=False, launch_pdl=pdl,
    )  # fmt: skip
    _targets_kernel[(num_logits,)](
        logits, groups[sample.RAW_SUB_PEAK.value], tile_floats[sample.RAW_PEAK.value :], tile_ints[sample.SICK.value],
        targets, record, num_logits, vocab, logits.stride(0), tiles, subs, record.stride(0), top,
        TILES=triton.next_power_of_2(tiles), SUBS=triton.next_power_of_2(subs), TILE=sample.TILE, SUB=sample.SUB,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


# Where these three begin depends on the step's shape: aligned or not, it is one variant.
@triton.jit(do_not_specialize=["tiles_ptr", "sick_ptr", "record_ptr", "num_logits", "record_stride", "top"])
def _targets_kernel(
    logits_ptr, peaks_ptr, tiles_ptr, sick_ptr, targets_ptr, record_ptr,
    num_logits, vocab, logits_stride, tiles, subs, record_stride, top,
    TILES: tl.constexpr, SUBS: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Program (target)."""
    index = tl.program_id(0)
    record_ptr += index.to(tl.int64) * record_stride
    tile_lane = tl.arange(0, TILES)
    sick = tl.max(tl.load(sick_ptr + index * tiles + tile_lane, mask=tile_lane < tiles, other=0), 0)
    if sick != 0:
        store_float(record_ptr + _LOGPROB, tl.full([], float("nan"), tl.float32))
    else:
        write_token(
            logits_ptr + index.to(tl.int64) * logits_stride, peaks_ptr, tiles_ptr, index, num_logits, vocab, tiles,
            subs, tl.load(targets_ptr + index * _PAIR_WORDS + _TARGET), record_ptr + _LOGPROB, record_ptr + _RANK,
            record_ptr + _TOP, record_ptr + _TOP + top, top,
            TILES, SUBS, TILE, SUB,
        )  # fmt: skip
