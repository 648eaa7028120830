"""Packed matrix product: rows in floats, weights in codes that are unpacked on their way to the multipliers.

Contract: a weight is the float32 value that `weights` spells, rounded to the rows' type; sums in float32, given back
in float32. A row's result depends on that row and the weight only, within one implementation.
mosaic_gpu rounds other things and no more: where it scales sums, no weight but the values of tables; where it scales
weights, values of tables twice. The order of its sums depends on the number of rows, too.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from kernels_pallas import contract, hopper
from kernels_pallas.quantized_matmul import reference, sizes, xla
from kernels_pallas.quantized_matmul.weights import PackedWeight, violations


def _implementation(name: str) -> Callable[..., Array]:
    if name == "triton":
        from kernels_pallas.quantized_matmul import triton  # late: jax warns on import that it is deprecated

        return triton.quantized_matmul
    if name == "mosaic_gpu":
        from kernels_pallas.quantized_matmul import mosaic_gpu  # late: it needs jax >= 0.11

        return mosaic_gpu.quantized_matmul
    if name == "native":
        from kernels_pallas.native import api as native  # late: it asks for this host

        return native.matmul_packed
    return {"xla": xla.quantized_matmul, "reference": reference.quantized_matmul}[name]


def quantized_matmul(x_TI: Array, weight: PackedWeight, *, implementation: str | None = None) -> Array:
    """x · weightᵀ; [T, O] float32.

    Args:
      x_TI: rows, float32, bfloat16 or float16.
      implementation: "native" (CPUs that have its instructions, bfloat16), "xla", "mosaic_gpu" (Hopper,
        bfloat16 rows) and "triton" (GPUs, 16-bit rows), which have not met a GPU yet and must be named, "reference", or
        None for the first that serves the request.
    """
    found = violations(weight)
    if len(weight.shape) != 2:
        found.append(f"one matrix, got {weight.shape}; `grouped_matmul` takes stacks")
    elif x_TI.ndim != 2 or x_TI.shape[1] != weight.shape[1]:
        found.append(f"x must be [T, {weight.shape[1]}], got {x_TI.shape}")
    if x_TI.dtype not in contract.FLOATS:
        found.append(f"x must be float32, bfloat16 or float16, got {x_TI.dtype}")
    contract.require("quantized_matmul", found)
    refusals = {
        "native": lambda: _native_refusals(x_TI, weight), "xla": list,
        "mosaic_gpu": lambda: sizes.refusals(x_TI, weight), "triton": lambda: _triton_refusals(x_TI, weight),
        "reference": list,
    }
    return _implementation(contract.choose("quantized_matmul", implementation, refusals))(x_TI, weight)


def _native_refusals(x_TI: Array, weight: PackedWeight) -> list[str]:
    if hopper.target_kind() != "cpu":
        return [f"needs a CPU, the target is {hopper.target_kind()!r}"]
    from kernels_pallas.native import api as native  # late: it asks for this host

    return native.packed_refusals(x_TI, weight)


def _triton_refusals(x_TI: Array, weight: PackedWeight) -> list[str]:
    found = [] if hopper.target_kind() != "cpu" else ["needs a GPU, the target is 'cpu'"]
    if x_TI.dtype not in (jnp.bfloat16, jnp.float16):
        found.append(f"rows must be bfloat16 or float16 (tensor cores), got {x_TI.dtype}")
    if weight.code == "fp4":
        found.append("fp4 is not built")
    return found + contract.triton_size_refusals(weight.code_OC)
