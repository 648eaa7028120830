"""bitsandbytes: blocks over rows of any length, scales that are quantised once more, LLM.int8's weights; refusals."""

from __future__ import annotations

import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jaxserve.core.errors import ModelError, WeightsError
from jaxserve.quantization.formats.bitsandbytes import BitsAndBytesScheme
from tests.quantization import bit_strings

SETTINGS = {
    "quant_method": "bitsandbytes", "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": ["lm_head"],
    "llm_int8_threshold": 6.0, "load_in_4bit": True, "load_in_8bit": False,
}


def made(
    shape: tuple[int, int], block: int, nested_block: int | None, kind: str = "nf4"
) -> tuple[dict[str, Any], np.ndarray]:
    """A module's tensors and, element by element, the matrix that they are."""
    count = shape[0] * shape[1]
    code, table = bit_strings.draw(1, (count,), 4), np.random.default_rng(2).normal(size=16).astype(np.float32)
    halves = [int(value) for value in code] + [0] * (count % 2)
    packed = np.array([16 * halves[2 * j] + halves[2 * j + 1] for j in range(len(halves) // 2)], np.uint8)
    blocks = -(-count // block)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
    stored = {"weight": packed.reshape(-1, 1), "weight.quant_map": table}
    absmax = bit_strings.scales(3, (blocks,), np.float32)
    if nested_block is not None:
        inner, outer_map = bit_strings.draw(4, (blocks,), 8), np.linspace(-1, 1, 256).astype(np.float32)
        outer = bit_strings.scales(5, (-(-blocks // nested_block),), np.float32)
        state |= {"nested_blocksize": nested_block, "nested_dtype": "float32", "nested_offset": 0.0625}
        stored |= {
            "weight.absmax": inner.astype(np.uint8), "weight.nested_absmax": outer, "weight.nested_quant_map": outer_map
        }
        absmax = np.array(
            [outer_map[inner[b]] * outer[b // nested_block] + np.float32(0.0625) for b in range(blocks)], np.float32
        )
    else:
        stored["weight.absmax"] = absmax
    text = json.dumps(state).encode()
    stored[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(text, np.uint8)
    weight = np.array([table[code[j]] * absmax[j // block] for j in range(count)], np.float32)
    return stored, weight.reshape(shape)


@pytest.mark.parametrize("shape", [(6, 128), (6, 96), (5, 40), (3, 7)])
@pytest.mark.parametrize("nested_block", [None, 4])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_what_the_formula_says(shape: tuple[int, int], nested_block: int | None, kind: str) -> None:
    """Blocks of 64: two a row of 128, straddling rows of 96 and 40; 21 elements are no whole block."""
    stored, weight = made(shape, 64, nested_block, kind)
    scheme = BitsAndBytesScheme.parse({**SETTINGS, "bnb_4bit_quant_type": kind})
    assert scheme.shape("m", stored) == shape
    np.testing.assert_array_equal(scheme.codes("m", stored).dequantised(), weight)


def test_groups_are_as_long_as_blocks_and_rows_allow() -> None:
    scheme = BitsAndBytesScheme.parse(SETTINGS)
    groups = {ins: scheme.form("m", made((4, ins), 64, None)[0]).group for ins in (128, 96, 40, 64, 32)}
    assert groups == {128: 64, 96: 32, 40: 8, 64: None, 32: None}


def test_bytes_may_be_stored_as_another_type() -> None:
    stored, weight = made((4, 128), 64, None)
    stored["weight"] = stored["weight"].reshape(-1).view(ml_dtypes.bfloat16).reshape(-1, 1)
    np.testing.assert_array_equal(BitsAndBytesScheme.parse(SETTINGS).codes("m", stored).dequantised(), weight)


def test_eight_bits_are_what_the_formula_says() -> None:
    code_OI = (bit_strings.draw(1, (5, 32), 8) - 128).astype(np.int8)
    scale_O = bit_strings.scales(2, (5,), np.float32)
    stored = {"weight": code_OI, "SCB": scale_O, "weight_format": np.array(0, np.uint8)}
    scheme = BitsAndBytesScheme.parse({**SETTINGS, "_load_in_8bit": True, "load_in_8bit": True})
    assert scheme.shape("m", stored) == (5, 32) and scheme.form("m", stored).code == "int8"
    np.testing.assert_array_equal(scheme.codes("m", stored).dequantised(), np.array([
        [int(code_OI[o, i]) * (scale_O[o] / np.float32(127)) for i in range(32)] for o in range(5)
    ], np.float32))


@pytest.mark.parametrize("changed", [{"llm_int8_has_fp16_weight": True}, {"novel": 1}])
def test_settings_that_are_not_computed_are_refused_by_name(changed: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(changed))):
        BitsAndBytesScheme.parse({**SETTINGS, **changed})


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"weight": np.zeros((255, 1), np.uint8)}, "weight has 255 bytes; 4 x 128 codes of 4 bits have 256"),
        ({"weight": np.zeros((64, 1), np.int64)}, "weight is int64"),
        ({"weight.absmax": np.zeros(7, np.float32)}, r"weight.absmax is float32 \[7\]; expected .* \[8\]"),
        ({"weight.absmax": np.full(8, np.nan, np.float32)}, "weight.absmax holds infinities or NaN"),
        ({"weight.absmax": np.zeros(8, np.uint8)}, r"blocks of 64 and 0"),
        ({"weight.quant_map": np.zeros(8, np.float32)}, r"weight.quant_map is float32 \[8\]"),
        ({STATE: np.frombuffer(b"{}", np.uint8)}, "is not a state of bitsandbytes"),
        ({STATE: np.frombuffer(b"\xff", np.uint8)}, "is not a state of bitsandbytes"),
        ({STATE: np.frombuffer(b'{"shape": [4, -128], "blocksize": 64}', np.uint8)}, r"shape \[4, -128\]"),
        ({STATE: np.frombuffer(b'{"shape": [4, 128, 1], "blocksize": 64}', np.uint8)}, r"shape \[4, 128, 1\]"),
        ({STATE: np.frombuffer(b'{"shape": [4, 128], "blocksize": 0}', np.uint8)}, "blocks of 0"),
        ({STATE: np.frombuffer(b'{"shape": 4, "blocksize": 64}', np.uint8)}, "is not a state of bitsandbytes"),
    ],
)
def test_malformed_tensors_are_refused_by_name(changed: dict[str, Any], named: str) -> None:
    stored, _ = made((4, 128), 64, None)
    with pytest.raises(WeightsError, match=named):
        BitsAndBytesScheme.parse(SETTINGS).codes("layer.q", {**stored, **changed})


def test_other_orders_of_eight_bits_are_refused() -> None:
    stored = {"weight": np.zeros((4, 32), np.int8), "SCB": np.ones(4, np.float32), "weight_format": np.uint8(2)}
    with pytest.raises(ModelError, match="weight_format is 2"):
        BitsAndBytesScheme.parse(SETTINGS).shape("layer.q", stored)
