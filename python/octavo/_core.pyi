"""Types of the Rust core. `mypy.stubtest` holds this file against the built extension."""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "PLAN_FORMAT",
    "ChatTemplate",
    "ChoiceDelta",
    "EngineCore",
    "FrameTemplate",
    "GgufError",
    "GgufFile",
    "KvCapacityError",
    "OverloadedError",
    "Prompt",
    "PromptTooLongError",
    "RequestDelta",
    "SamplingParams",
    "TemplateError",
    "Tokenizer",
    "__version__",
]

__version__: str

PLAN_FORMAT: dict[str, dict[str, int]]
"""The words of a plan and of a result (docs/plan.md), named in Rust: for each kind of record ("header", "row", ...) the
place of each of its words, and the values by name of "row_flag" and "status".
"""

class OverloadedError(RuntimeError):
    """The waiting queue is full. Retry later."""

class PromptTooLongError(ValueError):
    """The prompt, or the prompt with `max_tokens`, is over `max_model_len`."""

class KvCapacityError(ValueError):
    """The request can never fit into the KV pool, however long it waits."""

class TemplateError(ValueError):
    """A chat template does not parse, ran out of fuel, or refused the messages with `raise_exception`."""

class GgufError(ValueError):
    """A GGUF file is truncated or inconsistent. The message names file, field, value and limit."""

