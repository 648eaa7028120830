"""Token ids in any order, decoded one by one, give what decoding them at once gives."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from jaxserve.text.stop_strings import StopStrings
from jaxserve.text.tokenizer import Tokenizer
from tests.text_fixtures import byte_level, sentencepiece, words

KINDS = {
    "byte-level": Tokenizer(byte_level()),
    "sentencepiece": Tokenizer(sentencepiece()),
    "plain": Tokenizer(words(None)),
    "metaspace": Tokenizer(words(decoders.Metaspace())),
    "wordpiece": Tokenizer(words(decoders.WordPiece())),
    "unknown": Tokenizer(words(decoders.Sequence([decoders.Metaspace(), decoders.Fuse()]))),
}


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Random ids, one beyond the vocabulary included."""
    return st.lists(st.integers(0, KINDS[kind].vocab_size), max_size=24)


def incremental(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None, **options: bool) -> str:
    reader = tokenizer.detokenizer(**options)
    reader.prime(prompt or [])
    return "".join([*map(reader.feed, ids), reader.flush()])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sentencepiece"])
@settings(max_examples=150, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_equals_decoding_at_once(kind: str, data: st.DataObject, skip: bool) -> None:
    tokenizer, ids = KINDS[kind], data.draw(ids_of(kind))
    assert incremental(tokenizer, ids, skip_special_tokens=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


def byte_fallback_text(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> str:
    """All bytes decoded at once, one U+FFFD for each that belongs to no character."""
    special = {tokenizer.token_id("<s>"), tokenizer.token_id("</s>")} if skip else set()
    joined = b"".join(tokenizer.token_bytes(token_id) for token_id in ids if token_id not in special)
    text = re.sub("[\udc80-\udcff]", "\ufffd", joined.decode(errors="surrogateescape"))
    return text.removeprefix(" ")


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_byte_fallback(data: st.DataObject, skip: bool) -> None:
    tokenizer, ids = KINDS["sentencepiece"], data.draw(ids_of("sentencepiece"))
    text = incremental(tokenizer, ids, skip_special_tokens=skip)
    assert text == byte_fallback_text(tokenizer, ids, skip=skip)
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    if whole.count("\ufffd") == text.count("\ufffd"):  # no run mixes valid and invalid bytes
        assert text == whole


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=20), kind=st.sampled_from(["byte-level", "sentencepiece"]))
def test_text_survives(text: str, kind: str) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert incremental(tokenizer, ids, skip_special_tokens=False) == tokenizer.decode(ids, skip_special_tokens=False)
    assert kind != "byte-level" or tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "plain", "metaspace", "wordpiece"])
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_prompt_changes_only_where_the_text_begins(kind: str, data: st.DataObject) -> None:
    """What comes after a prompt joins it as if both had been read at once."""
    tokenizer, prompt, ids = KINDS[kind], data.draw(ids_of(kind)), data.draw(ids_of(kind))
    reader = tokenizer.detokenizer()
    before = "".join(map(reader.feed, prompt))
    both = before + "".join([*map(reader.feed, ids), reader.flush()])
    assert incremental(tokenizer, ids, prompt) == both[len(before) :]


@settings(max_examples=250, deadline=None)
@given(
    parts=st.lists(st.text("abc", max_size=4), max_size=10),
    strings=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    included=st.booleans(),
    cuts=st.integers(1, 3),
)
def test_stop_strings_do_not_depend_on_the_split(
    parts: list[str], strings: list[str], included: bool, cuts: int
) -> None:
    """Against the definition: the match that ends first, of those the longest."""
    text = "".join(parts)
    ends = [
        (end, end - len(s), s) for s in strings for end in range(len(s), len(text) + 1) if text[end - len(s) : end] == s
    ]
    best = min(ends, default=None)
    expected = text if best is None else text[: best[0] if included else best[1]]
    for pieces in (parts, [text[i : i + cuts] for i in range(0, len(text), cuts)]):
        stops, given_text, found = StopStrings(strings, included=included), "", None
        for piece in pieces:
            new, found = stops.push(piece)
            given_text += new
            assert expected.startswith(given_text), "gave away a part of the stop string"
            if found is not None:
                break
        given_text += "" if found is not None else stops.flush()
        assert (given_text, found) == (expected, None if best is None else best[2])
