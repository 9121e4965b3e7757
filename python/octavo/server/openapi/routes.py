"""`/openapi.json` and `/docs`."""

import functools

import msgspec
from aiohttp import web

from octavo.server.openapi.document import PAGE_HEADERS, openapi, page


@functools.cache
def written() -> tuple[bytes, str]:
    """The document and its page, made once a process: no flag and no request changes them."""
    document = openapi()
    return msgspec.json.encode(document) + b"\n", page(document)


class OpenApiRoutes:
    """The handlers."""

    def __init__(self) -> None:
        self._document, self._page = written()

    def routes(self) -> list[web.RouteDef]:
        """What to add to the application."""
        return [web.get("/openapi.json", self.document), web.get("/docs", self.docs)]

    async def document(self, _: web.Request) -> web.Response:
        """`GET /openapi.json`."""
        return web.Response(body=self._document, content_type="application/json")

    async def docs(self, _: web.Request) -> web.Response:
        """`GET /docs`."""
        return web.Response(text=self._page, content_type="text/html", headers=PAGE_HEADERS)
