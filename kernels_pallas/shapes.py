"""Attention geometries of real models: the one list that the ops' cases, tests and benchmarks draw from."""

from __future__ import annotations

import dataclasses

from kernels_pallas.quantized import FP8


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HeadShape:
    """What a layer's attention looks like to a kernel."""

    name: str
    head_count: int              # N
    kv_head_count: int           # K
    head_dim: int                # H
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False
    latent_dim: int | None = None    # keys are values too: the first so many of their head_dim numbers

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.latent_dim is None else self.latent_dim


HEAD_SHAPES = (
    HeadShape(name="smollm2-135m", head_count=9, kv_head_count=3, head_dim=64),
    HeadShape(name="qwen2.5-3b", head_count=16, kv_head_count=2, head_dim=128),
    HeadShape(name="llama-3.1-8b", head_count=32, kv_head_count=8, head_dim=128),
    HeadShape(name="llama-3.1-70b", head_count=64, kv_head_count=8, head_dim=128),
    HeadShape(name="gemma-2-9b-local", head_count=16, kv_head_count=8, head_dim=256, window=4096, soft_cap=50.0),
    HeadShape(name="gemma-3-4b-local", head_count=8, kv_head_count=4, head_dim=256, window=1024),
    HeadShape(name="mixtral-8x7b", head_count=32, kv_head_count=8, head_dim=128),
    HeadShape(name="gpt-oss-20b-local", head_count=64, kv_head_count=8, head_dim=64, window=128, has_sinks=True),
    HeadShape(name="gpt-oss-20b-global", head_count=64, kv_head_count=8, head_dim=64, has_sinks=True),
    HeadShape(name="deepseek-v2-lite", head_count=16, kv_head_count=1, head_dim=576, latent_dim=512),
    HeadShape(name="deepseek-v3", head_count=128, kv_head_count=1, head_dim=576, latent_dim=512),
)
# Whose pages are tried as codes, too; of each only some sizes.
IN_CODES = (
    "smollm2-135m", "qwen2.5-3b", "llama-3.1-8b", "gemma-2-9b-local", "gpt-oss-20b-local", "deepseek-v2-lite",
    "deepseek-v3",
)


def head_shape(name: str) -> HeadShape:
    """The geometry of that name."""
    return next(shape for shape in HEAD_SHAPES if shape.name == name)


def in_codes() -> tuple[tuple[HeadShape, str], ...]:
    """IN_CODES with each kind of codes that GPUs take."""
    return tuple((head_shape(name), codes) for name in IN_CODES for codes in ("int8", FP8))
