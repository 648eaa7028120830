"""Matrix product of 8 bits on both sides, which stay 8 bits up to the multipliers.

Contract: int8 x int8 gives exact int32. float8_e4m3fn x float8_e4m3fn gives float32 sums of exact products, of groups
of inputs times the groups' scales where there are such; scales of whole rows and outputs are for the caller to
multiply by."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from kernels_pallas import contract, hopper
from kernels_pallas.eight_bit_matmul import reference, xla

RUN = 128      # inputs at once: a row of swizzled shared memory, and what 8-bit floats may be summed over
EIGHT_BITS = (jnp.int8, jnp.float8_e4m3fn)


def _implementation(name: str) -> Callable[..., Array]:
    if name == "mosaic_gpu":
        from kernels_pallas.eight_bit_matmul import mosaic_gpu  # late: it needs jax >= 0.11

        return mosaic_gpu.eight_bit_matmul
    if name == "native":
        from kernels_pallas.native import api as native  # late: it asks for this host

        return lambda x_TI, weight_OI, *_: native.matmul_int8(x_TI, weight_OI)
    return {"xla": xla.eight_bit_matmul, "reference": reference.eight_bit_matmul}[name]


def eight_bit_matmul(
    x_TI: Array, weight_OI: Array, scale_TG: Array | None = None, scale_OG: Array | None = None, *,
    implementation: str | None = None,
) -> Array:
    """x · weightᵀ; [T, O] int32 of int8, float32 of float8_e4m3fn.

    Args:
      x_TI, weight_OI: int8 or float8_e4m3fn, alike.
      scale_TG, scale_OG: float32, of groups of inputs of a row and of an output; of floats only, both or none.
      implementation: "native" (int8, on CPUs that have its instructions), "xla", "mosaic_gpu" (Hopper; it has not met
        one yet, so it must be named), "reference", or None for the first that serves.
    """
    found = []
    if x_TI.ndim != 2 or weight_OI.ndim != 2 or x_TI.shape[1] != weight_OI.shape[1]:
        found.append(f"x must be [T, I], the weight [O, I]; got {x_TI.shape} and {weight_OI.shape}")
    if x_TI.dtype not in EIGHT_BITS or weight_OI.dtype != x_TI.dtype:
        found.append(f"both must be int8 or both float8_e4m3fn, got {x_TI.dtype} and {weight_OI.dtype}")
    if (scale_TG is None) != (scale_OG is None) or (scale_TG is not None and x_TI.dtype == jnp.int8):
        found.append("scales are of groups of floats, of both sides or of none")
    elif not found and scale_TG is not None and scale_OG is not None:
        groups = scale_OG.shape[-1]
        wanted = (len(x_TI), groups), (len(weight_OI), groups)
        if (scale_TG.shape, scale_OG.shape) != wanted or x_TI.shape[1] % groups:
            found.append(f"scales must be [T, G] and [O, G], got {scale_TG.shape} and {scale_OG.shape}")
    contract.require("eight_bit_matmul", found)
    refused = {
        "native": lambda: _native_refusals(weight_OI), "xla": list,
        "mosaic_gpu": lambda: refusals(x_TI, weight_OI, scale_OG), "reference": list,
    }
    chosen = contract.choose("eight_bit_matmul", implementation, refused)
    return _implementation(chosen)(x_TI, weight_OI, scale_TG, scale_OG)


def _native_refusals(weight_OI: Array) -> list[str]:
    if hopper.target_kind() != "cpu":
        return [f"needs a CPU, the target is {hopper.target_kind()!r}"]
    from kernels_pallas.native import api as native  # late: it asks for this host

    found = [*native.refusals()] + ([] if weight_OI.dtype == jnp.int8 else [f"needs int8, got {weight_OI.dtype}"])
    if not found and not native.serves_int8(*weight_OI.shape):
        found.append(f"too few outputs or too many inputs: {weight_OI.shape}")
    return found


def refusals(x_TI: Array, weight_OI: Array, scale_OG: Array | None = None) -> list[str]:
    """Why the Hopper kernel cannot multiply these here."""
    found, (outs, ins) = [*hopper.environment_refusals()], weight_OI.shape
    if outs % hopper.OUTS:
        found.append(f"outputs must be a multiple of {hopper.OUTS}, got {outs}")
    if ins % RUN:
        found.append(f"inputs must be a multiple of {RUN}, got {ins}")
    elif scale_OG is not None and (ins // scale_OG.shape[1]) % RUN:
        found.append(f"groups must be multiples of {RUN} inputs, got {ins // scale_OG.shape[1]}")
    return found
