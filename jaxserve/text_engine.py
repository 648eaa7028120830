"""Engine and text together: prompt in, text deltas out. The server's only way to the model.

Lives on one event loop's thread; long texts are encoded and rendered on another. Knows no HTTP and no scheduler.
Invariant: however a stream ends — finished, stop string, closed early, cancelled — the engine holds nothing of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from jaxserve.core.config import ModelConfig
from jaxserve.core.errors import RequestError
from jaxserve.core.request import EngineInfo, EngineRequest, EngineStats, SequenceOutput
from jaxserve.core.text_request import TextDelta, TextRequest
from jaxserve.text.completion import CompletionText
from jaxserve.text.served_text import ServedText
from jaxserve.text.tokenizer import Tokenizer

INLINE_CHARS_MAX = 2000   # a longer text takes more than about a millisecond: it goes to a thread


class AsyncEnginePort(Protocol):
    """What this needs of `engine.async_engine.AsyncEngine`."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def stats(self) -> EngineStats: ...

    def submit(self, requests: Sequence[EngineRequest], sink: Callable[[SequenceOutput], None]) -> int: ...

    def abort(self, request_ids: Sequence[str]) -> None: ...


class TextEngine:
    """Streams text from an engine. Mutable: knows which requests are live."""

    def __init__(self, engine: AsyncEnginePort, text: ServedText) -> None:
        self._engine, self._text = engine, text
        self._live: set[str] = set()

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._text.tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return self._text.tokenizer is not None

    @property
    def has_chat_template(self) -> bool:
        return self.has_tokenizer and self._text.template.is_defined

    @property
    def default_params(self) -> dict[str, object]:
        return self._text.default_params

    @property
    def max_logprobs(self) -> int:
        return self._text.max_logprobs

    async def stream(
        self, request: TextRequest, told: Callable[[int], None] | None = None
    ) -> AsyncGenerator[list[TextDelta]]:
        """Batches of deltas of all choices, until each has its finish_reason.

        Args:
          told: is called with the number of the engine that took the request.

        Raises RequestError before the engine hears of the request, EngineError where it cannot take it. Deltas that
        piled up while the reader was away come as one for each choice.
        """
        if request.request_id in self._live:
            raise RequestError(f"A request with id {request.request_id!r} is running already; ids must be distinct.")
        self._live.add(request.request_id)
        try:
            requests = await self._prepare(request)
            choices = {sub.request_id: CompletionText(sub, self._text.tokenizer) for sub in requests}
            mailbox = _Mailbox()
            try:
                number = self._engine.submit(requests, mailbox.put)
                if told is not None:
                    told(number)
                while not all(choice.is_finished for choice in choices.values()):
                    given = await mailbox.take()
                    arrived = ((choices[i], outputs) for i, outputs in given.items())
                    deltas = [self._take(choice, outputs) for choice, outputs in arrived if not choice.is_finished]
                    if deltas:   # else only what the engine gave before it heard of a stop string
                        yield deltas
            finally:
                if left := [choice.request_id for choice in choices.values() if not choice.is_finished]:
                    self._engine.abort(left)
        finally:
            self._live.discard(request.request_id)

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text."""
        tokenizer = self._text.need_tokenizer()
        if len(text) <= INLINE_CHARS_MAX:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids, special tokens included unless asked otherwise."""
        vocab_size = self.info.vocab_size
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"Token id {token_id} is out of vocabulary: ids are in [0, {vocab_size - 1}].",
                    param="tokens", value=token_id,
                )
        return self._text.need_tokenizer().decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """What one token adds to a text; empty without a tokenizer."""
        return "" if self._text.tokenizer is None else self._text.tokenizer.token_text(token_id)

    async def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt of a conversation, to be encoded without adding special tokens."""
        self._text.need_tokenizer()

        def render() -> str:
            return self._text.template.render(
                messages, chat_template=chat_template, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, template_kwargs=template_kwargs,
            )

        size = sum(len(content) for message in messages if isinstance(content := message.get("content"), str))
        return render() if size <= 10 * INLINE_CHARS_MAX else await asyncio.to_thread(render)

    async def _prepare(self, request: TextRequest) -> list[EngineRequest]:
        info = self.info
        self._text.check(request, info)
        ids: Sequence[int] | None = request.prompt_token_ids
        if ids is None:
            assert request.prompt is not None
            ids = await self.encode(request.prompt, add_special_tokens=request.add_special_tokens)
        return self._text.engine_requests(request, ids, info)

    def _take(self, choice: CompletionText, outputs: list[SequenceOutput]) -> TextDelta:
        delta = choice.take(outputs)
        if choice.is_finished and outputs[-1].finish_reason is None:
            self._engine.abort([choice.request_id])
        return delta


class _Mailbox:
    """Outputs of one request on their way to its reader. At most max_tokens for each choice, so it is bounded."""

    def __init__(self) -> None:
        self._outputs: dict[str, list[SequenceOutput]] = {}
        self._arrived = asyncio.Event()

    def put(self, output: SequenceOutput) -> None:
        self._outputs.setdefault(output.request_id, []).append(output)
        self._arrived.set()

    async def take(self) -> dict[str, list[SequenceOutput]]:
        """All that came since, in order for each choice; waits for at least one."""
        await self._arrived.wait()
        self._arrived.clear()
        outputs, self._outputs = self._outputs, {}
        return outputs


def open_text_engine(
    engine: AsyncEnginePort, folder: str | Path, config: ModelConfig, chat_template: str | None = None,
    download_dir: str | None = None,
) -> TextEngine:
    """The text engine of a model folder. Raises ModelError or ConfigError. Reads files: not for the event loop."""
    return TextEngine(engine, ServedText.load(Path(folder), config, chat_template, download_dir))
