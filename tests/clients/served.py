"""What the files `use_*.py` know of the servers that they are run against. Imports nothing but the
standard library: each of them runs in the environment of its client.
"""

import json
import os

REAL = os.environ.get("OCTAVO_REAL", "")
"""A server of the default model, whose template has been given a place for tools."""
SCRIPTED = os.environ.get("OCTAVO_SCRIPTED", "")
"""One that answers `SUNNY` to everything, and with a call of the first tool where there are tools and
the last message is not a tool's.
"""
SCRIPTED_COMMAND = json.loads(os.environ.get("OCTAVO_SCRIPTED_COMMAND", "[]"))
"""What starts another one of that kind: it prints its address, and ends when its input does."""
MODEL = "smollm2"
"""What both serve."""

CAPITAL = "What is the capital of France?"
WEATHER = "What is the weather in Paris?"
SUNNY = "It is sunny in Paris."
CALLED = {"city": "Paris"}
"""The arguments of that call."""

CITY_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "enum": ["Paris", "Rome", "Berlin"]},
        "districts": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "districts"],
    "additionalProperties": False,
}
"""For answers under a schema."""
WEATHER_SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
"""For the arguments of a tool."""
