"""The shipped prose, and which files are taken for text."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo.texts import CALIBRATION, EVALUATION, MAX_TEXT_BYTES, read_text


def test_shipped_texts_are_prose_and_share_no_paragraph() -> None:
    parts = [read_text(path, "text") for path in (CALIBRATION, EVALUATION)]
    for text in parts:
        assert len(text) >= 100_000 and text.isascii() and text.endswith("\n")
    calibration, evaluation = (set(text.strip().split("\n\n")) for text in parts)
    assert len(calibration) == 66 and len(evaluation) == 59 and not calibration & evaluation


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; give a file of plain text"),
        (b" \n\t\n", "is empty; give a file of plain text"),
        (b"caf\xe9 au lait", "is not text: byte 3 is not UTF-8"),
        (b"\xc3\xa9\0", "is not text: byte 2 is 0"),
    ],
    ids=["empty", "blank", "latin-1", "nul"],
)
def test_what_is_no_text_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^--text: .*file.*{said}"):
        read_text(path, "--text")


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--text: .*nowhere: no such file$"):
        read_text(tmp_path / "nowhere", "--text")
    with pytest.raises(ValueError, match=r"^--text: .* cannot be read: Is a directory$"):
        read_text(tmp_path, "--text")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    with pytest.raises(ValueError, match=r"^--text: .*huge has 67,108,865 bytes, at most 67,108,864 are read"):
        read_text(tmp_path / "huge", "--text")
    with pytest.raises(ValueError, match="not a regular file"):
        read_text(Path("/dev/zero"), "--text")
