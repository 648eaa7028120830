"""Work of resident programs that multiply: a line of (tile of outputs, tile of rows, run of inputs) in equal parts.

A program takes runs [first, first of the next) of the line, so no multiprocessor waits long for a last wave. Tiles
that it begins are its own; of a tile that another began it leaves a part, which XLA adds where it reads the result.
Tiles of the same outputs follow each other, so their weights come from the L2 cache. Outputs are the 64-row side of
wgmma. Knows the line and its ring in shared memory, not what is multiplied.
Invariant: every program knows its part from its number alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.mosaic import Ref

OUTS = hopper.OUTS
LOADER_REGISTERS = 24
REGISTERS = 65536             # of a multiprocessor
MATH_REGISTERS_MAX = 232
IDLE_MAX = 1.125              # of the time that whole tiles take, over equal parts' time

Sum = Callable[[Array, Array, Array, Array], Array]
"""(first output, first row, where its runs begin and end on the line) -> sums of a warpgroup, [OUTS, rows]."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Attributes:
    runs: of inputs that a tile has.
    """

    tiles: hopper.Tiles
    row_tiles: int
    out_tiles: int
    runs: int

    @property
    def rows(self) -> int:
        """Of x, padded to whole tiles."""
        return self.row_tiles * self.tiles.rows

    @property
    def is_cut(self) -> bool:
        """Whether parts end within tiles: not where whole tiles, which need no joining, keep programs about as busy."""
        tiles, programs = self.out_tiles * self.row_tiles, self.tiles.programs
        return -(-tiles // programs) * programs > IDLE_MAX * tiles

    @property
    def part_count(self) -> int:
        """Parts that programs may leave."""
        return self.tiles.programs if self.is_cut else 1

    def first(self, program: Any) -> Any:
        """Where a program's part begins."""
        tiles, programs = self.out_tiles * self.row_tiles, self.tiles.programs
        if self.is_cut:
            return program * (tiles * self.runs) // programs
        return program * tiles // programs * self.runs

    def part(self) -> tuple[Array, Array]:
        """Of the program that asks."""
        program = lax.axis_index("program")
        return self.first(program), self.first(program + 1)

    def place(self, tile: Array) -> tuple[Array, Array]:
        """First output and first row of a tile."""
        return lax.div(tile, self.row_tiles) * self.tiles.outs, lax.rem(tile, self.row_tiles) * self.tiles.rows

    def stage(self, at: Array) -> Array:
        """The ring's place of a run."""
        return lax.rem(at - self.part()[0], self.tiles.stages)

    @property
    def shared_tiles(self) -> dict[int, list[int]]:
        """Programs that begin within a tile, by tile."""
        found: dict[int, list[int]] = {}
        for program in range(self.tiles.programs):
            begin = self.first(program)
            if begin % self.runs and begin < self.first(program + 1):
                found.setdefault(begin // self.runs, []).append(program)
        return found

    def joined(self, out_TO: Array, part_PTO: Array) -> Array:
        """The result, with what programs left of tiles that others began."""
        shared = self.shared_tiles
        if not shared:
            return out_TO
        index = np.full((max(map(len, shared.values())), self.out_tiles * self.row_tiles), -1, np.int32)
        for tile, programs in shared.items():
            index[: len(programs), tile] = programs
        for of_tile in index:
            there = jnp.asarray(of_tile >= 0)[:, None, None]
            found = jnp.where(there, part_PTO[np.maximum(of_tile, 0)], jnp.zeros((), part_PTO.dtype))
            by_place = found.reshape(self.out_tiles, self.row_tiles, self.tiles.rows, self.tiles.outs)
            out_TO += by_place.transpose(1, 2, 0, 3).reshape(out_TO.shape)
        return out_TO


def math_registers(warpgroups: int) -> int:
    """Of a thread that multiplies: what the loader gives up of the equal shares that a program begins with.

    To ask for more than there is waits for ever.
    """
    threads = 128 * (warpgroups + 1)
    share = min(MATH_REGISTERS_MAX, REGISTERS // threads // 8 * 8)
    return min(MATH_REGISTERS_MAX, (share * (warpgroups + 1) - LOADER_REGISTERS) // warpgroups // 8 * 8)


def load(
    line: Line, weight_OC: Ref, x_TI: Ref, weight: Ref, rows: Ref, full: Ref, empty: Ref
) -> None:
    """The loader: weights and rows of each run into the ring, as far ahead as it allows."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    tiles = line.tiles
    begin, end = line.part()
    bytes_, inputs = weight.shape[2], rows.shape[2]

    def copy(at: Array, _: None) -> None:
        stage = lax.rem(at - begin, tiles.stages)

        @pl.when(at - begin >= tiles.stages)
        def _() -> None:
            plgpu.barrier_wait(empty.at[stage])

        run = lax.rem(at, line.runs)
        out, row = line.place(lax.div(at, line.runs))
        of_weight = weight_OC.at[pl.ds(out, tiles.outs), pl.ds(run * bytes_, bytes_)]
        of_rows = x_TI.at[pl.ds(row, tiles.rows), pl.ds(run * inputs, inputs)]
        plgpu.copy_gmem_to_smem(of_weight, weight.at[stage], full.at[stage])
        plgpu.copy_gmem_to_smem(of_rows, rows.at[stage], full.at[stage])

    lax.fori_loop(begin, end, copy, None)

    def drain(at: Array, _: None) -> None:
        plgpu.barrier_wait(empty.at[lax.rem(at - begin, tiles.stages)])

    lax.fori_loop(jnp.maximum(begin, end - tiles.stages), end, drain, None)


def multiply(line: Line, warpgroup: Array, sum_: Sum, out_TO: Ref, part_PTO: Ref) -> None:
    """The other warpgroups: 64 outputs each, tile by tile, from registers to memory."""
    tiles = line.tiles
    plgpu.set_max_registers(math_registers(tiles.warpgroups), action="increase")
    begin, end = line.part()
    tile_first = lax.div(begin, line.runs)
    tile_count = jnp.where(begin < end, lax.div(end - 1, line.runs) - tile_first + 1, 0)

    def multiply_tile(index: Array, _: None) -> None:
        tile = tile_first + index
        run_first = jnp.maximum(begin, tile * line.runs)
        run_end = jnp.minimum(end, (tile + 1) * line.runs)
        out, row = line.place(tile)
        own = out + warpgroup * OUTS
        sum_ON = plgpu.layout_cast(sum_(own, row, run_first, run_end), plgpu.Layout.WGMMA_TRANSPOSED)
        is_own = run_first == tile * line.runs

        @pl.when(is_own)
        def _() -> None:
            out_TO.at[pl.ds(row, tiles.rows), pl.ds(own, OUTS)].T[...] = sum_ON

        @pl.when(jnp.logical_not(is_own))
        def _() -> None:
            if not line.is_cut:
                return
            program = lax.axis_index("program")
            part_PTO.at[program, :, pl.ds(warpgroup * OUTS, OUTS)].T[...] = sum_ON

    lax.fori_loop(0, tile_count, multiply_tile, None)
