"""Perplexity and divergence against the same figures from transformers, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from octavo.cli import main
from octavo.config import EngineConfig
from octavo.evaluate.measure import Comparison, Quality, Reader, measure, windows
from tests.models.test_architectures import make

WINDOW = 48


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two random models over one vocabulary, and one over another; without tokenizers."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.02}
    made = []
    for number, (case, vocab_size) in enumerate((("llama-gqa-tied", 512), ("llama-mha-untied", 512), ("qwen2", 384))):
        folder = tmp_path_factory.mktemp(f"model{number}")
        make(case, folder, vocab_size=vocab_size, **shape)
        made.append(folder)
    return made


def config(folder: Path, **options: object) -> EngineConfig:
    return EngineConfig(model=str(folder), dtype="float32", device="cpu", **options)  # type: ignore[arg-type]


@torch.inference_mode()
def logprobs(folder: Path, ids: list[int]) -> torch.Tensor:
    """# [len(ids) - 1, vocab], by transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(dim=1)


def test_figures_are_those_of_transformers(folders: list[Path]) -> None:
    tokens = torch.randint(0, 512, (100,), generator=torch.Generator().manual_seed(5)).tolist()
    pieces = list(windows([7], tokens, WINDOW))
    assert [len(piece) for piece in pieces] == [48, 48, 7] and all(piece[0] == 7 for piece in pieces)
    model, other = Reader(config(folders[0]), WINDOW), Reader(config(folders[1]), WINDOW)
    try:
        *_, (quality, others) = measure(model, other, iter(pieces))
    finally:
        model.close()
        other.close()
    expected, nll, other_nll, same = [], [], [], 0
    for piece in pieces:
        mine, theirs = logprobs(folders[0], piece), logprobs(folders[1], piece)
        chosen = torch.tensor(piece[1:])[:, None]
        nll += (-mine.gather(1, chosen)[:, 0]).tolist()
        other_nll += (-theirs.gather(1, chosen)[:, 0]).tolist()
        expected += (theirs.exp() * (theirs - mine)).sum(dim=1).tolist()
        same += int((mine.argmax(dim=1) == theirs.argmax(dim=1)).sum())
    assert len(quality.nll) == len(quality.divergence) == 100
    assert quality.perplexity == pytest.approx(float(torch.tensor(nll).mean().exp()), rel=1e-4)
    assert others.perplexity == pytest.approx(float(torch.tensor(other_nll).mean().exp()), rel=1e-4)
    assert quality.divergence == pytest.approx(expected, abs=1e-5)
    assert quality.mean_divergence == pytest.approx(sum(expected) / 100, rel=1e-4)
    assert quality.divergence_99 == pytest.approx(float(torch.tensor(expected).quantile(0.99)), rel=1e-3)
    assert quality.agreement == same / 100


def test_a_model_is_no_distance_from_itself_and_codes_are_some(folders: list[Path]) -> None:
    tokens = torch.randint(0, 512, (60,), generator=torch.Generator().manual_seed(6)).tolist()
    divergences = []
    for kv_cache_dtype in ("auto", "int8", "int4"):
        readers = [Reader(config(folders[0], kv_cache_dtype=kv_cache_dtype), 64), Reader(config(folders[0]), 64)]
        *_, (quality, _) = measure(readers[0], readers[1], windows([], tokens, 64))
        for reader in readers:
            reader.close()
        divergences.append(quality.mean_divergence)
    same, int8, int4 = divergences
    assert same == 0.0 and 0 < int8 < int4 / 5


def test_percentiles_are_of_the_positions() -> None:
    quality = Quality(nll=[1.0, 3.0], divergence=[value / 100 for value in range(101)], same_best=99)
    assert quality.perplexity == pytest.approx(7.389, rel=1e-3) and quality.divergence_99 == pytest.approx(0.99)
    comparison = Comparison(empty := Quality())
    theirs, mine = (torch.tensor(logits).double().softmax(0) for logits in ([0.0, 1.0, 2.0], [0.0, 3.0, 1.0]))
    expected = float((theirs * (theirs / mine).log()).sum())
    comparison.keep(torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, -torch.inf]]))
    comparison.compare(torch.tensor([[0.0, 3.0, 1.0], [5.0, 1.0, -torch.inf]]))
    assert empty.same_best == 1 and empty.divergence == [pytest.approx(expected), 0.0]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["evaluate", *words, "--device", "cpu", "--dtype", "float32"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_what_cannot_be_measured_is_refused(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for words, said in (
        (["--text", str(tmp_path / "missing")], "--text: .*missing: no such file"),
        (["--text", str(tmp_path / "empty")], "--text: .*empty is empty"),
        (["--text", str(tmp_path / "binary")], "--text: .*binary is not text"),
        (["--window", "256"], "window = 256: .* takes at most 255 tokens at a time"),
        (["--window", "64"], "model: .* has no tokenizer; name one with --tokenizer"),
        (["--window", "64", "--against", str(folders[2])], "against: .* has a vocabulary of 384 tokens, .* one of 512"),
    ):
        code, out, err = run(capsys, str(folders[0]), *words)
        assert code == 2 and not out and re.search(said, err), err


def test_the_command_prints_a_table_or_json(
    smollm2_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("In the beginning God created the heaven and the earth. " * 3)
    words = [str(smollm2_path), "--against", str(smollm2_path), "--kv-cache-dtype", "int8", "--window", "32"]
    words += ["--text", str(tmp_path / "text"), "--num-tokens", "32"]
    code, out, _ = run(capsys, *words, "--json")
    row = json.loads(out)
    assert code == 0 and row["positions"] == 32 - 1 and row["kv_cache_dtype"] == "int8"
    assert 0 < row["mean_divergence"] < 0.05 and row["agreement"] > 0.9
    assert row["perplexity"] == pytest.approx(row["perplexity_against"], rel=0.05)
