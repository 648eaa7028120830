"""Tiny tokenizers of the real kinds, and an engine that says what it is told to; no files, no model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from jaxserve.core.request import EngineInfo, EngineRequest, EngineStats, SequenceOutput, TokenLogprob
from jaxserve.text.chat_template import ChatTemplate
from jaxserve.text.served_text import ServedText
from jaxserve.text.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level() -> RustTokenizer:
    """The 256 bytes, a few merges, and added tokens: special, plain, with a space, with a letter of the alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("Ã", "©"), ("ð", "Ł")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = RustTokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens(["<tool>", "two words", "naïve"])
    return tokenizer


def sentencepiece() -> RustTokenizer:
    """Like Llama 2's: a space mark, byte fallback, one leading space stripped."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for piece in ("▁", "▁a", "b", "▁hello", "lo", "é", "▁▁", "\ufffd", "c▁d", "h", "e", "l", "o", "a", "ab"):
        vocab[piece] = len(vocab)
    tokenizer = RustTokenizer(
        models.BPE(vocab=vocab, merges=[("l", "o"), ("a", "b")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return tokenizer


def words(decoder: decoders.Decoder | None) -> RustTokenizer:
    """A vocabulary of words, for decoders that look at one token at a time."""
    texts = ["<unk>", "a", "b", "##c", "▁a", "▁", "▁▁b", ".", "'s", "é"]
    tokenizer = RustTokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token="<unk>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_tokens([AddedToken("<x>", special=True), AddedToken("<y>", special=False)])
    return tokenizer


def served_text(
    backend: RustTokenizer | None = None, *, template: str | None = CHATML, eos: Sequence[int] = (), **fields: object
) -> ServedText:
    tokenizer = Tokenizer(backend or byte_level(), {"eos_token": "<|im_end|>"} if backend is None else {})
    return ServedText(
        tokenizer=tokenizer,
        template=ChatTemplate({} if template is None else {"default": template}, tokenizer.special_tokens),
        eos_token_ids=tuple(eos),
        **fields,  # type: ignore[arg-type]
    )


def output(request_id: str, *token_ids: int, end: str | None = None, **fields: object) -> SequenceOutput:
    return SequenceOutput(request_id=request_id, token_ids=token_ids, finish_reason=end, **fields)  # type: ignore[arg-type]


def scored(token_id: int, top: Sequence[int] = ()) -> TokenLogprob:
    return TokenLogprob(
        token_id=token_id,
        logprob=-0.5,
        rank=1,
        top_ids=tuple(top),
        top_logprobs=tuple(-0.5 - i for i in range(len(top))),
    )


@dataclass
class FakeAsyncEngine:
    """Remembers what it was asked; `say` is the engine speaking."""

    max_model_len: int = 64
    vocab_size: int = 400
    sinks: dict[str, Callable[[SequenceOutput], None]] = field(default_factory=dict)
    requests: list[EngineRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    submitted: asyncio.Event = field(default_factory=asyncio.Event)
    stats: EngineStats = field(default_factory=EngineStats)
    refuses: Exception | None = None

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            model="fake",
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            page_size=4,
            page_count=16,
            dtype="float32",
            row_count=4,
        )

    def submit(self, requests: Sequence[EngineRequest], sink: Callable[[SequenceOutput], None]) -> int:
        if self.refuses is not None:
            raise self.refuses
        self.requests.extend(requests)
        self.sinks.update({request.request_id: sink for request in requests})
        self.submitted.set()
        return 1

    def abort(self, request_ids: Sequence[str]) -> None:
        self.aborted.extend(request_ids)
        for request_id in request_ids:
            self.sinks.pop(request_id, None)

    def say(self, *outputs: SequenceOutput) -> None:
        for one in outputs:
            sink = self.sinks[one.request_id]
            if one.finish_reason is not None:
                del self.sinks[one.request_id]
            sink(one)
