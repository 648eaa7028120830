"""Rotary position embeddings as data: which part of a head turns, how fast, and how that is stretched for long text.

Knows no jax. `layers.rope` computes it, `models.hf_rope` reads it from a config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Unscaled:
    """Frequencies theta^(-2i/dim) as in Su et al. 2021."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """Positions divided by `factor` (position interpolation)."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3:
    """Llama 3.1's scaling: long wavelengths divided by `factor`, short ones kept, a ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Yarn:
    """YaRN (arXiv 2309.00071): slow pairs are interpolated, fast ones kept, a ramp by turns within the original
    context between; `attention_factor` multiplies cosines and sines."""

    factor: float
    original_context_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncated: bool = True        # the ramp's ends are rounded to whole pairs
    attention_factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): a divisor a pair, one list for sequences within the original context and one for
    longer ones."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_context_length: int
    attention_factor: float


Scaling = Unscaled | Linear | Llama3 | Yarn | LongRope


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """The first `dim` elements of a head turn, in pairs; the others stay.

    Attributes:
      pairs: element i turns with i + dim/2 ("halves"), or 2i with 2i + 1 ("neighbours").
    """

    theta: float
    dim: int
    scaling: Scaling = Unscaled()
    pairs: Literal["halves", "neighbours"] = "halves"
