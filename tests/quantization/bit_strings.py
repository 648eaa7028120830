"""Packs codes one at a time, as the formats' documents say it; the other direction of what readers do."""

from __future__ import annotations

import numpy as np


def words(codes: list[int], bits: int) -> list[int]:
    """int32 words of one string of codes, the lowest bits first."""
    string = 0
    for place, code in enumerate(codes):
        assert 0 <= code < 1 << bits
        string |= int(code) << (bits * place)
    count = -(-len(codes) * bits // 32)
    unsigned = [(string >> (32 * word)) & 0xFFFFFFFF for word in range(count)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in unsigned]


def rows_of_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each row of codes as a string of its own."""
    return np.array([words(list(row), bits) for row in codes], np.int32)


def columns_of_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Each column of codes as a string of its own, downwards."""
    return rows_of_words(codes.T, bits).T.copy()


def draw(seed: int, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Random codes, the smallest and the largest among them."""
    codes = np.random.default_rng(seed).integers(0, 1 << bits, shape)
    codes.flat[0], codes.flat[-1] = 0, (1 << bits) - 1
    return codes


def scales(seed: int, shape: tuple[int, ...], dtype: type = np.float16) -> np.ndarray:
    """Random scales of the size that real ones have."""
    return np.random.default_rng(seed).uniform(0.001, 0.02, shape).astype(dtype)
