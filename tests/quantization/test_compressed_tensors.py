"""compressed-tensors: packed integers, int8 and 8-bit floats by plain loops; targets of groups; what is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxserve.core.errors import ModelError, UnsupportedModelError, WeightsError
from jaxserve.quantization.codes import FloatCodes, IntCodes
from jaxserve.quantization.formats.compressed_tensors import CompressedTensorsScheme
from tests.quantization import bit_strings
from tests.quantization.float8 import float8, value_of_float8

INS, OUTS, GROUP = 64, 20, 32
DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token", "observer": None}


def config(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **group: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "version": "0.14",
        "ignore": ["lm_head"], "kv_cache_scheme": None, "config_groups": {"group_0": {
            "targets": ["Linear"], "output_activations": None, "input_activations": inputs, **group,
            "weights": {"dynamic": False, "symmetric": True, "observer": "minmax", "observer_kwargs": {}, **weights},
        }},
    }


def packed(bits: int, group: int, *, is_symmetric: bool, dtype: type) -> tuple[dict[str, Any], np.ndarray]:
    count = 1 if group == -1 else INS // group
    code_OI, scale_OG = bit_strings.draw(1, (OUTS, INS), bits), bit_strings.scales(2, (OUTS, count), dtype)
    zero_OG = bit_strings.draw(3, (OUTS, count), bits)
    stored = {
        "weight_packed": bit_strings.rows_of_words(code_OI, bits), "weight_scale": scale_OG,
        "weight_shape": np.array([OUTS, INS], np.int64),
    }
    if not is_symmetric:
        stored["weight_zero_point"] = bit_strings.columns_of_words(zero_OG, bits)
    weight = np.empty((OUTS, INS), np.float32)
    for o in range(OUTS):
        for i in range(INS):
            g = 0 if group == -1 else i // group
            signed = code_OI[o, i] - 2 ** (bits - 1)
            zero = 0 if is_symmetric else zero_OG[o, g] - 2 ** (bits - 1)
            weight[o, i] = np.float32(scale_OG[o, g]) * (signed - zero)
    return stored, weight


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_packed_integers(bits: int, group: int, is_symmetric: bool, dtype: type) -> None:
    stored, weight = packed(bits, group, is_symmetric=is_symmetric, dtype=dtype)
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    scheme = CompressedTensorsScheme.parse(config(
        "pack-quantized", {"num_bits": bits, "type": "int", "symmetric": is_symmetric, **strategy}
    ))
    assert scheme.shape("m", stored) == (OUTS, INS)
    np.testing.assert_array_equal(scheme.codes("m", stored).dequantised(), weight)


@pytest.mark.parametrize("inputs", [None, DYNAMIC, {**DYNAMIC, "dynamic": False, "strategy": "tensor"}])
@pytest.mark.parametrize("is_one", [False, True])
def test_integers(inputs: dict[str, Any] | None, is_one: bool) -> None:
    code_OI = (bit_strings.draw(1, (OUTS, INS), 8) - 128).astype(np.int8)
    scale_O1 = bit_strings.scales(2, (1, 1) if is_one else (OUTS, 1), ml_dtypes.bfloat16)
    stored = {"weight": code_OI, "weight_scale": scale_O1[0] if is_one else scale_O1}
    is_static = inputs is not None and not inputs["dynamic"]
    if is_static:
        stored["input_scale"] = np.array([0.25], np.float32)
    scheme = CompressedTensorsScheme.parse(config(
        "int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor" if is_one else "channel"}, inputs
    ))
    codes = scheme.codes("m", stored)
    assert scheme.shape("m", stored) == (OUTS, INS)
    assert isinstance(codes, IntCodes) is (inputs is not None)
    if isinstance(codes, IntCodes):
        assert codes.activations == ("static" if is_static else "token")
        assert codes.input_scale == (0.25 if is_static else None)
    np.testing.assert_array_equal(codes.dequantised(), np.array([
        [np.float32(scale_O1[0 if is_one else o, 0]) * int(code_OI[o, i]) for i in range(INS)] for o in range(OUTS)
    ], np.float32))


@pytest.mark.parametrize(("strategy", "shape"), [("channel", (OUTS, 1)), ("tensor", (1,)), ("block", (3, 4))])
@pytest.mark.parametrize("form", ["float-quantized", "naive-quantized"])
def test_floats(strategy: str, shape: tuple[int, ...], form: str) -> None:
    """Blocks of 8 x 16, the last of the rows cut short."""
    bits_OI = float8(1, (OUTS, INS))
    scale = bit_strings.scales(2, shape, np.float32)
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "group_size": None}
    if strategy == "block":
        weights["block_structure"] = [8, 16]
    inputs = {**DYNAMIC, "type": "float", **({"strategy": "group", "group_size": 16} if strategy == "block" else {})}
    scheme = CompressedTensorsScheme.parse(config(form, weights, inputs))
    codes = scheme.codes("m", {"weight": bits_OI.view(ml_dtypes.float8_e4m3fn), "weight_scale": scale})
    assert isinstance(codes, FloatCodes) and codes.activations == ("group" if strategy == "block" else "token")
    rows, columns = {"channel": (1, INS), "tensor": (OUTS, INS), "block": (8, 16)}[strategy]
    np.testing.assert_array_equal(codes.dequantised(), np.array([
        [np.float32(value_of_float8(bits_OI[o, i])) * scale.reshape(-1)[o // rows * (INS // columns) + i // columns]
         for i in range(INS)] for o in range(OUTS)
    ], np.float32))


def test_a_group_is_found_by_its_targets() -> None:
    settings = config("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP})
    first = settings["config_groups"]["group_0"]
    weights = {**first["weights"], "num_bits": 8, "strategy": "channel", "group_size": None}
    settings["config_groups"] = {
        "group_0": {**first, "targets": [r"re:.*\.mlp\..*"]},
        "group_1": {**first, "targets": ["a.q"], "weights": weights},
    }
    scheme = CompressedTensorsScheme.parse(settings)
    four, weight_of_4 = packed(4, GROUP, is_symmetric=True, dtype=np.float16)
    eight, weight_of_8 = packed(8, -1, is_symmetric=True, dtype=np.float16)
    np.testing.assert_array_equal(scheme.codes("a.mlp.up", four).dequantised(), weight_of_4)
    np.testing.assert_array_equal(scheme.codes("a.q", eight).dequantised(), weight_of_8)
    with pytest.raises(WeightsError, match=r"a\.k is packed, but no target"):
        scheme.codes("a.k", four)


FOUR = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (config("marlin-24", FOUR), "format 'marlin-24'"),
        (config("nvfp4-pack-quantized", FOUR), "format 'nvfp4-pack-quantized'"),
        (config("pack-quantized", {**FOUR, "num_bits": 5}), "num_bits 5"),
        (config("pack-quantized", {**FOUR, "strategy": "tensor_group"}), "strategy 'tensor_group'"),
        (config("pack-quantized", {**FOUR, "actorder": "group"}), "actorder 'group'"),
        (config("float-quantized", {**FP8, "symmetric": False}), "asymmetric float-quantized"),
        (config("float-quantized", FP8, {**DYNAMIC, "type": "float", "num_bits": 4}), "num_bits 4"),
        (config("float-quantized", FP8, {**DYNAMIC, "type": "int"}), "type 'int'"),
        (config("int-quantized", {**FP8, "type": "int"}, {**DYNAMIC, "symmetric": False}), "symmetric False"),
        (config("int-quantized", {**FP8, "type": "int"}, novel=1), "novel"),
        ({**config("int-quantized", {**FP8, "type": "int"}), "quantization_status": "initialized"}, "status 'initial"),
        ({**config("int-quantized", {**FP8, "type": "int"}), "config_groups": {}}, "config_groups"),
        ({**config("int-quantized", {**FP8, "type": "int"}), "transform_config": {"a": 1}}, "transform_config"),
        ({**config("int-quantized", {**FP8, "type": "int"}), "sparsity_config": {"format": "sparse-24-bitmask"}},
         "sparse-24-bitmask"),
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        CompressedTensorsScheme.parse(settings)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("weight_packed", np.zeros((OUTS, 7), np.int32), r"weight_packed is int32 \[20, 7\]; expected int32 \[20, 8\]"),
        ("weight_scale", np.zeros((OUTS, 3), np.float16), r"weight_scale is float16 \[20, 3\]"),
        ("weight_scale", np.full((OUTS, 2), np.nan, np.float16), "weight_scale holds infinities or NaN"),
        ("weight_shape", np.array([OUTS, 0]), r"weight_shape is \[20, 0\]"),
        ("weight_shape", np.array([OUTS, 2**40]), r"weight_packed is int32 \[20, 8\]"),
        ("weight_shape", np.array([OUTS]), r"weight_shape is int64 \[1\]"),
        ("weight_zero_point", np.zeros((OUTS, 2), np.int32), r"weight_zero_point is int32 \[20, 2\]"),
    ],
)
def test_malformed_tensors_are_refused_by_name(name: str, value: np.ndarray, named: str) -> None:
    stored, _ = packed(4, GROUP, is_symmetric=False, dtype=np.float16)
    scheme = CompressedTensorsScheme.parse(config("pack-quantized", {**FOUR, "symmetric": False}))
    with pytest.raises(WeightsError, match=named):
        scheme.codes("layer.q", {**stored, name: value})


def test_an_order_of_groups_is_not_passed_over() -> None:
    stored, _ = packed(4, GROUP, is_symmetric=True, dtype=np.float16)
    with pytest.raises(UnsupportedModelError, match="weight_g_idx"):
        CompressedTensorsScheme.parse(config("pack-quantized", FOUR)).codes(
            "m", {**stored, "weight_g_idx": np.zeros(INS, np.int32)}
        )
