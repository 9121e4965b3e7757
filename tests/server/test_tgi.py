"""TGI's routes, as its documents and huggingface_hub's client have them."""

from typing import Any

import pytest

from tests.server.conftest import Served

GREEDY = {"inputs": "Hi"}


async def generated(served: Served, **parameters: Any) -> Any:
    status, body = await served.post("/generate", {**GREEDY, "parameters": parameters})
    assert status == 200, body
    return body


async def stream(served: Served, path: str, body: dict[str, Any]) -> list[Any]:
    """Events of a stream, as the hub's client reads them: `data:` with or without a space."""
    import json

    async with served.http.post(served.url + path, json=body) as response:
        assert (response.status, response.content_type) == (200, "text/event-stream")
        names = ("x-compute-type", "x-compute-characters", "x-accel-buffering")
        assert [response.headers[name] for name in names] == ["cpu", str(len(body["inputs"])), "no"]
        text = (await response.read()).decode()
    assert text.endswith("\n\n") and "[DONE]" not in text
    return [json.loads(line.removeprefix("data:")) for line in text.split("\n\n")[:-1] if line.startswith("data:")]


async def test_text_and_headers(served: Served) -> None:
    async with served.http.post(served.url + "/generate", json=GREEDY) as response:
        assert await response.json() == {"generated_text": "Hello world"}
        headers = response.headers
    assert (headers["x-compute-type"], headers["x-prompt-tokens"], headers["x-generated-tokens"]) == ("cpu", "2", "12")
    assert headers["x-compute-characters"] == "2"
    for name in ("total", "validation", "queue", "inference"):
        assert int(headers[f"x-{name}-time"]) >= 0
    assert float(headers["x-compute-time"]) > 0 and int(headers["x-time-per-token"]) >= 0


async def test_details(served: Served) -> None:
    served.engine.script.answer = b"ab"
    body = await generated(served, details=True, top_n_tokens=1)
    entry = {"id": 97, "text": "a", "logprob": -0.5, "special": False}
    assert body["generated_text"] == "ab"
    details = body["details"]
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("eos_token", 3, None)
    assert details["prefill"] == [] and details["tokens"][0] == entry
    assert [token["text"] for token in details["tokens"]] == ["a", "b", ""]
    assert details["top_tokens"][0] == [entry]
    assert "best_of_sequences" not in details
    assert (await generated(served, details=True, max_new_tokens=1))["details"]["finish_reason"] == "length"


async def test_the_prompts_tokens(served: Served) -> None:
    prefill = (await generated(served, details=True, decoder_input_details=True))["details"]["prefill"]
    assert [(token["id"], token["text"]) for token in prefill] == [(72, "H"), (105, "i")]
    assert prefill[0]["logprob"] is None and prefill[1]["logprob"] < 0


async def test_stop_sequences_are_part_of_the_text(served: Served) -> None:
    body = await generated(served, details=True, stop=["lo"])
    assert body["generated_text"] == "Hello" and body["details"]["finish_reason"] == "stop_sequence"


async def test_the_best_of_several(served: Served) -> None:
    body = await generated(served, details=True, best_of=2, do_sample=True)
    assert len(body["details"]["best_of_sequences"]) == 1
    assert body["details"]["best_of_sequences"][0]["generated_text"] == "Hello world"
    assert isinstance(body["details"]["seed"], int)


async def test_the_prompt_before_the_text_and_the_end_of_a_long_one(served: Served) -> None:
    assert (await generated(served, return_full_text=True))["generated_text"] == "HiHello world"
    async with served.http.post(
        served.url + "/generate", json={"inputs": "A long prompt", "parameters": {"truncate": 3}}
    ) as response:
        assert response.headers["x-prompt-tokens"] == "3"


async def test_streams(served: Served) -> None:
    served.engine.script.answer = b"ab"
    events = await stream(served, "/generate_stream", {**GREEDY, "parameters": {"details": True}})
    assert [event["index"] for event in events] == [1, 2, 3]
    assert [event["token"]["text"] for event in events] == ["a", "b", ""]
    assert [event["generated_text"] for event in events] == [None, None, "ab"]
    assert events[-1]["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 3,
        "seed": None,
        "input_length": 2,
    }
    assert (await stream(served, "/generate_stream", GREEDY))[-1]["details"] is None


@pytest.mark.parametrize("path", ["/", "/invocations"])
async def test_the_field_decides_where_one_route_has_both_forms(served: Served, path: str) -> None:
    assert await served.post(path, GREEDY) == (200, [{"generated_text": "Hello world"}])
    assert (await stream(served, path, {**GREEDY, "stream": True}))[-1]["generated_text"] == "Hello world"


async def test_info_and_probes(served: Served) -> None:
    _, info = await served.get("/info")
    assert info["model_id"] == "org/tiny" and info["max_total_tokens"] == 512 and info["max_input_tokens"] == 511
    for path in ("/", "/ping", "/health"):
        assert await served.get(path) == (200, None)  # an empty body, as vLLM and TGI have it
    browser = {"Accept": "text/html,application/xhtml+xml;q=0.9"}
    async with served.http.get(served.url + "/", headers=browser) as response:
        assert response.url.path == "/docs" and response.content_type == "text/html"
    assert (await served.get("/load"))[1] == {"server_load": 0}
    assert set((await served.get("/version"))[1]) == {"version"}


