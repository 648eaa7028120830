"""A model folder's tokenizer: text to ids and back. Reads tokenizer.json with the `tokenizers` library alone.

Knows nothing of chats (`chat_template`) and requests. Why not transformers: docs/decisions/0004.
Invariant: ids equal those of transformers' PreTrainedTokenizerFast on the same folder; as there, tokenizer.json alone
decides whether a bos or eos is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from jaxserve.core.errors import ModelError, RequestError
from jaxserve.text.detokenizer import Detokenizer, PieceDetokenizer, WholeDetokenizer
from jaxserve.text.folder import read_json
from jaxserve.text.pieces import open_pieces

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Encodes, decodes and names tokens. Safe to share between threads once made.

    Attributes:
      config: tokenizer_config.json as it is.
      special_tokens: texts of the named special tokens ("bos_token": "<s>", ...), as chat templates see them.
    """

    def __init__(self, backend: RustTokenizer, config: dict[str, object] | None = None) -> None:
        self.config = config or {}
        self.special_tokens = _special_tokens(self.config)
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        _add_missing(backend, self.config, self.special_tokens)
        self._pieces = open_pieces(backend)

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Raises ModelError where the folder has no tokenizer that can be read."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{folder} has no tokenizer.json. Older formats are converted once with transformers "
                "(AutoTokenizer.from_pretrained(folder).save_pretrained(folder)); --tokenizer names another folder; "
                "--skip-tokenizer-init serves token ids only."
            )
        try:
            backend = RustTokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"tokenizer.json of {folder} cannot be read: {error}") from error
        return cls(backend, read_json(folder / "tokenizer_config.json"))

    @property
    def vocab_size(self) -> int:
        """Tokens that have a text, added ones included; the model's logits may be wider."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def id_max(self, *, with_added_tokens: bool) -> int:
        """The highest id that a text can become; -1 where there are no tokens."""
        return max(self._backend.get_vocab(with_added_tokens=with_added_tokens).values(), default=-1)

    @property
    def eos_token_id(self) -> int | None:
        eos = self.special_tokens.get("eos_token")
        return None if eos is None else self.token_id(eos)

    @property
    def bos_token_id(self) -> int | None:
        bos = self.special_tokens.get("bos_token")
        return None if bos is None else self.token_id(bos)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. Raises RequestError where it is not valid Unicode (a lone surrogate from JSON)."""
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:   # what the library says of text that has no UTF-8 form
            at = next((i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff"), None)
            if at is None:
                raise
            message = f"The prompt is not valid Unicode: a lone surrogate at character {at}."
            raise RequestError(message, param="prompt") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; those that name no token add nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(
        self, *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> Detokenizer:
        """A fresh reader of one sequence."""
        if self._pieces is None:
            return WholeDetokenizer(self._backend, skip_special_tokens=skip_special_tokens)
        return PieceDetokenizer(
            self._pieces,
            skip_special_tokens=skip_special_tokens,
            spaces_between_special_tokens=spaces_between_special_tokens,
        )

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, its leading space included; empty where the id names no token."""
        if self._pieces is None:
            return self._backend.decode([token_id], skip_special_tokens=False).encode()
        return self._pieces.piece(token_id) or b""

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text; a part of a character is U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word at the start of a text and after a space; the second only where it is written alike.

        As in vLLM: the form after a space counts when it has as many tokens and another first one.
        """
        encoded: list[tuple[int, ...]] = []
        for word in words:
            plain = tuple(self.encode(word.lstrip(), add_special_tokens=False))
            spaced = tuple(self.encode(" " + word.lstrip(), add_special_tokens=False))
            encoded += [plain] if plain else []
            if plain and len(spaced) == len(plain) and spaced[0] != plain[0]:
                encoded.append(spaced)
        return tuple(dict.fromkeys(encoded))


def _text_of(token: object) -> str | None:
    """A token in tokenizer_config.json is a string or an object with its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _special_tokens(config: dict[str, object]) -> dict[str, str]:
    extra = config.get("extra_special_tokens")
    named = {name: config.get(name) for name in SPECIAL_NAMES} | (extra if isinstance(extra, dict) else {})
    return {name: text for name, token in named.items() if (text := _text_of(token)) is not None}


def _add_missing(backend: RustTokenizer, config: dict[str, object], special: dict[str, str]) -> None:
    """Tokens that only tokenizer_config.json knows, in the order transformers adds them."""
    known = {token.content: token.special for token in backend.get_added_tokens_decoder().values()}
    missing: list[AddedToken] = []
    declared = config.get("added_tokens_decoder")
    for _, token in sorted((declared if isinstance(declared, dict) else {}).items(), key=lambda item: int(item[0])):
        flags = {name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "special")}
        content = token["content"]
        if content not in known or (flags["special"] and not known[content]):
            missing.append(AddedToken(content, normalized=bool(token.get("normalized", not flags["special"])), **flags))
            known[content] = flags["special"]
    lists = [config.get(name) for name in ("additional_special_tokens", "extra_special_tokens")]
    extra = [text for tokens in lists if isinstance(tokens, list) for token in tokens if (text := _text_of(token))]
    for content in (*special.values(), *extra):
        if content not in known:
            missing.append(AddedToken(content, special=True))
            known[content] = True
    if missing:
        backend.add_tokens(missing)
