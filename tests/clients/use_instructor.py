"""instructor: typed answers by tools, by JSON and by schema, whole and in parts."""

from typing import Literal

import instructor
import openai
from pydantic import BaseModel, Field
from served import CAPITAL, MODEL, REAL


class City(BaseModel):
    """A city."""

    name: Literal["Paris", "Rome"]
    districts: int = Field(ge=1, le=99)


MESSAGES = [{"role": "user", "content": CAPITAL}]
plain = openai.OpenAI(base_url=REAL + "/v1", api_key="none", max_retries=0)
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(plain, mode=mode)
    city = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_model=City, max_tokens=128, max_retries=0, temperature=0
    )
    assert isinstance(city, City), mode
parts = list(
    instructor.from_openai(plain, mode=instructor.Mode.TOOLS).chat.completions.create_partial(
        model=MODEL, messages=MESSAGES, response_model=City, max_tokens=128, temperature=0
    )
)
assert parts[-1].name in ("Paris", "Rome") and 1 <= parts[-1].districts <= 99
