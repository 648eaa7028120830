"""Named products of 8 bits of real models: one linear layer, what both sides are, groups, and tokens a step."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EightBitCase:
    """The fused gate and up product of one layer."""

    model: str
    dtype: str
    groups: int        # of inputs with scales of their own; 1: the caller scales
    width: int         # I
    width_out: int     # O
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.tokens}"


CASES = tuple(
    EightBitCase(model=model, dtype=dtype, groups=groups, width=width, width_out=width_out, tokens=tokens)
    for model, dtype, groups, width, width_out in (
        ("llama-3.1-8b-w8a8", "int8", 1, 4096, 28672),
        ("llama-3.1-8b-fp8", "float8_e4m3fn", 1, 4096, 28672),
        ("qwen3-8b-fp8-blocks", "float8_e4m3fn", 32, 4096, 24576),
    )
    for tokens in (1, 16, 2048)
)
