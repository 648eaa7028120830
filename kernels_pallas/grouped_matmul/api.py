"""Grouped matrix product: the first count_E[0] rows meet weight_EOI[0], the next count_E[1] rows weight_EOI[1], …

Contract: sums in float32, given back in float32. Rows past the last group are arbitrary. Weights may be packed: each is
then the float32 value that `quantized_matmul.weights` spells, rounded to the rows' type.
A row's result depends on that row and its weight only.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from kernels_pallas import contract, hopper
from kernels_pallas.grouped_matmul import reference, xla
from kernels_pallas.quantized_matmul.weights import PackedWeight, violations


def _implementation(name: str) -> Callable[..., Array]:
    if name == "triton":
        from kernels_pallas.grouped_matmul import triton  # late: jax warns on import that it is deprecated

        return triton.grouped_matmul
    if name == "mosaic_gpu":
        from kernels_pallas.grouped_matmul import mosaic_gpu  # late: it needs jax >= 0.11

        return mosaic_gpu.grouped_matmul
    return {"xla": xla.grouped_matmul, "reference": reference.grouped_matmul}[name]


def grouped_matmul(
    x_TI: Array, weight_EOI: Array | PackedWeight, count_E: Array, *, implementation: str | None = None
) -> Array:
    """x · weightᵀ, group by group; [T, O] float32.

    Args:
      x_TI: rows sorted by group.  weight_EOI: one matrix a group, as checkpoints store it, or packed.
      count_E: rows of each group, int32; their sum is at most T.
      implementation: "xla", "reference", "mosaic_gpu" (NVIDIA Hopper) or "triton" (GPUs), both for 16-bit values that
        are not packed, or None for the first that serves the request.
    """
    found = []
    is_packed = isinstance(weight_EOI, PackedWeight)
    if isinstance(weight_EOI, PackedWeight):
        found += violations(weight_EOI)
    if x_TI.ndim != 2 or len(weight_EOI.shape) != 3 or x_TI.shape[1] != weight_EOI.shape[2]:
        found.append(f"x must be [T, I], weights [E, O, I]; got {x_TI.shape} and {weight_EOI.shape}")
    elif count_E.shape != weight_EOI.shape[:1] or count_E.dtype != jnp.int32:
        found.append(f"counts must be int32 [{weight_EOI.shape[0]}], got {count_E.dtype}{list(count_E.shape)}")
    weights = x_TI.dtype if isinstance(weight_EOI, PackedWeight) else weight_EOI.dtype
    if x_TI.dtype != weights or x_TI.dtype not in contract.FLOATS:
        found.append(f"rows and weights must be alike and float, got {x_TI.dtype} and {weights}")
    contract.require("grouped_matmul", found)
    against = ["float32 would be rounded to 10 bits by the tensor cores"] if x_TI.dtype == jnp.float32 else []
    packed = ["weights are packed"] if is_packed else []
    refusals = {
        "xla": list, "reference": list,
        "mosaic_gpu": lambda: [*hopper.grouped_refusals(x_TI, weight_EOI.shape[1]), *packed],
        "triton": lambda: [*against, *packed],
    }
    return _implementation(contract.choose("grouped_matmul", implementation, refusals))(x_TI, weight_EOI, count_E)
