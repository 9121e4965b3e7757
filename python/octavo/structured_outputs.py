"""What an answer must look like, as users write it. Fields are those of vLLM's
`StructuredOutputsParams`.

The core compiles it for a model (`compile_grammar`); what a schema, expression or grammar may be is
written there, and its refusals say where in it the fault is.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo import _core

KINDS = ("json", "regex", "choice", "grammar", "json_object")
FIELD = "structured_outputs"


@dataclass(frozen=True)
class StructuredOutputsParams:
    """One constraint on an answer. `ValueError` names the field and what is wrong with it."""

    json: str | Mapping[str, Any] | bool | None = None
    """A JSON schema, as an object or as its text."""
    regex: str | None = None
    """A regular expression that the whole answer matches; without look-around."""
    choice: Sequence[str] | None = None
    """The answer is one of these texts."""
    grammar: str | None = None
    """A grammar in Lark's form, or in GBNF."""
    json_object: bool | None = None
    """Any JSON object."""
    disable_any_whitespace: bool = False
    """No white space between the parts of JSON."""
    whitespace_pattern: str | None = None
    """A regular expression for the white space between the parts of JSON, which may always be left
    out. By default a space, or line breaks with up to twenty blanks.
    """

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            names = ", ".join(KINDS)
            raise ValueError(f"{FIELD} has {' and '.join(given) or 'nothing'}, but must have one of {names}")
        for name in ("regex", "grammar", "whitespace_pattern"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"{FIELD}.{name} is a {type(getattr(self, name)).__name__}, but must be text")
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise ValueError(f"{FIELD}.{name} is a {type(getattr(self, name)).__name__}, but must be True or False")
        if not isinstance(self.json, (str, Mapping, bool, type(None))):
            raise ValueError(
                f"{FIELD}.json is a {type(self.json).__name__}, but must be a JSON schema: an object, or text"
            )
        if self.choice is not None and (
            isinstance(self.choice, (str, bytes))
            or not isinstance(self.choice, Sequence)
            or not all(isinstance(text, str) for text in self.choice)
        ):
            raise ValueError(f"{FIELD}.choice must be a list of texts")

    @property
    def kind(self) -> str:
        """Which of `KINDS` it has."""
        return self._given()[0]

    def _given(self) -> list[str]:
        """`False` is a JSON schema, but no wish for a JSON object."""
        return [
            kind
            for kind in KINDS
            if getattr(self, kind) is not None and (kind, getattr(self, kind)) != ("json_object", False)
        ]

    @property
    def text(self) -> str:
        """What the core reads."""
        value = getattr(self, self.kind)
        if self.kind == "json_object":
            return ""
        if isinstance(value, str):
            return value
        try:
            return json.dumps(list(value) if self.kind == "choice" else value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{FIELD}.{self.kind} is not JSON: {error}") from None


def compile_grammar(
    compiler: "_core.GrammarCompiler | None", wanted: StructuredOutputsParams | None
) -> "_core.Grammar | None":
    """The grammar of a request, None where it wants none. Takes up to a tenth of a second or two.
    Raises `ValueError` for what cannot be compiled.
    """
    if wanted is None:
        return None
    return need_compiler(compiler).compile(
        wanted.kind,
        wanted.text,
        whitespace_pattern=wanted.whitespace_pattern,
        disable_any_whitespace=wanted.disable_any_whitespace,
    )


def find_grammar(compiler: "_core.GrammarCompiler | None", wanted: StructuredOutputsParams) -> "_core.Grammar | None":
    """The grammar if it has been compiled lately."""
    return need_compiler(compiler).find(
        wanted.kind,
        wanted.text,
        whitespace_pattern=wanted.whitespace_pattern,
        disable_any_whitespace=wanted.disable_any_whitespace,
    )


def need_compiler(compiler: "_core.GrammarCompiler | None") -> "_core.GrammarCompiler":
    """Raises `ValueError` for a model without a tokenizer."""
    if compiler is None:
        raise ValueError(f"{FIELD}: this model has no tokenizer, so its tokens have no text to look at")
    return compiler


JsonInText = Sequence["str | int | Mapping[str, Any]"]
"""Texts, special tokens by id, and JSON under a schema, one after another."""


def one_of(alternatives: Sequence[JsonInText], *, separator: str | None = None) -> StructuredOutputsParams:
    """The answer is one of these, or, with a separator, one or more of them with that between two:
    calls of tools in a model's own format, for instance.

    JSON in them is written without white space between its parts, and its references are its
    schema's own.
    """
    rules = [f"start: call ({_quoted(separator)} call)*" if separator is not None else "start: call"]
    rules.append("call: " + " | ".join(f"a{number}" for number in range(len(alternatives))))
    for number, parts in enumerate(alternatives):
        names = []
        for place, part in enumerate(parts):
            if isinstance(part, str):
                names.append(_quoted(part))
            elif isinstance(part, int):
                names.append(f"<[{part}]>")
            else:
                options = {"whitespace_flexible": False, "coerce_one_of": True}
                rules.append(f"j{number}-{place}: %json " + json.dumps({"x-guidance": options, **part}))
                names.append(f"j{number}-{place}")
        rules.append(f"a{number}: " + " ".join(names))
    return StructuredOutputsParams(grammar="\n".join(rules))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
