"""The grouped product on GPUs through Pallas:Triton, for CUDA (sm80 and later) and ROCm. Not yet run on hardware.

Grid: tiles of rows x blocks of columns. One program: ROWS rows of one group times COLUMNS rows of its weight, a loop
over the shared width in steps of DEPTH, sums in registers in float32. Tiles of a group follow each other, so its weight
block is read from memory once and from the L2 cache by the other tiles.
Traffic: every weight of a group that has rows, once: E' x O x I x 2 bytes; rows O / COLUMNS times, mostly from L2; the
result T x O x 4 bytes. Roofline: memory bandwidth of the weights up to some hundred rows a group, tensor cores beyond.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

ROWS_MIN = 16          # what the tensor cores take at least
ROWS_MAX = 128
COLUMNS, DEPTH = 128, 64
WARPS, STAGES = 4, 3

Ref = Any              # pallas has no public type for references


def tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile: what a group gets on average, rounded up to a power of two."""
    average = max(ROWS_MIN, -(-rows // groups))
    return min(ROWS_MAX, 1 << (average - 1).bit_length())


def grouped_matmul(x_TI: Array, weight_EOI: Array, count_E: Array, *, is_interpreted: bool = False) -> Array:
    """See `api.grouped_matmul`.

    Args:
      is_interpreted: runs the kernel's operations one by one, anywhere; for tests.
    """
    T, E, width_out = x_TI.shape[0], *weight_EOI.shape[:2]
    rows = tile_rows(T, E)
    tile_max = min(T, E) + T // rows      # every group but for its last tile fills whole ones
    tiles_E = (count_E + rows - 1) // rows
    tile_end_E, row_end_E = jnp.cumsum(tiles_E), jnp.cumsum(count_E)
    tile_W = jnp.arange(tile_max, dtype=jnp.int32)
    found_W = jnp.searchsorted(tile_end_E, tile_W, side="right", method="compare_all")     # others: loops of launches
    group_W = jnp.minimum(found_W, E - 1).astype(jnp.int32)
    index_W = tile_W - (tile_end_E - tiles_E)[group_W]
    first_W = ((row_end_E - count_E)[group_W] + index_W * rows).astype(jnp.int32)
    end_W = jnp.where(tile_W < tile_end_E[-1], row_end_E[group_W], 0).astype(jnp.int32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_tile, rows=rows),
        grid=(tile_max, pl.cdiv(width_out, COLUMNS)),
        in_specs=[anywhere] * 5,
        out_specs=anywhere,
        out_shape=jax.ShapeDtypeStruct((T, width_out), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=is_interpreted,
        name="grouped_matmul",
    )(x_TI, weight_EOI, group_W, first_W, end_W)


def _tile(
    x_ref: Ref, weight_ref: Ref, group_ref: Ref, first_ref: Ref, end_ref: Ref, out_ref: Ref, *, rows: int
) -> None:
    tile, block = pl.program_id(0), pl.program_id(1)
    first, end = first_ref[tile], end_ref[tile]

    @pl.when(first < end)
    def _() -> None:
        width_out, width = weight_ref.shape[1:]
        row = first + jnp.arange(rows)[:, None]
        column = block * COLUMNS + jnp.arange(COLUMNS)[:, None]
        group = group_ref[tile]

        def add(step: Array, sum_: Array) -> Array:
            depth = step * DEPTH + jnp.arange(DEPTH)[None, :]
            x = plt.load(x_ref.at[row, depth], mask=(row < end) & (depth < width), other=0.0)
            is_weight = (column < width_out) & (depth < width)
            weight = plt.load(weight_ref.at[group, column, depth], mask=is_weight, other=0.0)
            return sum_ + plt.dot(x, weight.T)

        sum_ = lax.fori_loop(0, pl.cdiv(width, DEPTH), add, jnp.zeros((rows, COLUMNS), jnp.float32))
        across = column.reshape(1, COLUMNS)
        plt.store(out_ref.at[row, across], sum_, mask=(row < end) & (across < width_out))
