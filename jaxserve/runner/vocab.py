"""Reductions over the vocabulary that stay fast on every backend, and the search for a threshold without sorting.

Knows arrays [B, V] only. A row is reduced in blocks of 128 neighbours, then over blocks: XLA's CPU backend turns the
first into vector code, where `jnp.argmax` over 16 x 49,152 takes 2.0 ms and this 0.16 ms.
Invariant: every result depends on its own row only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

BLOCK = 128             # neighbours reduced together
COUNT_PROBE = 16.0      # the k-th largest logit is first looked for this far below the maximum
ROUNDING = 1e-5         # sums of probabilities are exact to less than a tenth of this
TURNS_MAX = 40          # a search halves 2^32 floats; the bound is for rows that hold NaN


def blocks(x_BV: Array, fill: float) -> Array:
    """[B, W, S] with S = BLOCK, the last block filled up."""
    B, V = x_BV.shape
    return jnp.pad(x_BV, ((0, 0), (0, -V % BLOCK)), constant_values=fill).reshape(B, -1, BLOCK)


def row_max(x_BV: Array) -> Array:
    """[B] the maximum; NaN where the row holds one."""
    return blocks(x_BV, -jnp.inf).max(-1).max(-1)


def row_min(x_BV: Array) -> Array:
    """[B] the minimum; NaN where the row holds one."""
    return blocks(x_BV, jnp.inf).min(-1).min(-1)


def argmax(x_BV: Array) -> Array:
    """[B] the first index of the maximum."""
    x_BWS = blocks(x_BV, -jnp.inf)
    block_B = jnp.argmax(x_BWS.max(-1), -1)
    x_BS = jnp.take_along_axis(x_BWS, block_B[:, None, None], 1)[:, 0]
    return (block_B * BLOCK + jnp.argmax(x_BS, -1)).astype(jnp.int32)


def top(x_BV: Array, count: int) -> tuple[Array, Array]:
    """[B, X] the `count` largest values, largest first, and their indices; equal values by index."""
    B, V = x_BV.shape
    x_BWS = blocks(x_BV, -jnp.inf)
    if count >= x_BWS.shape[1]:
        index_BX = jnp.argsort(x_BV, axis=-1, stable=True, descending=True)[:, : min(count, V)]
        return jnp.take_along_axis(x_BV, index_BX, 1), index_BX     # lax.top_k of everything loses the order of ties
    # The largest values lie in the blocks of largest maxima; in index order, so that equal values stay in order.
    _, block_BX = lax.top_k(x_BWS.max(-1), count)
    block_BX = jnp.sort(block_BX, -1)
    index_BXS = block_BX[:, :, None] * BLOCK + jnp.arange(BLOCK)
    value_BX, place_BX = lax.top_k(jnp.take_along_axis(x_BWS, block_BX[:, :, None], 1).reshape(B, -1), count)
    return value_BX, jnp.take_along_axis(index_BXS.reshape(B, -1), place_BX, 1)


def probabilities(x_BV: Array) -> Array:
    """Softmax: logits far from zero lose nothing, since the maximum is taken off before anything is added up."""
    weight_BV = jnp.exp(x_BV - row_max(x_BV)[:, None])
    return weight_BV / blocks(weight_BV, 0).sum(-1).sum(-1)[:, None]


def top_and_log_sum(x_BV: Array) -> tuple[Array, Array]:
    """[B] the maximum, and [B] log of the sum of exp(x - maximum): log softmax is (x - top) - log_sum."""
    x_BWS = blocks(x_BV, -jnp.inf)
    top_B = x_BWS.max(-1).max(-1)
    return top_B, jnp.log(jnp.exp(x_BWS - top_B[:, None, None]).sum(-1).sum(-1))


def draw(x_BV: Array, uniform_B2: Array) -> Array:
    """[B] an index with probability softmax(x), from two uniform numbers in [0, 1) a row.

    Inverts the cumulative sum twice: the first number chooses a block by its mass, the second a token in the block.
    (Gumbel noise for every token costs 15.7 ms of threefry for 16 x 49,152 on two cores, this 0.3 ms; and two numbers
    resolve 2^-46, where float32 noise ends at 2^-23.)
    """
    x_BWS = blocks(x_BV, -jnp.inf)
    top_B = x_BWS.max(-1).max(-1)
    mass_BW = jnp.exp(x_BWS - top_B[:, None, None]).sum(-1)
    block_B = _invert(mass_BW, uniform_B2[:, 0])
    x_BS = jnp.take_along_axis(x_BWS, block_B[:, None, None], 1)[:, 0]
    return block_B * BLOCK + _invert(jnp.exp(x_BS - top_B[:, None]), uniform_B2[:, 1])


def _invert(mass_BX: Array, uniform_B: Array) -> Array:
    """First index whose cumulative mass exceeds uniform * total: never one of mass 0.

    Uniform numbers are multiples of 2^-23 below 1, so the product is below the total after rounding too.
    """
    reached_BX = jnp.cumsum(mass_BX, -1)
    return jnp.argmax(reached_BX > (uniform_B * reached_BX[:, -1])[:, None], -1).astype(jnp.int32)


class _Search(NamedTuple):
    """What lies at or above float `low` reaches the target, at or above `high` it does not."""

    low_B: Array
    high_B: Array
    low_sum_B: Array
    high_sum_B: Array
    turn: Array


def kth_largest(x_BV: Array, k_B: Array) -> Array:
    """[B] the k-th largest value of each row, equal ones counted one by one; -inf where k is 0 or less."""
    def count(is_kept_BWS: Array, _: Array) -> Array:
        return is_kept_BWS.astype(jnp.float32)

    x_BWS = blocks(x_BV, -jnp.inf)
    probe_B = x_BWS.max(-1).max(-1) - COUNT_PROBE
    return _search(x_BWS, k_B.astype(jnp.float32), probe_B, measured=count, least=jnp.ones_like)


def least_of_mass(probability_BV: Array, mass_B: Array) -> Array:
    """[B] the largest value such that the entries at or above it sum to `mass` or more; 0 where mass is 0 or less.

    Args:
      probability_BV: rows that sum to 1.
    """
    def mass(is_kept_BWS: Array, x_BWS: Array) -> Array:
        return jnp.where(is_kept_BWS, x_BWS, 0)

    # All entries below (1 - mass) / V sum to less than 1 - mass, so the answer is rarely below.
    probe_B = (1 - mass_B) / probability_BV.shape[1]
    least_B = _search(blocks(probability_BV, 0), mass_B, probe_B, measured=mass, least=lambda low_B: low_B)
    return jnp.maximum(least_B, 0)


def _search(
    x_BWS: Array,
    target_B: Array,
    probe_B: Array,
    *,
    measured: Callable[[Array, Array], Array],
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


def _key(x: Array) -> Array:
    """Integers in the order of floats."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _unkey(key: Array) -> Array:
    return lax.bitcast_convert_type(key ^ ((key >> 31) & 0x7FFFFFFF), jnp.float32)
