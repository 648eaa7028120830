"""Starts the engine process, watches it, starts it again when it dies or hangs, and ends it. No jax, no HTTP.

Invariant: at most one engine process lives, and none outlives this process (Linux kills it with its parent).
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence

from jaxserve.cluster.link import SILENCE_S_MAX
from jaxserve.core.clock import ClockPort, MonotonicClock
from jaxserve.core.config import EngineConfig
from jaxserve.core.errors import JaxserveError
from jaxserve.engine.async_engine import BEAT_MISSED_S_MAX, AsyncEngine
from jaxserve.engine.channel import Alive, ApiEnd, Shutdown, Start

logger = logging.getLogger("jaxserve.engine")

RESTARTS_MAX = 3             # within RESTARTS_S; then the server gives up, for its own supervisor to decide
RESTARTS_S = 600.0
STOP_S_MAX = 10.0            # from Shutdown to SIGKILL
ENGINE_COMMAND = (sys.executable, "-m", "jaxserve.engine_process")   # followed by the socket's number
WATCH_EVERY_S = 1.0
FIRST_BEAT_S_MAX = 60.0      # from the start of an engine of several machines to its first sign of life


class EngineGaveUpError(JaxserveError):
    """The engine cannot be started (again); the message says why."""


class Supervisor:
    """Keeps one engine process alive behind `engine`. Mutable: owns the process."""

    def __init__(
        self,
        engine: AsyncEngine,
        config: EngineConfig,
        *,
        log_level: str,
        command: Sequence[str] = ENGINE_COMMAND,
        clock: ClockPort | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.engine = engine
        self.process: subprocess.Popen[bytes] | None = None
        self._config = config
        self._log_level = log_level
        self._command = command
        self._clock = clock or MonotonicClock()
        self._environment = dict(environment or {})    # of the engine process, beside this one's
        self._restarts_s: deque[float] = deque()
        self._is_stopping = False
        self._is_hung = False    # the watch killed the engine, and has said why

    def spawn(self) -> socket.socket:
        """Starts an engine process and returns this side's socket."""
        ours, theirs = socket.socketpair()
        self._is_hung = False
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | self._environment
        self.process = subprocess.Popen(
            [*self._command, str(theirs.fileno())], pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL,
            env=environment, start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - it takes no lock: one system call
        )
        theirs.close()
        return ours

    async def run(self, first: socket.socket) -> None:
        """Serves until `stop`. Raises EngineGaveUpError when an engine cannot be had (any more)."""
        ours = first
        while True:
            channel = await ApiEnd.on(ours)
            channel.send(Start(self._config, self._log_level))
            watch = asyncio.create_task(self._watch())
            try:
                await self.engine.run(channel)
            finally:
                watch.cancel()
                await channel.close()
                await self._reap()
            if self._is_stopping:
                return
            self._check_restart()
            self.engine.status.phase, self.engine.status.detail = "starting", "again, after a failure"
            ours = self.spawn()

    async def stop(self, grace_s: float = STOP_S_MAX) -> None:
        """Ends the engine process: asks, waits, kills."""
        self._is_stopping = True
        self.engine.send(Shutdown())
        if self.process is None:
            return
        if not self.engine.serving.is_set():
            self.process.kill()   # still starting: nothing to lose
        try:
            await asyncio.to_thread(self.process.wait, grace_s)
        except subprocess.TimeoutExpired:
            logger.warning("the engine process did not stop within %.0f s: killed", grace_s)
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    async def _reap(self) -> None:
        if self.process is None:
            return
        try:
            code = await asyncio.to_thread(self.process.wait, STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = await asyncio.to_thread(self.process.wait)
        if self.engine.failed is None and not self._is_stopping and not self._is_hung:
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            self.engine.status.detail = f"the engine process {ended}"

    async def _watch(self) -> None:
        """Kills an engine that serves but has been silent for too long: a hang behind a healthy /health is worst."""
        begin_s, others_wait = self._clock.now(), self._config.parallel.nnodes > 1
        while True:
            if others_wait:
                self.engine.send(Alive())
            await asyncio.sleep(WATCH_EVERY_S)
            silent_s = self.engine.silent_s if self.engine.status.is_serving else 0.0
            stalled_s, stalled_s_max = self.engine.stalled_s, SILENCE_S_MAX
            if stalled_s is None:
                stalled_s, stalled_s_max = self._clock.now() - begin_s if others_wait else 0.0, FIRST_BEAT_S_MAX
            if silent_s > BEAT_MISSED_S_MAX or stalled_s > stalled_s_max:
                silent_s = max(silent_s, stalled_s)
                logger.error("the engine has been silent for %.0f s: killing it", silent_s)
                self._is_hung = True
                self.engine.status.phase = "dead"
                self.engine.status.detail = f"hung: silent for {silent_s:.0f} s"
                if self.process is not None:
                    self.process.kill()
                return

    def _check_restart(self) -> None:
        reason = self.engine.status.detail
        failed = self.engine.failed
        if self._config.parallel.nnodes > 1:    # the others end too; whoever started them all starts them again
            raise EngineGaveUpError(failed.reason if failed is not None else reason)
        if self.engine.folder is None or (failed is not None and failed.is_users):
            raise EngineGaveUpError(failed.reason if failed is not None else reason)
        now = self._clock.now()
        while self._restarts_s and now - self._restarts_s[0] > RESTARTS_S:
            self._restarts_s.popleft()
        if len(self._restarts_s) >= RESTARTS_MAX:
            raise EngineGaveUpError(f"the engine failed {RESTARTS_MAX + 1} times in {RESTARTS_S:.0f} s; last: {reason}")
        self._restarts_s.append(now)
        logger.error("the engine is gone (%s): starting it again", reason)


async def keep_alive(supervisors: Sequence[Supervisor], channels: Sequence[socket.socket]) -> None:
    """Serves until all were stopped. Of several engines one may be given up, once another has served.

    Raises EngineGaveUpError when no engine can be had (any more).
    """
    tasks = [
        asyncio.create_task(supervisor.run(channel)) for supervisor, channel in zip(supervisors, channels, strict=True)
    ]
    try:
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                _judge(task, [one for one, other in zip(supervisors, tasks, strict=True) if other in pending],
                       tasks.index(task))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _judge(ended: asyncio.Task[None], left: Sequence[Supervisor], index: int) -> None:
    """Raises what ended an engine, unless others go on without it."""
    error = ended.exception()
    if error is None:
        return
    if not isinstance(error, EngineGaveUpError) or not any(one.engine.folder is not None for one in left):
        raise error
    logger.error("engine %d is given up, the others go on: %s", index, error)


def _die_with_parent() -> None:
    """In the child, before exec: SIGKILL when the parent goes, however it goes (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
