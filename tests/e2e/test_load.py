"""Many requests at once: each answers as it would alone, whatever is batched with it, aborted or preempted."""

import asyncio
import re

import pytest
import requests
from tests.e2e.load import answer_all, answer_alone, differences, make_jobs

# Switches of the engine, none of which may change a token. The small pool holds two of the longest sequences.
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


def check_load(server, jobs, *, wants_preemption: bool = False) -> None:
    """Together equals alone; nothing is left behind; nothing was compiled while serving."""
    server.wait_ready()
    alone = asyncio.run(answer_alone(server.url, jobs))
    together = asyncio.run(answer_all(server.url, jobs))
    assert differences(together, alone) == []
    assert sum(answer is not None for answer in together) >= len(jobs) * 3 // 4
    server.wait_for(lambda: metric(server.url, "vllm:num_requests_running") == 0)
    server.wait_for(lambda: metric(server.url, "vllm:kv_cache_usage_perc") == 0)
    assert metric(server.url, "vllm:num_requests_waiting") == 0
    assert metric(server.url, "jaxserve:compilations_after_ready_total") == 0
    assert (metric(server.url, "vllm:num_preemptions_total") > 0) is wants_preemption


@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_model_under_mixed_load(serve, tiny_llama, variant):
    """Reduced: 32 requests on a tiny random checkpoint, every switch."""
    jobs = make_jobs(32, vocab=250, prompt_max=90, output_max=100, seed=3)
    flags = ["--model", str(tiny_llama), "--dtype", "float32", "--max-model-len", "192", "--max-num-seqs", "16",
             "--max-num-batched-tokens", "192" if variant == "no-chunked-prefill" else "64", *VARIANTS[variant]]
    flags += ["--kv-cache-memory-bytes", str(26 * 9216) if variant == "small-pool" else "64M"]   # 26 pages: two sequences
    check_load(serve(*flags), jobs, wants_preemption=variant == "small-pool")


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("variant", VARIANTS)
def test_demo_model_under_mixed_load(serve, demo_model, variant):
    """Full: 64 requests on SmolLM2 in float32, prompts of 5 to 1500 tokens, outputs of 1 to 200."""
    jobs = make_jobs(64, vocab=40000, prompt_max=1500, output_max=200, seed=5)
    flags = ["--model", str(demo_model), "--dtype", "float32", "--max-model-len", "2048",
             *(("--max-num-batched-tokens", "2048") if variant == "no-chunked-prefill" else ()), *VARIANTS[variant]]
    flags += ["--kv-cache-memory-bytes", str(260 * 737_280) if variant == "small-pool" else "2G"]   # 260 pages likewise
    check_load(serve(*flags), jobs, wants_preemption=variant == "small-pool")
