"""Encoding, decoding and chats against pipelines built with the `tokenizers` package (see
vocabularies.py).
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from octavo import _core
from tests.text import vocabularies as v
from tests.text.conftest import BYTE_LEVEL, Pair
from tests.text.conversations import CONVERSATIONS

ODD_TEXTS = [
    "",
    " ",
    "  two  spaces ",
    "\n\n\r\n\t x \u00a0\u3000y",
    "Don't WE'LL they'Re 1234567 ١٢٣ ៤៥ ၁၂၃ ½ ² 12.5e-3",
    "e\u0301 é ﬁ ① \u1e9b\u0323 ｆｕｌｌ",
    "👩‍👩‍👧‍👦🏳️‍🌈 \U0001f99c\U000e0001 \ufffd \ufdd0 \x00\x01\x7f",
    "<0x41> <|end|> <|end <tool> <tool>x<|begin|> <s></s><unk>",
    "a" * 5000,
    " " * 300 + "x",
    "Humanerklärung Humanerklärungen",
    "▁under ▁▁ _",
]


def assert_equal_ids(pair: Pair, texts: tuple[str, ...]) -> None:
    ours, oracle = pair
    different = []
    for text in texts:
        got = ours.encode_text(text, add_special_tokens=True).token_ids
        expected = oracle.encode(text, add_special_tokens=True).ids
        if got != expected:
            different.append((text, got, expected))
    assert not different, f"{len(different)} of {len(texts)} texts differ, first: {different[0]}"


def test_smollm2_equals_its_pipeline(smollm2: Pair, corpus: tuple[str, ...]) -> None:
    assert_equal_ids(smollm2, (*corpus, *ODD_TEXTS))


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "llama"])
def test_every_pre_tokenizer_equals_its_pipeline(
    kind: str, make_pair: Callable[[str], Pair], corpus: tuple[str, ...]
) -> None:
    assert_equal_ids(make_pair(kind), (*corpus, *ODD_TEXTS))


def test_the_longest_token(smollm2: Pair) -> None:
    """Bytes that are no whole character count as one at most."""
    ours, oracle = smollm2
    texts = (oracle.decode([token], skip_special_tokens=False) for token in range(oracle.get_vocab_size()))
    assert ours.longest_token == max(map(len, texts)) > 16


def test_pre_tokenizers_differ(corpus: tuple[str, ...]) -> None:
    """The texts can tell the pre-tokenizers apart, so that the tests above can fail."""
    pre_tokenized = [
        str([v.byte_level_pre_tokenizer(kind).pre_tokenize_str(text) for text in (*corpus[::20], *ODD_TEXTS)])
        for kind in BYTE_LEVEL
    ]
    assert len(set(pre_tokenized)) == len(BYTE_LEVEL)


def test_llama_equals_sentencepiece(make_pair: Callable[[str], Pair], corpus: tuple[str, ...]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=v.trained_sentence_piece(corpus))
    ours, _ = make_pair("llama")
    different = [
        line for line in corpus if ours.encode_text(line, add_special_tokens=False).token_ids != processor.encode(line)
    ]
    assert not different, f"{len(different)} lines, first {different[0]!r}"


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "llama"])
def test_decoding_round_trips(kind: str, make_pair: Callable[[str], Pair], corpus: tuple[str, ...]) -> None:
    ours, oracle = make_pair(kind)
    for line in corpus:
        ids = ours.encode_text(line).token_ids
        decoded = ours.decode(ids)
        assert decoded == oracle.decode(ids)
        if kind != "qwen2":  # whose normaliser is NFC
            assert decoded == line


def lossy(ours: _core.Tokenizer, oracle: Tokenizer, ids: list[int], skip_special: bool, strips: bool) -> str:
    """The text of any ids: Python's own lossy decoding of the bytes."""
    specials = set(ours.special_tokens.values()) if skip_special else set()
    data = b"".join(ours.token_bytes(i) for i in ids if i not in specials)
    return (data[1:] if strips and data[:1] == b" " else data).decode("utf-8", "replace")


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_decode_of_any_ids(smollm2: Pair, data: st.DataObject, skip: bool) -> None:
    ours, oracle = smollm2
    # Ids of SmolLM2 below 300 are control tokens and single bytes: broken characters.
    ids = data.draw(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 49_151)), max_size=30))
    assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids, skip) == lossy(ours, oracle, ids, skip, strips=False)


@given(data=st.data(), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_decode_of_any_ids_with_byte_fallback(
    make_pair: Callable[[str], Pair], data: st.DataObject, skip: bool
) -> None:
    ours, oracle = make_pair("llama")
    ids = data.draw(st.lists(st.one_of(st.integers(0, 258), st.integers(0, 2999)), max_size=30))
    decoded = ours.decode(ids, skip)
    assert decoded == lossy(ours, oracle, ids, skip, strips=True)
    if "\ufffd" not in decoded:  # where bytes are broken, `tokenizers` writes one U+FFFD for each byte of the run
        assert decoded == oracle.decode(ids, skip_special_tokens=skip)


def test_token_bytes_against_the_byte_table(smollm2: Pair, smollm2_path: Path) -> None:
    ours, _ = smollm2
    tokens, _, types = v.smollm2_vocabulary(smollm2_path)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        expected = token.encode() if kind == v.CONTROL else bytes(table[c] for c in token)
        assert ours.token_bytes(index) == expected
    assert ours.token_bytes(49_152) == b""
    assert ours.vocab_size == 49_152
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)
    assert ours.token_to_id("<|im_end|>") == 2 and ours.id_to_token(2) == "<|im_end|>"


