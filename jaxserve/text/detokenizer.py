"""Token ids to text as they come. Knows nothing of stop strings and requests. Mutable: one instance reads one sequence.

Invariant: the texts given, joined, are what decoding all ids at once gives, however the ids arrive, and no character
is given before it is certain. One exception, on purpose: the `tokenizers` library replaces a whole run of
byte-fallback tokens by U+FFFD when one of them is invalid; here the complete characters of such a run stay, because
waiting for the run's end would hold back every newline of a Llama 2 vocabulary.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer as RustTokenizer

from jaxserve.text.pieces import TokenPieces

TAIL_TOKENS = 4            # of a prompt: more bytes than a character has
WINDOW_TAIL_TOKENS = 24
REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Reads one sequence."""

    def prime(self, prompt_ids: Sequence[int]) -> None:
        """Says what came before, so that spaces and split characters join; gives no text."""
        ...

    def feed(self, token_id: int) -> str:
        """The text that is certain with this token."""
        ...

    def flush(self) -> str:
        """What was held back, at the end; split characters become U+FFFD."""
        ...


class PieceDetokenizer:
    """Joins the pieces of a table; a token costs the same at any length."""

    def __init__(
        self, pieces: TokenPieces, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> None:
        self._pieces = pieces
        self._skipped = pieces.special if skip_special_tokens else frozenset()
        self._joins_added = not (skip_special_tokens or spaces_between_special_tokens)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors=pieces.errors)
        self._strip_left = pieces.strip_max
        self._is_first = True
        self._after_added = False

    def prime(self, prompt_ids: Sequence[int]) -> None:
        tail: list[int] = []
        for token_id in reversed(prompt_ids):
            if token_id not in self._skipped and self._pieces.piece(token_id) is not None:
                tail.append(token_id)
                if len(tail) == TAIL_TOKENS:
                    break
        for token_id in reversed(tail):
            self.feed(token_id)

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._pieces.first(token_id) if self._is_first else self._pieces.piece(token_id)
        if piece is None:
            return ""
        self._is_first = False
        added = self._pieces.added.get(token_id) if self._joins_added else None
        if added is not None and self._after_added:
            piece = added.encode()
        self._after_added = added is not None
        return self._stripped(self._decoder.decode(piece))

    def flush(self) -> str:
        return self._stripped(self._decoder.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != " ":
                self._strip_left = 0
            else:
                text, self._strip_left = text[1:], self._strip_left - 1
        return text


class WholeDetokenizer:
    """For decoders of no known kind: decodes the whole list at every token, which is exact and slow for long texts."""

    def __init__(self, tokenizer: RustTokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []
        self._given = 0

    def prime(self, prompt_ids: Sequence[int]) -> None:
        self._ids = list(prompt_ids[-WINDOW_TAIL_TOKENS:])
        self._given = len(self._decode().rstrip(REPLACEMENT))

    def feed(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode()
        return "" if text.endswith(REPLACEMENT) else self._new(text)

    def flush(self) -> str:
        return self._new(self._decode())

    def _new(self, text: str) -> str:
        new, self._given = text[self._given :], max(self._given, len(text))
        return new

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)
