#!/usr/bin/env python3
"""What prefix-aware routing over Ray's replicas is worth: conversations, with it and by turns (no routing by prefix).

    python scripts/bench_routing.py --model FOLDER --set kv-cache-memory-bytes=256M --set max-model-len=2048

Each conversation sends its whole history again at every turn. The same application is deployed anew for each cell, the
two kinds in turn. Prints one JSON line a cell: share of prompt tokens found in the caches, time to first token, wall.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from statistics import median
from typing import Any

import httpx

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def main() -> None:
    options = _options()
    import ray
    from ray import serve

    from jaxserve.replicas import build_app

    ray.init(num_cpus=4 * options.replicas, include_dashboard=False, logging_level="warning", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    flags = dict(word.split("=", 1) for word in options.set)
    try:
        for repeat in range(options.repeats):
            for follows in (True, False):
                app = build_app(flags | {
                    "model": options.model, "min-replicas": options.replicas, "prefix-routing": follows,
                })
                serve.run(app, name="bench", route_prefix="/")
                print(json.dumps({"prefix_routing": follows, **asyncio.run(load(options, repeat))}), flush=True)
                serve.delete("bench")
    finally:
        serve.shutdown()
        ray.shutdown()


async def load(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All conversations, so many at a time; each turn waits for the one before it."""
    url, firsts, gate = f"http://127.0.0.1:{options.port}", [], asyncio.Semaphore(options.concurrency)
    async with httpx.AsyncClient(timeout=600) as client:
        model = (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]

        async def converse(number: int) -> None:
            rng = random.Random(1000 * seed + number)
            prompt = [rng.randrange(1000, 40_000) for _ in range(options.first)]
            for _ in range(options.turns):
                async with gate:
                    first, said = await ask(client, url, {
                        "model": model, "prompt": prompt, "max_tokens": options.output, "temperature": 0,
                        "stream": True, "ignore_eos": True, "return_token_ids": True,
                    })
                firsts.append(first)
                prompt = [*prompt, *said, *(rng.randrange(1000, 40_000) for _ in range(options.turn))]

        began = time.perf_counter()
        await asyncio.gather(*(converse(number) for number in range(options.conversations)))
        wall = time.perf_counter() - began
        page = (await client.get(f"{url}/metrics")).text
    hits, asked = (_total(page, f"vllm:prefix_cache_{name}_total") for name in ("hits", "queries"))
    return {
        "hit_share": round(hits / asked, 3), "median_ttft_ms": round(1e3 * median(firsts)),
        "p99_ttft_ms": round(1e3 * sorted(firsts)[int(0.99 * (len(firsts) - 1))]), "wall_s": round(wall, 1),
    }


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> tuple[float, list[int]]:
    """Seconds to the first token, and the answer's tokens."""
    began, first, said = time.perf_counter(), None, []
    async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                first = first or time.perf_counter() - began
                said += choice.get("token_ids") or []
    assert first is not None
    return first, said


def _total(page: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(name + "{"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any option of build_app")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--first", type=int, default=512, help="tokens a conversation begins with")
    parser.add_argument("--turn", type=int, default=64, help="tokens of each further turn")
    parser.add_argument("--output", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--port", type=int, default=8123)
    return parser.parse_args()


if __name__ == "__main__":
    main()
