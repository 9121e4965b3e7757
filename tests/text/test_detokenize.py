"""The text of an output: what decoding prompt and output together adds to the decoded prompt, by
`tokenizers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders

from octavo import _core
from tests.text.conftest import BYTE_LEVEL, Pair

PROMPT_LEN, OUTPUT_LEN = 64, 64


class Scripted:
    """A core whose device gives the tokens it is told to."""

    def __init__(self, tokenizer: _core.Tokenizer) -> None:
        self.core = _core.EngineCore(
            num_blocks=64,
            block_size=16,
            kv_windows=[0],
            max_num_seqs=1,
            max_num_batched_tokens=PROMPT_LEN,
            max_model_len=PROMPT_LEN + OUTPUT_LEN,
            vocab_size=tokenizer.vocab_size,
            enable_prefix_caching=False,
            tokenizer=tokenizer,
        )
        self.plan = np.zeros(self.core.plan_bytes, np.uint8)
        self.result = np.zeros(self.core.result_bytes, np.uint8)
        self.core.bind(0, self.plan, self.result)

    def __call__(self, prompt: Sequence[int], output: Sequence[int], skip_special: bool = True) -> str:
        params = _core.SamplingParams(max_tokens=len(output), ignore_eos=True, skip_special_tokens=skip_special)
        request = self.core.add_call([_core.Prompt(prompt)], params, now=0.0)
        for token in output:
            assert self.core.schedule(0, 0.0) is not None
            self.result[:12].view(np.uint32)[:] = 0, 1, token
            self.core.commit(0, 0.0)
        delta = self.core.take(request)
        assert delta is not None and delta.finished
        return delta.choices[0].text


def added_text(oracle: Tokenizer, prompt: list[int], output: list[int], skip_special: bool = True) -> str:
    before = oracle.decode(prompt, skip_special_tokens=skip_special)
    both = oracle.decode(prompt + output, skip_special_tokens=skip_special)
    assert both.startswith(before)
    return both[len(before) :]


@pytest.fixture(scope="module")
def llama(make_pair: Callable[[str], Pair]) -> tuple[Scripted, Pair]:
    pair = make_pair("llama")
    return Scripted(pair[0]), pair


def test_an_output_keeps_the_space_before_its_first_word(llama: tuple[Scripted, Pair]) -> None:
    run, (ours, oracle) = llama
    prompt, whole = (ours.encode_text(text).token_ids for text in ("The right of all", "The right of all people"))
    output = whole[len(prompt) :]
    assert whole[: len(prompt)] == prompt
    assert run(prompt, output) == " people" == added_text(oracle, prompt, output)
    assert run(prompt[:1], whole[1:]) == "The right of all people"  # after <s> alone it is the beginning of the text


def test_a_chat_begins_as_its_tokens_say(llama: tuple[Scripted, Pair]) -> None:
    run, (ours, oracle) = llama
    start, end = (ours.special_tokens[name] for name in ("<s>", "</s>"))
    for prompt, text in (("[INST] all people [/INST]", "Everyone has the right"), ("user\nall\nassistant\n", "all")):
        ids = ours.encode_text(prompt).token_ids
        with_space = ours.encode_text(text, add_special_tokens=False).token_ids
        assert run(ids, [*with_space, end]) == " " + text == added_text(oracle, ids, [*with_space, end])
        without = ours.encode_text(prompt + text).token_ids
        if without[: len(ids)] == ids:
            assert run(ids, without[len(ids) :]) == text
        # Special tokens after the text do not make a new beginning.
        assert run([*ids, end, start], with_space) == " " + text == added_text(oracle, [*ids, end, start], with_space)


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_ids_continue_any_prompt(llama: tuple[Scripted, Pair], data: st.DataObject, skip: bool) -> None:
    run, (ours, oracle) = llama
    ids = st.one_of(st.integers(0, 2), st.integers(259, ours.vocab_size - 1))  # without the single bytes
    prompt = data.draw(st.lists(ids, min_size=1, max_size=6))
    output = data.draw(st.lists(ids, min_size=1, max_size=12))
    assert run(prompt, output, skip) == added_text(oracle, prompt, output, skip)


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "llama", "metaspace", "gemma"])
def test_lines_cut_anywhere_read_on(
    kind: str, make_pair: Callable[[str], Pair], corpus: tuple[str, ...], tmp_path: Path
) -> None:
    if kind in ("metaspace", "gemma"):
        oracle = Tokenizer.from_str(make_pair("llama")[1].to_str())
        oracle.decoder = (
            decoders.Metaspace(prepend_scheme="first", split=False)
            if kind == "metaspace"
            else decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        )
        oracle.save(str(tmp_path / "tokenizer.json"))
        ours = _core.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    else:
        ours, oracle = make_pair(kind)
    run, compared = Scripted(ours), 0
    for line in corpus[:: len(corpus) // 200]:
        ids = oracle.encode(line).ids[:PROMPT_LEN]
        for cut in (1, 2, len(ids) // 2, len(ids) - 1):
            prompt, output = ids[:cut], ids[cut : cut + OUTPUT_LEN]
            if not prompt or not output or "\ufffd" in oracle.decode(prompt) or "\ufffd" in oracle.decode(ids):
                continue
            assert run(prompt, output) == added_text(oracle, prompt, output)
            compared += 1
    assert compared > 300
