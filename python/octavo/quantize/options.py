"""What `octavo quantize` was asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPRESSED = "compressed-tensors"
METHODS: dict[str, tuple[str, ...]] = {
    "rtn": (COMPRESSED, "gptq", "awq"),
    "gptq": (COMPRESSED, "gptq"),
    "awq": (COMPRESSED, "awq"),
    "int8": (COMPRESSED,),
    "fp8": (COMPRESSED,),
}
"""Method -> the formats that can hold what it makes, the default first."""

CALIBRATED = ("gptq", "awq")
"""Methods that look at what goes into each matrix."""

WHOLE_ROWS = ("int8", "fp8")
"""Methods with a scale a row, 8 bits, and activations that are rounded as the model runs."""

GROUPS = (128, 64, 32)
"""Group sizes of which the largest is taken that divides all inputs, where none is asked for."""


@dataclass(frozen=True)
class Options:
    """`ValueError` of the constructor names the flag, its value and what would do."""

    model: str
    method: str
    output: Path
    format: str = ""  # "": the method's first
    bits: int | None = None
    group_size: int | None = None  # -1: whole rows; None: the largest of GROUPS that divides
    symmetric: bool | None = None  # None: unless the format always has zeros
    desc_act: bool = False
    clip: bool = True
    calibration: Path | None = None  # None: the prose that ships
    num_samples: int = 128
    sample_length: int = 512  # tokens
    device: str = "auto"

    def __post_init__(self) -> None:
        formats = METHODS[self.method]
        if self.format and self.format not in formats:
            raise ValueError(
                f"--format {self.format}: cannot hold what --method {self.method} makes; {' and '.join(formats)} can"
            )
        object.__setattr__(self, "format", self.format or formats[0])
        bits = {8} if self.whole_rows else {4} if "awq" in (self.method, self.format) else {4, 8}
        if self.bits is not None and self.bits not in bits:
            shown = " or ".join(map(str, sorted(bits)))
            raise ValueError(f"--bits {self.bits}: --method {self.method} into {self.format} makes {shown} bits")
        object.__setattr__(self, "bits", self.bits or min(bits))
        if self.whole_rows:
            self._refuse("--group-size", self.group_size is not None, "has a scale a row")
            self._refuse("--symmetric", self.symmetric is not None, "is always symmetric")
        if self.format == "awq" and self.symmetric:
            raise ValueError("--symmetric: the format awq always has zeros; use --format compressed-tensors")
        if self.symmetric is None:
            object.__setattr__(self, "symmetric", self.format != "awq")
        self._refuse("--desc-act", self.desc_act and self.method != "gptq", "has no order of columns; gptq has")
        self._refuse("--no-clip", not self.clip and self.method != "awq", "clips nothing; awq does")
        self._refuse(
            "--calibration", self.calibration is not None and not self.is_calibrated, "looks at no activations"
        )
        if self.group_size is not None and self.group_size != -1 and not 8 <= self.group_size <= 1 << 16:
            raise ValueError(f"--group-size {self.group_size}: must be -1 (a scale a row) or from 8 to {1 << 16}")

    def _refuse(self, flag: str, given: bool, why: str) -> None:
        if given:
            raise ValueError(f"{flag}: --method {self.method} {why}")

    @property
    def whole_rows(self) -> bool:
        """Whether a row has one scale, and activations are rounded too."""
        return self.method in WHOLE_ROWS

    @property
    def is_calibrated(self) -> bool:
        """Whether a text goes through the model."""
        return self.method in CALIBRATED

    def of_result(self) -> dict[str, Any]:
        """All that decides the numbers, for a run that goes on with another's work."""
        names = ("method", "format", "bits", "group_size", "symmetric", "desc_act", "clip")
        calibrated = ("num_samples", "sample_length") if self.is_calibrated else ()
        return {name: getattr(self, name) for name in (*names, *calibrated)}