@final
class GgufFile:
    """A GGUF file, memory-mapped and checked whole before anything is read (rust/gguf.rs)."""

    def __new__(cls, path: str) -> GgufFile: ...
    @property
    def path(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    def metadata(self) -> dict[str, Any]:
        """All scalar, string and short-array (up to 1,024 items) values by key; long arrays are left out."""
    def tensors(self) -> list[tuple[str, str, list[int], int, int]]:
        """(name, type such as "Q4_1", shape in torch order (row-major, outermost first), byte offset in the file,
        byte length).
        """
    def check_types(self) -> None:
        """Raises `GgufError` if a tensor has a type that cannot be loaded; names it and the types that can."""

@final
class Prompt:
    """Token ids of a prompt, kept in Rust."""

    def __new__(cls, token_ids: Sequence[int]) -> Prompt: ...
    def __len__(self) -> int: ...
    @property
    def token_ids(self) -> list[int]: ...

@final
class Tokenizer:
    """Text to ids and back. Every call that may be long runs detached from the GIL."""

    @staticmethod
    def from_file(path: str) -> Tokenizer:
        """Reads a Hugging Face `tokenizer.json`."""
    @staticmethod
    def from_gguf(file: GgufFile) -> Tokenizer:
        """Builds the tokenizer from a GGUF vocabulary (`tokenizer.ggml.*`)."""
    @staticmethod
    def bytes_only(vocab_size: int = 256) -> Tokenizer:
        """One id per byte; for tests and models without a tokenizer. Ids from 256 on decode to nothing."""
    @property
    def vocab_size(self) -> int: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def special_tokens(self) -> dict[str, int]: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str | None: ...
    def encode_text(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> Prompt: ...
    def encode_chat(
        self,
        template: ChatTemplate,
        messages_json: str,
        *,
        tools_json: str | None = None,
        add_generation_prompt: bool = True,
        kwargs_json: str | None = None,
    ) -> Prompt:
        """Renders and tokenises. Message content can never produce a special token; only the template can."""
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token_bytes(self, token_id: int) -> bytes: ...

@final
class ChatTemplate:
    """A Jinja chat template under fuel, with Hugging Face's `raise_exception`, `strftime_now` and `tojson`."""

    def __new__(cls, source: str, bos_token: str = "", eos_token: str = "") -> ChatTemplate: ...
    def render(
        self,
        messages_json: str,
        *,
        tools_json: str | None = None,
        add_generation_prompt: bool = True,
        kwargs_json: str | None = None,
        now: float | None = None,
    ) -> str: ...

@final
class SamplingParams:
    """Checked sampling parameters in the form the scheduler uses. Users meet `octavo.SamplingParams`."""

    def __new__(
        cls,
        *,
        n: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        seed: int | None = None,
        max_tokens: int | None = None,
        min_tokens: int = 0,
        ignore_eos: bool = False,
        stop: Sequence[str] = ...,
        stop_token_ids: Sequence[int] = ...,
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        detokenize: bool = True,
        logprobs: int | None = None,
        logit_bias: Sequence[tuple[int, float]] = ...,
    ) -> SamplingParams:
        """Raises `ValueError` that names the field, its value and its limit. `max_tokens=None` means: up to the model's
        length.
        """

@final
class FrameTemplate:
    """The constant text around each streamed delta of one request: `data: ` + head + escaped delta + tail.

    kind is "completion" or "chat". The frames are those of OpenAI's stream: one a token, the last with
    `finish_reason`, then (include_usage) a usage frame with empty `choices`, then `data: [DONE]`.
    """

    def __new__(
        cls,
        kind: str,
        *,
        id: str,
        model: str,
        created: int,
        include_usage: bool = False,
        continuous_usage: bool = False,
    ) -> FrameTemplate: ...

@final
class ChoiceDelta:
    """What one choice of a request gained since the last `take`."""

    @property
    def index(self) -> int: ...
    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[list[tuple[int, float, int]]] | None:
        """Per new token: the sampled token first, then the top ones: (token id, logprob, rank from 1)."""
    @property
    def finish_reason(self) -> str | None:
        """None, "stop", "length", "abort" or "error"."""
    @property
    def stop_reason(self) -> str | int | None: ...

@final
class RequestDelta:
    """Everything a request gained since the last `take`, coalesced."""

    @property
    def choices(self) -> list[ChoiceDelta]: ...
    @property
    def frames(self) -> bytes:
        """SSE bytes ready for the socket; empty unless the request was added with a `FrameTemplate`."""
    @property
    def finished(self) -> bool: ...
    @property
    def error(self) -> str | None: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def num_output_tokens(self) -> int:
        """Over all choices, so far."""
    @property
    def times(self) -> tuple[float, float, float, float]:
        """(added, first scheduled, first token, last token) on the engine's monotonic clock; 0.0 where it has not
        happened.
        """

@final
class EngineCore:
    """Queue, scheduler, block pool, prefix cache and text work behind one lock. See DESIGN.md."""

    def __new__(
        cls,
        *,
        num_blocks: int,
        block_size: int,
        kv_windows: Sequence[int],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Sequence[int] = ...,
        max_waiting: int = 1024,
        batching: str = "continuous",
        scheduling_policy: str = "fcfs",
        enable_prefix_caching: bool = True,
        enable_chunked_prefill: bool = True,
        graph_sizes: Sequence[int] = ...,
        prefill_graph_tokens: Sequence[int] = ...,
        prefill_graph_decodes: Sequence[int] = ...,
        prefill_graph_rows: int = 0,
        draft_graphs: Sequence[tuple[int, int]] = ...,
        prefill_draft_graphs: Sequence[tuple[int, int]] = ...,
        num_draft_tokens: int = 0,
        max_preemptions: int = 3,
        priority_aging: float = 60.0,
        static_batch_wait: float = 0.1,
        hash_secret: bytes = ...,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> EngineCore:
        """kv_windows: one entry a KV group, 0 for full attention, else the sliding window in tokens.

        graph_sizes: rows of the captured steps of decodes only. A step with prompt tokens is padded to the smallest
        pair of prefill_graph_tokens and prefill_graph_decodes that holds it, with prefill_graph_rows prefill rows.
        Where some row has drafts, draft_graphs and prefill_draft_graphs, (decode rows, their tokens), stand in for
        graph_sizes and prefill_graph_decodes; one of the rows is always padding.

        hash_secret keys the prefix cache's hashes; seed feeds the draws of requests that bring no seed.
        """
    @property
    def plan_bytes(self) -> int:
        """Largest plan this configuration can make; size of each plan buffer."""
    @property
    def result_bytes(self) -> int: ...
    @property
    def longest_request(self) -> int:
        """Prompt and output tokens of the longest request that the KV pool can hold, at most `max_model_len`."""
    def bind(self, slot: int, plan_bytes: npt.NDArray[np.uint8], result_bytes: npt.NDArray[np.uint8]) -> None: ...
    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        now: float,
        priority: int = 0,
        cache_salt: str | None = None,
        frames: FrameTemplate | None = None,
    ) -> int: ...
    def abort(self, request_id: int) -> None: ...
    def wait(self, timeout: float, now: float) -> bool:
        """Sleeps, detached, until there may be something to schedule (an arrival, an abort, a static batch's time).
        False on timeout.
        """
    def schedule(self, slot: int, now: float) -> int | None:
        """Plans a step into the slot's plan buffer, which then begins with the step's numbers. Returns the step's id,
        or None where nothing can run before a commit, an arrival or a later `now`.
        """
    def commit(self, slot: int, now: float) -> None:
        """Takes the result of the step planned in `slot`: the oldest that is not committed."""
    def fileno(self) -> int:
        """An eventfd that is readable while there is something to drain."""
    def drain(self) -> list[int]:
        """Ids with news since the last drain."""
    def take(self, request_id: int) -> RequestDelta | None: ...
    def has_unfinished(self) -> bool: ...
    def stats(self) -> dict[str, float]: ...
    def reset_prefix_cache(self) -> None: ...
    def check_integrity(self) -> None: ...
    def fail_step(self, slot: int, message: str) -> None:
        """The step planned in `slot` did not run: its requests end with an error."""
    def fail_all(self, message: str) -> None: ...
    def shutdown(self) -> None:
        """Ends every request with an error and lets go of the bound buffers: no step can be planned any more."""
