"""Rotary position embeddings in the half-split layout: element i of a head turns with element i + dim/2.

Angles are float32 always: bfloat16 rounds position 257 to 256. Cosines and sines are made once a step, not once a
layer. Knows no heads and no weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple, assert_never

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.core.model_spec import DefaultRope, LinearRope, Llama3Rope, Rope


class Rotation(NamedTuple):
    """Cosine and sine of the angle of each pair, for each token; H is the half of the rotated width."""

    cos_TH: Array
    sin_TH: Array


def frequencies(rope: Rope) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Radians a position, for each pair; host constants in double precision."""
    plain = rope.theta ** (-np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
    match rope:
        case DefaultRope():
            return plain
        case LinearRope():
            return plain / rope.factor
        case Llama3Rope():
            return _llama3(rope, plain)
        case _:
            assert_never(rope)


def _llama3(rope: Llama3Rope, plain: np.ndarray) -> np.ndarray:
    """Wavelengths above original/low_freq_factor are stretched, those below original/high_freq_factor kept."""
    turns = rope.original_context_length * plain / (2 * math.pi)      # full turns within the original context
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return kept * plain + (1.0 - kept) * plain / rope.factor


def rotation(rope: Rope, position_T: Array) -> Rotation:
    """Cosines and sines of a step's positions."""
    frequency_H = jnp.asarray(frequencies(rope), dtype=jnp.float32)
    angle_TH = position_T.astype(jnp.float32)[:, None] * frequency_H
    return Rotation(cos_TH=jnp.cos(angle_TH), sin_TH=jnp.sin(angle_TH))


def rotate(x_TNH: Array, turn: Rotation) -> Array:
    """x with every pair turned by its token's angle; computed in float32, given back in x's dtype."""
    cos_T1H, sin_T1H = turn.cos_TH[:, None, :], turn.sin_TH[:, None, :]
    first_TNH, second_TNH = jnp.split(x_TNH.astype(jnp.float32), 2, axis=-1)
    turned_TNH = jnp.concatenate(
        [first_TNH * cos_T1H - second_TNH * sin_T1H, second_TNH * cos_T1H + first_TNH * sin_T1H], axis=-1
    )
    return turned_TNH.astype(x_TNH.dtype)
