"""Work of resident programs that multiply: a line of (tile of outputs, tile of rows, run of inputs) in equal parts.

A program takes runs [first, first of the next) of the line, so no multiprocessor waits long for a last wave. Tiles
that it begins are its own; of a tile that another began it leaves a part, which XLA adds where it reads the result.
Tiles of the same outputs follow each other, so their weights come from the L2 cache. Outputs are the 64-row side of
wgmma. `multiply` is the whole kernel but for the sums of a part, which are the caller's: one warpgroup copies weights
and rows into a ring in shared memory (TMA), the others take OUTS outputs each. Knows the line and its ring, not what
the numbers in it mean.
Invariant: every program knows its part from its number alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from kernels_pallas import hopper, mosaic
from kernels_pallas.mosaic import Ref

OUTS = hopper.OUTS
LOADER_REGISTERS = 24
REGISTERS = 65536             # of a multiprocessor
MATH_REGISTERS_MAX = 232
IDLE_MAX = 1.125              # of the time that whole tiles take, over equal parts' time


class Refs(NamedTuple):
    """What sums are made of: runs of inputs in flight, in shared memory, and what lies beside."""

    weight: Ref                  # [stages, outs, columns of the weights' array that a run takes]
    rows: Ref                    # [stages, rows, inputs of a run]
    full: Ref                    # completes when a run has landed,
    empty: Ref                   # and this when every warpgroup that multiplies has read it
    beside: tuple[Ref, ...]      # in memory


class Part(NamedTuple):
    """What a warpgroup sums at once: OUTS outputs of a tile of rows, over runs of the line."""

    warpgroup: Array
    own: Array                   # the first output
    row: Array                   # the first row
    run_first: Array
    run_end: Array

    @property
    def outs(self) -> Any:
        """Of the tile's outputs, those of this warpgroup."""
        return pl.ds(self.warpgroup * OUTS, OUTS)


Sums = Callable[[Refs, Part], Array]
"""Sums of a part, [OUTS, rows], in the layout `mosaic.MATRIX`: awaits `full` of every run and arrives at `empty`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """Attributes:
    runs: of inputs that a tile has.
    """

    tiles: hopper.Tiles
    row_tiles: int
    out_tiles: int
    runs: int

    @classmethod
    def of(cls, tiles: hopper.Tiles, *, tokens: int, outs: int, runs: int) -> Line:
        """A product of that many rows and outputs; outputs are whole tiles."""
        return cls(tiles=tiles, row_tiles=pl.cdiv(tokens, tiles.rows), out_tiles=outs // tiles.outs, runs=runs)

    @property
    def rows(self) -> int:
        """Of x, padded to whole tiles."""
        return self.row_tiles * self.tiles.rows

    def padded(self, x_TI: Array) -> Array:
        """x with rows of zeros up to whole tiles."""
        return jnp.pad(x_TI, ((0, self.rows - len(x_TI)), (0, 0)))

    @property
    def shape(self) -> tuple[int, int]:
        """Of a warpgroup's sums."""
        return OUTS, self.tiles.rows

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


def multiply(
    line: Line, x_TI: Array, weight_OC: Array, *beside: Array, sums: Sums, memory: tuple[Any, Any],
    dtype: DTypeLike, name: str, interpret: Any,
) -> Array:
    """The product x @ weight.T of a line.

    Args:
      x_TI: padded rows; a run is as many of their numbers as `memory` holds.
      weight_OC: numbers or codes; a run is as many of their columns as `memory` holds.
      beside: arrays that `sums` reads from memory.
      memory: scratch types of `Refs.weight` and `Refs.rows`.
      dtype: of the sums, float32 or int32.
      name: what profiles show.  interpret: runs the simulator.

    Returns:
      [T, O] of `dtype`, T padded.
    """
    tiles, outs = line.tiles, len(weight_OC)
    results = (
        jax.ShapeDtypeStruct((line.rows, outs), dtype),
        jax.ShapeDtypeStruct((line.part_count, tiles.rows, tiles.outs), dtype),
    )
    scratch = (
        *memory, plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=tiles.stages),
    )

    def body(x_TI: Ref, weight_OC: Ref, *refs: Ref) -> None:
        *beside, out_TO, part_PTO, weight, rows, full, empty = refs
        seen = Refs(weight, rows, full, empty, tuple(beside))
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == tiles.warpgroups)(lambda: _load(line, weight_OC, x_TI, seen))
        pl.when(warpgroup < tiles.warpgroups)(lambda: _sum_tiles(line, sums, seen, warpgroup, out_TO, part_PTO))

    out_TO, part_PTO = mosaic.launch(
        body, x_TI, weight_OC, *beside, name=name, grid={"program": tiles.programs}, threads=tiles.warpgroups + 1,
        out_type=results, scratch=scratch, interpret=interpret,
    )
    return line.joined(out_TO, part_PTO)


def _load(line: Line, weight_OC: Ref, x_TI: Ref, refs: Refs) -> None:
    """The loader: weights and rows of each run into the ring, as far ahead as it allows."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    tiles = line.tiles
    begin, end = line.part()
    columns, inputs = refs.weight.shape[2], refs.rows.shape[2]

    def copy(at: Array, _: None) -> None:
        stage = lax.rem(at - begin, tiles.stages)

        @pl.when(at - begin >= tiles.stages)
        def _() -> None:
            plgpu.barrier_wait(refs.empty.at[stage])

        run = lax.rem(at, line.runs)
        out, row = line.place(lax.div(at, line.runs))
        of_weight = weight_OC.at[pl.ds(out, tiles.outs), pl.ds(run * columns, columns)]
        of_rows = x_TI.at[pl.ds(row, tiles.rows), pl.ds(run * inputs, inputs)]
        plgpu.copy_gmem_to_smem(of_weight, refs.weight.at[stage], refs.full.at[stage])
        plgpu.copy_gmem_to_smem(of_rows, refs.rows.at[stage], refs.full.at[stage])

    lax.fori_loop(begin, end, copy, None)
    mosaic.await_readers((refs.empty,), tiles.stages, end - begin)


def _sum_tiles(line: Line, sums: Sums, refs: Refs, warpgroup: Array, out_TO: Ref, part_PTO: Ref) -> None:
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
        part = Part(warpgroup, own, row, run_first, run_end)
        sum_ON = plgpu.layout_cast(sums(refs, part), plgpu.Layout.WGMMA_TRANSPOSED)
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
