"""Which client packages are tried, and in which versions: the one place that has them."""

from dataclasses import dataclass

BEFORE = "2026-11-27T00:00:00Z"
"""What the packages depend on is as it was at this time."""


@dataclass(frozen=True)
class Client:
    """One environment and the file `use_<name>.py` that is run in it."""

    name: str
    packages: tuple[str, ...]
    lent: tuple[str, ...] = ()
    """Dependencies that are gigabytes: the development environment lends them."""
    light: bool = False
    """Its package is among the development tools, so `tests/clients/test_light.py` runs it in every
    run of the tests.
    """


CLIENTS = (
    Client("openai", ("openai==3.57.0",), light=True),
    Client("anthropic", ("anthropic==2.14.0",), light=True),
    Client("ollama", ("ollama==0.6.3",), light=True),
    Client("huggingface_hub", ("huggingface_hub==2.4.0",), light=True),
    Client("open_webui", (), light=True),  # 0.12.4: its requests, without its package
    Client("langchain_openai", ("langchain-openai==1.7.4",)),
    Client("langchain_anthropic", ("langchain-anthropic==1.7.10",)),
    Client("langchain_ollama", ("langchain-ollama==1.1.0",)),
    Client("langchain_huggingface", ("langchain-huggingface==1.2.3",)),
    Client("llama_index", ("llama-index-llms-openai-like==0.8.1",)),
    Client("instructor", ("instructor==1.17.0",)),
    Client("pydantic_ai", ("pydantic-ai-slim[openai]==2.68.0",)),
    Client("litellm", ("litellm==1.110.2",)),
    Client("haystack", ("haystack-ai==3.4.1",)),
    Client("dspy", ("dspy==3.4.1",)),
    Client("lm_eval", ("lm-eval[api]==0.4.13",), lent=("torch",)),
    Client("guidellm", ("guidellm==0.8.1",), lent=("torch",)),
    Client("aiperf", ("aiperf==0.13.0",)),
    Client("schemathesis", ("schemathesis==4.32.5", "openapi-spec-validator==0.9.0")),
)
