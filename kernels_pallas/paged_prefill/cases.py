"""Named prefill steps of real models: geometry x chunk x context before it."""

from __future__ import annotations

import dataclasses

from kernels_pallas.shapes import HEAD_SHAPES, HeadShape


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrefillCase:
    """One chunk of one sequence."""

    shape: HeadShape
    chunk: int
    before: int      # positions already in the pages

    @property
    def name(self) -> str:
        return f"{self.shape.name}-{self.chunk}+{self.before}"


CASES = tuple(
    PrefillCase(shape=shape, chunk=chunk, before=before)
    for shape in HEAD_SHAPES
    for chunk, before in ((128, 0), (512, 0), (1024, 0), (512, 1536))
)
