"""Progress for people: rich bars where stderr is a terminal, sparse log lines where it is not, phases to a listener.

Knows nothing of what is being done. Everything goes to stderr, so that stdout stays clean for programs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from jaxserve.core.progress import Advance

logger = logging.getLogger("jaxserve.start")

LOG_EVERY_S = 10.0


class ConsoleProgress:
    """ProgressPort on stderr; `on_phase(name, detail)` hears of every phase and, sparsely, of how far a task is."""

    def __init__(self, on_phase: Callable[[str, str], None] | None = None) -> None:
        self._console = Console(stderr=True)
        self._on_phase = on_phase or (lambda name, detail: None)
        self._phase = "starting"

    def phase(self, name: str, detail: str = "") -> None:
        self._phase = name
        self._on_phase(name, detail)

    @contextmanager
    def task(self, title: str, total: int, unit: str) -> Iterator[Advance]:
        """A bar on a terminal, a line at start, every ten seconds and at the end elsewhere."""
        report = _Report(title, total, unit, lambda detail: self._on_phase(self._phase, detail))
        if not self._console.is_terminal:
            yield report.advance
            report.finish()
            return
        counts: tuple[ProgressColumn, ...] = (
            (DownloadColumn(), TransferSpeedColumn()) if unit == "B" else (MofNCompleteColumn(), TextColumn(unit))
        )
        columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            bar = progress.add_task(title, total=total)

            def advance(amount: int = 1) -> None:
                progress.advance(bar, amount)
                report.advance(amount)

            yield advance
        report.finish()


class _Report:
    """Counts one task and speaks rarely. Mutable; safe from any thread."""

    def __init__(self, title: str, total: int, unit: str, tell: Callable[[str], None]) -> None:
        self._title, self._total, self._unit, self._tell = title, total, unit, tell
        self._done = 0
        self._start_s = self._told_s = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, amount: int = 1) -> None:
        with self._lock:
            self._done += amount
            now = time.monotonic()
            if now - self._told_s < LOG_EVERY_S:
                return
            self._told_s = now
            text = f"{self._title}: {self._amount(self._done)} of {self._amount(self._total)}"
        logger.info("%s", text)
        self._tell(text)

    def finish(self) -> None:
        seconds = time.monotonic() - self._start_s
        speed = f", {self._done / seconds / 1e9:.2f} GB/s" if self._unit == "B" and seconds > 0.01 else ""
        logger.info("%s: %s in %.1f s%s", self._title, self._amount(self._done), seconds, speed)

    def _amount(self, count: int) -> str:
        return f"{count / 1e9:.2f} GB" if self._unit == "B" else f"{count} {self._unit}"
