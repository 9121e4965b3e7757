"""`/openapi.json` and `/docs`."""

import msgspec
from aiohttp import web

from octavo.server.openapi.document import PAGE_HEADERS, openapi, page


class OpenApiRoutes:
    """The handlers. The document is made once: no request changes it."""

    def __init__(self) -> None:
        document = openapi()
        self._document = msgspec.json.encode(document) + b"\n"
        self._page = page(document)

    def routes(self) -> list[web.RouteDef]:
        """What to add to the application."""
        return [web.get("/openapi.json", self.document), web.get("/docs", self.docs)]

    async def document(self, _: web.Request) -> web.Response:
        """`GET /openapi.json`."""
        return web.Response(body=self._document, content_type="application/json")

    async def docs(self, _: web.Request) -> web.Response:
        """`GET /docs`."""
        return web.Response(text=self._page, content_type="text/html", headers=PAGE_HEADERS)
