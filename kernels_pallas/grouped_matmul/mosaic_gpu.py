"""The grouped product on NVIDIA Hopper, for 16-bit weights that are not packed. Not yet run on hardware.

A persistent grid of one program a multiprocessor; units are (block of columns, tile of one group's rows), dealt round
robin, tiles of one group beside each other. XLA lays the rows of each tile together, filled up to 64 or 128, because
a copy by TMA begins at every eighth row only. Three warpgroups a program: one copies steps of 64 of the shared width
into a ring in shared memory, two multiply, each half of the columns; sums of [rows, columns / 2] stay in registers.

Traffic: every weight of a group that has rows, once a tile (its other tiles from L2): E' x O x I x 2 bytes; rows
O / columns times, mostly from L2; the result by whole tiles, 64 x O x 4 bytes each beside 2 x I x O bytes of weights
(a sixteenth of them at I = 2048), of which the rows that mean something are read and written once more. Roofline:
memory bandwidth of the weights up to some hundred rows a group, then L2: 128 x 256 are 87 operations a byte.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper, mosaic
from kernels_pallas.hopper import GROUPED_COLUMNS as COLUMNS
from kernels_pallas.hopper import GROUPED_DEPTH as DEPTH
from kernels_pallas.mosaic import Ref

ROWS = (64, 128)         # of a tile: of a wgmma, once or twice
STAGES = 4
LOAD = 2                 # the warpgroup that copies; 0 and 1 multiply
LOADER_REGISTERS, MATH_REGISTERS = 24, 240   # of a thread; 24 + 2 * 240 is what three warpgroups have together


class _Tiles(NamedTuple):
    """Tiles of rows of one group, and where each row went."""

    count: Array
    group_W: Array
    row_WR: Array      # rows of each tile; those past its group's are anything
    tile_T: Array
    place_T: Array


def grouped_matmul(
    x_TI: Array, weight_EOI: Array, count_E: Array, *, rows: int | None = None, programs: int | None = None,
    interpret: Any = None,
) -> Array:
    """See `api.grouped_matmul`. `rows` overrides those of a tile, `interpret` runs the simulator."""
    T, (E, width_out, _) = x_TI.shape[0], weight_EOI.shape
    rows = rows or next((size for size in ROWS if size * E >= T), ROWS[-1])
    tiles = lax.optimization_barrier(_tiles(count_E, T, rows))     # else each number gathered computes them anew
    with jax.named_scope("grouped_matmul"):
        x_WRI = x_TI.at[tiles.row_WR].get(mode="clip")
        out_WBRC = _multiply(x_WRI, weight_EOI, tiles, programs or hopper.multiprocessors(), interpret)
        return out_WBRC[tiles.tile_T, :, tiles.place_T].reshape(T, width_out)


def _tiles(count_E: Array, row_count: int, rows: int) -> _Tiles:
    E = count_E.shape[0]
    tile_max = min(row_count, E) + row_count // rows      # every group but for its last tile fills whole ones
    tiles_E = (count_E + rows - 1) // rows
    tile_end_E, row_end_E = jnp.cumsum(tiles_E), jnp.cumsum(count_E)

    def group_of(end_E: Array, index: Array) -> Array:
        found = jnp.searchsorted(end_E, index, side="right", method="compare_all")     # others are loops of launches
        return jnp.minimum(found, E - 1).astype(jnp.int32)

    tile_W, token_T = (jnp.arange(size, dtype=jnp.int32) for size in (tile_max, row_count))
    group_W, group_T = group_of(tile_end_E, tile_W), group_of(row_end_E, token_T)
    first_W = (row_end_E - count_E)[group_W] + (tile_W - (tile_end_E - tiles_E)[group_W]) * rows
    offset_T = token_T - (row_end_E - count_E)[group_T]
    return _Tiles(
        count=tile_end_E[-1].astype(jnp.int32), group_W=group_W,
        row_WR=(first_W[:, None] + jnp.arange(rows)).astype(jnp.int32),
        # Rows past the last group's take what lies there.
        tile_T=jnp.clip((tile_end_E - tiles_E)[group_T] + offset_T // rows, 0, tile_max - 1),
        place_T=offset_T % rows,
    )


class _Refs(NamedTuple):
    """What a program sees."""

    x_WRI: Ref
    weight_EOI: Ref
    group_W: Ref
    count: Ref
    out_WBRC: Ref
    x_block: Ref          # shared memory from here on
    weight_block: Ref
    full: Ref
    empty: Ref


def _multiply(x_WRI: Array, weight_EOI: Array, tiles: _Tiles, programs: int, interpret: Any) -> Array:
    """Products [tiles, blocks of columns, rows, columns of a warpgroup]; of tiles past the last one anything."""
    (tile_max, rows, width), width_out, dtype = x_WRI.shape, weight_EOI.shape[1], x_WRI.dtype
    columns = next(size for size in COLUMNS if width_out % size == 0)
    operands = {
        "x_WRI": x_WRI, "weight_EOI": weight_EOI, "group_W": tiles.group_W, "count": tiles.count.reshape(1),
    }
    scratch = {
        "x_block": mosaic.shared((STAGES, rows, DEPTH), dtype),
        "weight_block": mosaic.shared((STAGES, columns, DEPTH), dtype),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        "empty": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    }

    def body(*refs: Ref) -> None:
        seen = _Refs(**dict(zip((*operands, "out_WBRC", *scratch), refs, strict=True)))
        warpgroup = lax.axis_index("warpgroup")
        each = functools.partial(_each_unit, seen, programs, width_out // columns)
        pl.when(warpgroup == LOAD)(lambda: _load(seen, each, width // DEPTH))
        pl.when(warpgroup != LOAD)(lambda: _sum(seen, each, width // DEPTH, warpgroup))

    return mosaic.launch(
        body, *operands.values(), name="grouped_matmul", grid={"program": programs}, threads=3,
        out_type=jax.ShapeDtypeStruct((tile_max, 2 * width_out // columns, rows, columns // 2), jnp.float32),
        scratch=tuple(scratch.values()), interpret=interpret, reduction_bytes=0,
    )


def _each_unit(refs: _Refs, programs: int, blocks: int, work: Any) -> Array:
    """Calls work(tile, block of columns, index) for each unit of this program; how many there are."""
    program = lax.axis_index("program")
    tiles = refs.count[0]
    count = pl.cdiv(jnp.maximum(tiles * blocks - program, 0), programs)

    def one(index: Array, carry: None) -> None:
        linear = program + index * programs
        work(lax.rem(linear, tiles), lax.div(linear, tiles), index)

    lax.fori_loop(0, count, one, None)
    return count


def _load(refs: _Refs, each: Any, steps: int) -> None:
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    columns = refs.weight_block.shape[1]

    def load_unit(tile: Array, block: Array, index: Array) -> None:
        group, own = refs.group_W[tile], pl.ds(block * columns, columns)

        def load_step(step: Array, carry: None) -> None:
            turn = index * steps + step
            place = lax.rem(turn, STAGES)
            depth = pl.ds(step * DEPTH, DEPTH)
            pl.when(turn >= STAGES)(lambda: plgpu.barrier_wait(refs.empty.at[place]))
            plgpu.copy_gmem_to_smem(
                refs.weight_EOI.at[group, own, depth], refs.weight_block.at[place], refs.full.at[place]
            )
            plgpu.copy_gmem_to_smem(refs.x_WRI.at[tile, :, depth], refs.x_block.at[place], refs.full.at[place])

        lax.fori_loop(0, steps, load_step, None)

    mosaic.await_readers((refs.empty,), STAGES, each(load_unit) * steps)


def _sum(refs: _Refs, each: Any, steps: int, warpgroup: Array) -> None:
    """A multiplying warpgroup: its half of the columns."""
    plgpu.set_max_registers(MATH_REGISTERS, action="increase")
    rows, half = refs.x_block.shape[1], refs.weight_block.shape[1] // 2
    own = pl.ds(warpgroup * half, half)

    def sum_unit(tile: Array, block: Array, index: Array) -> None:
        def sum_steps(total: Ref) -> Array:
            def sum_step(step: Array, carry: None) -> None:
                place = lax.rem(index * steps + step, STAGES)
                plgpu.barrier_wait(refs.full.at[place])
                plgpu.wgmma(total, refs.x_block.at[place], refs.weight_block.at[place, own].T)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(refs.empty.at[place])

            lax.fori_loop(0, steps, sum_step, None)
            return total[...]

        total_RC = pl.run_scoped(sum_steps, plgpu.ACC((rows, half), jnp.float32))
        refs.out_WBRC[tile, 2 * block + warpgroup] = total_RC

    each(sum_unit)
