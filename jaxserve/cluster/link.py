"""A live connection to another process of the cluster: messages in order, and a watch on whether it is still there.

Three threads a link: one reads into the inbox, one sends signs of life, one looks whether the other side gave any. What
the process does meanwhile (a step, a collective that hangs) delays none of them. It knows no device and no plan.
Invariant: `on_lost` is called once at most, within SILENCE_S_MAX and a WATCH_EVERY_S of the other side's last sign of
life, and never after `part`, `close` or the other side's own Stop without a reason.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from jaxserve.cluster.frames import FrameError, Frames
from jaxserve.cluster.messages import Beat, Message, Stop, decode, encode
from jaxserve.core.clock import ClockPort, MonotonicClock

logger = logging.getLogger("jaxserve.cluster")

BEAT_S = 1.0
SILENCE_S_MAX = 8.0
WATCH_EVERY_S = 0.5


class Pulse:
    """When the other side last gave a sign of life. Mutable."""

    def __init__(self, clock: ClockPort) -> None:
        self._clock = clock
        self._heard_s = clock.now()

    def heard(self) -> None:
        self._heard_s = self._clock.now()

    @property
    def silent_s(self) -> float:
        return self._clock.now() - self._heard_s

    @property
    def is_lost(self) -> bool:
        return self.silent_s > SILENCE_S_MAX


class Link:
    """Frames with threads around them. Mutable.

    Args:
      name: of the other process, for people.
      on_lost: called with the reason, from one of the threads, when the other side is gone or silent.
    """

    def __init__(
        self, frames: Frames, *, name: str, on_lost: Callable[[str], None], clock: ClockPort | None = None
    ) -> None:
        self.name = name
        self.inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._frames, self._on_lost = frames, on_lost
        self._pulse = Pulse(clock or MonotonicClock())
        self._is_over, self._is_gone = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        for work in (self._read, self._beat, self._watch):
            threading.Thread(target=work, name=f"cluster{work.__name__}", daemon=True).start()

    def send(self, message: Message) -> None:
        """A message to a process that is gone is dropped: the reader has noticed, or will."""
        try:
            self._frames.send(encode(message))
        except OSError:
            pass

    def part(self, reason: str) -> None:
        """Says that this side ends; from now on the other side may, too."""
        with self._lock:
            self._is_over.set()
        self.send(Stop(reason))

    def close(self, *, wait_s: float = 0.0) -> None:
        """Ends the link; `wait_s` is how long the other side may take to hang up first."""
        with self._lock:
            self._is_over.set()
        self._is_gone.wait(wait_s)
        self._frames.close()

    def _read(self) -> None:
        reason = "it closed the connection: the process ended or was killed"
        try:
            while (body := self._frames.receive()) is not None:
                self._pulse.heard()
                message = decode(body)
                if isinstance(message, Beat):
                    continue
                if isinstance(message, Stop):
                    if not message.reason:
                        with self._lock:
                            self._is_over.set()
                    reason = message.reason
                    self.inbox.put(message)
                    break
                self.inbox.put(message)
        except FrameError as error:
            reason = str(error)
        self._is_gone.set()
        self._lose(reason)
        self._frames.close()

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_S):
            self.send(Beat())

    def _watch(self) -> None:
        while not self._is_over.wait(WATCH_EVERY_S):
            if self._pulse.is_lost:
                self._lose(f"it has been silent for {self._pulse.silent_s:.0f} s")

    def _lose(self, reason: str) -> None:
        with self._lock:
            if self._is_over.is_set():
                return
            self._is_over.set()
        self._on_lost(f"{self.name} is lost: {reason}")
