"""A text engine without an engine: tokens are characters, answers are known, and what was aborted is remembered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from jaxserve.core.config import EngineConfig, FrontendConfig, ModelConfig, ServeConfig
from jaxserve.core.errors import RequestError
from jaxserve.core.request import EngineInfo, EngineStats, SequenceTimes
from jaxserve.core.sampling_params import check_against
from jaxserve.core.text_request import PositionLogprobs, TextDelta, TextLogprob, TextRequest
from jaxserve.server.app import ServerState

VOCAB = 256
LEN_MAX = 64
ANSWER = "Paris is nice. "  # repeated for as long as it takes; choice i starts at character i


@dataclass
class FakeStatus:
    phase: str = "ready"
    detail: str = ""

    @property
    def is_serving(self) -> bool:
        return self.phase in ("serving", "ready")


@dataclass
class FakeEngine:
    """What the server sees of an engine's life."""

    status: FakeStatus = field(default_factory=FakeStatus)
    stats: EngineStats = field(default_factory=EngineStats)
    profiled: list[str | None] = field(default_factory=list)
    others: list[FakeEngine] = field(default_factory=list)

    @property
    def engines(self) -> list[FakeEngine]:
        return [self, *self.others]

    async def profile(self, folder: str | None) -> None:
        if (folder is None) == (self.profiled[-1:] in ([], [None])):
            raise RequestError("no trace is running: start one first" if folder is None else "a trace is running")
        self.profiled.append(folder)


class FakeTextEngine:
    """Answers from ANSWER, one token a batch and choice. `pause_s` is the time a step takes; `hold` stops it."""

    def __init__(self) -> None:
        self.has_tokenizer = True
        self.has_chat_template = True
        self.max_logprobs = 20
        self.default_params: dict[str, object] = {}
        self.info = EngineInfo(
            model="/models/fake",
            vocab_size=VOCAB,
            max_model_len=LEN_MAX,
            page_size=16,
            page_count=100,
            dtype="float32",
            row_count=8,
            cache_config={"cache_dtype": "auto", "gpu_memory_utilization": "0.92", "enable_prefix_caching": "True"},
        )
        self.stats = EngineStats()
        self.engine_number = 0
        self.pause_s = 0.0
        self.hold = asyncio.Event()
        self.hold.set()
        self.fail_before: Exception | None = None
        self.fail_after: tuple[int, Exception | str] | None = None  # after so many steps: raise, or an error delta
        self.seen: list[TextRequest] = []
        self.rendered: list[dict[str, object]] = []
        self.live: set[str] = set()
        self.aborted: list[str] = []

    async def stream(
        self, request: TextRequest, told: Callable[[int], None] | None = None
    ) -> AsyncIterator[list[TextDelta]]:
        ids = self._prepare(request)
        if told is not None:
            told(self.engine_number)
        assert request.request_id not in self.live
        self.seen.append(request)
        self.live.add(request.request_id)
        try:
            async for batch in self._batches(request, ids):
                yield batch
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted.append(request.request_id)
            raise
        finally:
            self.live.discard(request.request_id)

    def _prepare(self, request: TextRequest) -> tuple[int, ...]:
        if self.fail_before is not None:
            raise self.fail_before
        ids = request.prompt_token_ids or tuple((request.prompt or "").encode())
        if request.truncate_prompt_tokens is not None:
            keep = LEN_MAX - 1 if request.truncate_prompt_tokens == -1 else request.truncate_prompt_tokens
            ids = ids[-keep:]
        if len(ids) > LEN_MAX:
            raise RequestError(
                f"This model's maximum context length is {LEN_MAX} tokens. However, your prompt contains {len(ids)} "
                "input tokens, which exceeds this limit even without any output tokens. Please reduce the input "
                "prompt.",
                param="input_tokens",
                value=len(ids),
            )
        check_against(request.params, vocab_size=VOCAB, logprobs_max=self.max_logprobs)
        return ids

    async def _batches(self, request: TextRequest, ids: tuple[int, ...]) -> AsyncIterator[list[TextDelta]]:
        params, begin_s = request.params, time.monotonic()
        count = min(params.max_tokens or LEN_MAX, LEN_MAX - len(ids))
        texts = [(ANSWER * 9)[choice:] for choice in range(params.n)]
        for step in range(count):
            await self.hold.wait()
            await asyncio.sleep(self.pause_s)
            if self.fail_after is not None and step == self.fail_after[0]:
                error = self.fail_after[1]
                if isinstance(error, Exception):
                    raise error
                yield [TextDelta(choice=0, finish_reason="error", error=error)]
                return
            deltas, over = [], False
            for choice, text in enumerate(texts):
                piece, stop = text[step], next((s for s in params.stop if text[: step + 1].endswith(s)), None)
                reason = "stop" if stop else "length" if step == count - 1 else None
                over = over or (reason is not None and choice == params.n - 1)
                deltas.append(self._delta(request, ids, choice, step, piece, reason, stop, begin_s))
            yield deltas
            if over:
                return

    def _delta(self, request, ids, choice, step, piece, reason, stop, begin_s) -> TextDelta:
        params, is_first = request.params, step == 0
        scored = None
        if is_first and params.prompt_logprobs is not None:
            scored = (None, *(position(token, params.prompt_logprobs) for token in ids[1:]))
        return TextDelta(
            choice=choice,
            text="" if stop and not params.include_stop_str_in_output else piece,
            token_ids=(ord(piece),),
            logprobs=(position(ord(piece), params.logprobs),) if params.logprobs is not None else (),
            finish_reason=reason,
            stop_reason=stop,
            prompt_token_ids=ids if is_first else None,
            prompt_logprobs=scored,
            cached_token_count=2 if is_first else 0,
            times=SequenceTimes(
                arrival_s=request.arrival_s,
                scheduled_s=begin_s,
                first_token_s=begin_s + 0.01,
                last_token_s=begin_s + 0.01 * (step + 1),
            ),
        )

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [1] * add_special_tokens + list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def token_text(self, token: int) -> str:
        return bytes([token]).decode(errors="replace")

    async def render_chat(
        self, messages, *, chat_template, add_generation_prompt, continue_final_message, template_kwargs
    ):
        self.rendered.append(
            {
                "messages": messages,
                "add": add_generation_prompt,
                "continue": continue_final_message,
                "kwargs": template_kwargs,
            }
        )
        return "|".join(f"{m['role'][0]}:{m['content']}" for m in messages) + ("|a:" if add_generation_prompt else "")


def position(token: int, top: int) -> PositionLogprobs:
    """The token at -0.5 and its neighbours below; the last alternative is impossible."""
    near = [candidate(token + i, -0.5 - i) for i in range(top)]
    if near:
        near[-1] = candidate(token + top - 1, -0.5 if top == 1 else float("-inf"))
    return PositionLogprobs(token=candidate(token, -0.5), top=tuple(near))


def candidate(token: int, logprob: float) -> TextLogprob:
    raw = bytes([token % VOCAB])
    return TextLogprob(token_id=token, text=raw.decode(errors="replace"), utf8=raw, logprob=logprob, rank=1)


def make_state(*, names: tuple[str, ...] = ("tiny",), **frontend: object) -> ServerState:
    config = ServeConfig(
        engine=EngineConfig(model=ModelConfig(model="/models/fake")),
        frontend=FrontendConfig(served_model_name=names, **frontend),  # type: ignore[arg-type]
    )
    return ServerState(config=config, engine=FakeEngine(), text_engine=FakeTextEngine())  # type: ignore[arg-type]
