"""A run that is interrupted goes on; what cannot be done is refused before anything is written."""

from __future__ import annotations

import errno
import re
import resource
from pathlib import Path
from typing import Any

import pytest

from octavo import cli
from octavo.quantize import memory
from octavo.quantize.output import STATE, Output
from tests.quantize.checkpoints import CALIBRATION, TEXT, run, small_model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    small_model("llama-gqa-tied", folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stop_at(number: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file `number` meets an error while it is written."""
    whole = Output.write

    def write(self: Output, which: int, tensors: Any) -> None:
        if which == number:
            raise error
        whole(self, which, tensors)

    monkeypatch.setattr(Output, "write", write)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_an_interrupted_run_goes_on_to_the_same_files(
    method: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = files_of(run(plain, tmp_path / "whole", method=method))
    with monkeypatch.context() as patch:
        stop_at(1, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            run(plain, tmp_path / "made", method=method)
    assert "2 of 3 files are finished and kept" in capsys.readouterr().err
    kept = {name: (tmp_path / "made" / name).stat().st_mtime_ns for name in files_of(tmp_path / "made")}
    assert STATE in kept and "config.json" not in kept and len(kept) == 3
    run(plain, tmp_path / "made", method=method)
    assert "2 of 3 files are there and kept" in capsys.readouterr().out
    assert files_of(tmp_path / "made") == expected
    assert all((tmp_path / "made" / name).stat().st_mtime_ns == at for name, at in kept.items() if name != STATE)


def test_other_options_do_not_go_on_with_it(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(1, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            run(plain, tmp_path / "made", method="gptq")
    for options, named in (
        ({"method": "gptq", "group_size": 32}, "group_size 128 and not 32"),
        ({"method": "awq"}, "method 'gptq' and not 'awq'"),
        ({"method": "gptq", "num_samples": 2}, "num_samples 4 and not 2"),
    ):
        with pytest.raises(ValueError, match="an unfinished run with other options is there") as caught:
            run(plain, tmp_path / "made", **options)
        assert named in str(caught.value)
    text = tmp_path / "other.txt"
    text.write_text("Another text. " * 40)
    with pytest.raises(ValueError, match=r"calibration '\w+' and not"):
        run(plain, tmp_path / "made", method="gptq", calibration=text)


def test_a_full_disk_says_how_to_go_on(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(1, OSError(errno.ENOSPC, "No space left on device"), patch)
        with pytest.raises(ValueError, match=r"no room left on the disk\. 2 of 3 files are finished and kept"):
            run(plain, tmp_path / "made", method="rtn")
    assert run(plain, tmp_path / "made", method="rtn").is_dir()


def test_a_file_that_does_not_fit_leaves_no_part_of_itself(plain: Path, tmp_path: Path) -> None:
    """The system's own limit, met by the library that writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(ValueError, match=r"no room left on the disk\. 0 of 3 files"):
            run(plain, tmp_path / "made", method="rtn")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / "made").iterdir()] == [STATE]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ["--method", "gptq", "--format", "awq"],
            "--format awq: cannot hold what --method gptq makes; compressed-tensors and gptq can",
        ),
        (
            ["--method", "int8", "--format", "gptq"],
            "--format gptq: cannot hold what --method int8 makes; compressed-tensors can",
        ),
        (["--method", "int8", "--bits", "4"], "--bits 4: --method int8 into compressed-tensors makes 8 bits"),
        (["--method", "awq", "--bits", "8"], "--bits 8: --method awq into compressed-tensors makes 4 bits"),
        (["--method", "fp8", "--group-size", "64"], "--group-size: --method fp8 has a scale a row"),
        (["--method", "rtn", "--desc-act"], "--desc-act: --method rtn has no order of columns; gptq has"),
        (["--method", "rtn", "--calibration", "x"], "--calibration: --method rtn looks at no activations"),
        (["--method", "gptq", "--no-clip"], "--no-clip: --method gptq clips nothing; awq does"),
        (["--method", "awq", "--format", "awq", "--symmetric"], "--symmetric: the format awq always has zeros"),
        (
            ["--method", "rtn", "--group-size", "96"],
            "does not divide the 128 inputs of model.layers.0.self_attn.q_proj; use 128, 64, 32 or -1 (a scale a row)",
        ),
        (["--method", "rtn", "--group-size", "0"], "--group-size 0: must be -1"),
        (["--method", "gptq", "--calibration", "missing.txt"], "--calibration: missing.txt: no such file"),
    ],
)
def test_what_cannot_be(
    words: list[str], named: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = cli.main(["quantize", str(plain), "--output", str(tmp_path / "made"), "--device", "cpu", *words])
    error = capsys.readouterr().err
    assert code == 2 and named in error and error.count("\n") == 1
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"text \xff\xfe", "is not text: byte 5 is not UTF-8"),
        (b"PK\x03\x04\x00\x00", "is not text: byte 4 is 0"),
        (b"Too short a text.", "holds 17 tokens, at least 128"),
    ],
    ids=["nothing", "spaces", "latin", "zeros", "short"],
)
def test_calibrations_that_are_none(content: bytes, named: str, plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(named)):
        run(plain, tmp_path / "made", method="gptq", calibration=path)
    assert not (tmp_path / "made").exists()


