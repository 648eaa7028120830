"""SqueezeLLM: tables of 8 and 16 values, sparse values, whole rows; what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxserve.core.errors import ModelError, WeightsError
from jaxserve.quantization.formats.squeezellm import SqueezeLlmScheme
from tests.quantization import bit_strings

INS, OUTS = 64, 6


def made(bits: int) -> tuple[dict[str, Any], np.ndarray]:
    code_IO = bit_strings.draw(bits, (INS, OUTS), bits)
    table = np.random.default_rng(1).normal(size=(OUTS, 1 << bits)).astype(np.float32)
    weight = np.array([[table[o, code_IO[i, o]] for i in range(INS)] for o in range(OUTS)], np.float32)
    return {"qweight": bit_strings.columns_of_words(code_IO, bits), "lookup_table": table}, weight


def outliers() -> dict[str, Any]:
    """Two values in row 0, none in 1 and 2, one in 3, none in 4, three in 5."""
    return {
        "rows": np.array([0, 2, 2, 2, 3, 3, 6], np.int32), "cols": np.array([5, 63, 0, 1, 2, 3], np.int32),
        "vals": np.array([1.5, -2.5, 3.25, 0.125, 7, -9], np.float32), "startrows": np.zeros(128, np.int32),
    }


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("is_hybrid", [False, True])
def test_weights_are_what_the_formula_says(bits: int, is_sparse: bool, is_hybrid: bool) -> None:
    stored, weight = made(bits)
    count = 0
    if is_sparse:
        stored.update(outliers())
        for o, i, value in [(0, 5, 1.5), (0, 63, -2.5), (3, 0, 3.25), (5, 1, 0.125), (5, 2, 7), (5, 3, -9)]:
            weight[o, i] += np.float32(value)
        count += 6
    if is_hybrid:
        full = np.random.default_rng(2).normal(size=(INS, 2)).astype(np.float32)
        stored.update(full_rows=full, full_row_indices=np.array([4, 0], np.int32))
        for i in range(INS):
            weight[4, i] += full[i, 0]
            weight[0, i] += full[i, 1]
        count += 2 * INS
    scheme = SqueezeLlmScheme.parse({"wbits": bits})
    assert scheme.shape("m", stored) == (OUTS, INS) and scheme.form("m", stored).sparse_count == count
    codes = scheme.codes("m", stored)
    assert (0 if codes.value_N is None else len(codes.value_N)) == count
    np.testing.assert_allclose(codes.dequantised(), weight, rtol=1e-6, atol=1e-6)


def test_a_matrix_without_outliers_has_no_sparse_part() -> None:
    stored, weight = made(4)
    empty = {"rows": np.zeros(OUTS + 1, np.int32), "cols": np.zeros(0, np.int32), "vals": np.zeros(0, np.float32)}
    codes = SqueezeLlmScheme.parse({"wbits": 4}).codes("m", {**stored, **empty})
    assert codes.value_N is None
    np.testing.assert_array_equal(codes.dequantised(), weight)


@pytest.mark.parametrize("settings", [{"wbits": 2}, {}, {"wbits": 4, "novel": 1}])
def test_settings_that_are_not_computed_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="wbits|novel"):
        SqueezeLlmScheme.parse(settings)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"lookup_table": np.zeros((OUTS, 8), np.float32)}, r"lookup_table is float32 \[6, 8\]; expected .* \[6, 16\]"),
        ({"lookup_table": np.full((OUTS, 16), np.nan, np.float32)}, "lookup_table holds infinities or NaN"),
        ({"rows": np.zeros(OUTS, np.int32)}, r"rows is int32 \[6\]; expected .* \[7\]"),
        ({"rows": np.array([0, 2, 1, 2, 3, 3, 6])}, "rows must rise from 0 to 6"),
        ({"rows": np.array([0, 2, 2, 2, 3, 3, 5])}, "rows must rise from 0 to 6"),
        ({"cols": np.array([0, 1, 2, 3, 4, INS], np.int32)}, "cols has 0 to 64; expected 0 to 63"),
        ({"cols": np.array([0], np.int32)}, r"cols is int32 \[1\]; expected .* \[6\]"),
        ({"vals": np.full(6, np.inf, np.float32)}, "vals holds infinities or NaN"),
        ({"full_rows": np.zeros((INS, 2), np.float32)}, "full_row_indices is missing"),
        ({"full_rows": np.zeros((INS, 1), np.float32), "full_row_indices": np.array([-1], np.int32)},
         "full_row_indices has -1 to -1; expected 0 to 5"),
    ],
)
def test_malformed_tensors_are_refused_by_name(changed: dict[str, Any], named: str) -> None:
    stored, _ = made(4)
    with pytest.raises(WeightsError, match=named):
        SqueezeLlmScheme.parse({"wbits": 4}).codes("layer.q", {**stored, **outliers(), **changed})
