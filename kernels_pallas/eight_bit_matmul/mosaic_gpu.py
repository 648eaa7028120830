"""Products of 8 bits on NVIDIA Hopper: both operands go from shared memory into the tensor cores as they are.

Resident programs on a line of work (`kernels_pallas.line`): one warpgroup copies weights and rows into a ring by TMA,
the others take 64 outputs each. int8: sums stay in the tensor cores' int32, exact. float8_e4m3fn: Hopper keeps some
14 bits of such sums, so they leave the tensor cores every 128 inputs and are added in float32 (as DeepSeek-V3's do,
arXiv 2412.19437, 3.3.2), times the scales of that group where there are some.

Traffic: weights once a tile of at most 256 rows (128 of floats: two sets of sums), rows once a tile of 64 to 256
outputs, mostly from L2; the result T x O x 4 bytes. Roofline: memory of the weights up to some hundred rows, tensor
cores beyond, at twice the rate of bfloat16. Not yet run on hardware: see docs/kernels.md."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper, line, mosaic
from kernels_pallas.eight_bit_matmul.api import RUN
from kernels_pallas.hopper import OUTS
from kernels_pallas.line import Line
from kernels_pallas.mosaic import MATRIX, PER_COLUMN, PER_ROW, Ref, along, filled

FLOAT_ROWS_MAX = 128


def tiles(dtype: Any, outs: int, tokens: int) -> tuple[hopper.Tiles, ...]:
    """Every size that a tuner tries, first what is taken without measurements."""
    rows_max = hopper.PRODUCT_ROWS[-1] if dtype == jnp.int8 else FLOAT_ROWS_MAX
    return hopper.product_tiles(outs, tokens, rows_max, lambda rows, outs: (rows + outs) * RUN)


def key(dtype: Any, groups: int, outs: int, ins: int, tokens: int) -> str:
    """What measured sizes depend on."""
    return hopper.product_key(f"{jnp.dtype(dtype).name}-{groups}", outs, ins, tokens)


def eight_bit_matmul(
    x_TI: Array, weight_OI: Array, scale_TG: Array | None, scale_OG: Array | None, *,
    sizes: hopper.Tiles | None = None, interpret: Any = None,
) -> Array:
    """See `api.eight_bit_matmul`. `sizes` overrides the tiles, `interpret` runs the simulator."""
    (T, ins), outs = x_TI.shape, len(weight_OI)
    groups = 1 if scale_OG is None else scale_OG.shape[1]
    sizes = sizes or hopper.tiles(
        "eight_bit_matmul", key(x_TI.dtype, groups, outs, ins, T), tiles(x_TI.dtype, outs, T)
    )
    of_work = Line(tiles=sizes, row_tiles=pl.cdiv(T, sizes.rows), out_tiles=outs // sizes.outs, runs=ins // RUN)
    with jax.named_scope("eight_bit_matmul"):
        padding = (0, of_work.rows - T)
        operands = {"x_TI": jnp.pad(x_TI, (padding, (0, 0))), "weight_OI": weight_OI}
        group_runs = 0
        if scale_TG is not None and scale_OG is not None:
            operands |= {"scale_GT": jnp.pad(scale_TG, (padding, (0, 0))).T, "scale_OG": scale_OG}
            group_runs = ins // scale_OG.shape[1] // RUN
        plan = _Plan(line=of_work, is_float=x_TI.dtype != jnp.int8, group_runs=group_runs)
        return of_work.joined(*_multiply(operands, plan, interpret))[:T]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What a program is compiled for.

    Attributes:
      group_runs: runs of inputs that share scales; 0 where there are no scales.
    """

    line: Line
    is_float: bool
    group_runs: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of a warpgroup's sums."""
        return OUTS, self.line.tiles.rows


class _Refs(NamedTuple):
    """What a program sees."""

    x_TI: Ref
    weight_OI: Ref
    out_TO: Ref
    part_PTO: Ref
    weight: Ref           # shared memory from here on: [stages, outs, RUN]
    rows: Ref             # [stages, rows, RUN]
    full: Ref
    empty: Ref
    scale_GT: Ref | None = None
    scale_OG: Ref | None = None


