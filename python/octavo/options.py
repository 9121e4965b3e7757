"""Options: dataclass fields that carry their own documentation, and command-line flags derived from
them.

A configuration is written down once, as a frozen dataclass whose fields are made by
`option(default, help)`. `add_flags` turns each field into `--field-name` and `from_flags` turns the
parsed flags back into the dataclass, so flags and fields cannot drift apart. Knows nothing about
what an option means; the dataclass itself checks values.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def option(
    default: Any,
    help: str,
    *,
    parse: Callable[[str], Any] = str,
    choices: Sequence[str] | None = None,
    short: str | None = None,
    aliases: Sequence[str] = (),
) -> Any:
    """A dataclass field with its flag's documentation.

    parse: turns one command-line word into the value; its `ValueError` text reaches the user. A
    bool field becomes `--name / --no-name`; a tuple field takes one or more words and may be
    repeated.
    """
    flags = [short] if short else []
    metadata = {"help": help, "parse": parse, "choices": choices, "flags": flags, "aliases": tuple(aliases)}
    return dataclasses.field(default=default, metadata=metadata)


def parse_count(text: str) -> int:
    """An integer as vLLM reads it: `25k` is 25,000 (lower case decimal), `25K` is 25,600 (upper
    case binary).
    """
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgtKMGT]?)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a number such as 4096, 25k or 4K")
    number, suffix = match.groups()
    factor = _BINARY.get(suffix) or _DECIMAL[suffix]
    if "." not in number:
        return int(number) * factor
    value = float(number) * factor
    if suffix == "" or value != int(value):
        raise ValueError(f"{text!r} is not a whole number")
    return int(value)


def parse_bytes(text: str) -> int:
    """Bytes: `2GiB`, `512MB`, `1.5G` (binary without the B, as in `ls -h`), or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b)?|b)?", text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a size such as 2GiB, 512MB or 1073741824")
    number, unit, ending = match.groups()
    factor = 1 if unit is None else _DECIMAL[unit] if ending == "b" else _BINARY[unit.upper()]
    return int(float(number) * factor) if "." in number else int(number) * factor


def at_least(least: float) -> Callable[[str], float]:
    """Reads a number of the kind of `least` that is no smaller."""

    def read(text: str) -> float:
        try:
            value = type(least)(text)
        except ValueError:
            raise ValueError(f"{text!r} is not a {'whole ' if isinstance(least, int) else ''}number") from None
        if not least <= value < float("inf"):
            raise ValueError(f"{text} must be at least {least}")
        return value

    return read


def parse_with(parse: Callable[[str], T]) -> Callable[[str], T]:
    """`parse` as the `type` of an argparse argument, which would swallow the text of its
    `ValueError`.
    """

    def read(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def add_flags(parser: argparse.ArgumentParser, config: type, *, title: str, skip: Sequence[str] = ()) -> None:
    """Adds one flag for each field of the dataclass `config`, except those named in `skip`."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(config):
        if field.name in skip:
            continue
        meta = field.metadata
        names = [*meta["flags"], "--" + field.name.replace("_", "-"), *meta["aliases"]]
        help_text = meta["help"].replace("%", "%%")
        default = "" if field.default in (None, (), "") else f" [default: {_shown(field.default)}]"
        parse = parse_with(meta["parse"])
        common: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": help_text + default}
        if isinstance(field.default, bool):
            group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        elif isinstance(field.default, tuple):
            group.add_argument(*names, nargs="+", action=_ListAction, type=parse, metavar="V", **common)
        elif meta["choices"]:
            group.add_argument(*names, choices=meta["choices"], **common)
        else:
            group.add_argument(*names, type=parse, metavar=field.name.upper().split("_")[-1], **common)


def from_flags(config: type[T], args: argparse.Namespace, **overrides: Any) -> T:
    """Builds the dataclass from the flags that were given; the others keep the field's default."""
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(config) if hasattr(args, f.name)}  # type: ignore[arg-type]
    given.update(overrides)
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def check_types(config: Any) -> None:
    """Raises `ValueError` for the first field of the dataclass whose value is not of its type.

    Numbers of other libraries count. A tuple field takes any list, and one of texts also a single
    text.
    """
    types = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        wanted = [part for part in get_args(types[field.name]) if part is not Ellipsis] or [types[field.name]]
        if get_origin(types[field.name]) is tuple:
            kind = wanted[0]
            listed = isinstance(value, (list, tuple, set, frozenset, range)) and all(_is(part, kind) for part in value)
            if listed or (kind is str and isinstance(value, str)):
                continue
            words = f"a list, each of it {_KINDS[kind]}"
        else:
            if any(_is(value, kind) for kind in wanted):
                continue
            words = " or ".join(_KINDS[kind] for kind in wanted)
        raise ValueError(f"{field.name} = {repr(value)[:100]}: must be {words}, not of type {type(value).__name__}")


_KINDS = {str: "text", int: "an integer", float: "a number", bool: "True or False", type(None): "None"}


def _is(value: object, kind: type) -> bool:
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return isinstance(value, kind)


class _ListAction(argparse.Action):
    """Extends the list, and keeps each use of the flag in `list_flags`: one may have taken what was
    meant otherwise.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, ()), *values])
        namespace.list_flags = [*getattr(namespace, "list_flags", ()), (option_string, list(values))]


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
