"""Named page writes: geometry x tokens of a step."""

from __future__ import annotations

import dataclasses

from kernels_pallas.shapes import HEAD_SHAPES, HeadShape, in_codes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class WriteCase:
    """One step's keys into a pool."""

    shape: HeadShape
    tokens: int
    codes: str | None = None     # what the pages hold, beside scales; None: numbers

    @property
    def name(self) -> str:
        return f"{self.shape.name}-{self.tokens}" + (f"-{self.codes}" if self.codes else "")


CASES = tuple(WriteCase(shape=shape, tokens=tokens) for shape in HEAD_SHAPES for tokens in (16, 1024))
CASES += tuple(WriteCase(shape=shape, tokens=1024, codes=codes) for shape, codes in in_codes())
