"""`GET /v1/requests/{id}/timeline`: what happened to a call, by the id that its client got.

The events are the core's, in a ring of its own. Here stands which of them are whose: names of the last
calls, and the key that each came with, for whoever has another finds nothing.
"""

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web

from octavo.server.errors import ApiError
from octavo.server.keys import CALLER

if TYPE_CHECKING:
    from octavo.engine.async_engine import AsyncEngine

MAX_CALLS = 8192
"""Calls whose names are kept: as many requests as the core keeps."""


@dataclass(frozen=True)
class _Named:
    """A call that was submitted."""

    id: str
    request_id: str
    """Its `X-Request-Id`."""
    first: int
    """Number of the first of its requests to the core, of which there is one a prompt."""
    num_prompts: int
    arrival: float
    """On the monotonic clock."""
    created: float
    """On the wall's."""


class Timelines:
    """The names of the last calls."""

    def __init__(self, engine: "AsyncEngine") -> None:
        self._engine = engine
        self._calls: OrderedDict[tuple[str | None, str], _Named] = OrderedDict()

    def remember(
        self, request: web.Request, call_id: str, request_id: str, first: int, num_prompts: int, arrival: float
    ) -> None:
        """A call was submitted. Of several with one name the last counts."""
        created = time.time() - (time.monotonic() - arrival)
        named = _Named(call_id, request_id, first, num_prompts, arrival, created)
        for name in {call_id, request_id}:
            place = (_owner(request), name)
            self._calls.pop(place, None)
            self._calls[place] = named
        while len(self._calls) > 2 * MAX_CALLS:
            self._calls.popitem(last=False)

    def routes(self) -> list[web.RouteDef]:
        """What to add to the application."""
        return [web.get("/v1/requests/{id}/timeline", self.timeline)]

    async def timeline(self, request: web.Request) -> web.Response:
        """`GET /v1/requests/{id}/timeline`."""
        name = request.match_info["id"]
        named = self._calls.get((_owner(request), name))
        now = time.monotonic()
        stories = [] if named is None else self._stories(named, now)
        if named is None or any(story is None for story in stories):
            raise ApiError(
                404,
                "timeline_not_found",
                f"No timeline is kept of the request {name[:100]!r}: it is not known with this key, or the events of "
                "later ones have taken its place.",
                param="id",
            )
        prompts = [_prompt(story, place, named.arrival) for place, story in enumerate(stories) if story is not None]
        return web.json_response(
            {
                "id": named.id,
                "object": "request.timeline",
                "request_id": named.request_id,
                "created": round(named.created, 3),
                "age": _seconds(now - named.arrival),
                "ended": all(prompt["ended"] for prompt in prompts),
                "prompts": prompts,
            }
        )

    def _stories(self, named: _Named, now: float) -> list[dict[str, Any] | None]:
        return [self._engine.core.story(named.first + place, now) for place in range(named.num_prompts)]


def _owner(request: web.Request) -> str | None:
    caller = request.get(CALLER)
    return None if caller is None else caller.key.name


def _prompt(story: dict[str, Any], place: int, arrival: float) -> dict[str, Any]:
    """A prompt's story, with times from the call's arrival on."""
    counts = ("prompt_tokens", "cached_tokens", "output_tokens", "preemptions")
    return {
        "index": place,
        "ended": story["has_ended"],
        **{name: story[name] for name in counts},
        "received": _seconds(story["added"] - arrival),
        "events": [_event(event, arrival) for event in story["events"]],
    }


def _event(event: dict[str, Any], arrival: float) -> dict[str, Any]:
    rest = {name: value for name, value in event.items() if name not in ("event", "choice", "from", "until")}
    if "by" in rest:
        rest["by"] = {cause: _seconds(seconds) for cause, seconds in rest["by"].items()}
    times = {"at": _seconds(event["from"] - arrival), "duration": _seconds(event["until"] - event["from"])}
    return {"event": event["event"], "choice": event["choice"], **times, **rest}


def _seconds(seconds: float) -> float:
    return round(seconds, 6)
