"""Runs planned steps on one device: plan bytes in, result bytes out.

Knows tensors, the model and CUDA graphs. Does not know requests, text or scheduling: those are
facts of the Rust core, which names request slots and blocks in the plan (docs/plan.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.engine import step_ops
from octavo.engine.cuda_graph import GraphSizes, StepGraphs
from octavo.engine.drafting import DraftModel, Proposer, share_groups
from octavo.engine.forward import StepShape, all_hidden_states, sampled, step_context
from octavo.engine.kv_layout import KvLayout
from octavo.engine.step_buffers import DeviceState, MaskBuffer, Step, StepInputs
from octavo.kernels import ops
from octavo.kernels.step.plan_format import PAIR_WORDS, POOL_WORDS, TARGET_PLACE, Plan
from octavo.weights.load import LoadedModel

TARGETS_AT_ONCE = 128
"""Prompt tokens whose logits are in memory at a time."""


class ModelRunner:
    """Owns the model, the KV pool and the device state; executes one plan at a time, asynchronously
    on a GPU.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        device: torch.device,
        kv_layout: KvLayout,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        num_draft_tokens: int,
        graph_sizes: GraphSizes,
        draft: DraftModel | None = None,
        draft_kv_dtype: torch.dtype | None = None,
    ) -> None:
        """draft: makes the drafts on the device; without, they are in the plans. draft_kv_dtype: of its
        own pages, where it has any.
        """
        self.model = loaded.model
        self.device = device
        self.vocab_size = loaded.config.vocab_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.max_decode_len = 1 + num_draft_tokens
        self.graph_sizes = graph_sizes
        self.kv_layout, block_size = kv_layout, kv_layout.block_size
        self.draft_layout: KvLayout | None = None
        if draft is not None and not draft.shares_pages:
            share_groups(draft.model, loaded.model.kv_groups)
            assert draft_kv_dtype is not None
            self.draft_layout = KvLayout.of(draft.model, block_size=block_size, dtype=draft_kv_dtype)
        # Room for rejected drafts, which may lie past the longest sequence.
        max_blocks = -(-(max_model_len + num_draft_tokens) // block_size)
        self.state = DeviceState(
            max_num_seqs=max_num_seqs,
            num_groups=self.kv_layout.num_groups,
            max_blocks=max_blocks,
            vocab_size=self.vocab_size,
            device=device,
        )
        # A step of decodes only may be padded beyond the token budget's last row, never beyond one
        # row a sequence.
        self.inputs = StepInputs(
            max_tokens=max(max_num_batched_tokens, max_num_seqs),
            max_rows=max(max_num_seqs, graph_sizes.most_decodes) + graph_sizes.prefill_rows,
            num_groups=self.kv_layout.num_groups,
            device=device,
        )
        self.see_prompt_logits: Callable[[Tensor], None] | None = None
        """Is shown the logits of prompt targets, [n, vocab] float32, piece by piece: whole distributions
        are too large to leave the device.
        """
        self.masks = MaskBuffer(self.vocab_size, device)
        self.kv_caches: list[Tensor] = []  # [num_blocks, bytes] uint8 for each layer of a group
        self.proposer: Proposer | None = None
        if draft is not None:
            self.proposer = Proposer(
                draft,
                self.state,
                self.inputs,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                num_groups=self.kv_layout.num_groups,
                block_size=block_size,
                num_draft_tokens=num_draft_tokens,
                max_model_len=max_model_len,
                uses_graphs=bool(graph_sizes.decodes),
                device=device,
            )
        self.graphs = StepGraphs(
            self.model, self.inputs, self.state, max_decode_len=self.max_decode_len, max_seq_len=max_model_len
        )

    # ---- memory ----------------------------------------------------------------------------------

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: those of the target's layers, and of the draft model's beside them."""
        return self.kv_layout.block_bytes + (self.draft_layout.block_bytes if self.draft_layout else 0)

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocates the pool, block 0 (the null block) included, and hands each layer its pages."""
        self.kv_caches = self.kv_layout.allocate(num_blocks, self.device)
        pages = self.kv_layout.pages(self.kv_caches)
        self.model.bind_kv_caches(pages)
        if self.draft_layout is not None:
            caches = self.draft_layout.allocate(num_blocks, self.device)
            pages = self.draft_layout.pages(caches)
            self.kv_caches += caches
        if self.proposer is not None:
            self.proposer.draft.model.bind_kv_caches(pages)

    @torch.inference_mode()
    def profile_peak_bytes(self) -> int:
        """Device memory in use at the peak of the largest step, in bytes (CUDA only).

        The step has `max_num_batched_tokens` prompt tokens in as many rows as the budget allows,
        over a pool of one block: every block table entry is the null block, which is safe to write. A
        draft model's passes come before such a step, and have let go of their memory by then.
        """
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.allocate_kv(1)
        rows = min(self.max_num_seqs, self.max_num_batched_tokens)
        tokens = self.max_num_batched_tokens
        lengths = [tokens // rows + (row < tokens % rows) for row in range(rows)]
        lengths = [min(length, self.max_model_len) for length in lengths]
        self.inputs.rehearse([], lengths, slot=self.state.padding_slot)
        context = step_context(
            self.inputs,
            self.state,
            StepShape(0, 0, rows, sum(lengths)),
            max_decode_len=self.max_decode_len,
            max_query_len=max(lengths),
            max_seq_len=max(lengths),
        )
        hidden = all_hidden_states(self.model, self.inputs, context)
        logits = self.model.compute_logits(hidden[:TARGETS_AT_ONCE])
        ops.sample_peak_rehearsal(logits)
        del logits
        hidden = sampled(hidden, self.inputs, context)
        if self.max_decode_len > 1:  # every place of a decode row has logits
            hidden = hidden.repeat_interleave(self.max_decode_len, dim=0)[:tokens]
        logits = self.model.compute_logits(hidden)
        ops.sample_peak_rehearsal(logits)
        if self.proposer is not None:
            del hidden, logits
            self.proposer.rehearse()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        self.kv_caches = []
        torch.cuda.empty_cache()
        return peak

    # ---- one step --------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch_forward(self, step: Step) -> None:
        """Enqueues the step on the current stream up to its logits, which then are `step.logits`.

        It reads what the sample of the step before has written on the device, so that one must have
        been launched.
        """
        plan, plan_device = step.plan, step.buffers.upload(step.plan.num_bytes)
        if plan.num_copies:
            words = plan_device.view(torch.int32)[plan.copies_offset // 4 :]
            ops.copy_blocks(self.kv_caches, words[: plan.num_copies * PAIR_WORDS].view(-1, PAIR_WORDS))
        step_ops.prepare(plan, plan_device, self.state, self.inputs, block_size=self.kv_layout.block_size)
        if self.proposer is not None and plan.num_follow_rows:
            step.buffers.following.start()
            self.proposer.follow(plan, plan_device)
            step.buffers.following.stop()
        if self.proposer is not None and plan.num_drafts:
            step.buffers.drafting.start()
            self.proposer.propose(plan, plan_device)
            step.buffers.drafting.stop()
        hidden, everything = self.forward(plan)
        if plan.num_pools and not step.buffers.draws(plan):  # nothing but embeddings: no logits are read
            step.logits = hidden.new_empty((len(hidden), self.vocab_size), dtype=torch.float32)
        else:
            step.logits = self.model.compute_logits(hidden)
        if plan.num_prompt_targets:
            self.describe_prompts(plan, plan_device, everything, step.buffers.result_device)
        if plan.num_pools:
            self.pool(plan, plan_device, everything, step.buffers.result_device)

    @torch.inference_mode()
    def launch_sample(self, step: Step) -> None:
        """Enqueues what follows the logits: the draw, and the copy of the results to the host, for
        which `step.buffers.wait` waits. Where the plan has mask rows, `masks` holds them.
        """
        plan, buffers, logits = step.plan, step.buffers, step.logits
        assert logits is not None, "launch_forward comes before launch_sample"
        step.logits = None  # the stream keeps what the kernels still read
        masks = self.masks.upload(plan.num_mask_rows) if plan.num_mask_rows else None
        step_ops.sample(logits, plan, buffers.plan_device, self.state, self.inputs, buffers.result_device, masks)
        buffers.download(plan.result_words * 4)

    def forward(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Hidden states [n, hidden_size] of all tokens of decode rows and of the last token of each
        prefill row; and those of all tokens [tokens, hidden_size], where the plan needs them.
        """
        if not plan.needs_all_hidden and self.graphs.fits(plan):
            hidden = self.graphs.replay(plan)
            return hidden, hidden
        context = step_context(
            self.inputs,
            self.state,
            StepShape.of(plan),
            max_decode_len=self.max_decode_len,
            max_query_len=plan.max_query_len,
            max_seq_len=plan.max_seq_len,
        )
        everything = all_hidden_states(self.model, self.inputs, context)
        hidden = sampled(everything, self.inputs, context)
        return hidden, everything if plan.needs_all_hidden else hidden

    def describe_prompts(self, plan: Plan, plan_device: Tensor, hidden: Tensor, result: Tensor) -> None:
        """Enqueues the log probabilities of the plan's prompt targets into the result, behind its
        rows. hidden: of all tokens of the step.

        Piece by piece: the logits of a long prompt would be as large as the model.
        """
        words = plan_device.view(torch.int32)[plan.prompt_targets_offset // 4 :]
        targets = words[: plan.num_prompt_targets * PAIR_WORDS].view(-1, PAIR_WORDS)
        records = result[plan.padded_rows * plan.result_width : plan.result_words].view(-1, plan.target_width)
        for start in range(0, plan.num_prompt_targets, TARGETS_AT_ONCE):
            piece = slice(start, start + TARGETS_AT_ONCE)
            logits = self.model.compute_logits(hidden[targets[piece, TARGET_PLACE]])
            if self.see_prompt_logits is not None:
                self.see_prompt_logits(logits)
            ops.prompt_logprobs(logits, targets[piece], self.vocab_size, plan.max_prompt_logprobs, records[piece])

    def pool(self, plan: Plan, plan_device: Tensor, hidden: Tensor, result: Tensor) -> None:
        """Enqueues the sums of hidden states for embeddings, and the vectors that are complete into the
        result. hidden: as `forward` gives them, of all tokens or of those that logits are made of.
        """
        words = plan_device.view(torch.int32)[plan.pools_offset // 4 :]
        pools = words[: plan.num_pools * POOL_WORDS].view(-1, POOL_WORDS)
        size = hidden.shape[1]
        vectors = result[plan.vectors_start : plan.result_words].view(torch.float32).view(-1, size)
        sums = self.state.require_pooled_sums(size)
        last_tokens_from = None if plan.needs_all_hidden else plan.num_decode_tokens - plan.padded_decodes
        ops.pool(hidden, pools, sums, vectors, last_tokens_from=last_tokens_from)

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """Captures one CUDA graph for each of `graph_sizes`' shapes, and the draft model's passes."""
        for shape in self.graph_sizes.shapes():
            self.graphs.capture(shape)
        if self.proposer is not None:
            self.proposer.capture()
