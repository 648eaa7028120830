"""Products of 8 bits on NVIDIA Hopper: both operands go from shared memory into the tensor cores as they are.

Resident programs on a line of work (`kernels_pallas.line`): one warpgroup copies weights and rows into a ring by TMA,
the others take 64 outputs each. int8: sums stay in the tensor cores' int32, exact. float8_e4m3fn: Hopper keeps some
14 bits of such sums, so they leave the tensor cores every 128 inputs and are added in float32 (as DeepSeek-V3's do,
arXiv 2412.19437, 3.3.2), times the scales of that group where there are some.

Traffic: weights once a tile of at most 256 rows (128 of floats: two sets of sums), rows once a tile of 64 to 256
outputs, mostly from L2; the result T x O x 4 bytes. Roofline: memory of the weights up to some hundred rows, tensor
cores beyond, at twice the rate of bfloat16. Not yet run on hardware: see docs/kernels.md."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper, line, mosaic
from kernels_pallas.eight_bit_matmul.api import RUN
from kernels_pallas.hopper import OUTS
from kernels_pallas.line import Line, Part, Refs
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
    over = Line.of(sizes, tokens=T, outs=outs, runs=ins // RUN)
    with jax.named_scope("eight_bit_matmul"):
        scales: tuple[Array, ...] = ()
        is_integer = x_TI.dtype == jnp.int8
        sums = functools.partial(_integer_sums if is_integer else _float_sums, over)
        if scale_TG is not None and scale_OG is not None:
            scales = over.padded(scale_TG).T, scale_OG
        memory = (
            mosaic.shared((sizes.stages, sizes.outs, RUN), x_TI.dtype),
            mosaic.shared((sizes.stages, sizes.rows, RUN), x_TI.dtype),
        )
        out_TO = line.multiply(
            over, over.padded(x_TI), weight_OI, *scales, memory=memory, name="eight_bit_matmul", interpret=interpret,
            sums=sums, dtype=jnp.int32 if is_integer else jnp.float32,
        )
        return out_TO[:T]


def _integer_sums(over: Line, refs: Refs, part: Part) -> Array:
    """Sums of a part [OUTS, rows]."""

    def over_runs(total: Ref) -> Array:
        def add(at: Array, _: None) -> None:
            stage = over.stage(at)
            plgpu.barrier_wait(refs.full.at[stage])
            plgpu.wgmma(total, refs.weight.at[stage, part.outs], refs.rows.at[stage].T)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(refs.empty.at[stage])

        lax.fori_loop(part.run_first, part.run_end, add, None)
        return total[...]

    return pl.run_scoped(over_runs, plgpu.ACC(over.shape, jnp.int32))


def _float_sums(over: Line, refs: Refs, part: Part) -> Array:
    """The same of floats, run by run in float32."""

    def add(at: Array, total: Array) -> Array:
        stage = over.stage(at)
        scale_O = scale_T = None
        if refs.beside:
            scale_GT, scale_OG = refs.beside
            group = lax.div(lax.rem(at, over.runs), over.runs // scale_OG.shape[1])
            scale_O = plgpu.load(scale_OG.at[pl.ds(part.own, OUTS), group], layout=PER_ROW, optimized=False)
            of_rows = scale_GT.at[group, pl.ds(part.row, over.shape[1])]
            scale_T = plgpu.load(of_rows, layout=PER_COLUMN, optimized=False)
        plgpu.barrier_wait(refs.full.at[stage])
        weight = refs.weight.at[stage, part.outs]
        sum_ = mosaic.product(over.shape, weight, refs.rows.at[stage].T)
        plgpu.barrier_arrive(refs.empty.at[stage])
        if scale_O is None or scale_T is None:
            return total + sum_
        return total + sum_ * along(scale_O, 0, over.shape) * along(scale_T, 1, over.shape)

    return lax.fori_loop(part.run_first, part.run_end, add, filled(over.shape, 0.0, MATRIX))
