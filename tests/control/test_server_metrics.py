"""What dashboards and gateways read: names, labels, buckets and values at /metrics, and the line they grep."""

import asyncio
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxserve.core.request import EngineStats
from jaxserve.server.request_metrics import token_buckets
from jaxserve.server.stats_log import log_stats, stats_line
from tests.control.server_calls import call, chat, complete
from tests.control.server_fakes import FakeEngine, make_state

HISTOGRAMS = [
    f"vllm:{name}"
    for name in (
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_inference_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_max_num_generation_tokens",
        "request_params_n",
        "request_params_max_tokens",
        "iteration_tokens_total",
        "request_num_preemptions",
        "request_prefill_kv_computed_tokens",
    )
]
EXPECTED = [
    *(name + end for name in HISTOGRAMS for end in ("_bucket", "_count", "_sum", "_created")),
    *(
        f"vllm:{name}"
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "num_requests_waiting_by_reason",
            "kv_cache_usage_perc",
            "engine_sleep_state",
            "cache_config_info",
        )
    ),
    *(
        f"vllm:{name}{end}"
        for end in ("_total", "_created")
        for name in (
            "prompt_tokens",
            "generation_tokens",
            "request_success",
            "prefix_cache_queries",
            "prefix_cache_hits",
            "external_prefix_cache_queries",
            "external_prefix_cache_hits",
            "mm_cache_queries",
            "mm_cache_hits",
            "num_preemptions",
            "prompt_tokens_cached",
            "prompt_tokens_by_source",
            "prompt_tokens_cached_by_source",
            "admission_rejections",
            "corrupted_requests",
        )
    ),
    "jaxserve:compilations_after_ready_total",
    "jaxserve:compilations_total",
    "jaxserve:steps_total",
    "jaxserve:step_tokens",
    "jaxserve:phase",
    "http_requests_total",
    "http_request_duration_seconds_bucket",
    "http_request_duration_highr_seconds_bucket",
    "http_request_size_bytes_sum",
    "http_response_size_bytes_count",
    "process_resident_memory_bytes",
    "python_info",
]


@pytest.fixture
def state():
    return make_state()


