"""The offline engine: prompts in a list, results in a list, on the very same engine as the server's.

Runs in the caller's thread, without HTTP and without an event loop. Knows no scheduler and no device.
Invariant: a call leaves nothing of its requests in the engine, also when it raises; `close` leaves nothing running.
"""

from __future__ import annotations

import itertools
import logging
import time
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import ConfigError, EngineBusyError, RequestError
from jaxserve.core.request import EngineInfo, EngineRequest, EngineStats, SequenceOutput
from jaxserve.core.sampling_params import SamplingParams
from jaxserve.core.text_request import TextRequest
from jaxserve.flags import engine_config_from_kwargs
from jaxserve.generation_bar import GenerationBar
from jaxserve.outputs import ChoiceCollector, RequestOutput, request_output
from jaxserve.text.completion import CompletionText
from jaxserve.text.generation_config import to_params
from jaxserve.text.served_text import ServedText

if TYPE_CHECKING:
    from jaxserve.launch import LocalEngine
    from jaxserve.text.tokenizer import Tokenizer

logger = logging.getLogger("jaxserve.llm")

QUEUED_PER_ROW_MAX = 4   # sequences in the engine for each of its rows; the rest of a long list waits here
STALL_S = 0.002          # work waits for programs that are still being compiled

Prompt = str | Sequence[int] | Mapping[str, object]
Params = SamplingParams | Sequence[SamplingParams] | None
Conversation = Sequence[Mapping[str, object]]