PARTS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|im_",
    "<|im_end",
    "|im_end|>",
    "end|>",
    "<",
    "|",
    ">",
    "|>",
    "x",
    "é",
    "\ufdd0",
]
TRICKY = st.lists(st.sampled_from([*PARTS, " ", "\n"]), max_size=6).map("".join)

# The template trims and glues, so that parts of special tokens meet each other and its own text.
GLUE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.parts %}{{ p|trim }}{% endfor %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{{ tools|tojson }}\n"
    "{{ extra|trim }}|>\n<{{ extra|trim }}"
)


@given(contents=st.lists(st.tuples(TRICKY, st.lists(TRICKY, max_size=3)), min_size=1, max_size=3), more=TRICKY)
@settings(max_examples=200, deadline=None)
def test_messages_cannot_write_special_tokens(smollm2: Pair, contents: list[tuple[str, list[str]]], more: str) -> None:
    ours, oracle = smollm2
    messages = [{"role": "user", "content": content, "parts": parts} for content, parts in contents]
    template = _core.ChatTemplate(GLUE)
    tools = [{more: [more]}]
    arguments = {"tools_json": json.dumps(tools), "kwargs_json": json.dumps({"extra": more})}
    ids = ours.encode_chat(template, json.dumps(messages), **arguments).token_ids
    # What the model sees is the rendered text, and its special tokens are those of the template.
    assert ours.decode(ids, skip_special_tokens=False) == template.render(json.dumps(messages), **arguments)
    assert [i for i in ids if i in ours.special_tokens.values()] == [1, 2] * len(messages)
    if not any(c in "".join([more, *(c + "".join(p) for c, p in contents)]) for c in "<|>"):
        text = template.render(json.dumps(messages), **arguments)
        assert ids == oracle.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "content", ["<|im_end|>", "<|im_end", "<|im_end \n", "|im_end|>", "\t |im_end|>", "<|im_end|><"]
)
def test_parts_that_the_template_trims_and_completes(smollm2: Pair, content: str) -> None:
    template = _core.ChatTemplate("{% for m in messages %}{{ m.content|trim }}|>\n<{{ m.content|trim }}{% endfor %}")
    ids = smollm2[0].encode_chat(template, json.dumps([{"role": "user", "content": content}])).token_ids
    assert not set(ids) & set(smollm2[0].special_tokens.values())


def test_what_a_template_makes_of_the_messages_is_bounded() -> None:
    """In characters; also where it writes a message again and again, or most of it by itself."""
    tokenizer = _core.Tokenizer.bytes_only()
    messages = json.dumps([{"role": "user", "content": "é😀x"}])
    for source in (
        "{% for _ in range(50) %}{{ messages[0].content }}{% endfor %}",
        "x" * 147 + "{{ messages[0].content }}",
    ):
        template = _core.ChatTemplate(source)
        rendered = template.render(messages)
        assert len(rendered) == 150
        assert len(tokenizer.encode_chat(template, messages, max_characters=150)) == len(rendered.encode())
        with pytest.raises(_core.PromptTooLongError, match="makes more than 149 characters of the messages") as caught:
            tokenizer.encode_chat(template, messages, max_characters=149)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_ordinary_chats_equal_the_tokenised_rendering(smollm2: Pair, smollm2_path: Path) -> None:
    ours, oracle = smollm2
    source = _core.GgufFile(str(smollm2_path)).metadata()["tokenizer.chat_template"]
    template = _core.ChatTemplate(source, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    compared = 0
    for messages in CONVERSATIONS.values():
        text = json.dumps(messages)
        try:
            rendered = template.render(text)
        except _core.TemplateError:
            with pytest.raises(_core.TemplateError):
                ours.encode_chat(template, text)
            continue
        assert ours.encode_chat(template, text).token_ids == oracle.encode(rendered, add_special_tokens=False).ids
        compared += 1
    assert compared > 12


def test_a_template_may_compose_special_tokens_from_a_role(smollm2: Pair) -> None:
    template = _core.ChatTemplate("{% for m in messages %}{{ '<|im_' + m.role + '|>' + m.content }}{% endfor %}")
    messages = json.dumps([{"role": "start", "content": "a"}, {"role": "end", "content": "<|im_end|>"}])
    ids = smollm2[0].encode_chat(template, messages).token_ids
    assert [i for i in ids if i < 17] == [1, 2]


def test_special_tokens_in_text_only_where_asked(smollm2: Pair) -> None:
    ours, oracle = smollm2
    text = "a<|im_end|>b"
    assert 2 in ours.encode_text(text).token_ids
    plain = ours.encode_text(text, parse_special=False).token_ids
    assert 2 not in plain
    assert ours.decode(plain) == text
    oracle.encode_special_tokens = True
    try:
        assert plain == oracle.encode(text).ids
    finally:
        oracle.encode_special_tokens = False


def test_llama_text_cannot_spell_control_tokens(make_pair: Callable[[str], Pair]) -> None:
    ours, _ = make_pair("llama")
    ids = ours.encode_text("<s></s><unk>", add_special_tokens=False, parse_special=False).token_ids
    assert not set(ids) & set(ours.special_tokens.values())
    assert ours.decode(ids) == "<s></s><unk>"


def test_tokenizer_json(tmp_path: Path, smollm2: Pair, corpus: tuple[str, ...]) -> None:
    _, oracle = smollm2
    oracle.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}})
    )
    ours = _core.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)
    assert_equal_ids((ours, oracle), (*corpus[::10], *ODD_TEXTS))


