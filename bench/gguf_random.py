"""A GGUF file in Q4_0 of a model's shape, with random blocks: for speed and memory, not for answers.

    python bench/gguf_random.py 7B TO.gguf

Shapes: 7B (Llama 2's, 3.9 GB) and 1.5B (Qwen 2.5's, as a llama). Head and tokenizer are those of the
default model, whose 49,152 tokens stand for the shape's own; the head is Q8_0.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import gguf
import numpy

from octavo.weights.default_model import default_model_path


class Shape(NamedTuple):
    """A llama's."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int


SHAPES = {"7B": Shape(32, 4096, 32, 32, 11008), "1.5B": Shape(28, 1536, 12, 2, 8960)}
OWN = ("GGUF.", "llama.", "general.")  # what is not the tokenizer's
Q4_0, Q8_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0


def write_random(name: str, target: str) -> None:
    """Writes one tensor after another, so that no more than one is in memory."""
    shape, rng = SHAPES[name], numpy.random.default_rng(0)
    writer = gguf.GGUFWriter(target, "llama", use_temp_file=True)
    for field in gguf.GGUFReader(default_model_path()).fields.values():
        if not field.name.startswith(OWN):
            item = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], item)
            if field.name == "tokenizer.ggml.tokens":
                vocabulary = len(field.data)
    writer.add_block_count(shape.layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(vocabulary)

    def matrix(tensor: str, rows: int, columns: int, kind: gguf.GGMLQuantizationType = Q4_0) -> None:
        """Blocks of 32 numbers: a float16 scale, and their bytes."""
        size = gguf.GGML_QUANT_SIZES[kind][1]
        blocks = rng.integers(0, 256, (rows, columns // 32, size), dtype=numpy.uint8)
        blocks[:, :, :2] = numpy.frombuffer(numpy.float16(0.1 / columns).tobytes(), numpy.uint8)
        writer.add_tensor(tensor, blocks.reshape(rows, -1), raw_dtype=kind)

    def norm(tensor: str) -> None:
        writer.add_tensor(tensor, numpy.ones(shape.hidden, numpy.float32))

    kv_size = shape.kv_heads * shape.hidden // shape.heads
    matrix("token_embd.weight", vocabulary, shape.hidden)
    for layer in range(shape.layers):
        norm(f"blk.{layer}.attn_norm.weight")
        norm(f"blk.{layer}.ffn_norm.weight")
        for part, rows, columns in (
            ("attn_q", shape.hidden, shape.hidden),
            ("attn_k", kv_size, shape.hidden),
            ("attn_v", kv_size, shape.hidden),
            ("attn_output", shape.hidden, shape.hidden),
            ("ffn_gate", shape.inner, shape.hidden),
            ("ffn_up", shape.inner, shape.hidden),
            ("ffn_down", shape.hidden, shape.inner),
        ):
            matrix(f"blk.{layer}.{part}.weight", rows, columns)
    norm("output_norm.weight")
    matrix("output.weight", vocabulary, shape.hidden, Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


if __name__ == "__main__":
    write_random(*sys.argv[1:3])
