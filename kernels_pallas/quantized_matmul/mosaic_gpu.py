"""The packed product on NVIDIA Hopper: codes become bfloat16 in registers, on their way into the tensor cores.

One resident program a multiprocessor; the work, tiles of outputs x rows x runs of inputs, is one line that is cut
into equal parts, so no multiprocessor waits for the last wave. In a program one warpgroup copies codes and rows into
a ring in shared memory (TMA); the others take 64 outputs each. Outputs are the 64-row side of wgmma, so 8 rows cost 8
columns of a product; the unpacked weights are its A operand and never see shared memory. A tile that two programs
share is left in parts, which XLA adds where it reads the result.

Where few rows make scaling sums cheap and a run has one scale, codes meet the rows as the integers (or table values)
they are and sums of a run are scaled: 1.4 instructions a 4-bit weight. Else each weight is scaled in float32 and
rounded.

Traffic: the codes, once a tile of at most 256 rows, a scale (and zero) a group; rows once a tile of 64 to 256
outputs, mostly from L2; the result T x O x 4 bytes. Roofline: memory of the codes up to some 64 rows; the ring holds
up to 200 KiB. Tensor cores beyond. Not yet run on hardware: see docs/kernels.md. What a row gives depends on how the
work is cut, which depends on the number of rows: no bitwise batch invariance."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper, line, mosaic
from kernels_pallas.hopper import OUTS
from kernels_pallas.line import Line
from kernels_pallas.mosaic import MATRIX, PER_ROW, Ref, along, filled
from kernels_pallas.quantized_matmul import instructions, sizes, words
from kernels_pallas.quantized_matmul.weights import PackedWeight


def quantized_matmul(
    x_TI: Array, weight: PackedWeight, *, tiles: hopper.Tiles | None = None, interpret: Any = None
) -> Array:
    """See `api.quantized_matmul`. `tiles` overrides the sizes, `interpret` runs the simulator."""
    (T, ins), (outs, _), kind = x_TI.shape, weight.shape, sizes.kind(weight)
    tiles = tiles or sizes.chosen(weight, T)
    plan = _Plan(
        kind=kind, extra=weight.extra[0], group=weight.group_size, is_simulated=interpret is not None,
        line=Line(
            tiles=tiles, row_tiles=pl.cdiv(T, tiles.rows), out_tiles=outs // tiles.outs,
            runs=ins // words.run_inputs(kind),
        ),
    )
    with jax.named_scope("quantized_matmul"):
        padded_TI = jnp.pad(x_TI, ((0, plan.line.rows - T), (0, 0)))
        out_TO, part_PTO = _multiply(words.arranged(padded_TI, kind), weight, plan, interpret)
        return plan.line.joined(out_TO, part_PTO)[:T]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """What a program is compiled for."""

    kind: words.Kind
    extra: str
    group: int
    line: Line
    is_simulated: bool

    @property
    def run(self) -> int:
        return words.run_inputs(self.kind)

    @property
    def groups(self) -> int:
        """Of a run of inputs, at least one."""
        return max(1, self.run // self.group)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a warpgroup's sums."""
        return OUTS, self.line.tiles.rows


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
    tiles, (T, _), (outs, _) = plan.line.tiles, x_TI.shape, weight.shape
    operands = {
        "x_TI": x_TI, "code_OC": weight.code_OC, "scale_OG": sizes.scales(weight), "extra": sizes.beside(weight),
    }
    results = {
        "out_TO": jax.ShapeDtypeStruct((T, outs), jnp.float32),
        "part_PTO": jax.ShapeDtypeStruct((plan.line.part_count, tiles.rows, tiles.outs), jnp.float32),
    }
    scratch = {
        "code": plgpu.SMEM((tiles.stages, tiles.outs, words.RUN_BYTES), jnp.uint8),
        "rows": mosaic.shared((tiles.stages, tiles.rows, plan.run), x_TI.dtype, 64),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        "empty": plgpu.Barrier(num_arrivals=tiles.warpgroups, num_barriers=tiles.stages),
    }

    def body(*refs: Ref) -> None:
        seen = _Refs(**dict(zip((*operands, *results, *scratch), refs, strict=True)))
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == tiles.warpgroups)
        def _() -> None:
            line.load(plan.line, seen.code_OC, seen.x_TI, seen.code, seen.rows, seen.full, seen.empty)

        @pl.when(warpgroup < tiles.warpgroups)
        def _() -> None:
            scales_sums = sizes.scales_sums(plan.kind, plan.extra, plan.group, tiles.rows)
            sums = _scaled_sums if scales_sums else _sums

            def sum_(own: Array, _: Array, run_first: Array, run_end: Array) -> Array:
                return sums(seen, plan, warpgroup, own, run_first, run_end)

            line.multiply(plan.line, warpgroup, sum_, seen.out_TO, seen.part_PTO)

    return mosaic.launch(
        body, *operands.values(), name="quantized_matmul", grid={"program": tiles.programs},
        threads=tiles.warpgroups + 1, out_type=tuple(results.values()), scratch=tuple(scratch.values()),
        interpret=interpret,
    )


def _sums(
    refs: _Refs, plan: _Plan, warpgroup: Array, own: Array, run_first: Array, run_end: Array
) -> Array:
    """Sums of one tile [OUTS, rows] over some runs; each weight is scaled."""

    def over_runs(total: Ref) -> Array:
        def add(at: Array, _: None) -> None:
            stage, run = plan.line.stage(at), lax.rem(at, plan.line.runs)
            beside = _beside(refs, plan, own, run)
            plgpu.barrier_wait(refs.full.at[stage])
            weight = _unpacked(refs, plan, warpgroup, stage, beside, _group_numbers(refs.scale_OG, plan, own, run))
            plgpu.wgmma(total, weight, refs.rows.at[stage].T)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(refs.empty.at[stage])

        lax.fori_loop(run_first, run_end, add, None)
        return total[...]

    return pl.run_scoped(over_runs, plgpu.ACC(plan.shape, jnp.float32))


def _scaled_sums(
    refs: _Refs, plan: _Plan, warpgroup: Array, own: Array, run_first: Array, run_end: Array
) -> Array:
    """The same; sums of a run are scaled."""
    def add(at: Array, total: Array) -> Array:
        stage, run = plan.line.stage(at), lax.rem(at, plan.line.runs)
        beside = _beside(refs, plan, own, run)
        group = lax.div(run * plan.run, plan.group)
        scale_O = plgpu.load(refs.scale_OG.at[pl.ds(own, OUTS), group], layout=PER_ROW, optimized=False)
        plgpu.barrier_wait(refs.full.at[stage])
        weight = _unpacked(refs, plan, warpgroup, stage, beside, None)
        sum_ = mosaic.product(plan.shape, weight, refs.rows.at[stage].T)
        plgpu.barrier_arrive(refs.empty.at[stage])
        return total + sum_ * along(scale_O.astype(jnp.float32), 0, plan.shape)

    return lax.fori_loop(run_first, run_end, add, filled(plan.shape, 0.0, MATRIX))


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
