"""Vocabularies for tests, and the pipelines of the `tokenizers` package that are their oracles.

Nothing here comes from our own code: GGUF files are read and written by the `gguf` package,
vocabularies are trained by `tokenizers` and `sentencepiece`, and each pipeline is put together from
what the model family published.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _UNUSED, BYTE = range(1, 7)

BEFORE_DIGITS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = BEFORE_DIGITS + r"\p{N}{1,3}" + AFTER_DIGITS
QWEN2 = BEFORE_DIGITS + r"\p{N}" + AFTER_DIGITS


def byte_level_pre_tokenizer(pre: str) -> Any:
    """As in the published tokenizer.json of GPT-2, SmolLM2, Llama 3 and Qwen2."""
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    regex = {"llama-bpe": LLAMA3, "qwen2": QWEN2}[pre]
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level_pipeline(
    pre: str, tokens: Sequence[str], merges: Sequence[tuple[str, str]], types: Sequence[int]
) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, list(merges), ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = byte_level_pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    add_tokens(tokenizer, tokens, types)
    return tokenizer


def add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
    ordinary = [t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ordinary])


def gguf_strings(reader: gguf.GGUFReader, key: str) -> list[str]:
    field = reader.fields[key]
    return [bytes(field.parts[index]).decode() for index in field.data]


@functools.cache
def smollm2_vocabulary(path: Path) -> tuple[list[str], list[tuple[str, str]], list[int]]:
    """Tokens, merges and token types as the `gguf` package reads them."""
    reader = gguf.GGUFReader(path)
    tokens = gguf_strings(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in gguf_strings(reader, "tokenizer.ggml.merges")]
    field = reader.fields["tokenizer.ggml.token_type"]
    types = [int(field.parts[index][0]) for index in field.data]
    return tokens, merges, types  # type: ignore[return-value]


@functools.cache
def trained_byte_level(lines: tuple[str, ...], pre: str) -> tuple[list[str], list[tuple[str, str]], list[int]]:
    """A byte-level BPE vocabulary of 3,000 tokens trained on `lines`, then control and user-defined
    tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level_pre_tokenizer(pre)
    trainer = trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [tuple(merge) for merge in model["merges"]]
    types = [NORMAL] * len(tokens)
    # A word that merges never make, for `ignore_merges`: it must win as a whole, and only with
    # Llama 3.
    extra = [
        ("Humanerklärung".replace("ä", "Ã¤"), NORMAL),
        ("<|begin|>", CONTROL),
        ("<|end|>", CONTROL),
        ("<tool>", USER_DEFINED),
    ]
    return tokens + [t for t, _ in extra], merges, types + [kind for _, kind in extra]


@functools.cache
def trained_sentence_piece(lines: tuple[str, ...]) -> bytes:
    """A SentencePiece BPE model with byte fallback, as Llama 2's was made."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=3000,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        max_sentence_length=100_000,
        minloglevel=2,
    )
    return model.getvalue()


def sentence_piece_vocabulary(model: bytes) -> tuple[list[str], list[float], list[int]]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(processor.vocab_size())

    def kind(index: int) -> int:
        if processor.is_unknown(index):
            return UNKNOWN
        if processor.is_control(index):
            return CONTROL
        return BYTE if processor.is_byte(index) else NORMAL

    return (
        [processor.id_to_piece(index) for index in ids],
        [processor.get_score(index) for index in ids],
        [kind(index) for index in ids],
    )


def llama_pipeline(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> Tokenizer:
    """As `transformers` converts a SentencePiece model for LlamaTokenizerFast (legacy: a space
    after specials).
    """
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind != NORMAL:
            continue
        pairs = [(token[:i], token[i:], score) for i in range(1, len(token))]
        local = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(local, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    merges.sort(key=lambda merge: (merge[2], len(merge[0]), len(merge[1])), reverse=True)
    model = models.BPE(vocab, [merge[:2] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    add_tokens(tokenizer, tokens, types)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


def write_gguf(path: Path, model: str, tokens: Sequence[str], types: Sequence[int], **extra: Any) -> Path:
    """A GGUF file with a vocabulary and one small tensor. extra: keys below `tokenizer.ggml`."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(list(tokens))
    writer.add_token_types(list(types))
    for key, value in extra.items():
        name = f"tokenizer.ggml.{key}"
        match value:
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case str():
                writer.add_string(name, value)
            case _:
                writer.add_array(name, list(value))
    writer.add_tensor("a", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
