"""The engine as the API process sees it: routes outputs to whoever asked, and tells how the engine is. Mutable.

Lives on one event loop's thread; knows the channel and nothing of text, HTTP, the scheduler or devices.
Invariant: every submitted request gets exactly one last output (finish_reason set), also when the engine dies.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxserve.core.clock import ClockPort, MonotonicClock
from jaxserve.core.errors import EngineBusyError, EngineDeadError, EngineNotReadyError, RequestError
from jaxserve.core.request import EngineInfo, EngineRequest, EngineStats, SequenceOutput
from jaxserve.engine.channel import (
    Abort,
    Alive,
    ApiEnd,
    Down,
    Failed,
    Outputs,
    Phase,
    Profile,
    Profiled,
    Serving,
    Status,
    Submit,
)

logger = logging.getLogger("jaxserve.engine")

BEAT_MISSED_S_MAX = 120.0   # a serving engine that is silent for longer is reported as hung

Sink = Callable[[SequenceOutput], None]


@dataclass(slots=True)
class EngineStatus:
    """Where the engine's life stands; `detail` is for people. Mutable: AsyncEngine and `serve` write it."""

    phase: Phase = "starting"
    detail: str = ""

    @property
    def is_serving(self) -> bool:
        return self.phase in ("serving", "ready")


class AsyncEngine:
    """Submits sequences over the channel and hands each output to the sink given with its request.

    `queue_max` is `--max-num-queued-reqs`: more sequences than that waiting for a row are refused.
    """

    def __init__(self, *, queue_max: int | None = None, clock: ClockPort | None = None) -> None:
        self.status = EngineStatus()
        self.folder: str | None = None
        self.failed: Failed | None = None
        self.serving = asyncio.Event()
        self._clock = clock or MonotonicClock()
        self._queue_max = queue_max
        self._channel: ApiEnd | None = None
        self._sinks: dict[str, Sink] = {}
        self._info: EngineInfo | None = None
        self._stats = EngineStats()
        self._profiled: asyncio.Future[Profiled] | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._beat_s = self._clock.now()
        self._alive_s: float | None = None

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            where = f"{self.status.phase} {self.status.detail}".strip()
            raise EngineNotReadyError(f"the engine is not serving yet: {where}")
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def live_count(self) -> int:
        return len(self._sinks)

    @property
    def silent_s(self) -> float:
        """Seconds since the engine last said anything."""
        return self._clock.now() - self._beat_s

    @property
    def stalled_s(self) -> float | None:
        """Seconds since the engine's process last said that it is alive; None where it has not said so yet."""
        return None if self._alive_s is None else self._clock.now() - self._alive_s

    def submit(self, requests: Sequence[EngineRequest], sink: Sink) -> int:
        """Sends sequences to the engine; their outputs go to `sink` on this thread. Gives the engine's number, 0.

        Raises EngineDeadError, EngineNotReadyError or EngineBusyError, then none of them was taken.
        """
        self._check_life()
        waiting = self.live_count - self._stats.running_count + len(requests)
        if self._queue_max is not None and waiting > self._queue_max + self._room():
            raise EngineBusyError(
                "The engine is currently busy and cannot accept new requests. "
                "Please try again later or on a different instance."
            )
        for request in requests:
            assert request.request_id not in self._sinks, f"request id {request.request_id} is live already"
            self._sinks[request.request_id] = sink
        self._idle.clear()
        assert self._channel is not None
        self._channel.send(Submit(tuple(requests)))
        return 0

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forgets these sequences; their later outputs are dropped."""
        known = tuple(i for i in request_ids if self._sinks.pop(i, None) is not None)
        if known and self._channel is not None:
            self._channel.send(Abort(known))
        self._note_idle()

    async def profile(self, folder: str | None) -> None:
        """Starts a trace of the steps into `folder`, or ends it (None), and waits until that is done.

        Raises RequestError where the engine cannot, EngineNotReadyError or EngineDeadError where there is none.
        """
        self._check_life()
        if self._profiled is not None:
            raise RequestError("A profile is being started or stopped right now; try again when that has an answer.")
        assert self._channel is not None
        self._profiled = asyncio.get_running_loop().create_future()
        try:
            self._channel.send(Profile(folder))
            answer = await asyncio.shield(self._profiled)
        finally:
            self._profiled = None
        if answer.error:
            raise RequestError(answer.error)

    async def run(self, channel: ApiEnd) -> None:
        """Reads the channel until the engine process is gone; then every live request is failed."""
        self._channel, self.failed = channel, None
        self._beat_s, self._alive_s = self._clock.now(), None
        reason = "the engine process ended without a word"
        try:
            while (message := await channel.receive()) is not None:
                if isinstance(message, Alive):
                    self._alive_s = self._clock.now()
                    continue
                self._beat_s = self._clock.now()
                if isinstance(message, Outputs):
                    self._deliver(message)
                elif isinstance(message, Status):
                    self._note_status(message)
                elif isinstance(message, Serving):
                    self._info, self.folder = message.info, message.folder
                    self.serving.set()
                elif isinstance(message, Profiled):
                    if self._profiled is not None and not self._profiled.done():
                        self._profiled.set_result(message)
                elif isinstance(message, Failed):
                    self.failed, reason = message, message.reason
        finally:
            is_told = self.status.phase == "dead"     # whoever killed it said why
            self._die(self.status.detail if is_told else reason)

    def send(self, message: Down) -> None:
        """Tells the engine process something else than work; lost when there is none."""
        if self._channel is not None:
            self._channel.send(message)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no request is live; False on time-out."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def abort_all(self, message: str) -> None:
        """Ends every live request with reason "abort", as at a shutdown that ran out of time."""
        ids = tuple(self._sinks)
        for request_id in ids:
            sink = self._sinks.get(request_id)
            if sink is not None:
                sink(SequenceOutput(request_id=request_id, finish_reason="abort", error=message))
        self.abort(ids)

    def _check_life(self) -> None:
        if self.status.phase == "dead":
            raise EngineDeadError(f"the engine is dead: {self.status.detail}")
        if not self.status.is_serving or self._channel is None:
            raise EngineNotReadyError(f"the engine is not serving: {self.status.phase} {self.status.detail}".strip())

    def _room(self) -> int:
        """Rows free right now: sequences that would not wait at all."""
        return max(0, self.info.row_count - self._stats.running_count)

    def _deliver(self, message: Outputs) -> None:
        self._stats = message.stats
        for output in message.outputs:
            sink = self._sinks.get(output.request_id)
            if sink is None:
                continue  # aborted here while the output was on its way
            if output.finish_reason is not None:
                del self._sinks[output.request_id]
            try:
                sink(output)
            except Exception:  # one request's reader must not end everybody's engine
                logger.exception("dropping request %s: its reader failed", output.request_id)
                self.abort((output.request_id,))
        self._note_idle()

    def _note_status(self, message: Status) -> None:
        if self.status.phase != "draining":
            self.status.phase, self.status.detail = message.phase, message.detail

    def _note_idle(self) -> None:
        if not self._sinks:
            self._idle.set()

    def _die(self, reason: str) -> None:
        self.status.phase, self.status.detail = "dead", reason
        self.serving.clear()
        if self._profiled is not None and not self._profiled.done():
            self._profiled.set_exception(EngineDeadError(f"the engine died: {reason}"))
        self._channel, self._stats = None, EngineStats()
        sinks, self._sinks = self._sinks, {}
        for request_id, sink in sinks.items():
            sink(SequenceOutput(request_id=request_id, finish_reason="error", error=f"the engine died: {reason}"))
        self._note_idle()
