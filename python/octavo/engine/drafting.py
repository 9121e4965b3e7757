"""Drafts by a model on the device: it proposes what comes behind a sequence's last token, in the same
step in which the target verifies it.

Its keys and values lie under the target's block numbers, or in the target's very pages, so the core
knows one block table, one allocator and one prefix cache. It proposes before the target's forward
pass, out of what the device remembers of each slot: so the core may have planned the step without
knowing the tokens before it. Where its pages are its own it must have computed all that comes before,
and does so when drafts are wanted: the core knows what it has missed, and names it in the plan.
Another kind of drafter (trained heads) would have `propose` and `follow` of its own here.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.engine import step_ops
from octavo.engine.cuda_graph import StepGraphs, decode_ladder
from octavo.engine.forward import StepShape, all_hidden_states, hidden_states, step_context
from octavo.engine.step_buffers import DeviceState, StepInputs
from octavo.kernels import ops
from octavo.kernels.step import plan_format as fmt
from octavo.kernels.step.plan_format import Plan
from octavo.layers.context import StepContext
from octavo.model_config import KvGroup
from octavo.models.registry import Model


@dataclass(frozen=True)
class DraftModel:
    """A model that drafts.

    dtype: of its keys and values where they are plain. shares_pages: it has the target's shape and
    reads the target's own keys and values. What it writes there itself, the target's verification
    writes over in the same step.
    """

    model: Model
    dtype: torch.dtype
    shares_pages: bool
    weight_bytes: int


def share_groups(draft: Model, target_groups: list[KvGroup]) -> None:
    """Puts the draft's layers into the target's KV groups, whose block tables they then read.

    A layer goes where as many tokens are kept as it sees; of several such groups to the one that has
    fewest of its kind yet, since the largest number decides the bytes of a block. Where none keeps as
    many, the layer sees less: its drafts are worse for it, the answer is not.
    """

    def kept(window: int) -> float:
        return window or float("inf")

    groups = [KvGroup(group.window, []) for group in target_groups]
    widest = max(kept(group.window) for group in groups)
    layers = sorted(range(len(draft.decoder_layers)), key=lambda i: -kept(draft.decoder_layers[i].attention.window))
    for layer in layers:
        attention = draft.decoder_layers[layer].attention
        wanted = min(kept(attention.window), widest)
        fitting = [index for index, group in enumerate(groups) if kept(group.window) >= wanted]
        chosen = min(fitting, key=lambda index: len(groups[index].layers))
        groups[chosen].layers.append(layer)
        attention.kv_group = chosen
        if kept(groups[chosen].window) < kept(attention.window):
            attention.window = groups[chosen].window
    draft.kv_groups = groups


class Proposer:
    """Proposes tokens for the decode rows of a plan, one more for each pass of the draft model.

    A pass is an ordinary step of one token a row, on a state that begins as the target's and runs
    ahead of it: so drafts are drawn by the request's own parameters, seed and place in its output,
    and the target's draw, which has the same noise, is the same more often than the likeliest token
    would be. Penalties and biases are left out, and so are grammars, for which the core asks for no
    drafts. A model with pages of its own has one pass more, for the keys and values of the last draft.
    """

    def __init__(
        self,
        draft: DraftModel,
        target_state: DeviceState,
        target_inputs: StepInputs,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        num_groups: int,
        block_size: int,
        num_draft_tokens: int,
        max_model_len: int,
        uses_graphs: bool,
        device: torch.device,
    ) -> None:
        self.draft = draft
        self._target_state, self._target_inputs = target_state, target_inputs
        self._block_size, self._max_seq_len = block_size, max_model_len + num_draft_tokens
        vocab_size = min(target_state.vocab_size, draft.model.config.vocab_size)
        self._state = target_state.shadow(vocab_size)
        self._clamps = vocab_size < target_state.vocab_size
        self._closing_passes = int(not draft.shares_pages)
        self._most_to_follow = 0 if draft.shares_pages else max_num_batched_tokens
        self.sizes = decode_ladder(max_num_seqs)
        self._inputs = StepInputs(
            max_tokens=max(max_num_seqs, self._most_to_follow),
            max_rows=max_num_seqs,
            num_groups=num_groups,
            device=device,
        )
        self._graphs: StepGraphs | None = None
        if uses_graphs:
            self._graphs = StepGraphs(
                draft.model, self._inputs, self._state, max_decode_len=1, max_seq_len=self._max_seq_len
            )
        # The rows of each pass, as a plan has them: the bytes are a whole plan of its own.
        self._idle = torch.zeros((max_num_seqs, fmt.ROW_WORDS), dtype=torch.int32, device=device)
        self._idle[:, fmt.ROW_SLOT] = target_state.padding_slot
        self._idle[:, fmt.ROW_QUERY_START] = torch.arange(max_num_seqs, device=device)
        self._idle[:, fmt.ROW_QUERY_LEN] = 1
        self._idle[:, fmt.ROW_FLAGS] = fmt.PADDING
        self._idle[:, fmt.ROW_MASK_ROW] = -1
        most_passes = num_draft_tokens + self._closing_passes
        self._rows = self._idle.repeat(most_passes, 1, 1)
        self._results = torch.zeros((num_draft_tokens, max_num_seqs, _RESULT_WIDTH), dtype=torch.int32, device=device)
        self._places = torch.arange(most_passes, device=device)[:, None]
        self._numbers = torch.arange(max_num_seqs * num_draft_tokens, device=device)

    def shapes(self) -> list[StepShape]:
        """Steps of the draft model that are captured, largest first."""
        return [StepShape(rows, rows) for rows in reversed(self.sizes)] if self._graphs is not None else []

    def capture(self) -> None:
        """Captures them."""
        for shape in self.shapes():
            assert self._graphs is not None
            self._graphs.capture(shape)

    def rehearse(self) -> None:
        """The largest pass over rows of padding, for the memory that it takes."""
        rows = self.sizes[-1]
        self._inputs.rehearse([1] * rows, [], slot=self._state.padding_slot)
        hidden = hidden_states(self.draft.model, self._inputs, self._context(StepShape(rows, rows)))
        ops.sample_peak_rehearsal(self.draft.model.compute_logits(hidden))
        if self._most_to_follow:
            rows = min(rows, self._most_to_follow)
            least, more = divmod(self._most_to_follow, rows)
            lens = [min(least + (row < more), self._max_seq_len) for row in range(rows)]
            self._inputs.rehearse([], lens, slot=self._state.padding_slot)
            self._compute(StepShape(0, 0, rows, sum(lens)), max(lens), max(lens))

    def follow(self, plan: Plan, plan_device: Tensor) -> None:
        """Computes what the plan's `follow_rows` say, for the keys and values. `prepare` has run."""
        rows = plan_device.view(torch.int32)[plan.follow_rows_offset // 4 :]
        rows = rows[: plan.num_follow_rows * fmt.FOLLOW_WORDS].view(-1, fmt.FOLLOW_WORDS)
        # `propose`, which comes after, begins with the target's own lengths again.
        self._state.computed_len[rows[:, fmt.FOLLOW_SLOT].long()] = rows[:, fmt.FOLLOW_START]
        step = _follow_plan(plan)
        step_ops.prepare(step, plan_device, self._state, self._inputs, block_size=self._block_size)
        if self._clamps:
            self._inputs.token_ids[: step.num_tokens].clamp_(max=self._state.vocab_size - 1)
        self._compute(StepShape.of(step), step.max_query_len, step.max_seq_len)

    def _compute(self, shape: StepShape, max_query_len: int, max_seq_len: int) -> None:
        """Runs the model over prompt tokens, for its keys and values."""
        context = step_context(
            self._inputs, self._state, shape, max_decode_len=1, max_query_len=max_query_len, max_seq_len=max_seq_len
        )
        all_hidden_states(self.draft.model, self._inputs, context)

    def propose(self, plan: Plan, plan_device: Tensor) -> None:
        """Fills the plan's `drafts` on the device, and the places of `target_inputs` that wait for them.
        `prepare` has run, so slots have entered and tables hold the step's blocks.
        """
        words = plan_device.view(torch.int32)
        num_rows = plan.num_decodes
        start = plan.rows_offset // 4
        rows = words[start : start + num_rows * fmt.ROW_WORDS].view(num_rows, fmt.ROW_WORDS)
        slots, wanted = rows[:, fmt.ROW_SLOT], rows[:, fmt.ROW_NUM_DRAFTS]
        self._state.catch_up(self._target_state)
        size = self.sizes[bisect.bisect_left(self.sizes, num_rows)]
        step = _pass_plan(size, plan)
        most = plan.decode_query_len - 1
        num_passes = most + self._closing_passes
        # A row with drafts and pages of its own has a pass more than it has drafts.
        takes_part = (wanted > 0) & (wanted + self._closing_passes > self._places[:num_passes])
        passes = self._rows[:num_passes]
        passes[:, :size] = self._idle[:size]
        passes[:, :num_rows, fmt.ROW_SLOT] = torch.where(takes_part, slots, self._state.padding_slot)
        passes[:, :num_rows, fmt.ROW_FLAGS] = torch.where(takes_part, fmt.SAMPLE, fmt.PADDING)
        # Each pass is a few launches and no more: all there is to do for it is done before and after all.
        drawn = torch.stack([self.draw(step, place)[:num_rows] for place in range(most)])
        if self._closing_passes:
            self._pass(step, most)
        drawn.clamp_(min=0)  # -1: its logits were NaN
        # Each row before a draft's has one token that is no draft.
        first = rows[:, fmt.ROW_QUERY_START].long() - self._numbers[:num_rows]
        number = self._numbers[: plan.num_drafts]
        row = torch.searchsorted(first, number, right=True) - 1
        drafts = drawn[number - first[row], row]
        start = plan.drafts_offset // 4
        words[start : start + plan.num_drafts] = drafts
        self._target_inputs.token_ids[number + row + 1] = drafts

    def draw(self, step: Plan, place: int) -> Tensor:
        """The pass for the drafts of one place: a token for each row that takes part # [rows] int32, a view;
        -1 where its logits were NaN, and whatever in the other rows.

        step: the header of a plan whose rows are those of the pass.
        """
        logits = self.draft.model.compute_logits(self._pass(step, place))
        words, result = self._rows[place].view(torch.uint8).view(-1), self._results[place]
        step_ops.sample(logits, step, words, self._state, self._inputs, result.view(-1))
        return result[: step.padded_rows, fmt.RESULT_TOKENS]

    def _pass(self, step: Plan, place: int) -> Tensor:
        """The model over one token of each row: hidden states [rows, hidden size]."""
        words = self._rows[place].view(torch.uint8).view(-1)
        if self._clamps:
            self._state.last_token.clamp_(max=self._state.vocab_size - 1)
        step_ops.prepare(step, words, self._state, self._inputs, block_size=self._block_size)
        if self._graphs is not None and self._graphs.fits(step):
            return self._graphs.replay(step)
        return hidden_states(self.draft.model, self._inputs, self._context(StepShape.of(step)))

    def _context(self, shape: StepShape) -> StepContext:
        return step_context(
            self._inputs, self._state, shape, max_decode_len=1, max_query_len=1, max_seq_len=self._max_seq_len
        )


_RESULT_WIDTH = fmt.RESULT_TOKENS + 1


def _pass_plan(rows: int, plan: Plan) -> Plan:
    """The header of a step of `rows` decode rows of one token, whose rows are all that it has."""
    values: dict[str, Any] = dict.fromkeys(Plan._fields, 0)
    values |= dict.fromkeys(("num_rows", "padded_rows", "num_decodes", "padded_decodes"), rows)
    values |= dict.fromkeys(("num_decode_tokens", "num_tokens"), rows)
    values |= {"decode_query_len": 1, "max_query_len": 1, "max_seq_len": plan.max_seq_len}
    values |= {"max_logprobs": -1, "max_prompt_logprobs": -1, "all_greedy": plan.all_greedy}
    return Plan(**values | {"result_width": _RESULT_WIDTH, "num_bytes": 4 * rows * fmt.ROW_WORDS})


def _follow_plan(plan: Plan) -> Plan:
    """The header of a step whose prefill rows are the `follow_rows` of a plan, in whose bytes they lie."""
    values: dict[str, Any] = dict.fromkeys(Plan._fields, 0)
    values |= dict.fromkeys(("num_rows", "padded_rows"), plan.num_follow_rows)
    values |= dict.fromkeys(("num_prefill_tokens", "num_tokens"), plan.num_follow_tokens)
    values |= {"rows_offset": plan.follow_rows_offset, "prefill_tokens_offset": plan.follow_tokens_offset}
    values |= {"decode_query_len": 1, "max_query_len": plan.max_follow_len, "max_seq_len": plan.max_seq_len}
    return Plan(**values | {"max_logprobs": -1, "max_prompt_logprobs": -1, "num_bytes": plan.num_bytes})
