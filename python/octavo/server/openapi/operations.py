"""What each route is for, which forms its body has, and how it answers: the routes of the document.

A route that is not here, or one that is here and not served, fails `tests/server/test_openapi.py`.
"""

from dataclasses import dataclass
from typing import Any

from octavo.server.anthropic.routes import COUNT, MESSAGES
from octavo.server.body import Form
from octavo.server.ollama.routes import CHAT as OLLAMA_CHAT
from octavo.server.ollama.routes import EMBED, EMBEDDINGS, SHOW
from octavo.server.ollama.routes import GENERATE as OLLAMA_GENERATE
from octavo.server.openai.embeddings import FORM as EMBEDDING
from octavo.server.openai.routes import CHAT, COMPLETION
from octavo.server.openai.tokenize import DETOKENIZE, TOKENIZE
from octavo.server.responses.routes import INPUT, RESPONSES
from octavo.server.tgi.routes import GENERATE
from octavo.server.tgi.routes import TOKENIZE as TGI_TOKENIZE

JSON, EVENTS, LINES = "application/json", "text/event-stream", "application/x-ndjson"
TEXT, HTML = "text/plain", "text/html"


@dataclass(frozen=True)
class Operation:
    """A method of a route."""

    method: str
    path: str
    summary: str
    forms: tuple[Form[Any], ...] = ()
    """What its body may be; where there are several, its fields tell them apart."""
    answers: tuple[str, ...] = (JSON,)
    """Content types of an answer that is no error; none where its body is empty."""
    errors: str = "openai"
    """The protocol whose form its errors have."""
    open: bool = False
    """Whether it is answered without a key."""


OPERATIONS = (
    Operation("POST", "/v1/chat/completions", "The next message of a chat.", (CHAT.form,), (JSON, EVENTS)),
    Operation("POST", "/v1/completions", "What continues prompts.", (COMPLETION.form,), (JSON, EVENTS)),
    Operation("POST", "/v1/responses", "The next items of a conversation.", (RESPONSES,), (JSON, EVENTS)),
    Operation("POST", "/v1/responses/input_tokens", "How many tokens such a conversation has.", (INPUT,)),
    Operation("POST", "/v1/embeddings", "Embeddings of texts, or of a chat.", (EMBEDDING,)),
    Operation("POST", "/pooling", "The same in vLLM's other form.", (EMBEDDING,)),
    Operation("GET", "/v1/models", "The models that are served."),
    Operation("GET", "/v1/models/{model}", "One of them; its id may have slashes."),
    Operation("POST", "/tokenize", "The tokens of a text, or of a chat.", (TOKENIZE, CHAT.form, TGI_TOKENIZE)),
    Operation("POST", "/detokenize", "The text of tokens.", (DETOKENIZE,)),
    Operation("GET", "/tokenizer_info", "The tokenizer's special tokens and the chat template."),
    Operation(
        "POST",
        "/invocations",
        "SageMaker's route: a chat, a completion, or a text of TGI's, by the fields of the body.",
        (CHAT.form, COMPLETION.form, GENERATE),
        (JSON, EVENTS),
    ),
    Operation("POST", "/v1/messages", "The next message of a chat.", (MESSAGES,), (JSON, EVENTS), "anthropic"),
    Operation("POST", "/v1/messages/count_tokens", "How many tokens a chat has.", (COUNT,), errors="anthropic"),
    Operation("POST", "/api/chat", "The next message of a chat.", (OLLAMA_CHAT,), (LINES, JSON), "ollama"),
    Operation("POST", "/api/generate", "What answers a prompt.", (OLLAMA_GENERATE,), (LINES, JSON), "ollama"),
    Operation("POST", "/api/embed", "Embeddings of texts.", (EMBED,), errors="ollama"),
    Operation("POST", "/api/embeddings", "The embedding of a text.", (EMBEDDINGS,), errors="ollama"),
    Operation("GET", "/api/tags", "The models that are served.", errors="ollama"),
    Operation("POST", "/api/show", "What is known of one.", (SHOW,), errors="ollama"),
    Operation("GET", "/api/ps", "The models that are loaded.", errors="ollama"),
    Operation("GET", "/api/version", "Octavo's version.", errors="ollama"),
    Operation("POST", "/", "What continues a text; `stream` decides how.", (GENERATE,), (JSON, EVENTS), "tgi"),
    Operation("POST", "/generate", "What continues a text.", (GENERATE,), errors="tgi"),
    Operation("POST", "/generate_stream", "The same as a stream.", (GENERATE,), (EVENTS,), "tgi"),
    Operation("GET", "/info", "The model and the limits of requests.", errors="tgi"),
    Operation("POST", "/chat_tokenize", "The text and tokens that a chat becomes.", (CHAT.form,), errors="tgi"),
    Operation("GET", "/version", "Octavo's version."),
    Operation("GET", "/v1/requests/{id}/timeline", "What happened to a request, by the id of its answer."),
    Operation("GET", "/load", "How many calls are being answered."),
    Operation("GET", "/health", "Whether the engine is alive and makes progress.", answers=(), open=True),
    Operation("GET", "/ready", "Whether new requests are welcome.", open=True),
    Operation("GET", "/metrics", "Metrics in Prometheus's form.", answers=(TEXT,), open=True),
    Operation("GET", "/", "The same as `/health`.", answers=()),
    Operation("GET", "/ping", "The same as `/health`.", answers=()),
    Operation("POST", "/ping", "The same as `/health`.", answers=()),
    Operation("GET", "/openapi.json", "This document."),
    Operation("GET", "/docs", "This document as a page.", answers=(HTML,)),
)
