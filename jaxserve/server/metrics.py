"""The page at /metrics: engine gauges and counters under vLLM's names, HTTP's, and our own extras as `jaxserve:`.

Engine numbers are read from `EngineStats` when somebody scrapes; nothing is counted twice. Per-request histograms are
in `request_metrics`. Invariant: a registry of its own, so that two servers in one process do not mix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    Summary,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from jaxserve.server.state import OneEnginePort, ServerState

PHASES = ("starting", "downloading", "loading", "compiling", "serving", "ready", "draining", "dead")
_HIGHR = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60,
)


class Metrics:
    """The registry and what is in it from the start."""

    def __init__(self, state: ServerState) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(EngineCollector(state))
        self.http = HttpMetrics(self.registry)
        self.rejections = Counter(
            "vllm:admission_rejections", "Requests refused because a queue was full.", ("model_name", "reason"),
            registry=self.registry,
        )
        for reason in ("max_num_queued_reqs", "max_num_queued_tokens"):
            self.rejections.labels(state.model_name, reason)
        self._state = state

    def page(self) -> bytes:
        """The text format. Per-request series appear, at zero, as soon as the server serves."""
        if self._state.why_not_serving is None:
            self._state.request_metrics  # noqa: B018  made on first access
        return generate_latest(self.registry)


class HttpMetrics:
    """Requests by route, as prometheus-fastapi-instrumentator names them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "http_requests", "Requests by route.", ("method", "status", "handler"), registry=registry
        )
        self._received = Summary("http_request_size_bytes", "Sizes of bodies.", ("handler",), registry=registry)
        self._sent = Summary("http_response_size_bytes", "Sizes of replies.", ("handler",), registry=registry)
        self._highr = Histogram(
            "http_request_duration_highr_seconds", "Latency, finely.", buckets=_HIGHR, registry=registry
        )
        self._seconds = Histogram(
            "http_request_duration_seconds", "Latency by handler.", ("method", "handler"), buckets=(0.1, 0.5, 1),
            registry=registry,
        )

    def note(self, *, handler: str, method: str, status: int, seconds: float, received: int, sent: int) -> None:
        if method not in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"):
            method = "other"   # a label must not be the client's to choose
        self._requests.labels(method, f"{status // 100}xx", handler).inc()
        self._received.labels(handler).observe(received)
        self._sent.labels(handler).observe(sent)
        self._highr.observe(seconds)
        self._seconds.labels(method, handler).observe(seconds)


