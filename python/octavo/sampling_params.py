"""How a request's tokens are chosen and when it ends, as users write it. Fields and defaults are
vLLM's.

The Rust core checks every value when the object is made, so a bad one fails here and not in a step;
ranges are written there, in one place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from octavo.errors import FieldError
from octavo.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from octavo import _core


def _check_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _wrong(name, value, "an integer")
    if not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"{name} is {_shown(value)}, but must be from -2**63 to 2**63 - 1")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _wrong(name, value, "a number")


def _wrong(name: str, value: object, wanted: str) -> ValueError:
    return ValueError(f"{name} is {_shown(value)} of type {type(value).__name__}, but must be {wanted}")


def _shown(value: object) -> str:
    """A value for a message; whatever users pass may be long."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


MAX_BAD_WORDS = 256
MAX_BAD_WORD_BYTES = 256


def check_bad_words(words: object) -> None:
    """Raises `FieldError` for what is no list of words, or is over a limit."""
    if words is None:
        return
    if not isinstance(words, Sequence) or isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise _wrong("bad_words", words, "a list of strings")
    if len(words) > MAX_BAD_WORDS:
        raise _bad_words(f"bad_words is a list of {len(words)}, but must have at most {MAX_BAD_WORDS} entries")
    for position, word in enumerate(words):
        shown = f"bad_words[{position}] is {_shown(word)}"
        if not word.strip():
            raise _bad_words(f"{shown}, but must not be blank")
        if len(word.encode(errors="surrogatepass")) > MAX_BAD_WORD_BYTES:
            raise _bad_words(f"{shown}, but must have at most {MAX_BAD_WORD_BYTES} bytes")


def _bad_words(message: str) -> FieldError:
    return FieldError(message, "bad_words")


