#!/usr/bin/env python3
"""Loads an OpenAI-compatible server and prints what `vllm bench serve` prints, under the same JSON keys.

Prompts are random token ids of exact lengths, so any server that takes ids on /v1/completions gets the same work;
output tokens are counted from `usage`, never from chunks. With `--vs URL` two servers get the same load in turn,
A B A B ..., and the ratios A/B are medians over the pairs, so that a machine whose speed drifts does not decide.

    python scripts/bench_serving.py --base-url http://localhost:8000 --num-prompts 64 --max-concurrency 16
    python scripts/bench_serving.py --workload c --vs http://localhost:8001 --repeats 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from dataclasses import dataclass, field

import httpx
import numpy as np

# The five workloads of docs/log.md: name -> flags that they stand for.
WORKLOADS: dict[str, dict[str, float]] = {
    "a": dict(num_prompts=4, max_concurrency=1, input_len=128, output_len=128),
    "b": dict(num_prompts=64, max_concurrency=16, input_len=128, output_len=128),
    "c": dict(num_prompts=64, max_concurrency=16, prefix_len=512, input_len=32, output_len=32),
    "d": dict(num_prompts=8, max_concurrency=4, input_len=2048, output_len=32),
    "e": dict(num_prompts=60, request_rate=2.0, input_len=200, output_len=80, spread=0.6),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request to make."""

    prompt: list[int]
    output_len: int
    start_s: float


@dataclass(slots=True)
class Reply:
    """What one request gave: seconds from its own start; token counts as the server states them."""

    ok: bool = False
    error: str = ""
    ttft_s: float = 0.0
    latency_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    input_tokens: int = 0
    output_tokens: int = 0


