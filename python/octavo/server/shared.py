"""Routes that several protocols have: `/tokenize`, `/invocations`, `/ping`, `/`. The fields of a body
say which protocol it is of, and errors take that one's form.
"""

from aiohttp import web

from octavo import _core
from octavo.server.errors import ERROR_FORM
from octavo.server.intake import Intake
from octavo.server.openai.routes import OpenAIRoutes
from octavo.server.openai.tokenize import TokenizeRoutes
from octavo.server.tgi import errors as tgi_errors
from octavo.server.tgi.routes import TgiRoutes


class SharedRoutes:
    """The handlers."""

    def __init__(self, intake: Intake, openai: OpenAIRoutes, tgi: TgiRoutes) -> None:
        self._intake = intake
        self._openai = openai
        self._tokenize = TokenizeRoutes(intake, openai)
        self._tgi = tgi

    def routes(self) -> list[web.RouteDef]:
        """What to add to the application."""
        return [
            web.post("/tokenize", self.tokenize),
            web.post("/detokenize", self._tokenize.detokenize),
            web.get("/tokenizer_info", self._tokenize.info),
            web.post("/invocations", self.invocations),
            web.get("/version", self.version),
            web.get("/load", self.load),
        ]

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        """TGI's with `inputs`, vLLM's with `prompt` or `messages`."""
        fields = await self._intake.fields(request)
        if "inputs" in fields:
            request[ERROR_FORM] = tgi_errors.response
            return await self._tgi.tokenize(request)
        if "messages" in fields:
            return await self._tokenize.tokenize_chat(request)
        return await self._tokenize.tokenize_text(request)

    async def invocations(self, request: web.Request) -> web.StreamResponse:
        """SageMaker's one route: TGI's with `inputs`, else a chat or a completion."""
        fields = await self._intake.fields(request)
        if "inputs" in fields:
            request[ERROR_FORM] = tgi_errors.response
            return await self._tgi.either(request)
        if "messages" in fields:
            return await self._openai.chat_completions(request)
        return await self._openai.completions(request)

    async def version(self, _: web.Request) -> web.Response:
        """`GET /version`."""
        return web.json_response({"version": _core.__version__})

    async def load(self, _: web.Request) -> web.Response:
        """`GET /load`: calls that are being answered."""
        return web.json_response({"server_load": self._intake.calls.active})
