"""Named page writes: geometry x tokens of a step."""

from __future__ import annotations

import dataclasses

from kernels_pallas.shapes import HEAD_SHAPES, HeadShape


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WriteCase:
    """One step's keys into a pool."""

    shape: HeadShape
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.shape.name}-{self.tokens}"


CASES = tuple(WriteCase(shape=shape, tokens=tokens) for shape in HEAD_SHAPES for tokens in (16, 1024))
