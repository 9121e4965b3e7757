"""The tensors of a step: what a request slot remembers, what a forward pass reads, and the buffers
that cross to and from the core.

Everything here has a fixed address for the life of the engine, so CUDA graphs may be captured over
it. The file knows shapes only: `kernels/step/prepare.py` and `kernels/step/sample.py` fill and
advance these tensors, and the core (Rust) decides what the plan says. docs/plan.md has the format
of a plan and of a result.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.kernels.step import plan_format
from octavo.kernels.step.plan_format import Plan


class DeviceState:
    """What the device remembers of each request slot between steps.

    There are `max_num_seqs + 1` slots; the last one is the padding slot, whose state stays zero.
    The parameters of a slot are kept as the very record that entered it, so entering a request is
    one copy; the named attributes are views of the record's columns.
    """

    def __init__(
        self, *, max_num_seqs: int, num_groups: int, max_blocks: int, vocab_size: int, device: torch.device
    ) -> None:
        slots = max_num_seqs + 1
        self.vocab_size = vocab_size
        self.padding_slot = max_num_seqs
        self.block_table = torch.zeros((num_groups, slots, max_blocks), dtype=torch.int32, device=device)
        self.block_tables: list[Tensor] = list(self.block_table.unbind(0))  # per KV group [slots, max_blocks] int32
        self.last_token = torch.zeros(slots, dtype=torch.int32, device=device)
        self._keep(torch.zeros((slots, plan_format.ENTER_WORDS), dtype=torch.int32, device=device))
        self.penalty_counts: Tensor | None = None
        self.pooled_sums: Tensor | None = None

    def _keep(self, records: Tensor) -> None:
        self.records = records
        floats = self.records.view(torch.float32)
        self.computed_len = self.records[
            :, plan_format.ENTER_COMPUTED_LEN
        ]  # [slots] int32, as all that follow unless said
        self.output_index = self.records[:, plan_format.ENTER_OUTPUT_INDEX]
        self.temperature = floats[:, plan_format.ENTER_TEMPERATURE]  # f32
        self.top_k = self.records[:, plan_format.ENTER_TOP_K]
        self.top_p = floats[:, plan_format.ENTER_TOP_P]  # f32
        self.min_p = floats[:, plan_format.ENTER_MIN_P]  # f32
        self.repetition_penalty = floats[:, plan_format.ENTER_REPETITION_PENALTY]  # f32
        self.presence_penalty = floats[:, plan_format.ENTER_PRESENCE_PENALTY]  # f32
        self.frequency_penalty = floats[:, plan_format.ENTER_FREQUENCY_PENALTY]  # f32
        self.seed = self.records[
            :, plan_format.ENTER_SEED_LOW : plan_format.ENTER_SEED_HIGH + 1
        ]  # [slots, 2] raw words
        self.num_logprobs = self.records[:, plan_format.ENTER_NUM_LOGPROBS]

    def require_pooled_sums(self, size: int) -> Tensor:
        """[slots, size] float32: sums of hidden states that are part of an embedding. Allocated when
        first asked for.
        """
        if self.pooled_sums is None:
            device = self.last_token.device
            self.pooled_sums = torch.zeros((self.last_token.shape[0], size), dtype=torch.float32, device=device)
        return self.pooled_sums

    def shadow(self, vocab_size: int) -> DeviceState:
        """A state that can run ahead of this one: with its block tables, and what else it remembers its
        own. `catch_up` fills it.
        """
        other = copy.copy(self)
        other.vocab_size = vocab_size
        other.last_token = self.last_token.clone()
        other._keep(self.records.clone())
        other.penalty_counts = None
        return other

    def catch_up(self, other: DeviceState) -> None:
        """Makes a shadow of `other` remember what that one does."""
        self.last_token.copy_(other.last_token)
        self.records.copy_(other.records)

    def require_penalty_counts(self) -> Tensor:
        """[slots, vocab_size] int32: 2 x (times the token was output) + (1 if it is in the prompt).
        Allocated when first asked for.
        """
        if self.penalty_counts is None:
            slots = self.last_token.shape[0]
            self.penalty_counts = torch.zeros(
                (slots, self.vocab_size), dtype=torch.int32, device=self.last_token.device
            )
        return self.penalty_counts


class StepInputs:
    """What the forward pass of a step reads; `prepare` fills the leading part, the rest is left
    over from earlier steps.
    """

    def __init__(self, *, max_tokens: int, max_rows: int, num_groups: int, device: torch.device) -> None:
        self.token_ids = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.positions = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.slots_of_groups = torch.zeros((num_groups, max_tokens), dtype=torch.int64, device=device)
        self.slot_mapping: list[Tensor] = list(self.slots_of_groups.unbind(0))  # per KV group [max_tokens] int64
        self.row_slots = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self.query_start_loc = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        # Token whose hidden state each row of logits comes from: all tokens of decode rows, the
        # last one of each prefill row.
        self.sample_index = torch.zeros(max_tokens, dtype=torch.int64, device=device)
        self.sample_rows = torch.zeros(
            max_tokens, dtype=torch.int32, device=device
        )  # their rows; where rows have drafts

    def rehearse(self, decode_lens: Sequence[int], prefill_lens: Sequence[int], *, slot: int) -> None:
        """Makes the inputs those of a step that does no harm: decode rows, then prefill rows of the
        given lengths, all of `slot`, whose block table must be all null block.
        """
        lens = torch.tensor([*decode_lens, *prefill_lens], dtype=torch.int32)
        rows, tokens = len(lens), int(lens.sum())
        starts = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
        self.token_ids[:tokens].zero_()
        self.positions[:tokens].zero_()
        self.slots_of_groups[:, :tokens].zero_()
        self.row_slots[:rows].fill_(slot)
        self.seq_lens[:rows].copy_(lens)
        self.query_start_loc[: rows + 1].copy_(starts)
        decode_tokens = sum(decode_lens)
        num_logits = decode_tokens + len(prefill_lens)
        self.sample_index[:decode_tokens].copy_(torch.arange(decode_tokens))
        self.sample_index[decode_tokens:num_logits].copy_(starts[len(decode_lens) + 1 :] - 1)


class Stopwatch:
    """How long a piece of a step takes: on a GPU on its own stream, by events."""

    def __init__(self, device: torch.device) -> None:
        self._events: Any = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._began = self._seconds = 0.0
        self._is_running = False

    def start(self) -> None:
        """The piece begins where the stream is now."""
        self._is_running = True
        if self._events:
            self._events[0].record()
        else:
            self._began = time.perf_counter()

    def stop(self) -> None:
        """It ends."""
        if self._events:
            self._events[1].record()
        else:
            self._seconds = time.perf_counter() - self._began

    def take(self) -> float:
        """Its seconds, once the step is done; 0 where it was not started since the last call."""
        if not self._is_running:
            return 0.0
        self._is_running = False
        return self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events else self._seconds


class StepBuffers:
    """One host slot: the plan the core writes, the result it reads, and their device twins (on a
    CPU: themselves).
    """

    def __init__(self, plan_bytes: int, result_bytes: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._plan_host = torch.zeros(_whole_words(plan_bytes), dtype=torch.uint8, pin_memory=self._on_gpu)
        self._result_host = torch.zeros(_whole_words(result_bytes), dtype=torch.uint8, pin_memory=self._on_gpu)
        # The core's views: its own sizes exactly, C-contiguous uint8.
        self.plan_array: npt.NDArray[np.uint8] = _numpy(self._plan_host[:plan_bytes])
        self.result_array: npt.NDArray[np.uint8] = _numpy(self._result_host[:result_bytes])
        # uint8 at its full size
        self.plan_device = torch.zeros_like(self._plan_host, device=device) if self._on_gpu else self._plan_host
        result_device = torch.zeros_like(self._result_host, device=device) if self._on_gpu else self._result_host
        self.result_device: Tensor = result_device.view(torch.int32)  # [result words] int32
        # Blocking: the thread sleeps in `wait` and leaves the core to others, where spinning would
        # hold it.
        self.drafting, self.following = Stopwatch(device), Stopwatch(device)
        self._done: Any = torch.cuda.Event(blocking=True) if self._on_gpu else None  # type: ignore[no-untyped-call]

    def read_plan(self) -> Plan:
        """The header of the plan that the core has written."""
        return Plan.read(self.plan_array)

    def draws(self, plan: Plan) -> bool:
        """Whether some row of the plan that the core has written draws a token."""
        words = self.plan_array[plan.rows_offset :].view(np.int32)[: plan.padded_rows * plan_format.ROW_WORDS]
        flags = words.reshape(-1, plan_format.ROW_WORDS)[:, plan_format.ROW_FLAGS]
        return bool((flags & plan_format.SAMPLE).any())

    def upload(self, num_bytes: int) -> Tensor:
        """Enqueues the copy of the plan's first `num_bytes` bytes; returns `plan_device`."""
        if self._on_gpu:
            self.plan_device[:num_bytes].copy_(self._plan_host[:num_bytes], non_blocking=True)
        return self.plan_device

    def download(self, num_bytes: int) -> None:
        """Enqueues the copy of the first `num_bytes` result bytes to the host and records the event
        that `wait` waits for.
        """
        if self._on_gpu:
            words = num_bytes // 4
            self._result_host.view(torch.int32)[:words].copy_(self.result_device[:words], non_blocking=True)
            self._done.record()

    def wait(self) -> None:
        """Returns once the downloaded result is in `result_array`; the GIL is free meanwhile."""
        if self._on_gpu:
            self._done.synchronize()


