"""The GGUF reader against the `gguf` package, and against files that are cut or lie."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from octavo import _core
from tests.text import vocabularies as v


def test_smollm2_equals_the_gguf_package(smollm2_path: Path) -> None:
    ours, reader = _core.GgufFile(str(smollm2_path)), gguf.GGUFReader(smollm2_path)
    assert ours.path == str(smollm2_path)
    assert ours.architecture == "llama"
    tensors = [
        (t.name, t.tensor_type.name, [int(d) for d in reversed(t.shape)], int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    ]
    assert ours.tensors() == tensors
    assert len(tensors) == 272
    expected = {
        key: field.contents()
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.") and len(field.data) <= 1024
    }
    assert len(expected) > 25
    assert ours.metadata() == expected
    ours.check_types()


def test_every_kind_of_value(tmp_path: Path) -> None:
    path = tmp_path / "kinds.gguf"
    writer = gguf.GGUFWriter(path, "kinds")
    expected: dict[str, Any] = {"general.architecture": "kinds"}
    for name, add, value in [
        ("u8", writer.add_uint8, 255),
        ("i8", writer.add_int8, -128),
        ("u16", writer.add_uint16, 65535),
        ("i16", writer.add_int16, -32768),
        ("u32", writer.add_uint32, 2**32 - 1),
        ("i32", writer.add_int32, -(2**31)),
        ("u64", writer.add_uint64, 2**64 - 1),
        ("i64", writer.add_int64, -(2**63)),
        ("f32", writer.add_float32, 1.5),
        ("f64", writer.add_float64, 1e300),
        ("bool", writer.add_bool, True),
        ("text", writer.add_string, "é\x00\n"),
        ("ints", writer.add_array, [1, -2, 3]),
        ("floats", writer.add_array, [0.5, -1.25]),
        ("bools", writer.add_array, [True, False]),
        ("texts", writer.add_array, ["a", "é", ""]),
        ("limit", writer.add_array, list(range(1024))),
    ]:
        add(name, value)  # type: ignore[operator]
        expected[name] = value
    writer.add_array("too_long", list(range(1025)))
    shapes = [("a", (3,)), ("b", (2, 3)), ("c", (2, 3, 4)), ("d", (2, 3, 4, 5))]
    for name, shape in shapes:
        writer.add_tensor(name, np.zeros(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = _core.GgufFile(str(path))
    assert ours.metadata() == expected
    assert [(name, tuple(shape)) for name, _, shape, _, _ in ours.tensors()] == shapes


def test_types_that_cannot_be_loaded_are_listed_and_named(tmp_path: Path) -> None:
    path = tmp_path / "k.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType.IQ4_XS
    writer.add_tensor("good", np.zeros((1, 32), np.float32))
    writer.add_tensor("bad", np.zeros((2, 136), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours = _core.GgufFile(str(path))
    assert ours.tensors()[1][:3] == ("bad", "IQ4_XS", [2, 256])
    message = r"k\.gguf: tensor \"bad\".* IQ4_XS, .*F32, F16, BF16, Q4_0, .*Q8_0, IQ4_NL, .*Q6_K"
    with pytest.raises(_core.GgufError, match=message):
        ours.check_types()


def header(**changes: Any) -> bytes:
    """A file with one key and one F32 tensor [8]; `changes` are the lies."""
    c = {
        "magic": b"GGUF", "version": 3, "tensors": 1, "pairs": 1, "key": b"general.alignment", "key_len": None,
        "kind": 4, "value": struct.pack("<I", 32), "name": b"w", "name_len": None, "dims": [8], "num_dims": None,
        "type": 0, "offset": 0, "data": 32, "more": b"",
    } | changes  # fmt: skip

    def text(data: bytes, length: int | None) -> bytes:
        return struct.pack("<Q", len(data) if length is None else length) + data

    out = c["magic"] + struct.pack("<IQQ", c["version"], c["tensors"], c["pairs"])
    out += text(c["key"], c["key_len"]) + struct.pack("<I", c["kind"]) + c["value"]
    out += text(c["name"], c["name_len"])
    out += struct.pack("<I", len(c["dims"]) if c["num_dims"] is None else c["num_dims"])
    out += struct.pack(f"<{len(c['dims'])}Q", *c["dims"]) + struct.pack("<IQ", c["type"], c["offset"]) + c["more"]
    out += b"\0" * (-len(out) % 32)
    return out + b"\0" * c["data"]


TENSOR = struct.pack("<Q", 1) + b"%s" + struct.pack("<IQIQ", 1, 8, 0, 32)
KEY = struct.pack("<Q", 17) + b"general.alignment" + struct.pack("<II", 4, 32)

LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "magic"),
    "three bytes": (b"GGU", "magic"),
    "wrong magic": (header(magic=b"GGML"), "magic is \"GGML\""),
    "version 0": (header(version=0), "version is 0, but must be 2 or 3"),
    "version 1": (header(version=1), "version is 1"),
    "version 99": (header(version=99), "version is 99"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "tensor count": (header(tensors=2**60), "tensor_count is 1152921504606846976"),
    "pair count": (header(pairs=2**60), "metadata_kv_count is 1152921504606846976"),
    "key length": (header(key_len=2**63), "key 0 is 9223372036854775808"),
    "key length of all ones": (header(key_len=2**64 - 1), "key 0 is 18446744073709551615"),
    "key not UTF-8": (header(key=b"\xff" * 17), "key 0: is not UTF-8"),
    "value type": (header(kind=13), "value type is 13"),
    "array length": (header(kind=9, value=struct.pack("<IQ", 4, 2**62)), "general.alignment is 4611686018427387904"),
    "array of arrays": (header(kind=9, value=struct.pack("<IQ", 9, 1)), "array of arrays"),
    "array of unknowns": (header(kind=9, value=struct.pack("<IQ", 77, 1)), "value type is 77"),
    "text length": (header(kind=8, value=struct.pack("<Q", 2**40)), "general.alignment is 1099511627776"),
    "boolean 2": (header(kind=7, value=b"\x02"), "boolean is 2"),
    "alignment 0": (header(value=struct.pack("<I", 0)), "general.alignment is 0"),
    "alignment 3": (header(value=struct.pack("<I", 3)), "general.alignment is 3"),
    "alignment 2**31": (header(value=struct.pack("<I", 2**31)), "general.alignment is 2147483648"),
    "alignment as text": (header(kind=8, value=struct.pack("<Q", 2) + b"32"), "must be an unsigned integer"),
    "duplicate key": (header(pairs=2, value=struct.pack("<I", 32) + KEY), "occurs twice"),
    "duplicate tensor": (header(tensors=2, more=TENSOR % b"w", data=64), "tensor \"w\" occurs twice"),
    "no dimension": (header(num_dims=0, dims=[]), "n_dims is 0"),
    "five dimensions": (header(dims=[1, 1, 1, 1, 8]), "n_dims is 5"),
    "dimension 0": (header(dims=[8, 0]), "at least 1"),
    "dimensions overflow": (header(dims=[2**32, 2**32]), "overflow 64 bits"),
    "bytes overflow": (header(dims=[2**62, 2]), "overflow 64 bits"),
    "truncated to 32 bits": (header(dims=[2**32 + 8]), "end after the file"),
    "not whole blocks": (header(type=2), "Q4_0 needs a multiple of 32"),
    "unknown tensor type": (header(type=4), "type 4 is unknown"),
    "tensor name length": (header(name_len=2**50), "name of tensor 0"),
    "offset beyond the file": (header(offset=32), "end after the file"),
    "offset near 2**64": (header(offset=2**64 - 32), "end after the file"),
    "offset not aligned": (header(offset=4), "multiple of 32"),
    "data cut": (header(data=31), "end after the file"),
    "overlap": (header(tensors=2, dims=[16], more=TENSOR % b"x", data=64), "inside \"x\""),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_lies_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "lie.gguf"
    path.write_bytes(LIES[name][0])
    with pytest.raises(_core.GgufError) as error:
        _core.GgufFile(str(path))
    assert "lie.gguf: " in str(error.value)
    assert LIES[name][1] in str(error.value)


def test_the_file_the_lies_are_made_from_is_good(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(header())
    assert [tensor[:3] for tensor in _core.GgufFile(str(path)).tensors()] == [("w", "F32", [8])]


def test_smollm2_cut_anywhere_is_an_error(smollm2_path: Path, tmp_path: Path) -> None:
    with smollm2_path.open("rb") as file:
        data = file.read(2 << 20)  # the whole header and some data
    path = tmp_path / "cut.gguf"
    for end in [*range(0, 2 << 20, 64 << 10), 1_785_663]:
        path.write_bytes(data[:end])
        with pytest.raises(_core.GgufError, match=r"cut\.gguf"):
            _core.GgufFile(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(_core.GgufError, match=r"absent\.gguf: No such file"):
        _core.GgufFile(str(tmp_path / "absent.gguf"))


BASE: dict[str, Any] = {
    "model": "gpt2", "tokens": ["a", "b", "ab", "<s>"], "types": [1, 1, 1, 3], "pre": "gpt-2", "merges": ["a b"],
    "bos_token_id": 3,
}  # fmt: skip
LLAMA = {**BASE, "model": "llama", "scores": [0.0, 0.0, -1.0, 0.0]}


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({**BASE, "model": "bert"}, 'tokenizer.ggml.model is Some\\("bert"\\)'),
        ({**BASE, "pre": "mystery"}, "tokenizer.ggml.pre is .*mystery.*smollm.*qwen2"),
        ({**BASE, "types": [1, 1]}, "token_type has 2 values, but tokenizer.ggml.tokens has 4"),
        ({**BASE, "merges": ["a c"]}, "tokenizer.ggml.merges: .*`c`"),
        ({**BASE, "merges": ["ab"]}, "must hold pairs"),
        ({**BASE, "bos_token_id": 4}, "bos_token_id is 4, but the vocabulary has 4 tokens"),
        ({**BASE, "tokens": ["a", "b", "ab", "a"]}, 'tokens 0 and 3 are both "a"'),
        ({**BASE, "tokens": ["a", "b", "ab", "x" * 2**21]}, "tokens: the added tokens have 2097152 bytes"),
        ({**LLAMA, "scores": [0.0]}, "scores has 1 values"),
        ({**LLAMA, "scores": [0.0, 0.0, float("nan"), 0.0]}, "score of token 2 is NaN"),
        ({**LLAMA, "tokens": ["a", "b", "a" * 129, "<s>"]}, "token 2 has 129 characters"),
        ({**LLAMA, "unknown_token_id": 9}, "unknown_token_id is 9"),
        ({**LLAMA, "add_bos_token": "yes"}, "add_bos_token must be a boolean"),
    ],
)
def test_bad_vocabularies_are_named(vocabulary: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = v.write_gguf(tmp_path / "bad.gguf", **vocabulary)
    with pytest.raises(_core.GgufError, match=r"bad\.gguf: .*" + message):
        _core.Tokenizer.from_gguf(_core.GgufFile(str(path)))


def test_bos_is_added_as_the_file_says(tmp_path: Path) -> None:
    def encode(**changes: Any) -> list[int]:
        path = v.write_gguf(tmp_path / "bos.gguf", **{**BASE, **changes})
        return _core.Tokenizer.from_gguf(_core.GgufFile(str(path))).encode_text("ab").token_ids

    assert encode() == [2]
    assert encode(add_bos_token=True) == [3, 2]
    assert encode(pre="llama-bpe") == [3, 2]
    assert encode(pre="llama-bpe", add_bos_token=False) == [2]
    assert encode(eos_token_id=3, add_eos_token=True) == [2, 3]


def test_space_prefix_as_the_file_says(tmp_path: Path) -> None:
    tokens = ["<unk>", "▁", "a", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 1, 1, 1] + [6] * 256
    scores = [0.0, -1.0, -2.0, -3.0] + [0.0] * 256

    def make(**changes: Any) -> _core.Tokenizer:
        path = v.write_gguf(
            tmp_path / "space.gguf", "llama", tokens, types, scores=scores, unknown_token_id=0, **changes
        )
        return _core.Tokenizer.from_gguf(_core.GgufFile(str(path)))

    with_prefix, without = make(), make(add_space_prefix=False)
    assert with_prefix.encode_text("a é").token_ids == [3, 1, 4 + 0xC3, 4 + 0xA9]
    assert without.encode_text("a é").token_ids == [2, 1, 4 + 0xC3, 4 + 0xA9]
    assert with_prefix.decode([3, 3]) == "a a"
    assert without.decode([3, 3]) == " a a"
