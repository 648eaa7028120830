"""float8 e4m3fn by its definition: a sign, four bits of exponent with bias 7, three of mantissa; no infinities."""

from __future__ import annotations

import numpy as np

NAN = 0x7F


def value_of_float8(bits: int) -> float:
    sign, exponent, mantissa = (-1) ** (int(bits) >> 7), (int(bits) >> 3) & 15, int(bits) & 7
    assert (int(bits) & NAN) != NAN, "no number"
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def float8(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Random bits of numbers, uint8; the largest and the smallest subnormal among them."""
    bits = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    bits[(bits & NAN) == NAN] = 0x7E
    bits.flat[0], bits.flat[-1] = 0xFE, 0x01
    return bits