@dataclass(frozen=True)
class OfModel:
    """What the fields of parameters that speak of text became for one model."""

    grammar: "_core.Grammar | None" = None
    """What `structured_outputs` was compiled to, by `octavo.structured_outputs`."""
    bad_words: Sequence[Sequence[int]] | None = None
    thinking: "_core.ThinkingBudget | None" = None


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request. `ValueError` names the field, its value and its limit."""

    n: int = 1
    """Choices made from the same prompt; they share its KV blocks."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that was output at least once; -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it was output; -2 to 2."""
    repetition_penalty: float = 1.0
    """Divides the positive logits, and multiplies the negative ones, of tokens of the prompt and
    the output; 0.01 to 100, 1: off.
    """
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens whose probabilities add up to this."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 or -1: all."""
    min_p: float = 0.0
    """Draw from tokens at least this likely, relative to the likeliest."""
    seed: int | None = None
    """Makes the draws of this request repeatable, whatever runs beside it."""
    stop: str | Sequence[str] | None = None
    """Strings that end the output; they are left out of it unless `include_stop_str_in_output`."""
    stop_token_ids: Sequence[int] | None = None
    """Tokens that end the output, besides the model's own."""
    ignore_eos: bool = False
    """Go on after the model's end token (for measurements)."""
    max_tokens: int | None = 16
    """Longest output in tokens; None: up to the model's length."""
    min_tokens: int = 0
    """End tokens cannot be drawn before this many."""
    logprobs: int | None = None
    """Log-probabilities of the drawn token and of this many of the likeliest ones; 0: the drawn one
    only.
    """
    prompt_logprobs: int | None = None
    """The same of each token of the prompt but the first. All of the prompt is computed then, whatever
    the prefix cache holds.
    """
    detokenize: bool = True
    """Make text; without it only token ids come out and `stop` cannot be used."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string in the text."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids; -100 to 100."""
    allowed_token_ids: Sequence[int] | None = None
    """The only tokens that can be drawn; end tokens too, if they are to be."""
    bad_words: Sequence[str] | None = None
    """Words that are not written: in the tokens of the word, and in those of the word behind a space.
    What is banned is the last token behind the others. At most 256, each of at most 256 bytes.
    """
    thinking_token_budget: int | None = None
    """After so many tokens of reasoning its end is written, and the answer begins. For models whose
    chat template shows that they reason.
    """
    structured_outputs: StructuredOutputsParams | None = None
    """What the output must look like. It ends where that is complete, at an end token; with
    `ignore_eos` only where nothing can follow.
    """

    def __post_init__(self) -> None:
        self._check_types()
        self._checked(OfModel(), max_tokens_is_default=False)

    def _check_types(self) -> None:
        """What Rust could not name: a wrong type, or an integer that 64 bits do not hold."""
        for name in ("n", "top_k", "min_tokens"):
            _check_integer(name, getattr(self, name))
        for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name))
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            _check_number(name, getattr(self, name))
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise _wrong(name, getattr(self, name), "True or False")
        stop = self.stop or ()  # a string is a sequence of strings
        if not isinstance(stop, Sequence) or not all(isinstance(word, str) for word in stop):
            raise _wrong("stop", self.stop, "a string or a list of strings")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop is {_shown(self.stop)}, but must be empty with detokenize=False: there is no text")
        if self.stop_token_ids is not None:
            if not isinstance(self.stop_token_ids, Sequence) or isinstance(self.stop_token_ids, (str, bytes)):
                raise _wrong("stop_token_ids", self.stop_token_ids, "a list of token ids")
            for position, token in enumerate(self.stop_token_ids):
                _check_integer(f"stop_token_ids[{position}]", token)
        if self.allowed_token_ids is not None:
            if not isinstance(self.allowed_token_ids, Sequence) or isinstance(self.allowed_token_ids, (str, bytes)):
                raise _wrong("allowed_token_ids", self.allowed_token_ids, "a list of token ids")
            for position, token in enumerate(self.allowed_token_ids):
                _check_integer(f"allowed_token_ids[{position}]", token)
        check_bad_words(self.bad_words)
        if self.thinking_token_budget is not None:
            _check_integer("thinking_token_budget", self.thinking_token_budget)
            if not 0 <= self.thinking_token_budget < 2**32:
                raise FieldError(
                    f"thinking_token_budget = {self.thinking_token_budget}: must be from 0 to {2**32 - 1}",
                    "thinking_token_budget",
                )
        if not isinstance(self.structured_outputs, (StructuredOutputsParams, type(None))):
            raise _wrong("structured_outputs", self.structured_outputs, "a StructuredOutputsParams")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise _wrong("logit_bias", self.logit_bias, "a dict from token ids to numbers")
            for token, bias in self.logit_bias.items():
                _check_integer("logit_bias", token)
                _check_number(f"logit_bias[{token}]", bias)

    @classmethod
    def with_defaults(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> "SamplingParams":
        """Parameters from fields that a request gives and, for the others, defaults.

        Biases of both count. A default length gives way to one that was given, and the longest to
        the shortest: a default must not cause a refusal.
        """
        fields = {**defaults, **given}
        if "logit_bias" in defaults and isinstance(given.get("logit_bias"), Mapping):
            fields["logit_bias"] = {**defaults["logit_bias"], **given["logit_bias"]}
        least, most = fields.get("min_tokens"), fields.get("max_tokens", cls.max_tokens)
        if isinstance(least, int) and isinstance(most, int) and least > most:
            if "max_tokens" not in given:
                fields["max_tokens"] = least
            elif "min_tokens" not in given:
                fields["min_tokens"] = max(most, 0)
        return cls(**fields)

    def fitting(self, room: int) -> "SamplingParams":
        """The same with at most `room` output tokens, if there is room at all: a default must not
        cause a refusal.
        """
        if self.max_tokens is None or not self.min_tokens <= room < self.max_tokens or room < 1:
            return self
        return replace(self, max_tokens=room)

    def to_core(
        self, of_model: "OfModel | None" = None, *, max_tokens_is_default: bool = False
    ) -> "_core.SamplingParams":
        """The checked form that the scheduler uses. A `max_tokens` that is a default gives way to what
        fits behind each prompt, as in `fitting`.

        of_model: what the fields that speak of text are for the model.
        """
        made = of_model or OfModel()
        if (self.structured_outputs is None) != (made.grammar is None):
            raise ValueError("structured_outputs: must be compiled for the model before it is used")
        if bool(self.bad_words) != bool(made.bad_words):
            raise ValueError("bad_words: must be tokenised for the model before they are used")
        return self._checked(made, max_tokens_is_default=max_tokens_is_default)

    def _checked(self, made: "OfModel", *, max_tokens_is_default: bool) -> "_core.SamplingParams":
        from octavo import _core  # `import octavo` must not load the extension

        stop = () if self.stop is None else self.stop
        return _core.SamplingParams(
            n=self.n,
            temperature=self.temperature,
            top_k=0 if self.top_k == -1 else self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            max_tokens=self.max_tokens,
            max_tokens_is_default=max_tokens_is_default,
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            detokenize=self.detokenize,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            logit_bias=tuple((self.logit_bias or {}).items()),
            allowed_token_ids=self.allowed_token_ids,
            bad_words=made.bad_words or (),
            thinking=made.thinking,
            grammar=made.grammar,
        )
