"""Rotary position embeddings: frequencies of every kind of scaling, and turning queries and keys.

Angles are float32 always: bfloat16 rounds position 257 to 256. Cosines and sines are made once a step, not once a
layer. Knows no heads and no weights.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, assert_never

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.core.rope import Linear, Llama3, LongRope, Rope, Unscaled, Yarn

Frequencies = np.ndarray[tuple[int], np.dtype[np.float64]]


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each pair, for each token; H is the half of the rotated width."""

    cos_TH: Array
    sin_TH: Array


def frequencies(rope: Rope, *, is_long: bool = False) -> Frequencies:
    """Radians a position, for each pair; host constants in double precision.

    Args:
      is_long: the sequence is longer than the original context; only LongRope asks.
    """
    plain = rope.theta ** (-np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    match rope.scaling:
        case Unscaled():
            return plain
        case Linear(factor=factor):
            return plain / factor
        case Llama3() as scaling:
            return _llama3(scaling, plain)
        case Yarn() as scaling:
            return _yarn(scaling, rope, plain)
        case LongRope() as scaling:
            return plain / np.array(scaling.long_factors if is_long else scaling.short_factors)
        case _:
            assert_never(rope.scaling)


def _llama3(scaling: Llama3, plain: Frequencies) -> Frequencies:
    """Wavelengths above original/low_freq_factor are stretched, those below original/high_freq_factor kept."""
    turns = scaling.original_context_length * plain / (2 * math.pi)      # full turns within the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return _blend(np.clip(kept, 0.0, 1.0), plain, scaling.factor)


def _yarn(scaling: Yarn, rope: Rope, plain: Frequencies) -> Frequencies:
    """Pairs before the one that makes `beta_fast` turns in the original context are kept, those after `beta_slow`
    stretched."""

    def pair_of(turns: float) -> float:
        wavelength = scaling.original_context_length / (turns * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.is_truncated:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    ramp = (np.arange(rope.dim // 2) - first) / max(last - first, 1e-3)
    return _blend(1.0 - np.clip(ramp, 0.0, 1.0), plain, scaling.factor)


def _blend(kept: Frequencies, plain: Frequencies, factor: float) -> Frequencies:
    """The `kept` part of each frequency as it is, the rest divided."""
    return kept * plain + (1.0 - kept) * plain / factor


def rotation(rope: Rope, position_T: Array, is_long_T: Array | None = None) -> Rotation:
    """Cosines and sines of a step's positions.

    Args:
      is_long_T: whether a token's sequence is longer than the original context; needed by LongRope only.
    """
    frequency_TH: Any = jnp.asarray(frequencies(rope), dtype=jnp.float32)
    if isinstance(rope.scaling, LongRope) and is_long_T is not None:
        long_H = jnp.asarray(frequencies(rope, is_long=True), dtype=jnp.float32)
        frequency_TH = jnp.where(is_long_T[:, None], long_H, frequency_TH)
    angle_TH = position_T.astype(jnp.float32)[:, None] * frequency_TH
    size = rope.scaling.attention_factor if isinstance(rope.scaling, Yarn | LongRope) else 1.0
    return Rotation(cos_TH=jnp.cos(angle_TH) * size, sin_TH=jnp.sin(angle_TH) * size)


def rotate(x_TNH: Array, turn: Rotation, rope: Rope) -> Array:
    """x with every pair of its first `rope.dim` elements turned by its token's angle; computed in float32."""
    turning_TNH, still_TNH = x_TNH[..., : rope.dim].astype(jnp.float32), x_TNH[..., rope.dim :]
    cos_TNH, sin_TNH = turn.cos_TH[:, None, :], turn.sin_TH[:, None, :]
    if rope.pairs == "halves":
        first_TNH, second_TNH = jnp.split(turning_TNH, 2, axis=-1)
    else:
        first_TNH, second_TNH = turning_TNH[..., 0::2], turning_TNH[..., 1::2]
    parts = (first_TNH * cos_TNH - second_TNH * sin_TNH, second_TNH * cos_TNH + first_TNH * sin_TNH)
    if rope.pairs == "halves":
        turned_TNH = jnp.concatenate(parts, axis=-1)
    else:
        turned_TNH = jnp.stack(parts, axis=-1).reshape(turning_TNH.shape)
    turned_TNH = turned_TNH.astype(x_TNH.dtype)
    return turned_TNH if rope.dim == x_TNH.shape[-1] else jnp.concatenate([turned_TNH, still_TNH], axis=-1)
