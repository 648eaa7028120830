"""The least value that top-k and top-p keep, searched for without sorting.

Floats are cut by their integer order, and what lies at or above a cut is counted or added up. A CPU halves and stops
when one entry is left, some fifteen passes over its rows. A GPU's host would wait for the device after each, so there a
search is a fixed number of passes, each of which tries fifteen cuts.
Invariant: every result depends on its own row only, and every search ends, of rows that hold NaN too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxserve.runner.vocab import blocks

COUNT_PROBE = 16.0      # the k-th largest is first looked for this far below the maximum
ROUNDING = 1e-5         # sums of probabilities are exact to less than a tenth of this
TURNS_MAX = 40          # halving ends 2^32 floats in 32 turns; the bound is for rows that hold NaN
DIGIT = 4               # bits of the answer that a pass of a GPU settles, by 2^4 - 1 cuts
GPU_BLOCK = 512         # neighbours that a warp adds up for a cut: more need several, fewer more exchange of lanes

Measured = Callable[[Array, Array], Array]      # what entries measure where they are kept: (is_kept, x) -> float32


def kth_largest(x_BV: Array, k_B: Array) -> Array:
    """[B] the k-th largest value of each row, equal ones counted one by one; -inf where k is 0 or less.

    Or a value below that has no entry between.
    """
    return lax.platform_dependent(x_BV, k_B, cpu=kth_by_halves, default=kth_by_digits)


def kth_by_halves(x_BV: Array, k_B: Array) -> Array:
    """`kth_largest` for CPUs."""
    x_BWS = blocks(x_BV, -jnp.inf)
    probe_B = x_BWS.max(-1).max(-1) - COUNT_PROBE
    return _by_halves(x_BWS, k_B.astype(jnp.float32), probe_B, measured=_count, least=jnp.ones_like)


def kth_by_digits(x_BV: Array, k_B: Array) -> Array:
    """`kth_largest` for GPUs."""
    return _by_digits(blocks(x_BV, -jnp.inf, GPU_BLOCK), k_B.astype(jnp.float32), _count)


def least_of_mass(probability_BV: Array, mass_B: Array) -> Array:
    """[B] the largest value such that the entries at or above it sum to `mass` or more; 0 where mass is 0 or less.

    Or a value below that has no entry between.

    Args:
      probability_BV: rows that sum to 1.
    """
    return lax.platform_dependent(probability_BV, mass_B, cpu=mass_by_halves, default=mass_by_digits)


def mass_by_halves(probability_BV: Array, mass_B: Array) -> Array:
    """`least_of_mass` for CPUs."""
    # All entries below (1 - mass) / V sum to less than 1 - mass, so the answer is rarely below.
    probe_B = (1 - mass_B) / probability_BV.shape[1]
    x_BWS = blocks(probability_BV, 0)
    return jnp.maximum(_by_halves(x_BWS, mass_B, probe_B, measured=_mass, least=lambda low_B: low_B), 0)


def mass_by_digits(probability_BV: Array, mass_B: Array) -> Array:
    """`least_of_mass` for GPUs."""
    return jnp.maximum(_by_digits(blocks(probability_BV, 0, GPU_BLOCK), mass_B, _mass), 0)


def _count(is_kept_BWS: Array, _: Array) -> Array:
    return is_kept_BWS.astype(jnp.float32)


def _mass(is_kept_BWS: Array, x_BWS: Array) -> Array:
    return jnp.where(is_kept_BWS, x_BWS, 0)


def _by_digits(x_BWS: Array, target_B: Array, measured: Measured) -> Array:
    """[B] the largest float v such that what lies at or above v measures `target` or more together; -inf where none
    does, or no target is set.

    Settles the answer's 32 bits from the highest on, DIGIT a pass: it raises a lower bound by as many steps as there
    are cuts that still reach the target. v is an entry, since the measure changes at entries only.

    Four bits a pass: a pass costs two operations a cut and entry, which at fifteen cuts takes an H200 about as long as
    reading the entry. Three bits need 11 passes instead of 8, five save one pass and double what each computes. One
    reduction serves all cuts: neighbouring warps read the same block. Passes are unrolled: the same kernels serve all,
    and without a loop XLA makes the whole of sampling one command buffer.
    """
    # The barrier: of branches that reduce and compare only, XLA makes a selection, which computes both always.
    low_B = lax.optimization_barrier(jnp.full(target_B.shape, _offset(_LOWEST), jnp.uint32))
    for shift in range(32 - DIGIT, -1, -DIGIT):
        left_B = _offset(_HIGHEST) - low_B
        step_X = np.arange(1, 1 << DIGIT, dtype=np.uint32) << shift
        cut_BX = _unkey(_onset(low_B[:, None] + jnp.minimum(step_X, left_B[:, None])))
        x_BW1S = x_BWS[:, :, None]
        sum_BX = measured(x_BW1S >= cut_BX[:, None, :, None], x_BW1S).sum(-1).sum(1)
        reached_B = (sum_BX >= target_B[:, None]).sum(-1, dtype=jnp.uint32)
        low_B += jnp.minimum(reached_B << shift, left_B)
    return jnp.where(target_B > 0, _unkey(_onset(low_B)), -jnp.inf)


class _Search(NamedTuple):
    """What lies at or above float `low` reaches the target, at or above `high` it does not."""

    low_B: Array
    high_B: Array
    low_sum_B: Array
    high_sum_B: Array
    turn: Array


def _by_halves(
    x_BWS: Array,
    target_B: Array,
    probe_B: Array,
    *,
    measured: Measured,
    least: Callable[[Array], Array],
) -> Array:
    """[B] the largest value v such that what lies at or above v measures `target` or more together.

    Bisection over floats in their integer order. It ends when a row's bounds hold one distinct entry between them:
    they measure less than two of the smallest that could be there, or they are neighbouring floats.

    Args:
      probe_B: where to look first.  least: what one entry measures that is as small as the lower bound.
    """
    top_B = x_BWS.max(-1).max(-1)

    def is_open(search: _Search) -> Array:
        between_B = search.low_sum_B - search.high_sum_B
        least_B = least(_unkey(search.low_B))
        # Entries so small that rounding of the sums could hide one are left to the neighbouring floats.
        is_single_B = (between_B < 1.5 * least_B) & (least_B > ROUNDING)
        return (search.low_B + 1 < search.high_B) & ~is_single_B

    def turn(search: _Search) -> _Search:
        low_B, high_B = search.low_B, search.high_B
        by_key_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1)
        middle_B = jnp.clip(jnp.where(search.turn == 0, _key(probe_B), by_key_B), low_B + 1, high_B - 1)
        is_kept_BWS = x_BWS >= _unkey(middle_B)[:, None, None]
        sum_B = measured(is_kept_BWS, x_BWS).sum(-1).sum(-1)
        is_open_B = is_open(search)
        rises_B, falls_B = is_open_B & (sum_B >= target_B), is_open_B & (sum_B < target_B)
        return _Search(
            low_B=jnp.where(rises_B, middle_B, low_B),
            high_B=jnp.where(falls_B, middle_B, high_B),
            low_sum_B=jnp.where(rises_B, sum_B, search.low_sum_B),
            high_sum_B=jnp.where(falls_B, sum_B, search.high_sum_B),
            turn=search.turn + 1,
        )

    start = _Search(
        low_B=jnp.full(target_B.shape, _LOWEST, jnp.int32),
        high_B=jnp.where(target_B > 0, _key(top_B) + 1, _LOWEST + 1),       # neighbours: nothing to look for
        low_sum_B=jnp.full_like(top_B, jnp.inf),
        high_sum_B=jnp.zeros_like(top_B),
        turn=jnp.int32(0),
    )
    found = lax.while_loop(lambda s: is_open(s).any() & (s.turn < TURNS_MAX), turn, start)
    return _unkey(found.low_B)


_LOWEST = -0x7F800000 - 1      # the key of -inf
_HIGHEST = 0x7F800001          # above +inf's: a NaN, and nothing lies at or above that


def _key(x: Array) -> Array:
    """Integers in the order of floats."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _unkey(key: Array) -> Array:
    return lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)


def _offset(key: int) -> np.uint32:
    """Keys from 0 on, between which differences do not overflow."""
    return np.uint32(key + (1 << 31))


def _onset(offset: Array) -> Array:
    return lax.bitcast_convert_type(offset ^ np.uint32(1 << 31), jnp.int32)
