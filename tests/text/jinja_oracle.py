"""Chat templates as `transformers` renders them: its own jinja2 environment, at a time of the
test's choice.
"""

from __future__ import annotations

import datetime
import functools
import json
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationTag(Extension):
    tags = frozenset({"generation"})

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> Any:
        return caller()


def environment(now: float) -> ImmutableSandboxedEnvironment:
    """What `transformers.utils.chat_template_utils._compile_jinja_template` sets up."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda form: datetime.datetime.fromtimestamp(now).strftime(form)
    return env


@functools.lru_cache(maxsize=8)
def compiled(source: str, now: float) -> jinja2.Template:
    return environment(now).from_string(source)


def render(source: str, now: float = 0.0, **variables: Any) -> str | None:
    """The rendered text, or None where jinja2 or the Python behind it raises."""
    try:
        return compiled(source, now).render(**variables)
    except Exception:
        return None
