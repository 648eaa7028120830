"""Several engines behind one face: which of them takes a request, and how they are together. Mutable.

A request goes where the pages of its prompt's beginning were computed last, unless that engine has much more to do than
the idlest; else to the idlest. What engines hold is not asked but remembered, so pages they evicted since are missed:
a wrong guess costs a prefill and nothing else.
Lives on one event loop's thread; knows no text, HTTP or process.
Invariant: the choices of one request go to one engine, and only engines that serve get any.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np

from jaxserve.core.errors import EngineBusyError
from jaxserve.core.request import EngineInfo, EngineRequest, EngineStats
from jaxserve.engine.async_engine import AsyncEngine, EngineStatus, Sink
from jaxserve.engine.familiar import PrefixMemory, familiar_first

PHASES = ("ready", "serving", "draining", "compiling", "loading", "downloading", "starting", "dead")     # best first


class _Memory(PrefixMemory):
    """Page keys of the prompts that an engine got; no more than it has pages."""

    def __init__(self) -> None:
        super().__init__()
        self._info: EngineInfo | None = None

    def of(self, info: EngineInfo) -> _Memory:
        """Forgets everything where the engine was started anew."""
        if info is not self._info:
            self._info = info
            self.clear()
        return self


class EngineRouter:
    """`AsyncEngine`'s face over one or several of them."""

    def __init__(self, engines: Sequence[AsyncEngine], *, follows_prefixes: bool = True) -> None:
        self.engines = tuple(engines)
        self._memories = tuple(_Memory() for _ in engines)
        self._given = [0] * len(self.engines)      # requests that each got: of idle engines the one that had the fewest
        self._follows_prefixes = follows_prefixes and len(self.engines) > 1

    @property
    def status(self) -> EngineStatus:
        """The best engine's; the detail names those that are worse."""
        statuses = [engine.status for engine in self.engines]
        best = min(statuses, key=lambda status: PHASES.index(status.phase))
        if len(statuses) == 1:
            return best
        worse = [
            f"engine {index}: {status.phase} {status.detail}".rstrip()
            for index, status in enumerate(statuses) if status.phase != best.phase
        ]
        return EngineStatus(best.phase, "; ".join(filter(None, [best.detail, *worse])))

    @property
    def info(self) -> EngineInfo:
        """Equal for all but for their labels. Raises EngineNotReadyError while there is none."""
        return next((engine for engine in self.engines if engine.folder is not None), self.engines[0]).info

    @property
    def folder(self) -> str | None:
        return next((engine.folder for engine in self.engines if engine.folder is not None), None)

    @property
    def stats(self) -> EngineStats:
        """Sums."""
        return total([engine.stats for engine in self.engines])

    @property
    def live_count(self) -> int:
        return sum(engine.live_count for engine in self.engines)

    async def wait_serving(self) -> None:
        """Until the first engine serves."""
        waiting = [asyncio.ensure_future(engine.serving.wait()) for engine in self.engines]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()

    def submit(self, requests: Sequence[EngineRequest], sink: Sink) -> int:
        """As AsyncEngine.submit, to one engine, whose number it gives; another takes what a full one refuses."""
        serving = [index for index, engine in enumerate(self.engines) if engine.status.is_serving]
        if not serving:
            best = min(self.engines, key=lambda engine: PHASES.index(engine.status.phase))
            return best.submit(requests, sink)      # raises with the reason
        keys = self._keys(requests[0]) if self._follows_prefixes else []
        order = self._order(serving, keys)
        for place, index in enumerate(order):
            try:
                self.engines[index].submit(requests, sink)
            except EngineBusyError:
                if place == len(order) - 1:
                    raise
                continue
            self._given[index] += 1
            if keys:
                info = self.engines[index].info
                self._memories[index].of(info).note(keys, info.page_count)
            return index
        raise AssertionError("the last one that is full raises")

    def abort(self, request_ids: Sequence[str]) -> None:
        """Each engine knows its own."""
        for engine in self.engines:
            engine.abort(request_ids)

    async def profile(self, folder: str | None) -> None:
        """One after the other; each engine writes files of its own names into a folder of its number."""
        if len(self.engines) == 1:
            await self.engines[0].profile(folder)
            return
        for index, engine in enumerate(self.engines):
            await engine.profile(None if folder is None else f"{folder}/engine{index}")

    def _order(self, serving: Sequence[int], keys: Sequence[bytes]) -> list[int]:
        """Engines to try: the familiar one first where that is fair, then by load."""
        order = sorted(serving, key=lambda index: (self.engines[index].live_count, self._given[index]))
        if not keys or len(order) == 1:
            return order
        known = {index: self._memories[index].of(self.engines[index].info).known(keys) for index in order}
        return familiar_first(
            order, known, lambda index: self.engines[index].live_count,
            lambda index: self.engines[index].info.row_count,
        )

    def _keys(self, request: EngineRequest) -> list[bytes]:
        """A key for each full page of the prompt, which stands for everything before it, too."""
        size, previous = self.info.page_size, repr(request.cache_salt).encode()
        tokens = np.asarray(request.prompt_token_ids, "<i4").tobytes()
        keys = []
        for start in range(0, len(tokens) - 4 * size + 1, 4 * size):
            previous = hashlib.blake2b(previous + tokens[start : start + 4 * size], digest_size=16).digest()
            keys.append(previous)
        return keys


def total(parts: Sequence[EngineStats]) -> EngineStats:
    """Sums of gauges and counters; by place in the draft where they are tuples."""
    if len(parts) == 1:
        return parts[0]
    summed = {field.name: sum(getattr(part, field.name) for part in parts)
              for field in fields(EngineStats) if field.name != "draft_accepted_at"}
    places = max(len(part.draft_accepted_at) for part in parts)
    accepted = tuple(
        sum(part.draft_accepted_at[place] for part in parts if place < len(part.draft_accepted_at))
        for place in range(places)
    )
    return replace(EngineStats(**summed), draft_accepted_at=accepted)