async def test_tokens_of_a_text(served: Served) -> None:
    _, tokens = await served.post("/tokenize", {"inputs": "aé"})
    assert tokens == [
        {"id": 97, "text": "a", "start": 0, "stop": 1},
        {"id": 195, "text": "é", "start": 1, "stop": 2},
        {"id": 169, "text": "", "start": 2, "stop": 2},
    ]
    _, body = await served.post("/chat_tokenize", {"messages": [{"role": "user", "content": "Hi"}]})
    assert body["templated_text"] == "<user>Hi"
    assert [token["text"] for token in body["tokenize_response"]] == list("<user>Hi")


async def test_a_field_without_effect_is_counted(served: Served) -> None:
    await served.post("/generate", parameters(typical_p=0.95, top_k=1))
    assert await served.metric("octavo:unknown_fields_total") == 1


async def test_the_same_route_as_vllm_has_it(served: Served) -> None:
    expected = {"count": 2, "max_model_len": 512, "tokens": [72, 105], "token_strs": None}
    assert await served.post("/tokenize", {"prompt": "Hi"}) == (200, expected)
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    assert (await served.post("/tokenize", chat))[1]["count"] == len("<user>Hi")
    assert await served.post("/detokenize", {"tokens": [72, 105]}) == (200, {"prompt": "Hi"})
    status, body = await served.post("/detokenize", {"tokens": [-1]})
    assert (status, body["error"]["code"]) == (400, "token_id_out_of_range")
    assert (await served.post("/invocations", chat))[1]["object"] == "chat.completion"
    assert (await served.post("/invocations", {"prompt": "Hi"}))[1]["object"] == "text_completion"


def parameters(**fields: Any) -> dict[str, Any]:
    return {**GREEDY, "parameters": fields}


# (name, body, status, what the message names)
BAD = [
    ("K1 missing", {}, 422, "inputs"),
    ("K1 null", {"inputs": None}, 422, "inputs"),
    ("K1 empty", {"inputs": ""}, 422, "inputs"),
    ("K1 number", {"inputs": 5}, 422, "inputs"),
    ("K2 null parameters", {"inputs": "Hi", "parameters": None}, 200, ""),
    *((f"K3 {number}", parameters(max_new_tokens=number), 422, "max_new_tokens") for number in (0, -1, 10**9)),
    *((f"K7 {number}", parameters(truncate=number), 422, "truncate") for number in (0, 512)),
    ("K8 stops", parameters(stop=["a"] * 33), 422, "stop"),
    ("K9 type", parameters(grammar={"type": "xml", "value": ""}), 422, "grammar.type"),
    ("K9 no value", parameters(grammar={"type": "json"}), 422, "grammar.value"),
    ("K9 json", parameters(grammar={"type": "json", "value": {"type": "list"}}), 422, "grammar.value"),
    ("K9 regex", parameters(grammar={"type": "regex", "value": "("}), 422, "grammar.value"),
    ("K9 good", parameters(grammar={"type": "regex", "value": "Hello"}), 200, ""),
    ("K15 no JSON", b"{", 422, "JSON"),
    ("temperature", parameters(temperature=0.0), 422, "temperature"),
    *((f"top_p {share}", parameters(top_p=share), 422, "top_p") for share in (0, 1.0, -1.0)),
    ("top_n_tokens", parameters(top_n_tokens=6), 422, "top_n_tokens"),
    ("watermark", parameters(watermark=True), 422, "watermark"),
    ("no watermark", parameters(watermark=False, adapter_id=None, grammar=None, stop=[]), 200, ""),
    ("typical_p", parameters(typical_p=1.0), 422, "typical_p"),
    ("typical_p without effect", parameters(typical_p=0.95, top_k=1), 200, ""),
    ("best_of 3", parameters(best_of=3, do_sample=True), 422, "best_of"),
    ("best_of of greedy", parameters(best_of=2), 422, "best_of"),
    ("type", parameters(max_new_tokens="5"), 422, "max_new_tokens"),
    ("long", {"inputs": "a" * 600}, 422, "maximum context length"),
    ("very long", {"inputs": "a" * 100_000}, 422, "maximum context length"),
]


@pytest.mark.parametrize(("body", "status", "named"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
async def test_bad_requests(served: Served, body: Any, status: int, named: str) -> None:
    got, answer = await served.post("/generate", body)
    assert got == status, answer
    if status == 422:
        assert set(answer) == {"error", "error_type"} and answer["error_type"] == "validation"
        assert named in answer["error"]
    assert await served.post("/generate", GREEDY) == (200, {"generated_text": "Hello world"})


@pytest.mark.parametrize("fields", [{"best_of": 2, "do_sample": True}, {"decoder_input_details": True}], ids=str)
async def test_what_cannot_be_streamed(served: Served, fields: dict[str, Any]) -> None:
    status, body = await served.post("/generate_stream", parameters(**fields))
    assert (status, body["error_type"]) == (422, "validation") and "streaming" in body["error"]


async def test_failures_have_the_form_of_tgi(served: Served) -> None:
    served.engine.script.fail_after = 0
    status, body = await served.post("/generate", GREEDY)
    assert (status, body["error_type"]) == (424, "generation")
    served.engine.script.fail_after = 1
    events = await stream(served, "/generate_stream", GREEDY)
    assert events[0]["token"]["text"] == "H" and events[-1]["error_type"] == "generation"
    status, body = await served.post("/tokenize", {"inputs": ""})
    assert (status, body["error_type"]) == (422, "validation")


async def test_a_full_queue_has_the_form_of_tgi(served_narrowly: Served) -> None:
    import asyncio

    served = served_narrowly
    served.engine.hold()
    waiting = [asyncio.ensure_future(served.post("/generate", GREEDY)) for _ in range(12)]
    done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    status, body = done.pop().result()
    assert (status, body["error_type"]) == (429, "overloaded")
    served.engine.release()
    await asyncio.gather(*waiting)