def samples(state) -> dict[str, dict[tuple, float]]:
    """name -> labels -> value."""
    reply = call(state, "GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    found: dict[str, dict[tuple, float]] = {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_requests_are_counted_under_the_engine_that_took_them(state):
    state.engine.others = [FakeEngine(stats=EngineStats(step_count=3, step_tokens=7))]
    for number, count in ((1, 2), (0, 1)):
        state.text_engine.engine_number = number
        for _ in range(count):
            call(state, "POST", "/v1/completions", json={"prompt": "x", "max_tokens": 3})
    for engine, count in (("0", 1), ("1", 2)):
        for name in ("request_success_total", "time_to_first_token_seconds_count", "request_generation_tokens_count"):
            assert total(state, f"vllm:{name}", engine=engine) == count, (name, engine)
    assert total(state, "vllm:iteration_tokens_total_sum", engine="1") == 7, "one step, its own tokens"
    assert total(state, "vllm:iteration_tokens_total_count", engine="0") == 0


def total(state, name: str, **labels: str) -> float:
    return sum(value for key, value in samples(state)[name].items() if labels.items() <= dict(key).items())


def test_every_expected_name_is_there_from_the_start(state):
    call(state, "GET", "/health")
    found = samples(state)
    assert [name for name in EXPECTED if name not in found] == []
    for name, series in found.items():
        if name.startswith("vllm:") and name not in ("vllm:cache_config_info",) and "admission" not in name:
            assert all({("engine", "0"), ("model_name", "tiny")} <= set(key) for key in series), name


def test_before_serving_the_engine_numbers_are_there(state):
    state.text_engine, state.engine.status.phase = None, "loading"
    found = samples(state)
    assert found["jaxserve:phase"][(("engine", "0"), ("model_name", "tiny"), ("phase", "loading"))] == 1
    assert "vllm:num_requests_running" in found and "vllm:cache_config_info" not in found


def test_engine_stats_are_shown(state):
    state.engine.stats = EngineStats(
        running_count=3,
        waiting_count=2,
        page_count=200,
        page_used_count=50,
        prefix_query_tokens=100,
        prefix_hit_tokens=40,
        prompt_tokens=100,
        generation_tokens=7,
        preemption_count=1,
        step_count=9,
        step_tokens=64,
        compiled_count=12,
        compiled_after_ready_count=0,
        corrupted_count=1,
    )
    assert total(state, "vllm:num_requests_running") == 3
    assert total(state, "vllm:num_requests_waiting_by_reason", reason="capacity") == 2
    assert total(state, "vllm:kv_cache_usage_perc") == 0.25
    assert total(state, "vllm:prefix_cache_hits_total") == 40
    assert total(state, "vllm:prompt_tokens_by_source_total", source="local_compute") == 60
    assert total(state, "vllm:num_preemptions_total") == total(state, "vllm:corrupted_requests_total") == 1
    assert (
        total(state, "jaxserve:compilations_after_ready_total") == 0
        and total(state, "jaxserve:compilations_total") == 12
    )
    ((labels, value),) = samples(state)["vllm:cache_config_info"].items()
    assert (
        value == 1
        and {"block_size": "16", "num_gpu_blocks": "100", "engine": "0", "cache_dtype": "auto"}.items()
        <= dict(labels).items()
    )


def test_requests_are_counted(state):
    complete(state, max_tokens=5, n=2)
    chat(state, stop="s", stream=True)
    assert total(state, "vllm:request_success_total", finished_reason="length") == 2
    assert total(state, "vllm:request_success_total", finished_reason="stop") == 1
    assert total(state, "vllm:request_generation_tokens_sum") == 10 + 5
    assert total(state, "vllm:request_max_num_generation_tokens_sum") == 5 + 5
    assert total(state, "vllm:request_prompt_tokens_sum") == 3 + 3 + len("u:hi|a:")
    assert total(state, "vllm:request_params_n_sum") == 3 and total(state, "vllm:request_params_n_count") == 2
    assert total(state, "vllm:request_params_max_tokens_sum") == 5
    assert total(state, "vllm:time_to_first_token_seconds_count") == 3
    assert total(state, "vllm:inter_token_latency_seconds_count") == 4 + 4 + 4
    assert total(state, "vllm:inter_token_latency_seconds_sum") == pytest.approx(0.12, abs=1e-6)
    assert total(state, "vllm:request_time_per_output_token_seconds_sum") == pytest.approx(0.03, abs=1e-6)
    assert total(state, "vllm:e2e_request_latency_seconds_count") == 3
    assert total(state, "vllm:request_prefill_kv_computed_tokens_sum") == 13 - 3 * 2


def test_errors_and_refusals_are_counted_apart(state):
    complete(state, prompt="x" * 65)
    assert total(state, "vllm:request_success_total") == 0
    state.text_engine.fail_after = (2, "non-finite logits")
    complete(state)
    assert total(state, "vllm:request_success_total", finished_reason="error") == 1
    assert total(state, "vllm:request_success_total") == 1


def test_buckets(state):
    def bounds(name: str) -> list[str]:
        return [dict(key)["le"] for key in samples(state)[f"{name}_bucket"]]

    assert bounds("vllm:time_to_first_token_seconds")[:4] == ["0.001", "0.005", "0.01", "0.02"]
    assert bounds("vllm:time_to_first_token_seconds")[-3:] == ["640.0", "2560.0", "+Inf"]
    assert (
        len(bounds("vllm:inter_token_latency_seconds")) == 20 and len(bounds("vllm:e2e_request_latency_seconds")) == 22
    )
    assert bounds("vllm:request_prompt_tokens") == ["1.0", "2.0", "5.0", "10.0", "20.0", "50.0", "+Inf"]
    assert bounds("vllm:iteration_tokens_total")[-2:] == ["16384.0", "+Inf"]
    assert token_buckets(1000) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def test_http_metrics_use_route_templates(state):
    call(state, "GET", "/v1/models/tiny")
    call(state, "GET", "/v1/models/nope")
    call(state, "GET", "/made/up/path")
    call(state, "BREW", "/health")
    chat(state, max_tokens=1, stream=True)
    assert total(state, "http_requests_total", handler="/v1/models/{name:path}", status="2xx") == 1
    assert total(state, "http_requests_total", handler="/v1/models/{name:path}", status="4xx") == 1
    assert total(state, "http_requests_total", handler="none") == 1
    assert total(state, "http_requests_total", method="other") == 1
    assert total(state, "http_requests_total", handler="/v1/chat/completions", method="POST", status="2xx") == 1
    assert total(state, "http_response_size_bytes_sum", handler="/v1/chat/completions") > 300


def test_the_line_in_vllms_words():
    before = EngineStats(prompt_tokens=100, generation_tokens=50)
    now = EngineStats(
        prompt_tokens=222,
        generation_tokens=90,
        running_count=2,
        waiting_count=1,
        page_count=200,
        page_used_count=25,
        prefix_query_tokens=200,
        prefix_hit_tokens=50,
    )
    assert stats_line(before, now, 10.0) == (
        "Engine 000: Avg prompt throughput: 12.2 tokens/s, Avg generation throughput: 4.0 tokens/s, Running: 2 reqs, "
        "Waiting: 1 reqs, GPU KV cache usage: 12.5%, Prefix cache hit rate: 25.0%"
    )
    assert stats_line(now, EngineStats(prompt_tokens=222, generation_tokens=90), 10.0) is None


def test_the_line_appears_only_in_activity(state, caplog):
    async def watch():
        task = asyncio.create_task(log_stats(state.engine, every_s=0.01))
        await asyncio.sleep(0.05)
        assert caplog.records == []
        state.engine.stats = EngineStats(generation_tokens=5)
        await asyncio.sleep(0.05)
        task.cancel()

    with caplog.at_level(logging.INFO, "jaxserve.stats"):
        asyncio.run(watch())
    assert len(caplog.records) == 1 and caplog.records[0].message.startswith("Engine 000: Avg prompt throughput")


def test_requests_are_logged_where_enabled(caplog):
    with caplog.at_level(logging.INFO, "jaxserve.requests"):
        complete(make_state(), prompt="quiet")
        complete(make_state(enable_log_requests=True), prompt="p" * 60, request_id="r1")
    (record,) = caplog.records
    assert "cmpl-r1-0" in record.message and "ppp" in record.message and "max_tokens=16" in record.message