class EngineCollector(Collector):
    """Turns the newest `EngineStats` of every engine into metric families."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def describe(self) -> list[Metric]:
        return []   # nothing to check for collisions before the engine is there

    def collect(self) -> Iterator[Metric]:
        """Each family once, with the samples of all engines."""
        merged: dict[str, Metric] = {}
        for index, engine in enumerate(self._state.engine.engines):
            for family in EngineFamilies(self._state, engine, str(index)).all():
                if family.name in merged:
                    merged[family.name].samples += family.samples
                else:
                    merged[family.name] = family
        yield from merged.values()


class EngineFamilies:
    """The metric families of one engine, labelled with its number."""

    def __init__(self, state: ServerState, engine: OneEnginePort, number: str) -> None:
        self._state, self._engine, self._number = state, engine, number

    def all(self) -> Iterator[Metric]:
        stats, status = self._engine.stats, self._engine.status
        usage = stats.page_used_count / stats.page_count if stats.page_count else 0.0
        yield self._gauge("vllm:num_requests_running", "Requests in the running batch.", stats.running_count)
        yield self._gauge("vllm:num_requests_waiting", "Requests that wait for a row.", stats.waiting_count)
        yield self._gauges(
            "vllm:num_requests_waiting_by_reason", "Waiting requests by what they wait for.", "reason",
            {"capacity": stats.waiting_count, "deferred": 0},
        )
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV pages in use, 1 is all.", usage)
        yield self._gauges(
            "vllm:engine_sleep_state", "1 for the state the engine is in.", "sleep_state",
            {"awake": 1, "weights_offloaded": 0, "discard_all": 0},
        )
        hits, queries = stats.prefix_hit_tokens, stats.prefix_query_tokens
        for name, help_, value in (
            ("vllm:prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens),
            ("vllm:generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache.", queries),
            ("vllm:prefix_cache_hits", "Tokens found in the prefix cache.", hits),
            ("vllm:external_prefix_cache_queries", "Tokens looked up in an external cache (there is none).", 0),
            ("vllm:external_prefix_cache_hits", "Tokens found in an external cache (there is none).", 0),
            ("vllm:mm_cache_queries", "Media looked up (text only: none).", 0),
            ("vllm:mm_cache_hits", "Media found (text only: none).", 0),
            ("vllm:num_preemptions", "Times a sequence gave up its pages for others.", stats.preemption_count),
            ("vllm:prompt_tokens_cached", "Prompt tokens that needed no computation.", hits),
            ("vllm:corrupted_requests", "Sequences ended for non-finite logits.", stats.corrupted_count),
            ("jaxserve:steps", "Steps of the engine.", stats.step_count),
            ("jaxserve:compilations", "Programs compiled or loaded.", stats.compiled_count),
            ("jaxserve:compilations_after_ready", "Programs compiled while serving: must stay 0.",
             stats.compiled_after_ready_count),
        ):
            yield self._counter(name, help_, value)
        yield self._counters(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where their KV came from.", "source",
            {"local_compute": max(0, stats.prompt_tokens - hits), "local_cache_hit": hits, "external_kv_transfer": 0},
        )
        yield self._counters(
            "vllm:prompt_tokens_cached_by_source", "Cached prompt tokens by kind of memory.", "source",
            {"device": hits, "host": 0, "p2p": 0, "disk": 0, "external_unspecified": 0},
        )
        if accepted_at := stats.draft_accepted_at:
            yield self._counter("vllm:spec_decode_num_drafts", "Drafts verified.", stats.draft_count)
            yield self._counter("vllm:spec_decode_num_draft_tokens", "Tokens drafted.", stats.draft_tokens)
            yield self._counter("vllm:spec_decode_num_accepted_tokens", "Drafted tokens kept.", sum(accepted_at))
            yield self._counters(
                "vllm:spec_decode_num_accepted_tokens_per_pos", "Drafted tokens kept, by place in the draft.",
                "position", {str(place): count for place, count in enumerate(accepted_at)},
            )
        yield self._gauge("jaxserve:step_tokens", "Tokens computed by the newest step.", stats.step_tokens)
        yield self._gauges(
            "jaxserve:phase", "1 for the phase of the engine's life.", "phase",
            {phase: int(phase == status.phase) for phase in PHASES},
        )
        if self._state.text_engine is not None:
            yield self._cache_config()

    def _cache_config(self) -> Metric:
        assert self._state.text_engine is not None
        info = self._state.text_engine.info
        labels = {"block_size": str(info.page_size), "num_gpu_blocks": str(info.page_count)} | info.cache_config
        labels["engine"] = self._number
        family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache's configuration.", labels=tuple(labels))
        family.add_metric(tuple(labels.values()), 1)
        return family

    def _gauge(self, name: str, help_: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, help_, labels=("model_name", "engine"))
        family.add_metric((self._state.model_name, self._number), value)
        return family

    def _gauges(self, name: str, help_: str, label: str, values: dict[str, float]) -> Metric:
        family = GaugeMetricFamily(name, help_, labels=("model_name", "engine", label))
        for key, value in values.items():
            family.add_metric((self._state.model_name, self._number, key), value)
        return family

    def _counter(self, name: str, help_: str, value: float) -> Metric:
        family = CounterMetricFamily(name, help_, labels=("model_name", "engine"))
        family.add_metric((self._state.model_name, self._number), value, created=self._state.created_s)
        return family

    def _counters(self, name: str, help_: str, label: str, values: dict[str, float]) -> Metric:
        family = CounterMetricFamily(name, help_, labels=("model_name", "engine", label))
        for key, value in values.items():
            family.add_metric((self._state.model_name, self._number, key), value, created=self._state.created_s)
        return family
