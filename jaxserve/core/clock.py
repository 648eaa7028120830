"""Time as a value that tests can hold still. Seconds of CLOCK_MONOTONIC, comparable across processes of one machine."""

from __future__ import annotations

import time
from typing import Protocol


class ClockPort(Protocol):
    """Where the control plane reads the time."""

    def now(self) -> float: ...


class MonotonicClock:
    """The machine's own monotonic clock."""

    def now(self) -> float:
        return time.monotonic()
