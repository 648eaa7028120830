"""Named prefill steps of real models: geometry x chunk x context before it."""

from __future__ import annotations

import dataclasses

from kernels_pallas.shapes import HEAD_SHAPES, HeadShape, in_codes


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PrefillCase:
    """One chunk of one sequence."""

    shape: HeadShape
    chunk: int
    before: int      # positions already in the pages
    codes: str | None = None     # what the pages hold, beside scales; None: numbers

    @property
    def name(self) -> str:
        return f"{self.shape.name}-{self.chunk}+{self.before}" + (f"-{self.codes}" if self.codes else "")


CASES = tuple(
    PrefillCase(shape=shape, chunk=chunk, before=before)
    for shape in HEAD_SHAPES
    for chunk, before in ((128, 0), (512, 0), (1024, 0), (512, 1536))
)
CASES += tuple(PrefillCase(shape=shape, chunk=512, before=1536, codes=codes) for shape, codes in in_codes())
