"""dspy: an `LM`, an answer under a schema, and a prediction through its chat adapter."""

import json

import dspy
from served import CAPITAL, CITY_SCHEMA, MODEL, REAL, SCRIPTED, SUNNY

lm = dspy.LM(
    f"openai/{MODEL}", api_base=REAL + "/v1", api_key="none", temperature=0, max_tokens=200, cache=False, num_retries=0
)
first = lm(CAPITAL)[0]
assert "Paris" in (first if isinstance(first, str) else first["text"])

schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY_SCHEMA, "strict": True}}
formatted = lm(CAPITAL, response_format=schema)[0]
text = formatted if isinstance(formatted, str) else formatted["text"]
assert json.loads(text)["name"] in ("Paris", "Rome", "Berlin")

# The adapter finds its field in an answer that has the adapter's form, or says that it does not.
speaker = dspy.LM(f"openai/{MODEL}", api_base=SCRIPTED + "/v1", api_key="none", cache=False, num_retries=0)
dspy.configure(lm=speaker, adapter=dspy.ChatAdapter(use_json_adapter_fallback=False))
try:
    dspy.Predict("question -> answer")(question=CAPITAL)
except dspy.utils.exceptions.AdapterParseError as error:
    assert SUNNY in str(error)