def test_sources_and_outputs_that_cannot_be(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(plain, tmp_path / "made", method="int8")
    with pytest.raises(
        ValueError, match="quantised already, by compressed-tensors; give the model that it was made of"
    ):
        run(folder, tmp_path / "again", method="rtn")
    with pytest.raises(ValueError, match="exists and holds files; give a folder that is new or empty"):
        run(plain, folder, method="int8")
    with pytest.raises(ValueError, match="is a file"):
        run(plain, plain / "config.json", method="int8")
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 20)
    with pytest.raises(
        ValueError, match=r"memory: about \d+ MiB are needed, and 1 MiB are free on the cpu; lower --num-s"
    ):
        run(plain, tmp_path / "large", method="gptq")
    monkeypatch.undo()
    monkeypatch.setattr(memory, "free_bytes", lambda folder: 1 << 10)
    with pytest.raises(ValueError, match=r"--output .*: about \d+ MiB are needed, and 0 MiB are free on that disk"):
        run(plain, tmp_path / "large", method="rtn")
    assert not (tmp_path / "large").exists()


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    small_model("llama-gqa-tied", tmp_path / "plain")
    (tmp_path / "plain" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json: --method awq needs it for its calibration"):
        run(tmp_path / "plain", tmp_path / "made", method="awq")
    run(tmp_path / "plain", tmp_path / "made", method="fp8")


def test_a_head_size_that_no_group_divides(tmp_path: Path) -> None:
    small_model("llama-gqa-tied", tmp_path / "plain", intermediate_size=72)
    with pytest.raises(ValueError, match="none of 128, 64, 32 divides the inputs of all matrices; use -1"):
        run(tmp_path / "plain", tmp_path / "made", method="rtn")
    run(tmp_path / "plain", tmp_path / "made", method="rtn", group_size=-1)


def test_what_is_said_before_and_after(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    words = ["quantize", str(plain), "--method", "gptq", "--output", str(tmp_path / "made"), "--device", "cpu"]
    sizes = ["--calibration", str(text), "--num-samples", "4", "--sample-length", "64"]
    assert cli.main([*words, *sizes]) == 0
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0]
        == f"{plain}: 2 layers to 4 bits by gptq, groups of 128, as compressed-tensors; 256 tokens of calibration"
    )
    assert re.fullmatch(r"It takes about \d+ MiB of memory at its peak, and \d+ MiB on disk", said[1])
    assert said[2].endswith(f"octavo serve {tmp_path / 'made'}")
    assert CALIBRATION == {"num_samples": 4, "sample_length": 64}
