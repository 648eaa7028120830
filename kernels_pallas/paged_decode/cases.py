"""Named decode steps of real models: geometry x rows x context."""

from __future__ import annotations

import dataclasses

from kernels_pallas.shapes import HEAD_SHAPES, HeadShape, in_codes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodeCase:
    """One decode step; every row has `context` tokens, its new one included."""

    shape: HeadShape
    rows: int
    context: int
    codes: str | None = None     # what the pages hold, beside scales; None: numbers

    @property
    def name(self) -> str:
        return f"{self.shape.name}-{self.rows}x{self.context}" + (f"-{self.codes}" if self.codes else "")


CASES = tuple(
    DecodeCase(shape=shape, rows=rows, context=context)
    for shape in HEAD_SHAPES
    for rows in (1, 16, 64)
    for context in (128, 512, 2048)
)
CASES += tuple(DecodeCase(shape=shape, rows=64, context=2048, codes=codes) for shape, codes in in_codes())
