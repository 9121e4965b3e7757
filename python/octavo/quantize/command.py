"""The flags of `octavo quantize`."""

from __future__ import annotations

import argparse
from pathlib import Path

from octavo.config import DEFAULT_MODEL, DEVICES
from octavo.ending import load_torch
from octavo.options import at_least, parse_with
from octavo.quantize.options import GROUPS, METHODS, Options

FORMATS = tuple(dict.fromkeys(name for formats in METHODS.values() for name in formats))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds them to the command's parser."""
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help=f"a folder, a .gguf file (expanded first) or a hub id [default: {DEFAULT_MODEL}]",
    )
    parser.add_argument(
        "--method",
        required=True,
        choices=tuple(METHODS),
        help="rtn: each weight to the nearest number; gptq, awq: by what goes into each matrix; int8, fp8: weights and "
        "activations in 8 bits",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of the new checkpoint")
    parser.add_argument(
        "--format", default="", choices=FORMATS, help=f"how it is stored [default: {FORMATS[0]}, which all can]"
    )
    parser.add_argument("--bits", type=int, help="4, or 8 with rtn and gptq [default: 4; 8 with int8 and fp8]")
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="SIZE",
        help=f"inputs that share a scale; -1: whole rows [default: the largest of {', '.join(map(str, GROUPS))} that "
        "divides all]",
    )
    parser.add_argument(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        help="without zeros; with them numbers are finer, but transformers cannot load them in compressed-tensors "
        "[default: yes; the format awq always has zeros]",
    )
    parser.add_argument("--desc-act", action="store_true", help="gptq: columns with large inputs first (act-order)")
    parser.add_argument(
        "--clip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="awq: cut off large weights where that loses less [default: yes]",
    )
    calibration = parser.add_argument_group("calibration", "Of gptq and awq: what the model reads meanwhile.")
    calibration.add_argument("--calibration", type=Path, metavar="FILE", help="text [default: prose that ships]")
    calibration.add_argument(
        "--num-samples", type=parse_with(at_least(1)), default=128, metavar="N", help="pieces of it [default: 128]"
    )
    calibration.add_argument(
        "--sample-length", type=parse_with(at_least(16)), default=512, metavar="N", help="tokens of each [default: 512]"
    )
    parser.add_argument("--device", default="auto", choices=DEVICES, help="where it is computed [default: auto]")


def run(args: argparse.Namespace) -> int:
    """Runs the command. Returns the exit code."""
    names = Options.__dataclass_fields__
    options = Options(**{name: getattr(args, name) for name in names})
    load_torch()
    from octavo.quantize.run import quantize

    return quantize(options)
