"""The grouped product in plain XLA, made for CPUs.

Loop: tiles of consecutive rows of one group; the trip count is data, so groups without rows cost nothing and their
weights are not read. Work of one turn: one [O, I] matrix, copied (or unpacked) out of the stack, and one dot of
[tile, I] x [I, O].
Traffic: the weight of a tile's group, read, written and read again; at a few rows a group that is the bound.
Invariant: every row is written last by its own tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels_pallas.quantized_matmul.weights import PackedWeight, dequantised

TILE_ROWS_MAX = 64     # rows of one group that share a reading of its weight
TILE_ROWS_MIN = 2      # one-row dots take a scalar path on the CPU


def tile_rows(rows: int, groups: int) -> int:
    """Rows of a tile: what a group gets on average, rounded up to a power of two."""
    average = max(TILE_ROWS_MIN, -(-rows // groups))
    return min(TILE_ROWS_MAX, 1 << (average - 1).bit_length())


def grouped_matmul(x_TI: Array, weight_EOI: Array | PackedWeight, count_E: Array) -> Array:
    """See `api.grouped_matmul`."""
    T, (E, width_out, _) = x_TI.shape[0], weight_EOI.shape
    tile = tile_rows(T, E)
    precision = lax.Precision.HIGHEST if x_TI.dtype == jnp.float32 else None
    start_E = jnp.cumsum(count_E) - count_E
    tiles_E = (count_E + tile - 1) // tile
    tile_end_E = jnp.cumsum(tiles_E)
    # A tile's slice may run past the last row: padding keeps dynamic_slice from clamping its start.
    padded_TI = jnp.pad(x_TI, ((0, tile), (0, 0)))

    def multiply(index: Array, out_TO: Array) -> Array:
        group = jnp.searchsorted(tile_end_E, index, side="right").astype(jnp.int32)
        first = start_E[group] + (index - (tile_end_E[group] - tiles_E[group])) * tile
        rows_TI = lax.dynamic_slice_in_dim(padded_TI, first, tile)
        weight_OI = jax.tree.map(lambda stack: lax.dynamic_index_in_dim(stack, group, keepdims=False), weight_EOI)
        if isinstance(weight_OI, PackedWeight):
            weight_OI = dequantised(weight_OI, x_TI.dtype)
        y_TO = jnp.einsum("TI,OI->TO", rows_TI, weight_OI, precision=precision, preferred_element_type=jnp.float32)
        # Rows past the group's end are the next group's: its own tile comes later and writes them again.
        return lax.dynamic_update_slice_in_dim(out_TO, y_TO, first, 0)

    with jax.named_scope("grouped_matmul"):
        out_TO = lax.fori_loop(0, tile_end_E[-1], multiply, jnp.zeros((T + tile, width_out), jnp.float32))
    return out_TO[:T]
