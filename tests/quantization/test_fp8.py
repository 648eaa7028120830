"""`quant_method: fp8`: one scale, one an output, blocks with ragged edges; activations; what is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxserve.core.errors import ModelError, WeightsError
from jaxserve.quantization.formats.fp8 import Fp8Scheme
from tests.quantization import bit_strings
from tests.quantization.float8 import float8, value_of_float8

OUTS, INS = 20, 24
BLOCK = (8, 16)


def as_float8(bits: np.ndarray) -> np.ndarray:
    return bits.view(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize(
    ("settings", "name", "shape", "rows", "columns", "activations"),
    [
        ({"activation_scheme": "dynamic"}, "weight_scale", (), OUTS, INS, "token"),
        ({"activation_scheme": "dynamic"}, "weight_scale", (1,), OUTS, INS, "token"),
        ({"activation_scheme": "dynamic"}, "weight_scale", (OUTS, 1), 1, INS, "token"),
        ({"activation_scheme": "dynamic"}, "weight_scale", (OUTS,), 1, INS, "token"),
        ({"activation_scheme": "static"}, "weight_scale", (1,), OUTS, INS, "static"),
        ({"activation_scheme": "dynamic", "weight_block_size": [8, 16], "fmt": "e4m3"}, "weight_scale_inv", (3, 2),
         *BLOCK, "group"),
    ],
)
def test_weights_are_what_the_formula_says(
    settings: dict[str, Any], name: str, shape: tuple[int, ...], rows: int, columns: int, activations: str
) -> None:
    bits_OI, scale = float8(1, (OUTS, INS)), bit_strings.scales(2, shape, np.float32)
    stored = {"weight": as_float8(bits_OI), name: scale, "input_scale": np.array(0.5, np.float32)}
    scheme = Fp8Scheme.parse({"quant_method": "fp8", "modules_to_not_convert": ["lm_head"], **settings})
    codes = scheme.codes("m", stored)
    assert scheme.shape("m", stored) == (OUTS, INS) and codes.activations == activations
    assert codes.input_scale == (0.5 if activations == "static" else None)
    across = -(-INS // columns)
    np.testing.assert_array_equal(codes.dequantised(), np.array([
        [np.float32(value_of_float8(bits_OI[o, i])) * scale.reshape(-1)[o // rows * across + i // columns]
         for i in range(INS)] for o in range(OUTS)
    ], np.float32))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"activation_scheme": "mixed"}, "activation_scheme 'mixed'"), ({"fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"weight_block_size": [128]}, r"weight_block_size is \[128\]"),
        ({"weight_block_size": [128, 0]}, r"weight_block_size is \[128, 0\]"),
        ({"weight_block_size": [128, "a"]}, "weight_block_size"), ({"novel": 1}, "novel"),
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        Fp8Scheme.parse({"quant_method": "fp8", **changed})


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"weight": np.zeros((OUTS, INS), np.int8)}, "weight is int8"),
        ({"weight": as_float8(np.full((OUTS, INS), 0xFF, np.uint8))}, "weight holds NaN"),
        ({"weight_scale_inv": np.ones((3, 3), np.float32)}, r"weight_scale_inv is float32 \[3, 3\]; .* \[3, 2\]"),
        ({"weight_scale_inv": np.full((3, 2), np.inf, np.float32)}, "weight_scale_inv holds infinities"),
        ({"weight_scale_inv": np.ones((3, 2), np.int32)}, "weight_scale_inv is int32"),
    ],
)
def test_malformed_tensors_are_refused_by_name(changed: dict[str, Any], named: str) -> None:
    stored = {"weight": as_float8(float8(1, (OUTS, INS))), "weight_scale_inv": np.ones((3, 2), np.float32), **changed}
    with pytest.raises(WeightsError, match=named):
        Fp8Scheme.parse({"quant_method": "fp8", "weight_block_size": list(BLOCK)}).codes("layer.q", stored)


@pytest.mark.parametrize("scale", [None, np.ones(2, np.float32), np.array([0.0]), np.array([np.nan])])
def test_a_static_scale_must_be_one_positive_number(scale: np.ndarray | None) -> None:
    stored = {"weight": as_float8(float8(1, (OUTS, INS))), "weight_scale": np.ones(1, np.float32)}
    if scale is not None:
        stored["input_scale"] = scale
    with pytest.raises(WeightsError, match=r"layer\.q\.input_scale"):
        Fp8Scheme.parse({"quant_method": "fp8", "activation_scheme": "static"}).codes("layer.q", stored)


def test_a_missing_scale_is_named() -> None:
    with pytest.raises(WeightsError, match=r"layer\.q\.weight_scale is missing"):
        Fp8Scheme.parse({"quant_method": "fp8"}).codes("layer.q", {"weight": as_float8(float8(1, (OUTS, INS)))})
