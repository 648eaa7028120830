"""What may run the Pallas:Triton attention kernels, and the pieces they share: loads of context through a page table.

Triton is the portable baseline: CUDA from Ampere on, and ROCm. jax has deprecated it, so it is kept apart and imported
late. Knows pages, masks and one chunk of online softmax; knows no work item.
Invariant: what must not be seen is never loaded, so poison needs no clearing; loads are masked.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

LOG2E = math.log2(math.e)
NOTHING = -1e30          # finite, so that NOTHING - NOTHING is 0 and not NaN
ROWS_MIN = 16            # what the tensor cores take at least
ANYWHERE = pl.BlockSpec(memory_space=pl.ANY)

Ref = Any                # pallas has no public type for references


class Softmax(NamedTuple):
    """Running maximum and denominator of some rows [Q], to base 2, and their weighted sum [Q, H]."""

    top_Q: Array
    total_Q: Array
    sum_QH: Array


LATENT_ROWS = 32         # (token, head) of a program over a latent cache: 64 registers a thread of 8 warps for the sum


class Pool(NamedTuple):
    """References to the keys or values of a layer, and to scales where they are codes."""

    pages: Ref
    scale: Ref | None


def padded(rows: int) -> int:
    """Rows of a Triton block: a power of two."""
    return max(ROWS_MIN, 1 << (rows - 1).bit_length())


def turn_slots(head_dim: int) -> int:
    """Context slots of a turn: what an L4 has shared memory for, also for both parts of a latent cache."""
    return 64 if head_dim <= 128 else 32


def parts(head_dim: int, value_dim: int | None) -> tuple[tuple[int, int], ...]:
    """(first, width) of the columns that are loaded at once, powers of two. Values of a latent cache are the first."""
    if value_dim is None or value_dim == head_dim:
        return ((0, head_dim),)
    return (0, value_dim), (value_dim, head_dim - value_dim)


def unpack(
    refs: tuple[Ref, ...], is_quantized: bool, *, is_latent: bool = False
) -> tuple[Pool, Pool | None, tuple[Ref, ...]]:
    """The pools of keys and values, which come first among a kernel's references, and the rest."""
    if is_latent:
        return (Pool(refs[0], refs[1]), None, refs[2:]) if is_quantized else (Pool(refs[0], None), None, refs[1:])
    if is_quantized:
        return Pool(refs[0], refs[1]), Pool(refs[2], refs[3]), refs[4:]
    return Pool(refs[0], None), Pool(refs[1], None), refs[2:]


def start(sink_Q: Array, head_dim: int) -> Softmax:
    """Only the sinks seen, which are NOTHING where there are none."""
    total_Q = jnp.where(sink_Q > NOTHING, 1.0, 0.0)
    return Softmax(sink_Q, total_Q, jnp.zeros((sink_Q.shape[0], head_dim), jnp.float32))


def add_context(
    state: Softmax, queries: tuple[Array, ...], keys: Pool, values: Pool | None, table_RM: Ref, row: Array, head: Array,
    slot_C: Array, is_held_C: Array, begin_Q: Array, end_Q: Array, *, scale: float, soft_cap: float | None,
) -> Softmax:
    """Takes a turn's context slots in; a row sees those in [begin, end) that are held.

    Args:
      queries: by the `parts` of their columns.  values: None where the first part of the keys is them.
    """
    load = functools.partial(_load, table_RM=table_RM, row=row, head=head, slot_C=slot_C, is_held_C=is_held_C)
    width = queries[0].shape[1]
    k_CH, k_scale_C = load(keys, columns=(0, width), dtype=queries[0].dtype)
    score_QC = plt.dot(queries[0], k_CH.T)
    for q_QH in queries[1:]:     # what turns, of a latent cache
        rest_CH, _ = load(keys, columns=(width, q_QH.shape[1]), dtype=q_QH.dtype)
        score_QC += plt.dot(q_QH, rest_CH.T)
    if k_scale_C is not None:
        score_QC *= k_scale_C[None, :]
    score_QC *= scale
    if soft_cap is not None:     # tanh(x) = 1 - 2 / (e^2x + 1)
        score_QC = soft_cap * (1 - 2 / (jnp.exp2(score_QC * (2 * LOG2E / soft_cap)) + 1))
    is_seen_QC = is_held_C[None, :] & (slot_C[None, :] >= begin_Q[:, None]) & (slot_C[None, :] < end_Q[:, None])
    score_QC = jnp.where(is_seen_QC, score_QC * LOG2E, NOTHING)
    top_Q = jnp.maximum(state.top_Q, score_QC.max(-1))
    weight_QC = jnp.where(is_seen_QC, jnp.exp2(score_QC - top_Q[:, None]), 0.0)
    keep_Q = jnp.exp2(state.top_Q - top_Q)
    if values is None:
        v_CH, v_scale_C = k_CH, k_scale_C
    else:
        v_CH, v_scale_C = load(values, columns=(0, width), dtype=queries[0].dtype)
    total_Q = state.total_Q * keep_Q + weight_QC.sum(-1)
    if v_scale_C is not None:
        weight_QC *= v_scale_C[None, :]
    sum_QH = state.sum_QH * keep_Q[:, None] + plt.dot(weight_QC.astype(v_CH.dtype), v_CH)
    return Softmax(top_Q, total_Q, sum_QH)


def _load(
    pool: Pool, *, table_RM: Ref, row: Array, head: Array, slot_C: Array, is_held_C: Array, columns: tuple[int, int],
    dtype: Any,
) -> tuple[Array, Array | None]:
    page_size, (begin, width) = pool.pages.shape[2], columns
    page_C = plt.load(table_RM.at[row, slot_C // page_size], mask=is_held_C, other=0)
    place_C, column_H = slot_C % page_size, begin + jnp.arange(width)[None, :]
    mask_CH = jnp.broadcast_to(is_held_C[:, None], (slot_C.shape[0], width))
    zero = jnp.zeros((), pool.pages.dtype)
    number_CH = plt.load(pool.pages.at[page_C[:, None], head, place_C[:, None], column_H], mask=mask_CH, other=zero)
    if pool.scale is None:
        return number_CH, None
    scale_C = plt.load(
        pool.scale.at[page_C, head, place_C], mask=is_held_C, other=jnp.zeros((), pool.scale.dtype)
    )
    return number_CH.astype(dtype), scale_C.astype(jnp.float32)
