"""Named packed products of real models: one linear layer, its code and groups, and tokens a step."""

from __future__ import annotations

import dataclasses

from kernels_pallas.quantized_matmul.weights import Code


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackedCase:
    """The fused gate and up product of one layer."""

    model: str
    code: Code
    group: int         # inputs that share a scale
    extra: str         # beside the scales
    width: int         # I
    width_out: int     # O
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.code}-{self.tokens}"


CASES = tuple(
    PackedCase(model=model, code=code, group=group, extra=extra, width=width, width_out=width_out, tokens=tokens)
    for model, code, group, extra, width, width_out in (
        ("qwen2.5-3b-awq", "int4", 128, "zero", 2048, 22016),
        ("llama-3.1-8b-gptq", "int4", 128, "zero", 4096, 28672),
        ("llama-3.1-8b-q4_k", "int4", 32, "offset", 4096, 28672),
        ("llama-3.1-70b-w8a16", "int8", 128, "zero", 8192, 57344),
        ("llama-2-7b-squeezellm", "lut4", 4096, "table", 4096, 22016),
        ("llama-3.1-8b-nf4", "lut4", 64, "shared table", 4096, 28672),
        ("qwen3-8b-fp8", "fp8", 128, "none", 4096, 24576),
    )
    for tokens in (1, 16, 2048)
)
