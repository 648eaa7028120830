"""A mixed load for a real server and the comparison with each request alone; used by test_load.py."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass

import httpx

WITH_MARGINS = {"logprobs": 2, "return_tokens_as_token_ids": True}   # ids: two tokens may decode to the same text
TIE = 1e-4   # greedy tokens may differ only where the two best log-probabilities are closer than this


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request: token ids in, `output_len` tokens out, or a client that leaves after `leave_after` chunks."""

    prompt: tuple[int, ...]
    output_len: int
    leave_after: int | None = None

    @property
    def body(self) -> dict[str, object]:
        return {
            "prompt": list(self.prompt), "max_tokens": self.output_len, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Greedy tokens, and the gap between the best two log-probabilities at each where they were asked for."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...] = ()


def make_jobs(count: int, *, vocab: int, prompt_max: int, output_max: int, seed: int) -> list[Job]:
    """Prompts of 5 to `prompt_max` tokens, log-uniform; a third share a beginning; one in eight leaves early."""
    rng = random.Random(seed)
    shared = [rng.randrange(10, vocab) for _ in range(prompt_max // 3)]
    jobs = []
    for index in range(count):
        length = round(5 * (prompt_max / 5) ** rng.random())
        own = [rng.randrange(10, vocab) for _ in range(length)]
        prompt = (shared + own)[: max(5, prompt_max)] if index % 3 == 0 else own
        output_len = rng.randint(1, output_max)
        leaves = index % 8 == 7 and output_len > 4
        jobs.append(Job(prompt=tuple(prompt), output_len=output_len, leave_after=2 if leaves else None))
    return jobs


async def answer_all(url: str, jobs: list[Job]) -> list[Answer | None]:
    """Everything at once; None for those who left."""
    async with httpx.AsyncClient(base_url=url, timeout=1800, limits=httpx.Limits(max_connections=None)) as client:
        return await asyncio.gather(*(_answer(client, job) for job in jobs))


async def answer_alone(url: str, jobs: list[Job]) -> list[Answer | None]:
    """One after the other, with margins."""
    async with httpx.AsyncClient(base_url=url, timeout=1800) as client:
        return [await _answer(client, job, with_margins=True) for job in jobs]


def differences(together: list[Answer | None], alone: list[Answer | None]) -> list[str]:
    """What differs and is no tie: one line each."""
    lines = []
    for index, (a, b) in enumerate(zip(together, alone, strict=True)):
        if a is None or b is None or a.tokens == b.tokens:
            continue
        at = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), min(len(a.tokens), len(b.tokens)))
        if at >= len(b.margins) or b.margins[at] >= TIE:
            margin = b.margins[at] if at < len(b.margins) else float("nan")
            lines.append(f"request {index} differs at token {at} of {len(b.tokens)}, margin {margin:.2e}")
        else:
            print(f"request {index}: a tie at token {at}, margin {b.margins[at]:.2e}")
    return lines


async def _answer(client: httpx.AsyncClient, job: Job, *, with_margins: bool = False) -> Answer | None:
    if job.leave_after is not None and not with_margins:
        return await _leave(client, job)
    reply = await client.post("/v1/completions", json=job.body | (WITH_MARGINS if with_margins else {}))
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    margins = ()
    if with_margins:
        best = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
        margins = tuple(pair[0] - pair[1] if len(pair) > 1 else 0.0 for pair in best)
    return Answer(tokens=tuple(choice["token_ids"]), margins=margins)


async def _leave(client: httpx.AsyncClient, job: Job) -> None:
    """Reads a few chunks and closes the connection."""
    seen = 0
    async with client.stream("POST", "/v1/completions", json=job.body | {"stream": True}) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                json.loads(line[6:])
                seen += 1
            if seen >= (job.leave_after or 0):
                return None
    return None
