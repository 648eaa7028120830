"""The line that operators grep: every ten seconds of activity, in vLLM's words."""

from __future__ import annotations

import asyncio
import logging

from jaxserve.core.request import EngineStats
from jaxserve.server.state import EngineLifePort

logger = logging.getLogger("jaxserve.stats")

EVERY_S = 10.0


def stats_line(before: EngineStats, now: EngineStats, seconds: float, number: int = 0) -> str | None:
    """The line for the time between two snapshots; None when nothing happened and nothing runs."""
    prompt = max(0, now.prompt_tokens - before.prompt_tokens)            # an engine that was started again
    generated = max(0, now.generation_tokens - before.generation_tokens)  # counts from zero
    if not (prompt or generated or now.running_count or now.waiting_count):
        return None
    usage = now.page_used_count / now.page_count if now.page_count else 0.0
    hit_rate = now.prefix_hit_tokens / now.prefix_query_tokens if now.prefix_query_tokens else 0.0
    return (
        f"Engine {number:03}: Avg prompt throughput: {prompt / seconds:.1f} tokens/s, "
        f"Avg generation throughput: {generated / seconds:.1f} tokens/s, "
        f"Running: {now.running_count} reqs, Waiting: {now.waiting_count} reqs, "
        f"GPU KV cache usage: {usage * 100:.1f}%, Prefix cache hit rate: {hit_rate * 100:.1f}%"
    )


async def log_stats(engine: EngineLifePort, every_s: float = EVERY_S) -> None:
    """Runs until cancelled."""
    before = [one.stats for one in engine.engines]
    while True:
        await asyncio.sleep(every_s)
        now = [one.stats for one in engine.engines]
        for number, (earlier, newest) in enumerate(zip(before, now, strict=True)):
            line = stats_line(earlier, newest, every_s, number)
            if line is not None:
                logger.info("%s", line)
        before = now
