"""Named expert products of real models: experts, their widths, and tokens a step."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GroupedCase:
    """The fused gate and up product of one layer."""

    model: str
    experts: int       # E
    chosen: int        # X, experts a token
    width: int         # I
    width_out: int     # O
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.tokens}"


CASES = tuple(
    GroupedCase(model=model, experts=experts, chosen=chosen, width=width, width_out=2 * expert_width, tokens=tokens)
    for model, experts, chosen, width, expert_width in (
        ("mixtral-8x7b", 8, 2, 4096, 14336),
        ("qwen3-30b-a3b", 128, 8, 2048, 768),
        ("olmoe-1b-7b", 64, 8, 2048, 1024),
        ("gpt-oss-20b", 32, 4, 2880, 2880),
        ("deepseek-v2-lite", 64, 6, 2048, 1408),
    )
    for tokens in (1, 16, 64, 512)
)