def make_calls(options: argparse.Namespace, seed: int) -> list[Call]:
    """The same calls for the same options and seed; `spread` is the sigma of log-normal lengths."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(options.token_low, options.token_high, options.prefix_len).tolist()
    arrivals = np.zeros(options.num_prompts)
    if options.request_rate > 0:
        arrivals = np.cumsum(rng.exponential(1 / options.request_rate, options.num_prompts))

    def length(mean: int) -> int:
        return max(1, int(mean * rng.lognormal(-options.spread**2 / 2, options.spread))) if options.spread else mean

    return [
        Call(
            prompt=prefix + rng.integers(options.token_low, options.token_high, length(options.input_len)).tolist(),
            output_len=length(options.output_len),
            start_s=float(start_s),
        )
        for start_s in arrivals
    ]


async def one(client: httpx.AsyncClient, model: str, call: Call) -> Reply:
    """Streams one completion and times its chunks."""
    reply = Reply()
    body = {
        "model": model, "prompt": call.prompt, "max_tokens": call.output_len, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }
    begin = last = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                reply.error = f"{answer.status_code} {(await answer.aread())[:300]!r}"
                return reply
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                now = time.perf_counter()
                if event.get("error"):
                    reply.error = str(event["error"])
                    return reply
                if event.get("usage"):      # alone in the last event, or, from other servers, beside an empty choice
                    reply.input_tokens = event["usage"]["prompt_tokens"]
                    reply.output_tokens = event["usage"]["completion_tokens"]
                if event["choices"] and (event["choices"][0].get("text") or not event.get("usage")):
                    if reply.ttft_s == 0:
                        reply.ttft_s = now - begin
                    else:
                        reply.gaps_s.append(now - last)
                    last = now
    except httpx.HTTPError as error:
        reply.error = f"{type(error).__name__}: {error}"
        return reply
    reply.latency_s = last - begin
    reply.ok = reply.output_tokens > 0
    return reply


async def run_load(url: str, options: argparse.Namespace, seed: int) -> dict[str, float]:
    """One whole load on one server; returns the figures."""
    calls = make_calls(options, seed)
    gate = asyncio.Semaphore(options.max_concurrency or len(calls))
    headers = {"Authorization": f"Bearer {options.api_key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=1800, limits=limits) as client:
        model = options.model or (await client.get("/v1/models")).json()["data"][0]["id"]
        begin = time.perf_counter()

        async def timed(call: Call) -> Reply:
            await asyncio.sleep(max(0.0, call.start_s - (time.perf_counter() - begin)))
            async with gate:
                return await one(client, model, call)

        replies = await asyncio.gather(*map(timed, calls))
        return figures(replies, time.perf_counter() - begin)


def figures(replies: list[Reply], duration_s: float) -> dict[str, float]:
    """The keys of `vllm bench serve --save-result`; latencies in ms."""
    good = [reply for reply in replies if reply.ok]
    inputs, outputs = sum(r.input_tokens for r in good), sum(r.output_tokens for r in good)
    result: dict[str, float] = {
        "duration": duration_s, "completed": len(good), "failed": len(replies) - len(good),
        "total_input_tokens": inputs, "total_output_tokens": outputs,
        "request_throughput": len(good) / duration_s, "output_throughput": outputs / duration_s,
        "total_token_throughput": (inputs + outputs) / duration_s,
    }
    samples = {
        "ttft": [r.ttft_s for r in good],
        "tpot": [(r.latency_s - r.ttft_s) / (r.output_tokens - 1) for r in good if r.output_tokens > 1],
        "itl": [gap for r in good for gap in r.gaps_s],
        "e2el": [r.latency_s for r in good],
    }
    for name, values in samples.items():
        ms = np.asarray(values or [0.0]) * 1e3
        result |= {f"mean_{name}_ms": ms.mean(), f"median_{name}_ms": float(np.median(ms)), f"std_{name}_ms": ms.std()}
        result |= {f"p{q}_{name}_ms": float(np.percentile(ms, q)) for q in (90, 99)}
    for reply in replies:
        if reply.error:
            print(f"failed: {reply.error}", file=sys.stderr)
    return {name: round(float(value), 4) for name, value in result.items()}


SHOWN = ("output_throughput", "total_token_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms")


def compare(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Ratios ours/theirs pair by pair: median, least and greatest."""
    table = {}
    for name in SHOWN:
        ratios = [a[name] / b[name] for a, b in zip(ours, theirs, strict=True) if b[name]]
        if ratios:
            table[name] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return table


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://localhost:8000")
    parser.add_argument("--vs", metavar="URL", help="a second server, loaded in turn")
    parser.add_argument("--model", help="default: the first that /v1/models names")
    parser.add_argument("--api-key", default="EMPTY")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), help="sets the flags below; see docs/log.md")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-concurrency", type=int, default=0, help="closed loop of that many streams; 0: no bound")
    parser.add_argument("--request-rate", type=float, default=0, help="Poisson arrivals a second; 0: all at once")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--prefix-len", type=int, default=0, help="tokens that all prompts share")
    parser.add_argument("--spread", type=float, default=0, help="sigma of log-normal lengths; 0: fixed lengths")
    parser.add_argument("--token-low", type=int, default=1000, help="random ids are in [low, high)")
    parser.add_argument("--token-high", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="loads before the counted ones")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    for name, value in WORKLOADS.get(options.workload or "", {}).items():
        setattr(options, name, value)
    return options


def main() -> None:
    options = parse()
    urls = [options.base_url] + ([options.vs] if options.vs else [])
    results: list[list[dict[str, float]]] = [[] for _ in urls]
    for turn in range(-options.warmup, options.repeats):
        for url, found in zip(urls, results, strict=True):
            figure = asyncio.run(run_load(url, options, options.seed + options.warmup + turn))
            if turn >= 0:
                found.append(figure)
                shown = "  ".join(f"{name} {figure[name]:.1f}" for name in SHOWN)
                print(f"{url}  {shown}  failed {figure['failed']:.0f}", file=sys.stderr)
    medians = [{k: statistics.median(f[k] for f in found) for k in found[0]} for found in results]
    output: dict[str, object] = {"workload": options.workload, "repeats": options.repeats, "result": medians[0]}
    if options.vs:
        output |= {"vs": medians[1], "ratio": compare(*results)}
    print(json.dumps(output, indent=2))


if __name__ == "__main__":
    main()
