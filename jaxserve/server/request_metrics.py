"""Histograms over requests: names, labels and buckets are vLLM's. Fed with deltas while a request runs.

Times are the engine's own (`SequenceTimes`), so a slow client does not look like a slow engine.
Invariant: every choice of a request that started ends in `request_success` exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram

from jaxserve.core.request import EngineStats, SequenceTimes
from jaxserve.core.text_request import TextDelta, TextRequest

TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
PHASE_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)
STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
N_BUCKETS = (1, 2, 5, 10, 20)
PREEMPTION_BUCKETS = (0, 1, 2, 5, 10, 20, 50, 100)
FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")


class HasStats(Protocol):
    """An engine, as far as its newest numbers."""

    @property
    def stats(self) -> EngineStats: ...


def token_buckets(tokens_max: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... as far as `tokens_max`."""
    series = (mantissa * 10**power for power in range(10) for mantissa in (1, 2, 5))
    return tuple(value for value in series if value <= tokens_max) or (1,)


class RequestMetrics:
    """All histograms of one model, and the counter of how requests ended, of each engine. Mutable."""

    def __init__(
        self, registry: CollectorRegistry, model_name: str, max_model_len: int, engine_count: int = 1
    ) -> None:
        families: dict[str, Histogram] = {}
        ended = Counter(
            "vllm:request_success", "Finished requests by reason.", ("model_name", "engine", "finished_reason"),
            registry=registry,
        )

        def histogram(engine: str, name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
            if name not in families:
                families[name] = Histogram(
                    f"vllm:{name}", help_, ("model_name", "engine"), buckets=buckets, registry=registry
                )
            return families[name].labels(model_name, engine)

        self.engines = tuple(
            EngineRequestMetrics(
                partial(histogram, str(number)),
                {reason: ended.labels(model_name, str(number), reason) for reason in FINISH_REASONS},
                token_buckets(max_model_len),
            )
            for number in range(engine_count)
        )


class EngineRequestMetrics:
    """Those of the requests that one engine took. Mutable."""

    def __init__(
        self, histogram: Callable[[str, str, tuple[float, ...]], Histogram], ended: Mapping[str, Counter],
        tokens: tuple[int, ...],
    ) -> None:
        self.ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self.itl = histogram("inter_token_latency_seconds", "Between tokens.", ITL_BUCKETS)
        self.tpot = histogram("request_time_per_output_token_seconds", "Mean time between tokens.", ITL_BUCKETS)
        self.e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", PHASE_BUCKETS)
        self.queue = histogram("request_queue_time_seconds", "Waiting.", PHASE_BUCKETS)
        self.inference = histogram("request_inference_time_seconds", "Running.", PHASE_BUCKETS)
        self.prefill = histogram("request_prefill_time_seconds", "Running, up to the first token.", PHASE_BUCKETS)
        self.decode = histogram("request_decode_time_seconds", "First to last token.", PHASE_BUCKETS)
        self.prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens a request.", tokens)
        self.generation_tokens = histogram("request_generation_tokens", "Generated tokens a request.", tokens)
        self.generation_max = histogram(
            "request_max_num_generation_tokens", "Generated tokens of a request's longest choice.", tokens
        )
        self.params_n = histogram("request_params_n", "n.", N_BUCKETS)
        self.params_max_tokens = histogram("request_params_max_tokens", "max_tokens.", tokens)
        self.step_tokens = histogram("iteration_tokens_total", "Tokens a step.", STEP_BUCKETS)
        self.preemptions = histogram("request_num_preemptions", "Preemptions a request.", PREEMPTION_BUCKETS)
        self.computed = histogram("request_prefill_kv_computed_tokens", "Prompt tokens computed, not cached.", tokens)
        self.ended = ended
        self._step_seen = 0

    def note_step(self, stats: EngineStats) -> None:
        if stats.step_count != self._step_seen:
            self._step_seen = stats.step_count
            self.step_tokens.observe(stats.step_tokens)


class RequestWatch:
    """Follows one request from its first delta to its end. Mutable."""

    def __init__(self, metrics: RequestMetrics, request: TextRequest) -> None:
        self._all = metrics
        self._metrics = metrics.engines[0]
        self._request = request
        self._token_counts: dict[int, int] = {}
        self._newest_s: dict[int, float] = {}
        self._cached: dict[int, int] = {}
        self._ended: set[int] = set()
        self._prompt_len = 0

    def taken_by(self, engine: int) -> None:
        """Before the first delta."""
        self._metrics = self._all.engines[engine]

    def note_step(self, engines: Sequence[HasStats]) -> None:
        """Called with every batch of deltas: the newest step's tokens of each engine, once a step."""
        for metrics, engine in zip(self._all.engines, engines, strict=True):
            metrics.note_step(engine.stats)

    def note(self, deltas: list[TextDelta]) -> None:
        for delta in deltas:
            if delta.prompt_token_ids is not None:
                self._prompt_len = len(delta.prompt_token_ids)
                self._cached[delta.choice] = delta.cached_token_count
            if delta.token_ids:
                self._note_tokens(delta)
            if delta.finish_reason is not None:
                self._note_end(delta)

    def abort(self) -> None:
        """The client has gone: whatever did not finish never will."""
        for choice in set(range(self._request.params.n)) - self._ended:
            self._ended.add(choice)
            self._metrics.ended["abort"].inc()

    def close(self) -> None:
        """The stream is over. A request that was refused counts nowhere."""
        metrics = self._metrics
        if not self._prompt_len:
            return
        metrics.generation_max.observe(max(self._token_counts.values(), default=0))
        metrics.params_n.observe(self._request.params.n)
        if self._request.params.max_tokens is not None:
            metrics.params_max_tokens.observe(self._request.params.max_tokens)

    def _note_tokens(self, delta: TextDelta) -> None:
        before_s, now_s = self._newest_s.get(delta.choice), delta.times.last_token_s
        self._token_counts[delta.choice] = self._token_counts.get(delta.choice, 0) + len(delta.token_ids)
        self._newest_s[delta.choice] = now_s
        if before_s is None:
            self._metrics.ttft.observe(max(0.0, delta.times.first_token_s - delta.times.arrival_s))
            return
        each_s = max(0.0, now_s - before_s) / len(delta.token_ids)
        for _ in delta.token_ids:
            self._metrics.itl.observe(each_s)

    def _note_end(self, delta: TextDelta) -> None:
        assert delta.finish_reason is not None
        metrics, count = self._metrics, self._token_counts.get(delta.choice, 0)
        self._ended.add(delta.choice)
        metrics.ended[delta.finish_reason].inc()
        metrics.prompt_tokens.observe(self._prompt_len)
        metrics.generation_tokens.observe(count)
        metrics.preemptions.observe(delta.preemption_count)
        metrics.computed.observe(max(0, self._prompt_len - self._cached.get(delta.choice, 0)))
        _observe_times(metrics, delta.times, count)


def _observe_times(metrics: EngineRequestMetrics, times: SequenceTimes, token_count: int) -> None:
    """The phases of one finished sequence; phases it never reached are left out."""
    if not times.scheduled_s:
        return
    metrics.queue.observe(max(0.0, times.scheduled_s - times.arrival_s))
    if not times.first_token_s:
        return
    decode_s = max(0.0, times.last_token_s - times.first_token_s)
    metrics.e2e.observe(max(0.0, times.last_token_s - times.arrival_s))
    metrics.inference.observe(max(0.0, times.last_token_s - times.scheduled_s))
    metrics.prefill.observe(max(0.0, times.first_token_s - times.scheduled_s))
    metrics.decode.observe(decode_s)
    if token_count > 1:
        metrics.tpot.observe(decode_s / (token_count - 1))
