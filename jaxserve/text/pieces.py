"""What each token adds to a text, as bytes: a tokenizer's decoder read once, so that decoding is a table look-up.

Decoders are recognised by their JSON: byte-level (GPT-2, Llama 3, Qwen), sentencepiece-like (a replaced space mark,
byte fallback, a stripped leading space: Llama 2, Mistral, Gemma) and those whose output depends on one token only
(none at all, Metaspace, WordPiece). For any other `open_pieces` gives None and the caller decodes whole lists.
Invariant: the pieces of a list of ids, joined and decoded as UTF-8, are what the `tokenizers` library decodes.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PER_BYTE = "jaxserve.per_byte"   # byte fallback writes U+FFFD for each byte, UTF-8 decoders for each broken character


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(PER_BYTE, _replace_each_byte)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPieces:
    """Bytes of each token, looked up at first use.

    Attributes:
      added: content of each token that was added to the vocabulary, by id.  special: those that skipping skips.
      errors: how invalid UTF-8 is replaced.
      strip_max: leading spaces that decoding drops from a whole text.
    """

    added: dict[int, str]
    special: frozenset[int]
    errors: str = "replace"
    strip_max: int = 0
    _token_of: Callable[[int], str | None]
    _inner: Callable[[str], bytes]
    _first: Callable[[str], bytes]
    _cache: dict[int, bytes | None] = field(default_factory=dict)

    def piece(self, token_id: int) -> bytes | None:
        """What this token adds after another one; None where the id names no token."""
        try:
            return self._cache[token_id]
        except KeyError:
            token = self._token_of(token_id)
            piece = self._cache[token_id] = None if token is None else self._inner(token)
            return piece

    def first(self, token_id: int) -> bytes | None:
        """What this token adds at the beginning of a text."""
        token = self._token_of(token_id)
        return None if token is None else self._first(token)


def open_pieces(tokenizer: RustTokenizer) -> TokenPieces | None:
    """The table of a tokenizer, or None where its decoder is of no known kind."""
    spec = _decoder_spec(tokenizer)
    steps = spec["decoders"] if spec is not None and spec["type"] == "Sequence" else [spec] if spec else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _table(tokenizer, _byte_level)
    if kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return _sentencepiece(tokenizer, steps, kinds)
    if not kinds or kinds in (["Metaspace"], ["WordPiece"]):
        return _one_token(tokenizer)
    return None


def _decoder_spec(tokenizer: RustTokenizer) -> dict[str, Any] | None:
    """The decoder as JSON. It is the state that the library pickles; the whole tokenizer's JSON takes a second."""
    decoder = tokenizer.decoder
    return None if decoder is None else json.loads(decoder.__getstate__())


def _table(
    tokenizer: RustTokenizer,
    inner: Callable[[str], bytes],
    first: Callable[[str], bytes] | None = None,
    *,
    errors: str = "replace",
    strip_max: int = 0,
) -> TokenPieces:
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content for token in added.values() if token.special}
    return TokenPieces(
        added={token_id: token.content for token_id, token in added.items()},
        special=frozenset(token_id for token_id, token in added.items() if token.content in special),
        errors=errors, strip_max=strip_max, _token_of=tokenizer.id_to_token, _inner=inner, _first=first or inner,
    )


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:   # an added token, written in plain characters
        return token.encode()


def _sentencepiece(tokenizer: RustTokenizer, steps: list[dict[str, Any]], kinds: list[str]) -> TokenPieces | None:
    """Replace…, ByteFallback?, Fuse?, Strip? in this order, the only one in use; Strip needs the fused text."""
    order = ["Replace", "ByteFallback", "Fuse", "Strip"]
    ranks = [order.index(kind) for kind in kinds]
    if ranks != sorted(ranks) or kinds.count("Strip") > 1 or ("Strip" in kinds and "Fuse" not in kinds):
        return None
    replacements = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]
    strip: dict[str, Any] = steps[-1] if kinds[-1] == "Strip" else {"content": " ", "start": 0, "stop": 0}
    if any(old is None for old, _ in replacements) or strip["content"] != " " or strip["stop"] != 0:
        return None
    has_bytes = "ByteFallback" in kinds

    def inner(token: str) -> bytes:
        for old, new in replacements:
            token = token.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(token) if has_bytes else None
        return bytes([int(match[1], 16)]) if match else token.encode()

    return _table(tokenizer, inner, errors=PER_BYTE, strip_max=strip["start"])


def _one_token(tokenizer: RustTokenizer) -> TokenPieces:
    """Asks the decoder itself: what a token gives alone, and after another one."""
    decoder = tokenizer.decoder
    if decoder is None:
        return _table(tokenizer, lambda token: f" {token}".encode(), str.encode)
    return _table(
        tokenizer,
        lambda token: decoder.decode(["a", token])[1:].encode(),
        lambda token: decoder.decode([token]).encode(),
    )
