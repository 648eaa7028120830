"""Rows of several matrices with lookup tables under one another: every row keeps the table it was stored with."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.quantization.codes import TableCodes
from jaxserve.weights.packed import _stack_tables


def part(rows: int, tables: int, seed: int) -> TableCodes:
    rng = np.random.default_rng(seed)
    table_ET = rng.standard_normal((tables, 16)).astype(np.float32)
    code_OI = rng.integers(0, 16, (rows, 8)).astype(np.uint8)
    return TableCodes(code_OI=code_OI, table_ET=table_ET, scale_OG=np.ones((1, 1), np.float32))


def values(codes: TableCodes) -> np.ndarray:
    table_OT = np.broadcast_to(codes.table_ET, (len(codes.code_OI), 16))
    return np.take_along_axis(table_OT, codes.code_OI.astype(np.int64), axis=1)


@pytest.mark.parametrize(("first", "second", "tables"), [
    (part(3, 1, 0), part(2, 1, 0), 1),      # the same one, shared
    (part(3, 1, 0), part(2, 1, 1), 5),      # each its own
    (part(3, 1, 0), part(2, 2, 1), 5),      # one shared, the other one a row
    (part(3, 3, 0), part(2, 2, 1), 5),
])
def test_rows_keep_their_tables(first, second, tables):
    stacked = _stack_tables([first, second])
    assert len(stacked.table_ET) == tables
    np.testing.assert_array_equal(values(stacked), np.concatenate([values(first), values(second)]))
