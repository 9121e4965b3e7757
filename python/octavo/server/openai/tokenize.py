"""vLLM's routes around the tokenizer: `/detokenize`, `/tokenizer_info`, and its part of `/tokenize`."""

from typing import Annotated

import msgspec
from aiohttp import web

from octavo import _core
from octavo.errors import EngineDeadError
from octavo.server.body import Form
from octavo.server.errors import bad_request
from octavo.server.intake import Intake
from octavo.server.openai.routes import OpenAIRoutes

_NAMES = {"prompt": "prompt"}


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /tokenize` of a text."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /detokenize`."""

    tokens: list[Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]]
    model: str | None = None


TOKENIZE = Form(TokenizeRequest, frozenset({"prompt"}), frozenset({"prompt"}), {}, "prompt")
DETOKENIZE = Form(DetokenizeRequest, frozenset({"tokens"}), frozenset(), {}, "tokens")


class TokenizeRoutes:
    """The handlers."""

    def __init__(self, intake: Intake, chats: OpenAIRoutes) -> None:
        self._intake = intake
        self._engine = intake.engine
        self._chats = chats

    async def tokenize_text(self, request: web.Request) -> web.Response:
        """`POST /tokenize` with `prompt`."""
        parsed = await self._intake.read(request, lambda body: self._intake.decode(TOKENIZE, body))
        read = parsed.request
        self._intake.check_model(read.model)
        try:
            prompt = await self._intake.encode_text(
                read.prompt, "prompt", add_special_tokens=read.add_special_tokens is not False
            )
        except (ValueError, _core.OverloadedError, EngineDeadError) as error:
            raise self._intake.calls.refusal(error, _NAMES) from None
        return self._told(prompt, bool(read.return_token_strs))

    async def tokenize_chat(self, request: web.Request) -> web.Response:
        """`POST /tokenize` with `messages`."""
        return self._told(await self._chats.encode_chat_of(request), False)

    def _told(self, prompt: _core.Prompt, with_texts: bool) -> web.Response:
        ids = prompt.token_ids
        texts = [self._tokenizer().id_to_token(identity) for identity in ids] if with_texts else None
        return web.json_response(
            {"count": len(ids), "max_model_len": self._engine.max_model_len, "tokens": ids, "token_strs": texts}
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        """`POST /detokenize`; special tokens are part of the text."""
        parsed = await self._intake.read(request, lambda body: self._intake.decode(DETOKENIZE, body))
        read = parsed.request
        self._intake.check_model(read.model)
        tokenizer = self._tokenizer()
        for place, identity in enumerate(read.tokens):
            if not 0 <= identity < tokenizer.vocab_size:
                raise bad_request(
                    f"tokens[{place}] = {identity}: must be from 0 to {tokenizer.vocab_size - 1}.",
                    "tokens",
                    "token_id_out_of_range",
                )
        return web.json_response({"prompt": tokenizer.decode(read.tokens, skip_special_tokens=False)})

    async def info(self, _: web.Request) -> web.Response:
        """`GET /tokenizer_info`: what of `tokenizer_config.json` clients look for, by its names."""
        tokenizer, template = self._tokenizer(), self._engine.chat_template
        named = tokenizer.named_tokens
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        return web.json_response(
            {name: named.get(name) for name in names}
            | {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": self._engine.max_model_len,
                "chat_template": None if template is None else template.source,
            }
        )

    def _tokenizer(self) -> _core.Tokenizer:
        if self._engine.tokenizer is None:
            raise bad_request("This model has no tokenizer.", code="unsupported_parameter")
        return self._engine.tokenizer
