"""Which type a model computes in, from the `--dtype` flag, the checkpoint's own type and the device."""

from __future__ import annotations

from typing import Literal

from jaxserve.core.model_spec import DType


def compute_dtype(requested: Literal["auto"] | DType, stored: DType, platform: str) -> tuple[DType, str | None]:
    """The type to compute in, and a sentence for the start-up where it is not what one would expect.

    On the CPU float16 products take XLA's scalar path, 20 to 40 times slower than bfloat16.
    """
    if requested != "auto":
        slow = requested == "float16" and platform == "cpu"
        return requested, "float16 is 20 to 40 times slower than bfloat16 on the CPU" if slow else None
    if stored == "float16" and platform == "cpu":
        return "bfloat16", "float16 weights are converted to bfloat16, which the CPU computes 20 to 40 times faster"
    if stored == "float32":
        return "bfloat16", "float32 weights are converted to bfloat16; pass --dtype float32 to keep them"
    return stored, None
