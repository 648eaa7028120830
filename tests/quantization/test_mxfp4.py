"""MXFP4: the sixteen values, scales, the order of a byte's halves, stacks of experts, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.core.errors import UnsupportedModelError, WeightsError
from jaxserve.quantization.formats.mxfp4 import Mxfp4Scheme
from jaxserve.weights.files import StoredTensor
from jaxserve.weights.packed import PackedMatrix, with_packed

SCHEME = Mxfp4Scheme.parse({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def stored(**arrays: np.ndarray) -> dict[str, StoredTensor]:
    return {name: StoredTensor(name=name, file="f", data=data) for name, data in arrays.items()}


def element(code: int) -> float:
    """E2M1 by its definition: one bit sign, two bits exponent (bias 1), one bit mantissa."""
    sign, exponent, mantissa = (-1) ** (code >> 3), (code >> 1) & 3, code & 1
    return sign * (mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2))


def test_every_value_and_its_place() -> None:
    codes = np.arange(32) % 16
    blocks = np.tile((codes[0::2] | codes[1::2] << 4).astype(np.uint8), (3, 1, 1))
    found = SCHEME.codes("m", {"blocks": blocks, "scales": np.full((3, 1), 127 + 3, np.uint8)})
    assert SCHEME.shape("m", {"blocks": blocks, "scales": np.zeros((3, 1), np.uint8)}) == (3, 32)
    np.testing.assert_array_equal(found.dequantised(), np.tile([8 * element(code) for code in codes], (3, 1)))


def test_scales_belong_to_blocks_of_32() -> None:
    blocks = np.full((2, 2, 16), 0x22, np.uint8)       # every element is 1
    scales = np.array([[127, 128], [126, 127 - 40]], np.uint8)
    found = SCHEME.codes("m", {"blocks": blocks, "scales": scales}).dequantised()
    np.testing.assert_array_equal(found, np.repeat([[1, 2], [0.5, 2.0**-40]], 32, axis=1))


def test_stacks_become_one_array_of_turned_matrices_and_others_stay() -> None:
    rng, plain = np.random.default_rng(0), np.zeros((3,), np.float32)
    blocks = rng.integers(0, 256, (2, 4, 3, 16)).astype(np.uint8)
    scales = rng.integers(100, 140, (2, 4, 3)).astype(np.uint8)
    found = with_packed(stored(a_blocks=blocks, a_scales=scales, b=plain), SCHEME)
    assert set(found) == {"a", "b"} and found["a"].shape == (2, 96, 4)
    whole = SCHEME.codes("m", {"blocks": blocks[1], "scales": scales[1]}).dequantised()
    odd = found["a"].data[1].T[1::2]
    assert isinstance(odd, PackedMatrix) and odd.shape == (2, 96)
    np.testing.assert_array_equal(odd.codes().dequantised(), whole[1::2])
    np.testing.assert_array_equal(odd.reshape((1, 2, 96)), whole[None, 1::2])


@pytest.mark.parametrize(
    ("blocks", "scales", "named"),
    [
        (np.zeros((2, 4, 1, 16), np.int8), np.zeros((2, 4, 1), np.uint8), r"a.blocks is int8 \[4, 1, 16\]"),
        (np.zeros((2, 4, 1, 8), np.uint8), np.zeros((2, 4, 1), np.uint8), r"\[4, 1, 8\]"),
        (np.zeros((2, 4, 1, 16), np.uint8), np.zeros((2, 4, 2), np.uint8), r"\[4, 2\]"),
        (np.zeros((2, 4, 1, 16), np.uint8), np.zeros((3, 4, 1), np.uint8), r"stacks of \[2, 3\] matrices"),
        (np.zeros((2, 4, 1, 16), np.uint8), np.full((2, 4, 1), 255, np.uint8), "a_scales holds 255: NaN"),
        (np.zeros((2, 4, 1, 16), np.uint8), np.full((2, 4, 1), 253, np.uint8), r"beyond float32 \(252 at most\)"),
    ],
)
def test_what_is_not_mxfp4_is_refused(blocks: np.ndarray, scales: np.ndarray, named: str) -> None:
    with pytest.raises(WeightsError, match=named):
        with_packed(stored(a_blocks=blocks, a_scales=scales), SCHEME)["a"].data[0].T.codes()


def test_a_checkpoint_without_blocks_and_other_settings_are_refused() -> None:
    with pytest.raises(WeightsError, match="in mxfp4, but no tensor ends in _blocks"):
        with_packed(stored(b=np.zeros(3, np.float32)), SCHEME)
    with pytest.raises(UnsupportedModelError, match="block_size = 16 of mxfp4"):
        Mxfp4Scheme.parse({"quant_method": "mxfp4", "block_size": 16})
