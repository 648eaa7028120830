"""One chunk of online softmax, the piece that the XLA paths of both attention ops share.

Knows scores, values and masks; knows no page table, no row and no position.
Invariant: a chunk in which a query sees nothing leaves its state bit for bit as it was, so what a sequence gives does
not depend on how far its neighbours in the same loop must read.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.pages import Chunk

NOTHING = -1e30     # finite, so that NOTHING - NOTHING is 0 and not NaN


class SoftmaxState(NamedTuple):
    """Running maximum, denominator and weighted sum, in float32. Q counts query tokens times heads of one group."""

    top_BKQ: Array
    total_BKQ: Array
    sum_BKQH: Array


def start(batch: int, kv_heads: int, queries: int, head_dim: int, sink_KQ: Array | None) -> SoftmaxState:
    """Nothing seen yet, or only the sinks: logits that count in the denominator and have no value."""
    sum_BKQH = jnp.zeros((batch, kv_heads, queries, head_dim), jnp.float32)
    if sink_KQ is None:
        top_BKQ = jnp.full((batch, kv_heads, queries), NOTHING, jnp.float32)
        return SoftmaxState(top_BKQ, jnp.zeros_like(top_BKQ), sum_BKQH)
    top_BKQ = jnp.broadcast_to(sink_KQ.astype(jnp.float32), (batch, kv_heads, queries))
    return SoftmaxState(top_BKQ, jnp.ones_like(top_BKQ), sum_BKQH)


def add_chunk(
    state: SoftmaxState,
    q_BKQH: Array,
    keys: Chunk,
    values: Chunk,
    is_seen_BKQC: Array,
    *,
    scale: float,
    soft_cap: float | None,
) -> SoftmaxState:
    """Takes C more context slots in. The mask may have broadcast axes. Unseen values must be finite."""
    precision = jax.lax.Precision.HIGHEST if q_BKQH.dtype == jnp.float32 else None
    # The dots stay in the stored dtype: bf16 x bf16 -> f32 is the fast path of the CPU backend, twice f32 x f32.
    score_BKQC = scale * jnp.einsum(
        "BKQH,BKCH->BKQC", q_BKQH, keys.number_BKCH, preferred_element_type=jnp.float32, precision=precision
    )
    if keys.scale_BKC is not None:
        score_BKQC *= keys.scale_BKC[:, :, None, :]
    if soft_cap is not None:
        score_BKQC = soft_cap * jnp.tanh(score_BKQC / soft_cap)
    score_BKQC = jnp.where(is_seen_BKQC, score_BKQC, NOTHING)
    top_BKQ = jnp.maximum(state.top_BKQ, score_BKQC.max(-1))
    weight_BKQC = jnp.where(is_seen_BKQC, jnp.exp(score_BKQC - top_BKQ[..., None]), 0)
    keep_BKQ = jnp.exp(state.top_BKQ - top_BKQ)
    share_BKQC = weight_BKQC if values.scale_BKC is None else weight_BKQC * values.scale_BKC[:, :, None, :]
    sum_BKQH = jnp.einsum(
        "BKQC,BKCH->BKQH",
        share_BKQC.astype(values.number_BKCH.dtype), values.number_BKCH,
        preferred_element_type=jnp.float32, precision=precision,
    )
    return SoftmaxState(
        top_BKQ=top_BKQ,
        total_BKQ=state.total_BKQ * keep_BKQ + weight_BKQC.sum(-1),
        sum_BKQH=state.sum_BKQH * keep_BKQ[..., None] + sum_BKQH,
    )


def finish(state: SoftmaxState) -> Array:
    """The attention output; zero for queries that saw nothing. NaN stays NaN: a sick sequence must be noticed."""
    total_BKQ1 = state.total_BKQ[..., None]
    is_empty_BKQ1 = total_BKQ1 == 0
    return jnp.where(is_empty_BKQ1, 0, state.sum_BKQH / jnp.where(is_empty_BKQ1, 1, total_BKQ1))