def _multiply(operands: dict[str, Array], plan: _Plan, interpret: Any) -> tuple[Array, Array]:
    """The product as far as programs own its tiles, and what they leave of others' tiles."""
    tiles_, (T, _), outs = plan.line.tiles, operands["x_TI"].shape, len(operands["weight_OI"])
    dtype = jnp.float32 if plan.is_float else jnp.int32
    results = {
        "out_TO": jax.ShapeDtypeStruct((T, outs), dtype),
        "part_PTO": jax.ShapeDtypeStruct((plan.line.part_count, tiles_.rows, tiles_.outs), dtype),
    }
    eight = operands["x_TI"].dtype
    scratch = {
        "weight": mosaic.shared((tiles_.stages, tiles_.outs, RUN), eight),
        "rows": mosaic.shared((tiles_.stages, tiles_.rows, RUN), eight),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=tiles_.stages),
        "empty": plgpu.Barrier(num_arrivals=tiles_.warpgroups, num_barriers=tiles_.stages),
    }

    def body(*refs: Ref) -> None:
        seen = _Refs(**dict(zip((*operands, *results, *scratch), refs, strict=True)))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == tiles_.warpgroups)
        def _() -> None:
            line.load(plan.line, seen.weight_OI, seen.x_TI, seen.weight, seen.rows, seen.full, seen.empty)

        @pl.when(warpgroup < tiles_.warpgroups)
        def _() -> None:
            sums = _float_sums if plan.is_float else _integer_sums

            def sum_(own: Array, row: Array, run_first: Array, run_end: Array) -> Array:
                return sums(seen, plan, warpgroup, own, row, run_first, run_end)

            line.multiply(plan.line, warpgroup, sum_, seen.out_TO, seen.part_PTO)

    return mosaic.launch(
        body, *operands.values(), name="eight_bit_matmul", grid={"program": tiles_.programs},
        threads=tiles_.warpgroups + 1, out_type=tuple(results.values()), scratch=tuple(scratch.values()),
        interpret=interpret,
    )


def _integer_sums(
    refs: _Refs, plan: _Plan, warpgroup: Array, own: Array, row: Array, run_first: Array, run_end: Array
) -> Array:
    """Sums of one tile [OUTS, rows] over some runs."""

    def over_runs(total: Ref) -> Array:
        def add(at: Array, _: None) -> None:
            stage = plan.line.stage(at)
            plgpu.barrier_wait(refs.full.at[stage])
            plgpu.wgmma(total, refs.weight.at[stage, pl.ds(warpgroup * OUTS, OUTS)], refs.rows.at[stage].T)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(refs.empty.at[stage])

        lax.fori_loop(run_first, run_end, add, None)
        return total[...]

    return pl.run_scoped(over_runs, plgpu.ACC(plan.shape, jnp.int32))


def _float_sums(
    refs: _Refs, plan: _Plan, warpgroup: Array, own: Array, row: Array, run_first: Array, run_end: Array
) -> Array:
    """The same of floats, run by run in float32."""

    def add(at: Array, total: Array) -> Array:
        stage = plan.line.stage(at)
        scale_O = scale_T = None
        if refs.scale_GT is not None and refs.scale_OG is not None:
            group = lax.div(lax.rem(at, plan.line.runs), plan.group_runs)
            scale_O = plgpu.load(refs.scale_OG.at[pl.ds(own, OUTS), group], layout=PER_ROW, optimized=False)
            of_rows = refs.scale_GT.at[group, pl.ds(row, plan.shape[1])]
            scale_T = plgpu.load(of_rows, layout=PER_COLUMN, optimized=False)
        plgpu.barrier_wait(refs.full.at[stage])
        weight = refs.weight.at[stage, pl.ds(warpgroup * OUTS, OUTS)]
        sum_ = mosaic.product(plan.shape, weight, refs.rows.at[stage].T)
        plgpu.barrier_arrive(refs.empty.at[stage])
        if scale_O is None or scale_T is None:
            return total + sum_
        return total + sum_ * along(scale_O, 0, plan.shape) * along(scale_T, 1, plan.shape)

    return lax.fori_loop(run_first, run_end, add, filled(plan.shape, 0.0, MATRIX))
