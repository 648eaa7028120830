"""The packed product on GPUs through Pallas:Triton, for CUDA (sm80 and later) and ROCm. Not yet run on hardware.

Grid: tiles of rows x blocks of outputs. One program: ROWS rows times COLUMNS rows of weights, a loop over the inputs in
steps within one group, so that a step has one scale an output; codes are unpacked in registers, sums stay there in
float32. A byte of two 4-bit codes feeds two products: its low halves meet the first 16 inputs of each block of 32, its
high halves the other 16.
Traffic: O x I x bits / 8 bytes of codes and a scale (and zero) a group, once a tile of rows; rows O / COLUMNS times,
mostly from the L2 cache; the result T x O x 4 bytes. Roofline: memory bandwidth of the codes up to some 64 rows, tensor
cores beyond.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.quantized_matmul.weights import BLOCK, PackedWeight

ROWS_MIN = 16          # what the tensor cores take at least
ROWS_MAX = 64
COLUMNS, BYTES_MAX = 64, 64
WARPS, STAGES = 4, 3

Ref = Any              # pallas has no public type for references


def quantized_matmul(x_TI: Array, weight: PackedWeight, *, is_interpreted: bool = False) -> Array:
    """See `api.quantized_matmul`.

    Args:
      is_interpreted: runs the kernel's operations one by one, anywhere; for tests.
    """
    (T, _), (outs, _) = x_TI.shape, weight.shape
    rows = min(ROWS_MAX, max(ROWS_MIN, 1 << (T - 1).bit_length()))
    group_bytes = weight.group_size // (2 if weight.is_half else 1)
    depth = next(size for size in (BYTES_MAX, 32, 16) if group_bytes % size == 0)
    name, extra = weight.extra
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(
            _tile, rows=rows, depth=depth, is_half=weight.is_half, extra=name, group_bytes=group_bytes
        ),
        grid=(pl.cdiv(T, rows), pl.cdiv(outs, COLUMNS)),
        in_specs=[anywhere] * 4,
        out_specs=anywhere,
        out_shape=jax.ShapeDtypeStruct((T, outs), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=is_interpreted,
        name="quantized_matmul",
    )(x_TI, weight.code_OC, weight.scale_OG, weight.scale_OG if extra is None else extra)


def _tile(
    x_ref: Ref, code_ref: Ref, scale_ref: Ref, extra_ref: Ref, out_ref: Ref, *, rows: int, depth: int, is_half: bool,
    extra: str, group_bytes: int,
) -> None:
    tile, block = pl.program_id(0), pl.program_id(1)
    T, (outs, bytes_) = x_ref.shape[0], code_ref.shape
    row = tile * rows + jnp.arange(rows)[:, None]
    column = block * COLUMNS + jnp.arange(COLUMNS)[:, None]

    def add(step: Array, sum_: Array) -> Array:
        byte = step * depth + jnp.arange(depth)[None, :]
        group = jnp.full((1, 1), step * depth // group_bytes, jnp.int32)
        code = plt.load(code_ref.at[column, byte], mask=column < outs, other=0).astype(jnp.int32)
        scale = plt.load(scale_ref.at[column, group], mask=column < outs, other=0).astype(jnp.float32)
        place = Place(column=column, group=group, is_there=column < outs, own_tables=extra_ref.shape[0] > 1)
        # Within a block of 32 inputs, bytes hold the first 16 in their low halves.
        first = byte // (BLOCK // 2) * BLOCK + byte % (BLOCK // 2) if is_half else byte
        for half in range(2 if is_half else 1):
            value = _value((code >> (4 * half)) & 15 if is_half else code, scale, extra_ref, extra, place)
            x = plt.load(x_ref.at[row, first + half * (BLOCK // 2)], mask=row < T, other=0.0)
            sum_ += plt.dot(x, value.astype(x.dtype).T)
        return sum_

    sum_ = lax.fori_loop(0, bytes_ // depth, add, jnp.zeros((rows, COLUMNS), jnp.float32))
    across = column.reshape(1, COLUMNS)
    plt.store(out_ref.at[row, across], sum_, mask=(row < T) & (across < outs))


class Place(NamedTuple):
    """Which weights of a step: outputs, their group, whether there are such, and whether each has its own table."""

    column: Array
    group: Array
    is_there: Array
    own_tables: bool


def _value(code: Array, scale: Array, extra_ref: Ref, extra: str, place: Place) -> Array:
    """What codes stand for, in float32."""
    if extra == "table":
        row = place.column if place.own_tables else jnp.zeros_like(place.column)
        return plt.load(extra_ref.at[row, code], mask=place.is_there, other=0.0) * scale
    if extra == "none":
        # As float16 the same bits mean 2^-8 of the value; numbers too small for a normal float16 come out right, too.
        bits = ((code & 128) << 8) | ((code & 127) << 7)
        return lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.float16).astype(jnp.float32) * (256.0 * scale)
    beside = plt.load(extra_ref.at[place.column, place.group], mask=place.is_there, other=0).astype(jnp.float32)
    value = code.astype(jnp.float32)
    return (value - beside) * scale if extra == "zero" else value * scale + beside
