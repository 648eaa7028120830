"""MXFP4 blocks: the sixteen values, scales, the order of a byte's halves, and tensors that are not what they seem."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.core.errors import WeightsError
from jaxserve.weights.files import StoredTensor
from jaxserve.weights.mxfp4 import Mxfp4Array, with_decoded


def stored(**arrays: np.ndarray) -> dict[str, StoredTensor]:
    return {name: StoredTensor(name=name, file="f", data=data) for name, data in arrays.items()}


def element(code: int) -> float:
    """E2M1 by its definition: one bit sign, two bits exponent (bias 1), one bit mantissa."""
    sign, exponent, mantissa = (-1) ** (code >> 3), (code >> 1) & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def test_every_value_and_its_place() -> None:
    codes = np.arange(32) % 16
    blocks = (codes[0::2] | codes[1::2] << 4).astype(np.uint8).reshape(1, 1, 1, 16)
    scales = np.array([[[127 + 3]]], np.uint8)
    matrix = Mxfp4Array(np.tile(blocks, (2, 3, 1, 1)), np.tile(scales, (2, 3, 1)))
    assert matrix.shape == (2, 32, 3) and matrix.dtype.name == "bfloat16"
    np.testing.assert_array_equal(matrix[1][:, 2].astype(float), [8 * element(code) for code in codes])


def test_scales_belong_to_blocks_of_32() -> None:
    blocks = np.full((1, 2, 2, 16), 0x22, np.uint8)       # every element is 1
    scales = np.array([[[127, 128], [126, 127 - 40]]], np.uint8)
    matrix = Mxfp4Array(blocks, scales)[0].astype(float)
    np.testing.assert_array_equal(matrix[:32, 0], 1)
    np.testing.assert_array_equal(matrix[32:, 0], 2)
    np.testing.assert_array_equal(matrix[:32, 1], 0.5)
    np.testing.assert_array_equal(matrix[32:, 1], 2.0**-40)


def test_pairs_become_one_tensor_and_others_stay() -> None:
    plain = np.zeros((3,), np.float32)
    found = with_decoded(stored(
        a_blocks=np.zeros((2, 4, 1, 16), np.uint8), a_scales=np.zeros((2, 4, 1), np.uint8), b=plain,
        c_blocks=plain,
    ))
    assert set(found) == {"a", "b", "c_blocks"} and found["a"].shape == (2, 32, 4)


@pytest.mark.parametrize(
    ("blocks", "scales", "named"),
    [
        (np.zeros((2, 4, 1, 16), np.int8), np.zeros((2, 4, 1), np.uint8), "uint8"),
        (np.zeros((2, 4, 1, 8), np.uint8), np.zeros((2, 4, 1), np.uint8), r"\[2, 4, 1, 8\]"),
        (np.zeros((2, 4, 1, 16), np.uint8), np.zeros((2, 4, 2), np.uint8), r"\[2, 4, 2\]"),
    ],
)
def test_what_is_not_mxfp4_is_refused(blocks: np.ndarray, scales: np.ndarray, named: str) -> None:
    with pytest.raises(WeightsError, match=named):
        with_decoded(stored(a_blocks=blocks, a_scales=scales))
