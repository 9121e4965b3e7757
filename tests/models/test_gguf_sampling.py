"""What `general.sampling.*` of a GGUF header says: each of gguf's own keys is honoured, means
nothing, or is named.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gguf
import pytest

from octavo.model_config import ModelError
from octavo.weights.gguf_sampling import PREFIX, read_gguf_sampling
from octavo.weights.text import open_gguf

KEYS = {value for name, value in vars(gguf.Keys.General).items() if name.startswith("SAMPLING_")}


def read(folder: Path, values: dict[str, Any], wanted: str = "auto") -> dict[str, Any]:
    """The defaults out of a file that gguf has written."""
    writer = gguf.GGUFWriter(folder / "sampling.gguf", "llama")
    for key, value in values.items():
        assert PREFIX + key in KEYS
        if isinstance(value, str):
            writer.add_string(PREFIX + key, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_int32)(PREFIX + key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = open_gguf(folder / "sampling.gguf")
    return read_gguf_sampling(header.metadata(), header.path, wanted)


@pytest.mark.parametrize(
    ("values", "defaults"),
    [
        ({}, {}),
        ({"temp": 0.7, "top_p": 0.95, "top_k": 20}, {"temperature": 0.7, "top_p": 0.95, "top_k": 20}),
        ({"temp": -1.0, "top_k": -1}, {"temperature": 0.0, "top_k": 0}),
        ({"min_p": 0.01, "penalty_repeat": 1.05}, {"min_p": 0.01, "repetition_penalty": 1.05}),
        ({"penalty_repeat": 1.05, "penalty_last_n": 0}, {}),
        ({"penalty_repeat": 1.05, "penalty_last_n": -1}, {"repetition_penalty": 1.05}),
        ({"penalty_last_n": 64, "xtc_threshold": 0.1, "mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1}, {}),
    ],
)
def test_defaults(values: Any, defaults: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, values) == defaults
        assert read(tmp_path, values, "vllm") == {}
    assert not caplog.records


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sequence": "k;p;t"}, ["sequence"]),
        ({"xtc_probability": 0.5, "xtc_threshold": 0.1}, ["xtc_probability", "xtc_threshold"]),
        ({"mirostat": 2, "mirostat_tau": 5.0, "mirostat_eta": 0.1}, ["mirostat", "mirostat_tau", "mirostat_eta"]),
        ({"penalty_repeat": 1.05, "penalty_last_n": 64}, ["penalty_last_n"]),
    ],
    ids=str,
)
def test_what_is_not_honoured_is_named(
    values: Any, named: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        read(tmp_path, values)
    assert len(caplog.records) == len(named)
    assert all(f"{PREFIX}{key} = " in caplog.text for key in named)


def test_every_key_of_gguf_has_an_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Odd values of all of them: a new one of gguf would be named, and these are the ones that are."""
    odd = {key.removeprefix(PREFIX): "k" if key.endswith("sequence") else 0.5 for key in KEYS}
    with caplog.at_level(logging.WARNING):
        honoured = read(tmp_path, odd | {"top_k": 3})
    assert len(honoured) + len(caplog.records) == len(KEYS) == 12


@pytest.mark.parametrize("values", [{"temp": float("nan")}, {"top_p": 1.5}, {"temp": "hot"}], ids=str)
def test_what_cannot_be_a_default_is_refused(values: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"sampling\.gguf: {PREFIX}{next(iter(values))}"):
        read(tmp_path, values)
