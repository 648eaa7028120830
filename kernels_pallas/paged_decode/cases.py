"""Named decode steps of real models: geometry x rows x context."""

from __future__ import annotations

import dataclasses

from kernels_pallas.shapes import HEAD_SHAPES, HeadShape


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeCase:
    """One decode step; every row has `context` tokens, its new one included."""

    shape: HeadShape
    rows: int
    context: int

    @property
    def name(self) -> str:
        return f"{self.shape.name}-{self.rows}x{self.context}"


CASES = tuple(
    DecodeCase(shape=shape, rows=rows, context=context)
    for shape in HEAD_SHAPES
    for rows in (1, 16, 64)
    for context in (128, 512, 2048)
)
