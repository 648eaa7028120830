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
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper, line, mosaic
from kernels_pallas.hopper import OUTS
from kernels_pallas.line import Line, Part, Refs
from kernels_pallas.mosaic import MATRIX, PER_ROW, Ref, along, filled
from kernels_pallas.quantized_matmul import instructions, sizes, words
from kernels_pallas.quantized_matmul.weights import PackedWeight


def quantized_matmul(
    x_TI: Array, weight: PackedWeight, *, tiles: hopper.Tiles | None = None, interpret: Any = None
) -> Array:
    """See `api.quantized_matmul`. `tiles` overrides the sizes, `interpret` runs the simulator."""
    (T, ins), (outs, _), kind = x_TI.shape, weight.shape, sizes.kind(weight)
    tiles = tiles or sizes.chosen(weight, T)
    over = Line.of(tiles, tokens=T, outs=outs, runs=ins // words.run_inputs(kind))
    plan = _Plan(
        kind=kind, extra=weight.extra[0], group=weight.group_size, is_simulated=interpret is not None, line=over
    )
    with jax.named_scope("quantized_matmul"):
        scales_sums = sizes.scales_sums(kind, plan.extra, plan.group, tiles.rows)
        memory = (
            plgpu.SMEM((tiles.stages, tiles.outs, words.RUN_BYTES), jnp.uint8),
            mosaic.shared((tiles.stages, tiles.rows, plan.run), x_TI.dtype, 64),
        )
        out_TO = line.multiply(
            over, words.arranged(over.padded(x_TI), kind), weight.code_OC, sizes.scales(weight), sizes.beside(weight),
            sums=functools.partial(_scaled_sums if scales_sums else _sums, plan), memory=memory, dtype=jnp.float32,
            name="quantized_matmul", interpret=interpret,
        )
        return out_TO[:T]


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


def _sums(plan: _Plan, refs: Refs, part: Part) -> Array:
    """Sums of a part [OUTS, rows]; each weight is scaled."""
    scale_OG, extra = refs.beside

    def over_runs(total: Ref) -> Array:
        def add(at: Array, _: None) -> None:
            stage, run = plan.line.stage(at), lax.rem(at, plan.line.runs)
            beside = _beside(plan, extra, part.own, run)
            plgpu.barrier_wait(refs.full.at[stage])
            scale = _group_numbers(plan, scale_OG, part.own, run)
            weight = _unpacked(plan, refs.weight.at[stage, part.outs], beside, scale)
            plgpu.wgmma(total, weight, refs.rows.at[stage].T)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(refs.empty.at[stage])

        lax.fori_loop(part.run_first, part.run_end, add, None)
        return total[...]

    return pl.run_scoped(over_runs, plgpu.ACC(plan.line.shape, jnp.float32))


def _scaled_sums(plan: _Plan, refs: Refs, part: Part) -> Array:
    """The same; sums of a run are scaled."""
    scale_OG, extra = refs.beside

    def add(at: Array, total: Array) -> Array:
        stage, run = plan.line.stage(at), lax.rem(at, plan.line.runs)
        beside = _beside(plan, extra, part.own, run)
        group = lax.div(run * plan.run, plan.group)
        scale_O = plgpu.load(scale_OG.at[pl.ds(part.own, OUTS), group], layout=PER_ROW, optimized=False)
        plgpu.barrier_wait(refs.full.at[stage])
        weight = _unpacked(plan, refs.weight.at[stage, part.outs], beside, None)
        sum_ = mosaic.product(plan.line.shape, weight, refs.rows.at[stage].T)
        plgpu.barrier_arrive(refs.empty.at[stage])
        return total + sum_ * along(scale_O.astype(jnp.float32), 0, plan.line.shape)

    return lax.fori_loop(part.run_first, part.run_end, add, filled(plan.line.shape, 0.0, MATRIX))


def _group_numbers(plan: _Plan, of_groups: Ref, own: Array, run: Array) -> Array:
    """A number a group [OUTS, groups of a run], in the threads that hold its codes."""
    group = lax.div(run * plan.run, plan.group)
    part = of_groups.at[pl.ds(own, OUTS), pl.ds(group, plan.groups)]
    return plgpu.load(part, layout=instructions.by_group(plan.groups), optimized=False)


def _beside(plan: _Plan, extra: Ref, own: Array, run: Array) -> Array | None:
    """Of a run: zeros [O, G], offsets [O, G] or planes of tables [O, 8]; where there is none, `extra` says nothing."""
    if plan.extra in ("zero", "offset"):
        return _group_numbers(plan, extra, own, run)
    if plan.kind not in ("table", "fp4"):
        return None
    first = own if extra.shape[0] > OUTS else 0      # one table for all
    return plgpu.load(extra.at[pl.ds(first, OUTS)], layout=instructions.TABLES, optimized=False)


def _unpacked(plan: _Plan, codes: Ref, beside: Array | None, scale: Array | None) -> Array:
    """Weights of a run, bfloat16 [OUTS, run], in the order of `words.arranged`."""
    code_OC = plgpu.load(codes, layout=instructions.CODES, optimized=False)
    if scale is not None:
        scale = scale.astype(jnp.float32)
    unpack = instructions.simulated if plan.is_simulated else instructions.unpacked
    weight = unpack(plan.kind, plan.extra, code_OC, beside, scale)
    plgpu.commit_smem()     # the codes were read by registers; the next copy is asynchronous
    return weight
