"""What the Hopper kernel of packed weights serves, and the sizes of its blocks.

Knows shapes and bytes; imports no kernel. Invariant: what `blocks` gives fits into a program's shared memory.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from kernels_pallas import hopper
from kernels_pallas.hopper import OUTS, Tiles
from kernels_pallas.quantized_matmul import words
from kernels_pallas.quantized_matmul.weights import TABLE, PackedWeight

FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SUMS_ROWS_MAX = 64            # up to here sums of a run are scaled, and not weights


def kind(weight: PackedWeight) -> words.Kind:
    """How `words` reads the codes."""
    return "table" if weight.code == "lut4" else weight.code


def scales_sums(kind: words.Kind, extra: str, group: int, rows: int) -> bool:
    """Whether sums of a run of inputs are scaled, which then share a scale, and not each weight."""
    return extra != "offset" and group % words.run_inputs(kind) == 0 and rows <= SUMS_ROWS_MAX


def tiles(weight: PackedWeight, tokens: int) -> tuple[Tiles, ...]:
    """Every size that a tuner tries, first what is taken without measurements."""
    codes, run = words.RUN_BYTES, words.run_inputs(kind(weight))
    return hopper.product_tiles(
        weight.shape[0], tokens, hopper.PRODUCT_ROWS[-1], lambda rows, outs: outs * codes + rows * run * 2
    )


def chosen(weight: PackedWeight, tokens: int) -> Tiles:
    """Of those: as measured for this device, where somebody has."""
    return hopper.tiles("quantized_matmul", key(weight, tokens), tiles(weight, tokens))


def key(weight: PackedWeight, tokens: int) -> str:
    """What measured sizes depend on."""
    of_weights = f"{weight.code}-{weight.extra[0]}-{weight.group_size}"
    return hopper.product_key(of_weights, *weight.shape, tokens)


def refusals(x_TI: Array, weight: PackedWeight) -> list[str]:
    """Why the Hopper kernel cannot multiply these here."""
    found = [*hopper.environment_refusals()]
    if x_TI.dtype != jnp.bfloat16:
        found.append(f"rows must be bfloat16, got {x_TI.dtype}")
    (outs, ins), run = weight.shape[-2:], words.run_inputs(kind(weight))
    if outs % OUTS:
        found.append(f"outputs must be a multiple of {OUTS}, got {outs}")
    if ins % run:
        found.append(f"inputs of {weight.code} must be a multiple of {run}, got {ins}")
    is_apart = run % weight.group_size != 0 and weight.group_size % run != 0
    if is_apart or run // weight.group_size > words.WORDS:
        sizes = ", ".join(str(run // parts) for parts in (4, 2, 1))
        of = weight.group_size
        found.append(f"groups of {weight.code} must be {sizes} inputs or a multiple of the last, got {of}")
    if weight.scale_OG.dtype == jnp.float8_e4m3fn:
        found.append("scales of float8_e4m3fn are not built")
    return found


def scales(weight: PackedWeight) -> Array:
    """Scales as the kernel loads them: powers of two of 8 bits as float32, which Hopper cannot convert."""
    is_short = weight.scale_OG.dtype == jnp.float8_e8m0fnu
    return weight.scale_OG.astype(jnp.float32) if is_short else weight.scale_OG


def beside(weight: PackedWeight) -> Array:
    """Zeros or offsets, planes of the tables, or, where there is nothing, the scales once more."""
    if weight.code == "fp4":
        return words.table_planes(jnp.broadcast_to(jnp.array(FLOAT4, jnp.float32), (OUTS, TABLE)))
    if weight.table_ET is not None:
        rows = weight.table_ET.shape[0]
        shared = jnp.broadcast_to(weight.table_ET, (OUTS, TABLE)) if rows == 1 else weight.table_ET
        return words.table_planes(shared)
    extra = weight.extra[1]
    return scales(weight) if extra is None else extra
