"""Who multiplies packed weights (`--quantization-backend`): known while a program is traced, to no layer and no model.

Invariant: outside of `multiplied_by` it is nobody in particular: the first that serves of those that need not be named.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_ASKED: ContextVar[str | None] = ContextVar("quantization_backend", default=None)


def asked() -> str | None:
    """The implementation in `kernels_pallas` that was asked for; None: any that serves."""
    return _ASKED.get()


@contextmanager
def multiplied_by(implementation: str | None) -> Iterator[None]:
    """Everything traced within asks for this implementation."""
    before = _ASKED.set(implementation)
    try:
        yield
    finally:
        _ASKED.reset(before)
