"""Self-attention over paged keys and values: fused qkv, rotary and KV write in one op, decodes and
prefills apart.

The layer knows its pages and its KV group; which rows and pages a step touches is in the step's
context.
"""

from typing import Any

import torch
from torch import Tensor

from octavo import _core
from octavo.kernels import ops
from octavo.layers.context import StepContext, get_context
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import cos_sin_table
from octavo.layers.schemes.choice import Schemes
from octavo.layers.schemes.scheme import Matrix
from octavo.layers.weight import Layer
from octavo.model_config import ModelConfig


def most_rows(num_kv_heads: int, device: torch.device) -> int | None:
    """How many sequences a step's attention can take; None: any number."""
    if device.type != "cuda":
        return None
    from octavo.kernels.arrivals import MAX_ARRIVALS  # loads Triton

    return MAX_ARRIVALS // num_kv_heads - 1  # one row more is padding


class Attention(Layer):
    """Multi-head attention with grouped keys and values, with a window where the config gives this
    layer one.
    """

    # Set by the engine: numbers, or codes and their scales (`kernels/attention/kv_block.py`).
    kv_cache: Tensor  # [num_blocks, 2, num_kv_heads, block_size, head_dim (half of it: 4-bit codes)]
    kv_scales: Tensor | None  # [num_blocks, 2, num_kv_heads, block_size] float32
    cos_sin: Tensor  # [max_position, head_dim] float32

    def __init__(self, name: str, config: ModelConfig, layer: int, *, kv_group: int, schemes: Schemes) -> None:
        heads, kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.kv_group = kv_group
        self.sizes = [heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim]
        self.scale = config.attention_scale
        self.window = config.layer_windows[layer]
        self.eps = config.rms_norm_eps
        projections = dict(zip((f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"), self.sizes, strict=True))
        self.qkv = schemes.linear(Matrix(projections, config.hidden_size, config.qkv_bias))
        out = Matrix({f"{name}.o_proj": config.hidden_size}, heads * self.head_dim, config.output_bias)
        self.out = schemes.linear(out)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            add_one = config.norm_add_one
            self.q_norm = RMSNorm(f"{name}.q_norm", self.head_dim, self.eps, schemes=schemes, add_one=add_one)
            self.k_norm = RMSNorm(f"{name}.k_norm", self.head_dim, self.eps, schemes=schemes, add_one=add_one)
        self.rope = config.local_rope if self.window and config.local_rope else config.rope
        self.on_cpu = schemes.device.type == "cpu"
        self.paged: _core.PagedAttention | None = None  # made when the pages are there
        self.cos_sin = cos_sin_table(self.rope, self.head_dim, config.max_position_embeddings, schemes.device)

    def bind(self, kv_cache: Tensor, kv_scales: Tensor | None) -> None:
        """Takes the pages that it reads and writes from now on."""
        self.kv_cache, self.kv_scales = kv_cache, kv_scales
        self.paged = None  # holds them

    def unbind(self) -> None:
        """Lets its pages go."""
        del self.kv_cache, self.kv_scales
        self.paged = None

    def take_positions(self, count: int) -> None:
        """Takes positions up to `count`, also those that the model was never trained for."""
        if count > self.cos_sin.shape[0]:
            self.cos_sin = cos_sin_table(self.rope, self.head_dim, count, self.cos_sin.device)
            self.paged = None

    def finish(self) -> None:
        self.q_norm_weight = self.q_norm.weight if self.q_norm else None
        self.k_norm_weight = self.k_norm.weight if self.k_norm else None

    def __call__(self, x: Any, positions: Tensor) -> Tensor:
        """x [num_tokens, hidden_size] in the form of `qkv`, positions [num_tokens] int64 -> as x,
        plain.
        """
        step = get_context()
        num_tokens = positions.shape[0]
        if self.on_cpu:
            attended = self._attend_on_cpu(self.qkv(x), positions, step)
            return self.out(self.out.input_form.from_plain(attended))
        # Views into the fused output: a row of q is followed by its k and v.
        q, k, v = (part.view(num_tokens, -1, self.head_dim) for part in torch.split(self.qkv(x), self.sizes, dim=-1))
        ops.rope_and_cache(
            q,
            k,
            v,
            positions,
            self.cos_sin,
            self.kv_cache,
            step.slot_mapping[self.kv_group],
            self.q_norm_weight,
            self.k_norm_weight,
            self.eps,
            kv_scales=self.kv_scales,
        )
        table = step.block_tables[self.kv_group]
        outputs = []
        if step.num_decodes:
            outputs.append(
                ops.decode_attention(
                    q[: step.num_decode_tokens],
                    self.kv_cache,
                    table,
                    step.row_slots[: step.num_decodes],
                    step.seq_lens[: step.num_decodes],
                    step.decode_query_len,
                    self.scale,
                    self.window,
                    kv_scales=self.kv_scales,
                    query_start_loc=step.decode_start_loc,
                )
            )
        if step.num_prefills:
            outputs.append(self._prefill(q, step))
        attended = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self.out(self.out.input_form.from_plain(attended.reshape(num_tokens, -1)))

    def _prefill(self, q: Tensor, step: StepContext) -> Tensor:
        """Answers [tokens, heads, head_dim] of the step's prefill rows; q of all its tokens."""
        return ops.prefill_attention(
            q[step.num_decode_tokens :],
            self.kv_cache,
            step.block_tables[self.kv_group],
            step.row_slots[step.num_decodes :],
            step.prefill_start_loc,
            step.seq_lens[step.num_decodes :],
            step.max_query_len,
            self.scale,
            self.window,
            kv_scales=self.kv_scales,
        )

    def _attend_on_cpu(self, qkv: Any, positions: Tensor, step: StepContext) -> Any:
        """Answers [num_tokens, heads * head_dim] in the form of `qkv`: all of a step in one call of the
        extension.
        """
        if self.paged is None:
            self.paged = _core.PagedAttention(
                self.sizes[0] // self.head_dim,
                self.sizes[1] // self.head_dim,
                self.head_dim,
                block_size=self.kv_cache.shape[3],
                scale=self.scale,
                window=self.window,
                cos_sin=self.cos_sin,
                eps=self.eps,
                kv_cache=self.kv_cache,
                kv_scales=self.kv_scales,
                q_norm=self.q_norm_weight,
                k_norm=self.k_norm_weight,
            )
        rows = step.paged_rows(self.kv_group, positions)
        if isinstance(qkv, _core.Floats):
            return self.paged.run(qkv, rows)
        return self.paged.run(qkv, rows, torch.empty(qkv.shape[0], self.sizes[0]))
