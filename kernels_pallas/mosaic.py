"""Pieces of Mosaic GPU programs that kernels share: launching, rings of pages in shared memory, scores, edges.

Knows one program's references, barriers and register layouts; knows no work item. Imported only where jax >= 0.11.
Invariant: every completed phase of a barrier is waited for, and what registers read of or wrote to shared memory is
committed before an asynchronous copy or a wgmma may touch it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from kernels_pallas.quantized import Pages, QuantizedPages

LOG2E = math.log2(math.e)        # the kernels' softmax is to base 2: one instruction, ex2
NOTHING = -1e30                  # finite, so that NOTHING - NOTHING is 0 and not NaN
WIDENED_ROWS, WIDENED_COLUMNS = 64, 64     # of codes at once: whole tiles of shared memory
REDUCTION_BYTES = 2048           # jax's own default
COLUMNS_AT_ONCE = 64             # at once: a whole block of heads of 256 would not fit into the registers left

MATRIX = plgpu.Layout.WGMMA
PER_ROW, PER_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

Ref = Any      # pallas has no public type for references


class Ring(NamedTuple):
    """Blocks of context in flight: `full` completes when a block has landed, `empty` when it may be overwritten."""

    block: Ref     # [stages, context, H]
    full: Ref
    empty: Ref
    scale: Ref | None = None     # [stages, context], where the block holds codes
    wide: Ref | None = None      # [context, H]: the codes of one block as numbers, which a product can read


def shared(shape: tuple[int, ...], dtype: DTypeLike, columns_max: int = 128) -> Any:
    """Shared memory in the tiled and swizzled form that TMA writes and wgmma reads.

    Args:
      columns_max: of a tile; only whole tiles can be sliced off.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(min(shape[-1], columns_max) * itemsize * 8)
    return plgpu.SMEM(
        shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))
    )


def ring(
    name: str, pages: Pages, stages: int, context: int, dtype: DTypeLike, readers: int
) -> dict[str, Any]:
    """Scratch of a Ring, by the names that a kernel gives to it. A page is a copy and an arrival, its scales another.

    Args:
      dtype: of the products.
    """
    head_dim, copies = pages.shape[3], context // pages.shape[2]
    is_quantized = isinstance(pages, QuantizedPages)
    pool, columns_max = (pages.code_PKSH, WIDENED_COLUMNS) if is_quantized else (pages, head_dim)
    scratch = {
        f"{name}_block": shared((stages, context, head_dim), pool.dtype, columns_max),
        f"{name}_full": plgpu.Barrier(num_arrivals=copies * len(jax.tree.leaves(pages)), num_barriers=stages),
        f"{name}_empty": plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
    }
    if is_quantized:
        scratch[f"{name}_scale"] = plgpu.SMEM((stages, context), pages.scale_PKS.dtype)
        scratch[f"{name}_wide"] = shared((context, head_dim), dtype)
    return scratch


def pools(name: str, pages: Pages) -> dict[str, Array]:
    """The arrays of a pool, by the names that a kernel gives to them."""
    if isinstance(pages, QuantizedPages):
        return {f"{name}_PKSH": pages.code_PKSH, f"{name}_scale_PKS": pages.scale_PKS}
    return {f"{name}_PKSH": pages}


