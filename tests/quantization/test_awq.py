"""AWQ's interleaved columns, zeros stored as they are, older names of its settings; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxserve.core.errors import ModelError, WeightsError
from jaxserve.quantization.formats.awq import AwqScheme
from tests.quantization import bit_strings

INS, OUTS, GROUP = 64, 24, 32
COLUMN_OF_NIBBLE = [0, 2, 4, 6, 1, 3, 5, 7]


def interleaved(code_RO: np.ndarray) -> np.ndarray:
    """Words of eight neighbouring columns, their nibbles in AWQ's order."""
    rows = []
    for row in code_RO:
        eights = [row[at : at + 8] for at in range(0, len(row), 8)]
        rows.append([word for eight in eights for word in bit_strings.words([eight[c] for c in COLUMN_OF_NIBBLE], 4)])
    return np.array(rows, np.int32)


def made(group: int = GROUP, dtype: type = np.float16) -> tuple[dict[str, Any], np.ndarray]:
    count = 1 if group == -1 else INS // group
    code_IO, zero_GO = bit_strings.draw(1, (INS, OUTS), 4), bit_strings.draw(2, (count, OUTS), 4)
    scale_GO = bit_strings.scales(3, (count, OUTS), dtype)
    weight = np.empty((OUTS, INS), np.float32)
    for o in range(OUTS):
        for i in range(INS):
            g = 0 if group == -1 else i // group
            weight[o, i] = np.float32(scale_GO[g, o]) * (code_IO[i, o] - zero_GO[g, o])
    return {"qweight": interleaved(code_IO), "qzeros": interleaved(zero_GO), "scales": scale_GO}, weight


@pytest.mark.parametrize("group", [GROUP, -1])
@pytest.mark.parametrize("settings", [
    {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm", "modules_to_not_convert": ["lm_head"]},
    {"w_bit": 4, "zero_point": True, "version": "GEMM"},
])
def test_weights_are_what_the_formula_says(group: int, settings: dict[str, Any]) -> None:
    stored, weight = made(group)
    scheme = AwqScheme.parse({**settings, "q_group_size" if "w_bit" in settings else "group_size": group})
    assert scheme.shape("m", stored) == (OUTS, INS)
    codes = scheme.codes("m", stored)
    assert codes.code_OI.dtype == np.uint8 and codes.code_OI.shape == (OUTS, INS)
    np.testing.assert_array_equal(codes.dequantised(), weight)


def test_a_symmetric_file_has_zeros_of_8() -> None:
    stored, _ = made()
    stored["qzeros"] = np.full_like(stored["qzeros"], -0x77777778)      # 0x88888888
    scheme = AwqScheme.parse({"bits": 4, "group_size": GROUP, "zero_point": False})
    assert (scheme.codes("m", stored).zero_OG == 8).all()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"bits": 8}, "bits 8"), ({"version": "gemv"}, "version 'gemv'"), ({"group_size": -2}, "group_size is -2"),
        ({"version": 3}, "version is 3"), ({"novel": [1]}, "novel"),
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        AwqScheme.parse({"quant_method": "awq", "bits": 4, "group_size": GROUP, **changed})


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("qweight", np.zeros((INS, 3), np.uint8), r"qweight is uint8 \[64, 3\]"),
        ("qweight", np.zeros((40, 3), np.int32), "40 inputs are no multiple of the group size 32"),
        ("qzeros", np.zeros((3, 3), np.int32), r"qzeros is int32 \[3, 3\]; expected .* \[2, 3\]"),
        ("scales", np.zeros((2, OUTS), np.int32), r"scales is int32"),
        ("scales", np.full((2, OUTS), np.inf, np.float16), "scales holds infinities or NaN"),
    ],
)
def test_malformed_tensors_are_refused_by_name(name: str, value: np.ndarray, named: str) -> None:
    stored, _ = made()
    with pytest.raises(WeightsError, match=named):
        AwqScheme.parse({"bits": 4, "group_size": GROUP}).codes("layer.q", {**stored, name: value})
