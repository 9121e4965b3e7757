"""Types of the Rust core. `mypy.stubtest` holds this file against the built extension."""

from collections.abc import Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "ENGINE_DEAD",
    "PLAN_FORMAT",
    "SERVER_SHUTTING_DOWN",
    "AnswerFormat",
    "BlockMatrix",
    "BlockProduct",
    "ChatTemplate",
    "ChoiceDelta",
    "Echo",
    "EngineCore",
    "Failure",
    "Floats",
    "GgufError",
    "GgufFile",
    "Grammar",
    "GrammarCompiler",
    "KvCapacityError",
    "OverloadedError",
    "PagedAttention",
    "PagedRows",
    "Pattern",
    "Prompt",
    "PromptTooLongError",
    "RefusedError",
    "ReplyDelta",
    "ReplyFormat",
    "RequestProgress",
    "SamplingParams",
    "TemplateError",
    "ThinkingBudget",
    "TokenIds",
    "Tokenizer",
    "__version__",
    "add_rms_norm",
    "anthropic_error",
    "cpu_levels",
    "cpu_threads",
    "gelu_tanh_and_mul",
    "measure_body",
    "ollama_error",
    "openai_error",
    "prepare_step",
    "read_prompts",
    "resolve_escapes",
    "rms_norm",
    "sample_step",
    "set_cpu_threads",
    "silu_and_mul",
    "tgi_error",
]

__version__: str

PLAN_FORMAT: dict[str, dict[str, int]]
"""The words of a plan and of a result (docs/plan.md), named in Rust: for each kind of record
("header", "row", ...) the place of each of its words, and the values by name of "row_flag" and
"status".
"""

ENGINE_DEAD: str
SERVER_SHUTTING_DOWN: str
"""Codes of what ends all replies: the engine was lost, the server ends."""

@final
class Pattern:
    """A regular expression out of a file that nobody has looked at. Raises `ValueError` that says
    what is wrong with it.
    """

    def __new__(cls, pattern: str) -> Pattern: ...
    def begins(self, text: str) -> bool:
        """Whether the text begins with a match. Raises `ValueError` where that takes too much work."""

class RefusedError(ValueError):
    """A value, file or request that cannot be used. The message names field, value and limit."""

    code: str
    """Stable name, for clients and metrics."""
    param: str | None
    """The field that it is about, as users write it."""

class OverloadedError(RuntimeError):
    """The waiting queue is full. Retry later."""

    code: str
    param: str | None

class PromptTooLongError(RefusedError):
    """The prompt, or the prompt with `max_tokens`, is over `max_model_len`; or its text is longer
    than is read.
    """

class KvCapacityError(RefusedError):
    """The request can never fit into the KV pool, however long it waits."""

class TemplateError(RefusedError):
    """A chat template does not parse, ran out of fuel, or refused the messages with
    `raise_exception`.
    """

class GgufError(RefusedError):
    """A GGUF file is truncated or inconsistent. The message names file, field, value and limit."""

def cpu_levels() -> list[str]:
    """The sets of instructions that this processor has and the CPU's ops have code for, from the
    least to the best: portable, avx2, avx512.
    """

def cpu_threads() -> int:
    """Threads that the CPU's ops run on, the caller's included: the processors of the process's
    affinity and of its cgroup's quota, unless `set_cpu_threads` says otherwise.
    """

def set_cpu_threads(threads: int) -> None: ...

@final
class Floats:
    """A matrix of float32 in Rust's memory, made by an op and read by the next; it goes where a float32
    tensor may go.
    """

    @staticmethod
    def of(tensor: Any) -> Floats:
        """[1, n]: a copy of a tensor [n] float32."""
    @property
    def shape(self) -> tuple[int, int]: ...

