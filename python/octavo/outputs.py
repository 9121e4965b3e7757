"""What a request gives back, in vLLM's shape."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """Log-probability of one token at one position."""

    logprob: float
    """Natural logarithm, of the distribution before temperature and filters."""
    rank: int | None = None
    """1 for the likeliest token of the vocabulary."""
    decoded_token: str | None = None


@dataclass(frozen=True)
class ToolCall:
    """A call that the model made of a tool."""

    name: str
    arguments: str
    """JSON of an object, or what the model wrote in its place."""


@dataclass
class CompletionOutput:
    """One choice of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    """Sum over the drawn tokens; None unless log-probabilities were asked for."""
    logprobs: list[dict[int, Logprob]] | None = None
    """One entry a token, by token id: the drawn token first, then the likeliest ones."""
    finish_reason: str | None = None
    """None while it runs, then "stop", "length", "abort" or "error"."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for the model's own end token."""
    reasoning: str | None = None
    """Of an answer of `LLM.chat`, whose `text` has it too; as `content` and `tool_calls`."""
    content: str | None = None
    """The answer without reasoning and calls of tools."""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened, in seconds of the engine's monotonic clock; 0.0 where it has not."""

    arrival_time: float
    first_scheduled_time: float
    first_token_time: float
    last_token_time: float


@dataclass
class EmbeddingOutput:
    """The embedding of a prompt."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Its numbers."""
        return len(self.embedding)


@dataclass
class EmbeddingRequestOutput:
    """What a request for an embedding gives back."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0
    """Tokens of the prompt whose KV blocks came from the prefix cache."""
    error: str | None = None
    """What ended it, as `code: explanation`; the embedding is empty then."""


@dataclass
class RequestOutput:
    """Everything a request has made so far, or at its end."""

    request_id: str
    prompt: str | None
    """None when the prompt came as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """One entry a token of the prompt, by token id: the token itself first, then the likeliest ones.
    None for the first token, which nothing comes before. There from the first output token on.
    """
    num_cached_tokens: int = 0
    """Tokens of the prompt whose KV blocks came from the prefix cache."""
    metrics: RequestMetrics | None = None
    embedding: list[float] | None = None
    """Of a request that asked for that."""
    error: str | None = None
    """What ended it, as `code: explanation`, where the `finish_reason` of a choice is "error"."""