class LLM:
    """A model, ready to generate. Mutable: owns an engine until `close`; one caller at a time.

    Args:
      model: a local folder, or a name on the hub.
      flags: the server's engine flags with underscores, such as `dtype="float32"`, `max_model_len=4096`,
        `chat_template="template.jinja"`. Raises ConfigError for others.
    """

    def __init__(self, model: str, **flags: object) -> None:
        from jaxserve.launch import build_engine
        from jaxserve.progress import ConsoleProgress

        chat_template = flags.get("chat_template")
        config = engine_config_from_kwargs(model, **flags)
        if config.parallel.data_parallel_size > 1:
            raise ConfigError("data_parallel_size: several engines are behind `jaxserve serve` only; use 1 here")
        self._start(build_engine(config, progress=ConsoleProgress()), config, chat_template)

    @classmethod
    def from_engine(cls, engine: LocalEngine, config: EngineConfig, chat_template: str | None = None) -> Self:
        """Around an engine that was built already, which it then owns."""
        llm = cls.__new__(cls)
        llm._start(engine, config, chat_template)
        return llm

    def _start(self, engine: LocalEngine, config: EngineConfig, chat_template: object) -> None:
        self._engine: LocalEngine | None = engine
        self._config = config
        self._ids = itertools.count()
        try:
            template = None if chat_template is None else str(chat_template)
            self._text = ServedText.load(engine.folder, config.model, template, config.load.download_dir)
            engine.compile_rest()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the device; nothing keeps running. Again is harmless."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    @property
    def info(self) -> EngineInfo:
        return self._live_engine().info

    def get_tokenizer(self) -> Tokenizer:
        """Raises RequestError under skip_tokenizer_init."""
        return self._text.need_tokenizer()

    def get_metrics(self) -> EngineStats:
        """Gauges now and counters since start."""
        return self._live_engine().stats

    def get_default_sampling_params(self) -> SamplingParams:
        """What `generate` uses where none are given: the model's own advice over OpenAI's defaults."""
        return to_params(self._text.default_params)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Completes prompts, in order.

        Args:
          prompts: one or many of: a text, token ids, {"prompt": text}, {"prompt_token_ids": ids}.
          sampling_params: for all, or one a prompt.
          use_tqdm: show a progress bar on a terminal.
        Raises RequestError for the first request at fault, before any work is done. A request that fails while running
        is returned with finish_reason "error", and logged.
        """
        return self._run([_prompt_fields(prompt) for prompt in _prompt_list(prompts)], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[RequestOutput]:
        """Answers one conversation or many; see `generate`."""
        self._text.need_tokenizer()
        one = not messages or isinstance(messages[0], Mapping)
        conversations: Sequence[Conversation] = [messages] if one else messages  # type: ignore[list-item, assignment]
        fields = []
        for conversation in conversations:
            prompt = self._text.template.render(
                conversation, chat_template=chat_template, add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, template_kwargs=chat_template_kwargs,
            )
            fields.append({"prompt": prompt, "add_special_tokens": False})
        return self._run(fields, sampling_params, use_tqdm)

    def _run(self, fields: list[dict[str, object]], sampling_params: Params, shows_bar: bool) -> list[RequestOutput]:
        engine = self._live_engine()
        params = self._params_list(sampling_params, len(fields))
        work = deque(self._job(own, one) for own, one in zip(fields, params, strict=True))
        results: dict[str, RequestOutput] = {}
        order = [job.request.request_id for job in work]
        run = _Run(engine, self._text, work)
        try:
            with GenerationBar(len(work), shown=shows_bar) as bar:
                for job in run.finished(bar):
                    results[job.request.request_id] = job.result()
        finally:
            run.close()
        return [results[request_id] for request_id in order]

    def _job(self, fields: dict[str, object], params: SamplingParams) -> _Job:
        """Checks and encodes one prompt."""
        text, info = self._text, self.info
        if text.tokenizer is None and params.detokenize:
            params = params.with_(detokenize=False)   # ids in, ids out
        request = TextRequest(
            request_id=str(next(self._ids)), params=params, arrival_s=time.monotonic(), **fields,  # type: ignore[arg-type]
        )
        text.check(request, info)
        ids: Sequence[int] | None = request.prompt_token_ids
        if ids is None:
            ids = text.need_tokenizer().encode(request.prompt or "", add_special_tokens=request.add_special_tokens)
        text.engine_requests(request, ids, info)   # raises where the length does not fit
        return _Job(request, array("i", ids))

    def _params_list(self, params: Params, count: int) -> Sequence[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.get_default_sampling_params()] * count
        if len(params) != count:
            raise RequestError(f"sampling_params must be one, or one a prompt: got {len(params)} for {count} prompts.")
        return params

    def _live_engine(self) -> LocalEngine:
        if self._engine is None:
            raise RequestError("this LLM was closed")
        return self._engine


@dataclass(slots=True)
class _Job:
    """One prompt: its sequences to submit, and what came of those submitted. Mutable.

    `prompt_ids` are 4 bytes each while the prompt waits: a list may be far longer than what runs.
    """

    request: TextRequest
    prompt_ids: array[int]
    waiting: deque[EngineRequest] = field(default_factory=deque)
    live: set[str] = field(default_factory=set)
    choices: list[ChoiceCollector] = field(default_factory=list)

    def result(self) -> RequestOutput:
        return request_output(
            self.request.request_id, self.request.prompt, self.choices,
            with_logprobs=self.request.params.logprobs is not None,
        )


class _Run:
    """Drives the engine over a list of jobs, few of them in the engine at once. Mutable."""

    def __init__(self, engine: LocalEngine, text: ServedText, jobs: deque[_Job]) -> None:
        self._loop, self._info, self._text, self._jobs = engine.loop, engine.info, text, jobs
        self._live: dict[str, tuple[_Job, CompletionText]] = {}
        self._live_max = QUEUED_PER_ROW_MAX * max(1, self._info.row_count)

    def finished(self, bar: GenerationBar) -> Iterator[_Job]:
        """Jobs as they end."""
        while self._jobs or self._live:
            self._fill()
            outputs: dict[str, list[SequenceOutput]] = {}
            for output in self._loop.step():
                outputs.setdefault(output.request_id, []).append(output)
            for request_id, given in outputs.items():
                if request_id not in self._live:   # ended by a stop string
                    continue
                job = self._take(request_id, given, bar)
                if not job.live and not job.waiting:
                    bar.finish_request()
                    yield job
            if self._loop.is_stalled:
                time.sleep(STALL_S)

    def close(self) -> None:
        """Takes back what is still in the engine, and lets the step in flight land so that its pages are free."""
        if self._live:
            self._loop.abort(list(self._live))
            self._live.clear()
        while self._loop.has_work:
            self._loop.step()

    def _fill(self) -> None:
        while self._jobs and len(self._live) < self._live_max:
            job = self._jobs[0]
            if not job.choices and not job.waiting:
                job.waiting.extend(self._text.engine_requests(job.request, job.prompt_ids, self._info))
            request = job.waiting[0]
            try:
                self._loop.add(request)
            except EngineBusyError:   # --max-num-queued-reqs; the list waits here instead
                if not self._live:
                    raise
                return
            job.waiting.popleft()
            job.live.add(request.request_id)
            job.choices.append(ChoiceCollector())
            self._live[request.request_id] = job, CompletionText(request, self._text.tokenizer)
            if not job.waiting:
                self._jobs.popleft()

    def _take(self, request_id: str, outputs: list[SequenceOutput], bar: GenerationBar) -> _Job:
        job, completion = self._live[request_id]
        delta = completion.take(outputs)
        job.choices[delta.choice].add(delta)
        bar.add_tokens(len(delta.token_ids), prompt=len(delta.prompt_token_ids or ()))
        if completion.is_finished:
            if outputs[-1].finish_reason is None:
                self._loop.abort([request_id])
            if delta.error is not None:
                logger.error("request %s failed: %s", request_id, delta.error)
            job.live.discard(request_id)
            del self._live[request_id]
        return job


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt is a list of one; a list of integers is one prompt."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _prompt_fields(prompt: Prompt) -> dict[str, object]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if not isinstance(prompt, Mapping):
        return {"prompt_token_ids": tuple(prompt)}
    known = {"prompt", "prompt_token_ids", "cache_salt"}
    for name in prompt.keys() - known:
        raise RequestError(f"unknown key {name!r} in a prompt; it may hold {', '.join(sorted(known))}.")
    if "prompt_token_ids" in prompt:
        salt = {"cache_salt": prompt["cache_salt"]} if "cache_salt" in prompt else {}
        return {"prompt_token_ids": tuple(prompt["prompt_token_ids"]), **salt}  # type: ignore[arg-type]
    return dict(prompt)
