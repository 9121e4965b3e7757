"""The prose that ships with Octavo (its README has source and licence), and how a text of the user's
own is read.
"""

from pathlib import Path

from octavo.model_config import refuse_special_file

CALIBRATION = Path(__file__).parent / "calibration.txt"
"""What checkpoints are calibrated on."""

EVALUATION = Path(__file__).parent / "evaluation.txt"
"""What quality is measured on; no book of it is in `CALIBRATION`."""

MAX_TEXT_BYTES = 64 << 20
"""Of a text file: tokenized whole, and far more than any measurement needs."""


def read_text(path: Path, name: str) -> str:
    """The text of a UTF-8 file. Raises `ValueError`, which begins with `name` (the flag or field),
    where it is missing, empty, too large or not text.
    """
    try:
        refuse_special_file(path)
        num_bytes = path.stat().st_size
        if num_bytes > MAX_TEXT_BYTES:
            raise ValueError(f"{name}: {path} has {num_bytes:,} bytes, at most {MAX_TEXT_BYTES:,} are read; cut it")
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"{name}: {path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: {path} is not text: byte {error.start:,} is not UTF-8; give a file of plain text"
        ) from None
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be read: {error.strerror}") from None
    if "\0" in text:
        raise ValueError(f"{name}: {path} is not text: byte {len(text[: text.index(chr(0))].encode()):,} is 0")
    if not text.strip():
        raise ValueError(f"{name}: {path} is empty; give a file of plain text")
    return text
