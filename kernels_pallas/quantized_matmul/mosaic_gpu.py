"""The packed product on NVIDIA Hopper: codes become bfloat16 in registers, on their way into the tensor cores.

One resident program a multiprocessor; the work, tiles of outputs x rows x runs of inputs, is one line that is cut into
equal parts, so no multiprocessor waits for the last wave. In a program one warpgroup copies codes and rows into a ring in
shared memory (TMA); the others take 64 outputs each. Outputs are the 64-row side of wgmma, so 8 rows cost 8 columns of a
product; the unpacked weights are its A operand and never see shared memory. A tile that two programs share is left in
parts, which XLA adds where it reads the result.

Where few rows make scaling sums cheap and a run has one scale, codes meet the rows as the integers (or table values)
they are and sums of a run are scaled: 1.4 instructions a 4-bit weight. Else each weight is scaled in float32 and rounded.

Traffic: the codes, once a tile of at most 256 rows, a scale (and zero) a group; rows once a tile of 64 to 256 outputs,
mostly from L2; the result T x O x 4 bytes. Roofline: memory of the codes up to some 64 rows; the ring holds up to 200 KiB.
Tensor cores beyond. Not yet run on hardware: see docs/kernels.md. What a row gives depends on how the work is cut, which
depends on the number of rows: no bitwise batch invariance.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import mosaic
from kernels_pallas.mosaic import MATRIX, PER_ROW, Ref, along, filled
from kernels_pallas.quantized_matmul import instructions, sizes, words
from kernels_pallas.quantized_matmul.sizes import OUTS, Blocks
from kernels_pallas.quantized_matmul.weights import PackedWeight

LOADER_REGISTERS = 24


def quantized_matmul(
    x_TI: Array, weight: PackedWeight, *, blocks: Blocks | None = None, interpret: Any = None
) -> Array:
    """See `api.quantized_matmul`. `blocks` overrides the sizes, `interpret` runs the simulator."""
    (T, ins), (outs, _) = x_TI.shape, weight.shape
    blocks = blocks or sizes.blocks(weight, T)
    kind = sizes.kind(weight)
    row_tiles = pl.cdiv(T, blocks.rows)
    plan = _Plan(
        kind=kind, extra=weight.extra[0], group=weight.group_size, blocks=blocks, row_tiles=row_tiles,
        out_tiles=outs // blocks.outs, runs=ins // words.run_inputs(kind), is_simulated=interpret is not None,
    )
    with jax.named_scope("quantized_matmul"):
        padded_TI = jnp.pad(x_TI, ((0, row_tiles * blocks.rows - T), (0, 0)))
        out_TO, part_PTO = _multiply(words.arranged(padded_TI, kind), weight, plan, interpret)
        return (out_TO + _parts(part_PTO, plan))[:T] if plan.shared_tiles else out_TO[:T]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What a program is compiled for: the line of work is (tile of outputs, tile of rows, run of inputs)."""

    kind: words.Kind
    extra: str
    group: int
    blocks: Blocks
    row_tiles: int
    out_tiles: int
    runs: int               # of inputs
    is_simulated: bool

    @property
    def run(self) -> int:
        return words.run_inputs(self.kind)

    @property
    def groups(self) -> int:
        """Of a run of inputs, at least one."""
        return max(1, self.run // self.group)

    @property
    def scales_sums(self) -> bool:
        return sizes.scales_sums(self.kind, self.extra, self.group, self.blocks.rows)

    def first(self, program: Any) -> Any:
        """Where a program's part of the line begins."""
        return program * (self.out_tiles * self.row_tiles * self.runs) // self.blocks.programs

    @property
    def shared_tiles(self) -> dict[int, list[int]]:
        """Programs that begin within a tile, by tile."""
        found: dict[int, list[int]] = {}
        for program in range(self.blocks.programs):
            begin = self.first(program)
            if begin % self.runs and begin < self.first(program + 1):
                found.setdefault(begin // self.runs, []).append(program)
        return found


def _parts(part_PTO: Array, plan: _Plan) -> Array:
    """What programs left of tiles that others began, where those tiles lie: [T, O]."""
    tiles = plan.out_tiles * plan.row_tiles
    shared = plan.shared_tiles
    deepest = max(len(programs) for programs in shared.values())
    index = np.full((deepest, tiles), -1, np.int32)
    for tile, programs in shared.items():
        index[: len(programs), tile] = programs
    total = jnp.zeros((tiles, *part_PTO.shape[1:]), jnp.float32)
    for of_tile in index:
        there = jnp.asarray(of_tile >= 0)[:, None, None]
        total += jnp.where(there, part_PTO[np.maximum(of_tile, 0)], 0.0)
    by_place = total.reshape(plan.out_tiles, plan.row_tiles, plan.blocks.rows, plan.blocks.outs)
    return by_place.transpose(1, 2, 0, 3).reshape(plan.row_tiles * plan.blocks.rows, -1)


class _Refs(NamedTuple):
    """What a program sees."""

    x_TI: Ref
    code_OC: Ref
    scale_OG: Ref
    extra: Ref            # zeros [O, G], offsets [O, G] or planes of tables [O, 8]; where there is none, the scales
    out_TO: Ref
    part_PTO: Ref
    code: Ref             # shared memory from here on: [stages, outs, RUN_BYTES]
    rows: Ref             # [stages, rows, run]
    full: Ref
    empty: Ref


def _multiply(x_TI: Array, weight: PackedWeight, plan: _Plan, interpret: Any) -> tuple[Array, Array]:
    """The product as far as programs own its tiles, and what they leave of others' tiles."""
    blocks, (T, _), (outs, _) = plan.blocks, x_TI.shape, weight.shape
    operands = {
        "x_TI": x_TI, "code_OC": weight.code_OC, "scale_OG": sizes.scales(weight), "extra": sizes.beside(weight),
    }
    results = {
        "out_TO": jax.ShapeDtypeStruct((T, outs), jnp.float32),
        "part_PTO": jax.ShapeDtypeStruct((blocks.programs, blocks.rows, blocks.outs), jnp.float32),
    }
    scratch = {
        "code": plgpu.SMEM((blocks.stages, blocks.outs, words.RUN_BYTES), jnp.uint8),
        "rows": mosaic.shared((blocks.stages, blocks.rows, plan.run), x_TI.dtype, 64),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
        "empty": plgpu.Barrier(num_arrivals=blocks.warpgroups, num_barriers=blocks.stages),
    }

    def body(*refs: Ref) -> None:
        seen = _Refs(**dict(zip((*operands, *results, *scratch), refs, strict=True)))
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == blocks.warpgroups)(lambda: _load(seen, plan))
        pl.when(warpgroup < blocks.warpgroups)(lambda: _multiply_runs(seen, plan, warpgroup))

    return mosaic.launch(
        body, *operands.values(), name="quantized_matmul", grid={"program": blocks.programs},
        threads=blocks.warpgroups + 1, out_type=tuple(results.values()), scratch=tuple(scratch.values()),
        interpret=interpret,
    )


def _part(plan: _Plan) -> tuple[Array, Array]:
    """This program's part of the line."""
    program = lax.axis_index("program")
    return plan.first(program), plan.first(program + 1)


def _place(plan: _Plan, tile: Array) -> tuple[Array, Array]:
    """First output and first row of a tile. Tiles of the same outputs follow each other: their codes come from L2."""
    out, row = lax.div(tile, plan.row_tiles), lax.rem(tile, plan.row_tiles)
    return out * plan.blocks.outs, row * plan.blocks.rows


def _load(refs: _Refs, plan: _Plan) -> None:
    """The loader: codes and rows of each run, as far ahead as the ring allows."""
    plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
    blocks = plan.blocks
    begin, end = _part(plan)

    def load(at: Array, _: None) -> None:
        stage = lax.rem(at - begin, blocks.stages)

        @pl.when(at - begin >= blocks.stages)
        def _() -> None:
            plgpu.barrier_wait(refs.empty.at[stage])

        run = lax.rem(at, plan.runs)
        out, row = _place(plan, lax.div(at, plan.runs))
        codes = refs.code_OC.at[pl.ds(out, blocks.outs), pl.ds(run * words.RUN_BYTES, words.RUN_BYTES)]
        rows = refs.x_TI.at[pl.ds(row, blocks.rows), pl.ds(run * plan.run, plan.run)]
        plgpu.copy_gmem_to_smem(codes, refs.code.at[stage], refs.full.at[stage])
        plgpu.copy_gmem_to_smem(rows, refs.rows.at[stage], refs.full.at[stage])

    lax.fori_loop(begin, end, load, None)

    def drain(at: Array, _: None) -> None:
        plgpu.barrier_wait(refs.empty.at[lax.rem(at - begin, blocks.stages)])

    lax.fori_loop(jnp.maximum(begin, end - blocks.stages), end, drain, None)


def _multiply_runs(refs: _Refs, plan: _Plan, warpgroup: Array) -> None:
    """The others: 64 outputs each, tile by tile."""
    blocks = plan.blocks
    plgpu.set_max_registers(sizes.math_registers(blocks.warpgroups, LOADER_REGISTERS), action="increase")
    begin, end = _part(plan)
    tile_first = lax.div(begin, plan.runs)
    tile_count = jnp.where(begin < end, lax.div(end - 1, plan.runs) - tile_first + 1, 0)

    def multiply_tile(index: Array, _: None) -> None:
        tile = tile_first + index
        run_first = jnp.maximum(begin, tile * plan.runs)
        run_end = jnp.minimum(end, (tile + 1) * plan.runs)
        out, row = _place(plan, tile)
        own = out + warpgroup * OUTS
        sum_ = _scaled_sums if plan.scales_sums else _sums
        sum_ON = plgpu.layout_cast(sum_(refs, plan, warpgroup, own, begin, run_first, run_end), plgpu.Layout.WGMMA_TRANSPOSED)
        is_own = run_first == tile * plan.runs

        @pl.when(is_own)
        def _() -> None:
            refs.out_TO.at[pl.ds(row, blocks.rows), pl.ds(own, OUTS)].T[...] = sum_ON

        @pl.when(jnp.logical_not(is_own))
        def _() -> None:
            program = lax.axis_index("program")
            refs.part_PTO.at[program, :, pl.ds(warpgroup * OUTS, OUTS)].T[...] = sum_ON

    lax.fori_loop(0, tile_count, multiply_tile, None)


def _sums(
    refs: _Refs, plan: _Plan, warpgroup: Array, own: Array, begin: Array, run_first: Array, run_end: Array
) -> Array:
    """Sums of one tile [OUTS, rows] over some runs; each weight is scaled."""

    def over_runs(total: Ref) -> Array:
        def add(at: Array, _: None) -> None:
            stage = lax.rem(at - begin, plan.blocks.stages)
            run = lax.rem(at, plan.runs)
            beside = _beside(refs, plan, own, run)
            plgpu.barrier_wait(refs.full.at[stage])
            weight = _unpacked(refs, plan, warpgroup, stage, beside, _group_numbers(refs.scale_OG, plan, own, run))
            plgpu.wgmma(total, weight, refs.rows.at[stage].T)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(refs.empty.at[stage])

        lax.fori_loop(run_first, run_end, add, None)
        return total[...]

    return pl.run_scoped(over_runs, plgpu.ACC((OUTS, plan.blocks.rows), jnp.float32))


def _scaled_sums(
    refs: _Refs, plan: _Plan, warpgroup: Array, own: Array, begin: Array, run_first: Array, run_end: Array
) -> Array:
    """The same; sums of a run are scaled."""
    shape = (OUTS, plan.blocks.rows)

    def add(at: Array, total: Array) -> Array:
        stage = lax.rem(at - begin, plan.blocks.stages)
        run = lax.rem(at, plan.runs)
        beside = _beside(refs, plan, own, run)
        group = lax.div(run * plan.run, plan.group)
        scale_O = plgpu.load(refs.scale_OG.at[pl.ds(own, OUTS), group], layout=PER_ROW, optimized=False)
        plgpu.barrier_wait(refs.full.at[stage])
        weight = _unpacked(refs, plan, warpgroup, stage, beside, None)
        sum_ = mosaic.product(shape, weight, refs.rows.at[stage].T)
        plgpu.barrier_arrive(refs.empty.at[stage])
        return total + sum_ * along(scale_O.astype(jnp.float32), 0, shape)

    return lax.fori_loop(run_first, run_end, add, filled(shape, 0.0, MATRIX))


def _group_numbers(of_groups: Ref, plan: _Plan, own: Array, run: Array) -> Array:
    """A number a group [OUTS, groups of a run], in the threads that hold its codes."""
    group = lax.div(run * plan.run, plan.group)
    part = of_groups.at[pl.ds(own, OUTS), pl.ds(group, plan.groups)]
    return plgpu.load(part, layout=instructions.by_group(plan.groups), optimized=False)


def _beside(refs: _Refs, plan: _Plan, own: Array, run: Array) -> Array | None:
    """Zeros, offsets or tables of a run."""
    if plan.extra in ("zero", "offset"):
        return _group_numbers(refs.extra, plan, own, run)
    if plan.kind not in ("table", "fp4"):
        return None
    first = own if refs.extra.shape[0] > OUTS else 0      # one table for all
    return plgpu.load(refs.extra.at[pl.ds(first, OUTS)], layout=instructions.TABLES, optimized=False)


def _unpacked(
    refs: _Refs, plan: _Plan, warpgroup: Array, stage: Array, beside: Array | None, scale: Array | None
) -> Array:
    """Weights of a run, bfloat16 [OUTS, run], in the order of `words.arranged`."""
    codes = refs.code.at[stage, pl.ds(warpgroup * OUTS, OUTS)]
    code_OC = plgpu.load(codes, layout=instructions.CODES, optimized=False)
    if scale is not None:
        scale = scale.astype(jnp.float32)
    unpack = instructions.simulated if plan.is_simulated else instructions.unpacked
    weight = unpack(plan.kind, plan.extra, code_OC, beside, scale)
    plgpu.commit_smem()     # the codes were read by registers; the next copy is asynchronous
    return weight
