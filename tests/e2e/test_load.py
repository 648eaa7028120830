"""Many requests at once: each answers as it would alone, whatever is batched with it, aborted or preempted."""

import asyncio
import re

import pytest
import requests

from tests.e2e.load import answer_all, answer_alone, differences, make_jobs

# Switches of the engine, none of which may change a token.
VARIANTS = {
    "default": (),
    "no-prefix-caching": ("--no-enable-prefix-caching",),
    "no-chunked-prefill": ("--no-enable-chunked-prefill",),
    "no-overlap": ("--no-async-scheduling",),
    "small-pool": (),
}


def metric(url: str, name: str) -> float:
    """The sum over a metric's series."""
    text = requests.get(f"{url}/metrics", timeout=30).text
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, flags=re.M)
    assert values, f"{name} is not exposed"
    return sum(map(float, values))


def check_load(server, jobs, alone, *, wants_preemption: bool) -> None:
    """Together equals alone; nothing is left behind; nothing was compiled while serving."""
    server.wait_ready()
    together = asyncio.run(answer_all(server.url, jobs))
    assert differences(together, alone) == []
    assert sum(answer is not None for answer in together) >= len(jobs) * 3 // 4
    server.wait_for(lambda: metric(server.url, "vllm:num_requests_running") == 0)
    server.wait_for(lambda: metric(server.url, "vllm:kv_cache_usage_perc") == 0)
    assert metric(server.url, "vllm:num_requests_waiting") == 0
    assert metric(server.url, "jaxserve:compilations_after_ready_total") == 0
    assert (metric(server.url, "vllm:num_preemptions_total") > 0) is wants_preemption


TINY_JOBS = make_jobs(32, vocab=250, prompt_max=90, output_max=100, seed=3)
TINY = ("--dtype", "float32", "--max-model-len", "192", "--max-num-seqs", "16")
DEMO_JOBS = make_jobs(64, vocab=40000, prompt_max=1500, output_max=200, seed=5)
DEMO = ("--dtype", "float32", "--max-model-len", "2048")


@pytest.fixture(scope="module")
def tiny_alone(serve_module, tiny_llama):
    """Each job's answer when nothing else runs, from a server with default switches."""
    server = serve_module("--model", str(tiny_llama), *TINY, "--kv-cache-memory-bytes", "64M")
    answers = asyncio.run(answer_alone(server.url, TINY_JOBS))
    server.stop()
    return answers


@pytest.fixture(scope="module")
def demo_alone(serve_module, demo_model):
    """Likewise for the demo model."""
    server = serve_module("--model", str(demo_model), *DEMO, "--kv-cache-memory-bytes", "2G")
    server.wait_ready()
    answers = asyncio.run(answer_alone(server.url, DEMO_JOBS))
    server.stop()
    return answers


@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", [
    pytest.param(name, marks=() if name in ("default", "small-pool") else pytest.mark.slow) for name in VARIANTS
])
def test_tiny_model_under_mixed_load(serve, tiny_llama, tiny_alone, variant):
    """Reduced: 32 requests on a tiny random checkpoint, every switch."""
    is_small = variant == "small-pool"
    pool = str(26 * 9216) if is_small else "64M"   # 26 pages hold two of the longest sequences
    tokens = "192" if variant == "no-chunked-prefill" else "64"
    server = serve("--model", str(tiny_llama), *TINY, "--max-num-batched-tokens", tokens, *VARIANTS[variant],
                   "--kv-cache-memory-bytes", pool)
    check_load(server, TINY_JOBS, tiny_alone, wants_preemption=is_small)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("variant", VARIANTS)
def test_demo_model_under_mixed_load(serve, demo_model, demo_alone, variant):
    """Full: 64 requests on SmolLM2 in float32, prompts of 5 to 1500 tokens, outputs of 1 to 200."""
    is_small = variant == "small-pool"
    pool = str(260 * 737_280) if is_small else "2G"   # 260 pages, likewise
    tokens = ("--max-num-batched-tokens", "2048") if variant == "no-chunked-prefill" else ()
    server = serve("--model", str(demo_model), *DEMO, *tokens, *VARIANTS[variant], "--kv-cache-memory-bytes", pool)
    check_load(server, DEMO_JOBS, demo_alone, wants_preemption=is_small)
