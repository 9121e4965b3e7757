"""How a request's tokens are chosen and when it ends, as users write it. Fields and defaults are vLLM's.

The Rust core checks every value when the object is made, so a bad one fails here and not in a step; ranges are written
there, in one place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo import _core


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
    """Divides the positive logits, and multiplies the negative ones, of tokens of the prompt and the output; 1: off."""
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
    """Log-probabilities of the drawn token and of this many of the likeliest ones; 0: the drawn one only."""
    detokenize: bool = True
    """Make text; without it only token ids come out and `stop` cannot be used."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string in the text."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids; -100 to 100."""

    def __post_init__(self) -> None:
        self.to_core()

    def fitting(self, room: int) -> "SamplingParams":
        """The same with at most `room` output tokens, if there is room at all: a default must not cause a refusal."""
        if self.max_tokens is None or not self.min_tokens <= room < self.max_tokens or room < 1:
            return self
        return replace(self, max_tokens=room)

    def to_core(self) -> "_core.SamplingParams":
        """The checked form that the scheduler uses."""
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
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            detokenize=self.detokenize,
            logprobs=self.logprobs,
            logit_bias=tuple((self.logit_bias or {}).items()),
        )
