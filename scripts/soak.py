#!/usr/bin/env python3
"""Loads a running server with random requests for minutes and then asks whether it is as it was.

Every request draws its lengths, sampling parameters, streaming and manner of leaving: some clients hang up, some send
what must be refused. At the end nothing may run or wait, no page may be held, nothing may have been compiled since
ready, and every request must have been answered as its kind should be.

    python scripts/soak.py --base-url http://localhost:8000 --minutes 10
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from typing import Any

import httpx

TIMEOUT_S = 600.0
SETTLE_S = 60.0
MUST_BE_ZERO = (
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "jaxserve:compilations_after_ready_total",
)


def main() -> None:
    options = _options()
    outcome = asyncio.run(soak(options))
    print(json.dumps(outcome, indent=1))
    sys.exit(0 if outcome["passed"] else 1)


async def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Counts of answers by kind of request, and the metrics that must be zero afterwards."""
    rng = random.Random(options.seed)
    found: Counter[str] = Counter()
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=options.base_url, timeout=TIMEOUT_S) as client:
        model = (await client.get("/v1/models")).json()["data"][0]
        running: set[asyncio.Task[None]] = set()
        while time.monotonic() - began < options.minutes * 60:
            while len(running) >= options.max_concurrency:
                _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            running.add(asyncio.create_task(_one(client, model, rng.random(), options, found)))
            await asyncio.sleep(rng.expovariate(options.request_rate))
        await asyncio.gather(*running)
        left = await _settled(client)
    unexpected = {kind: count for kind, count in found.items() if kind.endswith("unexpected")}
    return {
        "seconds": round(time.monotonic() - began), "requests": sum(found.values()),
        "answers": dict(sorted(found.items())), "left": left, "passed": not unexpected and not any(left.values()),
    }


async def _one(
    client: httpx.AsyncClient, model: dict[str, Any], seed: float, options: argparse.Namespace, found: Counter[str]
) -> None:
    rng = random.Random(seed)
    kind = rng.choices(("whole", "stream", "hang up", "refused"), (4, 4, 1, 1))[0]
    body = _body(rng, model, options)
    if kind == "refused":
        body |= rng.choice(({"temperature": -1}, {"max_tokens": -5}, {"prompt": []}, {"top_p": 7}, {"n": 0}))
        response = await client.post("/v1/completions", json=body)
        found["refused" if response.status_code == 400 else f"{response.status_code} unexpected"] += 1
    elif kind == "whole":
        response = await client.post("/v1/completions", json=body)
        found["answered" if response.status_code == 200 else f"{response.status_code} unexpected"] += 1
    else:
        found[await _stream(client, body, rng.randint(1, 20) if kind == "hang up" else None)] += 1


async def _stream(client: httpx.AsyncClient, body: dict[str, Any], leave_after: int | None) -> str:
    """How the stream ended; `leave_after` that many events the client hangs up."""
    events = 0
    body.pop("prompt_logprobs", None)       # not of a stream, as with vLLM
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        if response.status_code != 200:
            return f"{response.status_code} unexpected"
        async for line in response.aiter_lines():
            events += line.startswith("data: ")
            if line == "data: [DONE]":
                return "streamed"
            if leave_after is not None and events >= leave_after:
                return "hung up"
    return "stream without end unexpected"


def _body(rng: random.Random, model: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """A legal request: log-normal lengths, some with a prompt that others share, any sampling parameters."""
    length = min(int(rng.lognormvariate(4.5, 1.0)) + 1, options.input_max)
    prompt = [rng.randrange(options.token_low, options.token_high) for _ in range(length)]
    if rng.random() < 0.3:
        prompt = list(range(options.token_low, options.token_low + 200)) + prompt[: options.input_max - 200]
    body: dict[str, Any] = {
        "model": model["id"], "prompt": prompt,
        "max_tokens": min(int(rng.lognormvariate(3.5, 1.0)) + 1, options.output_max),
        "temperature": rng.choice((0, 0, 0.7, 1.3)), "seed": rng.randrange(1000),
    }
    extras = (
        {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {"logprobs": 3},
        {"frequency_penalty": 0.5, "presence_penalty": 0.2}, {"repetition_penalty": 1.1}, {"ignore_eos": True},
        {"n": 2}, {"stop": ["the"]}, {"logit_bias": {"100": 5}}, {"prompt_logprobs": 1},
        {"min_tokens": 1}, {"echo": True},
    )
    for extra in rng.sample(extras, rng.choice((0, 0, 1, 2))):
        body |= extra
    if body.get("n") == 2 and body["temperature"] == 0:
        body["temperature"] = 1.0       # greedy choices do not differ
    return body


async def _settled(client: httpx.AsyncClient) -> dict[str, float]:
    """The metrics that must be zero, once they are, or when waiting is over."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        text = (await client.get("/metrics")).text
        left = {name: _metric(text, name) for name in MUST_BE_ZERO}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        await asyncio.sleep(1)


def _metric(text: str, name: str) -> float:
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, flags=re.MULTILINE)
    if not values:
        raise SystemExit(f"the server does not expose {name}")
    return sum(map(float, values))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://localhost:8000")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--request-rate", type=float, default=3.0, help="arrivals a second")
    parser.add_argument("--max-concurrency", type=int, default=48)
    parser.add_argument("--input-max", type=int, default=1500)
    parser.add_argument("--output-max", type=int, default=200)
    parser.add_argument("--token-low", type=int, default=1000, help="random ids are in [low, high)")
    parser.add_argument("--token-high", type=int, default=40000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
