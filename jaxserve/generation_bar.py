"""The progress bar of offline generation: requests done, tokens a second. On stderr, only on a terminal. Mutable."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REFRESH_S = 0.2


class GenerationBar:
    """A context manager; without a terminal, or not `shown`, it costs nothing."""

    def __init__(self, request_count: int, *, shown: bool) -> None:
        console = Console(stderr=True)
        self._progress: Progress | None = None
        self._done = self._prompt_tokens = self._tokens = 0
        self._begin_s = self._shown_s = time.monotonic()
        if shown and console.is_terminal and request_count:
            columns = (
                TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
                TimeElapsedColumn(), TimeRemainingColumn(),
            )
            # No refresh thread of rich's own: the engine's loop refreshes, so nothing is left running.
            self._progress = Progress(*columns, console=console, auto_refresh=False)
            self._task = self._progress.add_task("generating", total=request_count, speed="")

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress is not None:
            self._refresh()
            self._progress.stop()

    def add_tokens(self, count: int, *, prompt: int = 0) -> None:
        """Counts generated tokens, and a prompt's as its first one comes."""
        self._tokens += count
        self._prompt_tokens += prompt
        if self._progress is not None and time.monotonic() - self._shown_s >= REFRESH_S:
            self._refresh()

    def finish_request(self) -> None:
        self._done += 1

    def _refresh(self) -> None:
        assert self._progress is not None
        self._shown_s = time.monotonic()
        seconds = max(self._shown_s - self._begin_s, 1e-9)
        speed = f"{self._prompt_tokens / seconds:,.0f} tok/s in, {self._tokens / seconds:,.0f} tok/s out"
        self._progress.update(self._task, completed=self._done, speed=speed)
        self._progress.refresh()
