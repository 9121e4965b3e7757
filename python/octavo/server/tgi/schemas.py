"""What TGI's clients send, as msgspec structs, and its way to `SamplingParams`.

Types are strict and every field may be null. The bounds are TGI's; those that the engine has
besides are written in Rust.
"""

import random
from typing import Annotated, Any

import msgspec

from octavo.sampling_params import SamplingParams
from octavo.server import structured
from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError, bad_request
from octavo.structured_outputs import StructuredOutputsParams

Count = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

DEFAULT_NEW_TOKENS = 1024
"""Where a request says nothing; less where less fits."""

_UNSUPPORTED = {
    "adapter_id": "adapters are not supported",
    "watermark": "watermarks are not supported",
}


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """How to generate."""

    best_of: Count | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: Count | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool | None = None
    max_new_tokens: Count | None = None
    return_full_text: bool | None = None
    stop: list[str] | None = None
    truncate: Count | None = None
    watermark: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    seed: Seed | None = None
    top_n_tokens: Count | None = None
    grammar: msgspec.Raw = msgspec.Raw()
    adapter_id: str | None = None

    @property
    def ignored(self) -> tuple[str, ...]:
        """Fields that have no effect. langchain-huggingface sends `typical_p` with every request."""
        return () if self.typical_p is None else ("typical_p",)

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn; else each is the likeliest. What shapes the draw asks for one."""
        return (
            bool(self.do_sample)
            or self.temperature not in (None, 1.0)
            or bool(self.top_k or self.top_p or self.typical_p)
        )

    def check(self, stream: bool, config: ServerConfig, max_input_tokens: int) -> None:
        """Raises `ApiError` for what TGI refuses and for what is not supported."""
        for name, why in _UNSUPPORTED.items():
            if getattr(self, name) not in (None, False):
                raise bad_request(f"`{name}`: {why}", name, "unsupported_parameter")
        best_of = 1 if self.best_of is None else self.best_of
        inside = (
            ("best_of", best_of, 1, config.max_best_of),
            ("max_new_tokens", self.max_new_tokens, 1, None),
            ("truncate", self.truncate, 1, max_input_tokens),
            ("top_n_tokens", self.top_n_tokens, 0, config.max_top_n_tokens),
            ("top_k", self.top_k, 1, None),
            ("stop", None if self.stop is None else len(self.stop), 0, config.max_stop_sequences),
        )
        for name, number, low, high in inside:
            if number is not None and not (low <= number and (high is None or number <= high)):
                what = "its length" if name == "stop" else "it"
                bounds = f"at least {low}" if high is None else f"from {low} to {high}"
                raise bad_request(f"`{name}`: {what} must be {bounds}. Given: {number}", name)
        for name in ("temperature", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise bad_request(f"`{name}` must be strictly positive", name)
        for name in ("top_p", "typical_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise bad_request(f"`{name}` must be > 0.0 and < 1.0", name)
        if self.decoder_input_details and stream:
            raise bad_request("`decoder_input_details` is not supported when streaming tokens", "decoder_input_details")
        if best_of > 1 and stream:
            raise bad_request("`best_of` != 1 is not supported when streaming tokens", "best_of")
        if best_of > 1 and not self.samples:
            raise bad_request("you must use sampling when `best_of` is > 1", "best_of")
        if best_of > 1 and self.seed is not None:
            raise bad_request("`seed` must not be set when `best_of` is > 1", "seed")

    def wanted_structure(self) -> structured.Wanted:
        """What the answer must look like. Raises `ApiError`."""
        if bytes(self.grammar) in (b"", b"null"):
            return structured.Wanted()
        return structured.read_grammar(self.grammar, "grammar")

    def drawn_seed(self) -> int | None:
        """The seed, made up where none is given: answers tell it, so that the draw can be done
        again.
        """
        if not self.samples:
            return None
        return random.getrandbits(48) if self.seed is None else self.seed

    def to_sampling_params(
        self, stream: bool, seed: int | None, wanted: StructuredOutputsParams | None
    ) -> SamplingParams:
        """As the engine has them. Raises `ValueError` that names a field."""
        told = stream or self.details or (self.best_of or 1) > 1
        given: dict[str, Any] = {
            "temperature": (1.0 if self.temperature is None else self.temperature) if self.samples else 0.0,
            "top_k": self.top_k or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "repetition_penalty": 1.0 if self.repetition_penalty is None else self.repetition_penalty,
            "frequency_penalty": 0.0 if self.frequency_penalty is None else self.frequency_penalty,
            "seed": seed,
            "n": self.best_of or 1,
            "max_tokens": DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens,
            "stop": self.stop or [],
            "include_stop_str_in_output": True,  # as TGI has it
            "logprobs": (self.top_n_tokens or 0) if told else None,
            "prompt_logprobs": 0 if self.details and self.decoder_input_details else None,
            "structured_outputs": wanted,
        }
        return SamplingParams(**given)


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /generate`, `/generate_stream` and `/`."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /tokenize`."""

    inputs: str
    add_special_tokens: bool | None = None


def empty_inputs() -> ApiError:
    """That nothing is to be continued."""
    return bad_request("`inputs` cannot be empty", "inputs")