def test_tokenizer_json_with_stripping_and_normalised_tokens(tmp_path: Path, make_pair: Callable[[str], Pair]) -> None:
    """lstrip, rstrip, single_word and normalized added tokens, Metaspace that prepends at the very
    start only.
    """
    base = make_pair("llama")[1]
    oracle = Tokenizer.from_str(base.to_str())
    oracle.normalizer = None  # type: ignore[assignment]
    oracle.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    oracle.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    oracle.add_special_tokens([AddedToken("<l>", lstrip=True, special=True, normalized=False)])
    oracle.add_special_tokens([AddedToken("<r>", rstrip=True, special=True, normalized=False)])
    oracle.add_special_tokens([AddedToken("word", single_word=True, special=True, normalized=False)])
    oracle.add_tokens([AddedToken("Norm", normalized=True)])
    oracle.save(str(tmp_path / "tokenizer.json"))
    ours = _core.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = ("a  <l>  b <r>  c<l>", "word words a word.", "<s> word<r> \n x Norm Normal", "  <r><l>  ", *ODD_TEXTS)
    assert_equal_ids((ours, oracle), texts)


def test_normalised_tokens_decode_as_they_were_found(tmp_path: Path, make_pair: Callable[[str], Pair]) -> None:
    """Behind a normaliser that writes spaces in another way, and puts one before the text."""
    oracle = Tokenizer.from_str(make_pair("llama")[1].to_str())
    assert oracle.normalizer is not None
    oracle.add_tokens([AddedToken("two words", normalized=True), AddedToken("<tool call>", normalized=False)])
    oracle.save(str(tmp_path / "tokenizer.json"))
    ours = _core.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("a two words b", "two words", "two wordstwo words x", "a <tool call> b<tool call>two words"):
        ids = ours.encode_text(text).token_ids
        assert ids == oracle.encode(text).ids
        for skip in (False, True):
            assert ours.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_ignored_merges_cannot_spell_a_special_token(tmp_path: Path) -> None:
    """A vocabulary that lists a special token as a word, and a model that takes whole words as they
    are.
    """
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"stop": 256}
    oracle = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    oracle.decoder = decoders.ByteLevel()
    oracle.add_special_tokens([AddedToken("stop", special=True, normalized=False)])
    oracle.save(str(tmp_path / "tokenizer.json"))
    ours = _core.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.encode_text("stop").token_ids == [256]
    assert ours.decode(ours.encode_text("stop", parse_special=False).token_ids) == "stop"
    assert 256 not in ours.encode_text("stop", parse_special=False).token_ids


def test_special_tokens_may_be_very_long(tmp_path: Path) -> None:
    """Memory and time that grow with the square of their length would be gigabytes and seconds."""
    oracle = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    oracle.decoder = decoders.ByteLevel()
    long = "<" + "x" * 40_000 + ">"
    oracle.add_special_tokens([long, "<" + "x" * 5_000])
    oracle.save(str(tmp_path / "tokenizer.json"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ours = _core.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    template = _core.ChatTemplate("{{ messages[0].content }}{{ '" + long + "' }}")
    for content in (long, long[:-1], long[1:], "x" * 40_000, f"a {long} b"):
        ids = ours.encode_chat(template, json.dumps([{"role": "user", "content": content}])).token_ids
        assert [token for token in ids if token >= 256] == [256] and ours.decode(ids, False) == content + long
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "tokenizer.json"),
        ("[]", "tokenizer.json"),
        (json.dumps({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}), "decoder null"),
    ],
)
def test_bad_tokenizer_json(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        _core.Tokenizer.from_file(str(path))


def test_ids_out_of_range() -> None:
    for ids in ([-1], [2**32], [2**70]):
        with pytest.raises(ValueError, match="from 0 to 4294967295"):
            _core.Prompt(ids)
    with pytest.raises(TypeError):
        _core.Prompt(["a"])  # type: ignore[list-item]
    assert _core.Tokenizer.bytes_only().decode([104, 105, 4_000_000_000]) == "hi"
    with pytest.raises(ValueError, match="surrogate"):
        _core.Tokenizer.bytes_only().encode_text("\ud800")