@final
class BlockMatrix:
    """A matrix [rows, columns] in the blocks of a GGUF file (rust/cpu/product.rs): where they lie, until
    a product is made of it, which may put its rows side by side. Its numbers and its order stay.

    Tensors (torch's, here and below) must be contiguous, on the CPU, and of the dtype that is
    named; another is refused with `TypeError` or `ValueError`. Ops run without the GIL. They write
    and return `out`; without one they return `Floats`.
    """

    @staticmethod
    def from_bytes(format: str, rows: int, columns: int, data: bytes) -> BlockMatrix:
        """Of a copy of `data`, in the format of ggml's name."""
    @property
    def format(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def nbytes(self) -> int: ...
    def with_heads_apart(self, heads: int) -> BlockMatrix:
        """The same blocks with their rows in another order: those of each head's halves alternate
        in the file and then stand one half after the other.
        """
    def take(self, indices: Any, scale: float = 1.0, out: Any | None = None) -> Any:
        """[n, columns] float32: the rows `indices` [n] int32 as numbers, times `scale`."""
    def read(self, start: int, out: Any) -> None:
        """out [n, columns] float32 = the rows from `start` on."""
    def is_finite(self) -> bool: ...

@final
class BlockProduct:
    """y = x W^T + bias by matrices of one input, whose outputs stand side by side.

    Each op computes its input [n, columns] first. By weights that are not quantised it is
    multiplied in float32, else 32 numbers share a scale and are rounded to 16 bits. All tensors are
    float32; out [n, all rows].
    """

    def __new__(
        cls, matrices: Sequence[BlockMatrix], bias: Any | None = None, level: str | None = None
    ) -> BlockProduct:
        """bias [all rows]. level: of `cpu_levels()`, for tests; None: the best."""
    def plain(self, x: Any, out: Any | None = None) -> Any: ...
    def rms_norm(self, x: Any, weight: Any, eps: float, out: Any | None = None) -> Any: ...
    def add_rms_norm(self, x: Any, residual: Any, weight: Any, eps: float, out: Any | None = None) -> Any:
        """residual [n, columns] += x, in place; the input is its norm."""
    def silu_and_mul(self, x: Any, out: Any | None = None) -> Any:
        """x [n, 2 * columns] = (gate | up)."""
    def gelu_tanh_and_mul(self, x: Any, out: Any | None = None) -> Any: ...

def rms_norm(x: Any, weight: Any, eps: float, out: Any | None = None) -> Any:
    """x [n, size] float32 -> its norm. These four are those of a product's input, without a product."""

def add_rms_norm(x: Any, residual: Any, weight: Any, eps: float, out: Any | None = None) -> Any:
    """residual [n, size] += x, in place -> its norm."""

def silu_and_mul(x: Any, out: Any | None = None) -> Any:
    """x [n, 2 * size] = (gate | up) -> silu(gate) * up [n, size]."""

def gelu_tanh_and_mul(x: Any, out: Any | None = None) -> Any:
    """The same with GELU by tanh."""

@final
class PagedRows:
    """Rows of a step, for the layers of one KV group. Their tensors are held, and looked at at once for
    all layers.
    """

    def __new__(
        cls,
        positions: Any,
        slot_mapping: Any,
        block_table: Any,
        row_slots: Any,
        seq_lens: Any,
        query_start_loc: Any | None = None,
    ) -> PagedRows:
        """positions and slot_mapping [tokens] int64; block_table [slots, most blocks], row_slots and
        seq_lens [rows] int32; query_start_loc [rows + 1] int32, where each row's tokens begin (without
        it each row has one).
        """

@final
class PagedAttention:
    """One layer's attention over pages (rust/cpu/attention.rs; its twins are `rope_and_cache` and
    `prefill_attention` of kernels/reference/layers.py).
    """

    def __new__(
        cls,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        block_size: int,
        scale: float,
        window: int,
        cos_sin: Any,
        eps: float,
        kv_cache: Any,
        kv_scales: Any | None = None,
        q_norm: Any | None = None,
        k_norm: Any | None = None,
        level: str | None = None,
    ) -> PagedAttention:
        """cos_sin [positions, rotary_dim] float32; kv_cache [blocks, 2, kv_heads, block_size, head_dim]
        float32, float16 or bfloat16, or with kv_scales codes as `split_cache` cuts them; both are held.
        q_norm, k_norm [head_dim] float32: both or none.
        """
    def run(self, qkv: Any, rows: PagedRows, out: Any | None = None) -> Any:
        """Rotates q and k of all tokens, q in place; writes k and v into their pages; and answers
        the tokens of the rows, which are the last of each row's keys.

        qkv [tokens, (heads + 2 * kv_heads) * head_dim] float32; out [tokens of rows, heads *
        head_dim] float32. `ValueError` names what points to memory that is not there.
        """

def prepare_step(
    header: Sequence[int],
    plan: Any,
    block_size: int,
    records: Any,
    last_token: Any,
    penalty_counts: Any | None,
    block_table: Any,
    token_ids: Any,
    positions: Any,
    slot_mappings: Any,
    row_slots: Any,
    seq_lens: Any,
    query_start_loc: Any,
    sample_index: Any,
    sample_rows: Any,
) -> None:
    """`prepare` on a CPU (rust/step/prepare.rs; its twin is that of kernels/reference/step.py).

    header: the words of the plan's header; plan [at least its bytes] uint8; records, last_token,
    penalty_counts and block_table as `DeviceState` has them, the rest as `StepInputs` has it.
    `ValueError` where the plan is longer than its bytes.
    """

def sample_step(
    header: Sequence[int],
    plan: Any,
    logits: Any,
    records: Any,
    last_token: Any,
    vocab_size: int,
    penalty_counts: Any | None,
    result: Any,
    masks: Any | None = None,
) -> None:
    """`sample` on a CPU, but for log probabilities (rust/step/sample.rs; its twin is that of
    kernels/reference/step.py).

    As `prepare_step`; logits [rows of logits, >= vocab_size] float32; result int32, flat, which gets
    the rows' records; masks [mask rows, >= vocab_size / 32] int32.
    """

@final
class GgufFile:
    """A GGUF file, memory-mapped and checked whole before anything is read (rust/gguf/mod.rs)."""

    def __new__(cls, path: str) -> GgufFile: ...
    @property
    def path(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    def metadata(self) -> dict[str, Any]:
        """All scalar, string and short-array (up to 1,024 items) values by key; long arrays are
        left out.
        """
    def tensors(self) -> list[tuple[str, str, list[int], int, int]]:
        """(name, type such as "Q4_1", shape in torch order (row-major, outermost first), byte
        offset in the file, byte length).
        """
    def matrix(self, name: str) -> BlockMatrix:
        """A tensor where it lies in the file: its first dimension by all others. Raises
        `GgufError`.
        """
    def check_types(self) -> None:
        """Raises `GgufError` if a tensor has a type that cannot be loaded; names it and the types
        that can.
        """

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
        """Reads a Hugging Face `tokenizer.json`, and what the files beside it say of special tokens."""
    @staticmethod
    def from_gguf(file: GgufFile) -> Tokenizer:
        """Builds the tokenizer from a GGUF vocabulary (`tokenizer.ggml.*`)."""
    @staticmethod
    def bytes_only(vocab_size: int = 256) -> Tokenizer:
        """One id per byte; for tests and models without a tokenizer. Ids from 256 on decode to
        nothing.
        """
    @property
    def vocab_size(self) -> int: ...
    @property
    def longest_token(self) -> int:
        """Characters of the longest token."""
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def special_tokens(self) -> dict[str, int]: ...
    @property
    def named_tokens(self) -> dict[str, str]:
        """Special tokens by the names under which templates know them, such as `bos_token`."""
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str | None: ...
    def to_json(self) -> str | None:
        """As `tokenizer.json` has it, without what is put before and after a text; None for ids of
        bytes.
        """
    def encode_text(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> Prompt: ...
    def encode_chat(
        self,
        template: ChatTemplate,
        messages_json: str | bytes,
        *,
        tools_json: str | bytes | None = None,
        add_generation_prompt: bool = True,
        kwargs_json: str | bytes | None = None,
        max_characters: int | None = None,
        continue_final_message: bool = False,
    ) -> Prompt:
        """Renders and tokenises. Message content can never produce a special token; only the
        template can. Raises `PromptTooLongError` where the template makes more than max_characters.

        continue_final_message: the prompt ends with the content of the last message.
        """
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def ends_with(self, prompt: Prompt, text: str) -> bool:
        """Whether the prompt ends with a short text and blanks behind it, special tokens included."""
    def token_bytes(self, token_id: int) -> bytes: ...

@final
class ChatTemplate:
    """A Jinja chat template under fuel, with Hugging Face's `raise_exception`, `strftime_now` and
    `tojson`.
    """

    def __new__(
        cls, source: str | None, special_tokens: dict[str, str] = ..., *, tool_use: str | None = None
    ) -> ChatTemplate:
        """tool_use: the template for conversations with tools, where it is another one. special_tokens:
        as `Tokenizer.named_tokens` has them.
        """
    @property
    def source(self) -> str | None:
        """The text of the template for conversations without tools."""
    @property
    def takes_tools(self) -> bool:
        """Whether the template for conversations with tools makes anything of them."""
    @property
    def call_format(self) -> str | None:
        """How it has the model write calls of tools ("hermes", "llama3_json", "mistral", "gemma");
        None where that is not known, or there is no place for tools.
        """
    @property
    def reasoning(self) -> str | None:
        """The tags around the model's reasoning, "think" or "mistral"; None if it shows none."""
    def render(
        self,
        messages_json: str | bytes,
        *,
        tools_json: str | bytes | None = None,
        add_generation_prompt: bool = True,
        kwargs_json: str | bytes | None = None,
        now: float | None = None,
    ) -> str: ...

@final
class Grammar:
    """A compiled constraint on an answer, for `SamplingParams`."""

@final
class ThinkingBudget:
    """After how many tokens the reasoning of an answer is closed, for `SamplingParams`."""

    def __new__(
        cls, tokenizer: Tokenizer, reasoning: str, *, tokens: int, begins_inside: bool = False
    ) -> ThinkingBudget:
        """reasoning: which tags, as `AnswerFormat` names them. begins_inside: the prompt ends within the
        reasoning. Raises `ValueError` for tags that are not known.
        """

@final
class GrammarCompiler:
    """Compiles constraints for one model, each once while it is in use: a few hundred are kept. The
    first one makes a trie of the vocabulary, which takes a second for the largest.
    """

    def __new__(cls, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> GrammarCompiler:
        """vocab_size: of the model, whose end tokens eos_token_ids are."""
    def compile(
        self,
        kind: str,
        text: str = "",
        *,
        whitespace_pattern: str | None = None,
        disable_any_whitespace: bool = False,
    ) -> Grammar:
        """The grammar of a constraint. Runs detached, a tenth of a second at most or two. Raises
        `RefusedError`, which says where in the text the fault is.

        kind: "json" (text is a schema), "json_object" (any object), "regex", "choice" (text is a
        JSON list of texts) or "grammar" (Lark). The last two: white space between the parts of JSON.
        """
    def find(
        self,
        kind: str,
        text: str = "",
        *,
        whitespace_pattern: str | None = None,
        disable_any_whitespace: bool = False,
    ) -> Grammar | None:
        """The same if it is kept; takes no time."""
    def stats(self) -> dict[str, int]:
        """Grammars `kept` and their `kept_bytes`; of all time: `compiled`, `found`, `refused`."""

@final
class SamplingParams:
    """Checked sampling parameters in the form the scheduler uses. Users meet
    `octavo.SamplingParams`.
    """

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
        max_tokens_is_default: bool = False,
        min_tokens: int = 0,
        ignore_eos: bool = False,
        stop: Sequence[str] = ...,
        stop_token_ids: Sequence[int] = ...,
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        detokenize: bool = True,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        logit_bias: Sequence[tuple[int, float]] = ...,
        allowed_token_ids: Sequence[int] | None = None,
        bad_words: Sequence[Sequence[int]] = ...,
        thinking: ThinkingBudget | None = None,
        grammar: Grammar | None = None,
    ) -> SamplingParams:
        """Raises `RefusedError` that names the field, its value and its limit. `max_tokens=None`
        means: up to the model's length. One that is a default gives way to what fits.
        """
    @staticmethod
    def embedding(*, pooling: str, normalize: bool = True, dimensions: int | None = None) -> SamplingParams:
        """Those of a request for an embedding of its prompt, which has no output.

        pooling: "last" (of the last token's hidden state) or "mean" (of all). dimensions: how many of
        its first numbers are wanted, before they are normalised.
        """

@final
class AnswerFormat:
    """How an answer's reasoning, content and calls of tools are told apart (rust/text/answer.rs)."""

    def __new__(
        cls,
        *,
        reasoning: str | None = None,
        begins_in_reasoning: bool = False,
        drops_reasoning: bool = False,
        calls: str | None = None,
        named: str | None = None,
        tools: Sequence[str] = ...,
        single_call: bool = False,
    ) -> AnswerFormat:
        """reasoning: name of its tags, as `ChatTemplate.reasoning`. calls: a format, as
        `ChatTemplate.call_format`, or "required": the answer is a list of calls. named: the answer
        is the arguments of a call of that tool. Raises `ValueError`.
        """
    @property
    def markers(self) -> list[str]:
        """Texts that tell the parts apart; the model may write them as special tokens."""
    def read(self, text: str) -> tuple[str | None, str | None, list[tuple[str, str]]]:
        """A whole answer: (reasoning, content, name and arguments of each call). Runs detached."""

@final
class Echo:
    """The prompts that completions begin with."""

    def __new__(
        cls,
        texts: Sequence[str],
        *,
        choices_each: int,
        alone: bool,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> Echo:
        """texts: of each prompt of the call, with `choices_each` choices. alone: nothing but the
        prompt is shown. logprobs: top log probabilities of each token where any are wanted, and
        prompt_logprobs of vLLM's field beside them.
        """

@final
class TokenIds:
    """Replies have the token ids of their prompts and choices beside the texts."""

    def __new__(cls, prompts: Sequence[Prompt], *, choices_each: int) -> TokenIds:
        """prompts: of the call, with `choices_each` choices."""

@final
class ReplyFormat:
    """How the reply to one call is written: by which protocol, as a stream or in one piece, and
    what is particular to the call.
    """

    @staticmethod
    def openai_chat(
        *,
        id: str,
        model: str,
        created: int,
        stream: bool,
        include_usage: bool = False,
        continuous_usage: bool = False,
        token_ids: TokenIds | None = None,
        answer: AnswerFormat | None = None,
        timing: bool = False,
    ) -> ReplyFormat:
        """OpenAI's chat completions. A stream has an event a token, the last of a choice with
        `finish_reason`, then (include_usage) an event with empty `choices` and the usage, then
        `data: [DONE]`. continuous_usage: every event has the usage so far. timing: the usage tells where
        the time went.
        """
    @staticmethod
    def openai_completion(
        *,
        id: str,
        model: str,
        created: int,
        stream: bool,
        include_usage: bool = False,
        continuous_usage: bool = False,
        token_ids: TokenIds | None = None,
        echo: Echo | None = None,
        timing: bool = False,
        best_of: tuple[int, int, bool] | None = None,
    ) -> ReplyFormat:
        """OpenAI's text completions; the same events. echo: they begin with their prompts. best_of: of so
        many choices of each prompt so many are answered, those with the highest mean log probability
        (whole answers alone); and whether log probabilities are shown.
        """
    @staticmethod
    def tgi(
        *,
        stream: bool,
        details: bool = False,
        as_list: bool = False,
        top_n_tokens: int = 0,
        seed: int | None = None,
        prompt: str = ...,
    ) -> ReplyFormat:
        """TGI's `/generate` and `/generate_stream`: an event a token, the last with all of the text.

        Of several choices the answer is the one with the highest mean log probability. as_list: in
        a list, as `POST /` answers. prompt: put before the text, for `return_full_text`.
        """
    @staticmethod
    def anthropic(
        *, id: str, model: str, stream: bool, answer: AnswerFormat | None = None, timing: bool = False
    ) -> ReplyFormat:
        """Anthropic's messages; a stream has named events."""
    @staticmethod
    def responses(
        *,
        id: str,
        model: str,
        created: int,
        request: str,
        stream: bool,
        answer: AnswerFormat | None = None,
        timing: bool = False,
    ) -> ReplyFormat:
        """OpenAI's responses; a stream has named and numbered events. request: an object of JSON, not
        empty, with what a response says of its request.
        """
    @staticmethod
    def ollama(
        *, id: str, model: str, created_at: str, chat: bool, stream: bool, answer: AnswerFormat | None = None
    ) -> ReplyFormat:
        """Ollama's chats (chat) or completions; a stream has a line of JSON for each delta."""
    @staticmethod
    def embeddings(*, form: str, id: str = "", model: str = "", created: int = 0, base64: bool = False) -> ReplyFormat:
        """Embeddings, never streamed. form: "openai", "pooling" (vLLM's route), "ollama" (`/api/embed`)
        or "ollama_one" (`/api/embeddings`); base64 is for the first two.
        """
    def write_error(self, code: str, message: str) -> bytes:
        """What ends a stream by an error, for errors that the core does not know of."""

def openai_error(message: str, *, type: str, param: str | None, code: str) -> bytes:
    """OpenAI's error object, for an answer that is an error."""

def tgi_error(message: str, error_type: str) -> bytes:
    """TGI's error object."""

def anthropic_error(message: str, *, type: str) -> bytes:
    """Anthropic's error object."""

def ollama_error(message: str) -> bytes:
    """Ollama's error object."""

def measure_body(
    body: bytes, *, max_depth: int, max_fields: int, max_values: int, uncounted: str | None = None
) -> tuple[list[tuple[tuple[int, int], tuple[int, int], int]], int]:
    """Measures a JSON body before it is decoded: (its fields, number of its keys and values).

    Of each field of the object that it is: (start, end) of the name in its quotes, (start, end) of
    the value, and the characters of the value's strings, keys and numbers. The values of fields
    called `uncounted` are not counted. Does not check the JSON. Raises `RefusedError` for what is
    over a limit or does not end. Runs detached.
    """

def resolve_escapes(body: bytes) -> bytes:
    """The same JSON with the letters of its strings in place of `\\u....` escapes, but for those that must be
    escaped. Decoding such escapes takes several times as long as letters. Runs detached.
    """

def read_prompts(
    body: bytes, start: int, end: int, *, max_prompts: int, max_tokens: int, max_characters: int
) -> list[str | Prompt]:
    """Reads and checks a completion's `prompt`, the JSON between two places of the body: a text, a
    list of texts, of token ids, or of lists of them. Raises `RefusedError`. Runs detached.

    max_tokens, max_characters: of one prompt.
    """

@final
class ChoiceDelta:
    """What one choice gained since the last `take`."""

    @property
    def index(self) -> int:
        """Number of the prompt x n + number among the prompt's choices."""
    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def logprobs(self) -> list[list[tuple[int, float, int]]] | None:
        """Per new token: the sampled token first, then the top ones: (token id, logprob, rank from
        1).
        """
    @property
    def prompt_logprobs(self) -> list[list[tuple[int, float, int]]] | None:
        """With the choice's first delta, where they were asked for: of each token of the prompt but
        the first, as in `logprobs`. Made when it is read.
        """
    @property
    def embedding(self) -> npt.NDArray[np.float32] | None:
        """Of its prompt, where that was asked for: float32 [its numbers]; with the end."""
    @property
    def finish_reason(self) -> str | None:
        """None, "stop", "length", "abort" or "error"."""
    @property
    def stop_reason(self) -> str | int | None: ...

@final
class RequestProgress:
    """Where one request of a call, which is one prompt with its choices, stands."""

    @property
    def index(self) -> int:
        """Number of the prompt in the call."""
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def num_accepted_tokens(self) -> int:
        """Drafts that became output, over its choices."""
    @property
    def num_rejected_tokens(self) -> int:
        """Drafts that were wrong, or came behind the end."""
    @property
    def num_output_tokens(self) -> int:
        """Over its choices, so far."""
    @property
    def times(self) -> tuple[float, float, float, float]:
        """(added, first scheduled, first token, last token) on the engine's monotonic clock; 0.0
        where it has not happened.
        """
    @property
    def choices(self) -> list[tuple[int, float, float]]:
        """Of each choice: (tokens so far, time of the first, time of the latest)."""
    @property
    def finish_reason(self) -> str | None:
        """None while it runs; then "error" if a choice failed, "length" if one was cut there, else
        "stop".
        """

@final
class Failure:
    """What ended a reply that had been accepted. Its `str` is `code: message`."""

    @property
    def code(self) -> str:
        """Stable name, for clients and metrics."""
    @property
    def message(self) -> str: ...
    @property
    def param(self) -> str | None:
        """The field of the request that caused it, which would do so again."""

@final
class ReplyDelta:
    """Everything a reply gained since the last `take`."""

    @property
    def choices(self) -> list[ChoiceDelta]:
        """Those that gained something, without a `ReplyFormat`; with one they are only written."""
    @property
    def requests(self) -> list[RequestProgress]:
        """The requests that got their first token, or have ended; without a `ReplyFormat` all that
        gained something.
        """
    @property
    def token_gaps(self) -> list[tuple[float, int]]:
        """Of each choice that gained tokens: seconds between two of its tokens, and how many times.
        Gaps that differ by less than 9 % may be one entry, with their mean, so a whole answer has
        few.
        """
    @property
    def finished(self) -> bool: ...
    @property
    def error(self) -> Failure | None:
        """Set where an error ended it. A call without a `ReplyFormat` goes on with its other
        choices.
        """
    @property
    def is_long(self) -> bool:
        """Whether `write`, or reading the log probabilities of its choices, may take longer than an
        event loop should wait.
        """
    def write(self) -> bytes:
        """The bytes for the client: events of a stream, or the whole answer at its end. Empty
        without a `ReplyFormat`, and for a whole answer that failed. Runs detached where it is long.
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
        vector_size: int = 0,
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
        speculation: dict[str, Any] | None = None,
        max_preemptions: int = 3,
        priority_aging: float = 60.0,
        static_batch_wait: float = 0.1,
        hash_secret: bytes = ...,
        seed: int = 0,
        tokenizer: Tokenizer | None = None,
    ) -> EngineCore:
        """kv_windows: one entry a KV group, 0 for full attention, else the sliding window in
        tokens.

        graph_sizes: rows of the captured steps of decodes only. A step with prompt tokens is padded
        to the smallest pair of prefill_graph_tokens and prefill_graph_decodes that holds it, with
        prefill_graph_rows prefill rows. Where some row has drafts, draft_graphs and
        prefill_draft_graphs, (decode rows, their tokens), stand in for graph_sizes and
        prefill_graph_decodes; one of the rows is always padding.

        hash_secret keys the prefix cache's hashes; seed feeds the draws of requests that bring no
        seed.
        """
    @property
    def plan_bytes(self) -> int:
        """Largest plan this configuration can make; size of each plan buffer."""
    @property
    def result_bytes(self) -> int: ...
    @property
    def longest_request(self) -> int:
        """Prompt and output tokens of the longest request that the KV pool can hold, at most
        `max_model_len`.
        """
    @property
    def longest_embedding(self) -> int:
        """Tokens of the longest prompt that may have an embedding."""
    def bind(self, slot: int, plan_bytes: npt.NDArray[np.uint8], result_bytes: npt.NDArray[np.uint8]) -> None: ...
    def add_call(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        now: float,
        priority: int = 0,
        cache_salt: str | None = None,
        share: tuple[int, float] | None = None,
        reply_format: ReplyFormat | None = None,
    ) -> int:
        """Queues a request for each prompt, or none of them; returns the id of their reply. `now`:
        seconds of a clock that does not go back. `share`: whose part of the engine it takes, any
        number, and that one's weight, above 0; calls without one go first. Raises `RefusedError` or
        `OverloadedError`.
        """
    def check_queue(self, before: int = 0) -> None:
        """Raises `OverloadedError` unless a request may wait behind `before` others that are about
        to be added.
        """
    def abort(self, reply_id: int) -> None:
        """Ends what of the call has not ended, and forgets the reply."""
    def wait(self, timeout: float, now: float) -> bool:
        """Sleeps, detached, until there may be something to schedule (an arrival, an abort, a
        static batch's time). False on timeout.
        """
    def schedule(self, slot: int, now: float) -> int | None:
        """Plans a step into the slot's plan buffer, which then begins with the step's numbers.
        Returns the step's id, or None where nothing can run before a commit, an arrival or a later
        `now`.
        """
    def commit(self, slot: int, now: float, draft_seconds: float = 0.0, follow_seconds: float = 0.0) -> None:
        """Takes the result of the step planned in `slot`: the oldest that is not committed.
        draft_seconds: what a model took in it to make drafts. follow_seconds: to compute before what it
        had missed.
        """
    def fill_masks(self, slot: int, masks: npt.NDArray[np.uint32]) -> list[str]:
        """Writes the grammar masks of the step planned in `slot`, all before it being committed.
        Runs detached. Ends requests whose grammars fail here, and says why.

        masks: uint32 [at least the plan's `num_mask_rows`, at least vocab_size / 32], contiguous.
        """
    def fileno(self) -> int:
        """An eventfd that is readable while there is news."""
    def take_news(self) -> list[int]:
        """Ids of the replies with news since the last call. An answer in one piece has news at its
        end only.
        """
    def take(self, reply_id: int) -> ReplyDelta | None:
        """What the reply gained since the last call; forgets one that has finished. None for one
        that is not there.
        """
    def story(self, request_id: int, now: float) -> dict[str, Any] | None:
        """What happened to a request of a call (its reply's id, and those that follow: one a prompt) up
        to `now`: counts, `has_ended`, `added`, and `events`, each with `event`, `choice`, `from` and
        `until` in seconds of the caller's clock. None where its beginning has been overwritten in the
        ring, or there is no such request.
        """
    def has_unfinished(self) -> bool: ...
    def stats(self) -> dict[str, float]: ...
    def accepted_per_position(self) -> list[int]:
        """Drafts that were right so far, by their place behind the row's own token."""
    def reset_prefix_cache(self) -> None: ...
    def check_integrity(self) -> None: ...
    def fail_step(self, slot: int, code: str, message: str) -> None:
        """The step planned in `slot` did not run: its requests end with an error, which clients
        see.
        """
    def fail_all(self, code: str, message: str) -> None:
        """Nothing runs any more: every request ends with an error, which clients see."""
    def shutdown(self) -> None:
        """Ends every request with an error and lets go of the bound buffers: no step can be planned
        any more.
        """
