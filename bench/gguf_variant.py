"""A GGUF file again with its matrices in another format, for comparisons on one model.

    python bench/gguf_variant.py FROM.gguf Q4_0 TO.gguf

Formats: those that the gguf package writes (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, F16). The numbers are those of
FROM, rounded a second time: good for speed, not for answers. All matrices get the format, tables too.
"""

import sys

import gguf
import numpy


def write_variant(source: str, name: str, target: str) -> None:
    """Copies all metadata; vectors stay as they are."""
    reader = gguf.GGUFReader(source)
    kind = gguf.GGMLQuantizationType[name]
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        item = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], item)
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(numpy.float32)
        writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write_variant(*sys.argv[1:4])
