"""Products of one or two rows on a CPU, where XLA's dots of 8- and 16-bit types reach a quarter of the memory's speed.

A decode step of one stream reads every weight once for 2 operations each: only the memory should count. XLA's dot
first packs the weights for its matrix kernels. Here the product is spelt so that LLVM makes the loop one would write:
16 running sums a weight row, fed by contiguous loads, added up at the end.

    weight row  [ 16 | 16 | 16 | ... ]        term s is 16 columns; a chunk is TERMS_MAX terms at most
    x row       [ 16 | 16 | 16 | ... ]        sums[o, t, chunk, lane] = Σ_s weight · x

Measured (30 layers of SmolLM2, 212 MB, 2 cores): one row 8 ms, two rows 9 ms; more are no better than dots (19 ms).
Invariant: sums in float32; their order differs from that of dots, so results may differ in the last bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

ROWS_MAX = 2        # rows up to which this beats dots
LANES = 16          # of float32 in an AVX-512 register
TERMS_MAX = 48      # of a chunk: every term is an instruction or two of the loop's body, and costs compile time


def lane_matmul(x_TI: Array, weight_OI: Array) -> Array:
    """x · weightᵀ in float32, for T ≤ ROWS_MAX. Any width_in that 16 divides is fast; others are padded."""
    outs, tokens = weight_OI.shape[0], x_TI.shape[0]
    sums = _lane_sums(x_TI, weight_OI, jnp.float32)
    ones = jnp.ones(sums.shape[1], jnp.float32)
    total = jnp.einsum("NL,L->N", sums, ones, precision=jax.lax.Precision.HIGHEST)
    return total.reshape(outs, tokens).T


def lane_matmul_int8(x_TI: Array, weight_OI: Array) -> Array:
    """x · weightᵀ of int8 codes in int32, exact. Twice the memory's work a byte: 15 to 20 GB/s on two cores."""
    outs, tokens = weight_OI.shape[0], x_TI.shape[0]
    return _lane_sums(x_TI, weight_OI, jnp.int32).sum(-1).reshape(outs, tokens).T


def _lane_sums(x_TI: Array, weight_OI: Array, dtype: DTypeLike) -> Array:
    """Partial sums [O · T, chunks · LANES]; their sum over the last axis is the product."""
    if rest := -x_TI.shape[1] % LANES:
        x_TI, weight_OI = (jnp.pad(array, ((0, 0), (0, rest))) for array in (x_TI, weight_OI))
    (T, width), outs = x_TI.shape, weight_OI.shape[0]
    chunks = _chunk_count(width // LANES)
    terms = width // LANES // chunks
    weight = weight_OI.reshape(outs, 1, chunks, terms, LANES)
    x = x_TI.astype(dtype).reshape(1, T, chunks, terms, LANES)
    sums = weight[..., 0, :].astype(dtype) * x[..., 0, :]
    for term in range(1, terms):
        sums += weight[..., term, :].astype(dtype) * x[..., term, :]
    # Fused with what follows, the loop would no longer be made of whole registers.
    return jax.lax.optimization_barrier(sums).reshape(outs * T, chunks * LANES)


def _chunk_count(terms: int) -> int:
    """The fewest equal chunks of at most TERMS_MAX terms."""
    return next(count for count in range(1, terms + 1) if terms % count == 0 and terms // count <= TERMS_MAX)