class MaskBuffer:
    """Grammar masks of a step: rows that the core writes, and their device twin (on a CPU:
    themselves).

    One serves all steps: the masks of step N+1 are written once step N is done, and the device reads
    them in order. They take memory when they are first asked for.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        # A multiple of 16 words, whatever the vocabulary: kernels are compiled for that.
        self._width = -(-vocab_size // 512) * 16
        self._host = torch.zeros((0, self._width), dtype=torch.int32)
        self._on_device = self._host

    def rows(self, count: int) -> npt.NDArray[np.uint32]:
        """The first `count` rows, uint32 [count, width], for the core to write: bit t % 32 of word
        t // 32 allows token t.
        """
        if count > len(self._host):
            room = max(count, 2 * len(self._host), 16)
            on_gpu = self._device.type == "cuda"
            self._host = torch.zeros((room, self._width), dtype=torch.int32, pin_memory=on_gpu)
            self._on_device = torch.zeros_like(self._host, device=self._device) if on_gpu else self._host
        array: npt.NDArray[np.uint32] = self._host[:count].numpy().view(np.uint32)
        return array

    def upload(self, count: int) -> Tensor:
        """Enqueues the copy of the first `count` rows; returns them, int32 [count, width]."""
        if self._on_device is not self._host:
            self._on_device[:count].copy_(self._host[:count], non_blocking=True)
        return self._on_device[:count]


@dataclass(slots=True)
class Step:
    """One planned step on its way through the device: the plan's numbers, and the host slot that
    has the rest.
    """

    slot: int
    plan: Plan
    buffers: StepBuffers
    logits: Tensor | None = None  # between the launches of the forward pass and of the sample


def _whole_words(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


def _numpy(tensor: Tensor) -> npt.NDArray[np.uint8]:
    array: npt.NDArray[np.uint8] = tensor.numpy()
    return array
