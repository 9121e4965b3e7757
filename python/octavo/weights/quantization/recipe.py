"""What a model's files, or the user, say about quantised weights: which projection has which
format.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from octavo.layers.schemes.formats.stored import Format
from octavo.model_config import ModelError
from octavo.models.config_reader import Fields

MAX_PATTERN = 512
"""Characters of a regular expression in a config file, which nobody has looked at."""


@dataclass(frozen=True)
class Recipe:
    """The formats of a model's projections."""

    method: str  # as `--quantization` and config files name it
    format_of: Callable[[str], Format | None]  # of a projection, by its name without ".weight"; None: plain
    formats: tuple[Format, ...]  # all that there are
    online: bool = False  # quantised while the weights are read

    def __str__(self) -> str:
        return "; ".join(dict.fromkeys(map(str, self.formats)))


def spellings(name: str) -> tuple[str, ...]:
    """What a config may call a projection: the text part of a model that also sees has prefixes
    there.
    """
    inner = name.removeprefix("model.")
    return name, f"language_model.{name}", f"model.language_model.{inner}"


class Names:
    """A config's list of modules: names, parts of names between dots, and `re:` with a regular
    expression that begins where the name does.
    """

    def __init__(self, fields: Fields, key: str, *, parts: bool) -> None:
        """parts: whether a name may be a part of a longer one. Raises `ModelError` for what is no
        such list.
        """
        values = fields.get(key)
        if values is None:
            values = []
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise fields.error(key, f"{values!r} is not a list of module names")
        self.given = fields.get(key) is not None
        self._names = {value for value in values if not value.startswith("re:")}
        self._patterns = [Pattern(fields, key, value[3:]) for value in values if value.startswith("re:")]
        self._parts = parts

    def have(self, name: str) -> bool:
        """Whether the list means a projection."""
        for spelling in spellings(name):
            if spelling in self._names or any(pattern.begins(spelling) for pattern in self._patterns):
                return True
            if self._parts and any(f".{part}." in f".{spelling}." for part in self._names):
                return True
        return False

    def have_class(self, name: str) -> bool:
        """Whether the list has the class of a module, `Linear`."""
        return name in self._names


class Pattern:
    """A regular expression of a config file, by the core's engine, since Python's may take years.
    Raises `ModelError` for one that is none, or long, or takes too much work.
    """

    def __init__(self, fields: Fields, key: str, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN:
            raise fields.error(key, f"a pattern of {len(pattern)} characters: at most {MAX_PATTERN}")
        from octavo import _core

        self._fields, self._key, self._text = fields, key, pattern
        try:
            self._pattern = _core.Pattern(pattern)
        except ValueError as error:
            raise self._error(f"is not a regular expression: {' '.join(str(error).split())}") from None

    def begins(self, name: str) -> bool:
        """Whether a name begins with a match."""
        try:
            return self._pattern.begins(name)
        except ValueError as error:
            raise self._error(f"takes too much work: {error}") from None

    def _error(self, reason: str) -> ModelError:
        return self._fields.error(self._key, f"{self._text!r} {reason}")


def one_of(fields: Fields, key: str, allowed: Iterable[Any], default: Any = None) -> Any:
    """A field's value, which must be one of a few. Raises `ModelError`."""
    value = fields.get(key)
    if value is None:
        value = default
    choices = list(allowed)
    if value not in choices or isinstance(value, bool) != any(isinstance(choice, bool) for choice in choices):
        shown = ", ".join(str(choice) for choice in choices)
        raise fields.error(key, f"{value!r} is not supported; supported: {shown}")
    return value


def read_group_size(fields: Fields, key: str = "group_size", default: int | None = None) -> int:
    """-1, or a number of inputs. Raises `ModelError`."""
    value = fields.integer(key, default, low=-1, high=1 << 16)
    if value == 0:
        raise fields.error(key, "0 is neither -1 nor a number of inputs")
    return value
