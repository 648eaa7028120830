"""How long work tells people where it stands, without knowing whether they look at a terminal, a log or /health."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Advance(Protocol):
    """Called with how much more is done, in the unit of the task; safe from any thread."""

    def __call__(self, amount: int = 1) -> None: ...


class ProgressPort(Protocol):
    """Where progress goes."""

    def phase(self, name: str, detail: str = "") -> None:
        """A new phase of the start-up: "downloading", "loading", "compiling", "serving", "ready"."""
        ...

    def task(self, title: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """A bar of `total` units ("B", "tensors", "programs"), open while the context is."""
        ...


class NoProgress:
    """Nobody looks."""

    def phase(self, name: str, detail: str = "") -> None:
        pass

    def task(self, title: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        return nullcontext(lambda amount=1: None)
