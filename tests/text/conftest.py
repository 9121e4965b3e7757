"""The shared corpus, and the tokenizers under test with the pipelines they must equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from octavo import _core
from tests.text import vocabularies as v

BYTE_LEVEL = ["gpt-2", "smollm", "llama-bpe", "qwen2"]

Pair = tuple[_core.Tokenizer, Tokenizer]


@pytest.fixture(scope="session")
def corpus(shared_data: Path) -> tuple[str, ...]:
    lines = (shared_data / "udhr.tsv").read_text().split("\n")
    lines = [line.split("\t", 1)[1] for line in lines if line]
    assert len(lines) == 6059
    return tuple(lines)


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Pair:
    ours = _core.Tokenizer.from_gguf(_core.GgufFile(str(smollm2_path)))
    return ours, v.byte_level_pipeline("smollm", *v.smollm2_vocabulary(smollm2_path))


@pytest.fixture(scope="session")
def make_pair(corpus: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """(ours from a GGUF file, the oracle) for a pre-tokenizer or for "llama"; vocabularies trained
    on the corpus.
    """
    made: dict[str, Pair] = {}

    def make(kind: str) -> Pair:
        if kind in made:
            return made[kind]
        path = tmp_path_factory.mktemp("gguf") / f"{kind}.gguf"
        if kind == "llama":
            tokens, scores, types = v.sentence_piece_vocabulary(v.trained_sentence_piece(corpus))
            ids = {"bos_token_id": tokens.index("<s>"), "eos_token_id": tokens.index("</s>"), "unknown_token_id": 0}
            v.write_gguf(path, "llama", tokens, types, scores=scores, **ids)
            oracle = v.llama_pipeline(tokens, scores, types)
        else:
            tokens, merges, types = v.trained_byte_level(corpus, kind)
            joined = [" ".join(merge) for merge in merges]
            v.write_gguf(path, "gpt2", tokens, types, merges=joined, pre=kind, add_bos_token=False)
            oracle = v.byte_level_pipeline(kind, tokens, merges, types)
        made[kind] = _core.Tokenizer.from_gguf(_core.GgufFile(str(path))), oracle
        return made[kind]

    return make