def load_block(
    into: Ring, pages_PKSH: Ref, scale_PKS: Ref | None, table_RM: Ref, row: Array, head: Array, turn: Array,
    *, first: Array, begin: Array, end: Array,
) -> None:
    """Starts the copies of the pages that hold any of [begin, end) into the ring's place of `turn`.

    Args:
      turn: blocks that this program loaded before.  first: the block's first context slot.
    """
    stages, context, _ = into.block.shape
    page_size = pages_PKSH.shape[2]
    place = lax.rem(turn, stages)

    @pl.when(turn >= stages)
    def _() -> None:
        plgpu.barrier_wait(into.empty.at[place])

    for index in range(context // page_size):
        slot = first + index * page_size
        is_needed = (slot < end) & (slot + page_size > begin)

        @pl.when(is_needed)
        def _(index: int = index, slot: Array = slot) -> None:
            page = table_RM[row, lax.div(slot, page_size)]
            own = pl.ds(index * page_size, page_size)
            plgpu.copy_gmem_to_smem(pages_PKSH.at[page, head], into.block.at[place, own], into.full.at[place])
            if scale_PKS is not None:
                # Without a tensor map: with one a copy has to begin at a multiple of 128 bytes of shared memory.
                plgpu.copy_gmem_to_smem(
                    scale_PKS.at[page, head], into.scale.at[place, own], into.full.at[place],
                    oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )

        @pl.when(jnp.logical_not(is_needed))
        def _() -> None:
            plgpu.barrier_arrive(into.full.at[place])
            if scale_PKS is not None:
                plgpu.barrier_arrive(into.full.at[place])


def drain(rings: tuple[Ring, ...], turns: Array) -> None:
    """Waits until the readers are done with the last blocks, so that no phase is left unobserved."""
    await_readers(tuple(one.empty for one in rings), rings[0].block.shape[0], turns)


def await_readers(empties: tuple[Ref, ...], stages: int, turns: Array) -> None:
    """The same of rings of any kind: the barriers by which readers give places back."""

    def wait(turn: Array, carry: None) -> None:
        for empty in empties:
            plgpu.barrier_wait(empty.at[lax.rem(turn, stages)])

    lax.fori_loop(jnp.maximum(turns - stages, 0), turns, wait, None)


def clear_outside(block: Ref, first: Array, begin: Array, end: Array) -> None:
    """Zeroes the rows of a block [C, H] of values whose slots are not in [begin, end): 0 * NaN is NaN."""
    slots, head_dim = block.shape
    width = min(COLUMNS_AT_ONCE, head_dim)
    shape = (slots, width)
    slot = first + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
    for column in range(0, head_dim, width):
        part = block.at[:, pl.ds(column, width)]
        value = plgpu.load(part, layout=MATRIX, optimized=False)
        part[...] = jnp.where((slot >= begin) & (slot < end), value, jnp.zeros_like(value))
    plgpu.commit_smem()


def widen(codes: Ref, into: Ref, scale: Ref | None = None) -> None:
    """Codes of a block [C, H] as numbers that a product can read, times a scale a slot if given. The caller commits."""
    slots, head_dim = codes.shape
    width = min(WIDENED_COLUMNS, head_dim)
    for row in range(0, slots, WIDENED_ROWS):
        for column in range(0, head_dim, width):
            part = pl.ds(row, WIDENED_ROWS), pl.ds(column, width)
            code = plgpu.load(codes.at[part], layout=MATRIX, optimized=False)
            number = code if jnp.issubdtype(code.dtype, jnp.integer) and scale is None else code.astype(jnp.float32)
            if scale is not None:
                scale_C = plgpu.load(scale.at[pl.ds(row, WIDENED_ROWS)], layout=PER_ROW, optimized=False)
                number *= along(scale_C.astype(jnp.float32), 0, number.shape)
            into[part] = number.astype(into.dtype)


def scales(ring: Ring, place: Array, layout: Any) -> Array:
    """What the codes of one block stand for."""
    return plgpu.load(ring.scale.at[place], layout=layout, optimized=False).astype(jnp.float32)


def held_scales(ring: Ring, place: Array, layout: Any, first: Array, begin: Array, end: Array) -> Array:
    """The same, zero for slots that are not in [begin, end): 0 * NaN is NaN."""
    slot = first + plgpu.broadcasted_iota(jnp.int32, ring.scale.shape[1:], 0, layout=layout)
    return jnp.where((slot >= begin) & (slot < end), scales(ring, place, layout), 0.0)


def product(shape: tuple[int, int], lhs: Ref, rhs: Ref) -> Array:
    """lhs @ rhs in float32, from shared memory."""

    def multiply(total: Ref) -> Array:
        plgpu.wgmma(total, lhs, rhs)
        return total[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def base_two_scores(dot: Array, *, scale: float, soft_cap: float | None) -> Array:
    """Scores to base 2.

    tanh(x) = 1 - 2 / (e^2x + 1): the approximate instruction for tanh is off by 5e-4, times the cap. The quotient goes
    through log2 and exp2, an instruction each; a division costs registers that heads of 256 do not have.
    """
    if soft_cap is None:
        return dot * (scale * LOG2E)
    top = soft_cap * LOG2E
    return top - jnp.exp2(math.log2(2 * top) - jnp.log2(jnp.exp2(dot * (2 * LOG2E * scale / soft_cap)) + 1.0))


def along(vector: Array, axis: int, shape: tuple[int, int]) -> Array:
    """A vector as a matrix that varies along `axis`."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def filled(shape: tuple[int, ...], value: float, layout: Any) -> Array:
    """A constant in a register layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def launch(
    body: Callable[..., None], *operands: Array | jax.Ref, name: str, grid: dict[str, int], threads: int,
    out_type: Any, scratch: tuple[Any, ...], interpret: Any, reduction_bytes: int = REDUCTION_BYTES,
) -> Any:
    """A kernel of `threads` warpgroups a program; `name` is what profiles show.

    Args:
      reduction_bytes: of shared memory for reductions between the warps of a warpgroup; those along rows need none.
    """
    body.__name__ = name
    return plgpu.kernel(
        body, out_type=out_type, scratch_types=scratch, grid=tuple(grid.values()), grid_names=tuple(grid),
        num_threads=threads, thread_name="warpgroup", interpret=interpret,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=reduction_bytes),
    )(*operands)
