"""Work cut in equal parts: every run is somebody's once, parts of shared tiles are found again, registers are there."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import hopper
from kernels_pallas.hopper import Tiles
from scripts.bench_kernels import CASES, call_of

if jax.__version_info__ < (0, 11):
    pytest.skip("the kernels need jax >= 0.11", allow_module_level=True)

from kernels_pallas import line
from kernels_pallas.line import Line


def of(programs: int, row_tiles: int = 2, out_tiles: int = 3, runs: int = 5) -> Line:
    tiles = Tiles(rows=8, warpgroups=1, stages=2, programs=programs)
    return Line(tiles=tiles, row_tiles=row_tiles, out_tiles=out_tiles, runs=runs)


@pytest.mark.parametrize("programs", [1, 2, 4, 7, 30, 40])
def test_parts_are_equal_and_join_to_the_sums_of_tiles(programs: int) -> None:
    """Every run of a tile is worth its own number; a program writes or leaves what its part holds."""
    work, rng = of(programs), np.random.default_rng(0)
    worth = rng.integers(1, 100, 6 * work.runs)
    out_TO, part_PTO = np.zeros((work.rows, 192), np.int32), np.full((programs, 8, 64), 777, np.int32)
    sizes = []
    for program in range(programs):
        begin, end = work.first(program), work.first(program + 1)
        sizes.append(end - begin)
        for tile in range(begin // work.runs, -(-end // work.runs)):
            first, last = max(begin, tile * work.runs), min(end, (tile + 1) * work.runs)
            if first >= last:
                continue
            sum_ = worth[first:last].sum()
            out, row = tile // 2 * 64, tile % 2 * 8
            if first == tile * work.runs:
                out_TO[row : row + 8, out : out + 64] = sum_
            else:
                part_PTO[program] = sum_
    assert work.is_cut == (programs not in (1, 2))
    assert sum(sizes) == 30 and max(sizes) - min(sizes) <= 1
    joined = np.asarray(work.joined(jnp.asarray(out_TO), jnp.asarray(part_PTO)))
    of_tiles = worth.reshape(3, 2, work.runs).sum(2)
    np.testing.assert_array_equal(joined, np.repeat(np.repeat(of_tiles.T, 8, 0), 64, 1))


@pytest.mark.parametrize("warpgroups", [1, 2, 4])
def test_no_program_asks_for_registers_that_are_not_there(warpgroups: int) -> None:
    share = line.REGISTERS // (128 * (warpgroups + 1)) // 8 * 8
    asked = line.LOADER_REGISTERS + warpgroups * line.math_registers(warpgroups)
    assert asked <= min(share, line.MATH_REGISTERS_MAX) * (warpgroups + 1)


@pytest.mark.parametrize("op", ["quantized_matmul", "eight_bit_matmul"])
def test_tiles_divide_the_outputs_and_fit(op: str) -> None:
    from kernels_pallas.eight_bit_matmul import mosaic_gpu as of_eight_bits
    from kernels_pallas.quantized_matmul import sizes, words

    for case in CASES[op]:
        arrays = jax.eval_shape(lambda case=case: call_of(op, case, jnp.dtype(jnp.bfloat16))[1])
        if op == "quantized_matmul":
            tried, run = sizes.tiles(arrays[1], case.tokens), words.run_inputs(sizes.kind(arrays[1]))
            bytes_ = [tile.outs * words.RUN_BYTES + tile.rows * run * 2 for tile in tried]
        else:
            tried = of_eight_bits.tiles(arrays[1].dtype, case.width_out, case.tokens)
            bytes_ = [(tile.outs + tile.rows) * 128 for tile in tried]
        assert len(set(tried)) == len(tried) > 1
        for tile, size in zip(tried, bytes_, strict=True):
            assert case.width_out % tile.outs == 0 and tile.stages >= 2
            assert tile.stages * size <= hopper.PROGRAM_BYTES_MAX
