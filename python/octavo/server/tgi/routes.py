"""TGI's routes: `/generate`, `/generate_stream`, `/`, `/info`, `/chat_tokenize`, and its part of
`/tokenize` and `/invocations`.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from aiohttp import web

from octavo import _core
from octavo.errors import EngineDeadError
from octavo.server.body import Form
from octavo.server.calls import SERVER_SENT_EVENTS, Call
from octavo.server.intake import Intake
from octavo.server.openai.routes import OpenAIRoutes
from octavo.server.tgi.schemas import GenerateRequest, Parameters, TokenizeRequest, empty_inputs

_INPUTS = frozenset({"inputs"})
GENERATE = Form(GenerateRequest, _INPUTS, _INPUTS, {}, "inputs", {"parameters": Parameters})
TOKENIZE = Form(TokenizeRequest, _INPUTS, _INPUTS, {}, "inputs")
_NAMES = {"prompt": "inputs", "max_tokens": "max_new_tokens", "n": "best_of"}


class TgiRoutes:
    """The handlers."""

    def __init__(self, intake: Intake, chats: OpenAIRoutes) -> None:
        self._intake = intake
        self._engine = intake.engine
        self._chats = chats

    def routes(self) -> list[web.RouteDef]:
        """What to add to the application; errors on these have TGI's form."""
        return [
            web.post("/", self.either),
            web.post("/generate", self.generate),
            web.post("/generate_stream", self.generate_stream),
            web.get("/info", self.info),
            web.post("/chat_tokenize", self.chat_tokenize),
        ]

    async def generate(self, request: web.Request) -> web.StreamResponse:
        """`POST /generate`: an object."""
        return await self._serve(request, stream=False)

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        """`POST /generate_stream`."""
        return await self._serve(request, stream=True)

    async def either(self, request: web.Request) -> web.StreamResponse:
        """`POST /`, and `/invocations` with `inputs`: `stream` decides; an answer in one piece is a
        list.
        """
        return await self._serve(request, stream=None)

    async def _serve(self, request: web.Request, *, stream: bool | None) -> web.StreamResponse:
        arrival = time.monotonic()
        as_list = stream is None
        parsed = await self._intake.read(request, lambda body: self._intake.decode(GENERATE, body))
        read = parsed.request
        streams = bool(read.stream) if stream is None else stream
        parameters = read.parameters or Parameters()
        self._intake.ignored(request, parsed.ignored + parameters.ignored)
        parameters.check(streams, self._intake.config, self._intake.max_input_tokens)
        if not read.inputs:
            raise empty_inputs()
        seed = parameters.drawn_seed()
        wanted = parameters.wanted_structure()
        try:
            params = parameters.to_sampling_params(streams, seed, wanted.params)
            prompt = await self._prompt(read.inputs, parameters.truncate)
            grammar = await self._engine.compile_grammar(wanted.params)
        except (ValueError, _core.OverloadedError, EngineDeadError) as error:
            raise self._intake.calls.refusal(error, {**_NAMES, **(wanted.names or {})}) from None
        call = Call(
            id=uuid.uuid4().hex,
            prompts=[prompt],
            names=_NAMES,
            params=params,
            grammar=grammar,
            max_tokens=parameters.max_new_tokens,
            reply_format=_core.ReplyFormat.tgi(
                stream=streams,
                details=bool(parameters.details),
                as_list=as_list,
                top_n_tokens=parameters.top_n_tokens or 0,
                seed=seed,
                prompt=read.inputs if parameters.return_full_text else "",
            ),
            stream=streams,
            arrival=arrival,
            stream_form=replace(
                SERVER_SENT_EVENTS, headers={**SERVER_SENT_EVENTS.headers, **self._computed(len(read.inputs))}
            ),
            answer_headers=self._times(arrival, len(read.inputs)),
        )
        return await self._intake.calls.serve(request, call)

    async def _prompt(self, inputs: str, truncate: int | None) -> _core.Prompt:
        """As tokens; with `truncate` the last ones of them."""
        if truncate is None:
            return await self._intake.encode_text(inputs, "inputs")
        prompt = await self._engine.encode_text(inputs)
        return self._intake.shortened(prompt, truncate)

    def _computed(self, characters: int) -> dict[str, str]:
        """Headers of every answer: on what, and for how long a text."""
        return {"x-compute-type": self._engine.config.device, "x-compute-characters": str(characters)}

    def _times(self, arrival: float, characters: int) -> Callable[[_core.ReplyDelta], Mapping[str, str]]:
        """Headers of an answer in one piece: whole milliseconds, but for `x-compute-time`."""

        def headers(delta: _core.ReplyDelta) -> Mapping[str, str]:
            (progress,) = delta.requests
            added, scheduled, _, last = progress.times
            now, tokens = time.monotonic(), progress.num_output_tokens
            spans = {
                "total": now - arrival,
                "validation": added - arrival,
                "queue": scheduled - added,
                "inference": last - scheduled,
            }
            return {
                **self._computed(characters),
                "x-compute-time": f"{now - arrival:.6f}",
                **{f"x-{name}-time": str(max(0, round(1000 * span))) for name, span in spans.items()},
                "x-time-per-token": str(max(0, round(1000 * (last - scheduled) / max(1, tokens)))),
                "x-prompt-tokens": str(progress.num_prompt_tokens),
                "x-generated-tokens": str(tokens),
            }

        return headers

    async def info(self, _: web.Request) -> web.Response:
        """`GET /info`."""
        config, length = self._engine.config, self._engine.max_model_len
        return web.json_response(
            {
                "model_id": self._engine.model_name,
                "model_sha": None,
                "model_pipeline_tag": "text-generation",
                "max_concurrent_requests": (config.max_num_seqs or 0) + config.max_waiting,
                "max_best_of": self._intake.config.max_best_of,
                "max_stop_sequences": self._intake.config.max_stop_sequences,
                "max_input_tokens": self._intake.max_input_tokens,
                "max_total_tokens": length,
                "validation_workers": 2,
                "max_client_batch_size": 1,
                "router": "octavo",
                "version": _core.__version__,
                "sha": None,
                "docker_label": None,
            }
        )

    async def tokenize(self, request: web.Request) -> web.Response:
        """TGI's `POST /tokenize`: a token's id, its text, and where in the input it stands."""
        parsed = await self._intake.read(request, lambda body: self._intake.decode(TOKENIZE, body))
        read = parsed.request
        if not read.inputs:
            raise empty_inputs()
        try:
            prompt = await self._intake.encode_text(
                read.inputs, "inputs", add_special_tokens=read.add_special_tokens is not False
            )
        except (ValueError, _core.OverloadedError, EngineDeadError) as error:
            raise self._intake.calls.refusal(error, _NAMES) from None
        return web.json_response(await self._engine.run_beside(lambda: self._tokens(prompt, read.inputs)))

    async def chat_tokenize(self, request: web.Request) -> web.Response:
        """`POST /chat_tokenize`: what the template makes of a chat, as text and as tokens."""
        prompt = await self._chats.encode_chat_of(request)
        text = self._tokenizer().decode(prompt.token_ids, skip_special_tokens=False)
        tokens = await self._engine.run_beside(lambda: self._tokens(prompt, text))
        return web.json_response({"tokenize_response": tokens, "templated_text": text})

    def _tokens(self, prompt: _core.Prompt, text: str) -> list[dict[str, Any]]:
        """A token that is no part of the text takes none of it."""
        tokenizer, encoded = self._tokenizer(), text.encode()
        tokens, at, character = [], 0, 0
        for identity in prompt.token_ids:
            piece = tokenizer.token_bytes(identity)
            if at == 0 and not encoded.startswith(piece) and piece.startswith(b" "):
                piece = piece[1:]  # which some tokenizers put before a text
            start, shown = character, piece.decode(errors="replace")
            if piece and encoded.startswith(piece, at):
                at += len(piece)
                character += sum(byte & 0xC0 != 0x80 for byte in piece)  # a character counts with its first byte
                shown = text[start:character]
            tokens.append({"id": identity, "text": shown, "start": start, "stop": character})
        return tokens

    def _tokenizer(self) -> _core.Tokenizer:
        if self._engine.tokenizer is None:
            raise empty_inputs()
        return self._engine.tokenizer
